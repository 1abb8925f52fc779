//! Doubles of [`DeviceHost`]: one in memory, and one that fails or waits on request.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use client::{ClientError, Code, DeviceRecord, DeviceSpec, Fault, Frontend, step};
use parking_lot::{Condvar, Mutex};

use super::host::{DeviceHost, Refusal};

/// A daemon and a kernel in memory.
#[derive(Default)]
pub struct MemoryHost {
    state: Mutex<MemoryState>,
}

#[derive(Default)]
struct MemoryState {
    life: Option<u64>,
    lives: u64,
    last: u64,
    records: BTreeMap<u64, DeviceRecord>,
    mounts: BTreeMap<PathBuf, Vec<u64>>,
    busy: Vec<u64>,
    attached: Vec<DeviceSpec>,
}

impl MemoryHost {
    /// A host whose daemon runs.
    #[must_use]
    pub fn new() -> Self {
        let host = Self::default();
        host.start_daemon();
        host
    }

    /// Starts a daemon without devices.
    pub fn start_daemon(&self) {
        let mut state = self.state.lock();
        state.lives += 1;
        state.life = Some(state.lives);
    }

    /// Kills the daemon: its devices are gone, and mounts of them stay.
    pub fn kill_daemon(&self) {
        let mut state = self.state.lock();
        state.life = None;
        state.records.clear();
    }

    /// Unmounts everything, as a reboot does.
    pub fn unmount_all(&self) {
        self.state.lock().mounts.clear();
    }

    /// Requests for devices so far.
    #[must_use]
    pub fn attached(&self) -> Vec<DeviceSpec> {
        self.state.lock().attached.clone()
    }

    /// The devices.
    #[must_use]
    pub fn devices(&self) -> Vec<DeviceRecord> {
        self.state.lock().records.values().cloned().collect()
    }

    /// Number of the folders on which something is mounted.
    #[must_use]
    pub fn mounts(&self) -> usize {
        self.state.lock().mounts.values().filter(|mounts| !mounts.is_empty()).count()
    }

    /// A container uses the device of this number, or not.
    pub fn set_busy(&self, id: u64, busy: bool) {
        let mut state = self.state.lock();
        state.busy.retain(|other| *other != id);
        if busy {
            state.busy.push(id);
        }
    }
}

impl MemoryState {
    fn running(&self) -> Result<(), Refusal> {
        self.life.map(|_| ()).ok_or(None)
    }
}

impl DeviceHost for MemoryHost {
    fn socket(&self) -> PathBuf {
        "/nowhere/turbobd.sock".into()
    }

    fn life(&self) -> Option<u64> {
        self.state.lock().life
    }

    fn list(&self) -> Result<Vec<DeviceRecord>, Refusal> {
        let state = self.state.lock();
        state.running()?;
        Ok(state.records.values().cloned().collect())
    }

    fn attach(&self, spec: DeviceSpec) -> Result<DeviceRecord, Refusal> {
        let mut state = self.state.lock();
        state.running()?;
        state.attached.push(spec.clone());
        if state.records.values().any(|record| record.dev_id == spec.dev_id) {
            return Err(Some(Fault::of(Code::Exists, &io::Error::other("it exists")).into()));
        }
        state.last += 1;
        let id = state.last;
        let device = format!("/dev/memory{id}").into();
        let record = DeviceRecord::new(id, &spec, Frontend::Loop, device);
        state.records.insert(id, record.clone());
        Ok(record)
    }

    fn mounted(&self, id: u64, place: Option<&Path>) -> Result<(), Refusal> {
        let mut state = self.state.lock();
        state.running()?;
        let fault = || Some(ClientError::NotFound(id.to_string()));
        state.records.get_mut(&id).ok_or_else(fault)?.mountpoint = place.map(Path::to_owned);
        Ok(())
    }

