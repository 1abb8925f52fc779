//! Writers of committed layers (spec lsmt 8.1 and 9): equal calls give equal bytes.
//!
//! Both writers cut payload into entries in the way of upstream's `compact`: 64 sectors at a time, then
//! joined while the sum stays below 16383. So a layer of upstream's that is read and written again has the
//! same index.

use std::io::Write;

use super::layer::{FLAG_DATA, FLAG_HEADER, FLAG_SEALED, LsmtHeader, Uuid};
use super::mapping::{ENTRY, LBA_LIMIT, MAX_LEN, MOFFSET_LIMIT, Mapping, PADDING};
use super::{FIRST_SECTOR, LsmtError, MAX_ENTRIES, RECORD};
use crate::units::{Bytes, SECTOR, Sectors};

/// Number of sectors that upstream copies at a time into an entry of their own.
const STEP: u64 = 64;

/// A native index is padded to a multiple of this many entries: a page.
const PAGE_ENTRIES: u64 = RECORD / ENTRY;

/// A layer's identity.
#[derive(Clone, Debug, Default)]
pub struct LayerIdentity {
    /// Identity of this layer.
    pub uuid: Uuid,
    /// Identity of the layer below.
    pub parent: Uuid,
    /// A message of at most 256 bytes.
    pub user_tag: Vec<u8>,
}

/// Writes a native layer to a stream: payload passes through and is not kept in memory.
pub struct NativeWriter<W>(LayerWriter<W>);

impl<W: Write> NativeWriter<W> {
    /// Begins a layer of a disk of `virtual_size`; 0 stands for the size given by the layer below.
    ///
    /// # Errors
    /// [`LsmtError::Size`], [`LsmtError::Write`].
    pub fn new(out: W, virtual_size: Bytes, identity: LayerIdentity) -> Result<Self, LsmtError> {
        LayerWriter::new(out, virtual_size, identity).map(Self)
    }

    /// Adds `bytes` as the sectors from `lba` on; their length must be a multiple of 512. Calls of all kinds
    /// must have ascending `lba`.
    ///
    /// # Errors
    /// [`LsmtError::Run`] for a run that overlaps an earlier one or leaves the disk,
    /// [`LsmtError::TooManyMappings`], [`LsmtError::Write`].
    pub fn data(&mut self, lba: Sectors, bytes: &[u8]) -> Result<(), LsmtError> {
        self.0.payload(lba, bytes)
    }

    /// Declares `count` sectors from `lba` on as zero, whatever the lower layers contain.
    ///
    /// # Errors
    /// The errors of [`data`](Self::data).
    pub fn zeroed(&mut self, lba: Sectors, count: Sectors) -> Result<(), LsmtError> {
        self.0.zeroed(lba, count)
    }

    /// Writes index (padded to a page) and trailer.
    ///
    /// # Errors
    /// [`LsmtError::TooManyMappings`], [`LsmtError::Write`].
    pub fn finish(self) -> Result<W, LsmtError> {
        self.0.finish(true)
    }
}

/// Writes a native layer with payload in an order of its own: first all payload, as it arrives, then the
/// position of each run of the disk in it. Readers require only that the index is sorted.
pub struct ScatteredWriter<W>(LayerWriter<W>);

impl<W: Write> ScatteredWriter<W> {
    /// Begins a layer of a disk of `virtual_size`; 0 stands for the size given by the layer below.
    ///
    /// # Errors
    /// [`LsmtError::Size`], [`LsmtError::Write`].
    pub fn new(out: W, virtual_size: Bytes, identity: LayerIdentity) -> Result<Self, LsmtError> {
        LayerWriter::new(out, virtual_size, identity).map(Self)
    }

    /// Adds payload, a multiple of 512 bytes, and returns its sector in the layer.
    ///
    /// # Errors
    /// [`LsmtError::Run`] for bytes that are not whole sectors, [`LsmtError::Write`].
    pub fn append(&mut self, bytes: &[u8]) -> Result<Sectors, LsmtError> {
        let at = self.0.position;
        let count = Bytes(bytes.len() as u64).sectors_ceil();
        if !(bytes.len() as u64).is_multiple_of(SECTOR) || at + count.0 > MOFFSET_LIMIT {
            let rule = "payload must be whole sectors with 55-bit numbers";
            return Err(run_error(Sectors(at), at + count.0, rule));
        }
        self.0.out.write_all(bytes)?;
        self.0.position += count.0;
        Ok(Sectors(at))
    }

