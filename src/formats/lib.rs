//! The formats of container images and of overlaybd's disks: pure code.
//!
//! Nothing here knows a thread, a socket, a path or a clock, and `unsafe` code is forbidden. A parser takes bytes or
//! a [`ByteSource`](source::ByteSource) and gives a value or an error that names the place and the rule that is
//! broken; a writer gives the same bytes for the same input.
//!
//! * [`units`]     bytes, sectors and bits as types that do not mix
//! * [`oci`]       digests, references, manifests, image configs, annotations
//! * [`tar`]       a strict header iterator with exact data offsets; an archive writer
//! * [`gzip`]      scans a layer once; later decodes any segment of it alone
//! * [`zstandard`] the same work for zstd layers, of many frames or of one
//! * [`segments`]  places and checksums of the segments of a gzip, zstd or uncompressed layer
//! * [`zfile`]     overlaybd's seekable compressed container
//! * [`lsmt`]      overlaybd's layer format: it maps disk sectors to bytes
//! * [`ext4`]      an in-memory tree of files, and the ext4 blocks that describe it
//! * [`archive`]   names of the files in a layer archive
//! * [`json`]      a strict reader of settings in JSON
//! * [`trace`]     list of what a start reads, and its file
//!
//! ```
//! use turbobd_formats::oci::Digest;
//! let digest = Digest::of(b"");
//! assert_eq!(digest.hex(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
//! ```
#![forbid(unsafe_code)]

pub mod archive;
pub mod ext4;
pub mod gzip;
pub mod json;
pub mod lsmt;
pub mod oci;
pub mod segments;
pub mod tar;
pub mod trace;
pub mod units;
pub mod zfile;
pub mod zstandard;
