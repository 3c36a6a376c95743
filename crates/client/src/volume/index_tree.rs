//! The B-tree that indexes a hypervolume's blocks (spec 01, section 13; spec 05, section 22). Pure: no I/O.
//!
//! The root is in the inode; once it overflows, leaves are objects of their own, loaded when needed ([`Missing`]
//! names the one) and written back by [`IndexTree::take_writes`], whose order is safe against a crash at any point:
//! the counter before the leaf that uses it, a new leaf before the root that names it, the shrunken leaf last.
//! Clearing an entry keeps it with vid 0; nodes never shrink.

use std::collections::{BTreeSet, HashMap};

use sheepdog_proto::btree::{
    BtreeHeader, BtreeNode, InnerEntry, LeafEntry, MAX_INNER_ENTRIES, MAX_LEAF_ENTRIES,
};
use sheepdog_proto::{Oid, VdiId};

/// A leaf object that must be loaded first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Missing(pub Oid);

/// Why an entry could not be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetError {
    /// Load this leaf and try again.
    Missing(Oid),
    /// The root has no room for another leaf.
    Full,
}

impl From<Missing> for SetError {
    fn from(missing: Missing) -> SetError {
        SetError::Missing(missing.0)
    }
}

/// A change to make durable, in the order given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeWrite {
    /// `btree_counter` of the inode.
    Counter(u32),
    /// A leaf object, whole: the used part, to be padded with zeros to the size of a node.
    Leaf {
        /// The object.
        oid: Oid,
        /// Header and entries.
        bytes: Vec<u8>,
    },
    /// One entry's vid in a leaf object.
    Value {
        /// The object.
        oid: Oid,
        /// Where in the object.
        offset: u32,
        /// The new vid.
        vid: u32,
    },
    /// The used part of the root, behind the inode's header.
    Root(Vec<u8>),
}

/// The index of one hypervolume.
#[derive(Debug)]
pub struct IndexTree {
    vid: VdiId,
    root: BtreeNode,
    counter: u32,
    leaves: HashMap<Oid, Vec<LeafEntry>>,
    capacity: Capacity,
    dirty: Dirty,
    /// How often the tree was replaced.
    generation: u64,
}

#[derive(Debug, Clone, Copy)]
struct Capacity {
    leaf: usize,
    inner: usize,
}

#[derive(Debug, Default)]
struct Dirty {
    counter: bool,
    root: bool,
    new_leaves: Vec<Oid>,
    leaves: BTreeSet<Oid>,
    /// Leaf and index of entries whose value alone changed.
    values: BTreeSet<(Oid, u32)>,
}

fn position(entries: &[LeafEntry], idx: u32) -> Result<usize, usize> {
    entries.binary_search_by_key(&idx, |entry| entry.idx)
}

fn value_in(entries: &[LeafEntry], idx: u32) -> u32 {
    position(entries, idx).map_or(0, |at| entries[at].vdi_id)
}

impl IndexTree {
    /// From the table area of an inode (`node`) and its `btree_counter`. An area without magic is an empty tree.
    pub fn new(vid: VdiId, node: &[u8], counter: u32) -> IndexTree {
        let capacity = Capacity { leaf: MAX_LEAF_ENTRIES, inner: MAX_INNER_ENTRIES };
        IndexTree {
            vid,
            root: BtreeNode::decode(node),
            counter,
            leaves: HashMap::new(),
            capacity,
            dirty: Dirty::default(),
            generation: 0,
        }
    }

    /// Forgets everything in favour of another inode's index, or of what another writer made of this one.
    pub fn replace(&mut self, new: IndexTree) {
        *self = IndexTree { generation: self.generation + 1, ..new };
    }

    /// Changes with [`IndexTree::replace`] only.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The number of the next leaf.
    pub fn counter(&self) -> u32 {
        self.counter
    }

    /// Position in the root of the leaf that covers `idx`; the last one for indexes beyond it.
    fn covering(inner: &[InnerEntry], idx: u32) -> Option<usize> {
        let at = inner.partition_point(|entry| entry.idx < idx);
        if inner.is_empty() { None } else { Some(at.min(inner.len() - 1)) }
    }

    /// Owner of block `idx`; 0 = hole.
    pub fn get(&self, idx: u32) -> Result<u32, Missing> {
        match &self.root {
            BtreeNode::Leaf(entries) => Ok(value_in(entries, idx)),
            BtreeNode::Inner(inner) => {
                let Some(at) = Self::covering(inner, idx) else { return Ok(0) };
                if inner[at].idx < idx {
                    return Ok(0); // beyond the largest index of all
                }
                let leaf = self.leaves.get(&inner[at].oid).ok_or(Missing(inner[at].oid))?;
                Ok(value_in(leaf, idx))
            }
        }
    }

    /// Takes the bytes of a leaf object that was [`Missing`].
    pub fn load(&mut self, oid: Oid, bytes: &[u8]) {
        if let BtreeNode::Leaf(entries) = BtreeNode::decode(bytes) {
            self.leaves.entry(oid).or_insert(entries);
        } else {
            // Leaves are never inner nodes; what claims to be one holds nothing that can be read.
            self.leaves.entry(oid).or_default();
        }
    }

