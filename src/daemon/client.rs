//! Finds a daemon, or starts one, and asks it.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use super::protocol::{Connection, Explanation, Reply, Request, VERSION, socket};
use super::server::READY;
use super::{AttachRequest, DaemonError, DeviceRecord, find, mounts, step};

/// How often a client may meet a daemon that is just ending.
const ATTEMPTS: u32 = 5;

/// A connection to the daemon.
pub struct Client {
    connection: Connection,
    path: PathBuf,
    pid: u32,
}

impl Client {
    /// The daemon of `run_dir`, or `None` if there is none.
    ///
    /// # Errors
    /// [`DaemonError::Version`]; [`DaemonError::Socket`] if there is one that cannot be reached, or can be none.
    pub fn connect(run_dir: &Path) -> Result<Option<Self>, DaemonError> {
        let path = socket(run_dir);
        let stream = match UnixStream::connect(&path) {
            Ok(stream) => stream,
            Err(error)
                if [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused]
                    .contains(&error.kind()) =>
            {
                return Ok(None);
            }
            Err(source) => {
                return Err(DaemonError::Socket { what: "connect to", socket: path, source });
            }
        };
        let mut connection = Connection::new(stream, path.clone());
        // An ending daemon closes without an answer: as good as none.
        if connection.send(&Request::Version).is_err() {
            return Ok(None);
        }
        match connection.receive() {
            Ok(Some(Reply::Version { protocol: VERSION, pid, .. })) => {
                Ok(Some(Self { connection, path, pid }))
            }
            Ok(Some(Reply::Version { protocol, .. })) => {
                Err(DaemonError::Version { theirs: protocol, ours: VERSION })
            }
            Ok(Some(other)) => Err(DaemonError::Protocol {
                path,
                what: format!("{other:?} to a question for the version"),
            }),
            Ok(None) | Err(DaemonError::Step { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The daemon of `run_dir`; if there is none, `command` is run in the background, which must become
    /// one (`turbobd daemon --auto`, with [`DaemonOptions::auto`](super::DaemonOptions)). Its standard
    /// error goes to `turbobd.log` in `run_dir`.
    ///
    /// # Errors
    /// As [`connect`](Self::connect), and [`DaemonError::NotStarted`] with the end of the log.
    pub fn connect_or_spawn(
        run_dir: &Path,
        command: impl Fn() -> Command,
    ) -> Result<Self, DaemonError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(run_dir)
            .map_err(step("create", run_dir))?;
        // Clients come here one after the other, so that one of them starts a daemon.
        let lock = run_dir.join("spawn.lock");
        let file =
            OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&lock);
        let file = file.map_err(step("open", &lock))?;
        flock(&file, FlockOperation::LockExclusive)
            .map_err(io::Error::from)
            .map_err(step("lock", &lock))?;
        for _ in 0..ATTEMPTS {
            if let Some(client) = Self::connect(run_dir)? {
                return Ok(client);
            }
            spawn(run_dir, command())?;
        }
        Err(DaemonError::NoAnswer(socket(run_dir)))
    }

    /// The daemon's process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    fn ask(&mut self, request: &Request) -> Result<Reply, DaemonError> {
        self.connection.send(request)?;
        match self.connection.receive()? {
            Some(Reply::Error { message }) => Err(DaemonError::Remote { message }),
            Some(reply) => Ok(reply),
            None => Err(DaemonError::NoAnswer(self.path.clone())),
        }
    }

    fn unexpected(&self, reply: &Reply) -> DaemonError {
        DaemonError::Protocol {
            path: self.path.clone(),
            what: format!("{reply:?}, which answers another question"),
        }
    }

    /// Makes a device. The second value is what the user should be told.
    ///
    /// # Errors
    /// The daemon's; nothing is left behind then.
    pub fn attach(
        &mut self,
        request: AttachRequest,
    ) -> Result<(DeviceRecord, Option<String>), DaemonError> {
        match self.ask(&Request::Attach(request))? {
            Reply::Attached { device, note } => {
                let milliseconds = |micros: u64| micros as f64 / 1e3;
                tracing::info!(
                    "opened in {:.1} ms, device made in {:.1} ms",
                    milliseconds(device.opening),
                    milliseconds(device.making)
                );
                Ok((device, note))
            }
            other => Err(self.unexpected(&other)),
        }
    }

    /// [`attach`](Self::attach), then mounts the ext4 on the device at `dir`, in this process's mount
    /// namespace.
    ///
    /// # Errors
    /// The daemon's or the mount's; nothing is left behind then.
    pub fn attach_and_mount(
        &mut self,
        request: AttachRequest,
        dir: &Path,
    ) -> Result<(DeviceRecord, Option<String>), DaemonError> {
        // First what needs no device.
        let dir = std::fs::canonicalize(dir).map_err(step("find the mount point", dir))?;
        let (mut device, note) = self.attach(request)?;
        let start = Instant::now();
        if let Err(error) = mounts::mount_image(&device.device, &dir) {
            // Why it could not be mounted is what the user asked about.
            if let Err(left) = self.done(&Request::Detach { id: device.id }) {
                let left = super::with_causes(&left);
                tracing::warn!("{} could not be removed again: {left}", device.device.display());
            }
            return Err(error);
        }
        tracing::info!("mounted in {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
        device.mountpoint = Some(dir.clone());
        if let Err(error) =
            self.done(&Request::Mounted { id: device.id, mountpoint: device.mountpoint.clone() })
        {
            let _ = mounts::unmount_dir(&dir);
            return Err(error);
        }
        Ok((device, note))
    }

    /// The devices.
    ///
    /// # Errors
    /// The connection's.
    pub fn list(&mut self) -> Result<Vec<DeviceRecord>, DaemonError> {
        match self.ask(&Request::List)? {
            Reply::Devices(devices) => Ok(devices),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Where parts of a device's disk (first byte and length of each) come from, in at most `most` places,
    /// and what is wrong with the device.
    ///
    /// # Errors
    /// The daemon's.
    pub fn explain(
        &mut self,
        id: u64,
        ranges: Vec<(u64, u64)>,
        most: usize,
    ) -> Result<Explanation, DaemonError> {
        match self.ask(&Request::Explain { id, ranges, most })? {
            Reply::Explained(explanation) => Ok(*explanation),
            other => Err(self.unexpected(&other)),
        }
    }

    /// The page of metrics, Prometheus' text.
    ///
    /// # Errors
    /// The connection's.
    pub fn metrics(&mut self) -> Result<String, DaemonError> {
        match self.ask(&Request::Metrics)? {
            Reply::Metrics(text) => Ok(text),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Begins to record what is touched of the device that `what` names.
    ///
    /// # Errors
    /// [`find`]'s; [`DaemonError::Recording`] when it cannot be.
    pub fn begin_trace(&mut self, what: &str) -> Result<DeviceRecord, DaemonError> {
        let record = find(&self.list()?, what)?.clone();
        self.done(&Request::BeginTrace { id: record.id })?;
        Ok(record)
    }

    /// Ends that, and returns what was touched.
    ///
    /// # Errors
    /// The daemon's, as when the device is gone.
    pub fn end_trace(&mut self, id: u64) -> Result<crate::trace::Trace, DaemonError> {
        match self.ask(&Request::EndTrace { id })? {
            Reply::Traced(trace) => Ok(trace),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Unmounts the device that `what` names (device, mount point or image) wherever this process sees
    /// it mounted, and removes it.
    ///
    /// # Errors
    /// [`find`]'s; [`DaemonError::Busy`]; the daemon's.
    pub fn detach(&mut self, what: &str) -> Result<DeviceRecord, DaemonError> {
        let record = find(&self.list()?, what)?.clone();
        for place in mounts::mounted_from(&record.device)?.iter().rev() {
            mounts::unmount_dir(place)?;
        }
        self.done(&Request::Detach { id: record.id })?;
        Ok(record)
    }

    /// Asks the daemon to remove what nobody uses and to end. What comes back is in use; if anything
    /// does, the daemon stays.
    ///
    /// # Errors
    /// The connection's.
    pub fn stop(&mut self) -> Result<Vec<DeviceRecord>, DaemonError> {
        match self.ask(&Request::Stop)? {
            Reply::Stopping(left) => Ok(left),
            other => Err(self.unexpected(&other)),
        }
    }

    fn done(&mut self, request: &Request) -> Result<(), DaemonError> {
        match self.ask(request)? {
            Reply::Done => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }
}

/// Starts a daemon and returns when it accepts connections.
fn spawn(run_dir: &Path, mut command: Command) -> Result<(), DaemonError> {
    let log = run_dir.join("turbobd.log");
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&log)
        .map_err(step("open", &log))?;
    let from = file.metadata().map_err(step("examine", &log))?.len();
    let program = PathBuf::from(command.get_program());
    let mut child = command
        .env(super::protocol::RUN_DIR_VARIABLE, run_dir)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(file)
        .spawn()
        .map_err(step("run", program))?;
    // The pipe says "ready", or ends with the daemon; the daemon itself is not waited for.
    let mut lines = child.stdout.take().map(BufReader::new).into_iter().flat_map(BufRead::lines);
    if lines.any(|line| line.is_ok_and(|line| line.ends_with(READY))) {
        // Only a client that outlives the daemon needs this: it would leave a zombie.
        let _ = std::thread::Builder::new().name("daemon-wait".into()).spawn(move || child.wait());
        return Ok(());
    }
    let _ = child.wait();
    // Long enough for the log's last line to be written by whoever shares it.
    std::thread::sleep(Duration::from_millis(10));
    let text = std::fs::read(&log).unwrap_or_default();
    let new = text.get(usize::try_from(from).unwrap_or(usize::MAX)..).unwrap_or_default();
    let new = String::from_utf8_lossy(new);
    let lines: Vec<&str> = new.lines().rev().take(5).collect();
    Err(DaemonError::NotStarted {
        log,
        tail: lines.into_iter().rev().collect::<Vec<_>>().join(" | "),
    })
}
