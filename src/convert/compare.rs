//! A meta image and the layers that it names: does it show what they contain?
//!
//! A meta image claims to be made from its layers. The claim is proved by making it again: the layers are streamed once
//! more, each blob is hashed as a whole, and the result is compared with what was found.
//!
//! 1. The same converter gives the same bytes ([`chain`](crate::chain)). If all layer archives have the digests that
//!    were made, nothing more need be compared.
//! 2. Else another converter made it, or another version: other blocks, another order, another size of the disk. Then the
//!    two *filesystems* are compared: both trees are read back ([`formats::ext4::read`]) and walked together. Names, kinds,
//!    modes, owners, extended attributes, links, sizes and device numbers must be equal, and so must the content:
//!    a piece that both disks map to the same byte of the same layer is equal without reading it; any other piece is read
//!    from both.
//!
//! Times are compared to the second and in their low 32 bits, and a time of 0 is accepted; the target of a symbolic link may be the cleaned form
//! of the one in the layer: upstream's converter writes them so. What a kernel sees and a reader of the tree does not (blocks behind the end of a directory, blocks marked as
//! never written) counts as a difference; no converter writes them.
//!
//! Native layers contain their data and name no original, so there is nothing to compare them with.

use std::collections::HashMap;
use std::fmt;

use thiserror::Error;

use crate::image::{MadeLayer, convert_layers};
use crate::{ConvertError, ConvertOptions, Progress};
use disk::image::{ImageError, open_layers};
use disk::volume::{Volume as _, VolumeError, VolumeSource};
use disk::{Disk, DiskRange};
use formats::ext4::{self, Attributes, Geometry, Image, NodeId, NodeKind, ReadError, Tree};
use formats::lsmt::RunPlace;
use formats::oci::annotations::{AnnotationError, LayerKind, split_acceleration};
use formats::oci::{Descriptor, Manifest};
use formats::units::{Bytes, SECTOR, Sectors};
use registry::store::{ImageStore, LayoutStore, StoreError};
use source::Reserved;

/// Most differences that are listed: the first ones say enough.
pub const MOST: usize = 20;

/// Bytes that are read of both disks at a time where their maps differ.
const PIECE: u64 = 1 << 20;

/// Reasons why a comparison has no result.
#[derive(Debug, Error)]
pub enum CompareError {
    /// The annotations of a layer contradict each other.
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    /// A layer has no original.
    #[error("Layer {0} holds its data itself and names no original layer")]
    Native(usize),
    /// The filesystem is another one than ext4, such as upstream's erofs.
    #[error("Only the files of an ext4 can be compared")]
    NoExt4,
    /// The layers cannot be read, or are no layers.
    #[error("The layers cannot be converted for a comparison")]
    Layers(#[source] Box<ConvertError>),
    /// The original blobs cannot be reached, or the made layers not be kept.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A temporary folder cannot be made.
    #[error("Cannot keep the layers of a comparison in the folder for temporary files")]
    Folder(#[source] std::io::Error),
    /// The layers that were made cannot be opened.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A filesystem cannot be read.
    #[error("The filesystem of {which} cannot be compared")]
    Filesystem {
        /// Which of the two.
        which: &'static str,
        /// The fault.
        #[source]
        source: ReadError,
    },
    /// A piece of a file cannot be read.
    #[error(transparent)]
    Volume(#[from] VolumeError),
}

/// A difference between a meta image and its layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Path in the image, lossily printable.
    pub path: String,
    /// What is different, as the end of a sentence that begins with the path.
    pub what: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.path, self.what)
    }
}

