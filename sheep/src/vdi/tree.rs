//! Hypervolumes as VDI operations see them: copying an index for a snapshot or clone, and telling which blocks a deletion
//! frees (spec 01, 13; spec 05, 22).
//!
//! Nobody counts references to their blocks. A block goes when the last VDI whose index names it is deleted: those of
//! the same family are looked through. That is exact, because only a derivation adds references to blocks of others, and
//! derivations and deletions exclude each other in the whole cluster. What nobody names then, nobody will ever name
//! again: it may be removed at any time. A block that was overwritten in a VDI after its
//! owner was deleted, and one whose removal the end of a node cut short, is found by [`super::leaks`].

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures_util::StreamExt;
use sheepdog_proto::btree::{BTREE_NODE_LEN, BtreeNode, InnerEntry, LeafEntry};
use sheepdog_proto::inode::{STORE_POLICY_BTREE, TABLE_OFFSET};
use sheepdog_proto::{Oid, ResultCode, VdiId};

use super::objects::{Inode, read_lookup_header};
use super::orphans::families;
use crate::gateway::hold::{Held, hold};
use crate::sheep::Sheep;

/// Inodes looked at at once.
const PARALLEL: usize = 16;

async fn read_root(sheep: &Arc<Sheep>, vid: VdiId) -> Result<BtreeNode, ResultCode> {
    let oid = Oid::inode(vid);
    let root = sheep.gateway.read_object(sheep, oid, TABLE_OFFSET as u64, BTREE_NODE_LEN).await?;
    Ok(BtreeNode::decode(&root))
}

/// Entries of a leaf object. One that is not there is empty.
async fn read_leaf(sheep: &Arc<Sheep>, oid: Oid) -> Result<Vec<LeafEntry>, ResultCode> {
    match sheep.gateway.read_object(sheep, oid, 0, BTREE_NODE_LEN).await {
        Ok(bytes) => match BtreeNode::decode(&bytes) {
            BtreeNode::Leaf(entries) => Ok(entries),
            BtreeNode::Inner(_) => Ok(Vec::new()), // no writer makes a third level
        },
        Err(ResultCode::NO_OBJ) => Ok(Vec::new()),
        Err(code) => Err(code),
    }
}

/// A node that certainly is one.
async fn read_for_certain(sheep: &Arc<Sheep>, oid: Oid, offset: usize) -> Result<BtreeNode, ResultCode> {
    let bytes = sheep.gateway.read_object(sheep, oid, offset as u64, BTREE_NODE_LEN).await?;
    BtreeNode::decode_checked(&bytes).ok_or_else(|| {
        tracing::warn!("{oid}: no node of a hypervolume's index");
        ResultCode::EIO
    })
}

/// Tells `name` of every object that the index of `vid` names from now to the end; fails if it cannot be read in full.
///
/// The index may change meanwhile, entry by entry or by splits. A split moves entries into a node that is new, and writes it
/// first, then the root that names it, then the node that it was split from (`IndexTree::take_writes`). So an entry that is
/// missing in a node that was read because it has moved is in one that the root names afterwards: the root is read again until it
/// names no node that was not read.
pub async fn for_each_name(
    sheep: &Arc<Sheep>,
    vid: VdiId,
    mut name: impl FnMut(Oid) + Send,
) -> Result<(), ResultCode> {
    let mut read = BTreeSet::new();
    let mut tell = |oids: &mut dyn Iterator<Item = Oid>| oids.for_each(&mut name);
    let blocks = |entries: Vec<LeafEntry>| {
        let used = entries.into_iter().filter(|entry| entry.vdi_id != 0);
        used.map(|entry| Oid::data(VdiId::new(entry.vdi_id), entry.idx))
    };
    loop {
        let leaves = match read_for_certain(sheep, Oid::inode(vid), TABLE_OFFSET).await? {
            BtreeNode::Leaf(entries) => {
                tell(&mut blocks(entries));
                return Ok(());
            }
            BtreeNode::Inner(leaves) => leaves,
        };
        let new: Vec<Oid> = leaves.iter().map(|leaf| leaf.oid).filter(|oid| read.insert(*oid)).collect();
        if new.is_empty() {
            return Ok(());
        }
        tell(&mut new.iter().copied());
        for oid in new {
            let begun = Instant::now();
            match read_for_certain(sheep, oid, 0).await? {
                BtreeNode::Leaf(entries) => tell(&mut blocks(entries)),
                BtreeNode::Inner(_) => return Err(ResultCode::EIO), // no writer makes a third level
            }
            // Clients first.
            tokio::time::sleep(begun.elapsed()).await;
        }
    }
}

