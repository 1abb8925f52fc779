//! Minimal stand-in for the tree of files: only so that `convert::apply` compiles here.
#![allow(missing_docs)]

use std::collections::BTreeMap;

use thiserror::Error;

pub use crate::tar::Timestamp;
use crate::units::Bytes;

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct NodeId(pub u32);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attributes {
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Timestamp,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataRun {
    pub file_offset: Bytes,
    pub tar_offset: Bytes,
    pub len: Bytes,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Directory,
    Regular { size: Bytes, runs: Vec<DataRun> },
    Symlink(Vec<u8>),
    Char { major: u32, minor: u32 },
    Block { major: u32, minor: u32 },
    Fifo,
}

#[derive(Debug, PartialEq, Eq, Error)]
pub enum TreeError {
    #[error("Name {0:?} is taken")]
    Taken(Vec<u8>),
    #[error("Name {0:?} does not exist")]
    Missing(Vec<u8>),
}

struct Node {
    kind: Kind,
    attributes: Attributes,
    children: BTreeMap<Vec<u8>, NodeId>,
    links: u32,
    parent: NodeId,
}

pub struct Tree {
    nodes: Vec<Option<Node>>,
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

impl Tree {
    pub fn new() -> Tree {
        let attributes =
            Attributes { mode: 0o755, uid: 0, gid: 0, mtime: Timestamp::default(), xattrs: BTreeMap::new() };
        let root = Node { kind: Kind::Directory, attributes, children: BTreeMap::new(), links: 1, parent: NodeId(0) };
        Tree { nodes: vec![Some(root)] }
    }
    fn node(&self, node: NodeId) -> &Node {
        self.nodes[node.0 as usize].as_ref().unwrap()
    }
    fn node_mut(&mut self, node: NodeId) -> &mut Node {
        self.nodes[node.0 as usize].as_mut().unwrap()
    }
    pub fn root(&self) -> NodeId {
        NodeId(0)
    }
    pub fn lookup(&self, dir: NodeId, name: &[u8]) -> Option<NodeId> {
        self.node(dir).children.get(name).copied()
    }
    pub fn parent(&self, dir: NodeId) -> NodeId {
        self.node(dir).parent
    }
    pub fn children(&self, dir: NodeId) -> impl Iterator<Item = (&[u8], NodeId)> {
        self.node(dir).children.iter().map(|(name, node)| (name.as_slice(), *node))
    }
    pub fn create(&mut self, dir: NodeId, name: &[u8], kind: Kind, attributes: Attributes) -> Result<NodeId, TreeError> {
        if self.lookup(dir, name).is_some() {
            return Err(TreeError::Taken(name.to_vec()));
        }
        let node = NodeId(self.nodes.len() as u32);
        self.nodes.push(Some(Node { kind, attributes, children: BTreeMap::new(), links: 1, parent: dir }));
        self.node_mut(dir).children.insert(name.to_vec(), node);
        Ok(node)
    }
    pub fn link(&mut self, dir: NodeId, name: &[u8], target: NodeId) -> Result<(), TreeError> {
        if self.lookup(dir, name).is_some() {
            return Err(TreeError::Taken(name.to_vec()));
        }
        self.node_mut(target).links += 1;
        self.node_mut(dir).children.insert(name.to_vec(), target);
        Ok(())
    }
    pub fn remove(&mut self, dir: NodeId, name: &[u8]) -> Result<(), TreeError> {
        let node = self.lookup(dir, name).ok_or_else(|| TreeError::Missing(name.to_vec()))?;
        let names: Vec<_> = self.node(node).children.keys().cloned().collect();
        for name in names {
            self.remove(node, &name)?;
        }
        self.node_mut(dir).children.remove(name);
        self.node_mut(node).links -= 1;
        if self.node(node).links == 0 {
            self.nodes[node.0 as usize] = None;
        }
        Ok(())
    }
    pub fn kind(&self, node: NodeId) -> &Kind {
        &self.node(node).kind
    }
    pub fn attributes(&self, node: NodeId) -> &Attributes {
        &self.node(node).attributes
    }
    pub fn set_attributes(&mut self, node: NodeId, attributes: Attributes) {
        self.node_mut(node).attributes = attributes;
    }
    pub fn links(&self, node: NodeId) -> u32 {
        self.node(node).links
    }
}
