//! The daemon, as processes: this binary is the daemon too.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::block;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use crate::block::{
    MIB, alone, content, loop_here, mounts, open, read, soon, sys_block, ublk_here,
};
use client::mounts::MountRights;
use client::protocol::DeviceState;
use client::{
    ClientError, Code, DaemonClient, DeviceRecord, DeviceSpec, Frontend, ImageSpec, Patience,
};
use disk::testing::MemoryVolume;
use host::daemon::{DaemonOptions, IoCounters, OpenFailure, ServableImage};

/// A device of a raw file. Its path stands where the folder of meta images would.
fn request(image: &str, file: &Path) -> DeviceSpec {
    let image = ImageSpec { meta_dir: Some(file.to_owned()), ..ImageSpec::of_reference(image) };
    DeviceSpec::of(image)
}

/// Opens the raw file of a [`request`].
fn open_image(spec: &DeviceSpec) -> Result<ServableImage, OpenFailure> {
    let bytes = std::fs::read(spec.image.meta_dir.as_ref().unwrap())?;
    let view = Arc::new(|| IoCounters { fetched: 5, cached: 6, ..IoCounters::default() });
    Ok(ServableImage {
        volume: Arc::new(MemoryVolume::new(bytes)),
        name: format!("raw {}", spec.image.name()),
        view,
        recorders: None,
        snapshots: None,
        identity: None,
    })
}

/// Not a test: the body of the daemon that the tests start.
#[test]
fn process() {
    if std::env::var_os("TURBOBD_TEST_DAEMON").is_some() {
        let options = DaemonOptions {
            run_dir: client::protocol::run_dir(),
            auto: true,
            ..DaemonOptions::default()
        };
        host::daemon::run(&options, Arc::new(open_image)).unwrap();
    }
}

struct Host {
    dir: tempfile::TempDir,
    tree: Vec<u8>,
}

impl Host {
    /// A run directory and an ext4 with one file in it.
    fn new() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let tree = content(MIB);
        std::fs::create_dir(dir.path().join("tree")).unwrap();
        std::fs::create_dir(dir.path().join("mnt")).unwrap();
        std::fs::write(dir.path().join("tree/file"), &tree).unwrap();
        let image = dir.path().join("image");
        File::create(&image).unwrap().set_len(8 * MIB as u64).unwrap();
        let made = Command::new("mkfs.ext4")
            .args(["-q", "-F", "-d"])
            .arg(dir.path().join("tree"))
            .arg(image)
            .status();
        made.is_ok_and(|status| status.success()).then_some(Self { dir, tree })
    }

    fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    fn mountpoint(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    fn client(&self) -> DaemonClient {
        DaemonClient::connect_or_spawn(&self.run_dir(), || {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command
                .args([
                    concat!(module_path!(), "::process").split_once("::").unwrap().1,
                    "--exact",
                    "--nocapture",
                ])
                .env("TURBOBD_TEST_DAEMON", "1");
            command
        })
        .unwrap()
    }

    fn request(&self, image: &str) -> DeviceSpec {
        request(image, &self.dir.path().join("image"))
    }

    fn left(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.run_dir()).unwrap().flatten();
        names
            .map(|entry| entry.file_name().into_string().unwrap())
            .filter(|name| name.contains("fuse-"))
            .collect()
    }
}

fn alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

fn gone(record: &DeviceRecord) -> bool {
    let sysfs = sys_block(&record.device);
    soon(|| {
        if record.frontend == Frontend::Loop {
            !sysfs.join("loop").exists()
        } else {
            !sysfs.exists()
        }
    })
}

fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

fn with_host(test: impl FnOnce(&Host)) {
    let _alone = alone();
    match (ublk_here() || loop_here()).then(Host::new).flatten() {
        Some(host) => test(&host),
        None => println!("SKIPPED: needs root, a front end and mkfs.ext4"),
    }
}

