//! The index log of an append-only layer, read from its beginning. If several records cover a sector, the
//! last one counts.

use std::os::unix::fs::FileExt;

use super::extents::RUN_MEMORY;
use super::{COPY, Extents, MAX_RECORDS, Named, RunContent, WritableError};
use formats::lsmt::layer::{FLAG_DATA, FLAG_HEADER};
use formats::lsmt::mapping::{ENTRY, Mapping};
use formats::lsmt::{FIRST_SECTOR, RECORD};
use formats::units::SECTOR;
use source::Reserved;

/// Result of reading a log.
pub(super) struct Log {
    /// The sectors of the layer and their positions.
    pub(super) extents: Extents,
    /// One past the last sector of the data file that a record points to.
    pub(super) position: u64,
    /// Number of records before the first invalid one.
    pub(super) records: u64,
    /// Bytes of the index file behind those.
    pub(super) torn: u64,
}

impl Log {
    /// Reads the log up to the first invalid record: a partial one, one of zeros, or one that points past the
    /// data. Changes nothing. `memory` grows with the runs.
    ///
    /// # Errors
    /// [`WritableError`], also for a header that is not that of a log.
    pub(super) fn read(
        index: &Named,
        data: &Named,
        memory: &mut Reserved,
    ) -> Result<Self, WritableError> {
        let header = index.header()?;
        if header.flags & (FLAG_HEADER | FLAG_DATA) != FLAG_HEADER || header.index_offset != RECORD
        {
            return Err(
                index.invalid("its header is not that of an index log with an index at byte 4096")
            );
        }
        let (index_len, data_len) = (index.len()?, data.len()?);
        let total = (index_len - RECORD) / ENTRY;
        if total > MAX_RECORDS {
            return Err(index.invalid("it has more than 128000000 records"));
        }
        let whole_sectors = data_len / SECTOR;
        let mut log =
            Self { extents: Extents::default(), position: FIRST_SECTOR.0, records: 0, torn: 0 };
        let mut step = vec![0; COPY];
        'log: while log.records < total {
            let bytes = ((total - log.records) * ENTRY).min(COPY as u64) as usize;
            // A record adds two runs at most: itself, and the end of one that it parts.
            let most = log.extents.count() + 2 * bytes as u64 / ENTRY;
            memory.grow_to(most * RUN_MEMORY, &index.path.display().to_string())?;
            let at = RECORD + log.records * ENTRY;
            index.file.read_exact_at(&mut step[..bytes], at).map_err(index.error("read"))?;
            for entry in step[..bytes].as_chunks::<{ ENTRY as usize }>().0 {
                if let Some(mapping) = Mapping::decode(*entry) {
                    if !mapping.zeroed && mapping.len > 0 && mapping.moffset < FIRST_SECTOR {
                        return Err(index.invalid("a record points into the data's header"));
                    }
                    let past_end = !mapping.zeroed && mapping.moffset_end().0 > whole_sectors;
                    if mapping.len == 0 || past_end {
                        break 'log;
                    }
                    log.note(&mapping);
                }
                log.records += 1;
            }
        }
        memory.shrink_to(log.extents.count() * RUN_MEMORY);
        log.torn = index_len - (RECORD + log.records * ENTRY);
        Ok(log)
    }

    fn note(&mut self, mapping: &Mapping) {
        let (lba, len) = (mapping.lba.0, u64::from(mapping.len));
        if mapping.zeroed {
            self.extents.insert(lba, len, RunContent::Zero);
        } else {
            self.extents.insert(lba, len, RunContent::At(mapping.moffset.0));
            self.position = self.position.max(mapping.moffset_end().0);
        }
    }
}