/// Gives `child` a copy of the index of `base`: leaf objects of its own, and the root in its inode.
pub async fn copy_index(sheep: &Arc<Sheep>, base: VdiId, child: &mut Inode) -> Result<(), ResultCode> {
    let vid = child.header.vdi_id;
    let root = match read_root(sheep, base).await? {
        leaf @ BtreeNode::Leaf(_) => leaf,
        BtreeNode::Inner(entries) => {
            let mut copies = Vec::with_capacity(entries.len());
            for entry in entries {
                let oid = Oid::btree(vid, child.header.btree_counter);
                let bytes = match sheep.gateway.read_object(sheep, entry.oid, 0, BTREE_NODE_LEN).await {
                    Ok(bytes) => bytes,
                    Err(code) => return Err(undo(sheep, &copies, code).await),
                };
                copies.push(InnerEntry { idx: entry.idx, oid });
                child.header.btree_counter += 1;
                if let Err(code) = sheep.gateway.create_object(sheep, oid, 0, bytes).await {
                    return Err(undo(sheep, &copies, code).await);
                }
            }
            BtreeNode::Inner(copies)
        }
    };
    child.table = sheepdog_proto::inode::table(&root.encode()).iter().map(|v| v.get()).collect();
    Ok(())
}

/// Removes the leaves of a child that does not come to be.
pub async fn remove_index(sheep: &Arc<Sheep>, child: &Inode) {
    let leaves = (0..child.header.btree_counter).map(|n| Oid::btree(child.header.vdi_id, n));
    for oid in leaves {
        let _ = sheep.gateway.remove_object(sheep, oid).await; // what stays is garbage of an id that will be used again
    }
}

async fn undo(sheep: &Arc<Sheep>, copies: &[InnerEntry], code: ResultCode) -> ResultCode {
    for copy in copies {
        let _ = sheep.gateway.remove_object(sheep, copy.oid).await; // as above
    }
    code
}

/// A living relative's index, walked in ascending order of blocks.
struct Cursor {
    leaves: Vec<InnerEntry>,
    leaf: Vec<LeafEntry>,
    next: usize,
}

impl Cursor {
    async fn open(sheep: &Arc<Sheep>, vid: VdiId) -> Result<Cursor, ResultCode> {
        Ok(match read_root(sheep, vid).await? {
            BtreeNode::Leaf(leaf) => Cursor { leaves: Vec::new(), leaf, next: 0 },
            BtreeNode::Inner(leaves) => Cursor { leaves, leaf: Vec::new(), next: 0 },
        })
    }

    /// The owner of block `idx`, not below any asked for before.
    async fn owner(&mut self, sheep: &Arc<Sheep>, idx: u32) -> Result<u32, ResultCode> {
        while self.next < self.leaves.len() && self.leaf.last().is_none_or(|last| last.idx < idx) {
            // The original writes wrong largest indexes (spec 01, 13): what the leaf holds decides.
            self.leaf = read_leaf(sheep, self.leaves[self.next].oid).await?;
            self.next += 1;
        }
        let at = self.leaf.binary_search_by_key(&idx, |e| e.idx);
        Ok(at.map_or(0, |at| self.leaf[at].vdi_id))
    }
}

/// The indexes of hypervolumes that may share blocks with a deleted one, and what keeps them as they are.
#[derive(Default)]
struct Relatives {
    cursors: Vec<Cursor>,
    _held: Vec<Held>,
}

impl Relatives {
    /// Those of `vid` that are not deleted.
    async fn of(sheep: &Arc<Sheep>, vid: VdiId) -> Result<Relatives, ResultCode> {
        let mut links: Vec<(VdiId, VdiId)> = sheep.vdis.parents().into_iter().collect();
        let deleted = sheep.vdis.deleted_vids();
        let living: Vec<VdiId> = links.iter().map(|(v, _)| *v).filter(|v| !deleted.contains(v)).collect();
        let headers = futures_util::stream::iter(living)
            .map(|other| async move { (other, read_lookup_header(sheep, other).await) })
            .buffer_unordered(PARALLEL);
        tokio::pin!(headers);
        let mut hyper = BTreeMap::new();
        while let Some((other, header)) = headers.next().await {
            match header {
                Ok(header) if header.is_deleted() || header.store_policy != STORE_POLICY_BTREE => {}
                Ok(header) => {
                    // The table's parents differ from those of the inodes after a live rollback.
                    links.push((other, header.parent_vdi_id));
                    hyper.insert(other, header.is_snapshot());
                }
                Err(ResultCode::NO_OBJ) => {}
                Err(code) => return Err(code),
            }
        }
        hyper.remove(&vid);
        let family = families(&links).into_iter().find(|f| f.contains(&vid)).unwrap_or_default();
        let mut relatives = Relatives::default();
        for (other, is_snapshot) in family.into_iter().filter_map(|v| hyper.get_key_value(&v)) {
            if !is_snapshot {
                // A writer that splits a node moves entries from one that was not read yet to one that was.
                relatives._held.push(hold(sheep, *other).await?);
            }
            relatives.cursors.push(Cursor::open(sheep, *other).await?);
        }
        Ok(relatives)
    }

