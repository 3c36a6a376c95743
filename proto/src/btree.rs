//! Index nodes of hypervolumes (spec 01, section 13; spec 05, section 22).
//!
//! A node is a header and sorted entries: a leaf maps block indexes to vids, an inner node (depth 2, only in the
//! inode) names the leaf objects by the largest index in each. A node of zeros, or with a wrong magic or depth, is
//! empty.

use crate::{Oid, Wire};

/// Magic of every node.
pub const BTREE_MAGIC: u16 = 0x6274;
/// Bytes of a node, in the inode or as an object of its own.
pub const BTREE_NODE_LEN: usize = 4 << 20;
/// Most entries of a leaf.
pub const MAX_LEAF_ENTRIES: usize = (BTREE_NODE_LEN - BtreeHeader::LEN) / LeafEntry::LEN;
/// Most entries of an inner node.
pub const MAX_INNER_ENTRIES: usize = (BTREE_NODE_LEN - BtreeHeader::LEN) / InnerEntry::LEN;

const _: () = assert!(MAX_LEAF_ENTRIES == 524_287 && MAX_INNER_ENTRIES == 262_143);

wire! {
    /// Header of a node.
    BtreeHeader [8] {
        /// [`BTREE_MAGIC`].
        0 => magic: u16,
        /// 1 = leaf, 2 = inner.
        2 => depth: u16,
        /// Entries that follow.
        4 => entries: u32,
    }
}

wire! {
    /// Entry of a leaf.
    LeafEntry [8] {
        /// Block index.
        0 => idx: u32,
        /// Owner of the block.
        4 => vdi_id: u32,
    }
}

wire! {
    /// Entry of an inner node.
    InnerEntry [16] {
        /// Largest index in the leaf.
        0 => idx: u32,
        /// The leaf object.
        8 => oid: Oid,
    }
}

/// A decoded node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BtreeNode {
    /// Blocks, ascending by index.
    Leaf(Vec<LeafEntry>),
    /// Leaves, ascending by largest index.
    Inner(Vec<InnerEntry>),
}

impl BtreeNode {
    /// Decodes a node. Unknown magic or depth gives an empty leaf; the entry count is bounded by the bytes present,
    /// of which a node has at most [`BTREE_NODE_LEN`].
    pub fn decode(bytes: &[u8]) -> BtreeNode {
        let Ok(header) = BtreeHeader::decode(bytes) else {
            return BtreeNode::Leaf(Vec::new());
        };
        let body = &bytes[BtreeHeader::LEN..bytes.len().min(BTREE_NODE_LEN)];
        let count = header.entries as usize;
        match (header.magic, header.depth) {
            (BTREE_MAGIC, 1) => {
                BtreeNode::Leaf(body.chunks_exact(LeafEntry::LEN).take(count).map(LeafEntry::get).collect())
            }
            (BTREE_MAGIC, 2) => BtreeNode::Inner(
                body.chunks_exact(InnerEntry::LEN).take(count).map(InnerEntry::get).collect(),
            ),
            _ => BtreeNode::Leaf(Vec::new()),
        }
    }

    /// Decodes a node as it was written: `None` if magic or depth are unknown or entries are missing.
    pub fn decode_checked(bytes: &[u8]) -> Option<BtreeNode> {
        let header = BtreeHeader::decode(bytes).ok().filter(|header| header.magic == BTREE_MAGIC)?;
        let node = BtreeNode::decode(bytes);
        let (depth, entries) = match &node {
            BtreeNode::Leaf(list) => (1, list.len()),
            BtreeNode::Inner(list) => (2, list.len()),
        };
        (header.depth == depth && header.entries as usize == entries).then_some(node)
    }

    /// The used part of the node.
    pub fn encode(&self) -> Vec<u8> {
        let (depth, entries, body): (u16, usize, Vec<u8>) = match self {
            BtreeNode::Leaf(list) => (1, list.len(), list.iter().flat_map(|e| e.to_bytes()).collect()),
            BtreeNode::Inner(list) => (2, list.len(), list.iter().flat_map(|e| e.to_bytes()).collect()),
        };
        let header = BtreeHeader { magic: BTREE_MAGIC, depth, entries: entries as u32 };
        [header.to_bytes().as_slice(), &body].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_all_of_a_node_is_none() {
        let node = BtreeNode::Leaf(vec![LeafEntry { idx: 3, vdi_id: 7 }, LeafEntry { idx: 9, vdi_id: 7 }]);
        let bytes = node.encode();
        assert_eq!(BtreeNode::decode_checked(&bytes), Some(node));
        let padded = [&bytes[..], &[0; 64]].concat();
        assert_eq!(BtreeNode::decode_checked(&padded), BtreeNode::decode_checked(&bytes));
        assert_eq!(BtreeNode::decode_checked(&bytes[..bytes.len() - 1]), None, "an entry is missing");
        for (at, bad) in [(0, 0), (2, 3), (2, 0), (7, 1)] {
            let mut bytes = bytes.clone();
            bytes[at] = bad;
            assert_eq!(BtreeNode::decode_checked(&bytes), None, "byte {at} is {bad}");
        }
        assert_eq!(BtreeNode::decode_checked(&[0; 4096]), None, "never written");
    }
}
