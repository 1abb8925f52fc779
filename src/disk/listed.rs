//! A list of files as a trace: overlaybd's "dynamic" prefetch list (spec runtime 8).
//!
//! If `recordTracePath` names a text instead of a trace, its lines are absolute paths of the image; a line
//! that ends in `/` or `*` means every file below. The filesystem has the positions of the files' blocks, and
//! the stack of layers maps these to pieces of blobs. No file content is read for that.
//!
//! A list is advice, like any trace: a line without a matching file is counted and skipped.

use super::explain::What;
use super::volume::VolumeSource;
use super::{Disk, DiskRange};
use blobs::trace;
use formats::ext4::{self, Image, NodeId, NodeKind, ReadError, Tree};
use formats::trace::{Touch, Trace, TraceError};

/// Longest list, equal to upstream's limit: 64 KiB.
const MAX_LIST: usize = 64 << 10;
/// Most links followed on the way to one file, as in Linux.
const MAX_LINKS: u32 = 40;
/// Greatest depth of directories: no usable path of a filesystem is deeper.
const MAX_DEPTH: u32 = 2048;
/// Most pieces of one file; a whole trace has no more.
const MAX_PIECES: usize = 1 << 20;

/// Reasons to ignore a trace file.
#[derive(Debug, thiserror::Error)]
pub(super) enum ListError {
    /// A recorded trace that breaks a rule.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// Neither a trace nor a list.
    #[error("It is neither a recorded trace nor a list of absolute paths")]
    NoList,
    /// Longer than upstream's limit.
    #[error("The list has {0} bytes; at most {MAX_LIST} are allowed")]
    TooLong(usize),
    /// The positions of the files cannot be read.
    #[error("The filesystem in which the files are listed cannot be read")]
    Filesystem(#[from] ReadError),
}

/// The paths listed in `bytes`.
fn lines(bytes: &[u8]) -> Result<Vec<&str>, ListError> {
    if bytes.len() > MAX_LIST {
        return Err(ListError::TooLong(bytes.len()));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| ListError::NoList)?;
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if lines.iter().any(|line| !line.starts_with('/')) {
        return Err(ListError::NoList);
    }
    Ok(lines)
}

/// The trace of reading the files listed in `bytes`, in their order.
fn trace_of(disk: &Disk, bytes: &[u8]) -> Result<Trace, ListError> {
    let lines = lines(bytes)?;
    let (tree, image) = ext4::read(&VolumeSource(disk), disk.mapped())?;
    let files = Files { tree: &tree, image: &image };
    let mut trace = Trace::default();
    let mut missing = 0;
    for line in lines {
        let below = line.ends_with(['/', '*']);
        let path = line.trim_end_matches('*');
        match files.find(tree.root(), path, &mut { MAX_LINKS }) {
            Some(node) => files.touch(disk, node, if below { MAX_DEPTH } else { 0 }, &mut trace),
            None => missing += 1,
        }
    }
    if missing > 0 {
        tracing::warn!("{missing} of the files that are listed for prefetch are not in the image");
    }
    Ok(trace)
}

struct Files<'a> {
    tree: &'a Tree,
    image: &'a Image,
}

impl Files<'_> {
    /// The file or directory at `path`, from `start`, or from the root for an absolute path; links are
    /// followed.
    fn find(&self, start: NodeId, path: &str, links: &mut u32) -> Option<NodeId> {
        let mut node = if path.starts_with('/') { self.tree.root() } else { start };
        for name in path.split('/').filter(|name| !name.is_empty() && *name != ".") {
            let found = match name {
                ".." => self.tree.parent(node),
                name => self.tree.lookup(node, name.as_bytes())?,
            };
            node = match self.tree.kind(found) {
                NodeKind::Symlink(target) => {
                    *links = links.checked_sub(1)?;
                    self.find(node, std::str::from_utf8(target).ok()?, links)?
                }
                _ => found,
            };
        }
        Some(node)
    }

    /// Adds the blocks of a file, or of the files below a directory down to `depth`.
    fn touch(&self, disk: &Disk, node: NodeId, depth: u32, trace: &mut Trace) {
        match self.tree.kind(node) {
            NodeKind::Directory if depth > 0 => {
                for (_, child) in self.tree.children(node) {
                    self.touch(disk, child, depth - 1, trace);
                }
            }
            NodeKind::Regular { .. } => {
                for range in self.image.blocks_of(node) {
                    add(disk, range.into(), trace);
                }
            }
            _ => {}
        }
    }
}

/// Adds a range of the disk.
fn add(disk: &Disk, range: DiskRange, trace: &mut Trace) {
    for part in disk.explain(range, MAX_PIECES) {
        let (What::Data, Some(chunk)) = (part.what, part.chunk) else { continue };
        let Some(blob) = trace.blob(trace::digest_of(&chunk.blob)) else { continue };
        trace.touches.push(Touch { blob, start: chunk.at, len: part.range.len, at: 0, weight: 1 });
    }
}

impl Disk {
    /// The trace in a file of upstream's: recorded reads, or a list of files.
    pub(super) fn trace_in(&self, bytes: &[u8]) -> Result<Trace, ListError> {
        if trace::upstream::is_trace(bytes) {
            return Ok(self.trace_of(&trace::upstream::parse(bytes)?));
        }
        trace_of(self, bytes)
    }
}
