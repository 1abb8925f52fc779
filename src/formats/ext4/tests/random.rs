//! Random layers on random layers: clean after each, and at the end equal to the tree.

use proptest::prelude::*;

use super::disk::TestDisk;
use super::fixture::{MIB, TarOffsets, attributes, with_xattrs};
use crate::ext4::{NodeId, NodeKind, Tree};

#[derive(Clone, Debug)]
pub(super) enum RandomStep {
    Directory,
    File(u64),
    Sparse(Vec<(u16, u16)>),
    Symlink(usize),
    Many(u16),
    Link,
    Remove,
    Attributes(u16, usize),
    Layer,
}

pub(super) fn step() -> impl Strategy<Value = RandomStep> {
    prop_oneof![
        3 => Just(RandomStep::Directory),
        4 => (0u64..100_000).prop_map(RandomStep::File),
        1 => prop::collection::vec((0u16..5000, 1u16..5000), 1..20).prop_map(RandomStep::Sparse),
        2 => (1usize..200).prop_map(RandomStep::Symlink),
        2 => (1u16..600).prop_map(RandomStep::Many),
        2 => Just(RandomStep::Link),
        4 => Just(RandomStep::Remove),
        2 => (0u16..0o10000, 0usize..3000).prop_map(|(mode, len)| RandomStep::Attributes(mode, len)),
        2 => Just(RandomStep::Layer),
    ]
}

/// Every node by a walk, with the directory and name by which it was found.
pub(super) fn walk(tree: &Tree) -> Vec<(NodeId, Vec<u8>, NodeId)> {
    let mut found = Vec::new();
    let mut open = vec![tree.root()];
    while let Some(dir) = open.pop() {
        for (name, child) in tree.children(dir) {
            found.push((dir, name.to_vec(), child));
            if *tree.kind(child) == NodeKind::Directory {
                open.push(child);
            }
        }
    }
    found
}

pub(super) fn apply(
    tree: &mut Tree,
    tar: &mut TarOffsets,
    serial: usize,
    step: &RandomStep,
    choice: usize,
) {
    let all = walk(tree);
    let mut dirs = vec![tree.root()];
    dirs.extend(
        all.iter().map(|found| found.2).filter(|&node| *tree.kind(node) == NodeKind::Directory),
    );
    let dir = dirs[choice % dirs.len()];
    let name = format!("{serial}").into_bytes();
    let kind = match step {
        RandomStep::Directory => NodeKind::Directory,
        RandomStep::File(size) => tar.file(*size),
        RandomStep::Sparse(pieces) => {
            let mut at = 0;
            let mut placed = Vec::new();
            for &(gap, len) in pieces {
                placed.push((at + u64::from(gap), u64::from(len)));
                at += u64::from(gap) + u64::from(len);
            }
            tar.sparse(at, &placed)
        }
        RandomStep::Symlink(len) => NodeKind::Symlink(vec![b's'; *len]),
        RandomStep::Many(count) => {
            for number in 0..*count {
                let name = format!("{serial}-a-rather-long-name-{number}");
                tree.create(dir, name.as_bytes(), NodeKind::Fifo, attributes(0o600)).unwrap();
            }
            return;
        }
        RandomStep::Link => {
            if let Some((_, _, node)) = all.get(choice / 7 % all.len().max(1))
                && *tree.kind(*node) != NodeKind::Directory
            {
                tree.link(dir, &name, *node).unwrap();
            }
            return;
        }
        RandomStep::Remove => {
            if let Some((dir, name, _)) = all.get(choice % all.len().max(1)) {
                tree.remove(*dir, name).unwrap();
            }
            return;
        }
        RandomStep::Attributes(mode, len) => {
            if let Some((_, _, node)) = all.get(choice % all.len().max(1)) {
                let mut changed = attributes(*mode);
                if matches!(tree.kind(*node), NodeKind::Regular { .. } | NodeKind::Directory) {
                    changed =
                        with_xattrs(&[("user.value", &vec![1; *len]), ("trusted.short", b"t")]);
                }
                tree.set_attributes(*node, changed);
            }
            return;
        }
        RandomStep::Layer => return,
    };
    tree.create(dir, &name, kind, attributes(0o644)).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn random_layers_are_clean(steps in prop::collection::vec((step(), any::<u32>()), 1..80)) {
        let mut tree = Tree::new();
        let mut tar = TarOffsets::default();
        let mut disk = TestDisk::new(128 * MIB);
        for (serial, (step, choice)) in steps.iter().enumerate() {
            apply(&mut tree, &mut tar, serial, step, *choice as usize);
            if matches!(step, RandomStep::Layer) {
                disk.commit_clean(&tree);
            }
        }
        disk.commit_clean(&tree);
        disk.compare(&tree);
    }
}
