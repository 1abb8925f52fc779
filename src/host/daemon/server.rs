//! Server of the daemon: accepts connections, answers, and ends when no work is left.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::UnshareFlags;

use super::error::step;
use super::keeper::{Keeper, KeeperOptions};
use super::signals::Signals;
use super::table::DeviceTable;
use super::{HostError, ImageOpener, ReadPolicy, copies, recovery, snapshots};
use crate::endpoint::{Endpoint, Listen};
use crate::leftovers;
use crate::metrics::exporter::{Exporter, ExporterCounters, ExporterOptions};
use crate::metrics::{Page, Process, names};
use client::protocol::{DeviceRecord, OLDEST_VERSION, READY, Reply, Request, VERSION, socket};
use client::{ClientError, Connection};
use disk::DiskRange;
use source::failure::with_causes;

/// Time that a daemon started by a client outlives its last device and connection: long enough for a script
/// that detaches one image and attaches the next, short enough that no idle daemon is left behind noticeably.
pub const IDLE: Duration = Duration::from_secs(3);

/// Time between two looks at the socket's path.
const LOOK: Duration = Duration::from_secs(2);

/// Options of a daemon.
#[derive(Clone, Debug, Default)]
pub struct DaemonOptions {
    /// Directory of its socket; see [`run_dir`](client::protocol::run_dir).
    pub run_dir: PathBuf,
    /// Started by a client (`turbobd daemon --auto`): leaves the session, reports readiness on standard
    /// output, ends when idle.
    pub auto: bool,
    /// Policy for reads that wait.
    pub reads: ReadPolicy,
    /// HTTP address of the metrics; they are on the socket in any case.
    pub exporter: Option<ExporterOptions>,
    /// Where requests of snapshots are taken, by HTTP.
    pub snapshots: Option<Listen>,
    /// The process that starts the next daemon when this one is killed; `None`: an init system does it.
    pub keeper: Option<KeeperOptions>,
}

/// Runs the daemon until it is asked to end. Call it on the main thread before any other thread exists: the
/// mount namespace that it enters is that of the calling thread and its later children.
///
/// # Errors
/// [`HostError::Running`]; [`ClientError::Socket`] and [`HostError::Step`] when it cannot set up.
pub fn run(options: &DaemonOptions, opener: Arc<dyn ImageOpener>) -> Result<(), HostError> {
    // The module of ublk is loaded while this process still may.
    frontends::ublk::probe::load();
    let keeper = Arc::new(Keeper::start(options.keeper.as_ref()));
    let ended = run_kept(options, opener, &keeper);
    keeper.end();
    ended
}

fn run_kept(
    options: &DaemonOptions,
    opener: Arc<dyn ImageOpener>,
    keeper: &Arc<Keeper>,
) -> Result<(), HostError> {
    let run_dir = &options.run_dir;
    // In the host's namespace, where the mounts of dead daemons are.
    let dead = leftovers::remove(None);
    enter_namespace()?;
    if let Err(error) = sys::limits::raise_descriptor_limit() {
        tracing::warn!(%error, "The limit of descriptors stays: few devices can be served");
    }
    for (what, error) in sys::privilege::give_up() {
        tracing::warn!(%error, "The daemon keeps a right that it does not need: {what}");
    }
    // What it makes is for its user alone, whatever mode the code names.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    sys::private::folder(run_dir).map_err(step("use", run_dir))?;
    if options.auto {
        // The daemon leaves the session of the client's terminal.
        let _ = rustix::process::setsid();
    }
    let _lock = lock(run_dir)?;
    let path = socket(run_dir);
    // The lock makes this process the only owner, so an existing socket belongs to a dead daemon.
    let files = leftovers::remove(Some(run_dir));
    for found in [dead, files] {
        found.removed.iter().for_each(|what| tracing::warn!("Removed {what}"));
        found.left.iter().for_each(|what| tracing::warn!("Not removed: {what}"));
    }
    let mask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(&path);
    rustix::process::umask(mask);
    let listener = listener.map_err(|source| ClientError::Socket {
        what: "listen on",
        socket: path.clone(),
        source,
    })?;
    let server = Arc::new(Server {
        table: DeviceTable::new(run_dir.clone(), opener, options.reads).recorded(),
        bound: identity(&path),
        path,
        started: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
        exporter: OnceLock::new(),
        connections: AtomicUsize::new(0),
        ending: AtomicBool::new(false),
        keeper: keeper.clone(),
        wake: eventfd(0, EventfdFlags::CLOEXEC)
            .map_err(io::Error::from)
            .map_err(step("serve", run_dir))?,
    });
    recovery::bring_all_back(&server, |server| &server.table, Server::brought_back);
    server.brought_back();
    watch_signals(&server)?;
    let exporter = options.exporter.as_ref().and_then(|options| export(&server, options));
    let snapshots = options.snapshots.as_ref().and_then(|listen| take_snapshots(&server, listen));
    if options.auto {
        announce().map_err(step("report readiness for", run_dir))?;
    }
    let result = server.accept(&listener, options.auto);
    drop((exporter, snapshots));
    // Not the socket of a daemon that has made the folder anew.
    if identity(&server.path) == server.bound {
        let _ = std::fs::remove_file(&server.path);
    }
    result
}

