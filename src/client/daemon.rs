//! Client of the daemon: finds a daemon, or starts one, and sends it requests.

use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::Deserialize;

use formats::trace::Trace;
use source::failure::with_causes;

use crate::connection::Connection;
use crate::detaching::{self, Patience};
use crate::error::{ClientError, Fault, is_late, step};
use crate::mounts::{self, MountPoint, MountRights};
use crate::protocol::{
    self, DeviceRecord, Explanation, OLDEST_VERSION, READY, RUN_DIR_VARIABLE, Reply, Request,
    VERSION, find, socket,
};
use crate::spec::DeviceSpec;

/// Number of times that a client may meet a daemon that is just ending.
const ATTEMPTS: u32 = 5;

/// Longest wait for the first answer of a daemon. Each connection has a thread of its own, so even one with much work
/// answers in milliseconds; the machine may be busy with other work.
const FIRST_ANSWER: Duration = Duration::from_secs(30);

/// Wait of commands that must say within five seconds that a daemon does not answer.
pub const PROMPT: Duration = Duration::from_secs(4);

/// A connection to the daemon.
pub struct DaemonClient {
    connection: Connection,
    path: PathBuf,
    pid: u32,
    /// Bound of an answer, as it was set.
    patience: Duration,
}

impl DaemonClient {
    /// Connects to the daemon of `run_dir`; `None` if there is none.
    ///
    /// # Errors
    /// [`ClientError::Version`]; [`ClientError::Socket`] if there is one that cannot be reached, or can be none;
    /// [`ClientError::Hung`].
    pub fn connect(run_dir: &Path) -> Result<Option<Self>, ClientError> {
        let Some(client) = Self::connect_within(run_dir, FIRST_ANSWER)? else { return Ok(None) };
        client.connection.set_patience(None)?;
        Ok(Some(client))
    }

    /// Form of [`connect`](Self::connect) whose connection, and each answer on it, takes no longer than `patience`.
    ///
    /// # Errors
    /// Those of [`connect`](Self::connect); here and later [`ClientError::Hung`] after that time.
    pub fn connect_within(run_dir: &Path, patience: Duration) -> Result<Option<Self>, ClientError> {
        let Some((client, [oldest, newest])) = Self::open(run_dir, patience)? else {
            return Ok(None);
        };
        if newest.min(VERSION) < oldest.max(OLDEST_VERSION) {
            return Err(ClientError::Version { oldest, newest, ours: VERSION });
        }
        Ok(Some(client))
    }

