//! The files of one layer, alone: overlayfs's upper directory, in memory.

use std::collections::{BTreeMap, HashMap};

use crate::apply::path::{Names, Path, PathStep};
use formats::ext4::{Attributes, NodeId, NodeKind, Tree};

/// A directory of this layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DirId(usize);

/// An inode of this layer that is not a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileId(usize);

/// Meaning of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NameMeaning {
    Dir(DirId),
    File(FileId),
    /// The name is removed, whatever the lower layers contain.
    Whiteout,
}

pub(super) struct UpperDir {
    pub(super) attributes: Attributes,
    /// True if the content of the lower layers is hidden in this directory.
    pub(super) opaque: bool,
    /// Meaning of each name, and its time stamp in the order of the tar.
    pub(super) children: BTreeMap<Vec<u8>, (u64, NameMeaning)>,
}

pub(super) struct UpperFile {
    pub(super) source: UpperSource,
    pub(super) attributes: Attributes,
}

pub(super) enum UpperSource {
    New(NodeKind),
    /// An inode of a lower layer that a hard link of this layer shares.
    Lower(NodeId),
}

pub(super) struct UpperTree {
    dirs: Vec<UpperDir>,
    files: Vec<UpperFile>,
    adopted: HashMap<NodeId, FileId>,
    /// Counter of names, which records their order.
    clock: u64,
}

impl UpperTree {
    pub(super) fn new(root: Attributes) -> Self {
        let root = UpperDir { attributes: root, opaque: false, children: BTreeMap::new() };
        Self { dirs: vec![root], files: Vec::new(), adopted: HashMap::new(), clock: 0 }
    }

    pub(super) fn root(&self) -> DirId {
        DirId(0)
    }

    pub(super) fn dir(&self, dir: DirId) -> &UpperDir {
        &self.dirs[dir.0]
    }

    pub(super) fn dir_mut(&mut self, dir: DirId) -> &mut UpperDir {
        &mut self.dirs[dir.0]
    }

    pub(super) fn file(&self, file: FileId) -> &UpperFile {
        &self.files[file.0]
    }

    pub(super) fn file_mut(&mut self, file: FileId) -> &mut UpperFile {
        &mut self.files[file.0]
    }

    pub(super) fn kind<'a>(&'a self, file: FileId, lower: &'a Tree) -> &'a NodeKind {
        match &self.file(file).source {
            UpperSource::New(kind) => kind,
            UpperSource::Lower(node) => lower.kind(*node),
        }
    }

    /// Kind of a new file of this layer, to be changed.
    pub(super) fn new_kind_mut(&mut self, file: FileId) -> Option<&mut NodeKind> {
        match &mut self.file_mut(file).source {
            UpperSource::New(kind) => Some(kind),
            UpperSource::Lower(_) => None,
        }
    }

    pub(super) fn slot(&self, dir: DirId, name: &[u8]) -> Option<NameMeaning> {
        self.dir(dir).children.get(name).map(|(_, slot)| *slot)
    }

    pub(super) fn insert(&mut self, dir: DirId, name: Vec<u8>, slot: NameMeaning) {
        self.clock += 1;
        let clock = self.clock;
        self.dir_mut(dir).children.insert(name, (clock, slot));
    }

    /// Removes a name; a directory is removed with its content.
    pub(super) fn remove(&mut self, dir: DirId, name: &[u8]) {
        self.dir_mut(dir).children.remove(name);
    }

    pub(super) fn create_dir(
        &mut self,
        dir: DirId,
        name: Vec<u8>,
        attributes: Attributes,
        opaque: bool,
    ) -> DirId {
        let new = DirId(self.dirs.len());
        self.dirs.push(UpperDir { attributes, opaque, children: BTreeMap::new() });
        self.insert(dir, name, NameMeaning::Dir(new));
        new
    }

    pub(super) fn create_file(&mut self, kind: NodeKind, attributes: Attributes) -> FileId {
        self.files.push(UpperFile { source: UpperSource::New(kind), attributes });
        FileId(self.files.len() - 1)
    }

    /// The file of this layer that stands for the lower inode `node`.
    pub(super) fn adopt(&mut self, node: NodeId, attributes: &Attributes) -> FileId {
        let files = &mut self.files;
        *self.adopted.entry(node).or_insert_with(|| {
            files.push(UpperFile {
                source: UpperSource::Lower(node),
                attributes: attributes.clone(),
            });
            FileId(files.len() - 1)
        })
    }

    /// Splits the layer into directories and files, by their ids.
    pub(super) fn into_parts(self) -> (Vec<UpperDir>, Vec<UpperFile>) {
        (self.dirs, self.files)
    }

    /// The lower node at `parents/base`, a path without lower links, unless this layer hides it.
    pub(super) fn visible_lower(&self, tree: &Tree, parents: &Path, base: &[u8]) -> Option<NodeId> {
        let (mut upper, mut lower) = (Some(self.root()), tree.root());
        for name in parents.components().chain([base]) {
            if upper.is_some_and(|dir| self.dir(dir).opaque)
                || !matches!(tree.kind(lower), NodeKind::Directory)
            {
                return None;
            }
            upper = match upper.and_then(|dir| self.slot(dir, name)) {
                Some(NameMeaning::Dir(dir)) => Some(dir),
                Some(NameMeaning::File(_) | NameMeaning::Whiteout) => return None,
                None => None,
            };
            lower = tree.lookup(lower, name)?;
        }
        Some(lower)
    }

    /// This layer as a tree in which paths can be followed. `tree` has the text of links that were adopted.
    pub(super) fn with_lower<'a>(&'a self, tree: &'a Tree) -> UpperNames<'a> {
        UpperNames { upper: self, tree }
    }
}

impl DirId {
    pub(super) fn index(self) -> usize {
        self.0
    }
}

impl FileId {
    pub(super) fn index(self) -> usize {
        self.0
    }
}

pub(super) struct UpperNames<'a> {
    upper: &'a UpperTree,
    tree: &'a Tree,
}

impl Names for UpperNames<'_> {
    type Dir = DirId;

    fn root(&self) -> DirId {
        self.upper.root()
    }

    fn step(&self, dir: DirId, name: &[u8]) -> PathStep<'_, DirId> {
        match self.upper.slot(dir, name) {
            Some(NameMeaning::Dir(dir)) => PathStep::Dir(dir),
            Some(NameMeaning::File(file)) => match self.upper.kind(file, self.tree) {
                NodeKind::Symlink(text) => PathStep::Link(text),
                _ => PathStep::Leaf,
            },
            Some(NameMeaning::Whiteout) | None => PathStep::Leaf,
        }
    }
}
