//! Bytes, sectors and bits, as types that do not mix.
//!
//! Three coordinates meet in this program: a byte in a blob or in its uncompressed tar, a 512-byte sector of
//! a virtual disk (and of LSMT mappings), and a bit in a deflate stream. A sector number taken for a byte
//! offset gives a wrong answer without an error, so each coordinate has a newtype. Each type serves both as a
//! position and as a length, as `u64` does in [`std::fs`].

use std::fmt;
use std::ops::{Add, AddAssign, Sub};

/// Bytes in a sector: the unit of LSMT mappings, of the block layer, and of tar records.
pub const SECTOR: u64 = 512;

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident, $suffix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl $name {
            /// Zero.
            pub const ZERO: Self = Self(0);

            /// The number without its unit.
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// `self + other`, or `None` past `u64::MAX`. For numbers read from a file.
            #[must_use]
            pub const fn checked_add(self, other: Self) -> Option<Self> {
                match self.0.checked_add(other.0) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }
        }

        impl Add for $name {
            type Output = Self;
            fn add(self, other: Self) -> Self {
                Self(self.0 + other.0)
            }
        }

        impl AddAssign for $name {
            fn add_assign(&mut self, other: Self) {
                self.0 += other.0;
            }
        }

        impl Sub for $name {
            type Output = Self;
            fn sub(self, other: Self) -> Self {
                Self(self.0 - other.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!("{}", $suffix), self.0)
            }
        }
    };
}

unit!(
    /// A position or length in bytes.
    Bytes, " B"
);
unit!(
    /// A position or length in 512-byte sectors.
    Sectors, " sectors"
);
unit!(
    /// A position or length in bits: bit `8 * n` is the lowest bit of byte `n`.
    Bits, " bits"
);

impl Bytes {
    /// The sector that contains this byte.
    #[must_use]
    pub const fn sector(self) -> Sectors {
        Sectors(self.0 / SECTOR)
    }

    /// The number of sectors that cover this many bytes.
    #[must_use]
    pub const fn sectors_ceil(self) -> Sectors {
        Sectors(self.0.div_ceil(SECTOR))
    }
}

impl Sectors {
    /// The length in bytes, or `None` past `u64::MAX`. For numbers read from a file.
    #[must_use]
    pub const fn checked_bytes(self) -> Option<Bytes> {
        match self.0.checked_mul(SECTOR) {
            Some(bytes) => Some(Bytes(bytes)),
            None => None,
        }
    }

    /// The length in bytes, for a sector already known to lie on a disk.
    #[must_use]
    pub const fn bytes(self) -> Bytes {
        Bytes(self.0 * SECTOR)
    }
}

impl Bits {
    /// The byte that contains this bit.
    #[must_use]
    pub const fn byte(self) -> Bytes {
        Bytes(self.0 / 8)
    }

    /// The number of bytes that cover this many bits.
    #[must_use]
    pub const fn bytes_ceil(self) -> Bytes {
        Bytes(self.0.div_ceil(8))
    }

    /// Position within its byte, 0..=7.
    #[must_use]
    pub const fn phase(self) -> u32 {
        (self.0 & 7) as u32
    }
}
