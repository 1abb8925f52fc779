<?php
// A small application of Laravel's parts: container, events, router, a Blade template, a collection.
require '/usr/share/php/Illuminate/autoload.php';

use Illuminate\Container\Container;
use Illuminate\Events\Dispatcher;
use Illuminate\Filesystem\Filesystem;
use Illuminate\Http\Request;
use Illuminate\Routing\Router;
use Illuminate\View\Compilers\BladeCompiler;
use Illuminate\View\Engines\CompilerEngine;
use Illuminate\View\Engines\EngineResolver;
use Illuminate\View\Factory;
use Illuminate\View\FileViewFinder;

$container = new Container;
Container::setInstance($container);
$events = new Dispatcher($container);
$files = new Filesystem;
$resolver = new EngineResolver;
$resolver->register('blade', fn () => new CompilerEngine(new BladeCompiler($files, '/srv/app/cache')));
$views = new Factory($resolver, new FileViewFinder($files, ['/srv/app/views']), $events);
$views->setContainer($container);

$router = new Router($events, $container);
$router->get('/', fn () => $views->make('page', ['rows' => collect(range(1, 5))->map(fn ($n) => $n * $n)])->render());
$router->dispatch(Request::capture())->send();
