//! Places where a test kills the process, as `kill -9` or a loss of power does.
//!
//! A build without tests has none of it. In a test build, the step that `TURBOBD_SNAPSHOTTER_DIES_AT` names is the last that
//! the process takes.

/// Variable that names a step.
#[cfg(any(test, feature = "testing"))]
pub(crate) const VARIABLE: &str = "TURBOBD_SNAPSHOTTER_DIES_AT";

/// All steps, in the order of their first use.
#[cfg(test)]
pub(crate) const STEPS: [&str; 8] = [
    "folder-begun",
    "folder-made",
    "folder-durable",
    "record-not-written",
    "record-written",
    "folder-moved",
    "trash-opened",
    "trash-emptied",
];

/// Ends the process if the test asks for this step.
#[cfg(any(test, feature = "testing"))]
pub(crate) fn reached(step: &'static str) {
    #[cfg(test)]
    assert!(STEPS.contains(&step), "{step} is no step of the list");
    if std::env::var_os(VARIABLE).is_some_and(|wanted| wanted == step) {
        // Without the end of any scope: as the kernel would.
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

/// Nothing, outside of tests.
#[cfg(not(any(test, feature = "testing")))]
pub(crate) fn reached(_step: &'static str) {}
