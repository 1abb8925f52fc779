//! Metadata of a layer in memory, present at once.
//!
//! A queue thread answers reads of metadata by its address and must not wait for a page fault. So the plain bytes of
//! a metadata layer are decoded into pages of their own when the image is opened, on all cores where that pays.

use std::io;
use std::num::NonZero;
use std::sync::Arc;
use std::thread;

use formats::zfile::reader::ZFile;
use formats::zfile::{LayerPayload, ZFileError};
use memmap2::{MmapMut, MmapOptions};
use source::{Accounted, ByteSource as _, MemoryBudget, SharedBytes};

/// Fewest plain bytes for which another thread is worth starting.
const SHARE: u64 = 2 << 20;

/// All plain bytes of `payload` in pages of their own, locked in memory where the system allows it.
///
/// # Errors
/// [`ZFileError`] when a block is damaged or there is no room for the bytes.
pub fn read_resident(payload: &LayerPayload) -> Result<MmapMut, ZFileError> {
    let len = len_of(payload);
    // No mapping is empty, and an LSMT stream is never empty either.
    let len = usize::try_from(len).unwrap_or(usize::MAX).max(1);
    let mut plain = MmapOptions::new().len(len).populate().map_anon()?;
    match payload {
        LayerPayload::ZFile(file) => decode_on_all_cores(file, &mut plain)?,
        LayerPayload::Plain(source) => source.read_exact_at(&mut plain, 0)?,
    }
    // Swap would bring the page faults back. An unprivileged process may lock little, so a refusal is ignored.
    let _ = plain.lock();
    Ok(plain)
}

/// As [`read_resident`], within `budget`; `what` names the bytes.
///
/// # Errors
/// As [`read_resident`], and [`ZFileError::Budget`] before any memory is taken.
pub fn read_within(
    payload: &LayerPayload,
    budget: &MemoryBudget,
    what: &str,
) -> Result<SharedBytes, ZFileError> {
    let part = budget.reserve(len_of(payload), what)?;
    Ok(Arc::new(Accounted::new(read_resident(payload)?, part)))
}

fn len_of(payload: &LayerPayload) -> u64 {
    match payload {
        LayerPayload::ZFile(file) => file.len(),
        LayerPayload::Plain(source) => source.len(),
    }
}

/// Decodes `file` into `plain`, which is as long as its plain bytes.
fn decode_on_all_cores(file: &ZFile, plain: &mut [u8]) -> Result<(), ZFileError> {
    let cores = thread::available_parallelism().map_or(1, NonZero::get) as u64;
    let block = u64::from(file.record().block_size);
    let share = file.blocks().div_ceil(cores).max(SHARE / block);
    let parts = plain.chunks_mut((share * block) as usize);
    thread::scope(|scope| {
        let mut parts = (0..).step_by(share as usize).zip(parts);
        let mine = parts.next();
        let others: Vec<_> = parts
            .map(|(first, part)| scope.spawn(move || file.decode_into(first, share, part)))
            .collect();
        let mine = mine.map_or(Ok(()), |(first, part)| file.decode_into(first, share, part));
        // The error names the lowest damaged block.
        others.into_iter().fold(mine, |result, other| {
            let other = other
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("a decoding thread ended early").into()));
            result.and(other)
        })
    })
}
