//! Abilities of this host, and a remedy for each one that is missing.
//!
//! Each row of the report is one fact that a front end depends on, examined without changing anything: no
//! module is loaded, no device created. A row *fails* when it alone prevents both front ends, or prevents one
//! of them while the other is not available as a fallback; it *warns* when something works less well.
//! `turbobd doctor` fails when neither front end can work.

mod kernel;
mod rows;

use std::fmt;

use serde::Serialize;

use crate::daemon::orphans::orphans;

/// State of a fact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FactState {
    /// Good.
    Ok,
    /// Works, with a loss.
    Warn,
    /// Does not work.
    Fail,
}

/// One fact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// The fact.
    pub what: &'static str,
    /// Its state.
    pub state: FactState,
    /// The finding.
    pub detail: String,
    /// The remedy; empty if none is needed.
    pub remedy: String,
}

impl Row {
    fn new(
        what: &'static str,
        state: FactState,
        detail: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        let remedy = if state == FactState::Ok { String::new() } else { remedy.into() };
        Self { what, state, detail: detail.into(), remedy }
    }
}

/// All facts.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The rows, in reading order.
    pub rows: Vec<Row>,
    /// True if a ublk device can be created.
    pub ublk: bool,
    /// True if a loop device over FUSE can be created.
    pub looped: bool,
}

impl Report {
    /// Exit status of `turbobd doctor`: 0 if a front end can work, 1 if none can.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        u8::from(!self.ublk && !self.looped)
    }
}

impl fmt::Display for Report {
    /// A table; remedies are below their row.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.rows.iter().map(|row| row.what.len()).max().unwrap_or(0);
        for row in &self.rows {
            let state = match row.state {
                FactState::Ok => "ok  ",
                FactState::Warn => "warn",
                FactState::Fail => "FAIL",
            };
            writeln!(f, "{state}  {:width$}  {}", row.what, row.detail)?;
            if !row.remedy.is_empty() {
                writeln!(f, "      {:width$}  -> {}", "", row.remedy)?;
            }
        }
        let can = match (self.ublk, self.looped) {
            (true, _) => "Devices are served through ublk.",
            (false, true) => {
                "Devices are served through FUSE and a loop device, which is slower than ublk."
            }
            (false, false) => {
                "No device can be served here; turbobd export, convert and check still work."
            }
        };
        writeln!(f, "\n{can}")
    }
}

/// Examines all facts.
#[must_use]
pub fn examine() -> Report {
    let mut report = rows::report(&kernel::Facts::of_this_host());
    report.rows.extend(orphans(&[]).iter().map(|orphan| {
        Row::new(
            "device of a dead daemon",
            FactState::Warn,
            format!("{} has no server: its readers wait", orphan.device.display()),
            format!(
                "start a daemon with the same run directory, which takes it back, or `turbobd detach {}`",
                orphan.device.display()
            ),
        )
    }));
    report
}
