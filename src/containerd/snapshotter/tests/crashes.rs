//! `kill -9` at every step of every call.
//!
//! The test starts itself as a child that makes one call and dies at one step. Then the root is opened again.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::{NAME, folders, labels, open};
use crate::snapshotter::failpoint::{STEPS, VARIABLE};
use crate::snapshotter::store::rules::NewCommit;
use crate::snapshotter::{NewSnapshot, SnapshotError, Snapshotter};

/// Variables of the child.
const CALL: &str = "TURBOBD_TEST_CALL";
const ROOT: &str = "TURBOBD_TEST_ROOT";

/// This test, as its own process runs it.
const THIS: &str =
    "snapshotter::tests::crashes::a_process_killed_at_any_step_leaves_the_old_state_or_the_new_one";

/// Calls, each on the root that [`fill`] makes.
const CALLS: [(&str, fn(&Snapshotter) -> Result<(), SnapshotError>); 8] = [
    ("prepare", |snapshotter| snapshotter.prepare(&new("new", "base"), later()).map(drop)),
    ("view", |snapshotter| snapshotter.view(&new("new", "base"), later()).map(drop)),
    ("commit", |snapshotter| snapshotter.commit(&commit("active", None))),
    ("rebase", |snapshotter| snapshotter.commit(&commit("free", Some("base")))),
    ("remove", |snapshotter| snapshotter.remove(NAME, "active")),
    ("update", |snapshotter| {
        snapshotter.update(NAME, "base", &labels(&[("a", "b")]), &[]).map(drop)
    }),
    ("usage", |snapshotter| snapshotter.usage(NAME, "base", later()).map(drop)),
    ("twice", |snapshotter| match snapshotter.prepare(&new("active", ""), later()) {
        Err(SnapshotError::Exists(_)) => Ok(()),
        other => other.map(drop),
    }),
];

fn later() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn new(key: &str, parent: &str) -> NewSnapshot {
    NewSnapshot {
        snapshotter: NAME.into(),
        key: key.into(),
        parent: parent.into(),
        labels: BTreeMap::new(),
    }
}

fn commit<'a>(key: &'a str, parent: Option<&'a str>) -> NewCommit<'a> {
    static NONE: BTreeMap<String, String> = BTreeMap::new();
    NewCommit { snapshotter: NAME, key, name: "committed", labels: &NONE, parent }
}

fn fill(root: &Path) {
    let snapshotter = open(root);
    snapshotter.prepare(&new("k", ""), later()).unwrap();
    snapshotter.commit(&NewCommit { name: "base", ..commit("k", None) }).unwrap();
    snapshotter.prepare(&new("active", "base"), later()).unwrap();
    snapshotter.prepare(&new("free", ""), later()).unwrap();
    for record in snapshotter.list(NAME, &[]).unwrap() {
        let upper = root.join(format!("snapshots/{}/fs", record.id));
        std::fs::create_dir_all(upper.join("a/b")).unwrap();
        std::fs::write(upper.join("a/file"), b"x").unwrap();
    }
}

/// All that a root says, without times and numbers; asserts that it is consistent.
fn state(snapshotter: &Snapshotter, root: &Path) -> Vec<String> {
    let records = snapshotter.list(NAME, &[]).unwrap();
    let ids: BTreeSet<String> = records.iter().map(|record| record.id.to_string()).collect();
    assert_eq!(folders(root).into_iter().collect::<BTreeSet<_>>(), ids, "a folder is orphaned");
    snapshotter.cleanup(later());
    assert_eq!(std::fs::read_dir(root.join("trash")).unwrap().count(), 0);
    let line = |record: &std::sync::Arc<crate::snapshotter::store::record::Record>| {
        let upper = root.join(format!("snapshots/{}/fs", record.id));
        let files = std::fs::read_dir(upper).unwrap().count();
        let (name, parent, labels) = (&record.name, &record.parent, &record.labels);
        format!("{name} {parent:?} {:?} {labels:?} {:?} {files}", record.kind, record.usage)
    };
    records.iter().map(line).collect()
}

#[test]
fn a_process_killed_at_any_step_leaves_the_old_state_or_the_new_one() {
    if let Ok(call) = std::env::var(CALL) {
        let root = std::env::var_os(ROOT).unwrap();
        let snapshotter = open(Path::new(&root));
        let (_, work) = CALLS.iter().find(|(name, _)| *name == call).unwrap();
        work(&snapshotter).unwrap();
        snapshotter.cleanup(later());
        return;
    }
    let mut reached = BTreeSet::new();
    for (name, work) in CALLS {
        let (before, after) = {
            let dir = tempfile::tempdir().unwrap();
            fill(dir.path());
            let snapshotter = open(dir.path());
            let before = state(&snapshotter, dir.path());
            work(&snapshotter).unwrap();
            (before, state(&snapshotter, dir.path()))
        };
        for step in STEPS {
            let dir = tempfile::tempdir().unwrap();
            fill(dir.path());
            let output = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", THIS, "--nocapture"])
                .env(CALL, name)
                .env(ROOT, dir.path())
                .env(VARIABLE, step)
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            let killed = output.status.signal() == Some(9);
            assert!(killed || output.status.success(), "{name} at {step}: {text}");
            assert!(killed || text.contains("1 passed"), "the child runs no test: {text}");
            let snapshotter = open(dir.path());
            let found = state(&snapshotter, dir.path());
            if killed {
                reached.insert(step);
                assert!(found == before || found == after, "{name} at {step}: {found:#?}");
            } else {
                assert_eq!(found, after, "{name}, not at {step}");
            }
            // The call can be made again, unless it is done.
            if found == before {
                work(&snapshotter).unwrap();
                assert_eq!(state(&snapshotter, dir.path()), after, "{name} again after {step}");
            }
        }
    }
    assert_eq!(reached, BTreeSet::from(STEPS), "a step that no call reaches");
}
