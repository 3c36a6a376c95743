//! Removes objects of deleted VDIs that nothing in their family names any more, though somebody in it lives.
//!
//! Ledgers err on the safe side: a reference whose drop was lost with a node's memory, or may have been counted, or was
//! counted for a child that a crash kept from being made, keeps its object. So after every deletion and every change of the
//! members each node reads the tables of the families whose deleted VDIs it still stores objects of.
//!
//! An object of a deleted VDI that nothing names now is never named again: its own VDI takes no entries, another one copies
//! its entries from a table that has them, and that table changes only after the copy is written (`gateway/hold.rs`), long after
//! every node was told of the new VDI. So an object goes that two looks did not find in any table, [`APART`] from
//! each other, if no VDI came to the family between the first and the second, the epoch is the same, and this node was
//! awake. (Objects of a working VDI that are not in its table are left alone: a client creates an object before it
//! enters it.)
//!
//! The same holds for hypervolumes and their indexes, which are changed by clients alone: a client takes entries of others out
//! and puts none in, and an index is copied as a table is. An index of several nodes is read so that an entry that moves
//! from one to another meanwhile is seen ([`tree::for_each_name`]); one that cannot be read in full keeps everything. Two
//! writers of one hypervolume, which need `-l` to be kept from each other, may undo each other's entries.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sheepdog_proto::inode::{
    self, INODE_HEADER_LEN, InodeHeader, STORE_POLICY_BTREE, STORE_POLICY_FLAT, table_offset,
};
use sheepdog_proto::{MAX_DATA_OBJS, ObjectKind, Oid, ResultCode, VdiId, Wire};
use sheepdog_store::Replica;

use super::orphans::{Family, Occasion, remove};
use super::tree;
use crate::sheep::Sheep;

/// Between the two looks: longer than an announcement of a new VDI may be on its way to this node.
const APART: Duration = Duration::from_secs(30);
/// Table entries read at once.
const STEP: u32 = 1 << 16;
/// Between looks at hypervolumes, though nothing has happened: nobody is told when a block is overwritten.
const LATER: Duration = Duration::from_secs(600);
/// A look that took so long is not repeated for this many times as long.
const REST: u32 = 100;

/// The blocks and index nodes that are looked for, and what this node has of each.
type Wanted = BTreeMap<Oid, Vec<Replica>>;

/// What the first look found.
struct Suspects {
    at: Instant,
    /// In the cluster and the epoch of this occasion.
    occasion: Occasion,
    /// By the members of the family.
    found: Vec<(Vec<VdiId>, HashSet<Replica>)>,
}

/// How far the looks are.
#[derive(Default)]
pub(super) struct Leaks {
    suspects: Option<Suspects>,
    /// What this node looked at last, and when it may look again.
    looked: Option<(Occasion, Instant)>,
    /// It has not looked at what happened last.
    behind: bool,
    /// There are hypervolumes.
    hyper: bool,
}

impl Leaks {
    /// Whether there is something to do, though nothing has happened.
    pub(super) fn is_due(&self) -> bool {
        match &self.suspects {
            Some(first) => first.at.elapsed() >= APART,
            None => {
                let again = |late| self.looked.is_none_or(|(_, again)| Instant::now() >= again + late);
                (self.behind && again(Duration::ZERO)) || (self.hyper && again(LATER))
            }
        }
    }

    /// This node was not awake all the time: announcements may have passed it by.
    pub(super) fn forget(&mut self) {
        self.behind |= self.suspects.take().is_some();
    }
}

/// The next look, if it is due. How many objects were removed.
pub(super) async fn pass(
    sheep: &Arc<Sheep>,
    leaks: &mut Leaks,
    living: Vec<Family>,
    occasion: Occasion,
) -> Result<usize, ResultCode> {
    leaks.behind |= leaks.looked.is_none_or(|(last, _)| last != occasion);
    if !leaks.is_due() {
        return Ok(0);
    }
    let begun = Instant::now();
    if let Some(first) = leaks.suspects.take().filter(|first| first.occasion.is_within_epoch_of(occasion)) {
        let leaked = still_unnamed(sheep, first, living).await;
        return if leaked.is_empty() { Ok(0) } else { remove(sheep, leaked, occasion.epoch).await };
    }
    let mut found = Vec::new();
    leaks.hyper = false;
    for Family { members, replicas, .. } in living {
        let (unnamed, hyper) = unnamed(sheep, &members, replicas).await;
        leaks.hyper |= hyper;
        if !unnamed.is_empty() {
            found.push((members, unnamed.into_iter().collect()));
        }
    }
    leaks.looked = Some((occasion, Instant::now() + begun.elapsed() * REST));
    leaks.behind = false;
    leaks.suspects = (!found.is_empty()).then_some(Suspects { at: Instant::now(), occasion, found });
    Ok(0)
}

/// What the second look confirms, in families that are as they were.
async fn still_unnamed(sheep: &Arc<Sheep>, first: Suspects, living: Vec<Family>) -> Vec<Replica> {
    let mut leaked = Vec::new();
    for Family { members, replicas, .. } in living {
        let before = first.found.iter().find(|(then, _)| *then == members);
        if let Some((_, suspects)) = before {
            let replicas = replicas.into_iter().filter(|replica| suspects.contains(replica)).collect();
            leaked.extend(unnamed(sheep, &members, replicas).await.0);
        }
    }
    leaked
}

