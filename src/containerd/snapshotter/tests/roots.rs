//! What a root may be, and what is refused without a change to it.

use std::fs;
use std::path::Path;

use redb::{Database, TableDefinition};

use super::{NAME, config, folders, open};
use crate::snapshotter::{NewSnapshot, Snapshotter};
use source::failure::with_causes;

fn later() -> std::time::Instant {
    std::time::Instant::now() + std::time::Duration::from_secs(60)
}

fn prepare(snapshotter: &Snapshotter, key: &str) {
    let new = NewSnapshot { snapshotter: NAME.into(), key: key.into(), ..NewSnapshot::default() };
    snapshotter.prepare(&new, later()).unwrap();
}

fn refusal(root: &Path) -> String {
    with_causes(&Snapshotter::open(config(root)).unwrap_err())
}

#[test]
fn a_root_belongs_to_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("r");
    let first = open(&root);
    prepare(&first, "k");
    let text = refusal(&root);
    assert!(text.contains("another snapshotter runs on this root"), "{text}");
    drop(first);
    open(&root).stat(NAME, "k").unwrap();
}

#[test]
fn snapshots_of_another_snapshotter_are_not_touched() {
    for left in ["metadata.db", "snapshots/12/fs/file"] {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("r");
        let file = root.join(left);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, b"theirs").unwrap();
        let text = refusal(&root);
        assert!(text.contains("another snapshotter") && text.contains("--root"), "{text}");
        assert_eq!(fs::read(&file).unwrap(), b"theirs");
        assert_eq!(fs::read_dir(&root).unwrap().count(), 1, "nothing is made beside it");
    }
}

#[test]
fn a_damaged_store_or_one_of_a_newer_release_is_refused_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("r");
    prepare(&open(&root), "k");
    let file = root.join("records.redb");
    let good = fs::read(&file).unwrap();

    let numbers: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers");
    let records: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("records");
    let change = |work: &dyn Fn(&redb::WriteTransaction)| {
        let transaction = Database::open(&file).unwrap().begin_write().unwrap();
        work(&transaction);
        transaction.commit().unwrap();
    };
    change(&|transaction| {
        transaction.open_table(numbers).unwrap().insert("version", 9).unwrap();
    });
    let text = refusal(&root);
    assert!(text.contains("version 9") && text.contains("update turbobd"), "{text}");

    fs::write(&file, &good).unwrap();
    change(&|transaction| {
        transaction.open_table(records).unwrap().insert(77, b"{".as_slice()).unwrap();
    });
    let text = refusal(&root);
    assert!(text.contains("record 77"), "{text}");

    for damage in [&b"no database"[..], &[0; 4096]] {
        fs::write(&file, damage).unwrap();
        let text = refusal(&root);
        assert!(text.contains(root.to_str().unwrap()), "{text}");
        assert_eq!(fs::read(&file).unwrap(), damage);
    }
    assert_eq!(folders(&root), ["1"], "no folder is swept without its store");
    fs::write(&file, &good).unwrap();
    open(&root).stat(NAME, "k").unwrap();
}

#[test]
fn folders_that_no_record_names_are_swept_at_the_start_and_numbers_are_not_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("r");
    prepare(&open(&root), "first");
    for orphan in ["snapshots/2/fs/deep/er", "snapshots/99", "snapshots/new-1"] {
        fs::create_dir_all(root.join(orphan)).unwrap();
    }
    fs::write(root.join("snapshots/file"), b"x").unwrap();
    let again = open(&root);
    assert_eq!(folders(&root), ["1"]);
    again.cleanup(later());
    assert_eq!(fs::read_dir(root.join("trash")).unwrap().count(), 0);
    prepare(&again, "second");
    again.remove(NAME, "second").unwrap();
    drop(again);
    let again = open(&root);
    prepare(&again, "third");
    let (second, third) = (2, again.stat(NAME, "third").unwrap().id);
    assert!(third > second, "{third}");
}

#[test]
fn a_lost_folder_of_an_active_snapshot_is_made_again_and_that_of_a_layer_is_an_error_of_its_mounts()
{
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("r");
    let snapshotter = open(&root);
    prepare(&snapshotter, "k");
    let commit = crate::snapshotter::store::rules::NewCommit {
        snapshotter: NAME,
        key: "k",
        name: "layer",
        labels: &std::collections::BTreeMap::new(),
        parent: None,
    };
    snapshotter.commit(&commit).unwrap();
    let new = NewSnapshot {
        snapshotter: NAME.into(),
        key: "container".into(),
        parent: "layer".into(),
        ..NewSnapshot::default()
    };
    snapshotter.prepare(&new, later()).unwrap();
    drop(snapshotter);
    for folder in folders(&root) {
        fs::remove_dir_all(root.join("snapshots").join(folder)).unwrap();
    }
    let again = open(&root);
    let container = again.stat(NAME, "container").unwrap();
    assert!(root.join(format!("snapshots/{}/work", container.id)).is_dir());
    let text = with_causes(&again.mounts(NAME, "container", later()).unwrap_err());
    assert!(text.contains("pull it again"), "{text}");
    again.remove(NAME, "container").unwrap();
    again.remove(NAME, "layer").unwrap();
}

#[test]
fn a_root_whose_path_would_break_mount_options_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a,b", "a:b", "a\\b"] {
        let text = refusal(&dir.path().join(name));
        assert!(text.contains("separates options"), "{text}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
