//! Material for the trees of these tests: attributes, and data in a tar that does not exist.

use std::collections::BTreeMap;

use super::disk::tar_bytes;
use crate::ext4::{Attributes, DataRun, NodeKind, Timestamp};
use crate::units::{Bytes, SECTOR};

pub(super) const MIB: u64 = 1 << 20;

pub(super) fn attributes(mode: u16) -> Attributes {
    Attributes {
        mode,
        uid: 1000,
        gid: 100_000,
        mtime: Timestamp { secs: 1_700_000_000, nanos: 123_456_789 },
        xattrs: BTreeMap::new(),
    }
}

pub(super) fn with_xattrs(pairs: &[(&str, &[u8])]) -> Attributes {
    let xattrs =
        pairs.iter().map(|&(name, value)| (name.as_bytes().to_vec(), value.to_vec())).collect();
    Attributes { xattrs, ..attributes(0o644) }
}

/// Allocates positions in the fake tar, each behind a header.
#[derive(Default)]
pub(super) struct TarOffsets(pub(super) u64);

impl TarOffsets {
    pub(super) fn file(&mut self, size: u64) -> NodeKind {
        if size == 0 {
            return NodeKind::Regular { size: Bytes(0), runs: Vec::new() };
        }
        self.0 += SECTOR;
        let run = DataRun::remote(Bytes(0), Bytes(self.0), Bytes(size));
        self.0 += size.next_multiple_of(SECTOR);
        NodeKind::Regular { size: Bytes(size), runs: vec![run] }
    }

    /// A file with data at `pieces` (offset, length) and holes elsewhere.
    pub(super) fn sparse(&mut self, size: u64, pieces: &[(u64, u64)]) -> NodeKind {
        self.0 += SECTOR;
        let mut runs = Vec::new();
        for &(offset, len) in pieces {
            let run = DataRun::remote(Bytes(offset), Bytes(self.0), Bytes(len));
            self.0 += len.next_multiple_of(SECTOR);
            runs.extend(run.split(Bytes(size)));
        }
        for run in &mut runs {
            if run.needs_bytes(Bytes(size)) {
                run.bytes = Some(tar_bytes(run.tar_offset.0, run.len.0).into());
            }
        }
        NodeKind::Regular { size: Bytes(size), runs }
    }
}