/// Compares the image of `manifest`, opened as `disk`, with the layers that it names in `targets`: at most [`MOST`]
/// differences, none if it shows what they contain.
///
/// # Errors
/// [`CompareError`].
pub fn with_layers(
    disk: &Disk,
    manifest: &Manifest,
    targets: &dyn ImageStore,
    progress: &dyn Progress,
) -> Result<Vec<Difference>, CompareError> {
    let (_, layers) = split_acceleration(&manifest.layers);
    let originals = originals(layers, targets)?;
    if !has_ext4(disk)? {
        return Err(CompareError::NoExt4);
    }
    // On a disk of the size that was found, so that the archives can be equal. Others are compared by their files, and the
    // disk of these must only be large enough.
    let size = disk.size().clamp(Geometry::MIN.0, Geometry::MAX.0);
    let disk_size = Bytes(size.next_multiple_of(4096));
    let options = ConvertOptions { disk_size, ..ConvertOptions::default() };
    let made = convert_layers(targets, &originals, &options, progress)
        .map_err(|error| CompareError::Layers(Box::new(error)))?;
    if made.iter().map(|layer| layer.descriptor.digest).eq(layers.iter().map(|layer| layer.digest))
    {
        return Ok(Vec::new());
    }
    let folder = tempfile::tempdir().map_err(CompareError::Folder)?;
    let store = LayoutStore::open_or_create(folder.path())?;
    let mut descriptors = Vec::with_capacity(made.len());
    for MadeLayer { descriptor, archive } in made {
        store.put_blob(&archive)?;
        descriptors.push(descriptor);
    }
    let stack = descriptors.iter().map(|layer| (&store as &dyn ImageStore, layer));
    let expected = open_layers(stack, targets, disk.cache().clone())?.disk;
    disks(disk, &expected)
}

/// True if the superblock is that of an ext4.
fn has_ext4(disk: &Disk) -> Result<bool, VolumeError> {
    let place = DiskRange::new(1024 + 56, 2);
    if place.end() > disk.size() {
        return Ok(false);
    }
    let mut magic = [0; 2];
    disk.read_at(&mut magic, place.offset)?;
    Ok(u16::from_le_bytes(magic) == 0xef53)
}

/// The layers that these are made of.
fn originals(
    layers: &[Descriptor],
    targets: &dyn ImageStore,
) -> Result<Vec<Descriptor>, CompareError> {
    let mut originals = Vec::with_capacity(layers.len());
    for (number, layer) in layers.iter().enumerate() {
        let LayerKind::Turbo { target, target_media_type, .. } = LayerKind::of(layer)? else {
            return Err(CompareError::Native(number));
        };
        let size = targets.blob_source(&target, None)?.len();
        originals.push(Descriptor::new(&target_media_type, target, size));
    }
    Ok(originals)
}

/// Compares the filesystems on two disks whose layers are made of the same originals.
///
/// # Errors
/// [`CompareError`].
pub fn disks(found: &Disk, expected: &Disk) -> Result<Vec<Difference>, CompareError> {
    let found = ComparedTree::read(found, "the meta image")?;
    let expected = ComparedTree::read(expected, "the layers")?;
    let mut walk = TreePair {
        found: &found,
        expected: &expected,
        partners: [HashMap::new(), HashMap::new()],
        differences: Vec::new(),
    };
    walk.whole()?;
    Ok(walk.differences)
}

/// One of the two filesystems.
struct ComparedTree<'d> {
    disk: &'d Disk,
    tree: Tree,
    image: Image,
    /// What both take.
    _memory: Reserved,
}

impl<'d> ComparedTree<'d> {
    fn read(disk: &'d Disk, which: &'static str) -> Result<Self, CompareError> {
        let memory = disk.cache().residents().budget().part();
        let (tree, image, memory) = ext4::read_within(&VolumeSource(disk), disk.mapped(), memory)
            .map_err(|source| CompareError::Filesystem { which, source })?;
        Ok(Self { disk, tree, image, _memory: memory })
    }

    /// The places of the first `size` bytes of a file, without a gap.
    fn pieces(&self, node: NodeId, size: u64) -> Vec<FilePiece> {
        let mut pieces = Vec::new();
        let mut at = 0;
        for part in self.image.parts_of(node) {
            let end = (part.file + part.len).min(size);
            if part.file >= end {
                continue;
            }
            if part.file > at {
                pieces.push(FilePiece {
                    start: at,
                    end: part.file,
                    origin: PieceOrigin::Zero,
                    disk: None,
                });
            }
            let (first, count) = (part.disk / SECTOR, (end - part.file).div_ceil(SECTOR));
            for run in self.disk.stack().look_up(Sectors(first), Sectors(count)) {
                let start = part.file + (run.lba.bytes().0 - part.disk);
                let stop = (start + run.len.bytes().0).min(end);
                let layer = run.layer;
                let origin = match run.place {
                    RunPlace::Zero => PieceOrigin::Zero,
                    RunPlace::Own(_) => PieceOrigin::Own,
                    RunPlace::Remote(at) => PieceOrigin::Remote { layer, at: at.bytes().0 },
                };
                pieces.push(FilePiece { start, end: stop, origin, disk: Some(run.lba.bytes().0) });
            }
            at = end;
        }
        if at < size {
            pieces.push(FilePiece { start: at, end: size, origin: PieceOrigin::Zero, disk: None });
        }
        pieces
    }