/// Those of the replicas that certainly no table of the family names, and whether there may be hypervolumes in it.
async fn unnamed(sheep: &Arc<Sheep>, members: &[VdiId], replicas: Vec<Replica>) -> (Vec<Replica>, bool) {
    let mut wanted = wanted(replicas);
    match read_tables(sheep, members, &mut wanted).await {
        Ok(hyper) => (wanted.into_values().flatten().collect(), hyper),
        Err(code) => {
            tracing::debug!("cannot tell what VDI {} and its family name: {code}", members[0]);
            (Vec::new(), true)
        }
    }
}

/// Crosses out what the tables or indexes of a family name, or may name. Whether there are hypervolumes in it.
async fn read_tables(sheep: &Arc<Sheep>, members: &[VdiId], wanted: &mut Wanted) -> Result<bool, ResultCode> {
    let (mut flat, mut hyper) = (Vec::new(), Vec::new());
    for vid in members {
        let header = match sheep.gateway.read_object(sheep, Oid::inode(*vid), 0, INODE_HEADER_LEN).await {
            Ok(bytes) => InodeHeader::get(&bytes),
            // Announced and never created: it names nothing.
            Err(ResultCode::NO_OBJ) => continue,
            Err(code) => return Err(code),
        };
        let is_deleted = header.is_deleted();
        if !is_deleted {
            wanted.retain(|oid, _| oid.vid() != *vid);
        }
        match header.store_policy {
            STORE_POLICY_FLAT => flat.push(*vid),
            STORE_POLICY_BTREE if is_deleted => {} // its index went with its name
            STORE_POLICY_BTREE => hyper.push(*vid),
            other => {
                tracing::warn!("{vid:?}: unknown store policy {other}");
                return Err(ResultCode::INVALID_PARMS);
            }
        }
    }
    for vid in flat {
        read_table(sheep, vid, wanted).await?;
    }
    for vid in &hyper {
        if wanted.is_empty() {
            break;
        }
        tree::for_each_name(sheep, *vid, |oid| drop(wanted.remove(&oid))).await?;
    }
    Ok(!hyper.is_empty())
}

async fn read_table(sheep: &Arc<Sheep>, vid: VdiId, wanted: &mut Wanted) -> Result<(), ResultCode> {
    let mut blocks = wanted.keys().filter(|oid| oid.is_data()).map(|oid| oid.index());
    let Some(first) = blocks.next() else { return Ok(()) };
    let (first, last) = blocks.fold((first, first), |(low, high), block| (low.min(block), high.max(block)));
    let last = last.min(MAX_DATA_OBJS as u32 - 1); // a table names no other blocks
    for from in (first..=last).step_by(STEP as usize) {
        let begun = Instant::now();
        let len = (last - from + 1).min(STEP) as usize * 4;
        let bytes = sheep.gateway.read_object(sheep, Oid::inode(vid), table_offset(from), len).await?;
        strike(wanted, from, inode::table(&bytes).iter().map(|owner| owner.get()));
        // Clients first.
        tokio::time::sleep(begun.elapsed()).await;
    }
    Ok(())
}

/// Blocks with their ledgers, and nodes of indexes.
fn wanted(replicas: Vec<Replica>) -> Wanted {
    let mut wanted = Wanted::new();
    for replica in replicas {
        let named = match replica.oid.kind() {
            ObjectKind::Data | ObjectKind::Btree => replica.oid,
            ObjectKind::Ledger => replica.oid.data_of_ledger(),
            _ => continue,
        };
        wanted.entry(named).or_default().push(replica);
    }
    wanted
}

/// Crosses out the blocks that a part of a table names, which begins with block `from`.
fn strike(wanted: &mut Wanted, from: u32, owners: impl Iterator<Item = u32>) {
    for (index, owner) in (from..).zip(owners).filter(|(_, owner)| *owner != 0) {
        wanted.remove(&Oid::data(VdiId::new(owner), index));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_table_names_is_crossed_out_with_its_ledger() {
        let vid = VdiId::new(7);
        let [named, other, late] = [3, 4, 70_000].map(|index| Oid::data(vid, index));
        let replica = |oid| Replica { oid, strip: None };
        let node = Oid::btree(vid, 3);
        let ledgers = [named, other].map(Oid::ledger_of);
        let oids = [named, ledgers[0], other, ledgers[1], late, node, Oid::vmstate(vid, 3)];
        let mut wanted = wanted(oids.map(replica).to_vec());
        assert_eq!(wanted.len(), 4, "not the saved memory");
        // Block 3 is named, block 4 is another VDI's.
        strike(&mut wanted, 2, [0, 7, 8, 0].into_iter());
        let left: Vec<Oid> = wanted.into_values().flatten().map(|r| r.oid).collect();
        assert_eq!(left, [other, Oid::ledger_of(other), late, node]);
    }
}
