//! One thread that handles the waits of all devices when their deadlines pass.

use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::waits::Waits;

/// Name of the thread: every process that serves devices has it.
pub(super) const ALARM_THREAD: &str = "deadlines";

/// Wakes the waits that are due. Dropping it ends its thread.
pub(super) struct Alarm {
    shared: Arc<AlarmShared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct AlarmShared {
    state: Mutex<AlarmState>,
    wake: Condvar,
}

#[derive(Default)]
struct AlarmState {
    /// Time of the thread's next check.
    at: Option<Instant>,
    waits: Vec<Weak<Waits>>,
    ending: bool,
}

/// Handle with which one device's waits announce their next deadline.
#[derive(Clone)]
pub(super) struct Bell(Weak<AlarmShared>);

impl Bell {
    /// Announces a deadline at `at`; the alarm wakes then or before.
    pub(super) fn by(&self, at: Instant) {
        let Some(shared) = self.0.upgrade() else { return };
        let mut state = shared.lock();
        if state.at.is_none_or(|before| at < before) {
            state.at = Some(at);
            shared.wake.notify_one();
        }
    }
}

impl AlarmShared {
    fn lock(&self) -> MutexGuard<'_, AlarmState> {
        self.state.lock()
    }

    /// Body of the thread.
    fn run(&self) {
        let mut state = self.lock();
        while !state.ending {
            let now = Instant::now();
            match state.at {
                None => self.wake.wait(&mut state),
                Some(at) if at > now => {
                    self.wake.wait_for(&mut state, at - now);
                }
                Some(_) => {
                    state.at = None;
                    state.waits.retain(|waits| waits.strong_count() > 0);
                    let all: Vec<_> = state.waits.iter().filter_map(Weak::upgrade).collect();
                    // Without the lock: due waits start new waits, which ring the bell.
                    drop(state);
                    let next = all.iter().filter_map(|waits| waits.due(now)).min();
                    drop(all);
                    state = self.lock();
                    state.at = [state.at, next].into_iter().flatten().min();
                }
            }
        }
    }
}

impl Alarm {
    /// Creates the alarm. Its thread is started by the first device: see [`watch`](Self::watch).
    pub(super) fn new() -> Self {
        Self { shared: Arc::default(), thread: Mutex::default() }
    }

    /// A bell for the waits of a device.
    pub(super) fn bell(&self) -> Bell {
        Bell(Arc::downgrade(&self.shared))
    }

    /// Watches these waits too, as long as they live.
    pub(super) fn watch(&self, waits: &Arc<Waits>) -> std::io::Result<()> {
        let mut thread = self.thread.lock();
        if thread.is_none() {
            let shared = self.shared.clone();
            let body = move || {
                threads::mark_io_thread();
                shared.run();
            };
            *thread = Some(std::thread::Builder::new().name(ALARM_THREAD.into()).spawn(body)?);
        }
        self.shared.lock().waits.push(Arc::downgrade(waits));
        Ok(())
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.shared.lock().ending = true;
        self.shared.wake.notify_one();
        let thread = self.thread.get_mut().take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}