    /// Reads `len` bytes of a file that begin `skip` bytes behind the start of a piece.
    fn bytes(&self, piece: &FilePiece, skip: u64, len: usize) -> Result<Vec<u8>, CompareError> {
        let mut bytes = vec![0; len];
        if let Some(disk) = piece.disk {
            self.disk.read_at(&mut bytes, disk + skip)?;
        }
        Ok(bytes)
    }
}

/// Where bytes `start..end` of a file are.
struct FilePiece {
    start: u64,
    end: u64,
    origin: PieceOrigin,
    /// First byte on the disk; `None` for a hole of the file.
    disk: Option<u64>,
}

/// Source of a piece.
#[derive(Clone, Copy, PartialEq, Eq)]
enum PieceOrigin {
    /// No bytes.
    Zero,
    /// In the layer itself.
    Own,
    /// From this byte of an original layer on.
    Remote { layer: u8, at: u64 },
}

impl PieceOrigin {
    /// The same source, so many bytes further.
    fn further(self, by: u64) -> Self {
        match self {
            Self::Remote { layer, at } => Self::Remote { layer, at: at + by },
            other => other,
        }
    }

    /// True if bytes of both need not be read to be equal.
    fn is_same(self, other: Self) -> bool {
        self == other && self != Self::Own
    }
}

/// A walk through both trees at once.
struct TreePair<'s, 'd> {
    found: &'s ComparedTree<'d>,
    expected: &'s ComparedTree<'d>,
    /// For each file that was met, the one on the other side: names of one file must be names of one file there.
    partners: [HashMap<NodeId, NodeId>; 2],
    differences: Vec<Difference>,
}

impl TreePair<'_, '_> {
    fn whole(&mut self) -> Result<(), CompareError> {
        let mut open = vec![(String::from("/"), self.found.tree.root(), self.expected.tree.root())];
        while let Some((path, found, expected)) = open.pop() {
            if self.differences.len() >= MOST {
                break;
            }
            let is_new = self.file(&path, found, expected)?;
            let both = [self.found.tree.kind(found), self.expected.tree.kind(expected)];
            if is_new && both.iter().all(|kind| **kind == NodeKind::Directory) {
                self.names(&path, found, expected, &mut open);
            }
        }
        Ok(())
    }

    fn note(&mut self, path: &str, what: impl Into<String>) {
        if self.differences.len() < MOST {
            self.differences.push(Difference { path: path.to_owned(), what: what.into() });
        }
    }

    /// Compares the names of a directory; those that both have are opened.
    fn names(
        &mut self,
        path: &str,
        found: NodeId,
        expected: NodeId,
        open: &mut Vec<(String, NodeId, NodeId)>,
    ) {
        let below = |name: &[u8]| {
            format!("{}/{}", path.trim_end_matches('/'), String::from_utf8_lossy(name))
        };
        let (found_side, expected_side) = (self.found, self.expected);
        for (name, node) in found_side.tree.children(found) {
            match expected_side.tree.lookup(expected, name) {
                Some(other) => open.push((below(name), node, other)),
                None => self.note(&below(name), "is not in the layers"),
            }
        }
        for (name, _) in expected_side.tree.children(expected) {
            if found_side.tree.lookup(found, name).is_none() {
                self.note(&below(name), "is missing");
            }
        }
    }

    /// Compares one file; false if it was compared under another name.
    fn file(&mut self, path: &str, found: NodeId, expected: NodeId) -> Result<bool, CompareError> {
        let [here, there] = &mut self.partners;
        let before = (here.insert(found, expected), there.insert(expected, found));
        match before {
            (None, None) => {}
            (Some(e), Some(f)) if (e, f) == (expected, found) => return Ok(false),
            _ => {
                self.note(path, "is a hard link to another file than in the layers");
                return Ok(false);
            }
        }
        let (f, e) = (self.found, self.expected);
        if let Some(doubt) = f.image.doubt(found) {
            self.note(path, doubt);
        }
        for what in attributes(f.tree.attributes(found), e.tree.attributes(expected)) {
            self.note(path, what);
        }
        match (f.tree.kind(found), e.tree.kind(expected)) {
            (NodeKind::Regular { size: ours, .. }, NodeKind::Regular { size, .. }) => {
                if ours != size {
                    self.note(path, format!("is {ours} long, and {size} in the layers"));
                } else if let Some(at) = self.content(found, expected, size.get())? {
                    self.note(path, format!("has other content from byte {at} on"));
                }
            }
            (found, expected) if found == expected => {}
            (NodeKind::Symlink(found), NodeKind::Symlink(expected))
                if *found == cleaned(expected) => {}
            (NodeKind::Symlink(found), NodeKind::Symlink(expected)) => {
                let text = |target: &[u8]| String::from_utf8_lossy(target).into_owned();
                let what = format!(
                    "leads to {:?}, and to {:?} in the layers",
                    text(found),
                    text(expected)
                );
                self.note(path, what);
            }
            (found, expected) => {
                let what = format!("is {}, and {} in the layers", named(found), named(expected));
                self.note(path, what);
            }
        }
        Ok(true)
    }

