//! The 512-byte header block.
//!
//! Fields lie at fixed places (POSIX `ustar`; GNU and star use the same first 345 bytes). The magic `ustar\0`
//! with version `00` means POSIX, `ustar  \0` means GNU, any other value the format of V7 Unix. A header is
//! recognised by its checksum alone.

use crate::tar::BLOCK;

/// A header block with a correct checksum.
#[derive(Clone, Copy)]
pub(super) struct Header<'a>(&'a [u8; BLOCK]);

/// Reason why a number field is invalid.
pub(super) type NumberError = &'static str;

impl<'a> Header<'a> {
    /// The block as a header, if its checksum is correct.
    ///
    /// The checksum is the sum of all bytes with its own field taken as blanks. The format means a sum of
    /// unsigned bytes, but old tar programs on systems with a signed `char` summed signed bytes. Both sums
    /// are accepted.
    pub(super) fn new(block: &'a [u8; BLOCK]) -> Option<Self> {
        let header = Self(block);
        let stored = octal(header.bytes(148, 8)).ok()?;
        let blanked = |at: usize, byte: u8| if (148..156).contains(&at) { b' ' } else { byte };
        let (mut unsigned, mut signed) = (0i64, 0i64);
        for (at, &byte) in block.iter().enumerate() {
            let byte = blanked(at, byte);
            unsigned += i64::from(byte);
            signed += i64::from(byte.cast_signed());
        }
        let stored = i64::try_from(stored).ok()?;
        (stored == unsigned || stored == signed).then_some(header)
    }

    fn bytes(self, at: usize, len: usize) -> &'a [u8] {
        &self.0[at..at + len]
    }

    /// A text field up to its first NUL.
    fn text(self, at: usize, len: usize) -> &'a [u8] {
        until_nul(self.bytes(at, len))
    }

    pub(super) fn flag(self) -> u8 {
        self.0[156]
    }

    /// The name, with the prefix field of `ustar`. GNU stores other things there.
    pub(super) fn name(self) -> Vec<u8> {
        let prefix = match self.magic() {
            Magic::Ustar => self.text(345, 155),
            Magic::Star => self.text(345, 131),
            Magic::Gnu | Magic::V7 => &[],
        };
        let name = self.text(0, 100);
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }

    pub(super) fn link_name(self) -> Vec<u8> {
        self.text(157, 100).to_vec()
    }

    pub(super) fn mode(self) -> Result<i64, NumberError> {
        number(self.bytes(100, 8))
    }

    pub(super) fn uid(self) -> Result<i64, NumberError> {
        number(self.bytes(108, 8))
    }

    pub(super) fn gid(self) -> Result<i64, NumberError> {
        number(self.bytes(116, 8))
    }

    pub(super) fn size(self) -> Result<i64, NumberError> {
        number(self.bytes(124, 12))
    }

    pub(super) fn mtime(self) -> Result<i64, NumberError> {
        number(self.bytes(136, 12))
    }

    pub(super) fn major(self) -> Result<i64, NumberError> {
        number(self.bytes(329, 8))
    }

    pub(super) fn minor(self) -> Result<i64, NumberError> {
        number(self.bytes(337, 8))
    }

    /// The start of an old GNU sparse map: four pairs, a flag that more blocks follow, and the length of the
    /// whole file.
    pub(super) fn old_sparse(self) -> (&'a [u8], bool, &'a [u8]) {
        (self.bytes(386, 96), self.0[482] != 0, self.bytes(483, 12))
    }

    fn magic(self) -> Magic {
        match self.bytes(257, 8) {
            b"ustar  \0" => Magic::Gnu,
            [b'u', b's', b't', b'a', b'r', 0, ..] if self.bytes(508, 4) == b"tar\0" => Magic::Star,
            [b'u', b's', b't', b'a', b'r', 0, ..] => Magic::Ustar,
            _ => Magic::V7,
        }
    }
}

enum Magic {
    Ustar,
    /// Schilling's star: `ustar` with times at the end of the prefix field.
    Star,
    Gnu,
    V7,
}

/// The bytes before the first NUL.
pub(super) fn until_nul(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// A number field: octal digits, or, if the first bit is set, a big-endian two's complement number. GNU
/// introduced the latter for sizes of 8 GiB and more, large ids and times before 1970.
pub(super) fn number(field: &[u8]) -> Result<i64, NumberError> {
    match field.first() {
        Some(&first) if first & 0x80 != 0 => base256(field),
        _ => octal(field)
            .and_then(|value| i64::try_from(value).map_err(|_| "the number exceeds 63 bits")),
    }
}

/// `0x80` starts a positive number, `0xff` a negative one. The sign is the bit below the marker.
fn base256(field: &[u8]) -> Result<i64, NumberError> {
    let negative = field[0] & 0x40 != 0;
    let mut value: i128 = if negative { -1 } else { 0 };
    for (at, &byte) in field.iter().enumerate() {
        let byte = match (at, negative) {
            (0, true) => byte | 0x80,
            (0, false) => byte & 0x7f,
            _ => byte,
        };
        value = value << 8 | i128::from(byte);
    }
    i64::try_from(value).map_err(|_| "the number exceeds 64 bits")
}

/// Octal digits between blanks and NULs. An empty field is 0.
fn octal(field: &[u8]) -> Result<u64, NumberError> {
    let blank = |byte: &u8| matches!(byte, b' ' | 0);
    let start = field.iter().position(|byte| !blank(byte)).unwrap_or(field.len());
    let digits = &field[start..];
    let end = digits.iter().position(blank).unwrap_or(digits.len());
    if !digits[end..].iter().all(blank) && !digits[end..].starts_with(&[0]) {
        return Err("it is not one octal number");
    }
    digits[..end].iter().try_fold(0u64, |value, &digit| match digit {
        b'0'..=b'7' if value >> 61 == 0 => Ok(value << 3 | u64::from(digit - b'0')),
        b'0'..=b'7' => Err("the number exceeds 64 bits"),
        _ => Err("it is not an octal number"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_as_octal_and_as_base_256() {
        assert_eq!(number(b"0000644\0"), Ok(0o644));
        assert_eq!(number(b"   644 \0"), Ok(0o644));
        assert_eq!(number(b"\0\0\0\0"), Ok(0));
        assert_eq!(number(b"77777777777"), Ok(0o77777777777));
        assert_eq!(number(b"12\0junk"), Ok(0o12));
        assert_eq!(number(b"\x80\0\0\0\0\0\0\0\0\0\x01\x02"), Ok(258));
        assert_eq!(number(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe"), Ok(-2));
        assert_eq!(number(b"\xff\0\0\0\0\0\0\0"), Ok(-1 << 56));
        for bad in [
            &b"12 34\0"[..],
            b"8",
            b"-1",
            b"0x1",
            b"\x80\x01\0\0\0\0\0\0\0\0\0\0",
            b"777777777777777777777777",
        ] {
            assert!(number(bad).is_err(), "{bad:?}");
        }
    }
}
