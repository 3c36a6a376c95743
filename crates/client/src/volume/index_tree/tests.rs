use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// What the writes of a tree leave behind.
#[derive(Default, Clone)]
struct Disk {
    root: Vec<u8>,
    counter: u32,
    leaves: HashMap<Oid, Vec<u8>>,
}

impl Disk {
    fn apply(&mut self, write: &NodeWrite) {
        match write {
            NodeWrite::Counter(n) => self.counter = *n,
            NodeWrite::Root(bytes) => self.root = bytes.clone(),
            NodeWrite::Leaf { oid, bytes } => {
                assert!(oid.index() < self.counter, "a leaf number is reserved before it is used");
                self.leaves.insert(*oid, bytes.clone());
            }
            NodeWrite::Value { oid, offset, vid } => {
                let leaf = self.leaves.get_mut(oid).unwrap();
                leaf[*offset as usize..][..4].copy_from_slice(&vid.to_le_bytes());
            }
        }
    }

    fn open(&self) -> IndexTree {
        let mut tree = IndexTree::new(VdiId::new(7), &self.root, self.counter);
        tree.capacity = Capacity { leaf: 4, inner: 64 };
        tree
    }

    fn get(&self, tree: &mut IndexTree, idx: u32) -> u32 {
        loop {
            match tree.get(idx) {
                Ok(vid) => return vid,
                Err(Missing(oid)) => tree.load(oid, &self.leaves[&oid]),
            }
        }
    }

    fn set(&self, tree: &mut IndexTree, idx: u32, vid: u32) -> Result<(), SetError> {
        loop {
            match tree.set(idx, vid) {
                Err(SetError::Missing(oid)) => tree.load(oid, &self.leaves[&oid]),
                other => return other,
            }
        }
    }
}

#[test]
fn the_root_leaf_is_written_as_the_specification_shows() {
    let mut tree = IndexTree::new(VdiId::new(0x5e9293), &[0x74, 0x62, 1, 0, 0, 0, 0, 0], 0);
    for idx in [3, 0, 1] {
        tree.set(idx, 0x5e9293).unwrap();
    }
    let want = [
        0x74, 0x62, 1, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0x93, 0x92, 0x5e, 0, 1, 0, 0, 0, 0x93, 0x92, 0x5e, 0, 3, 0,
        0, 0, 0x93, 0x92, 0x5e, 0,
    ];
    assert_eq!(tree.take_writes(), [NodeWrite::Root(want.to_vec())]);
    assert_eq!(tree.take_writes(), []);
}

#[test]
fn a_full_root_is_split_into_leaves_0_and_1_and_the_root_names_their_largest_indexes() {
    let mut tree = Disk::default().open();
    for idx in 0..5 {
        tree.set(idx * 10, 7).unwrap();
    }
    let BtreeNode::Inner(inner) = &tree.root else { panic!("depth 2 expected") };
    let named: Vec<_> = inner.iter().map(|e| (e.idx, e.oid.index())).collect();
    assert_eq!(named, [(10, 0), (40, 1)]);
    assert_eq!(tree.counter(), 2);
}

#[test]
fn splitting_an_inner_leaf_gives_the_new_leaf_the_lower_half_and_its_own_largest_index() {
    let mut tree = Disk::default().open();
    for idx in [0, 10, 20, 30, 40, 1, 2, 3] {
        tree.set(idx, 7).unwrap();
    }
    let BtreeNode::Inner(inner) = &tree.root else { panic!("depth 2 expected") };
    let named: Vec<_> = inner.iter().map(|e| (e.idx, e.oid.index())).collect();
    assert_eq!(named, [(1, 2), (10, 0), (40, 1)]);
}

#[test]
fn an_index_behind_a_full_last_leaf_opens_a_new_one() {
    let mut tree = Disk::default().open();
    for idx in 0..8 {
        tree.set(idx, 7).unwrap();
    }
    let BtreeNode::Inner(inner) = &tree.root else { panic!("depth 2 expected") };
    let named: Vec<_> = inner.iter().map(|e| (e.idx, tree.leaves[&e.oid].len())).collect();
    assert_eq!(named, [(1, 2), (5, 4), (7, 2)]);
}

#[test]
fn changing_a_value_in_a_leaf_writes_four_bytes() {
    let mut tree = Disk::default().open();
    for idx in 0..6 {
        tree.set(idx, 7).unwrap();
    }
    tree.take_writes();
    tree.set(3, 9).unwrap();
    let oid = Oid::btree(VdiId::new(7), 1);
    assert_eq!(tree.take_writes(), [NodeWrite::Value { oid, offset: 8 + 8 + 4, vid: 9 }]);
}

#[test]
fn a_full_root_refuses_more_leaves() {
    let mut tree = Disk::default().open();
    tree.capacity = Capacity { leaf: 1, inner: 2 };
    let mut results = Vec::new();
    for idx in 0..4 {
        results.push(tree.set(idx, 7));
    }
    assert!(results.contains(&Err(SetError::Full)), "{results:?}");
}

#[test]
fn garbage_is_an_empty_tree() {
    let tree = IndexTree::new(VdiId::new(7), &[0xff; 64], 0);
    assert_eq!(tree.get(0), Ok(0));
}

proptest! {
    #[test]
    fn a_tree_behaves_like_a_map_across_reloads_and_crashes(
        steps in proptest::collection::vec((0u32..120, 0u32..4, any::<u8>()), 1..120)
    ) {
        let mut disk = Disk::default();
        let mut tree = disk.open();
        let mut model = BTreeMap::new();
        for (idx, vid, what) in steps {
            prop_assert_eq!(disk.set(&mut tree, idx, vid), Ok(()));
            let before = model.clone();
            model.insert(idx, vid);
            let writes = tree.take_writes();
            // A crash between any two writes shows the state before or after, for every index.
            for cut in 0..writes.len() {
                let mut crashed = disk.clone();
                writes[..cut].iter().for_each(|w| crashed.apply(w));
                let mut reopened = crashed.open();
                for i in 0..120 {
                    let got = crashed.get(&mut reopened, i);
                    let old = before.get(&i).copied().unwrap_or(0);
                    let new = model.get(&i).copied().unwrap_or(0);
                    prop_assert!(got == old || got == new, "index {} is {}", i, got);
                }
            }
            writes.iter().for_each(|w| disk.apply(w));
            if what % 4 == 0 {
                tree = disk.open();
            }
        }
        let mut reopened = disk.open();
        for i in 0..120 {
            prop_assert_eq!(disk.get(&mut reopened, i), model.get(&i).copied().unwrap_or(0));
            prop_assert_eq!(disk.get(&mut tree, i), model.get(&i).copied().unwrap_or(0));
        }
    }
}