    /// First byte at which the content of two files of this size differs.
    fn content(
        &self,
        found: NodeId,
        expected: NodeId,
        size: u64,
    ) -> Result<Option<u64>, CompareError> {
        let found = self.found.pieces(found, size);
        let expected = self.expected.pieces(expected, size);
        let (mut left, mut right) = (found.iter().peekable(), expected.iter().peekable());
        let mut at = 0;
        while let (Some(f), Some(e)) = (left.peek(), right.peek()) {
            let end = f.end.min(e.end);
            let same = f.origin.further(at - f.start).is_same(e.origin.further(at - e.start));
            while at < end && !same {
                let len = (end - at).min(PIECE);
                let ours = self.found.bytes(f, at - f.start, len as usize)?;
                let theirs = self.expected.bytes(e, at - e.start, len as usize)?;
                if let Some(differs) = ours.iter().zip(&theirs).position(|(a, b)| a != b) {
                    return Ok(Some(at + differs as u64));
                }
                at += len;
            }
            at = end;
            if f.end == end {
                left.next();
            }
            if e.end == end {
                right.next();
            }
        }
        Ok(None)
    }
}

/// Differences of attributes.
fn attributes(found: &Attributes, expected: &Attributes) -> Vec<String> {
    let mut differences = Vec::new();
    let (mode, wanted) = (found.mode & 0o7777, expected.mode & 0o7777);
    if mode != wanted {
        differences.push(format!("has the mode {mode:04o}, and {wanted:04o} in the layers"));
    }
    let (owner, wanted) = ((found.uid, found.gid), (expected.uid, expected.gid));
    if owner != wanted {
        let text = |(uid, gid): (u32, u32)| format!("{uid}:{gid}");
        differences.push(format!(
            "belongs to {}, and to {} in the layers",
            text(owner),
            text(wanted)
        ));
    }
    let mut names = found.xattrs.keys().chain(expected.xattrs.keys());
    if let Some(name) = names.find(|&name| found.xattrs.get(name) != expected.xattrs.get(name)) {
        let name = String::from_utf8_lossy(name);
        differences.push(format!("has another extended attribute {name}"));
    }
    let (time, wanted) = (found.mtime.secs, expected.mtime.secs);
    if time as u32 != wanted as u32 && time != 0 {
        differences.push(format!("was changed at {time} s, and at {wanted} s in the layers"));
    }
    differences
}

/// The target of a symbolic link as upstream stores it: without `.`, `..` and repeated slashes as far as the text alone
/// tells (spec turbooci 3.3).
fn cleaned(target: &[u8]) -> Vec<u8> {
    let rooted = target.starts_with(b"/");
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in target.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." if parts.last().is_some_and(|last| *last != b"..") => drop(parts.pop()),
            b".." if rooted => {}
            part => parts.push(part),
        }
    }
    let text = [if rooted { &b"/"[..] } else { b"" }, &parts.join(&b'/')].concat();
    if text.is_empty() { b".".to_vec() } else { text }
}

/// Name of a kind in a sentence.
fn named(kind: &NodeKind) -> String {
    match kind {
        NodeKind::Directory => "a directory".into(),
        NodeKind::Regular { .. } => "a regular file".into(),
        NodeKind::Symlink(_) => "a symbolic link".into(),
        NodeKind::Char { major, minor } => format!("the character device {major}:{minor}"),
        NodeKind::Block { major, minor } => format!("the block device {major}:{minor}"),
        NodeKind::Fifo => "a FIFO".into(),
        NodeKind::Socket => "a socket".into(),
    }
}
