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

/// Random numbers, equal in every run.
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

/// One guest at a time: a guest takes all processors of the machine, and its time limits are made for that.
pub fn guest_turn() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Runs tests of a module over ublk in a guest, as [`in_a_guest`] does, where this machine has no ublk.
pub fn in_a_guest_with_ublk(module: &str, words: &[&str], passed: usize) {
    in_a_guest(ublk_here(), module, words, passed);
}

/// Runs tests of this very binary in a guest: those of `module` (`module_path!()`) whose names contain one of the
/// words, `passed` of them. Where this kernel has all that they need (`here`), they run without a guest, and again in
/// one only if `TURBOBD_VM_GUEST` names it, as `scripts/test` and `scripts/guest-tests` do. Without a guest it says so
/// and passes, or fails with `TURBOBD_GUEST=1`, which both set.
pub fn in_a_guest(here: bool, module: &str, words: &[&str], passed: usize) {
    if here && std::env::var_os("TURBOBD_VM_GUEST").is_none() {
        return;
    }
    let this = std::env::current_exe().unwrap();
    let names = tests_named(&this, module, words);
    assert_eq!(names.len(), passed, "tests of {module} with {words:?}: {names:?}");
    let scripts =
        Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().map(|dir| dir.join("scripts/vm"));
    let vm = scripts.into_iter().find(|vm| vm.exists()).expect("scripts/vm is in the repository");
    let _turn = guest_turn();
    let run = Command::new(&vm)
        .current_dir(vm.parent().and_then(Path::parent).unwrap())
        .args(["--timeout", GUEST_LIMIT, "--"])
        .arg(this)
        .args(&names)
        .args(["--exact", "--test-threads=1", "--nocapture"])
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
        println!("SKIPPED: no guest could be started ({}): {names:?} did not run", vm.display());
        return;
    }
    assert_eq!(status, Some(0), "{names:?} fail in the guest");
    assert!(
        text.contains(&format!(" {passed} passed")) && !text.contains("SKIPPED"),
        "{names:?} did not run in the guest"
    );
}

/// Names of the tests of a module whose own name contains one of the words; those that start guests are left out.
fn tests_named(binary: &Path, module: &str, words: &[&str]) -> Vec<String> {
    // The first part of a module's path is the name of the binary, which names of tests do not have.
    let prefix = format!("{}::", module.split_once("::").unwrap().1);
    let listed = Command::new(binary).args(["--list", "--format=terse"]).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let names = listed.lines().filter_map(|line| line.strip_suffix(": test"));
    let own = names.filter(|name| {
        let name = name.strip_prefix(&prefix).unwrap_or_default();
        words.iter().any(|word| name.contains(word)) && !name.contains("in_a_guest")
    });
    own.map(str::to_owned).collect()
}
