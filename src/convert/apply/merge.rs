//! Merges the upper into the tree, with the result that overlayfs shows.

use crate::apply::upper::{FileId, NameMeaning, UpperDir, UpperFile, UpperSource, UpperTree};
use crate::apply::{ApplyError, quoted};
use formats::ext4::{NodeId, NodeKind, Tree, TreeError};

/// A name that waits for its file. Files are made in the order of the tar, so that neighbours in the layer
/// can be neighbours on the disk.
struct PendingName {
    order: u64,
    dir: NodeId,
    name: Vec<u8>,
    file: FileId,
}

/// Merges `upper` into `tree`; returns the new nodes that are not directories, in the order of the tar.
pub(super) fn merge(upper: UpperTree, tree: &mut Tree) -> Result<Vec<NodeId>, ApplyError> {
    let (dirs, files) = upper.into_parts();
    let pins = Pins::new(&files, tree)?;
    let mut places = merge_directories(dirs, tree, &pins)?;
    places.sort_unstable_by_key(|place| place.order);
    let created = place_files(places, files, tree)?;
    pins.remove(tree)?;
    Ok(created)
}

/// Makes and removes all nodes except files; returns the places of the files.
fn merge_directories(
    mut dirs: Vec<UpperDir>,
    tree: &mut Tree,
    pins: &Pins,
) -> Result<Vec<PendingName>, ApplyError> {
    let mut places = Vec::new();
    let root = tree.root();
    let mut todo = vec![(0, root)];
    while let Some((upper, node)) = todo.pop() {
        let children = std::mem::take(&mut dirs[upper].children);
        if dirs[upper].opaque {
            let names: Vec<_> = tree.children(node).map(|(name, _)| name.to_vec()).collect();
            for name in names.iter().filter(|name| node != root || !pins.0.contains(name)) {
                remove(tree, node, name)?;
            }
        }
        for (name, (order, slot)) in children {
            let lower = tree.lookup(node, &name);
            let is_merged = |lower: NodeId| {
                matches!((slot, tree.kind(lower)), (NameMeaning::Dir(_), NodeKind::Directory))
            };
            let kept = lower.filter(|&lower| is_merged(lower));
            if lower.is_some() && kept.is_none() {
                remove(tree, node, &name)?;
            }
            match slot {
                NameMeaning::Whiteout => {}
                NameMeaning::File(file) => {
                    places.push(PendingName { order, dir: node, name, file })
                }
                NameMeaning::Dir(dir) => todo
                    .push((dir.index(), directory(tree, node, &name, kept, &dirs[dir.index()])?)),
            }
        }
    }
    Ok(places)
}

fn directory(
    tree: &mut Tree,
    parent: NodeId,
    name: &[u8],
    kept: Option<NodeId>,
    upper: &UpperDir,
) -> Result<NodeId, ApplyError> {
    match kept {
        Some(node) => {
            if *tree.attributes(node) != upper.attributes {
                tree.set_attributes(node, upper.attributes.clone());
            }
            Ok(node)
        }
        None => tree
            .create(parent, name, NodeKind::Directory, upper.attributes.clone())
            .map_err(error(name)),
    }
}

fn place_files(
    places: Vec<PendingName>,
    files: Vec<UpperFile>,
    tree: &mut Tree,
) -> Result<Vec<NodeId>, ApplyError> {
    let mut created = Vec::new();
    // The node of each file in the tree, or the file that must still be made.
    let mut files: Vec<Result<NodeId, Option<UpperFile>>> =
        files.into_iter().map(|file| Err(Some(file))).collect();
    for PendingName { dir, name, file, .. } in places {
        let state = &mut files[file.index()];
        let node = match state {
            Ok(node) => Some(*node),
            Err(file) => match file.take() {
                Some(UpperFile { source: UpperSource::New(kind), attributes }) => {
                    let node = tree.create(dir, &name, kind, attributes).map_err(error(&name))?;
                    created.push(node);
                    *state = Ok(node);
                    None
                }
                Some(UpperFile { source: UpperSource::Lower(node), attributes }) => {
                    tree.set_attributes(node, attributes);
                    *state = Ok(node);
                    Some(node)
                }
                None => None,
            },
        };
        if let Some(node) = node {
            tree.link(dir, &name, node).map_err(error(&name))?;
        }
    }
    Ok(created)
}

/// Temporary names in the root for lower files to which this layer has links. They keep the files if their
/// lower names are removed first.
struct Pins(Vec<Vec<u8>>);

impl Pins {
    fn new(files: &[UpperFile], tree: &mut Tree) -> Result<Self, ApplyError> {
        let mut pins = Vec::new();
        let root = tree.root();
        for file in files {
            let UpperSource::Lower(node) = file.source else { continue };
            // A layer cannot contain a name with the prefix of a whiteout; a disk from another program might.
            let free = (pins.len()..).map(|number| format!(".wh..wh.pin{number}").into_bytes());
            let Some(name) = free.into_iter().find(|name| tree.lookup(root, name).is_none()) else {
                continue;
            };
            tree.link(root, &name, node).map_err(error(&name))?;
            pins.push(name);
        }
        Ok(Self(pins))
    }

    fn remove(self, tree: &mut Tree) -> Result<(), ApplyError> {
        let root = tree.root();
        self.0.iter().try_for_each(|name| remove(tree, root, name))
    }
}

fn remove(tree: &mut Tree, dir: NodeId, name: &[u8]) -> Result<(), ApplyError> {
    tree.remove(dir, name).map_err(error(name))
}

fn error(name: &[u8]) -> impl FnOnce(TreeError) -> ApplyError {
    let name = quoted(name);
    move |source| ApplyError::Tree { name, source }
}
