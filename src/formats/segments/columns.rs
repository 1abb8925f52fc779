//! The number encoding of both versions of `turbobd.segments`.
//!
//! A varint is LEB128 in its shortest form: seven bits a byte, low bits first, high bit set on all bytes but
//! the last.

/// A broken rule of the format, and its position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Broken {
    /// Offset in the file.
    pub(crate) offset: u64,
    /// The broken rule.
    pub(crate) rule: &'static str,
}

/// Appends a varint.
pub(crate) fn put_varint(file: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        file.push(value as u8 | 0x80);
        value >>= 7;
    }
    file.push(value as u8);
}

/// A reader that never passes the end.
pub(crate) struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    /// A reader at the start of `file`.
    pub(crate) fn new(file: &'a [u8]) -> Self {
        Self { file, at: 0 }
    }

    /// An error for `rule` at the present position.
    pub(crate) fn broken(&self, rule: &'static str) -> Broken {
        Broken { offset: self.at as u64, rule }
    }

    /// True if everything was read.
    pub(crate) fn is_at_end(&self) -> bool {
        self.at == self.file.len()
    }

    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], Broken> {
        let end = self.at.checked_add(len).filter(|&end| end <= self.file.len());
        let end = end.ok_or(self.broken("the file ends too early"))?;
        let taken = &self.file[self.at..end];
        self.at = end;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Broken> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Broken> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(crate) fn varint(&mut self) -> Result<u64, Broken> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let [byte] = self.array()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits || (byte == 0 && shift > 0) {
                break;
            }
            value |= bits << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(self.broken("a number is not in its shortest form or has more than 64 bits"))
    }
}
