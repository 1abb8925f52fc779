//! The raw record of each run: a JSON file under `target/sat/records`.
//!
//! A file is written as a whole when its run has ended, so a harness that is killed loses one run, and the next one
//! goes on behind the last record. What is recorded is not measured again, whatever commit it was measured at: each
//! record has its date and commit, and the table shows them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::failure::{Attempt as _, Failure};
use crate::measure::Measured;

/// What a run is a run of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Cell {
    /// Name of the image.
    pub(crate) image: String,
    /// Name of the network.
    pub(crate) network: String,
    /// Containers at once.
    pub(crate) count: u32,
    /// Name of the row.
    pub(crate) system: String,
}

/// The record of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RunRecord {
    /// What it is a run of.
    pub(crate) cell: Cell,
    /// Number of its round, from 0.
    pub(crate) round: u32,
    /// When it ended, in RFC 3339.
    pub(crate) date: String,
    /// Commit of this repository; `+` behind it means with changes.
    pub(crate) commit: String,
    /// The machine: processor, cores, memory, kernel.
    pub(crate) machine: String,
    /// Programs of the row and their versions.
    pub(crate) versions: Vec<String>,
    /// Title of the row.
    pub(crate) title: String,
    /// The image.
    pub(crate) about: About,
    /// What it showed; none if it failed.
    pub(crate) measured: Option<Measured>,
    /// Why it failed, or why the row cannot run here; empty if it did not.
    pub(crate) failed: String,
}

/// Facts of an image that a table shows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct About {
    /// What it stands for.
    pub(crate) like: String,
    /// Compressed bytes of its layers.
    pub(crate) compressed: u64,
    /// Bytes of its layers as tar; 0: not known.
    pub(crate) unpacked: u64,
    /// Number of its layers.
    pub(crate) layers: usize,
    /// Bytes of the row's form of it, in the registry.
    pub(crate) row_bytes: u64,
    /// Seconds of the conversion to it; none: there is none.
    pub(crate) conversion: Option<f64>,
}

/// All records of a folder.
#[derive(Debug)]
pub(crate) struct Records {
    dir: PathBuf,
    known: BTreeMap<(Cell, u32), RunRecord>,
}

impl Records {
    /// The records of a folder. A file that is not understood is an error: it is not overwritten.
    pub(crate) fn open(dir: &Path) -> Result<Self, Failure> {
        fs::create_dir_all(dir).attempt(|| format!("make {}", dir.display()))?;
        let mut known = BTreeMap::new();
        let entries = fs::read_dir(dir).attempt(|| format!("read {}", dir.display()))?;
        for entry in entries.flatten() {
            let path = entry.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let text = fs::read_to_string(&path).attempt(|| format!("read {}", path.display()))?;
            let record: RunRecord = serde_json::from_str(&text)
                .attempt(|| format!("understand the record {}", path.display()))?;
            known.insert((record.cell.clone(), record.round), record);
        }
        Ok(Self { dir: dir.to_owned(), known })
    }

    /// True if this run was measured already; one that failed was not.
    pub(crate) fn has(&self, cell: &Cell, round: u32) -> bool {
        let found = self.known.get(&(cell.clone(), round));
        found.is_some_and(|record| record.measured.is_some())
    }

    /// Adds a record, in place of an earlier one of the same run. A run that failed does not replace one that did not.
    pub(crate) fn add(&mut self, record: RunRecord) -> Result<(), Failure> {
        if record.measured.is_none() && self.has(&record.cell, record.round) {
            return Ok(());
        }
        let Cell { image, network, count, system } = &record.cell;
        let name = format!("{image}.{network}.{count}.{system}.{}.json", record.round);
        let (file, begun) = (self.dir.join(&name), self.dir.join(format!("{name}.new")));
        let text = serde_json::to_string(&record).attempt(|| format!("write {name}"))?;
        fs::write(&begun, text).attempt(|| format!("write {}", begun.display()))?;
        fs::rename(&begun, &file).attempt(|| format!("rename {}", begun.display()))?;
        self.known.insert((record.cell.clone(), record.round), record);
        Ok(())
    }

    /// All records, ordered by cell and round.
    pub(crate) fn all(&self) -> impl Iterator<Item = &RunRecord> {
        self.known.values()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A record of a run that took so many seconds; of one that failed for `failed` if there are none.
    pub(crate) fn sample(system: &str, round: u32, seconds: Option<f64>) -> RunRecord {
        let measured = seconds.map(|available| Measured {
            available,
            first_available: available,
            phases: vec![("pull".into(), available * 0.75), ("answer".into(), available * 0.25)],
            wire_bytes: 12_000_000,
            requests: 9,
            processes_cpu: 1.0,
            peak_memory: 40 << 20,
            ..Measured::default()
        });
        RunRecord {
            cell: Cell {
                image: "web".into(),
                network: "cloud".into(),
                count: 1,
                system: system.into(),
            },
            round,
            date: "2026-11-01T00:00:00Z".into(),
            commit: "abc".into(),
            machine: "a machine".into(),
            versions: vec!["containerd 2.4.2".into()],
            title: format!("title of {system}"),
            about: About { like: "a service".into(), compressed: 80_000_000, ..About::default() },
            failed: if measured.is_some() { String::new() } else { "nydusd is missing".into() },
            measured,
        }
    }

    #[test]
    fn what_was_measured_is_found_again_and_what_failed_is_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut records = Records::open(dir.path()).unwrap();
        records.add(sample("overlayfs", 0, Some(2.0))).unwrap();
        records.add(sample("nydus-zran", 0, None)).unwrap();
        records.add(sample("overlayfs", 0, None)).unwrap();
        // A file that was under way when the harness was killed.
        fs::write(dir.path().join("web.cloud.1.overlayfs.1.json.new"), "{\"cell").unwrap();
        let records = Records::open(dir.path()).unwrap();
        let cell = |system: &str| sample(system, 0, None).cell;
        assert!(records.has(&cell("overlayfs"), 0));
        assert!(!records.has(&cell("overlayfs"), 1));
        assert!(!records.has(&cell("nydus-zran"), 0));
        assert_eq!(records.all().count(), 2);
        assert_eq!(records.all().next().unwrap().failed, "nydusd is missing");
    }
}
