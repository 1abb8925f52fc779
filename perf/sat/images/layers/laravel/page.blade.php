<html><body><h1>Squares</h1><ul>
@foreach ($rows as $row)<li>{{ $row }}</li>@endforeach
</ul><p>{{ $rows->sum() }} in all</p></body></html>
