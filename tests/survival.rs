//! The daemon may die: over ublk its devices go on under the next daemon, with the same mount, the same disk and the right bytes.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::block::{self, MIB, Random, alone, root, sys_block, ublk_here};
use crate::image::{Images, OCI_GZIP, gzip, noise, tar_of};
use crate::machine::run;
use crate::run_dir::RunDir;
use client::protocol::DeviceState;
use client::{DaemonClient, DeviceRecord};

/// Longest wait for something that has no limit of its own: a kernel that is interpreted takes tens of seconds.
const PATIENCE: Duration = Duration::from_secs(120);

/// Waits until `look` finds something.
#[track_caller]
fn until<T>(what: &str, look: impl Fn() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "{what} did not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A host with a daemon of its own, and mounted images.
struct Host {
    dir: RunDir,
    mounted: Vec<PathBuf>,
}

impl Host {
    fn new() -> Self {
        Self { dir: RunDir::new(), mounted: Vec::new() }
    }

    /// Attaches an image with one file of noise, `file`; returns its layout.
    fn attach(&mut self, seed: u64, len: usize) -> Images {
        let images = Images::new();
        images.add("latest", &[(OCI_GZIP, gzip(&tar_of(&[("file", &noise(seed, len))])))]);
        let place = self.dir.at(&format!("mnt{seed}"));
        fs::create_dir(&place).unwrap();
        let mount = ["attach", &images.name("latest"), "--frontend", "ublk", "--mount"];
        run(self.dir.turbobd(&mount).arg(&place));
        self.mounted.push(place);
        images
    }

    /// The daemon that answers now.
    fn daemon(&self) -> Option<DaemonClient> {
        DaemonClient::connect(&self.dir.at("run")).ok().flatten()
    }

    fn list(&self) -> Vec<DeviceRecord> {
        self.daemon().and_then(|mut daemon| daemon.list().ok()).unwrap_or_default()
    }

    /// Kills the daemon, and waits until the next one answers.
    fn kill(&self) {
        let pid = until("a daemon", || self.daemon()).pid();
        let process = rustix::process::Pid::from_raw(pid as i32).unwrap();
        rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
        until("the next daemon", || self.daemon().filter(|next| next.pid() != pid));
    }

    /// Ends the daemon with all its devices, and checks that nothing is left of them.
    fn end(mut self) {
        for place in std::mem::take(&mut self.mounted) {
            run(self.dir.turbobd(&["detach"]).arg(place));
        }
        run(&mut self.dir.turbobd(&["daemon", "--stop"]));
        let left = |dir: &str, name: &str| {
            let names = fs::read_dir(dir).into_iter().flatten().flatten();
            names.filter(|entry| entry.file_name().to_string_lossy().contains(name)).count()
        };
        until("the end of all devices", || (left("/dev", "ublkc") == 0).then_some(()));
        assert_eq!(left(self.dir.at("run/devices").to_str().unwrap(), ""), 0);
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for place in &self.mounted {
            let _ = rustix::mount::unmount(place, rustix::mount::UnmountFlags::DETACH);
        }
    }
}

fn diskseq(device: &Path) -> String {
    fs::read_to_string(sys_block(device).join("diskseq")).unwrap()
}

/// Reads a place of the file, past the page cache, and compares it.
fn read_some(file: &File, expected: &[u8], random: &mut Random) {
    let blocks = expected.len() as u64 / 4096;
    let at = random.below(blocks) * 4096;
    let len = (random.below(16) + 1).min(blocks - at / 4096) * 4096;
    let bytes = block::read(file, at, len as usize).unwrap();
    assert!(bytes == expected[at as usize..][..len as usize], "{len} wrong bytes at {at}");
}

fn open_directly(path: &Path) -> File {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).unwrap()
}

fn with_ublk(test: impl FnOnce()) {
    let _alone = alone();
    if root() && ublk_here() {
        test();
    } else {
        println!("SKIPPED: needs root and a kernel with ublk");
    }
}

