//! One index entry: 16 bytes of bit fields (spec lsmt 4; upstream `index.h:SegmentMapping`).

use std::fmt;

use crate::units::Sectors;

/// Bytes of an encoded entry.
pub const ENTRY: u64 = 16;

/// Most sectors in one entry: its length field has 14 bits.
pub const MAX_LEN: u64 = (1 << 14) - 1;

/// One past the last sector number at which an entry can begin; the number itself marks padding.
pub const LBA_LIMIT: u64 = (1 << 50) - 1;

/// One past the last sector of a file that an entry can point to.
pub const MOFFSET_LIMIT: u64 = 1 << 55;

/// The entry that pads an index to a whole page and has no meaning.
pub const PADDING: [u8; ENTRY as usize] =
    [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x03, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// A run of disk sectors and its position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First disk sector.
    pub lba: Sectors,
    /// Number of sectors, 1..=16383.
    pub len: u16,
    /// True if the run reads as zeros; `moffset` then points to no data.
    pub zeroed: bool,
    /// The file that `moffset` points into: 0 the layer's own payload, 1 the tar of the original layer.
    pub tag: u8,
    /// First sector in that file.
    pub moffset: Sectors,
}

impl Mapping {
    /// Reads an entry, or `None` for padding.
    #[must_use]
    pub fn decode(bytes: [u8; ENTRY as usize]) -> Option<Self> {
        let both = u128::from_le_bytes(bytes);
        let (a, b) = (both as u64, (both >> 64) as u64);
        let lba = a & LBA_LIMIT;
        (lba != LBA_LIMIT).then_some(Self {
            lba: Sectors(lba),
            len: (a >> 50) as u16,
            zeroed: b >> 55 & 1 == 1,
            tag: (b >> 56) as u8,
            moffset: Sectors(b & (MOFFSET_LIMIT - 1)),
        })
    }

    /// The sixteen bytes. Fields beyond their limits lose their upper bits: writers must check before.
    #[must_use]
    pub fn encode(&self) -> [u8; ENTRY as usize] {
        let a = self.lba.0 & LBA_LIMIT | (u64::from(self.len) & MAX_LEN) << 50;
        let b = self.moffset.0 & (MOFFSET_LIMIT - 1)
            | u64::from(self.zeroed) << 55
            | u64::from(self.tag) << 56;
        (u128::from(a) | u128::from(b) << 64).to_le_bytes()
    }

    /// One past the last disk sector. Never overflows: `lba` has 50 bits.
    #[must_use]
    pub const fn end(&self) -> Sectors {
        Sectors(self.lba.0 + self.len as u64)
    }

    /// One past the last sector in the file; `moffset` for a zeroed run, which has no sectors there.
    #[must_use]
    pub const fn moffset_end(&self) -> Sectors {
        Sectors(self.moffset.0 + if self.zeroed { 0 } else { self.len as u64 })
    }
}

impl fmt::Display for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "disk sectors {}..{} ", self.lba.0, self.end().0)?;
        if self.zeroed {
            write!(f, "zeroed")
        } else {
            write!(f, "at sector {} of file {}", self.moffset.0, self.tag)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn padding_is_the_entry_that_upstream_writes() {
        assert_eq!(Mapping::decode(PADDING), None);
        let bytes = [0x08, 0, 0, 0, 0, 0, 0x04, 0x00, 0x2a, 0, 0, 0, 0, 0, 0x80, 0x01];
        let mapping =
            Mapping { lba: Sectors(8), len: 1, zeroed: true, tag: 1, moffset: Sectors(42) };
        assert_eq!(Mapping::decode(bytes), Some(mapping));
    }

    proptest! {
        #[test]
        fn every_entry_reads_back(lba in 0..LBA_LIMIT, len in 1..=MAX_LEN as u16, zeroed: bool, tag: u8, at in 0..MOFFSET_LIMIT) {
            let mapping = Mapping { lba: Sectors(lba), len, zeroed, tag, moffset: Sectors(at) };
            prop_assert_eq!(Mapping::decode(mapping.encode()), Some(mapping));
        }
    }
}
