//! Names of the files in a layer archive.
//!
//! A TurboOCI layer is a tar archive of two or three files: the metadata of the layer's filesystem, and the index into
//! the original layer. The first two names are upstream's (spec turbooci 2); the sidecar is turbobd's own, and upstream
//! passes over it.

pub use crate::gzip::{GZIP_META_NAME, SIDECAR_NAME};

/// Bytes of memory that an index takes beside its files while it is open: each position of a `gzip.meta` and of a sidecar
/// takes at most this much, kinds, checksums and lists of parsing included.
const POSITION_MEMORY: u64 = 224;

/// Bytes of memory that the index in these files takes, by the counts that they claim. The count is checked against the
/// file by the parser; here it must only not be exceeded.
#[must_use]
pub fn index_memory(gzip_meta: Option<&[u8]>, sidecar: Option<&[u8]>) -> u64 {
    let number = |file: &[u8], at: usize| {
        let word = file.get(at..at + 4).and_then(|bytes| bytes.first_chunk());
        u64::from(u32::from_le_bytes(*word.unwrap_or(&[0; 4])))
    };
    // A gzip.meta counts in 64 bits, and one of more than 2^32 positions is refused.
    let meta = gzip_meta.map_or(0, |file| number(file, 25));
    let own = sidecar.map_or(0, |file| number(file, 12));
    let files = [gzip_meta, sidecar].into_iter().flatten().map(|file| file.len() as u64).sum();
    meta.max(own).saturating_mul(POSITION_MEMORY).saturating_add(files)
}

/// An LSMT layer in a ZFile: the ext4 metadata of the layer (spec turbooci 3.1).
pub const FS_META_NAME: &str = "ext4.fs.meta";

/// Name of the empty member that marks a TurboOCI layer.
pub const MARKER_NAME: &str = ".turbo.ociv1";

/// Metadata in erofs, upstream's other form. It is read here and not written.
pub const EROFS_META_NAME: &str = "erofs.fs.meta";
