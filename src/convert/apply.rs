//! The entries of one layer, applied to the tree of the layers below.
//!
//! The resulting tree is **the tree that a container sees** after containerd has unpacked the image for
//! overlayfs. There a layer never changes the ones below: it is unpacked into a folder of its own (the
//! *upper*), and the kernel shows the stack of them as one. The steps below follow from that, and the code
//! does the same: entries go into an [`upper`] in memory, alone; [`LayerApply::finish`] then [merges](merge)
//! it into the tree. Until then the tree is unchanged, so an error does not damage it.
//!
//! * A path is normalised as text. Symbolic links *inside* a path are followed, within the root, if this
//!   layer made them. A link of a lower layer is not seen, and a real directory replaces it.
//! * A directory inside a path that this layer lacks is made. It gets the attributes of the lower layers
//!   (found through their links), or else 0755 root:root and the time of the entry that needed it.
//! * A directory over a directory keeps the content and takes the new attributes. Any other combination
//!   replaces the old file. Over a *lower* directory all attributes are new, `xattrs` included.
//! * `.wh.NAME` hides NAME of the lower layers, `.wh..wh..opq` all lower content of its directory, at any
//!   position in the tar. A character device 0:0 is overlayfs's form of a whiteout, so it counts as one.
//! * A hard link shares the inode, and its header is applied to that inode.
//! * An entry that resolves to the root is ignored.
//!
//! # More permissive than containerd
//!
//! containerd fails the whole pull on some layers with a clear meaning. They are accepted here: a hard link
//! to a file of a lower layer (the inode is shared, as in upstream's converter); a whiteout of a name that
//! this layer has made (it hides the lower one only, as the image specification says), or of a name that is
//! hidden already; a file below a directory that this layer whited out before (the directory is new); a file
//! below a path on which a lower layer has a file.
//!
//! # Differences from overlayfs
//!
//! An opaque marker in the root hides all lower content, as the image specification says and containerd's
//! other snapshotters do; overlayfs ignores the mark on a root. Times of directories are those of the
//! headers; unpacking leaves the time of the pull on directories without a header.

mod attributes;
mod merge;
mod path;
mod unaligned;
mod upper;

use std::fmt;

use thiserror::Error;

use formats::ext4::{DataRun, FILE_MAX, NodeId, NodeKind, Tree, TreeError};
use formats::tar::{EntryContent, EntryKind, TarEntry};
use formats::units::{Bytes, SECTOR};

use attributes::{AttributeError, apply_header};
use path::{Path, PathError};
pub use unaligned::UNALIGNED_LIMIT;
use unaligned::Unaligned;
use upper::{DirId, FileId, NameMeaning, UpperTree};

/// Prefix of a whiteout; the rest of the name is hidden in the lower layers.
const WHITEOUT: &[u8] = b".wh.";

/// Name of an opaque marker: it hides all lower content of its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Largest number of bytes in a symbolic link, by Linux: a path without its NUL.
const SYMLINK_LIMIT: usize = 4095;

/// Largest major number of a device in Linux: 12 bits.
const MAJOR_LIMIT: u32 = 0xfff;
const MINOR_LIMIT: u32 = 0xf_ffff;

/// Error of applying a layer.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum ApplyError {
    /// An entry that contradicts others, or that no Linux filesystem can store.
    #[error("Entry {name} at byte {offset} of the tar cannot be applied: {reason}")]
    Entry {
        /// Name of the entry, quoted.
        name: String,
        /// Offset of its first header block.
        offset: u64,
        /// The fault.
        reason: Reason,
    },
    /// The tree refused a change of the layer.
    #[error("The layer cannot be merged at {name}")]
    Tree {
        /// The name in its directory, quoted.
        name: String,
        /// The tree's reason.
        #[source]
        source: TreeError,
    },
}