    /// Whether one of them names the block of `entry`, which is not below any asked for before.
    async fn name(&mut self, sheep: &Arc<Sheep>, entry: &LeafEntry) -> Result<bool, ResultCode> {
        for cursor in &mut self.cursors {
            if cursor.owner(sheep, entry.idx).await? == entry.vdi_id {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Blocks of one owner with adjacent indexes.
struct Run {
    owner: VdiId,
    indexes: RangeInclusive<u32>,
}

/// What a deleted hypervolume leaves and nobody else names: blocks, and the nodes of its index.
#[derive(Default)]
pub struct Freed {
    blocks: Vec<Run>,
    nodes: Vec<Oid>,
}

impl Freed {
    fn add_block(&mut self, owner: VdiId, idx: u32) {
        match self.blocks.last_mut() {
            Some(run) if run.owner == owner && run.indexes.end().checked_add(1) == Some(idx) => {
                run.indexes = *run.indexes.start()..=idx;
            }
            _ => self.blocks.push(Run { owner, indexes: idx..=idx }),
        }
    }

    /// The objects, nodes last.
    pub fn oids(self) -> impl Iterator<Item = Oid> {
        let blocks = self.blocks.into_iter();
        blocks.flat_map(|run| run.indexes.map(move |idx| Oid::data(run.owner, idx))).chain(self.nodes)
    }
}

/// What nobody will name when `vid` is gone. Blocks of relatives must not change hands until then: only in the work part
/// of a VDI operation.
pub async fn freed_by(sheep: &Arc<Sheep>, vid: VdiId) -> Result<Freed, ResultCode> {
    let mut relatives = Relatives::of(sheep, vid).await?;
    let mut freed = Freed::default();
    match read_root(sheep, vid).await? {
        BtreeNode::Leaf(entries) => free(sheep, &entries, &mut relatives, &mut freed).await?,
        BtreeNode::Inner(leaves) => {
            for leaf in leaves {
                let entries = read_leaf(sheep, leaf.oid).await?;
                free(sheep, &entries, &mut relatives, &mut freed).await?;
                if leaf.oid.vid() == vid {
                    freed.nodes.push(leaf.oid);
                }
            }
        }
    }
    Ok(freed)
}

async fn free(
    sheep: &Arc<Sheep>,
    entries: &[LeafEntry],
    relatives: &mut Relatives,
    freed: &mut Freed,
) -> Result<(), ResultCode> {
    for entry in entries.iter().filter(|e| e.vdi_id != 0) {
        if !relatives.name(sheep, entry).await? {
            freed.add_block(VdiId::new(entry.vdi_id), entry.idx);
        }
    }
    Ok(())
}

/// Bytes of an inode's header and index root as a client wrote them, with everything of the header but the counter as it
/// is: clients send the header as they once read it.
pub fn keep_header(old: &[u8], data: &Bytes, counter: std::ops::Range<usize>) -> Bytes {
    let mut bytes = data.to_vec();
    let head = old.len().min(counter.start);
    bytes[..head].copy_from_slice(&old[..head]);
    bytes.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_blocks_are_kept_as_runs_up_to_the_last_index_there_is() {
        let (a, b) = (VdiId::new(1), VdiId::new(2));
        let blocks = [(a, 3), (a, 4), (b, 5), (b, u32::MAX - 1), (b, u32::MAX)];
        let mut freed = Freed { nodes: vec![Oid::btree(b, 0)], ..Freed::default() };
        blocks.iter().for_each(|(owner, idx)| freed.add_block(*owner, *idx));
        assert_eq!(freed.blocks.len(), 3);
        let want: Vec<Oid> = blocks.iter().map(|(owner, idx)| Oid::data(*owner, *idx)).collect();
        assert_eq!(freed.oids().collect::<Vec<_>>(), [&want[..], &[Oid::btree(b, 0)]].concat());
    }
}
