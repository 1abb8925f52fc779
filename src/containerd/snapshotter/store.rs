//! Records, in one file that survives a loss of power, and in memory.
//!
//! The file is a redb database: one write transaction a call, on disk before the call answers, as containerd's own
//! bolt database is. All records are in memory too ([`index`]), so that Stat, List and filters read no file. A change
//! works on a [`Change`], under the lock of writers: it reads the index, and collects what to put and delete. Then the file is written, and
//! then the index. Readers never wait for the disk.
//!
//! redb locks the file: a second process is refused, which is what makes a root belong to one snapshotter.
//!
//! * [`record`] a record
//! * [`index`]  the records in memory
//! * [`rules`]  what a call may change, as containerd's reference (`core/snapshots/storage/bolt.go`) has it

pub mod index;
pub mod record;
pub mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use thiserror::Error;

use super::error::SnapshotError;
use super::failpoint;
use index::Index;
use record::Record;

/// Records by their number, each a JSON object.
const RECORDS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("records");

/// Numbers of the store itself: [`VERSION_KEY`] and [`NEXT_ID_KEY`].
const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers");

/// Version of the tables.
const VERSION_KEY: &str = "version";

/// Least number that no record has had.
const NEXT_ID_KEY: &str = "next";

/// The version that this release writes.
const VERSION: u64 = 1;

/// Memory for pages of the file. Reads come from the index, so pages are used by writes alone.
const PAGES: usize = 1 << 20;

/// Failure of the store.
#[derive(Debug, Error)]
pub enum RecordsError {
    /// Another process has the file.
    #[error("It is in use: another snapshotter runs on this root")]
    InUse,
    /// A newer release has written it.
    #[error("It has version {0}, and this release knows {VERSION}: update turbobd")]
    Version(u64),
    /// The file or a record in it is damaged.
    #[error(
        "It is damaged: {0} (keep a copy of the file; containerd then asks for all layers again once it is moved away)"
    )]
    Damaged(String),
    /// The database refuses.
    #[error("The database refuses")]
    Database(#[source] Box<redb::Error>),
}

impl RecordsError {
    /// True if the disk is full.
    #[must_use]
    pub fn is_full(&self) -> bool {
        match self {
            Self::Database(error) => {
                matches!(&**error, redb::Error::Io(error) if super::error::is_full(error))
            }
            _ => false,
        }
    }

    fn of(error: impl Into<redb::Error>) -> Self {
        match error.into() {
            redb::Error::DatabaseAlreadyOpen => Self::InUse,
            redb::Error::Corrupted(what) => Self::Damaged(what),
            redb::Error::Io(error) if error.kind() == io::ErrorKind::InvalidData => {
                Self::Damaged(error.to_string())
            }
            redb::Error::UpgradeRequired(version) => Self::Version(version.into()),
            error => Self::Database(Box::new(error)),
        }
    }
}

/// All records of a root.
#[derive(Debug)]
pub struct SnapshotStore {
    database: Database,
    index: RwLock<Index>,
    /// Held by the one writer.
    writer: Mutex<()>,
    next_id: AtomicU64,
}

impl SnapshotStore {
    /// Opens the file, and makes it if there is none.
    ///
    /// # Errors
    /// Returns [`RecordsError`]; the file is then as it was.
    pub fn open(path: &Path) -> Result<Self, RecordsError> {
        let mut builder = Database::builder();
        let database = builder.set_cache_size(PAGES).create(path).map_err(RecordsError::of)?;
        let (index, next_id) = match read(&database)? {
            Some(found) => found,
            None => {
                let transaction = database.begin_write().map_err(RecordsError::of)?;
                {
                    let mut numbers = transaction.open_table(NUMBERS).map_err(RecordsError::of)?;
                    numbers.insert(VERSION_KEY, VERSION).map_err(RecordsError::of)?;
                    numbers.insert(NEXT_ID_KEY, 1).map_err(RecordsError::of)?;
                    transaction.open_table(RECORDS).map_err(RecordsError::of)?;
                }
                transaction.commit().map_err(RecordsError::of)?;
                (Index::default(), 1)
            }
        };
        Ok(Self {
            database,
            index: RwLock::new(index),
            writer: Mutex::new(()),
            next_id: AtomicU64::new(next_id),
        })
    }