/// Enters a copy of the host's mounts that follows the host: an unmount there also unmounts here, so that no
/// mount is held while the daemon lives; mounts made here stay here. On a host whose mounts are private, the
/// copy does not change: there, mounts of turbobd's devices are taken out of it.
fn enter_namespace() -> Result<(), HostError> {
    // Deprecated in favour of an unsafe form because of UnshareFlags::FILES, which is not used here.
    #[allow(deprecated)]
    let unshared = rustix::thread::unshare(UnshareFlags::NEWNS);
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    unshared
        .and_then(|()| mount_change("/", slave))
        .map_err(io::Error::from)
        .map_err(step("enter a mount namespace of its own, away from", "/"))?;
    for place in copies::release() {
        tracing::debug!("No copy of the mount {} is kept", place.display());
    }
    Ok(())
}

/// Device and inode of a file; `None` if it is not there.
fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

fn lock(run_dir: &Path) -> Result<File, HostError> {
    let path = run_dir.join("turbobd.lock");
    let options = OpenOptions::new().create(true).truncate(false).write(true).clone();
    let file = sys::private::open(&path, &options).map_err(step("open", &path))?;
    // A daemon that is just ending still holds the lock for a while.
    if !sys::flock::exclusive(&file, Duration::from_secs(2)).map_err(step("lock", &path))? {
        return Err(HostError::Running(run_dir.to_owned()));
    }
    Ok(file)
}

/// Notifies the waiting client, then closes its pipe.
fn announce() -> io::Result<()> {
    rustix::io::write(std::io::stdout().as_fd(), format!("{READY}\n").as_bytes())?;
    let null = OpenOptions::new().write(true).open("/dev/null")?;
    Ok(rustix::stdio::dup2_stdout(&null)?)
}

/// Serves the metrics. A failure here must not stop the devices.
fn export(server: &Arc<Server>, options: &ExporterOptions) -> Option<Exporter> {
    let render = server.clone();
    match Exporter::start(options, Arc::new(move || render.metrics())) {
        Ok(exporter) => {
            tracing::info!("The metrics are at http://{}{}", exporter.address(), options.path);
            let _ = server.exporter.set(exporter.counters().clone());
            Some(exporter)
        }
        Err(error) => {
            tracing::warn!(
                "The metrics cannot be served at {}: {error}; choose another port (exporterConfig.port)",
                options.address
            );
            None
        }
    }
}

/// Listens for requests of snapshots. A failure here must not stop the devices either.
fn take_snapshots(server: &Arc<Server>, listen: &Listen) -> Option<Endpoint> {
    let taker = server.clone();
    let take = move |device: &str, config: &Path| taker.table.snapshot(device, config);
    match snapshots::serve(listen, Arc::new(take)) {
        Ok(endpoint) => {
            tracing::info!("Snapshots are made at {}/snapshot", endpoint.listen());
            if let Listen::Tcp(_) = listen {
                tracing::warn!(
                    "Every process that reaches {} can make snapshots: with serviceConfig.address unix:/PATH only root and \
                     this user can",
                    endpoint.listen()
                );
            }
            Some(endpoint)
        }
        Err(error) => {
            tracing::warn!(
                "Snapshots cannot be served at {listen}: {error}; choose another (serviceConfig.address)"
            );
            None
        }
    }
}

fn watch_signals(server: &Arc<Server>) -> Result<(), HostError> {
    let failed = step("watch signals for", &server.path);
    let server = server.clone();
    let spawn = |mut signals: Signals| {
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            loop {
                signals.wait();
                let left = server.stop();
                if left.is_empty() {
                    return;
                }
                for record in left {
                    tracing::warn!(device = %record.device.display(), image = record.image,
                        "Still in use: the daemon stays; unmount it and try again");
                }
            }
        })
    };
    Signals::new().and_then(spawn).map(drop).map_err(failed)
}

struct Server {
    table: DeviceTable,
    path: PathBuf,
    /// Identity of the socket, to know it from another at the same path.
    bound: Option<(u64, u64)>,
    /// Seconds since 1970.
    started: u64,
    exporter: OnceLock<Arc<ExporterCounters>>,
    connections: AtomicUsize,
    ending: AtomicBool,
    keeper: Arc<Keeper>,
    wake: rustix::fd::OwnedFd,
}

/// Counts a connection while it is served.
struct ConnectionGuard<'a>(&'a Server);

impl Drop for ConnectionGuard<'_> {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::SeqCst);
        self.0.wake();
    }
}

