//! Bytes of sparse files that no mapping of whole sectors can express, kept as the tar passes.
//!
//! A disk maps sectors of the tar, and the data of an ordinary file begins on one. The pieces of a
//! sparse file lie in the tar one behind the other without padding, and begin anywhere in the file.
//! What is left of them outside whole sectors is copied into the metadata. GNU tar only makes pieces
//! of whole blocks, so there is hardly ever something to keep.

use crate::convert::apply::upper::{FileId, Upper};
use crate::ext4::{DataRun, Kind};
use crate::units::Bytes;

/// Most bytes that one layer may have outside whole sectors: 64 MiB. They are held in memory until
/// the image is built, and become metadata that every start of a container downloads.
pub const UNALIGNED_LIMIT: Bytes = Bytes(64 << 20);

/// What is kept of one layer.
#[derive(Default)]
pub(super) struct Unaligned {
    /// Bytes promised so far.
    kept: u64,
    /// The file whose data passes, if something of it is wanted.
    wanted: Option<Wanted>,
}

/// The place in a file whose data passes.
struct Wanted {
    file: FileId,
    /// The run that is being filled, or the next one that may have to be.
    run: usize,
    /// Position in the tar.
    at: u64,
    /// What has come of that run.
    filled: Vec<u8>,
}

impl Unaligned {
    /// Bytes of `kind` that will have to be kept, or `Err` with what the layer would then have.
    pub(super) fn admit(&mut self, kind: &Kind) -> Result<u64, u64> {
        let Kind::Regular { size, runs } = kind else { return Ok(0) };
        let needy = runs.iter().filter(|run| run.needs_bytes(*size));
        let len = needy.fold(0u64, |len, run| len.saturating_add(run.len.get()));
        let kept = self.kept.saturating_add(len);
        if kept > UNALIGNED_LIMIT.get() {
            return Err(kept);
        }
        self.kept = kept;
        Ok(len)
    }

    /// The data of the next entry begins at `at` in the tar; nothing of it is wanted unless a file is given.
    pub(super) fn start(&mut self, file: Option<FileId>, at: Bytes) {
        self.wanted = file.map(|file| Wanted { file, run: 0, at: at.get(), filled: Vec::new() });
    }

    /// Takes data as it is stored in the tar.
    pub(super) fn data(&mut self, bytes: &[u8], upper: &mut Upper) {
        let Some(wanted) = &mut self.wanted else { return };
        let Some(Kind::Regular { size, runs }) = upper.new_kind_mut(wanted.file) else { return };
        if !wanted.take(bytes, *size, runs) {
            self.wanted = None;
        }
    }
}

impl Wanted {
    /// Copies from `bytes`, which follow what was seen before; returns whether more is wanted.
    fn take(&mut self, bytes: &[u8], size: Bytes, runs: &mut [DataRun]) -> bool {
        let end = self.at + bytes.len() as u64;
        while let Some(run) = runs.get_mut(self.run) {
            if run.needs_bytes(size) {
                let start = run.tar_offset.get() + self.filled.len() as u64;
                let stop = run.tar_offset.get().saturating_add(run.len.get());
                if start >= end {
                    break;
                }
                let part =
                    start.saturating_sub(self.at) as usize..(stop.min(end) - self.at) as usize;
                self.filled.extend_from_slice(bytes.get(part).unwrap_or_default());
                if stop > end {
                    break;
                }
                run.bytes = Some(std::mem::take(&mut self.filled).into_boxed_slice());
            }
            self.run += 1;
        }
        self.at = end;
        self.run < runs.len()
    }
}
