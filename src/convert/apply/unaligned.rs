//! Bytes of sparse files that no mapping of whole sectors can represent; they are kept as the tar passes.
//!
//! A disk maps sectors of the tar, and the data of an ordinary file begins on a sector. The pieces of a
//! sparse file lie in the tar one behind the other without padding, and can begin anywhere in the file. Their
//! parts outside whole sectors are copied into the metadata. GNU tar makes only pieces of whole blocks, so
//! such parts are rare.

use crate::apply::upper::{FileId, UpperTree};
use formats::ext4::{DataRun, NodeKind};
use formats::units::Bytes;

/// Most bytes of one layer outside whole sectors: 64 MiB. They are kept in memory until the image is built,
/// and become metadata that every start of a container downloads.
pub const UNALIGNED_LIMIT: Bytes = Bytes(64 << 20);

/// The kept bytes of one layer.
#[derive(Default)]
pub(super) struct Unaligned {
    /// Number of bytes promised so far.
    kept: u64,
    /// The file with the data that passes, if bytes of it are needed.
    wanted: Option<WantedRun>,
}

/// Position in the file with the data that passes.
struct WantedRun {
    file: FileId,
    /// The run that is being filled, or the next one that may need bytes.
    run: usize,
    /// Position in the tar.
    at: u64,
    /// Bytes of that run so far.
    filled: Vec<u8>,
}

impl Unaligned {
    /// Number of bytes of `kind` that must be kept, or `Err` with the total of the layer if that exceeds the
    /// limit.
    pub(super) fn admit(&mut self, kind: &NodeKind) -> Result<u64, u64> {
        let NodeKind::Regular { size, runs } = kind else { return Ok(0) };
        let needy = runs.iter().filter(|run| run.needs_bytes(*size));
        let len = needy.fold(0u64, |len, run| len.saturating_add(run.len.get()));
        let kept = self.kept.saturating_add(len);
        if kept > UNALIGNED_LIMIT.get() {
            return Err(kept);
        }
        self.kept = kept;
        Ok(len)
    }

    /// Starts the data of the next entry at `at` in the tar; its bytes are needed only if a file is given.
    pub(super) fn start(&mut self, file: Option<FileId>, at: Bytes) {
        self.wanted = file.map(|file| WantedRun { file, run: 0, at: at.get(), filled: Vec::new() });
    }

    /// Takes data as stored in the tar.
    pub(super) fn data(&mut self, bytes: &[u8], upper: &mut UpperTree) {
        let Some(wanted) = &mut self.wanted else { return };
        let Some(NodeKind::Regular { size, runs }) = upper.new_kind_mut(wanted.file) else {
            return;
        };
        if !wanted.take(bytes, *size, runs) {
            self.wanted = None;
        }
    }
}

