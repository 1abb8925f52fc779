//! Joins one header with the extra entries before it to one entry.

use std::borrow::Cow;

use crate::tar::entry::{EntryContent, EntryKind, TarEntry, Timestamp};
use crate::tar::header::{Header, NumberError};
use crate::tar::pax::{PaxError, Records};
use crate::tar::sparse::SparseKind;
use crate::tar::{TarError, shown};
use crate::units::Bytes;

/// Information of extra entries about the next entry.
#[derive(Default)]
pub(super) struct Pending {
    /// Offset of the first of them.
    pub(super) offset: Option<u64>,
    /// The last of several pax headers in a row counts, as in Go.
    pub(super) records: Option<Vec<u8>>,
    pub(super) name: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
}

/// A sparse entry whose map is not complete.
pub(super) struct Draft {
    pub(super) entry: TarEntry,
    /// Length of the file.
    pub(super) size: u64,
    /// Bytes in the tar, including a map in the data.
    pub(super) stored: u64,
}

/// The entry (or extra entry) that is being read, for messages.
#[derive(Default)]
pub(super) struct Current {
    pub(super) offset: u64,
    pub(super) name: Vec<u8>,
}

impl Current {
    pub(super) fn field(&self, field: impl Into<String>, reason: impl Into<String>) -> TarError {
        TarError::Field {
            offset: self.offset,
            name: shown(&self.name),
            field: field.into(),
            reason: reason.into(),
        }
    }

    pub(super) fn pax(&self, error: PaxError) -> TarError {
        self.field(error.key, error.reason)
    }

    /// A number field that must not be negative and not exceed `max`.
    pub(super) fn unsigned(
        &self,
        field: &'static str,
        value: Result<i64, NumberError>,
        max: u64,
    ) -> Result<u64, TarError> {
        let value = value.map_err(|reason| self.field(field, reason))?;
        let unsigned = u64::try_from(value).ok().filter(|&unsigned| unsigned <= max);
        unsigned.ok_or_else(|| self.field(field, format!("{value} is not in 0..={max}")))
    }

    pub(super) fn too_long(&self, what: &'static str, len: u64) -> TarError {
        TarError::TooLong { offset: self.offset, name: shown(&self.name), what, len }
    }

    /// Joins the header of an entry proper, which ends at `position`, with the extra entries before it. The
    /// current name becomes the name of the entry.
    ///
    /// If several names are given, the last in this order counts: header, pax record, GNU long name (as in
    /// Go), sparse name.
    pub(super) fn join(
        &mut self,
        header: Header<'_>,
        pending: Pending,
        global: &Records,
        position: u64,
    ) -> Result<(Draft, SparseKind), TarError> {
        let mut records = Cow::Borrowed(global);
        if let Some(payload) = &pending.records {
            records.to_mut().merge(payload).map_err(|error| self.pax(error))?;
        }
        let pax = |error| self.pax(error);
        let path = records.path("path").map_err(pax)?;
        let link_path = records.path("linkpath").map_err(pax)?;
        let sparse = SparseKind::of(header, &records).map_err(pax)?;
        let sparse_name = match sparse {
            SparseKind::No | SparseKind::Old => None,
            SparseKind::Pairs(_) | SparseKind::Lines => {
                records.path("GNU.sparse.name").map_err(pax)?
            }
        };
        self.name = sparse_name.or(pending.name).or(path).unwrap_or_else(|| header.name());
        let link = pending.link.or(link_path).unwrap_or_else(|| header.link_name());
        Ok((self.draft(header, &records, link, position)?, sparse))
    }

    /// The entry without its sparse map.
    fn draft(
        &self,
        header: Header<'_>,
        records: &Records,
        link: Vec<u8>,
        position: u64,
    ) -> Result<Draft, TarError> {
        let pax = |error| self.pax(error);
        let either = |key: &'static str, field: Result<i64, NumberError>, max: u64| match records
            .number(key)
        {
            Ok(Some(value)) => Ok(value),
            Ok(None) => self.unsigned(key, field, max),
            Err(error) => Err(self.pax(error)),
        };
        let stored = either("size", header.size(), i64::MAX as u64)?;
        let mtime = match records.time("mtime").map_err(pax)? {
            Some(mtime) => mtime,
            None => Timestamp {
                secs: header.mtime().map_err(|reason| self.field("mtime", reason))?,
                nanos: 0,
            },
        };
        let real_size = match records.number("GNU.sparse.realsize").map_err(pax)? {
            Some(size) => Some(size),
            None => records.number("GNU.sparse.size").map_err(pax)?,
        };
        let entry = TarEntry {
            header_offset: Bytes(self.offset),
            name: self.name.clone(),
            kind: self.kind(header, link)?,
            mode: (self.unsigned("mode", header.mode(), u64::from(u32::MAX))? & 0o7777) as u32,
            uid: either("uid", header.uid(), i64::MAX as u64)?,
            gid: either("gid", header.gid(), i64::MAX as u64)?,
            mtime,
            xattrs: records.xattrs().map_err(pax)?,
            data_offset: Bytes(position),
            stored_len: Bytes(stored),
            content: EntryContent::Plain,
        };
        Ok(Draft { entry, size: real_size.unwrap_or(stored), stored })
    }

    fn kind(&self, header: Header<'_>, link: Vec<u8>) -> Result<EntryKind, TarError> {
        let device = || -> Result<(u32, u32), TarError> {
            let max = u64::from(u32::MAX);
            let major = self.unsigned("major device number", header.major(), max)?;
            let minor = self.unsigned("minor device number", header.minor(), max)?;
            Ok((major as u32, minor as u32))
        };
        Ok(match header.flag() {
            // V7 had no type for directories; a slash at the end marks them.
            0 if self.name.ends_with(b"/") => EntryKind::Directory,
            // '7' requested contiguous storage on systems that offered it.
            0 | b'0' | b'7' | b'S' => EntryKind::Regular,
            b'1' => EntryKind::HardLink(link),
            b'2' => EntryKind::Symlink(link),
            b'3' => device().map(|(major, minor)| EntryKind::Char { major, minor })?,
            b'4' => device().map(|(major, minor)| EntryKind::Block { major, minor })?,
            // 'D' is GNU's directory of an incremental dump; its data is a list of names.
            b'5' | b'D' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            flag => {
                let Current { offset, name } = self;
                return Err(TarError::Type {
                    offset: *offset,
                    name: shown(name),
                    flag: char::from(flag),
                });
            }
        })
    }
}
