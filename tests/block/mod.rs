//! Block devices in tests: bytes to fill them with, ways to read them, checks that nothing remains of them,
//! and the guest that runs the ublk tests on a machine without ublk.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

pub const MIB: usize = 1 << 20;

/// Seconds after which a guest is ended that hangs. QEMU interprets every instruction where the machine has no KVM: the
/// longest of these tests takes minutes there, and several times that beside other work.
const GUEST_LIMIT: &str = "1800";

/// Random numbers, the same in every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// Bytes without two equal groups of 8, so that a misplaced read shows.
pub fn content(len: usize) -> Vec<u8> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend_from_slice(&random.next().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// True if the condition becomes true within some seconds.
pub fn soon(condition: impl Fn() -> bool) -> bool {
    let until = Instant::now() + Duration::from_secs(5);
    while !condition() {
        if Instant::now() > until {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    true
}

/// The sysfs directory of a device.
pub fn sys_block(device: &Path) -> PathBuf {
    Path::new("/sys/block").join(device.file_name().unwrap())
}

/// Names of this process's threads with this prefix.
pub fn threads(prefix: &str) -> Vec<String> {
    let found = || -> Vec<String> {
        std::fs::read_dir("/proc/self/task")
            .unwrap()
            .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
            .filter(|name| name.starts_with(prefix) && !name.contains("::"))
            .collect()
    };
    soon(|| found().is_empty()); // a joined thread's entry may linger for a moment
    found()
}

/// Opens a device for reading, past the page cache or not.
pub fn open(path: &Path, direct: bool) -> File {
    OpenOptions::new()
        .read(true)
        .custom_flags(if direct { libc::O_DIRECT } else { 0 })
        .open(path)
        .unwrap()
}

/// Reads with a buffer that direct I/O accepts.
pub fn read(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0xaa; len + 4096];
    let start = buffer.as_ptr().align_offset(4096);
    file.read_exact_at(&mut buffer[start..start + len], offset)?;
    Ok(buffer[start..start + len].to_vec())
}

/// One device test at a time: they count threads, and check what remains. Besides, a daemon that starts while
/// another test has something mounted may keep that mount: on a host with private mounts, its copy does not
/// follow the unmount.
pub fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Reads parts of a device with and without the page cache, and compares them.
pub fn random_reads(path: &Path, bytes: &[u8], count: usize) {
    let size = bytes.len() as u64;
    for direct in [true, false] {
        let file = open(path, direct);
        let mut random = Random(7);
        for _ in 0..count {
            let unit = if direct { 512 } else { 1 };
            let offset = random.below(size / unit) * unit;
            let most = (size - offset).min(700 * 1024);
            let len = (random.below(most / unit) + 1) * unit;
            let got = read(&file, offset, len as usize).unwrap();
            assert!(
                got == bytes[offset as usize..][..len as usize],
                "{len} bytes at {offset}, direct {direct}"
            );
        }
    }
}

pub fn root() -> bool {
    rustix::process::geteuid().is_root()
}

/// True if ublk devices can be created here.
pub fn ublk_here() -> bool {
    root() && Path::new("/dev/ublk-control").exists()
}

/// Whether loop devices over FUSE can be made here.
pub fn loop_here() -> bool {
    root() && Path::new("/dev/fuse").exists() && Path::new("/dev/loop-control").exists()
}

/// The mounts that this process sees.
pub fn mounts() -> String {
    std::fs::read_to_string("/proc/self/mountinfo").unwrap()
}

/// Runs tests of this very binary over ublk: here they run directly where there is ublk, else in a guest.
pub fn in_a_guest_with_ublk(words: &[&str], passed: usize) {
    in_a_guest(ublk_here(), words, passed);
}

/// Runs tests of this very binary in a guest: those whose names contain one of the words, `passed` of them. Where
/// this kernel has what they need (`here`), they run without one, and again in a guest only if `TURBOBD_VM_GUEST`
/// names it, as `scripts/test` and `scripts/guest-tests` do. Without a guest it says so and passes, or fails with
/// `TURBOBD_GUEST=1`, which both set.
pub fn in_a_guest(here: bool, words: &[&str], passed: usize) {
    if here && std::env::var_os("TURBOBD_VM_GUEST").is_none() {
        return;
    }
    let vm = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/vm");
    let run = Command::new(&vm)
        .args(["--timeout", GUEST_LIMIT, "--"])
        .arg(std::env::current_exe().unwrap())
        .args(words)
        .args(["--skip", "in_a_guest", "--test-threads=1", "--nocapture"])
        .output();
    let required = std::env::var_os("TURBOBD_GUEST").is_some_and(|value| value == "1");
    let (status, text) = match &run {
        Ok(output) => {
            let text = [&output.stdout[..], &output.stderr].concat();
            (output.status.code(), String::from_utf8_lossy(&text).into_owned())
        }
        Err(error) => (None, error.to_string()),
    };
    println!("{text}");
    if matches!(status, None | Some(125..=127)) && !required {
        println!("SKIPPED: no guest could be started ({}): {words:?} did not run", vm.display());
        return;
    }
    assert_eq!(status, Some(0), "{words:?} fail in the guest");
    assert!(
        text.contains(&format!(" {passed} passed")) && !text.contains("SKIPPED"),
        "{words:?} did not run in the guest"
    );
}
