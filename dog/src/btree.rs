//! The B-tree map of hypervolumes, as its clients maintain it (spec 01, section 13; spec 05, section 22).
//!
//! The tree is read whole, changed in memory, and written in an order that never exposes a root naming a leaf that
//! was not written: leaves first, then header and root in one write (so that the server does not take it for a table
//! update), then the leaf counter. A root with a wrong magic or depth is an empty tree.

use std::collections::BTreeSet;

use sheepdog_proto::btree::{
    BTREE_NODE_LEN, BtreeHeader, BtreeNode, InnerEntry, LeafEntry, MAX_INNER_ENTRIES, MAX_LEAF_ENTRIES,
};
use sheepdog_proto::inode::TABLE_OFFSET;
use sheepdog_proto::{Flags, Oid, VdiId, Wire};

use crate::inode::{InodeHeader, ReadError};
use crate::objects::{Write, read};
use crate::session::{Failed, Session};

/// Offset of the leaf counter in the inode.
const COUNTER_OFFSET: u64 = 568;

#[derive(Debug, Clone)]
struct Leaf {
    /// The leaf's object; `None` = the root itself.
    oid: Option<Oid>,
    entries: Vec<LeafEntry>,
}

/// A whole tree.
#[derive(Debug, Clone)]
pub struct Tree {
    leaves: Vec<Leaf>,
    /// Positions of leaves that changed since they were read or written.
    changed: BTreeSet<usize>,
    /// Most entries of a leaf.
    limit: usize,
}

impl Default for Tree {
    fn default() -> Tree {
        Tree {
            leaves: vec![Leaf { oid: None, entries: Vec::new() }],
            changed: BTreeSet::new(),
            limit: MAX_LEAF_ENTRIES,
        }
    }
}

impl Tree {
    fn leaf_of(&self, index: u32) -> usize {
        let after = self.leaves.partition_point(|leaf| leaf.entries.last().is_some_and(|e| e.idx < index));
        after.min(self.leaves.len() - 1)
    }

    /// The owner of a block, 0 if it is a hole.
    pub fn get(&self, index: u32) -> VdiId {
        let entries = &self.leaves[self.leaf_of(index)].entries;
        let found = entries.binary_search_by_key(&index, |e| e.idx);
        found.map_or(VdiId::NONE, |at| VdiId::new(entries[at].vdi_id))
    }

    /// Allocated blocks, ascending.
    pub fn allocated(&self) -> impl Iterator<Item = (u32, VdiId)> + Send + '_ {
        let entries = self.leaves.iter().flat_map(|leaf| &leaf.entries);
        entries.filter(|e| e.vdi_id != 0).map(|e| (e.idx, VdiId::new(e.vdi_id)))
    }

    /// Sets the owner of a block, splitting a full leaf.
    pub fn set(&mut self, index: u32, owner: VdiId) {
        let at = self.leaf_of(index);
        let entries = &mut self.leaves[at].entries;
        match entries.binary_search_by_key(&index, |e| e.idx) {
            Ok(found) => entries[found].vdi_id = owner.get(),
            Err(place) => entries.insert(place, LeafEntry { idx: index, vdi_id: owner.get() }),
        }
        self.changed.insert(at);
        if entries.len() > self.limit {
            self.split(at);
        }
    }

    /// The lower half of a leaf moves to a new one in front of it; beyond the last entry of the last leaf, only the
    /// new entry moves, behind it.
    fn split(&mut self, at: usize) {
        let is_root = self.leaves[at].oid.is_none() && self.leaves.len() == 1;
        let appended = !is_root && at + 1 == self.leaves.len();
        let entries = &mut self.leaves[at].entries;
        let tail = entries.split_off(if appended { entries.len() - 1 } else { entries.len() / 2 });
        if appended {
            self.leaves.push(Leaf { oid: None, entries: tail });
            self.changed.insert(at + 1);
            return;
        }
        let lower = std::mem::replace(entries, tail);
        self.leaves.insert(at, Leaf { oid: None, entries: lower });
        self.changed =
            self.changed.iter().map(|i| if *i > at { i + 1 } else { *i }).chain([at, at + 1]).collect();
    }

    fn root(&self) -> BtreeNode {
        if let [Leaf { oid: None, entries }] = self.leaves.as_slice() {
            return BtreeNode::Leaf(entries.clone());
        }
        let inner = self.leaves.iter().filter_map(|leaf| {
            let idx = leaf.entries.last()?.idx;
            leaf.oid.map(|oid| InnerEntry { idx, oid })
        });
        BtreeNode::Inner(inner.collect())
    }
}

