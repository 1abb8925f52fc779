//! Native layers: all blocks of a layer on the disk, in one blob.
//!
//! ```text
//! tar data, as it passes ──▶ NativePayload ──▶ LSMT stream ──▶ ZFile, all cores ──▶ work file
//!                              │ tar sector → payload sector                      │
//! ext4 of this layer ──────────┴──▶ index, at the end                             ▼ SHA-256
//! ```
//!
//! The position of a file's data on the disk is known only after the whole tar: a later entry may replace it,
//! a whiteout may hide it. But an LSMT index can point anywhere into its payload, so the data need not wait.
//! It goes into the payload **in the order of the tar**, and the index, written last, maps the disk sectors
//! to it. Memory holds some blocks and 24 bytes per file. The disk is that of the TurboOCI conversion, sector
//! for sector: the same tree, the same allocation, and each mapping into the tar becomes one into the
//! payload.
//!
//! * Each file begins on a new 4 KiB of payload and its last block is padded with zeros, as on the disk. So
//!   each disk block of a file is one compressed block, consecutive files become one index entry, and the
//!   padding of a hostile tar is not stored.
//! * A block of zeros is not stored. In the lowest layer it has no index entry; in a higher layer it is
//!   declared zero, to hide the layers below.
//! * All metadata follows behind all data.
//! * The blob is written to an unnamed *work file*: its length stands in its first bytes, so it cannot be
//!   sent before it is complete. Its digest is computed during the conversion of the next layer.

mod blob;
mod payload;

pub use blob::NativeBlob;
pub(super) use blob::{Hashing, Unhashed};

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::ConvertLayerError;
use crate::ParallelWriter;
use disk::writable::WritableLayer;
use formats::ext4::LayerBlocks;
use formats::lsmt::{LayerIdentity, ScatteredWriter, Uuid};
use formats::oci::Digest;
use formats::units::Bytes;
use formats::zfile::{self, wrap};
use payload::{NativePayload, PayloadSummary};

/// Bytes in front of the `ZFile` in a tar of form A.
const HEAD: u64 = 1536;

/// Properties of a native layer, and its compression.
#[derive(Clone, Debug)]
pub struct NativeLayer {
    /// Size of the disk; 0 in a layer above the lowest, because readers take it from below (spec turbooci 4).
    pub virtual_size: Bytes,
    /// Identity of this layer and of the one below.
    pub identity: LayerIdentity,
    /// True if there are layers below with bytes that a block of zeros must hide.
    pub has_lower: bool,
    /// Compression.
    pub zfile: zfile::Options,
}

/// A native layer that is written as its tar passes.
pub(super) struct NativeBuilder {
    payload: NativePayload<ParallelWriter<File>>,
    has_lower: bool,
}

impl NativeBuilder {
    /// Begins a layer in an unnamed file in `dir`.
    pub(super) fn begin(layer: NativeLayer, dir: Option<&Path>) -> Result<Self, ConvertLayerError> {
        let zfile = begin_blob(layer.zfile, dir)?;
        let lsmt = ScatteredWriter::new(zfile, layer.virtual_size, layer.identity)?;
        Ok(Self { payload: NativePayload::new(lsmt), has_lower: layer.has_lower })
    }

    /// Starts the data of the next entry, at `offset` of the uncompressed tar.
    pub(super) fn start(&mut self, offset: Bytes) -> Result<(), ConvertLayerError> {
        Ok(self.payload.start(offset)?)
    }

    /// Takes data of that entry, without padding.
    pub(super) fn data(&mut self, bytes: &[u8]) -> Result<(), ConvertLayerError> {
        Ok(self.payload.data(bytes)?)
    }

    /// Writes metadata and index and completes the blob.
    pub(super) fn finish(self, blocks: &LayerBlocks) -> Result<Unhashed, ConvertLayerError> {
        let (zfile, stored) = self.payload.finish(blocks, self.has_lower)?;
        complete_blob(zfile, stored)
    }
}

