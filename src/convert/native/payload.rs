//! Writes file data into the payload in the order of the tar, and the index at the end.

use std::io::Write;

use formats::ext4::{LayerBlocks, LayerRun};
use formats::lsmt::{LsmtError, ScatteredWriter};
use formats::units::{Bytes, SECTOR, Sectors};

/// Bytes of a disk block, which is stored or left out as a whole.
const BLOCK: usize = 4096;
const BLOCK_SECTORS: u64 = BLOCK as u64 / SECTOR;

/// Number of gaps after which blocks of zeros are stored like any other. Each gap can cost two index entries,
/// and readers accept a million in a layer; layers with a quarter of a million holes are unusual.
const MAX_GAPS: usize = 250_000;

/// Position of a contiguous part of the tar.
#[derive(Clone, Copy, Debug)]
struct TarSegment {
    /// First sector in the tar.
    tar: u64,
    /// Number of sectors of the tar; the last one may be partial.
    count: u64,
    /// First sector in the layer; `None` for zeros that are not stored. Stored data is whole blocks, padded
    /// with zeros.
    stored: Option<u64>,
}

impl TarSegment {
    fn end(&self) -> u64 {
        self.tar + self.count
    }
}

/// Summary of the payload.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PayloadSummary {
    /// Bytes of file data that were all zero and left out.
    pub(crate) zeros: u64,
    /// Bytes of metadata.
    pub(crate) metadata: u64,
}

/// The payload of one layer.
pub(super) struct NativePayload<W> {
    out: ScatteredWriter<W>,
    segments: Vec<TarSegment>,
    gaps: usize,
    /// The block that is being collected: less than a whole one.
    partial: Vec<u8>,
    /// Tar sector of the start of the next block.
    tar: u64,
    stored: PayloadSummary,
}

impl<W: Write> NativePayload<W> {
    pub(super) fn new(out: ScatteredWriter<W>) -> Self {
        Self {
            out,
            segments: Vec::new(),
            gaps: 0,
            partial: Vec::with_capacity(BLOCK),
            tar: 0,
            stored: PayloadSummary::default(),
        }
    }

    /// Starts the data of the next entry, at `offset` of the tar.
    pub(super) fn start(&mut self, offset: Bytes) -> Result<(), LsmtError> {
        self.fill_up()?;
        self.tar = offset.sector().0;
        Ok(())
    }

    /// Takes data that follows the data before.
    pub(super) fn data(&mut self, mut bytes: &[u8]) -> Result<(), LsmtError> {
        if !self.partial.is_empty() {
            let (part, rest) = bytes.split_at(bytes.len().min(BLOCK - self.partial.len()));
            self.partial.extend_from_slice(part);
            bytes = rest;
            if self.partial.len() < BLOCK {
                return Ok(());
            }
            let block = std::mem::take(&mut self.partial);
            self.put(&block, BLOCK_SECTORS)?;
            self.partial = block;
            self.partial.clear();
        }
        let whole = bytes.len() - bytes.len() % BLOCK;
        let (mut blocks, rest) = bytes.split_at(whole);
        while !blocks.is_empty() {
            // Takes a run of blocks of one kind at once.
            let zero = is_zero(&blocks[..BLOCK]);
            let count =
                blocks.chunks_exact(BLOCK).take_while(|block| is_zero(block) == zero).count();
            let (run, more) = blocks.split_at(count * BLOCK);
            self.put(run, run.len() as u64 / SECTOR)?;
            blocks = more;
        }
        self.partial.extend_from_slice(rest);
        Ok(())
    }

    /// Ends an entry: its last block is padded with zeros.
    fn fill_up(&mut self) -> Result<(), LsmtError> {
        if self.partial.is_empty() {
            return Ok(());
        }
        let mut block = std::mem::take(&mut self.partial);
        let sectors = Bytes(block.len() as u64).sectors_ceil();
        block.resize(BLOCK, 0);
        self.put(&block, sectors.0)?;
        block.clear();
        self.partial = block;
        Ok(())
    }

    /// Adds blocks that are either all zeros or all data; they cover this many sectors of the tar.
    fn put(&mut self, blocks: &[u8], count: u64) -> Result<(), LsmtError> {
        let leave_out = self.gaps < MAX_GAPS && is_zero(&blocks[..BLOCK]);
        let stored = if leave_out { None } else { Some(self.out.append(blocks)?.0) };
        if leave_out {
            self.stored.zeros += blocks.len() as u64;
        }
        let next = TarSegment { tar: self.tar, count, stored };
        self.tar += count;
        if let Some(last) = self.segments.last_mut()
            && last.end() == next.tar
            && match (last.stored, next.stored) {
                (Some(before), Some(here)) => before + last.count == here,
                (None, None) => true,
                _ => false,
            }
        {
            last.count += count;
        } else {
            self.segments.push(next);
            self.gaps += usize::from(leave_out);
        }
        Ok(())
    }

    /// Adds the metadata, and maps all sectors.
    pub(super) fn finish(
        mut self,
        blocks: &LayerBlocks,
        has_lower: bool,
    ) -> Result<(W, PayloadSummary), LsmtError> {
        self.fill_up()?;
        let mut runs = blocks.runs().peekable();
        while let Some(run) = runs.next() {
            let next = runs.peek().map_or(u64::MAX, |next| next.lba().0);
            match run {
                LayerRun::Metadata { lba, bytes } => {
                    let at = self.out.append(bytes)?;
                    self.out.map(lba, Sectors(bytes.len() as u64 / SECTOR), at)?;
                    self.stored.metadata += bytes.len() as u64;
                }
                LayerRun::Zeroed { lba, count } => self.out.zeroed(lba, count)?,
                LayerRun::Remote { lba, count, target } => {
                    self.map(lba.0, count.0, target.0, next, has_lower)?;
                }
            }
        }
        Ok((self.out.finish()?, self.stored))
    }

    /// Maps `count` disk sectors from `lba` on to the tar, from its sector `target` on; no other sectors of
    /// the disk before `next` are used.
    fn map(
        &mut self,
        mut lba: u64,
        count: u64,
        mut target: u64,
        next: u64,
        has_lower: bool,
    ) -> Result<(), LsmtError> {
        let end = lba + count;
        let mut at = self.segments.partition_point(|segment| segment.end() <= target);
        while lba < end {
            let segment = self.segments.get(at).copied();
            let Some(segment) = segment.filter(|segment| segment.tar <= target) else {
                // The tree knows only data that the parser has passed on.
                return Err(LsmtError::Run { lba, end, rule: "the tar had no data there" });
            };
            let count = (end - lba).min(segment.end() - target);
            match segment.stored {
                Some(stored) => {
                    let from = stored + (target - segment.tar);
                    // The zeros that pad the last block also fill the rest of the disk's block.
                    let fill = (from + count).next_multiple_of(BLOCK_SECTORS) - (from + count);
                    let block_end = (lba + count).next_multiple_of(BLOCK_SECTORS);
                    let is_tail = lba + count == end
                        && target + count == segment.end()
                        && lba + count + fill == block_end
                        && block_end <= next;
                    let fill = if is_tail { fill } else { 0 };
                    self.out.map(Sectors(lba), Sectors(count + fill), Sectors(from))?;
                }
                None if has_lower => self.out.zeroed(Sectors(lba), Sectors(count))?,
                None => {}
            }
            lba += count;
            target += count;
            at += 1;
        }
        Ok(())
    }
}

/// True if all bytes are zero; for most blocks the first words decide.
fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(64).all(|words| words.iter().fold(0, |sum, byte| sum | byte) == 0)
}