/// Fault of an entry.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum Reason {
    /// An invalid name or link.
    #[error(transparent)]
    Path(#[from] PathError),
    /// An invalid owner, mode or extended attribute.
    #[error(transparent)]
    Attribute(#[from] AttributeError),
    /// A path that passes through a file of this layer.
    #[error("{0} is not a directory in this layer")]
    NotDirectory(String),
    /// `.wh.` followed by nothing, `.` or `..`.
    #[error("its whiteout has no valid name")]
    EmptyWhiteout,
    /// A hard link without a target.
    #[error("the target {0} of the hard link does not exist")]
    NoTarget(String),
    /// A hard link to a directory.
    #[error("the target {0} of the hard link is a directory")]
    DirectoryTarget(String),
    /// An empty symbolic link, or one that is too long.
    #[error("a symbolic link has 1 to {SYMLINK_LIMIT} bytes, not {0}")]
    SymlinkLength(usize),
    /// A device number that Linux cannot store.
    #[error("there is no device {major}:{minor}: the numbers have 12 and 20 bits")]
    Device {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A sparse file that claims more bytes than a file can have.
    #[error("the file has {0}, and a file of ext4 has {FILE_MAX} at most")]
    TooLong(Bytes),
    /// A sparse file with too many bytes outside whole sectors.
    #[error(
        "with it {kept} bytes of sparse files in this layer lie outside whole sectors of {SECTOR} B; \
         {UNALIGNED_LIMIT} are allowed"
    )]
    Unaligned {
        /// Bytes of the layer that would have to be kept, including those of this file.
        kept: u64,
    },
}

/// Summary of an applied layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ApplyReport {
    /// Number of applied entries, whiteouts included.
    pub entries: u64,
    /// Number of whiteouts and opaque markers.
    pub whiteouts: u64,
    /// Number of entries that resolve to the root; they are ignored.
    pub root_entries: u64,
    /// Number of extended attributes that Linux would not store: `trusted.*`, unknown prefixes, `user.*` on a
    /// node that is neither file nor directory. containerd drops them too.
    pub dropped_xattrs: u64,
    /// The new nodes of the tree that are not directories, in the order of the tar.
    pub created: Vec<NodeId>,
}

/// One layer that is being applied to a tree.
pub struct LayerApply<'t> {
    tree: &'t mut Tree,
    upper: UpperTree,
    unaligned: Unaligned,
    report: ApplyReport,
}

impl fmt::Debug for LayerApply<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerApply").field("report", &self.report).finish_non_exhaustive()
    }
}

impl<'t> LayerApply<'t> {
    /// Starts a layer on top of the present content of `tree`.
    pub fn new(tree: &'t mut Tree) -> Self {
        let root = tree.attributes(tree.root()).clone();
        Self {
            tree,
            upper: UpperTree::new(root),
            unaligned: Unaligned::default(),
            report: ApplyReport::default(),
        }
    }

    /// Takes the next entry of the layer. The tree does not change yet.
    ///
    /// # Errors
    /// [`ApplyError::Entry`]; the layer cannot be continued.
    #[allow(clippy::needless_pass_by_value)] // the entry is used up
    pub fn entry(&mut self, entry: TarEntry) -> Result<(), ApplyError> {
        self.unaligned.start(None, entry.data_offset);
        self.apply(&entry).map_err(|reason| ApplyError::Entry {
            name: quoted(&entry.name),
            offset: entry.header_offset.get(),
            reason,
        })
    }

    /// Takes the data of the last entry as stored in the tar: all of it, in pieces of any size. Only bytes
    /// outside whole sectors are kept; nearly all files have none, and cost no memory.
    pub fn data(&mut self, bytes: &[u8]) {
        self.unaligned.data(bytes, &mut self.upper);
    }

    /// Merges the layer into the tree.
    ///
    /// # Errors
    /// [`ApplyError::Tree`] if the tree has no room; its content is then undefined but valid.
    pub fn finish(self) -> Result<ApplyReport, ApplyError> {
        let mut report = self.report;
        report.created = merge::merge(self.upper, self.tree)?;
        Ok(report)
    }

