//! The tree of files, kept across the layers of an image.
//!
//! Layers are applied to it one after the other (whiteouts remove, entries create), and after each one
//! [`Image::commit_layer`](super::Image::commit_layer) lays out the changes. Nodes are in one vector and
//! refer to each other by number, so a path of a million components needs no stack. A number is never used
//! twice: the image finds the record of a node by it.
//!
//! Every change stamps the node with a counter. The image keeps the counter of its last commit and finds new
//! changes by comparison; the tree does not depend on images.

use std::collections::BTreeMap;

use super::file::{Attributes, NodeKind};

/// Longest name of a directory entry in bytes (its field has one byte).
pub const NAME_MAX: usize = 255;

/// Most names of one file, as in the kernel (`EXT4_LINK_MAX`).
pub const LINKS_MAX: u32 = 65_000;

/// Longest target of a symbolic link in bytes: one block with its closing NUL.
pub const SYMLINK_MAX: usize = 4095;

/// Number of a file of the tree; all names of the file share it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct NodeId(pub u32);

impl NodeId {
    pub(super) fn index(self) -> usize {
        self.0 as usize
    }
}

/// Reasons for refusing a change of the tree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// A name that no directory can contain.
    #[error(
        "The name \"{name}\" cannot be a directory entry: a name has 1 to 255 bytes without \"/\" and NUL, not \".\" and not \"..\""
    )]
    BadName {
        /// The name, printable.
        name: String,
    },
    /// The name is taken.
    #[error("The name \"{name}\" exists already")]
    Exists {
        /// The name, printable.
        name: String,
    },
    /// The name does not exist.
    #[error("The name \"{name}\" does not exist")]
    NotFound {
        /// The name, printable.
        name: String,
    },
    /// A file that is not a directory was used as one.
    #[error("The parent of \"{name}\" is not a directory")]
    NotADirectory {
        /// The name, printable.
        name: String,
    },
    /// Only files other than directories may have several names.
    #[error("The hard link \"{name}\" points to a directory or to a removed file")]
    BadLinkTarget {
        /// The name, printable.
        name: String,
    },
    /// One file has too many names.
    #[error("The hard link \"{name}\" would be number {} of its file; ext4 allows {LINKS_MAX}", LINKS_MAX + 1)]
    TooManyLinks {
        /// The name, printable.
        name: String,
    },
    /// The target of a symbolic link does not fit.
    #[error(
        "The target of the symbolic link \"{name}\" is {len} bytes long or holds a NUL; ext4 takes 1 to {SYMLINK_MAX} bytes without NUL"
    )]
    BadSymlink {
        /// The name, printable.
        name: String,
        /// Length of the target in bytes.
        len: usize,
    },
    /// A device number does not fit.
    #[error(
        "The device {major}:{minor} of \"{name}\" does not fit into 12 bits for the major and 20 for the minor number"
    )]
    BadDevice {
        /// The name, printable.
        name: String,
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// 2^32 nodes have been created.
    #[error("The tree cannot take \"{name}\": all 2^32 node numbers are used")]
    Full {
        /// The name, printable.
        name: String,
    },
}

fn printable(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

/// One file. A removed one stays as an empty slot with no links.
#[derive(Debug)]
struct TreeNode {
    kind: NodeKind,
    attributes: Attributes,
    /// Children of a directory.
    children: BTreeMap<Box<[u8]>, NodeId>,
    /// Target of a directory's `..`. The root is its own parent.
    parent: NodeId,
    /// Number of names of a file; 1 for a directory; 0 if removed.
    names: u32,
    /// Number of directories among the children.
    subdirectories: u32,
    /// The tree's counter at the last change of the node.
    changed: u64,
}

/// A tree of files. Node numbers of another tree must not be passed in: they panic or name another file.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<TreeNode>,
    clock: u64,
}

impl Default for Tree {
    fn default() -> Self {
        Tree::new()
    }
}

const ROOT: NodeId = NodeId(0);

impl Tree {
    /// Makes a tree with only its root: mode 0755, owned by root, time 0.
    #[must_use]
    pub fn new() -> Tree {
        let attributes = Attributes { mode: 0o755, ..Attributes::default() };
        let root = TreeNode {
            kind: NodeKind::Directory,
            attributes,
            children: BTreeMap::new(),
            parent: ROOT,
            names: 1,
            subdirectories: 0,
            changed: 1,
        };
        Tree { nodes: vec![root], clock: 1 }
    }

    /// The root directory.
    #[must_use]
    pub fn root(&self) -> NodeId {
        ROOT
    }

