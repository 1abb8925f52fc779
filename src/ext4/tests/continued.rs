//! Reading back what is on a disk, and going on from there.

use proptest::prelude::*;

use super::disk::Disk;
use super::random::{Step, apply, step};
use super::{MIB, TarOffsets};
use crate::ext4::{Kind, NodeId, Tree};

/// That two trees are the same but for where data lies.
pub(super) fn assert_same(ours: &Tree, theirs: &Tree) {
    let mut open = vec![(ours.root(), theirs.root())];
    let mut pairs: std::collections::BTreeMap<NodeId, NodeId> = std::collections::BTreeMap::new();
    while let Some((one, other)) = open.pop() {
        let path = ours.path(one);
        assert_eq!(ours.attributes(one), theirs.attributes(other), "{path}");
        assert_eq!(ours.links(one), theirs.links(other), "{path}");
        assert_eq!(*pairs.entry(one).or_insert(other), other, "{path}");
        match (ours.kind(one), theirs.kind(other)) {
            (Kind::Regular { size, .. }, Kind::Regular { size: their_size, .. }) => {
                assert_eq!(size, their_size, "{path}");
            }
            (kind, their_kind) => assert_eq!(kind, their_kind, "{path}"),
        }
        let names: Vec<_> = ours.children(one).collect();
        let their_names: Vec<_> = theirs.children(other).collect();
        assert_eq!(names.len(), their_names.len(), "{path}");
        for ((name, child), (their_name, their_child)) in names.into_iter().zip(their_names) {
            assert_eq!(name, their_name, "{path}");
            open.push((child, their_child));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn a_layer_on_a_disk_read_back_is_the_layer_of_one_go(steps in prop::collection::vec((step(), any::<u32>()), 1..80)) {
        let mut tree = Tree::new();
        let mut tar = TarOffsets::default();
        let mut disk = Disk::new(128 * MIB);
        let mut again = Disk::new(128 * MIB);
        disk.commit(&tree);
        again.commit(&tree);
        let mut other = again.reopen();
        let last = (Step::Layer, 0);
        for (serial, (step, choice)) in steps.iter().chain([&last]).enumerate() {
            let mut same = TarOffsets(tar.0);
            apply(&mut tree, &mut tar, serial, step, *choice as usize);
            apply(&mut other, &mut same, serial, step, *choice as usize);
            if matches!(step, Step::Layer) {
                let layer = disk.commit(&tree);
                let layer_again = again.commit(&other);
                prop_assert!(layer.runs().eq(layer_again.runs()));
                other = again.reopen();
                assert_same(&tree, &other);
            }
        }
        again.fsck();
        again.compare(&tree);
    }
}