    /// Maps the `count` sectors from `lba` on to the payload from sector `at` of the layer on. Calls of all
    /// kinds must have ascending `lba`.
    ///
    /// # Errors
    /// [`LsmtError::Run`] for a run that overlaps an earlier one, leaves the disk, or does not lie in the
    /// payload added so far; [`LsmtError::TooManyMappings`].
    pub fn map(&mut self, lba: Sectors, count: Sectors, at: Sectors) -> Result<(), LsmtError> {
        let end = self.0.admit(lba, count)?;
        let inside =
            at >= FIRST_SECTOR && at.checked_add(count).is_some_and(|end| end.0 <= self.0.position);
        if !inside {
            return Err(run_error(lba, end, "the layer has no payload there"));
        }
        let (mut lba, mut at) = (lba.0, at.0);
        while lba < end {
            // Whole blocks of 4 KiB, so that no entry ends inside a block that the reader decodes.
            let len = (end - lba).min(MAX_LEN - MAX_LEN % 8);
            self.0.entry(lba, len, false, 0, at)?;
            lba += len;
            at += len;
        }
        Ok(())
    }

    /// Declares `count` sectors from `lba` on as zero, whatever the lower layers contain.
    ///
    /// # Errors
    /// The errors of [`map`](Self::map).
    pub fn zeroed(&mut self, lba: Sectors, count: Sectors) -> Result<(), LsmtError> {
        self.0.zeroed(lba, count)
    }

    /// Number of payload sectors so far, including the layer's header.
    #[must_use]
    pub fn position(&self) -> Sectors {
        Sectors(self.0.position)
    }

    /// Writes index (padded to a page) and trailer.
    ///
    /// # Errors
    /// [`LsmtError::TooManyMappings`], [`LsmtError::Write`].
    pub fn finish(self) -> Result<W, LsmtError> {
        self.0.finish(true)
    }
}

/// Collects a TurboOCI layer: metadata payload in memory, and mappings into the original layer's
/// uncompressed tar.
pub struct WarpWriter(LayerWriter<Vec<u8>>);

impl WarpWriter {
    /// Begins a layer of a disk of `virtual_size`.
    ///
    /// # Errors
    /// [`LsmtError::Size`].
    pub fn new(virtual_size: Bytes) -> Result<Self, LsmtError> {
        Self::with_identity(virtual_size, LayerIdentity::default())
    }

    /// Begins a layer with an identity; upstream's conversion writes none.
    ///
    /// # Errors
    /// [`LsmtError::Size`].
    pub fn with_identity(virtual_size: Bytes, identity: LayerIdentity) -> Result<Self, LsmtError> {
        LayerWriter::new(Vec::new(), virtual_size, identity).map(Self)
    }

    /// Adds `bytes` as the sectors from `lba` on; their length must be a multiple of 512. Calls of all kinds
    /// must have ascending `lba`.
    ///
    /// # Errors
    /// [`LsmtError::Run`] for a run that overlaps an earlier one or leaves the disk,
    /// [`LsmtError::TooManyMappings`].
    pub fn metadata(&mut self, lba: Sectors, bytes: &[u8]) -> Result<(), LsmtError> {
        self.0.payload(lba, bytes)
    }

    /// Maps `count` sectors from `lba` on to the uncompressed tar, from its sector `target` on.
    ///
    /// # Errors
    /// The errors of [`metadata`](Self::metadata).
    pub fn remote(
        &mut self,
        lba: Sectors,
        count: Sectors,
        target: Sectors,
    ) -> Result<(), LsmtError> {
        let end = self.0.admit(lba, count)?;
        if target.checked_add(count).is_none_or(|target_end| target_end.0 > MOFFSET_LIMIT) {
            return Err(run_error(lba, end, "the tar cannot be that long"));
        }
        let (mut at, mut from) = (lba.0, target.0);
        while at < end {
            let len = (end - at).min(MAX_LEN);
            self.0.entry(at, len, false, 1, from)?;
            at += len;
            from += len;
        }
        Ok(())
    }

    /// Declares `count` sectors from `lba` on as zero, whatever the lower layers contain.
    ///
    /// # Errors
    /// The errors of [`metadata`](Self::metadata).
    pub fn zeroed(&mut self, lba: Sectors, count: Sectors) -> Result<(), LsmtError> {
        self.0.zeroed(lba, count)
    }

    /// Number of index entries so far.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.0.index.len() as u64
    }

    /// Writes the LSMT stream: header, metadata, index, trailer.
    ///
    /// # Errors
    /// [`LsmtError::Run`] if the layer has remote runs but no metadata: readers would take the tar for
    /// metadata (spec lsmt 9, tag normalisation). [`LsmtError::Write`].
    pub fn finish(self, out: &mut impl Write) -> Result<(), LsmtError> {
        let tags = |tag| self.0.index.iter().any(|mapping| mapping.tag == tag);
        if tags(1) && !tags(0) {
            let end = self.0.free;
            return Err(run_error(
                Sectors(0),
                end,
                "a layer of remote runs needs a sector of metadata too",
            ));
        }
        let bytes = self.0.finish(false)?;
        out.write_all(&bytes)?;
        Ok(())
    }
}

fn run_error(lba: Sectors, end: u64, rule: &'static str) -> LsmtError {
    LsmtError::Run { lba: lba.0, end, rule }
}

