//! Paths of a tar, normalised, and resolved within a root.

use thiserror::Error;

use crate::apply::quoted;
use formats::ext4::{NodeId, NodeKind, Tree};

/// Largest number of bytes in one name, on every Linux filesystem.
const NAME_LIMIT: usize = 255;

/// Largest number of bytes in a path (Linux: `PATH_MAX`, less the NUL). containerd uses the whole path of a
/// file and so cannot unpack a deeper one.
const PATH_LIMIT: usize = 4095;

/// Largest number of links followed for one path; containerd's limit.
const LINK_LIMIT: u32 = 255;

/// An invalid path.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PathError {
    /// A name that is too long.
    #[error("the name {name} has {len} bytes; {NAME_LIMIT} are allowed")]
    NameLength {
        /// The name, shortened.
        name: String,
        /// Its length.
        len: usize,
    },
    /// A path that is too long.
    #[error("its path has {0} bytes; {PATH_LIMIT} are allowed")]
    PathLength(usize),
    /// A circle of symbolic links.
    #[error("its path leads through more than {LINK_LIMIT} symbolic links")]
    TooManyLinks,
}

/// A path from the root, as names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Path(Vec<Vec<u8>>);

impl Path {
    /// The names of `text` in order, including `..`, without empty ones and `.`.
    pub(super) fn raw(text: &[u8]) -> Self {
        let names = text.split(|&byte| byte == b'/').filter(|name| !matches!(*name, b"" | b"."));
        Self(names.map(<[u8]>::to_vec).collect())
    }

    /// The names of `text` with `..` resolved as text, never above the root.
    pub(super) fn cleaned(text: &[u8]) -> Self {
        let mut names = Vec::new();
        for name in Self::raw(text).0 {
            if name == b".." {
                names.pop();
            } else {
                names.push(name);
            }
        }
        Self(names)
    }

    /// The directory and the last name; `None` for the root.
    pub(super) fn split_last(mut self) -> Option<(Self, Vec<u8>)> {
        let last = self.0.pop()?;
        Some((self, last))
    }

    pub(super) fn components(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(Vec::as_slice)
    }

    pub(super) fn prefix(&self, len: usize) -> Self {
        Self(self.0[..len.min(self.0.len())].to_vec())
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        self.0.join(&b'/')
    }
}

/// Refuses a path that is too long for Linux.
pub(super) fn check_length(parents: &Path, base: &[u8]) -> Result<(), PathError> {
    for name in parents.components().chain([base]) {
        if name.len() > NAME_LIMIT {
            return Err(PathError::NameLength { name: quoted(&name[..40]), len: name.len() });
        }
    }
    match parents.components().map(|name| name.len() + 1).sum::<usize>() + base.len() {
        len if len > PATH_LIMIT => Err(PathError::PathLength(len)),
        _ => Ok(()),
    }
}

/// A tree of names in which a path can be followed.
pub(super) trait Names {
    type Dir: Copy;
    fn root(&self) -> Self::Dir;
    fn step(&self, dir: Self::Dir, name: &[u8]) -> PathStep<'_, Self::Dir>;
}

pub(super) enum PathStep<'a, D> {
    Dir(D),
    Link(&'a [u8]),
    /// Missing, or a file; in both cases no name is below.
    Leaf,
}

/// `path` with every symbolic link replaced by its target, the last one included; never above the root. A
/// missing part counts as a plain name.
///
/// containerd's `RootPath` resolves the text in rounds and may read a `..` behind two nested links
/// differently. This function resolves the path in the way of Linux in a changed root.
pub(super) fn resolve<N: Names>(names: &N, path: Path) -> Result<Path, PathError> {
    let mut todo = path.0;
    todo.reverse();
    let mut done: Vec<(Vec<u8>, Option<N::Dir>)> = Vec::new();
    let mut links = 0;
    while let Some(name) = todo.pop() {
        if name == b".." {
            done.pop();
            continue;
        }
        let dir = done.last().map_or_else(|| Some(names.root()), |(_, dir)| *dir);
        match dir.map(|dir| names.step(dir, &name)) {
            Some(PathStep::Dir(dir)) => done.push((name, Some(dir))),
            Some(PathStep::Leaf) | None => done.push((name, None)),
            Some(PathStep::Link(text)) => {
                links += 1;
                if links > LINK_LIMIT {
                    return Err(PathError::TooManyLinks);
                }
                if text.starts_with(b"/") {
                    done.clear();
                }
                todo.extend(Path::raw(text).0.into_iter().rev());
            }
        }
    }
    Ok(Path(done.into_iter().map(|(name, _)| name).collect()))
}

/// The lower layers: the tree before this layer.
pub(super) struct LowerTree<'a>(pub(super) &'a Tree);

impl LowerTree<'_> {
    /// The node at a path without links.
    pub(super) fn node_at(&self, path: &Path) -> Option<NodeId> {
        path.components().try_fold(self.0.root(), |dir, name| match self.0.kind(dir) {
            NodeKind::Directory => self.0.lookup(dir, name),
            _ => None,
        })
    }
}

impl Names for LowerTree<'_> {
    type Dir = NodeId;

    fn root(&self) -> NodeId {
        self.0.root()
    }

    fn step(&self, dir: NodeId, name: &[u8]) -> PathStep<'_, NodeId> {
        let Some(node) = self.0.lookup(dir, name) else { return PathStep::Leaf };
        match self.0.kind(node) {
            NodeKind::Directory => PathStep::Dir(node),
            NodeKind::Symlink(text) => PathStep::Link(text),
            _ => PathStep::Leaf,
        }
    }
}
