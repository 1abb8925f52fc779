//! The records in memory: by number, by name, and how many children each has.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::record::Record;

/// All records of a root.
#[derive(Debug, Default)]
pub struct Index {
    by_id: HashMap<u64, Arc<Record>>,
    snapshotters: BTreeMap<String, Shelf>,
}

/// The records of one snapshotter.
#[derive(Debug, Default)]
struct Shelf {
    /// In the order of List.
    by_name: BTreeMap<String, Arc<Record>>,
    /// Number of records that name this one as their parent.
    children: HashMap<String, usize>,
}

impl Index {
    /// A record by its key or name.
    #[must_use]
    pub fn get(&self, snapshotter: &str, name: &str) -> Option<&Arc<Record>> {
        self.snapshotters.get(snapshotter)?.by_name.get(name)
    }

    /// A record by its number.
    #[must_use]
    pub fn by_id(&self, id: u64) -> Option<&Arc<Record>> {
        self.by_id.get(&id)
    }

    /// Number of children of a record.
    #[must_use]
    pub fn children(&self, snapshotter: &str, name: &str) -> usize {
        self.snapshotters
            .get(snapshotter)
            .and_then(|shelf| shelf.children.get(name))
            .copied()
            .unwrap_or(0)
    }

    /// Records of a snapshotter, by name.
    pub fn of(&self, snapshotter: &str) -> impl Iterator<Item = &Arc<Record>> {
        self.snapshotters.get(snapshotter).into_iter().flat_map(|shelf| shelf.by_name.values())
    }

    /// All records.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Record>> {
        self.by_id.values()
    }

    /// Names of snapshotters that have records.
    pub fn snapshotters(&self) -> impl Iterator<Item = &str> {
        self.snapshotters.keys().map(String::as_str)
    }

    /// The record and its parents, from the nearest to the base. A parent that is missing ends the chain: its name is the
    /// error.
    ///
    /// # Errors
    /// Returns the name of the missing parent.
    pub fn chain(&self, record: &Arc<Record>) -> Result<Vec<Arc<Record>>, String> {
        let mut chain = vec![record.clone()];
        let mut at = record;
        while let Some(parent) = &at.parent {
            at = self.get(&at.snapshotter, parent).ok_or_else(|| parent.clone())?;
            // A committed record cannot become its own ancestor; a damaged file could say so.
            if chain.len() > self.by_id.len() {
                return Err(parent.clone());
            }
            chain.push(at.clone());
        }
        Ok(chain)
    }

    pub(super) fn put(&mut self, record: Arc<Record>) {
        self.remove(record.id);
        let shelf = self.snapshotters.entry(record.snapshotter.clone()).or_default();
        if let Some(parent) = &record.parent {
            *shelf.children.entry(parent.clone()).or_default() += 1;
        }
        shelf.by_name.insert(record.name.clone(), record.clone());
        self.by_id.insert(record.id, record);
    }

    pub(super) fn remove(&mut self, id: u64) {
        let Some(record) = self.by_id.remove(&id) else { return };
        let Some(shelf) = self.snapshotters.get_mut(&record.snapshotter) else { return };
        shelf.by_name.remove(&record.name);
        if let Some(parent) = &record.parent
            && let Some(count) = shelf.children.get_mut(parent)
        {
            *count -= 1;
            if *count == 0 {
                shelf.children.remove(parent);
            }
        }
        if shelf.by_name.is_empty() {
            self.snapshotters.remove(&record.snapshotter);
        }
    }
}