    fn remove(&self, id: u64) -> Result<(), Refusal> {
        let mut state = self.state.lock();
        state.running()?;
        if state.busy.contains(&id) || state.mounts.values().flatten().any(|other| *other == id) {
            return Err(Some(Fault::of(Code::Busy, &io::Error::other("it is in use")).into()));
        }
        state.records.remove(&id);
        Ok(())
    }

    fn number(&self, device: &Path) -> Result<u64, Refusal> {
        let name = device.to_string_lossy();
        let number = name.strip_prefix("/dev/memory").and_then(|number| number.parse().ok());
        number.ok_or_else(|| Some(step("examine", device)(io::ErrorKind::NotFound.into())))
    }

    fn mounted_at(&self, place: &Path) -> Option<u64> {
        self.state.lock().mounts.get(place)?.last().copied()
    }

    fn mount(&self, device: &Path, place: &Path) -> Result<(), Refusal> {
        let number = self.number(device)?;
        self.state.lock().mounts.entry(place.to_owned()).or_default().push(number);
        Ok(())
    }

    fn unmount(&self, place: &Path) -> Result<(), Refusal> {
        self.detach_mount(place)
    }

    fn detach_mount(&self, place: &Path) -> Result<(), Refusal> {
        let mut state = self.state.lock();
        let none = || Some(step("unmount", place)(io::ErrorKind::InvalidInput.into()));
        state.mounts.get_mut(place).and_then(Vec::pop).map(|_| ()).ok_or_else(none)
    }
}

/// A host whose next attach is refused, or waits until it is told to go on.
pub struct FaultyHost {
    inner: MemoryHost,
    plan: Mutex<AttachPlan>,
    changed: Condvar,
}

/// What happens to an attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachPlan {
    /// It succeeds.
    Work,
    /// It is refused with this code.
    Refuse(Code),
    /// It waits for another plan.
    Wait,
}

impl FaultyHost {
    /// A running daemon with this plan.
    #[must_use]
    pub fn new(plan: AttachPlan) -> Self {
        Self { inner: MemoryHost::new(), plan: Mutex::new(plan), changed: Condvar::new() }
    }

    /// Sets another plan, also for an attach that waits.
    pub fn set_plan(&self, plan: AttachPlan) {
        *self.plan.lock() = plan;
        self.changed.notify_all();
    }
}

impl DeviceHost for FaultyHost {
    fn socket(&self) -> PathBuf {
        self.inner.socket()
    }

    fn life(&self) -> Option<u64> {
        self.inner.life()
    }

    fn list(&self) -> Result<Vec<DeviceRecord>, Refusal> {
        self.inner.list()
    }

    fn attach(&self, spec: DeviceSpec) -> Result<DeviceRecord, Refusal> {
        let mut plan = self.plan.lock();
        self.changed.wait_while(&mut plan, |plan| *plan == AttachPlan::Wait);
        match *plan {
            AttachPlan::Refuse(code) => {
                Err(Some(Fault::of(code, &io::Error::other("as planned")).into()))
            }
            AttachPlan::Work | AttachPlan::Wait => self.inner.attach(spec),
        }
    }

    fn mounted(&self, id: u64, place: Option<&Path>) -> Result<(), Refusal> {
        self.inner.mounted(id, place)
    }

    fn remove(&self, id: u64) -> Result<(), Refusal> {
        self.inner.remove(id)
    }

    fn number(&self, device: &Path) -> Result<u64, Refusal> {
        self.inner.number(device)
    }

    fn mounted_at(&self, place: &Path) -> Option<u64> {
        self.inner.mounted_at(place)
    }

    fn mount(&self, device: &Path, place: &Path) -> Result<(), Refusal> {
        self.inner.mount(device, place)
    }

    fn unmount(&self, place: &Path) -> Result<(), Refusal> {
        self.inner.unmount(place)
    }

    fn detach_mount(&self, place: &Path) -> Result<(), Refusal> {
        self.inner.detach_mount(place)
    }
}