    /// The child with this name, if there is one and `dir` is a directory.
    #[must_use]
    pub fn lookup(&self, dir: NodeId, name: &[u8]) -> Option<NodeId> {
        self.node(dir).children.get(name).copied()
    }

    /// The directory that contains `dir`; for the root, the root. Only for directories: a file can have
    /// several, and the result is the one it was created in.
    #[must_use]
    pub fn parent(&self, dir: NodeId) -> NodeId {
        self.node(dir).parent
    }

    /// The entries of a directory, sorted by the bytes of their names, without `.` and `..`.
    pub fn children(&self, dir: NodeId) -> impl Iterator<Item = (&[u8], NodeId)> {
        self.node(dir).children.iter().map(|(name, &node)| (&**name, node))
    }

    /// Adds a file.
    ///
    /// # Errors
    /// [`TreeError`] if the name is taken or invalid, `dir` is not a directory, or the target or the device
    /// number of `kind` does not fit.
    pub fn create(
        &mut self,
        dir: NodeId,
        name: &[u8],
        kind: NodeKind,
        attributes: Attributes,
    ) -> Result<NodeId, TreeError> {
        self.check_free(dir, name)?;
        check_kind(name, &kind)?;
        let number = u32::try_from(self.nodes.len())
            .map_err(|_| TreeError::Full { name: printable(name) })?;
        let node = NodeId(number);
        let is_directory = kind == NodeKind::Directory;
        let children = BTreeMap::new();
        self.nodes.push(TreeNode {
            kind,
            attributes,
            children,
            parent: dir,
            names: 1,
            subdirectories: 0,
            changed: 0,
        });
        self.touch(node);
        self.insert(dir, name, node);
        if is_directory {
            self.node_mut(dir).subdirectories += 1;
        }
        Ok(node)
    }

    /// Gives an existing file another name.
    ///
    /// # Errors
    /// [`TreeError`] if the name is taken or invalid, `dir` is not a directory, `target` is one, or it has
    /// [`LINKS_MAX`] names already.
    pub fn link(&mut self, dir: NodeId, name: &[u8], target: NodeId) -> Result<(), TreeError> {
        self.check_free(dir, name)?;
        let file = self.node_mut(target);
        if file.kind == NodeKind::Directory || file.names == 0 {
            return Err(TreeError::BadLinkTarget { name: printable(name) });
        }
        if file.names >= LINKS_MAX {
            return Err(TreeError::TooManyLinks { name: printable(name) });
        }
        file.names += 1;
        self.touch(target);
        self.insert(dir, name, target);
        Ok(())
    }

    /// Removes a name, and everything below it if it is a directory. A file is removed with its last name.
    ///
    /// # Errors
    /// [`TreeError::NotFound`] if there is no such name.
    pub fn remove(&mut self, dir: NodeId, name: &[u8]) -> Result<(), TreeError> {
        let Some(target) = self.node_mut(dir).children.remove(name) else {
            return Err(TreeError::NotFound { name: printable(name) });
        };
        self.touch(dir);
        if self.node(target).kind == NodeKind::Directory {
            self.node_mut(dir).subdirectories -= 1;
        }
        let mut doomed = vec![target];
        while let Some(node) = doomed.pop() {
            let file = self.node_mut(node);
            file.names = file.names.saturating_sub(1);
            if file.names == 0 {
                doomed.extend(std::mem::take(&mut file.children).into_values());
                file.kind = NodeKind::Fifo;
                file.attributes = Attributes::default();
                file.subdirectories = 0;
            }
            self.touch(node);
        }
        Ok(())
    }

    /// Adds a file of a lower layer, at first without a name. `None` if all numbers are used.
    pub(super) fn restore(&mut self, kind: NodeKind, attributes: Attributes) -> Option<NodeId> {
        let node = NodeId(u32::try_from(self.nodes.len()).ok()?);
        // A directory has its single name from the beginning, as in `create`.
        let names = u32::from(kind == NodeKind::Directory);
        let (children, parent) = (BTreeMap::new(), ROOT);
        self.nodes.push(TreeNode {
            kind,
            attributes,
            children,
            parent,
            names,
            subdirectories: 0,
            changed: 0,
        });
        Some(node)
    }

    /// Gives a restored file a name; a directory must get exactly one. This does not count as a change.
    pub(super) fn restore_name(
        &mut self,
        dir: NodeId,
        name: Box<[u8]>,
        node: NodeId,
    ) -> Result<(), TreeError> {
        self.check_free(dir, &name)?;
        let file = self.node_mut(node);
        file.parent = dir;
        if file.kind == NodeKind::Directory {
            self.node_mut(dir).subdirectories += 1;
        } else {
            file.names = file.names.saturating_add(1);
        }
        self.node_mut(dir).children.insert(name, node);
        Ok(())
    }