    /// Changes the owner of block `idx`. Clearing an absent entry changes nothing.
    pub fn set(&mut self, idx: u32, vid: u32) -> Result<(), SetError> {
        if vid == 0 && self.get(idx)? == 0 {
            return Ok(());
        }
        if let BtreeNode::Leaf(entries) = &mut self.root {
            match position(entries, idx) {
                Ok(at) => entries[at].vdi_id = vid,
                Err(at) if entries.len() < self.capacity.leaf => {
                    entries.insert(at, LeafEntry { idx, vdi_id: vid })
                }
                Err(_) => {
                    self.grow();
                    return self.set(idx, vid);
                }
            }
            self.dirty.root = true;
            return Ok(());
        }
        self.set_in_leaf(idx, vid)
    }

    fn new_leaf(&mut self, entries: Vec<LeafEntry>) -> Oid {
        let oid = Oid::btree(self.vid, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.leaves.insert(oid, entries);
        self.dirty.counter = true;
        self.dirty.new_leaves.push(oid);
        oid
    }

    /// A full root leaf becomes two leaves under an inner root.
    fn grow(&mut self) {
        let BtreeNode::Leaf(entries) = &mut self.root else { return };
        let mut lower = std::mem::take(entries);
        let upper = lower.split_off(lower.len() / 2);
        let inner = [lower, upper]
            .into_iter()
            .filter_map(|half| {
                let idx = half.last()?.idx;
                Some(InnerEntry { idx, oid: self.new_leaf(half) })
            })
            .collect();
        self.root = BtreeNode::Inner(inner);
        self.dirty.root = true;
    }

    fn set_in_leaf(&mut self, idx: u32, vid: u32) -> Result<(), SetError> {
        let BtreeNode::Inner(inner) = &mut self.root else { return Ok(()) };
        let full_root = inner.len() >= self.capacity.inner;
        let Some(at) = Self::covering(inner, idx) else {
            let oid = self.new_leaf(vec![LeafEntry { idx, vdi_id: vid }]);
            self.insert_inner(0, InnerEntry { idx, oid });
            return Ok(());
        };
        let InnerEntry { idx: largest, oid } = inner[at];
        let leaf = self.leaves.get_mut(&oid).ok_or(SetError::Missing(oid))?;
        match position(leaf, idx) {
            Ok(found) => {
                leaf[found].vdi_id = vid;
                self.dirty.values.insert((oid, idx));
            }
            Err(place) if leaf.len() < self.capacity.leaf => {
                leaf.insert(place, LeafEntry { idx, vdi_id: vid });
                self.dirty.leaves.insert(oid);
                if idx > largest {
                    inner[at].idx = idx;
                    self.dirty.root = true;
                }
            }
            Err(_) if full_root => return Err(SetError::Full),
            Err(_) if idx > largest => {
                let oid = self.new_leaf(vec![LeafEntry { idx, vdi_id: vid }]);
                self.insert_inner(at + 1, InnerEntry { idx, oid });
            }
            Err(_) => {
                let upper = leaf.split_off(leaf.len() / 2);
                let lower = std::mem::replace(leaf, upper);
                self.dirty.leaves.insert(oid);
                let Some(lower_largest) = lower.last().map(|entry| entry.idx) else { return Ok(()) };
                let oid = self.new_leaf(lower);
                self.insert_inner(at, InnerEntry { idx: lower_largest, oid });
                return self.set_in_leaf(idx, vid);
            }
        }
        Ok(())
    }

    fn insert_inner(&mut self, at: usize, entry: InnerEntry) {
        if let BtreeNode::Inner(inner) = &mut self.root {
            inner.insert(at, entry);
            self.dirty.root = true;
        }
    }

    fn leaf_write(&self, oid: Oid) -> Option<NodeWrite> {
        let entries = self.leaves.get(&oid)?;
        Some(NodeWrite::Leaf { oid, bytes: BtreeNode::Leaf(entries.clone()).encode() })
    }

    /// The writes that make everything changed so far durable, in a crash-safe order. If one of them fails, call
    /// [`IndexTree::rewrite_all`] before the next.
    pub fn take_writes(&mut self) -> Vec<NodeWrite> {
        let dirty = std::mem::take(&mut self.dirty);
        let mut writes = Vec::new();
        if dirty.counter {
            writes.push(NodeWrite::Counter(self.counter));
        }
        let fresh: BTreeSet<Oid> = dirty.new_leaves.iter().copied().collect();
        writes.extend(dirty.new_leaves.iter().filter_map(|oid| self.leaf_write(*oid)));
        if dirty.root {
            writes.push(NodeWrite::Root(self.root.encode()));
        }
        let changed: BTreeSet<Oid> = dirty.leaves.difference(&fresh).copied().collect();
        writes.extend(changed.iter().filter_map(|oid| self.leaf_write(*oid)));
        for (oid, idx) in dirty.values {
            if fresh.contains(&oid) || changed.contains(&oid) {
                continue;
            }
            let Some(leaf) = self.leaves.get(&oid) else { continue };
            // An entry moved by a split was written with the leaf it moved to.
            let Ok(at) = position(leaf, idx) else { continue };
            let offset = (BtreeHeader::LEN + LeafEntry::LEN * at + 4) as u32;
            writes.push(NodeWrite::Value { oid, offset, vid: leaf[at].vdi_id });
        }
        writes
    }

    /// Marks everything in memory as not yet durable, after a write failed.
    pub fn rewrite_all(&mut self) {
        let named: Vec<Oid> = match &self.root {
            BtreeNode::Inner(inner) => inner.iter().map(|entry| entry.oid).collect(),
            BtreeNode::Leaf(_) => Vec::new(),
        };
        let loaded = named.into_iter().filter(|oid| self.leaves.contains_key(oid));
        self.dirty = Dirty { counter: true, root: true, new_leaves: loaded.collect(), ..Dirty::default() };
    }
}

#[cfg(test)]
mod tests;