#[test]
fn ublk_or_loop_attach_mount_list_detach_and_the_daemon_ends_when_idle() {
    with_host(|host| {
        let mut client = host.client();
        let pid = client.pid();
        let (record, note) = client
            .attach_and_mount(host.request("a:1"), &host.mountpoint(), MountRights::default())
            .unwrap();
        assert_eq!(note.is_some(), record.frontend == Frontend::Loop, "{note:?}");
        assert!(std::fs::read(host.mountpoint().join("file")).unwrap() == host.tree);
        // Here the daemon runs on a thread of the test harness, whose first thread stays in our namespace.
        let namespace = |task: &Path| std::fs::read_link(task.join("ns/mnt")).unwrap();
        let ours = namespace(Path::new("/proc/thread-self"));
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task"))
            .unwrap()
            .map(|task| task.unwrap().path());
        let serving = tasks.filter(|task| {
            std::fs::read_to_string(task.join("comm")).unwrap().starts_with("connection")
        });
        assert!(serving.map(|task| namespace(&task)).all(|theirs| theirs != ours));
        let listed = host.client().list().unwrap();
        assert_eq!(listed.len(), 1);
        assert_eq!((listed[0].state, listed[0].image.as_str()), (DeviceState::InUse, "raw a:1"));
        assert_eq!(listed[0].mountpoint.as_deref(), Some(host.mountpoint().as_path()));
        assert!(listed[0].bytes_read >= MIB as u64 && listed[0].bytes_fetched == 5);
        // In use: neither a stop nor a bare detach takes it away.
        assert_eq!(client.stop().unwrap().len(), 1);
        assert!(std::fs::read(host.mountpoint().join("file")).unwrap() == host.tree);
        let open = File::open(host.mountpoint().join("file")).unwrap();
        let busy = at_once(&mut client, "a:1").unwrap_err();
        assert_eq!(busy.code(), Code::Busy, "{busy:?}");
        drop(open);
        client.detach(host.mountpoint().to_str().unwrap()).unwrap();
        assert!(gone(&record) && client.list().unwrap().is_empty());
        assert!(!mounts().contains(host.mountpoint().to_str().unwrap()));
        assert!(matches!(client.detach("a:1"), Err(ClientError::NotFound(_))));
        drop(client);
        std::thread::sleep(host::daemon::server::IDLE);
        assert!(soon(|| !alive(pid)), "the idle daemon stays");
        assert!(DaemonClient::connect(&host.run_dir()).unwrap().is_none());
        assert_eq!(host.left(), Vec::<String>::new());
    });
}

#[test]
fn ublk_or_loop_failures_leave_nothing_and_name_their_cause() {
    with_host(|host| {
        let mut client = host.client();
        let error = client.attach(request("b:1", Path::new("/nonexistent"))).unwrap_err();
        assert_eq!(error.code(), Code::NotFound, "{error}");
        let error = error.to_string();
        assert!(error.contains("Cannot open b:1: No such file"), "{error}");
        // A disk without a file system: attached, but not mounted.
        let zeros = host.dir.path().join("zeros");
        std::fs::write(&zeros, vec![0; MIB]).unwrap();
        let error = client
            .attach_and_mount(request("c:1", &zeros), &host.mountpoint(), MountRights::default())
            .unwrap_err();
        assert!(matches!(error, ClientError::Step { what: "mount an ext4 at", .. }), "{error:?}");
        assert!(
            client
                .attach_and_mount(
                    host.request("d:1"),
                    &zeros.join("below a file"),
                    MountRights::default()
                )
                .is_err()
        );
        assert_eq!(client.list().unwrap(), []);
        assert_eq!(client.stop().unwrap(), []);
        assert!(soon(|| !alive(client.pid())));
    });
}

