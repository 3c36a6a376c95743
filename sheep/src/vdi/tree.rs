//! Hypervolumes as VDI operations see them: copying an index for a snapshot or clone, and freeing blocks of a deleted
//! one (spec 01, 13; spec 05, 22).
//!
//! Nobody counts references to their blocks. A block goes when the last VDI whose index names it is deleted: those of
//! the same family are looked through. That is exact, because only a derivation adds references to blocks of others, and
//! derivations and deletions exclude each other in the whole cluster. A block that was overwritten in a VDI after its
//! owner was deleted has nobody to find it; it goes with the last VDI of the family ([`super::orphans`]).

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use sheepdog_proto::btree::{BTREE_NODE_LEN, BtreeNode, InnerEntry, LeafEntry};
use sheepdog_proto::inode::{STORE_POLICY_BTREE, TABLE_OFFSET};
use sheepdog_proto::{Oid, ResultCode, VdiId};

use super::objects::{Inode, read_lookup_header};
use super::orphans::families;
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

/// Hypervolumes that may share blocks with `vid` and are not deleted.
async fn relatives(sheep: &Arc<Sheep>, vid: VdiId) -> Result<Vec<Cursor>, ResultCode> {
    let mut links: Vec<(VdiId, VdiId)> = sheep.vdis.parents().into_iter().collect();
    let deleted = sheep.vdis.deleted_vids();
    let living: Vec<VdiId> = links.iter().map(|(v, _)| *v).filter(|v| !deleted.contains(v)).collect();
    let headers = futures_util::stream::iter(living)
        .map(|other| async move { (other, read_lookup_header(sheep, other).await) })
        .buffer_unordered(PARALLEL);
    tokio::pin!(headers);
    let mut hyper = BTreeSet::new();
    while let Some((other, header)) = headers.next().await {
        match header {
            Ok(header) if header.is_deleted() || header.store_policy != STORE_POLICY_BTREE => {}
            Ok(header) => {
                // The table's parents differ from those of the inodes after a live rollback.
                links.push((other, header.parent_vdi_id));
                hyper.insert(other);
            }
            Err(ResultCode::NO_OBJ) => {}
            Err(code) => return Err(code),
        }
    }
    hyper.remove(&vid);
    let family = families(&links).into_iter().find(|f| f.contains(&vid)).unwrap_or_default();
    let mut cursors = Vec::new();
    for other in family.into_iter().filter(|v| hyper.contains(v)) {
        cursors.push(Cursor::open(sheep, other).await?);
    }
    Ok(cursors)
}

fn absent_is_fine(result: Result<(), ResultCode>) -> Result<(), ResultCode> {
    if result == Err(ResultCode::NO_OBJ) { Ok(()) } else { result }
}

/// Frees the blocks that only the index of `vid` names, and the index.
pub async fn free_blocks(sheep: &Arc<Sheep>, vid: VdiId) -> Result<(), ResultCode> {
    let mut relatives = relatives(sheep, vid).await?;
    let leaves = match read_root(sheep, vid).await? {
        BtreeNode::Leaf(entries) => return free(sheep, &entries, &mut relatives).await,
        BtreeNode::Inner(entries) => entries,
    };
    for leaf in &leaves {
        let entries = read_leaf(sheep, leaf.oid).await?;
        free(sheep, &entries, &mut relatives).await?;
    }
    // The index last: whoever begins again after a failure finds what is left.
    for leaf in leaves.iter().filter(|leaf| leaf.oid.vid() == vid) {
        absent_is_fine(sheep.gateway.remove_object(sheep, leaf.oid).await)?;
    }
    Ok(())
}

async fn free(sheep: &Arc<Sheep>, entries: &[LeafEntry], relatives: &mut [Cursor]) -> Result<(), ResultCode> {
    for entry in entries.iter().filter(|e| e.vdi_id != 0) {
        let mut shared = false;
        for relative in relatives.iter_mut() {
            if relative.owner(sheep, entry.idx).await? == entry.vdi_id {
                shared = true;
                break;
            }
        }
        if !shared {
            let oid = Oid::data(VdiId::new(entry.vdi_id), entry.idx);
            absent_is_fine(sheep.gateway.remove_object(sheep, oid).await)?;
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