impl Server {
    /// Accepts connections until the end. The idle clock restarts with every connection and device.
    fn accept(self: &Arc<Self>, listener: &UnixListener, auto: bool) -> Result<(), HostError> {
        let mut idle_since = None;
        while !self.ending.load(Ordering::SeqCst) {
            let busy = self.connections.load(Ordering::SeqCst) > 0 || !self.table.is_empty();
            let since = *idle_since.get_or_insert_with(Instant::now);
            if busy || !auto {
                idle_since = None;
            } else if since.elapsed() >= IDLE && self.table.close_if_empty() {
                return Ok(());
            }
            // Without its socket no client can reach it.
            if identity(&self.path) != self.bound && self.table.close_if_empty() {
                tracing::warn!(
                    "{} is gone, and no device is served: the daemon ends",
                    self.path.display()
                );
                return Ok(());
            }
            let wait = if auto && !busy {
                LOOK.min(IDLE.saturating_sub(since.elapsed()) + Duration::from_millis(1))
            } else {
                LOOK
            };
            let timeout =
                Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: wait.subsec_nanos().into() };
            let mut events =
                [PollFd::new(listener, PollFlags::IN), PollFd::new(&self.wake, PollFlags::IN)];
            match poll(&mut events, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(step("wait on", &self.path)(error.into())),
            }
            if events[1].revents().contains(PollFlags::IN) {
                let _ = rustix::io::read(&self.wake, &mut [0_u8; 8]);
            }
            if events[0].revents().contains(PollFlags::IN) {
                idle_since = None;
                match listener.accept() {
                    Ok((stream, _)) => self.serve(stream),
                    Err(error) => tracing::warn!(%error, "A connection was lost"),
                }
            }
        }
        Ok(())
    }

    /// Notes that a device has been brought back, or cannot be.
    fn brought_back(&self) {
        if !self.table.has_returning() {
            self.keeper.settled();
        }
        self.wake();
    }

    fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn serve(self: &Arc<Self>, stream: UnixStream) {
        self.connections.fetch_add(1, Ordering::SeqCst);
        let server = self.clone();
        let thread = std::thread::Builder::new().name("connection".into()).spawn(move || {
            let _served = ConnectionGuard(&server);
            let mut connection = Connection::new(stream, server.path.clone());
            if let Err(error) = server.converse(&mut connection) {
                tracing::warn!(error = with_causes(&error), "A connection has ended with an error");
            }
        });
        if let Err(error) = thread {
            self.connections.fetch_sub(1, Ordering::SeqCst);
            tracing::error!(%error, "Cannot start a thread for a connection");
        }
    }

    fn converse(&self, connection: &mut Connection) -> Result<(), HostError> {
        while let Some(request) = connection.receive()? {
            let (reply, end) = self.answer(request);
            // An attach whose client is gone leaves a device without an owner.
            let orphan = match &reply {
                Reply::Attached { device, .. } => Some(device.id),
                _ => None,
            };
            let sent = connection.send(&reply);
            if let (Err(_), Some(id)) = (&sent, orphan) {
                self.table.detach(id)?;
            }
            if end {
                self.ending.store(true, Ordering::SeqCst);
                self.wake();
            }
            sent?;
        }
        Ok(())
    }

    /// The reply, and true if the daemon ends after it.
    fn answer(&self, request: Request) -> (Reply, bool) {
        let table = &self.table;
        let reply = match request {
            Request::Version => Ok(Reply::Version {
                protocol: VERSION,
                oldest: Some(OLDEST_VERSION),
                program: env!("CARGO_PKG_VERSION").into(),
                pid: std::process::id(),
            }),
            Request::Attach(spec) => {
                let attached = table.attach(&spec);
                attached.map(|(device, note)| Reply::Attached { device: Box::new(device), note })
            }
            Request::Mounted { id, mountpoint } => {
                table.mounted(id, mountpoint).map(|()| Reply::Done)
            }
            Request::List => Ok(Reply::Devices(table.list())),
            Request::Detach { id } => table.detach(id).map(|()| Reply::Done),
            Request::Explain { id, ranges, most } => {
                let ranges: Vec<_> =
                    ranges.into_iter().map(|(offset, len)| DiskRange::new(offset, len)).collect();
                table.explain(id, &ranges, most).map(|told| Reply::Explained(Box::new(told)))
            }
            Request::Metrics => Ok(Reply::Metrics(self.metrics())),
            Request::BeginTrace { id } => table.begin_trace(id).map(|()| Reply::Done),
            Request::EndTrace { id } => table.end_trace(id).map(Reply::Traced),
            Request::Stop => {
                let left = table.close();
                let end = left.is_empty();
                return (Reply::Stopping(left), end);
            }
        };
        (reply.unwrap_or_else(|error| Reply::Error(error.fault())), false)
    }

    /// The page of metrics.
    fn metrics(&self) -> String {
        let mut page = Page::new();
        page.put(names::PROCESS, &Process::now(self.started), &[]);
        self.table.observe(&mut page);
        if let Some(exporter) = self.exporter.get() {
            page.put(names::EXPORTER, &**exporter, &[]);
        }
        page.text()
    }

    /// Handles [`Request::Stop`] for signals.
    fn stop(&self) -> Vec<DeviceRecord> {
        let left = self.table.close();
        if left.is_empty() {
            self.ending.store(true, Ordering::SeqCst);
            self.wake();
        }
        left
    }
}