/// The shared part of the writers.
struct LayerWriter<W> {
    out: W,
    record: LsmtHeader,
    /// One past the last sector of the disk.
    limit: u64,
    index: Vec<Mapping>,
    /// Sector of the output for the next payload.
    position: u64,
    /// One past the last mapped disk sector.
    free: u64,
}

impl<W: Write> LayerWriter<W> {
    fn new(mut out: W, virtual_size: Bytes, identity: LayerIdentity) -> Result<Self, LsmtError> {
        let size_error = |rule| Err(LsmtError::Size { size: virtual_size, rule });
        if !virtual_size.0.is_multiple_of(SECTOR) {
            return size_error("it must be a multiple of 512");
        }
        if virtual_size.sector().0 > LBA_LIMIT {
            return size_error("its sectors must have 50-bit numbers");
        }
        let record = LsmtHeader {
            flags: FLAG_HEADER | FLAG_DATA | FLAG_SEALED,
            index_offset: 0,
            index_size: 0,
            virtual_size: virtual_size.0,
            uuid: identity.uuid,
            parent: identity.parent,
            user_tag: identity.user_tag,
        };
        out.write_all(&record.encode())?;
        let limit = if virtual_size.0 == 0 { LBA_LIMIT } else { virtual_size.sector().0 };
        Ok(Self { out, record, limit, index: Vec::new(), position: FIRST_SECTOR.0, free: 0 })
    }

    /// Checks a run and returns its end.
    fn admit(&mut self, lba: Sectors, count: Sectors) -> Result<u64, LsmtError> {
        let end = lba.0.saturating_add(count.0);
        if lba.0 < self.free {
            return Err(run_error(lba, end, "they must come after all sectors added before"));
        }
        if end > self.limit {
            return Err(run_error(lba, end, "the disk ends before them"));
        }
        self.free = end;
        Ok(end)
    }

    fn payload(&mut self, lba: Sectors, bytes: &[u8]) -> Result<(), LsmtError> {
        let count = Bytes(bytes.len() as u64).sectors_ceil();
        let end = self.admit(lba, count)?;
        if !(bytes.len() as u64).is_multiple_of(SECTOR) {
            return Err(run_error(lba, end, "their bytes are not a multiple of 512"));
        }
        if self.position + count.0 > MOFFSET_LIMIT {
            return Err(run_error(lba, end, "the layer cannot be that long"));
        }
        let mut at = lba.0;
        while at < end {
            let len = (end - at).min(STEP);
            self.entry(at, len, false, 0, self.position)?;
            self.position += len;
            at += len;
        }
        self.out.write_all(bytes)?;
        Ok(())
    }

    fn zeroed(&mut self, lba: Sectors, count: Sectors) -> Result<(), LsmtError> {
        let end = self.admit(lba, count)?;
        let mut at = lba.0;
        while at < end {
            let len = (end - at).min(MAX_LEN);
            // Upstream refuses a zeroed entry that points outside the payload.
            self.entry(at, len, true, 0, self.position)?;
            at += len;
        }
        Ok(())
    }

    /// Adds an entry; joins it to the last one by the rule of upstream's `compress_raw_index`.
    fn entry(
        &mut self,
        lba: u64,
        len: u64,
        zeroed: bool,
        tag: u8,
        moffset: u64,
    ) -> Result<(), LsmtError> {
        let next =
            Mapping { lba: Sectors(lba), len: len as u16, zeroed, tag, moffset: Sectors(moffset) };
        if let Some(last) = self.index.last_mut() {
            let joins = last.end() == next.lba
                && last.moffset_end() == next.moffset
                && (last.zeroed, last.tag) == (zeroed, tag)
                && u64::from(last.len) + len < MAX_LEN;
            if joins {
                last.len += next.len;
                return Ok(());
            }
        }
        if self.index.len() as u64 >= MAX_ENTRIES {
            return Err(LsmtError::TooManyMappings { limit: MAX_ENTRIES });
        }
        self.index.push(next);
        Ok(())
    }

    fn finish(mut self, padded: bool) -> Result<W, LsmtError> {
        let real = self.index.len() as u64;
        let size = if padded { real.next_multiple_of(PAGE_ENTRIES) } else { real };
        if size > MAX_ENTRIES {
            return Err(LsmtError::TooManyMappings { limit: MAX_ENTRIES });
        }
        let mut bytes = Vec::with_capacity((size * ENTRY) as usize);
        for mapping in &self.index {
            bytes.extend_from_slice(&mapping.encode());
        }
        for _ in real..size {
            bytes.extend_from_slice(&PADDING);
        }
        self.record.flags = FLAG_DATA | FLAG_SEALED;
        self.record.index_offset = self.position * SECTOR;
        self.record.index_size = size;
        bytes.extend_from_slice(&self.record.encode());
        self.out.write_all(&bytes)?;
        Ok(self.out)
    }
}