    /// A number that no record has had. It is spent once a record with it, or with a greater one, is stored.
    pub fn new_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// The records, as they are now. Writers wait while it is held: copy what is needed, and let go.
    pub fn read(&self) -> impl std::ops::Deref<Target = Index> + '_ {
        self.index.read()
    }

    /// A record by its key or name.
    ///
    /// # Errors
    /// Returns [`SnapshotError::NotFound`].
    pub fn get(&self, snapshotter: &str, name: &str) -> Result<Arc<Record>, SnapshotError> {
        let found = self.read().get(snapshotter, name).cloned();
        found.ok_or_else(|| SnapshotError::NotFound(name.to_owned()))
    }

    /// Changes records in one transaction: all of `rule`'s changes are on disk when this returns, or none if it fails.
    ///
    /// # Errors
    /// Those of `rule`; [`SnapshotError::Store`].
    pub fn change<T>(
        &self,
        rule: impl FnOnce(&mut Change<'_>) -> Result<T, SnapshotError>,
    ) -> Result<T, SnapshotError> {
        let _turn = self.writer.lock();
        // Only this thread writes to the index, so what the rule has read stays true until the end.
        let (result, puts, deletes) = {
            let index = self.index.read();
            let mut change =
                Change { index: &index, puts: BTreeMap::new(), deletes: BTreeSet::new() };
            let result = rule(&mut change)?;
            (result, change.puts, change.deletes)
        };
        if puts.is_empty() && deletes.is_empty() {
            return Ok(result);
        }
        self.write(&puts, &deletes)?;
        failpoint::reached("record-written");
        let mut index = self.index.write();
        for id in &deletes {
            index.remove(*id);
        }
        for record in puts.into_values() {
            index.put(record);
        }
        Ok(result)
    }

    /// Tries a change and keeps nothing of it.
    ///
    /// # Errors
    /// Those of `rule`.
    pub fn check<T>(
        &self,
        rule: impl FnOnce(&mut Change<'_>) -> Result<T, SnapshotError>,
    ) -> Result<T, SnapshotError> {
        let index = self.index.read();
        rule(&mut Change { index: &index, puts: BTreeMap::new(), deletes: BTreeSet::new() })
    }

    fn write(
        &self,
        puts: &BTreeMap<u64, Arc<Record>>,
        deletes: &BTreeSet<u64>,
    ) -> Result<(), RecordsError> {
        let transaction = self.database.begin_write().map_err(RecordsError::of)?;
        {
            let mut records = transaction.open_table(RECORDS).map_err(RecordsError::of)?;
            for id in deletes {
                records.remove(id).map_err(RecordsError::of)?;
            }
            for (id, record) in puts {
                let text = serde_json::to_vec(&**record)
                    .map_err(|error| RecordsError::Damaged(error.to_string()))?;
                records.insert(id, text.as_slice()).map_err(RecordsError::of)?;
            }
            let newest = puts.keys().next_back().map_or(0, |id| id + 1);
            let mut numbers = transaction.open_table(NUMBERS).map_err(RecordsError::of)?;
            let next =
                numbers.get(NEXT_ID_KEY).map_err(RecordsError::of)?.map_or(1, |next| next.value());
            if newest > next {
                numbers.insert(NEXT_ID_KEY, newest).map_err(RecordsError::of)?;
            }
        }
        failpoint::reached("record-not-written");
        transaction.commit().map_err(RecordsError::of)
    }
}

/// Reads all records; `None` of a file that was just made.
fn read(database: &Database) -> Result<Option<(Index, u64)>, RecordsError> {
    let transaction = database.begin_read().map_err(RecordsError::of)?;
    let numbers = match transaction.open_table(NUMBERS) {
        Ok(table) => table,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
        Err(error) => return Err(RecordsError::of(error)),
    };
    let number = |key: &str| -> Result<u64, RecordsError> {
        let value = numbers.get(key).map_err(RecordsError::of)?;
        value
            .map(|value| value.value())
            .ok_or_else(|| RecordsError::Damaged(format!("it has no number {key:?}")))
    };
    let version = number(VERSION_KEY)?;
    if version != VERSION {
        return Err(RecordsError::Version(version));
    }
    let mut next_id = number(NEXT_ID_KEY)?;
    let records = transaction.open_table(RECORDS).map_err(RecordsError::of)?;
    let mut index = Index::default();
    for entry in records.iter().map_err(RecordsError::of)? {
        let (id, text) = entry.map_err(RecordsError::of)?;
        let record: Record = serde_json::from_slice(text.value()).map_err(|error| {
            RecordsError::Damaged(format!("record {} is not understood: {error}", id.value()))
        })?;
        next_id = next_id.max(id.value() + 1);
        index.put(Arc::new(record));
    }
    Ok(Some((index, next_id)))
}

/// A change under way: what it reads is the state with its own changes.
#[derive(Debug)]
pub struct Change<'a> {
    index: &'a Index,
    puts: BTreeMap<u64, Arc<Record>>,
    deletes: BTreeSet<u64>,
}

impl Change<'_> {
    /// A record by its key or name.
    #[must_use]
    pub fn get(&self, snapshotter: &str, name: &str) -> Option<Arc<Record>> {
        let put = self
            .puts
            .values()
            .find(|record| record.snapshotter == snapshotter && record.name == name);
        if let Some(record) = put {
            return Some(record.clone());
        }
        let found = self.index.get(snapshotter, name)?;
        let stays = !self.deletes.contains(&found.id) && !self.puts.contains_key(&found.id);
        stays.then(|| found.clone())
    }

    /// Number of children of a record before this change.
    #[must_use]
    pub fn children(&self, record: &Record) -> usize {
        self.index.children(&record.snapshotter, &record.name)
    }

    /// Stores a record in place of the one with its number.
    pub fn put(&mut self, record: Record) -> Arc<Record> {
        let record = Arc::new(record);
        self.deletes.remove(&record.id);
        self.puts.insert(record.id, record.clone());
        record
    }

    /// Removes a record.
    pub fn delete(&mut self, record: &Record) {
        self.puts.remove(&record.id);
        self.deletes.insert(record.id);
    }
}
