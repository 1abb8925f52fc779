//! Doubles for tests of the code above: the feature `testing`.

use std::io;
use std::sync::Arc;

use crate::{ByteSource, Origin, SourceError};

/// A source with deliberate faults, for tests of all code above it.
pub struct FaultySource {
    inner: Arc<dyn ByteSource>,
    faults: Vec<ReadFault>,
}

/// Fault of a [`FaultySource`] in a read that touches a byte.
#[derive(Clone, Copy, Debug)]
pub enum ReadFault {
    /// Reads that touch this byte fail.
    FailAt(u64),
    /// The byte at this offset arrives with these bits flipped.
    FlipAt(u64, u8),
}

impl FaultySource {
    /// `inner`, with `faults`.
    pub fn new(inner: Arc<dyn ByteSource>, faults: Vec<ReadFault>) -> Self {
        Self { inner, faults }
    }
}

impl ByteSource for FaultySource {
    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        self.inner.read_exact_at(buf, offset)?;
        let range = offset..offset + buf.len() as u64;
        for fault in &self.faults {
            match *fault {
                ReadFault::FailAt(at) if range.contains(&at) => {
                    return Err(SourceError::Io {
                        name: self.name().to_owned(),
                        offset,
                        len: buf.len(),
                        source: Arc::new(io::Error::from_raw_os_error(libc::EIO)),
                    });
                }
                ReadFault::FlipAt(at, bits) if range.contains(&at) => {
                    buf[(at - offset) as usize] ^= bits;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn is_local(&self) -> bool {
        self.inner.is_local()
    }

    fn origin(&self) -> Origin {
        self.inner.origin()
    }

    fn name(&self) -> &str {
        self.inner.name()
    }
}
