//! The inner loop of an inflate decoder that tells what a decoder usually hides.
//!
//! To index a gzip layer, a scan must know where deflate blocks begin (a checkpoint can be there) and which bytes of
//! the 32 KiB window the output behind a checkpoint refers to (only those need to be stored). No library reports
//! either, so the scan has a decoder of its own. This crate is the part of it that decides the speed: prefix codes
//! as tables, the loop over symbols, and the log of matches. What frames it (gzip members, block headers, the careful
//! loop near an edge) is safe code in the crate `formats`.
//!
//! `unsafe` is allowed in [`fast`] alone, and its essay says why and by which rules.
//!
//! * [`huffman`] prefix codes as look-up tables
//! * [`fast`]    the loop while input and output are ample
//! * [`marks`]   which bytes of a window are used
//!
//! ```
//! use turbobd_inflate::huffman::Tables;
//! let mut tables = Tables::new();
//! tables.set_fixed(); // RFC 1951, 3.2.6
//! ```

pub mod fast;
pub mod huffman;
pub mod marks;