    fn apply(&mut self, entry: &TarEntry) -> Result<(), Reason> {
        let Some((parents, base)) = Path::cleaned(&entry.name).split_last() else {
            self.report.root_entries += 1;
            return Ok(());
        };
        self.report.entries += 1;
        let parents = path::resolve(&self.upper.with_lower(self.tree), parents)?;
        path::check_length(&parents, &base)?;
        let dir = self.make_parents(&parents, entry)?;
        if base == OPAQUE {
            self.report.whiteouts += 1;
            self.upper.dir_mut(dir).opaque = true;
            return Ok(());
        }
        if let Some(hidden) = base.strip_prefix(WHITEOUT) {
            self.report.whiteouts += 1;
            return self.whiteout(dir, hidden);
        }
        if entry.kind == EntryKind::Directory {
            return self.directory(dir, base, entry);
        }
        // The old file of this name in the layer is removed before a link looks for its target.
        self.upper.remove(dir, &base);
        let slot = match &entry.kind {
            EntryKind::Char { major: 0, minor: 0 } => NameMeaning::Whiteout,
            EntryKind::HardLink(target) => self.hard_link(target, entry)?,
            _ => NameMeaning::File(self.file(entry)?),
        };
        self.upper.insert(dir, base, slot);
        Ok(())
    }

    /// The directory at `path` of this layer; makes it and its parents if needed.
    fn make_parents(&mut self, path: &Path, entry: &TarEntry) -> Result<DirId, Reason> {
        let mut dir = self.upper.root();
        for (depth, name) in path.components().enumerate() {
            let slot = self.upper.slot(dir, name);
            dir = match slot {
                Some(NameMeaning::Dir(next)) => next,
                Some(NameMeaning::File(_)) => {
                    return Err(Reason::NotDirectory(quoted(&path.prefix(depth + 1).to_bytes())));
                }
                Some(NameMeaning::Whiteout) | None => {
                    let parent = &self.upper.dir(dir).attributes;
                    let fresh = attributes::implicit_directory(parent, entry.mtime);
                    // A whited-out directory is gone: this one is new, and hides the lower one.
                    let hidden = slot.is_some();
                    let lower =
                        if hidden { None } else { self.lower_directory(&path.prefix(depth + 1)) };
                    let copied =
                        lower.map(|node| attributes::copied_up(self.tree.attributes(node)));
                    self.upper.create_dir(dir, name.to_vec(), copied.unwrap_or(fresh), hidden)
                }
            };
        }
        Ok(dir)
    }

    /// The lower directory with the attributes that containerd copies to a missing parent. The path is looked
    /// up through the links of the lower layers, even if this layer hides it.
    fn lower_directory(&self, path: &Path) -> Option<NodeId> {
        let lower = path::LowerTree(self.tree);
        let resolved = path::resolve(&lower, path.clone()).ok()?;
        let node = lower.node_at(&resolved)?;
        matches!(self.tree.kind(node), NodeKind::Directory).then_some(node)
    }

