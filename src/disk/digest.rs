//! What a disk contains, independent of how it is stored.
//!
//! Both functions read only what is mapped: a disk of 64 GiB with 20 MiB of data costs 20 MiB.
//! Threads read ahead while one consumes in order.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread;

use sha2::{Digest as _, Sha256};

use super::Disk;
use crate::oci::digest::Digest;
use crate::units::Sectors;
use crate::volume::{Volume, VolumeError};

/// Grain of the digest: ext4's and the page cache's.
const BLOCK: u64 = 4096;

/// Bytes read at a time by one thread.
const STEP: u64 = 1 << 20;

/// Threads that read ahead: enough to keep several range requests under way.
const READERS: usize = 8;

/// Steps that each thread may be ahead of the consumer.
const AHEAD: usize = 2;

/// Digest of a disk's content and its size in bytes: SHA-256 over `le64(offset) ‖ block` for every
/// 4 KiB block that is not all zeros, ascending. `mapped` are the runs outside which the disk is
/// zero, ascending ([`Disk::mapped`]).
///
/// # Errors
/// The volume's, for the lowest range that cannot be read.
pub fn content_digest(
    volume: &dyn Volume,
    mapped: impl Iterator<Item = (Sectors, Sectors)>,
) -> Result<(Digest, u64), VolumeError> {
    let size = volume.size();
    let steps = steps(mapped, size);
    let mut hasher = Sha256::new();
    let hash = |offset: u64, bytes: &[u8]| {
        for (number, block) in bytes.chunks(BLOCK as usize).enumerate() {
            if !is_zero(block) {
                hasher.update((offset + number as u64 * BLOCK).to_le_bytes());
                hasher.update(block);
            }
        }
        Ok(())
    };
    read_ahead(volume, &steps, hash)?;
    Ok((Digest::from_hasher(hasher), size))
}

/// Writes the disk into `out`, an empty file: as long as the disk, with holes where it is zero.
///
/// # Errors
/// [`ExportError`]: what could not be read, or that `out` could not be written.
pub fn export_raw(disk: &Disk, out: &File) -> Result<(), ExportError> {
    out.set_len(disk.size()).map_err(|error| ExportError::Write(Arc::new(error)))?;
    let steps = steps(disk.mapped(), disk.size());
    read_ahead(disk, &steps, |offset, bytes: &[u8]| {
        // Runs of blocks that are not zero go out in one write.
        let mut start = 0;
        while start < bytes.len() {
            let rest = &bytes[start..];
            let zero = is_zero(&rest[..rest.len().min(BLOCK as usize)]);
            let same = rest.chunks(BLOCK as usize).take_while(|block| is_zero(block) == zero);
            let len = same.map(<[u8]>::len).sum::<usize>();
            if !zero {
                out.write_all_at(&rest[..len], offset + start as u64)
                    .map_err(|error| ExportError::Write(Arc::new(error)))?;
            }
            start += len;
        }
        Ok(())
    })
}

/// Why a disk could not be exported.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ExportError {
    /// The disk could not be read.
    #[error(transparent)]
    Read(#[from] VolumeError),
    /// The file could not be written.
    #[error("Cannot write the exported disk")]
    Write(#[source] Arc<io::Error>),
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|&byte| byte == 0)
}

/// The mapped runs rounded out to blocks, joined, and cut into [`STEP`]s: offset and length in bytes.
fn steps(mapped: impl Iterator<Item = (Sectors, Sectors)>, size: u64) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for (lba, len) in mapped {
        let start = lba.bytes().0 / BLOCK * BLOCK;
        let end = (lba + len).bytes().0.next_multiple_of(BLOCK).min(size);
        match runs.last_mut() {
            Some((_, before)) if start <= *before => *before = end.max(*before),
            _ => runs.push((start, end)),
        }
    }
    let cut = |(start, end): (u64, u64)| {
        (start..end).step_by(STEP as usize).map(move |at| (at, (end - at).min(STEP)))
    };
    runs.into_iter().flat_map(cut).collect()
}

/// Reads all steps on several threads and gives them to `consume` in order, until one fails.
fn read_ahead<E: From<VolumeError>>(
    volume: &dyn Volume,
    steps: &[(u64, u64)],
    mut consume: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let readers = READERS.min(steps.len());
    thread::scope(|scope| {
        // Reader r takes steps r, r + readers, …; so the consumer knows whose turn it is.
        let start = |reader: usize| {
            let (give, take) = sync_channel(AHEAD);
            scope.spawn(move || {
                for &(offset, len) in steps.iter().skip(reader).step_by(readers) {
                    let mut bytes = vec![0; len as usize];
                    let result = volume.read_at(&mut bytes, offset).map(|()| bytes);
                    let failed = result.is_err();
                    if give.send(result).is_err() || failed {
                        return;
                    }
                }
            });
            take
        };
        let inboxes: Vec<_> = (0..readers).map(start).collect();
        for (number, &(offset, _)) in steps.iter().enumerate() {
            // A reader ends early only after it has sent its error, at which this loop ends.
            let Ok(result) = inboxes[number % readers].recv() else { break };
            consume(offset, &result?)?;
        }
        Ok(())
    })
}
