use super::memory::{AttachPlan, FaultyHost, MemoryHost};
use super::*;

/// Long enough for a thread of a loaded machine.
const SOON: Duration = Duration::from_secs(30);

/// Time of a caller that shall not get what it waits for.
const SHORT: Duration = Duration::from_millis(20);

fn source(key: &str) -> DeviceSource {
    DeviceSource {
        key: DeviceKey::of_folder(&format!("{key:0>32}")).unwrap(),
        image: DeviceImage::Config("{}".into()),
        name: key.into(),
    }
}

fn open(host: &Arc<MemoryHost>) -> (tempfile::TempDir, Arc<ContentDevices>) {
    let dir = tempfile::tempdir().unwrap();
    let devices = ContentDevices::open(dir.path().join("devices"), host.clone()).unwrap();
    (dir, devices)
}

fn deadline() -> Instant {
    Instant::now() + SOON
}

#[test]
fn fifty_callers_of_one_content_get_one_device() {
    let host = Arc::new(MemoryHost::new());
    let (_dir, devices) = open(&host);
    let (one, other) = (source("a1"), source("b2"));
    std::thread::scope(|scope| {
        let callers: Vec<_> =
            (0..50).map(|_| scope.spawn(|| devices.ensure(&one, deadline()).unwrap())).collect();
        for caller in callers {
            assert_eq!(caller.join().unwrap(), devices.mount_point(&one.key));
        }
    });
    devices.ensure(&other, deadline()).unwrap();
    assert_eq!(host.attached().len(), 2);
    assert_eq!(host.mounts(), 2);
    let config = devices.folder(&one.key).join(CONFIG_NAME);
    assert_eq!(host.attached()[0].image, ImageSpec::of_device_config(config));
}

#[test]
fn a_device_that_died_with_its_daemon_is_made_again_and_its_mount_is_replaced() {
    let host = Arc::new(MemoryHost::new());
    let (_dir, devices) = open(&host);
    let one = source("a1");
    devices.ensure(&one, deadline()).unwrap();
    host.kill_daemon();
    let error = devices.ensure(&one, deadline()).unwrap_err();
    assert!(matches!(error, DeviceError::NoDaemon { .. }), "{error}");
    assert!(error.to_string().contains("systemctl start turbobd"), "{error}");
    host.start_daemon();
    let place = devices.ensure(&one, deadline()).unwrap();
    assert_eq!(host.mounted_at(&place), Some(2));
    assert_eq!((host.mounts(), host.devices().len()), (1, 1));
}

#[test]
fn a_restart_takes_the_device_that_is_there() {
    let host = Arc::new(MemoryHost::new());
    let (dir, devices) = open(&host);
    let one = source("a1");
    devices.ensure(&one, deadline()).unwrap();
    drop(devices);
    let devices = ContentDevices::open(dir.path().join("devices"), host.clone()).unwrap();
    devices.ensure(&one, deadline()).unwrap();
    assert_eq!((host.attached().len(), host.mounts()), (1, 1));
    // What was unmounted behind our back is mounted again.
    host.unmount_all();
    devices.ensure(&one, deadline()).unwrap();
    assert_eq!((host.attached().len(), host.mounts()), (1, 1));
}

#[test]
fn a_slow_device_makes_a_caller_late_holds_up_no_other_and_is_found_by_the_next() {
    let host = Arc::new(FaultyHost::new(AttachPlan::Wait));
    let dir = tempfile::tempdir().unwrap();
    let devices = ContentDevices::open(dir.path().join("devices"), host.clone()).unwrap();
    let slow = source("a1");
    let error = devices.ensure(&slow, Instant::now() + SHORT).unwrap_err();
    assert!(matches!(error, DeviceError::Late { .. }), "{error}");
    assert!(matches!(devices.state(&slow.key), Readiness::Working));
    host.set_plan(AttachPlan::Work);
    devices.ensure(&slow, deadline()).unwrap();
    devices.ensure(&source("b2"), deadline()).unwrap();
}

#[test]
fn a_refusal_reaches_all_who_wait_and_the_next_call_tries_again() {
    let host = Arc::new(FaultyHost::new(AttachPlan::Refuse(Code::Unavailable)));
    let dir = tempfile::tempdir().unwrap();
    let devices = ContentDevices::open(dir.path().join("devices"), host.clone()).unwrap();
    let one = source("a1");
    let error = devices.ensure(&one, deadline()).unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(matches!(devices.state(&one.key), Readiness::Failed(_)));
    host.set_plan(AttachPlan::Work);
    devices.ensure(&one, deadline()).unwrap();
}

#[test]
fn an_idle_device_is_removed_with_its_folder_and_a_needed_or_busy_one_stays() {
    let host = Arc::new(MemoryHost::new());
    let (_dir, devices) = open(&host);
    let (needed, idle, busy) = (source("a1"), source("b2"), source("c3"));
    for source in [&needed, &idle, &busy] {
        devices.ensure(source, deadline()).unwrap();
    }
    host.set_busy(3, true);
    let keys = HashSet::from([needed.key.clone()]);
    devices.remove_idle(&keys, SOON);
    assert_eq!(host.devices().len(), 3);
    devices.remove_idle(&keys, Duration::ZERO);
    assert!(matches!(devices.state(&idle.key), Readiness::Absent));
    assert!(!devices.folder(&idle.key).exists());
    // The busy one is still mounted, so the next container has it too.
    let left: Vec<u64> = host.devices().iter().map(|record| record.id).collect();
    assert_eq!((left, host.mounts()), (vec![1, 3], 2));
    host.set_busy(3, false);
    devices.remove_idle(&keys, Duration::ZERO);
    assert_eq!((host.devices().len(), host.mounts()), (1, 1));
}

#[test]
fn a_sweep_removes_devices_and_dead_mounts_that_no_snapshot_names() {
    let host = Arc::new(MemoryHost::new());
    let (dir, devices) = open(&host);
    let (kept, left) = (source("a1"), source("b2"));
    devices.ensure(&kept, deadline()).unwrap();
    devices.ensure(&left, deadline()).unwrap();
    drop(devices);
    let devices = ContentDevices::open(dir.path().join("devices"), host.clone()).unwrap();
    devices.sweep(&HashSet::from([kept.key.clone()])).unwrap();
    assert_eq!((host.devices().len(), host.mounts()), (1, 1));
    assert!(devices.folder(&kept.key).exists() && !devices.folder(&left.key).exists());
    // Without a daemon, what is mounted is dead.
    host.kill_daemon();
    devices.sweep(&HashSet::new()).unwrap();
    assert_eq!(host.mounts(), 0);
    assert!(!devices.folder(&kept.key).exists());
}
