//! File data: its blocks, and the position of each of their sectors in the tar.

use super::Ext4Error;
use super::allocation::{BlockRun, Blocks};
use super::extent::{InodeExtent, append};
use super::file::DataRun;
use super::geometry::BLOCK;
use super::layer::LayerBlocks;
use crate::units::{Bytes, SECTOR};

/// The longest file: 2^32 - 1 blocks.
pub const FILE_MAX: Bytes = Bytes((1 << 44) - BLOCK as u64);

/// Reasons why a file's data cannot be laid out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DataError {
    /// The file is too long.
    #[error("The file is {size} long; ext4 with 4 KiB blocks allows {FILE_MAX}")]
    TooLong {
        /// Its length.
        size: Bytes,
    },
    /// The runs do not form a map of the file.
    #[error(
        "The data run at {file_offset} overlaps the one before it, or passes the end of the file or 2^64"
    )]
    BadRun {
        /// Its offset in the file.
        file_offset: Bytes,
    },
    /// A run that must be stored has no bytes.
    #[error("The data run at {file_offset} does not lie on whole sectors and has no stored bytes")]
    NoBytes {
        /// Its offset in the file.
        file_offset: Bytes,
    },
}

/// A contiguous part of a file on a contiguous part of the disk.
struct FileSegment {
    logical: u64,
    run: BlockRun,
}

/// Checks that `runs` describe a file of `size` bytes.
pub(super) fn check(size: Bytes, runs: &[DataRun]) -> Result<(), DataError> {
    if size > FILE_MAX {
        return Err(DataError::TooLong { size });
    }
    let mut last = Bytes::ZERO;
    for run in runs {
        let file_offset = run.file_offset;
        let end =
            file_offset.checked_add(run.len).filter(|&end| end <= size && last <= file_offset);
        let end = end.filter(|_| run.tar_offset.checked_add(run.len).is_some());
        last = end.ok_or(DataError::BadRun { file_offset })?;
        let stored = run.bytes.as_ref().is_some_and(|bytes| bytes.len() as u64 == run.len.0);
        if !stored && (run.bytes.is_some() || (run.needs_bytes(size) && run.len > Bytes::ZERO)) {
            return Err(DataError::NoBytes { file_offset });
        }
    }
    Ok(())
}

/// Allocates the blocks of a file and maps them; the file must have passed [`check`].
pub(super) fn place(
    runs: &[DataRun],
    blocks: &mut Blocks,
    layer: &mut LayerBlocks,
) -> Result<Vec<InodeExtent>, Ext4Error> {
    let ranges = covered(runs);
    blocks.require(ranges.iter().map(|&(first, end)| end - first).sum())?;
    let mut segments = Vec::with_capacity(ranges.len());
    let mut extents = Vec::with_capacity(ranges.len());
    for (first, end) in ranges {
        let mut logical = first;
        while logical < end {
            let run = blocks.take(end - logical, true)?;
            // Below 2^32, because a file is not longer than FILE_MAX.
            append(&mut extents, logical as u32, run);
            segments.push(FileSegment { logical, run });
            logical += run.count;
        }
    }
    map(runs, &segments, layer);
    Ok(extents)
}

/// Ranges of file blocks with any data, ascending, not adjacent.
fn covered(runs: &[DataRun]) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::with_capacity(runs.len());
    for run in runs.iter().filter(|run| run.len > Bytes::ZERO) {
        let first = run.file_offset.0 / BLOCK as u64;
        let end = (run.file_offset.0 + run.len.0).div_ceil(BLOCK as u64);
        match ranges.last_mut() {
            Some(last) if first <= last.1 => last.1 = last.1.max(end),
            _ => ranges.push((first, end)),
        }
    }
    ranges
}

/// Maps the sectors of each run.
fn map(runs: &[DataRun], segments: &[FileSegment], layer: &mut LayerBlocks) {
    let mut stored = StoredSectors { layer, open: None };
    let mut segments = segments.iter().peekable();
    for run in runs {
        let start = run.file_offset.0;
        let end = start + run.len.0;
        let mut at = start;
        while at < end
            && let Some(segment) = segments.peek()
        {
            let segment_start = segment.logical * BLOCK as u64;
            let segment_end = segment_start + segment.run.count * BLOCK as u64;
            if at >= segment_end {
                segments.next();
                continue;
            }
            let stop = end.min(segment_end);
            let disk = Bytes(segment.run.start * BLOCK as u64 + (at - segment_start));
            if let Some(bytes) = &run.bytes {
                stored.write(disk, &bytes[(at - start) as usize..(stop - start) as usize]);
            } else {
                let target = Bytes(run.tar_offset.0 + (at - start));
                stored.layer.remote(
                    disk.sector(),
                    Bytes(stop - at).sectors_ceil(),
                    target.sector(),
                );
            }
            at = stop;
        }
    }
    stored.close();
}

/// Assembles whole sectors from bytes at arbitrary ascending positions of a file.
struct StoredSectors<'a> {
    layer: &'a mut LayerBlocks,
    open: Option<(u64, [u8; SECTOR as usize])>,
}

impl StoredSectors<'_> {
    fn write(&mut self, disk: Bytes, bytes: &[u8]) {
        let mut at = disk.0;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (lba, within) = (at / SECTOR, (at % SECTOR) as usize);
            if self.open.as_ref().is_none_or(|&(open, _)| open != lba) {
                self.close();
            }
            let (_, sector) = self.open.get_or_insert((lba, [0; SECTOR as usize]));
            let part = rest.len().min(SECTOR as usize - within);
            sector[within..within + part].copy_from_slice(&rest[..part]);
            at += part as u64;
            rest = &rest[part..];
        }
    }

    fn close(&mut self) {
        if let Some((lba, sector)) = self.open.take() {
            self.layer.metadata(crate::units::Sectors(lba), &sector);
        }
    }
}