    fn whiteout(&mut self, dir: DirId, hidden: &[u8]) -> Result<(), Reason> {
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(Reason::EmptyWhiteout);
        }
        match self.upper.slot(dir, hidden) {
            None => self.upper.insert(dir, hidden.to_vec(), NameMeaning::Whiteout),
            // A whiteout affects only the lower layers. A file of this layer hides them already.
            Some(NameMeaning::Dir(own)) => self.upper.dir_mut(own).opaque = true,
            Some(NameMeaning::File(_) | NameMeaning::Whiteout) => {}
        }
        Ok(())
    }

    fn directory(&mut self, dir: DirId, name: Vec<u8>, entry: &TarEntry) -> Result<(), Reason> {
        let known = match self.upper.slot(dir, &name) {
            Some(NameMeaning::Dir(known)) => Some(known),
            // As in containerd, a directory *entry* behind a whiteout of its name makes a directory through
            // which the lower one is visible again.
            _ => None,
        };
        // A directory already in this layer keeps its extended attributes and gets more.
        let mut attributes = match known {
            Some(known) => self.upper.dir(known).attributes.clone(),
            None => attributes::fresh(),
        };
        self.report.dropped_xattrs += apply_header(&mut attributes, entry, &NodeKind::Directory)?;
        match known {
            Some(known) => self.upper.dir_mut(known).attributes = attributes,
            None => {
                self.upper.create_dir(dir, name, attributes, false);
            }
        }
        Ok(())
    }

    /// Makes a new file, symbolic link or device.
    fn file(&mut self, entry: &TarEntry) -> Result<FileId, Reason> {
        let kind = match &entry.kind {
            EntryKind::Symlink(text) if text.is_empty() || text.len() > SYMLINK_LIMIT => {
                return Err(Reason::SymlinkLength(text.len()));
            }
            EntryKind::Symlink(text) => NodeKind::Symlink(text.clone()),
            EntryKind::Char { major, minor } | EntryKind::Block { major, minor }
                if *major > MAJOR_LIMIT || *minor > MINOR_LIMIT =>
            {
                return Err(Reason::Device { major: *major, minor: *minor });
            }
            EntryKind::Char { major, minor } => NodeKind::Char { major: *major, minor: *minor },
            EntryKind::Block { major, minor } => NodeKind::Block { major: *major, minor: *minor },
            EntryKind::Fifo => NodeKind::Fifo,
            // The other two kinds were handled before.
            EntryKind::Regular | EntryKind::Directory | EntryKind::HardLink(_) => regular(entry),
        };
        if let NodeKind::Regular { size, .. } = &kind
            && *size > FILE_MAX
        {
            return Err(Reason::TooLong(*size));
        }
        let mut attributes = attributes::fresh();
        self.report.dropped_xattrs += apply_header(&mut attributes, entry, &kind)?;
        let kept = self.unaligned.admit(&kind).map_err(|kept| Reason::Unaligned { kept })?;
        let file = self.upper.create_file(kind, attributes);
        if kept > 0 {
            self.unaligned.start(Some(file), entry.data_offset);
        }
        Ok(file)
    }

    /// The file that `target` names: one of this layer, or else a visible one of the lower layers.
    fn hard_link(&mut self, target: &[u8], entry: &TarEntry) -> Result<NameMeaning, Reason> {
        let no_target = || Reason::NoTarget(quoted(target));
        let (parents, base) = Path::raw(target).split_last().ok_or_else(no_target)?;
        let parents = path::resolve(&self.upper.with_lower(self.tree), parents)?;
        let mut dir = Some(self.upper.root());
        for name in parents.components() {
            dir = dir.and_then(|dir| match self.upper.slot(dir, name) {
                Some(NameMeaning::Dir(next)) => Some(next),
                _ => None,
            });
        }
        let file = match dir.and_then(|dir| self.upper.slot(dir, &base)) {
            Some(NameMeaning::File(file)) => file,
            Some(NameMeaning::Dir(_)) => return Err(Reason::DirectoryTarget(quoted(target))),
            // containerd treats a whiteout as a device; a hard link to it is a whiteout too.
            Some(NameMeaning::Whiteout) => return Ok(NameMeaning::Whiteout),
            None => {
                let lower = path::resolve(&path::LowerTree(self.tree), parents)?;
                let node =
                    self.upper.visible_lower(self.tree, &lower, &base).ok_or_else(no_target)?;
                if matches!(self.tree.kind(node), NodeKind::Directory) {
                    return Err(Reason::DirectoryTarget(quoted(target)));
                }
                self.upper.adopt(node, self.tree.attributes(node))
            }
        };
        let mut attributes = self.upper.file(file).attributes.clone();
        self.report.dropped_xattrs +=
            apply_header(&mut attributes, entry, self.upper.kind(file, self.tree))?;
        self.upper.file_mut(file).attributes = attributes;
        Ok(NameMeaning::File(file))
    }
}

fn regular(entry: &TarEntry) -> NodeKind {
    let len = entry.stored_len;
    match &entry.content {
        EntryContent::Plain if len.get() == 0 => NodeKind::Regular { size: len, runs: Vec::new() },
        EntryContent::Plain => {
            let file_offset = formats::units::Bytes::ZERO;
            NodeKind::Regular {
                size: len,
                runs: vec![DataRun::remote(file_offset, entry.data_offset, len)],
            }
        }
        EntryContent::Sparse { size, pieces } => {
            let runs = pieces.iter().flat_map(|piece| {
                DataRun::remote(piece.file_offset, piece.tar_offset, piece.len).split(*size)
            });
            NodeKind::Regular { size: *size, runs: runs.collect() }
        }
    }
}

/// A name for a message: as text, quoted and shortened.
fn quoted(name: &[u8]) -> String {
    const SHOWN: usize = 200;
    let ellipsis = if name.len() > SHOWN { "…" } else { "" };
    format!("{:?}{ellipsis}", String::from_utf8_lossy(&name[..name.len().min(SHOWN)]))
}

#[cfg(test)]
mod differential;
#[cfg(test)]
mod tests;