#[test]
fn over_ublk_no_reader_feels_that_the_daemon_is_killed_again_and_again() {
    with_ublk(|| {
        let expected = noise(1, 4 * MIB);
        let mut host = Host::new();
        let _images = host.attach(1, expected.len());
        let file = host.mounted[0].join("file");
        let device = host.list()[0].device.clone();
        let before = (diskseq(&device), host.list()[0].id);
        let (reads, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            for reader in 0..3 {
                let (expected, file, reads, stop) = (&expected, &file, &reads, &stop);
                scope.spawn(move || {
                    let mut random = Random(reader + 1);
                    while !stop.load(Ordering::Relaxed) {
                        // Another open reads metadata too.
                        let file = open_directly(file);
                        for _ in 0..8 {
                            read_some(&file, expected, &mut random);
                            reads.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
            for _ in 0..6 {
                let seen = reads.load(Ordering::Relaxed);
                until("a read", || (reads.load(Ordering::Relaxed) > seen + 20).then_some(()));
                host.kill();
            }
            let seen = reads.load(Ordering::Relaxed);
            until("a read", || (reads.load(Ordering::Relaxed) > seen + 20).then_some(()));
            stop.store(true, Ordering::Relaxed);
        });
        let now = host.list();
        assert_eq!(now.len(), 1, "{now:?}");
        assert_eq!((diskseq(&device), now[0].id), before);
        assert_eq!((&now[0].device, now[0].mountpoint.as_ref()), (&device, host.mounted.first()));
        assert_eq!((now[0].errors, &now[0].trouble), (0, &None));
        host.end();
    });
}

#[test]
fn over_ublk_a_device_that_cannot_be_taken_back_yet_holds_up_no_other_and_comes_later() {
    with_ublk(|| {
        let mut host = Host::new();
        let first = noise(1, 2 * MIB);
        let second = noise(2, 2 * MIB);
        let _images = host.attach(1, first.len());
        let away = host.attach(2, second.len());
        let hidden = away.path().with_extension("away");
        fs::rename(away.path(), &hidden).unwrap();
        // Files that are no records are named, and left.
        let devices = host.dir.at("run/devices");
        for (name, text) in [("note", "mine"), ("0.device", "torn"), ("1.device", "")] {
            fs::write(devices.join(name), text).unwrap();
        }
        host.kill();
        let one = open_directly(&host.mounted[0].join("file"));
        read_some(&one, &first, &mut Random(3));
        let waits = until("the reason", || {
            let device = host.list().into_iter().find(|device| device.id == 2)?;
            device.trouble.as_ref().filter(|trouble| trouble.contains("Cannot open"))?;
            Some(device)
        });
        assert_eq!(waits.state, DeviceState::Stalled);
        // In use: it is not removed, and no other daemon is needed.
        let busy = until("a daemon", || host.daemon()).remove(2).unwrap_err();
        assert_eq!(busy.code(), client::Code::Busy, "{busy}");
        let log = fs::read_to_string(host.dir.at("run/turbobd.log")).unwrap();
        for name in ["0.device", "1.device"] {
            assert_eq!(log.matches(name).count(), 1, "{log}");
            fs::remove_file(devices.join(name)).unwrap();
        }
        fs::remove_file(devices.join("note")).unwrap();

        fs::rename(&hidden, away.path()).unwrap();
        until("the device", || {
            host.list().iter().all(|device| device.trouble.is_none()).then_some(())
        });
        let other = open_directly(&host.mounted[1].join("file"));
        read_some(&other, &second, &mut Random(4));
        let mut bytes = vec![0; second.len()];
        let buffered = File::open(host.mounted[1].join("file")).unwrap();
        buffered.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == second);
        drop((one, other, buffered));
        host.end();
    });
}

#[test]
fn over_ublk_another_disk_is_never_shown_in_place_of_a_lost_one() {
    with_ublk(|| {
        let mut host = Host::new();
        let images = host.attach(1, MIB);
        // The record names another disk now, as if the image had changed in a way that its name does not tell.
        let path =
            fs::read_dir(host.dir.at("run/devices")).unwrap().next().unwrap().unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let (_, body) = text.split_once('\n').unwrap();
        let at = body.find("\"disk\": \"sha256:").unwrap() + 16;
        let digit = if &body[at..=at] == "0" { "1" } else { "0" };
        let body = format!("{}{digit}{}", &body[..at], &body[at + 1..]);
        let sum = formats::oci::Digest::of(body.as_bytes()).hex();
        fs::write(&path, format!("turbobd-device 1 {sum}\n{body}")).unwrap();
        host.kill();
        let lost = until("the reason", || {
            host.list().into_iter().find(|device| device.state == DeviceState::Failed)
        });
        assert!(lost.trouble.unwrap().contains("layers differ"));
        // It can be detached.
        host.end();
        drop(images);
    });
}

/// Runs the tests above in a guest that has ublk.
#[test]
fn survival_in_a_guest() {
    let _alone = alone();
    block::in_a_guest_with_ublk(module_path!(), &["over_ublk"], 3);
}