    /// Kind of a node.
    #[must_use]
    pub fn kind(&self, node: NodeId) -> &NodeKind {
        &self.node(node).kind
    }

    /// Mode, owner, time and extended attributes.
    #[must_use]
    pub fn attributes(&self, node: NodeId) -> &Attributes {
        &self.node(node).attributes
    }

    /// Replaces all attributes, for every name of the file.
    pub fn set_attributes(&mut self, node: NodeId, attributes: Attributes) {
        if self.node(node).attributes != attributes {
            self.node_mut(node).attributes = attributes;
            self.touch(node);
        }
    }

    /// Number of names; for a directory, 2 plus the number of directories in it; 0 if removed.
    #[must_use]
    pub fn links(&self, node: NodeId) -> u32 {
        let node = self.node(node);
        match node.kind {
            NodeKind::Directory => node.subdirectories.saturating_add(2),
            _ => node.names,
        }
    }

    /// Path of a node for messages: the first one found by a walk, lossily printable.
    #[must_use]
    pub fn path(&self, node: NodeId) -> String {
        let mut upwards = vec![node];
        if self.node(node).kind != NodeKind::Directory {
            let parent = self.any_parent(node);
            upwards.push(parent);
        }
        while let Some(&last) = upwards.last()
            && last != ROOT
        {
            upwards.push(self.node(last).parent);
        }
        let mut path = String::new();
        for pair in upwards.windows(2).rev() {
            let name = self.children(pair[1]).find(|&(_, child)| child == pair[0]);
            path.push('/');
            path.push_str(&printable(name.map_or(b"?", |(name, _)| name)));
        }
        if path.is_empty() { "/".into() } else { path }
    }

    /// Counter of changes; every change raises it.
    pub(super) fn clock(&self) -> u64 {
        self.clock
    }

    /// Value of the counter at the last change of `node`.
    pub(super) fn changed(&self, node: NodeId) -> u64 {
        self.node(node).changed
    }

    /// True if the node still has a name.
    pub(super) fn is_live(&self, node: NodeId) -> bool {
        self.node(node).names > 0
    }

    /// Every node with a name, in the order of creation.
    pub(super) fn nodes(&self) -> impl Iterator<Item = NodeId> {
        (0..).zip(&self.nodes).filter(|(_, node)| node.names > 0).map(|(number, _)| NodeId(number))
    }

    fn any_parent(&self, file: NodeId) -> NodeId {
        let created_in = self.node(file).parent;
        if self.children(created_in).any(|(_, child)| child == file) {
            return created_in;
        }
        self.nodes().find(|&dir| self.children(dir).any(|(_, child)| child == file)).unwrap_or(ROOT)
    }

    fn check_free(&self, dir: NodeId, name: &[u8]) -> Result<(), TreeError> {
        let reserved = matches!(name, b"" | b"." | b"..");
        if reserved || name.len() > NAME_MAX || name.iter().any(|&byte| byte == 0 || byte == b'/') {
            return Err(TreeError::BadName { name: printable(name) });
        }
        let parent = self.node(dir);
        if parent.kind != NodeKind::Directory || parent.names == 0 {
            return Err(TreeError::NotADirectory { name: printable(name) });
        }
        if parent.children.contains_key(name) {
            return Err(TreeError::Exists { name: printable(name) });
        }
        Ok(())
    }

    fn insert(&mut self, dir: NodeId, name: &[u8], node: NodeId) {
        self.node_mut(dir).children.insert(name.into(), node);
        self.touch(dir);
    }

    fn touch(&mut self, node: NodeId) {
        self.clock += 1;
        self.nodes[node.index()].changed = self.clock;
    }

    /// Node numbers come only from this tree, so the index is in range.
    fn node(&self, node: NodeId) -> &TreeNode {
        &self.nodes[node.index()]
    }

    fn node_mut(&mut self, node: NodeId) -> &mut TreeNode {
        &mut self.nodes[node.index()]
    }
}

fn check_kind(name: &[u8], kind: &NodeKind) -> Result<(), TreeError> {
    match *kind {
        NodeKind::Symlink(ref target)
            if !(1..=SYMLINK_MAX).contains(&target.len()) || target.contains(&0) =>
        {
            Err(TreeError::BadSymlink { name: printable(name), len: target.len() })
        }
        NodeKind::Char { major, minor } | NodeKind::Block { major, minor }
            if major >= 1 << 12 || minor >= 1 << 20 =>
        {
            Err(TreeError::BadDevice { name: printable(name), major, minor })
        }
        _ => Ok(()),
    }
}