/// Begins a blob in an unnamed file in `dir`; the LSMT stream of a layer is written to it.
fn begin_blob(
    options: zfile::Options,
    dir: Option<&Path>,
) -> Result<ParallelWriter<File>, ConvertLayerError> {
    let dir: PathBuf = dir.map_or_else(std::env::temp_dir, Path::to_path_buf);
    let work_file = |source| ConvertLayerError::WorkFile { dir: dir.clone(), source };
    let mut file = tempfile::tempfile_in(&dir).map_err(work_file)?;
    // The final head needs the length, which is known at the end.
    file.write_all(&[0; HEAD as usize]).map_err(work_file)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(ParallelWriter::new(file, options, threads)?)
}

/// Ends the `ZFile` and writes the tar around it.
fn complete_blob(
    zfile: ParallelWriter<File>,
    stored: PayloadSummary,
) -> Result<Unhashed, ConvertLayerError> {
    let (mut file, summary) = zfile.finish()?;
    let out = |error: io::Error| ConvertLayerError::ZFile(error.into());
    wrap::write_tail(summary.len, &mut file).map_err(out)?;
    let len = file.stream_position().map_err(out)?;
    file.seek(SeekFrom::Start(0)).map_err(out)?;
    file.write_all(&wrap::head(summary.len)).map_err(out)?;
    Ok(Unhashed { file, len, plain: summary.original_size, stored })
}

/// Makes a native layer's blob of the content of a writable layer.
///
/// # Errors
/// [`ConvertLayerError`]; the writable layer stays unchanged.
pub fn commit_layer(
    layer: &mut WritableLayer,
    virtual_size: Bytes,
    identity: LayerIdentity,
    options: zfile::Options,
    dir: Option<&Path>,
) -> Result<NativeBlob, ConvertLayerError> {
    let zfile = begin_blob(options, dir)?;
    let zfile = layer.commit(zfile, virtual_size, identity).map_err(Box::new)?;
    complete_blob(zfile, PayloadSummary::default())?.hash()?.done()
}

/// The identities of native layers over these unpacked layers: the first half of each one's OCI chain id, as
/// in upstream's conversion (spec turbooci 4).
#[must_use]
pub fn layer_uuids(diff_ids: &[Digest]) -> Vec<Uuid> {
    let mut chain: Option<Digest> = None;
    diff_ids
        .iter()
        .map(|id| {
            let link = chain.map_or(*id, |below| {
                let mut hasher = Sha256::new();
                hasher.update(format!("{below} {id}"));
                Digest::from_hasher(hasher)
            });
            chain = Some(link);
            let mut uuid = [0; 16];
            for (byte, pair) in uuid.iter_mut().zip(link.hex().as_bytes().chunks(2)) {
                let pair = std::str::from_utf8(pair).unwrap_or("0");
                *byte = u8::from_str_radix(pair, 16).unwrap_or(0);
            }
            Uuid(uuid)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_half_of_the_chain_id() {
        // hello-world of upstream's repository: one layer, with a chain id equal to its diff_id (spec golden
        // 1).
        let id = "sha256:01bb4fce3eb1b56b05adf99504dafd31907a5aadac736e36b27595c8b92f07f1";
        let uuids = layer_uuids(&[id.parse().unwrap()]);
        assert_eq!(uuids[0].to_string(), "01BB4FCE-3EB1-B56B-05AD-F99504DAFD31");
        // Chain ids by the rule of the image specification, computed with sha256sum.
        let uuids = layer_uuids(&[Digest::of(b"a"), Digest::of(b"b")]);
        assert_eq!(uuids[0].to_string(), "CA978112-CA1B-BDCA-FAC2-31B39A23DC4D");
        let text = format!("{} {}", Digest::of(b"a"), Digest::of(b"b"));
        assert!(
            Digest::of(text.as_bytes())
                .hex()
                .to_uppercase()
                .starts_with(&uuids[1].to_string()[..8])
        );
    }
}
