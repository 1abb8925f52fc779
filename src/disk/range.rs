//! Bytes of a virtual disk, as a front end requests them.

use std::fmt;
use std::ops::Range;

use formats::units::{SECTOR, Sectors};

/// A range of bytes of a virtual disk. It may leave the disk: [`DiskRange::check`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DiskRange {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

impl DiskRange {
    /// `len` bytes from byte `offset` on.
    #[must_use]
    pub const fn new(offset: u64, len: u64) -> Self {
        Self { offset, len }
    }

    /// One past the last byte; `u64::MAX`, which no disk has, if it does not fit.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    /// Length of a buffer for all of it.
    #[must_use]
    pub const fn buffer_len(self) -> usize {
        self.len as usize
    }

    /// True if it has no bytes.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// True if it contains byte `at`.
    #[must_use]
    pub const fn contains(self, at: u64) -> bool {
        self.offset <= at && at < self.end()
    }

    /// First sector and number of the sectors with its bytes. It may begin and end inside a sector.
    #[must_use]
    pub const fn sectors(self) -> (Sectors, Sectors) {
        let first = self.offset / SECTOR;
        (Sectors(first), Sectors(self.end().div_ceil(SECTOR) - first))
    }

    /// The part of it in `len` sectors from `lba` on, which must have one of its bytes.
    #[must_use]
    pub fn part_in(self, lba: Sectors, len: Sectors) -> Self {
        let start = lba.bytes().0.max(self.offset);
        Self { offset: start, len: (lba + len).bytes().0.min(self.end()) - start }
    }
}

/// `start..end`.
impl fmt::Display for DiskRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.offset, self.end())
    }
}

/// A range that ends before it begins is empty.
impl From<Range<u64>> for DiskRange {
    fn from(range: Range<u64>) -> Self {
        Self { offset: range.start, len: range.end.saturating_sub(range.start) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_covers_the_sectors_that_it_touches_and_is_cut_at_them() {
        let range = DiskRange::new(700, 900);
        assert_eq!(range.sectors(), (Sectors(1), Sectors(3)));
        assert_eq!(range.part_in(Sectors(0), Sectors(2)), DiskRange::new(700, 324));
        assert_eq!(range.part_in(Sectors(2), Sectors(1)), DiskRange::new(1024, 512));
        assert_eq!(range.part_in(Sectors(3), Sectors(9)), DiskRange::new(1536, 64));
        assert!(range.contains(1599) && !range.contains(1600) && !range.contains(699));
        assert_eq!(DiskRange::from(700..1600), range);
        assert_eq!(DiskRange::new(512, 0).sectors(), (Sectors(1), Sectors(0)));
    }

    #[test]
    fn a_range_past_the_largest_number_is_past_the_end_of_every_disk() {
        let range = DiskRange::new(u64::MAX - 1, 512);
        assert_eq!(
            range.check(1 << 40).unwrap_err().to_string(),
            "Bytes 18446744073709551614..18446744073709551615 do not exist: the disk has 1099511627776 bytes"
        );
        assert!(DiskRange::new(512, 512).check(1024).is_ok());
    }
}