impl WantedRun {
    /// Copies from `bytes`, which follow the bytes seen before; returns true if more are needed.
    fn take(&mut self, bytes: &[u8], size: Bytes, runs: &mut [DataRun]) -> bool {
        let end = self.at + bytes.len() as u64;
        while let Some(run) = runs.get_mut(self.run) {
            if run.needs_bytes(size) {
                let start = run.tar_offset.get() + self.filled.len() as u64;
                let stop = run.tar_offset.get().saturating_add(run.len.get());
                if start >= end {
                    break;
                }
                let part =
                    start.saturating_sub(self.at) as usize..(stop.min(end) - self.at) as usize;
                self.filled.extend_from_slice(bytes.get(part).unwrap_or_default());
                if stop > end {
                    break;
                }
                run.bytes = Some(std::mem::take(&mut self.filled).into_boxed_slice());
            }
            self.run += 1;
        }
        self.at = end;
        self.run < runs.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apply::tests::entry;
    use crate::apply::{ApplyError, LayerApply, Reason};
    use formats::ext4::Tree;
    use formats::tar::{EntryContent, SparsePiece, TarEntry};

    /// A sparse file of `size` with pieces (offset, length) that follow each other in the tar from byte 1024
    /// on.
    fn sparse(name: &str, size: u64, pieces: &[(u64, u64)]) -> TarEntry {
        let mut tar_offset = 1024;
        let pieces = pieces.iter().map(|&(offset, len)| {
            let (file_offset, len) = (Bytes(offset), Bytes(len));
            tar_offset += len.get();
            SparsePiece { file_offset, tar_offset: Bytes(tar_offset - len.get()), len }
        });
        let pieces = pieces.collect();
        let mut entry = entry(&format!("f {name}"), 1);
        entry.content = EntryContent::Sparse { size: Bytes(size), pieces };
        (entry.data_offset, entry.stored_len) = (Bytes(1024), Bytes(tar_offset - 1024));
        entry
    }

    #[test]
    fn all_bytes_outside_whole_sectors_are_kept_in_whatever_pieces_the_data_comes() {
        let shapes: [(u64, &[(u64, u64)]); 5] = [
            (10_001, &[(100, 5), (1000, 700), (5000, 3000)]),
            (9000, &[(0, 100), (1124, 2000), (8000, 1000)]),
            (4096, &[(0, 1), (2, 1), (4, 1), (700, 512), (2000, 2096)]),
            (5000, &[(0, 512), (600, 10), (1024, 502), (2048, 2952)]),
            (70_000, &[(512, 1024), (1, 0), (65_536, 4464)]),
        ];
        for (size, pieces) in shapes {
            let pieces: Vec<_> = pieces.iter().copied().filter(|&(_, len)| len > 0).collect();
            let len: u64 = pieces.iter().map(|&(_, len)| len).sum();
            let stored: Vec<u8> = (0..len).map(|at| (at % 251) as u8 + 1).collect();
            for chunk in [1, 7, 512, usize::MAX] {
                let mut tree = Tree::new();
                let mut layer = LayerApply::new(&mut tree);
                layer.entry(sparse("a", size, &pieces)).unwrap();
                stored.chunks(chunk).for_each(|bytes| layer.data(bytes));
                layer.entry(entry("f plain len=3", 99)).unwrap();
                layer.data(b"abc");
                layer.finish().unwrap();

                let node = tree.lookup(tree.root(), b"a").unwrap();
                let NodeKind::Regular { runs, .. } = tree.kind(node) else { panic!("not a file") };
                let mut found = vec![0; size as usize];
                for run in runs {
                    assert_eq!(run.bytes.is_some(), run.needs_bytes(Bytes(size)), "{run:?}");
                    let (at, len) = (run.file_offset.get() as usize, run.len.get() as usize);
                    let from = run.tar_offset.get() as usize - 1024;
                    let bytes = run.bytes.as_deref().unwrap_or(&stored[from..from + len]);
                    found[at..at + len].copy_from_slice(bytes);
                }
                let mut expected = vec![0; size as usize];
                let mut rest = &stored[..];
                for &(at, len) in &pieces {
                    let (piece, more) = rest.split_at(len as usize);
                    expected[at as usize..][..piece.len()].copy_from_slice(piece);
                    rest = more;
                }
                assert!(found == expected, "size {size}, chunks of {chunk}");
            }
        }
    }

    #[test]
    fn a_layer_with_too_many_such_bytes_is_refused_by_name_and_limit() {
        let mut tree = Tree::new();
        let mut layer = LayerApply::new(&mut tree);
        let half = UNALIGNED_LIMIT.get() / 2;
        layer.entry(sparse("first", 1 << 40, &[(1, half)])).unwrap();
        layer.entry(sparse("second", 1 << 40, &[(1, half)])).unwrap();
        let error = layer.entry(sparse("third", 1 << 40, &[(1, 1)])).unwrap_err();
        let kept = UNALIGNED_LIMIT.get() + 1;
        assert!(
            matches!(&error, ApplyError::Entry { reason: Reason::Unaligned { kept: found }, .. } if *found == kept)
        );
        assert_eq!(
            error.to_string(),
            "Entry \"third\" at byte 512 of the tar cannot be applied: with it 67108865 bytes of sparse \
             files in this layer lie outside whole sectors of 512 B; 67108864 B are allowed"
        );
        // Data that a mapping can represent does not count, at any size.
        layer.entry(sparse("mapped", 1 << 40, &[(512, 1 << 30), (1 << 39, 1 << 39)])).unwrap();
    }
}
