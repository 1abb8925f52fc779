//! The content of a disk, independent of its storage.
//!
//! Both functions read only mapped sectors: a disk of 64 GiB with 20 MiB of data costs 20 MiB.

use std::fs::File;
use std::io::{self, Read as _, Write};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use super::Disk;
use super::scan::{BLOCK, blocks, scan, steps};
use crate::volume::{Volume, VolumeError};
use formats::oci::digest::Digest;
use formats::units::Sectors;

/// Most bytes written at a time.
const WRITE: usize = 1 << 20;

/// Digest of a disk's content and its size in bytes: SHA-256 over `le64(offset) ‖ block` for every 4 KiB
/// block that is not all zeros, ascending. `mapped` are the runs with data, ascending; the disk is zero
/// everywhere else ([`Disk::mapped`]).
///
/// # Errors
/// The errors of the volume, for the lowest range that cannot be read.
pub fn content_digest(
    volume: &dyn Volume,
    mapped: impl Iterator<Item = (Sectors, Sectors)>,
) -> Result<(Digest, u64), VolumeError> {
    let size = volume.size();
    let steps = steps(mapped, size);
    let mut hasher = Sha256::new();
    scan(volume, &steps, |offset, pieces| {
        blocks(offset, pieces, |at, block| {
            hasher.update(at.to_le_bytes());
            hasher.update(block);
            Ok::<_, VolumeError>(())
        })
    })?;
    Ok((Digest::from_hasher(hasher), size))
}

/// Writes the disk into `out`, an empty file, which becomes as long as the disk, with holes for zeros.
///
/// # Errors
/// [`ExportError`] if the disk cannot be read, or `out` cannot be written.
pub fn export_raw(disk: &Disk, out: &File) -> Result<(), ExportError> {
    out.set_len(disk.size()).map_err(|error| ExportError::Write(Arc::new(error)))?;
    let steps = steps(disk.mapped(), disk.size());
    // Blocks that follow each other are written at once.
    let (mut start, mut run) = (0, Vec::with_capacity(WRITE));
    let write = |start: u64, run: &[u8]| {
        out.write_all_at(run, start).map_err(|error| ExportError::Write(Arc::new(error)))
    };
    scan(disk, &steps, |offset, pieces| {
        blocks(offset, pieces, |at, block| {
            let follows = at == start + run.len() as u64;
            if !run.is_empty() && (!follows || run.len() + BLOCK as usize > WRITE) {
                write(start, &run)?;
                run.clear();
            }
            if run.is_empty() {
                start = at;
            }
            run.extend_from_slice(block);
            Ok::<_, ExportError>(())
        })
    })?;
    write(start, &run)
}

/// Writes every byte of the disk in order, zeros too, into what may hold other bytes or has no positions.
///
/// # Errors
/// [`ExportError`] if the disk cannot be read, or `out` cannot be written.
pub fn export_stream(disk: &Disk, out: &mut dyn Write) -> Result<(), ExportError> {
    let failed = |error| ExportError::Write(Arc::new(error));
    let mut at = 0;
    scan(disk, &steps(disk.mapped(), disk.size()), |offset, pieces| {
        zeros(out, offset - at).map_err(failed)?;
        at = offset;
        for piece in pieces {
            match piece.bytes() {
                Some(bytes) => out.write_all(bytes),
                None => zeros(out, piece.len() as u64),
            }
            .map_err(failed)?;
            at += piece.len() as u64;
        }
        Ok::<_, ExportError>(())
    })?;
    zeros(out, disk.size() - at).and_then(|()| out.flush()).map_err(failed)
}

fn zeros(out: &mut dyn Write, len: u64) -> io::Result<()> {
    io::copy(&mut io::repeat(0).take(len), out).map(drop)
}

/// Error of exporting a disk.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ExportError {
    /// The disk could not be read.
    #[error(transparent)]
    Read(#[from] VolumeError),
    /// The file could not be written.
    #[error("Cannot write the exported disk")]
    Write(#[source] Arc<io::Error>),
}