#[test]
fn ublk_or_loop_clients_at_once_share_one_daemon_and_sigterm_ends_it() {
    with_host(|host| {
        let records = std::thread::scope(|scope| {
            let attach = |number: usize| {
                let mut client = host.client();
                (client.pid(), client.attach(host.request(&format!("{number}:1"))).unwrap().0)
            };
            let threads: Vec<_> =
                (0..4).map(|number| scope.spawn(move || attach(number))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        let pid = records[0].0;
        assert!(records.iter().all(|record| record.0 == pid));
        assert_eq!(host.client().list().unwrap().len(), 4);
        for (_, record) in &records {
            assert_eq!(read(&open(&record.device, false), 1024, 4096).unwrap().len(), 4096);
        }
        signal(pid, rustix::process::Signal::TERM);
        assert!(soon(|| !alive(pid)), "SIGTERM does not end the daemon");
        assert!(records.iter().all(|(_, record)| gone(record)));
        assert_eq!(host.left(), Vec::<String>::new());
    });
}

#[test]
fn ublk_or_loop_a_killed_daemon_leaves_no_device_and_no_mount_that_the_next_does_not_have() {
    with_host(|host| {
        let mut client = host.client();
        let (record, _) = client.attach(host.request("e:1")).unwrap();
        signal(client.pid(), rustix::process::Signal::KILL);
        assert!(soon(|| !alive(client.pid())));
        // A loop device goes at once; a ublk device waits for the next daemon.
        let is_ublk = record.frontend == Frontend::Ublk;
        assert_eq!(!is_ublk && gone(&record), !is_ublk, "{} is left", record.device.display());
        assert!(!mounts().contains(host.run_dir().to_str().unwrap()));
        // The next client starts another daemon over the dead one's socket.
        let mut next = host.client();
        assert_ne!(next.pid(), client.pid());
        let back = || {
            let devices = host.client().list().unwrap();
            devices.len() == usize::from(is_ublk)
                && devices
                    .iter()
                    .all(|device| device.device == record.device && device.trouble.is_none())
        };
        assert!(soon(back), "{:?}", next.list());
        assert_eq!(next.stop().unwrap(), []);
        assert!(gone(&record), "{} is left", record.device.display());
    });
}

/// Detaches without a wait.
fn at_once(client: &mut DaemonClient, what: &str) -> Result<DeviceRecord, ClientError> {
    let timeout = Duration::ZERO;
    client.detach_within(what, Patience { timeout, tell: &mut |_| {}, enough: &|| false })
}

/// A process that lives until it is dropped; `command` must end with its standard input.
struct Living(std::process::Child);

impl Living {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // It writes a line once it holds what it is to hold.
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut String::new()).unwrap();
        Self(child)
    }
}

impl Drop for Living {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn ublk_or_loop_a_detach_of_a_busy_device_changes_nothing_and_names_the_process() {
    with_host(|host| {
        let mut client = host.client();
        let dir = host.mountpoint();
        let (record, _) =
            client.attach_and_mount(host.request("a:1"), &dir, MountRights::default()).unwrap();
        let refused = |client: &mut DaemonClient, pid: u32| {
            let before = mounts();
            let error = at_once(client, "a:1").unwrap_err();
            assert!(matches!(error, ClientError::InUse { .. }), "{error:?}");
            assert!(error.to_string().contains(&format!("process {pid} (")), "{error}");
            assert_eq!(mounts(), before);
            assert_eq!(client.list().unwrap().len(), 1);
        };
        for holder in [
            Command::new("sh").args(["-c", "echo; exec cat"]).current_dir(&dir),
            Command::new("sh").args(["-c", "exec 7< file; echo; exec cat"]).current_dir(&dir),
            Command::new("unshare").args([
                "-m",
                "--propagation",
                "private",
                "sh",
                "-c",
                "echo; exec cat",
            ]),
        ] {
            let holder = Living::start(holder);
            refused(&mut client, holder.0.id());
            assert!(std::fs::read(dir.join("file")).unwrap() == host.tree);
        }
        // The device alone is open.
        client.mounted(record.id, None).unwrap();
        client::mounts::unmount_dir(&dir).unwrap();
        if record.frontend == Frontend::Loop {
            let holder = Living::start(
                Command::new("sh").args(["-c", "exec 7< $0; echo; exec cat"]).arg(&record.device),
            );
            refused(&mut client, holder.0.id());
            assert_eq!(read(&open(&record.device, false), 1024, 4096).unwrap().len(), 4096);
        }
        client.detach("a:1").unwrap();
        assert!(gone(&record));
    });
}

#[test]
fn ublk_or_loop_a_detach_says_what_it_waits_for_and_takes_all_away_once_it_is_free() {
    with_host(|host| {
        let mut client = host.client();
        let dir = host.mountpoint();
        let (record, _) =
            client.attach_and_mount(host.request("a:1"), &dir, MountRights::default()).unwrap();
        let mut unshare = Command::new("unshare");
        unshare.args(["-m", "--propagation", "private", "sh", "-c", "echo; exec cat"]);
        let mut holder = Some(Living::start(&mut unshare));
        let pid = holder.as_ref().unwrap().0.id();
        let mut told = String::new();
        let mut tell = |text: &str| {
            told = text.to_owned();
            holder = None;
        };
        let timeout = Duration::from_secs(60);
        client
            .detach_within("a:1", Patience { timeout, tell: &mut tell, enough: &|| false })
            .unwrap();
        assert!(told.contains(&format!("process {pid} (")), "{told}");
        assert!(gone(&record) && client.list().unwrap().is_empty());
        assert!(!mounts().contains(dir.to_str().unwrap()));
    });
}

#[test]
fn ublk_or_loop_a_daemon_keeps_no_copy_of_the_mounts_of_another() {
    with_host(|host| {
        let other = Host::new().unwrap();
        let mut client = host.client();
        let dir = host.mountpoint();
        client.attach_and_mount(host.request("a:1"), &dir, MountRights::default()).unwrap();
        let second = other.client();
        client.detach("a:1").unwrap();
        assert!(alive(second.pid()));
    });
}

#[test]
fn a_daemon_that_is_stopped_or_has_a_full_queue_is_reported_and_not_waited_for() {
    with_host(|host| {
        let patience = Duration::from_millis(500);
        let hung = |run_dir: &Path| match DaemonClient::connect_within(run_dir, patience) {
            Err(error @ ClientError::Hung { .. }) => error.to_string(),
            Err(error) => panic!("{error}"),
            Ok(_) => panic!("a daemon answers"),
        };
        let pid = host.client().pid();
        signal(pid, rustix::process::Signal::STOP);
        let text = hung(&host.run_dir());
        signal(pid, rustix::process::Signal::CONT);
        assert!(text.contains(&format!("process {pid} is stopped")), "{text}");
        // No process takes these connections.
        let dir = tempfile::tempdir().unwrap();
        let path = client::protocol::socket(dir.path());
        let flags = rustix::net::SocketFlags::CLOEXEC;
        let (unix, stream) = (rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM);
        let listener = rustix::net::socket_with(unix, stream, flags, None).unwrap();
        rustix::net::bind(&listener, &rustix::net::SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let waiting = std::os::unix::net::UnixStream::connect(&path).unwrap();
        hung(dir.path());
        drop(waiting);
    });
}

#[test]
fn a_daemon_without_a_device_ends_when_its_run_folder_is_gone() {
    with_host(|host| {
        // With a connection it is not idle.
        let client = host.client();
        std::fs::remove_dir_all(host.run_dir()).unwrap();
        assert!(soon(|| !alive(client.pid())), "the daemon stays");
    });
}

#[test]
fn the_mount_and_the_loop_device_of_a_killed_daemon_are_removed_by_the_next() {
    with_host(|host| {
        if !loop_here() {
            return;
        }
        let mut client = host.client();
        let dir = host.mountpoint();
        let spec = DeviceSpec { frontend: Frontend::Loop, ..host.request("a:1") };
        let (record, _) = client.attach_and_mount(spec, &dir, MountRights::default()).unwrap();
        let folder = host.run_dir().join(format!("fuse-{}-99", client.pid()));
        std::fs::create_dir(&folder).unwrap();
        signal(client.pid(), rustix::process::Signal::KILL);
        assert!(soon(|| !alive(client.pid())));
        assert!(mounts().contains(dir.to_str().unwrap()), "the kernel keeps the mount");
        let mut next = host.client();
        assert!(!mounts().contains(dir.to_str().unwrap()));
        assert!(gone(&record) && !folder.exists());
        assert_eq!(next.stop().unwrap(), []);
    });
}

/// Runs the tests above in a guest that has ublk.
#[test]
fn daemon_in_a_guest() {
    let _alone = alone();
    block::in_a_guest_with_ublk(module_path!(), &["ublk_or_loop_"], 7);
}