/// Reads the tree of a VDI whose root begins with `root` (its header).
pub async fn load(session: &Session, vid: VdiId, root: &[u8]) -> Result<Tree, ReadError> {
    let oid = Oid::inode(vid);
    let node =
        load_node(session, oid, TABLE_OFFSET as u64, root).await.map_err(|e| ReadError::Map(oid, e))?;
    let inner = match node {
        BtreeNode::Leaf(entries) => {
            return Ok(Tree { leaves: vec![Leaf { oid: None, entries }], ..Tree::default() });
        }
        BtreeNode::Inner(inner) => inner,
    };
    let mut tree = Tree { leaves: Vec::new(), ..Tree::default() };
    for entry in inner {
        let load = async {
            let head = read(session, entry.oid, 0, BtreeHeader::LEN, Flags::DIRECT).await?;
            load_node(session, entry.oid, 0, &head).await
        };
        let leaf = load.await.map_err(|e| ReadError::Map(entry.oid, e))?;
        let BtreeNode::Leaf(entries) = leaf else { continue }; // no writer makes a third level
        tree.leaves.push(Leaf { oid: Some(entry.oid), entries });
    }
    if tree.leaves.is_empty() {
        return Ok(Tree::default());
    }
    Ok(tree)
}

async fn load_node(session: &Session, oid: Oid, offset: u64, head: &[u8]) -> Result<BtreeNode, Failed> {
    let header = BtreeHeader::decode(head).unwrap_or_default();
    let length = match header.depth {
        1 => (header.entries as usize).min(MAX_LEAF_ENTRIES) * LeafEntry::LEN,
        2 => (header.entries as usize).min(MAX_INNER_ENTRIES) * InnerEntry::LEN,
        _ => 0,
    };
    if length == 0 {
        return Ok(BtreeNode::decode(head));
    }
    let node = read(session, oid, offset, BtreeHeader::LEN + length, Flags::DIRECT).await?;
    Ok(BtreeNode::decode(&node))
}

/// Writes what changed of a tree and the inode's header; failures are reported.
pub async fn store(
    session: &Session,
    header: &mut InodeHeader,
    tree: &mut Tree,
    flags: Flags,
) -> Result<(), Failed> {
    let single = tree.leaves.len() == 1 && tree.leaves[0].oid.is_none();
    if !single {
        for at in std::mem::take(&mut tree.changed) {
            let leaf = &mut tree.leaves[at];
            let create = leaf.oid.is_none();
            let oid = *leaf.oid.get_or_insert_with(|| {
                header.btree_counter += 1;
                Oid::btree(header.vdi_id, header.btree_counter - 1)
            });
            let mut node = BtreeNode::Leaf(leaf.entries.clone()).encode();
            node.resize(BTREE_NODE_LEN, 0);
            // Index nodes are replicated whatever the VDI's policy.
            let write = Write { create, flags, policy: 0, ..Write::new(header, oid, 0, node) };
            write.send_or_report(session).await?;
        }
    }
    tree.changed.clear();
    let oid = Oid::inode(header.vdi_id);
    let head = [header.encode(), tree.root().encode()].concat();
    Write { flags, ..Write::new(header, oid, 0, head) }.send_or_report(session).await?;
    let counter = header.btree_counter.to_le_bytes().to_vec();
    Write { flags, ..Write::new(header, oid, COUNTER_OFFSET, counter) }.send_or_report(session).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(n: u32) -> VdiId {
        VdiId::new(n + 1)
    }

    #[test]
    fn blocks_entered_in_any_order_are_found_and_listed_in_order() {
        let mut tree = Tree { limit: 4, ..Tree::default() };
        let order: Vec<u32> = (0..60).map(|i| i * 37 % 61).collect();
        for index in &order {
            tree.set(*index, owner(*index));
        }
        assert!(tree.leaves.len() > 1 && tree.leaves.iter().all(|l| l.entries.len() <= 4));
        let listed: Vec<u32> = tree.allocated().map(|(index, _)| index).collect();
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(listed, sorted);
        for index in order {
            assert_eq!(tree.get(index), owner(index));
        }
        assert!(tree.get(500).is_none());
    }

    #[test]
    fn overwriting_a_block_adds_no_entry() {
        let mut tree = Tree::default();
        tree.set(7, owner(1));
        tree.set(7, owner(2));
        assert_eq!(tree.allocated().collect::<Vec<_>>(), [(7, owner(2))]);
        let expected = BtreeNode::Leaf(vec![LeafEntry { idx: 7, vdi_id: 3 }]);
        assert_eq!(tree.root(), expected);
    }

    #[test]
    fn appending_to_a_full_tree_opens_a_new_leaf() {
        let mut tree = Tree { limit: 2, ..Tree::default() };
        for index in 0..5 {
            tree.set(index, owner(index));
        }
        let sizes: Vec<usize> = tree.leaves.iter().map(|l| l.entries.len()).collect();
        assert_eq!(sizes.iter().sum::<usize>(), 5);
        assert!(sizes.iter().all(|n| *n <= 2));
    }
}