    /// Connects to the daemon of `run_dir`, and learns the oldest and the newest version that it speaks.
    fn open(run_dir: &Path, patience: Duration) -> Result<Option<(Self, [u32; 2])>, ClientError> {
        let path = socket(run_dir);
        let hung = || hung(&path, server_of(run_dir), patience);
        let stream = match reach(&path, patience) {
            Ok(stream) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(hung()),
            Err(error)
                if [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused]
                    .contains(&error.kind()) =>
            {
                return Ok(None);
            }
            Err(source) => {
                return Err(ClientError::Socket { what: "connect to", socket: path, source });
            }
        };
        trust(&stream).map_err(step("trust the daemon at", &path))?;
        let mut connection = Connection::new(stream, path.clone());
        connection.set_patience(Some(patience))?;
        // An ending daemon closes without an answer: it counts as none.
        if connection.send(&Request::Version).is_err() {
            return Ok(None);
        }
        match connection.receive() {
            Ok(Some(Reply::Version { protocol, oldest, pid, .. })) => {
                let versions = [oldest.unwrap_or(protocol), protocol];
                Ok(Some((Self { connection, path: path.clone(), pid, patience }, versions)))
            }
            Err(error) if is_late(&error) => Err(hung()),
            Ok(Some(other)) => Err(ClientError::Protocol {
                path: path.clone(),
                what: format!("{other:?} in answer to the version request"),
            }),
            Ok(None) | Err(ClientError::Step { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Connects to the daemon of `run_dir`. If there is none, runs `command` in the background, which must
    /// become one (`turbobd daemon --auto`). Its standard
    /// error goes to `turbobd.log` in `run_dir`.
    ///
    /// # Errors
    /// The errors of [`connect`](Self::connect); [`ClientError::NotStarted`] with the end of the log.
    pub fn connect_or_spawn(
        run_dir: &Path,
        command: impl Fn() -> Command,
    ) -> Result<Self, ClientError> {
        sys::private::folder(run_dir).map_err(step("use", run_dir))?;
        // The lock lets one client after the other pass, so that only one of them starts a daemon.
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
            if let Err(error) = spawn(run_dir, command()) {
                // Another one may have come first: that which follows a killed daemon.
                return Self::connect(run_dir)?.ok_or(error);
            }
        }
        Err(ClientError::NoAnswer(socket(run_dir)))
    }

    /// Process id of the daemon.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    fn ask(&mut self, request: &Request) -> Result<Reply, ClientError> {
        let answer = self.connection.send(request).and_then(|()| self.connection.receive());
        match answer.map_err(|error| self.unless_late(error))? {
            Some(Reply::Error(fault)) => Err(fault.into()),
            Some(reply) => Ok(reply),
            None => Err(ClientError::NoAnswer(self.path.clone())),
        }
    }

    fn unless_late(&self, error: ClientError) -> ClientError {
        if is_late(&error) { hung(&self.path, Some(self.pid), self.patience) } else { error }
    }

    /// Bounds each later answer.
    pub(crate) fn set_patience(&mut self, patience: Duration) -> Result<(), ClientError> {
        self.patience = patience;
        self.connection.set_patience(Some(patience))
    }

    fn unexpected(&self, reply: &Reply) -> ClientError {
        ClientError::Protocol {
            path: self.path.clone(),
            what: format!("{reply:?}, which answers another request"),
        }
    }

    /// Creates a device. The second value is a note for the user.
    ///
    /// # Errors
    /// Returns the daemon's error; nothing remains then.
    pub fn attach(
        &mut self,
        request: DeviceSpec,
    ) -> Result<(DeviceRecord, Option<String>), ClientError> {
        match self.ask(&Request::Attach(Box::new(request)))? {
            Reply::Attached { device, note } => {
                let milliseconds = |micros: u64| micros as f64 / 1e3;
                tracing::info!(
                    "opened in {:.1} ms, device made in {:.1} ms",
                    milliseconds(device.opening_us),
                    milliseconds(device.making_us)
                );
                Ok((*device, note))
            }
            other => Err(self.unexpected(&other)),
        }
    }

    /// Creates a device ([`attach`](Self::attach)), then mounts its ext4 at `dir`, in this process's mount
    /// namespace.
    ///
    /// # Errors
    /// Returns the daemon's or the mount's error; nothing remains then.
    pub fn attach_and_mount(
        &mut self,
        request: DeviceSpec,
        dir: &Path,
        rights: MountRights,
    ) -> Result<(DeviceRecord, Option<String>), ClientError> {
        // First the steps that need no device.
        let place = MountPoint::new(dir)?;
        let dir = place.dir().to_owned();
        let (mut device, note) = self.attach(request)?;
        let start = Instant::now();
        if let Err(error) = mounts::mount_image(&device.device, &dir, rights) {
            // The mount's error is the one to return.
            if let Err(left) = self.done(&Request::Detach { id: device.id }) {
                let left = with_causes(&left);
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
        place.keep();
        Ok((device, note))
    }

    /// The devices.
    ///
    /// # Errors
    /// Returns the connection's error.
    pub fn list(&mut self) -> Result<Vec<DeviceRecord>, ClientError> {
        match self.ask(&Request::List)? {
            Reply::Devices(devices) => Ok(devices),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Sources of parts of a device's disk (first byte and length of each), in at most `most` places, and the
    /// device's problems.
    ///
    /// # Errors
    /// Returns the daemon's error.
    pub fn explain(
        &mut self,
        id: u64,
        ranges: Vec<(u64, u64)>,
        most: usize,
    ) -> Result<Explanation, ClientError> {
        match self.ask(&Request::Explain { id, ranges, most })? {
            Reply::Explained(explanation) => Ok(*explanation),
            other => Err(self.unexpected(&other)),
        }
    }

    /// The page of metrics, Prometheus' text.
    ///
    /// # Errors
    /// Returns the connection's error.
    pub fn metrics(&mut self) -> Result<String, ClientError> {
        match self.ask(&Request::Metrics)? {
            Reply::Metrics(text) => Ok(text),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Begins a recording of the reads of the device that `what` names.
    ///
    /// # Errors
    /// Returns the errors of [`find`]; a fault with [`Code::Unsupported`](crate::Code::Unsupported) when it cannot be recorded.
    pub fn begin_trace(&mut self, what: &str) -> Result<DeviceRecord, ClientError> {
        let record = find(&self.list()?, what)?.clone();
        self.done(&Request::BeginTrace { id: record.id })?;
        Ok(record)
    }

    /// Ends the recording, and returns its trace.
    ///
    /// # Errors
    /// Returns the daemon's error, for example when the device is gone.
    pub fn end_trace(&mut self, id: u64) -> Result<Trace, ClientError> {
        match self.ask(&Request::EndTrace { id })? {
            Reply::Traced(trace) => Ok(trace),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Says where a device is mounted; `None`: nowhere.
    ///
    /// # Errors
    /// Returns the daemon's error.
    pub fn mounted(&mut self, id: u64, mountpoint: Option<PathBuf>) -> Result<(), ClientError> {
        self.done(&Request::Mounted { id, mountpoint })
    }

    /// Removes a device that is neither mounted nor open.
    ///
    /// # Errors
    /// Returns the daemon's error, with [`Code::Busy`](crate::Code::Busy) if the device is in use.
    pub fn remove(&mut self, id: u64) -> Result<(), ClientError> {
        self.done(&Request::Detach { id })
    }

    /// False once the daemon has closed the connection, because it has ended. Asks the system, not the daemon.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.connection.is_quiet()
    }

    /// Unmounts the device that `what` names (device, mount point or image) at every place where this process
    /// sees it mounted, and removes it. A device in use is waited for ([`TIMEOUT`](crate::detaching::TIMEOUT)).
    ///
    /// # Errors
    /// Returns the errors of [`find`]; [`ClientError::InUse`], and everything is as it was; the daemon's error.
    pub fn detach(&mut self, what: &str) -> Result<DeviceRecord, ClientError> {
        let timeout = detaching::TIMEOUT;
        self.detach_within(what, Patience { timeout, tell: &mut |_| {}, enough: &|| false })
    }

    /// Form of [`detach`](Self::detach) with another wait for a device in use.
    ///
    /// # Errors
    /// Those of [`detach`](Self::detach).
    pub fn detach_within(
        &mut self,
        what: &str,
        mut patience: Patience<'_>,
    ) -> Result<DeviceRecord, ClientError> {
        let record = find(&self.list()?, what)?.clone();
        detaching::detach(self, &record, &mut patience)?;
        Ok(record)
    }

    /// Asks the daemon to remove unused devices and to end. Returns the devices in use; if there are any, the
    /// daemon stays.
    ///
    /// # Errors
    /// Returns the connection's error.
    pub fn stop(&mut self) -> Result<Vec<DeviceRecord>, ClientError> {
        match self.ask(&Request::Stop)? {
            Reply::Stopping(left) => Ok(left),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Form of [`stop`](Self::stop) for the daemon of `run_dir`, also for one whose versions have nothing in common
    /// with this client's. Returns the devices in use; if there are any, the daemon stays. `None` if there
    /// is no daemon.
    ///
    /// # Errors
    /// Returns the connection's error.
    pub fn stop_any_version(run_dir: &Path) -> Result<Option<Vec<PathBuf>>, ClientError> {
        let Some((mut client, _)) = Self::open(run_dir, FIRST_ANSWER)? else { return Ok(None) };
        client.connection.send(&Request::Stop)?;
        match client.connection.receive()? {
            Some(StopReply::Stopping(left)) => {
                Ok(Some(left.into_iter().map(|left| left.device).collect()))
            }
            Some(StopReply::Error(fault)) => Err(fault.into()),
            None => Err(ClientError::NoAnswer(client.path)),
        }
    }

    fn done(&mut self, request: &Request) -> Result<(), ClientError> {
        match self.ask(request)? {
            Reply::Done => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }
}

/// Connects to a socket. A socket whose queue of connections is full is waited for: `WouldBlock` when the time is over.
fn reach(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(patience))?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// The process that holds the lock of a run directory: `/proc/locks` has it with the inode of the file.
fn server_of(run_dir: &Path) -> Option<u32> {
    let inode = std::fs::metadata(run_dir.join("turbobd.lock")).ok()?.ino();
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    let suffix = format!(":{inode}");
    let fields = locks.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let mut held =
        fields.filter(|fields| fields.get(5).is_some_and(|file| file.ends_with(&suffix)));
    held.find_map(|fields| fields.get(4)?.parse().ok())
}

/// The error of a daemon that does not answer.
fn hung(path: &Path, pid: Option<u32>, waited: Duration) -> ClientError {
    let state = pid.map_or_else(
        || "its process is not known".to_owned(),
        |pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
            match state {
                Some('T' | 't') => {
                    format!("its process {pid} is stopped; it goes on after kill -CONT {pid}")
                }
                Some(_) => format!(
                    "its process {pid} runs; its log is beside the socket, or in the journal"
                ),
                None => format!("its process {pid} is gone"),
            }
        },
    );
    ClientError::Hung { socket: path.to_owned(), seconds: waited.as_secs(), state }
}

/// Refuses a daemon of another user: it would be told credentials, and its devices would be mounted.
fn trust(stream: &UnixStream) -> io::Result<()> {
    let uid = rustix::net::sockopt::socket_peercred(stream)?.uid;
    if uid.is_root() || uid == rustix::process::geteuid() {
        return Ok(());
    }
    let why = format!("its server runs as the user {}", uid.as_raw());
    Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
}

/// The reply to [`Request::Stop`], as far as it is the same in all versions.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum StopReply {
    Stopping(Vec<DeviceInUse>),
    Error(Fault),
}

/// A device that keeps the daemon from its end.
#[derive(Deserialize)]
struct DeviceInUse {
    device: PathBuf,
}

/// Starts a daemon and returns when it accepts connections.
fn spawn(run_dir: &Path, mut command: Command) -> Result<(), ClientError> {
    let log = protocol::log(run_dir);
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&log)
        .map_err(step("open", &log))?;
    let from = file.metadata().map_err(step("examine", &log))?.len();
    let program = PathBuf::from(command.get_program());
    let mut child = command
        .env(RUN_DIR_VARIABLE, run_dir)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(file)
        .spawn()
        .map_err(step("run", program))?;
    // The pipe carries "ready", or ends with the daemon; this does not wait for the daemon itself.
    let mut lines = child.stdout.take().map(BufReader::new).into_iter().flat_map(BufRead::lines);
    if lines.any(|line| line.is_ok_and(|line| line.ends_with(READY))) {
        // Only a client that outlives the daemon needs this: it would leave a zombie.
        let _ = std::thread::Builder::new().name("daemon-wait".into()).spawn(move || child.wait());
        return Ok(());
    }
    let _ = child.wait();
    // Long enough for other processes to write the log's last line.
    std::thread::sleep(Duration::from_millis(10));
    let text = std::fs::read(&log).unwrap_or_default();
    let new = text.get(usize::try_from(from).unwrap_or(usize::MAX)..).unwrap_or_default();
    let new = String::from_utf8_lossy(new);
    let lines: Vec<&str> = new.lines().rev().take(5).collect();
    Err(ClientError::NotStarted {
        log,
        tail: lines.into_iter().rev().collect::<Vec<_>>().join(" | "),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A daemon that gives these lines as its answers, to one connection; returns the requests.
    fn daemon(dir: &Path, answers: Vec<&'static str>) -> std::thread::JoinHandle<Vec<String>> {
        let listener = UnixListener::bind(socket(dir)).unwrap();
        std::thread::spawn(move || {
            let mut reader = BufReader::new(listener.accept().unwrap().0);
            let mut requests = Vec::new();
            for answer in answers {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                requests.push(line.trim_end().to_owned());
                writeln!(reader.get_mut(), "{answer}").unwrap();
            }
            requests
        })
    }

    const OLD: &str = r#"{"version":{"protocol":1,"program":"0.0.1","pid":1}}"#;
    const NEW: &str =
        r#"{"version":{"protocol":99,"oldest":98,"program":"9.0.0","pid":1,"more":true}}"#;

    #[test]
    fn a_daemon_of_another_version_is_refused_and_can_still_be_stopped() {
        for version in [OLD, NEW] {
            let dir = tempfile::tempdir().unwrap();
            let daemon = daemon(dir.path(), vec![version]);
            let refused = DaemonClient::connect(dir.path()).err().unwrap();
            assert!(matches!(refused, ClientError::Version { ours: VERSION, .. }), "{refused}");
            assert_eq!(daemon.join().unwrap(), ["\"version\""]);
        }
        // Its records of devices may have any other fields.
        let left = r#"{"stopping":[{"device":"/dev/ublkb7","id":"seven","since":"monday"}]}"#;
        for (stopping, expected) in
            [(r#"{"stopping":[]}"#, vec![]), (left, vec![PathBuf::from("/dev/ublkb7")])]
        {
            let dir = tempfile::tempdir().unwrap();
            let daemon = daemon(dir.path(), vec![NEW, stopping]);
            assert_eq!(DaemonClient::stop_any_version(dir.path()).unwrap(), Some(expected));
            assert_eq!(daemon.join().unwrap(), ["\"version\"", "\"stop\""]);
        }
        assert_eq!(
            DaemonClient::stop_any_version(tempfile::tempdir().unwrap().path()).unwrap(),
            None
        );
    }
}
