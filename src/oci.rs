//! OCI images.

pub mod digest;

pub use digest::{Digest, DigestError};
