//! Updates of block tables, with the reference counting that hangs on them (spec 01, 12.5; spec 05, sections 9, 10).

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::join_all;
use sheepdog_proto::header::{CoherenceRequest, ObjRequest, OrderRequest, order};
use sheepdog_proto::inode::{self, Gref, INODE_LOOKUP_LEN, STORE_POLICY_BTREE, TABLE_OFFSET, gref_offset};
use sheepdog_proto::{ClusterFlags, Flags, NodeId, Oid, Opcode, Request, ResultCode, VdiId};

use super::hold::tell;
use crate::sheep::Sheep;
use crate::vdi::locks::Participation;
use crate::vdi::objects::read_lookup_header;
use crate::vdi::reclaim::{Pending, Reference};

/// Offset of `store_policy` in an inode.
const STORE_POLICY_AT: usize = 553;

/// Whether the VDI's table is a B-tree, whose bytes are no table entries.
pub async fn is_btree(sheep: &Arc<Sheep>, vid: VdiId) -> Result<bool, ResultCode> {
    let head = sheep.gateway.read_object(sheep, Oid::inode(vid), 0, INODE_LOOKUP_LEN).await?;
    Ok(head[STORE_POLICY_AT] == STORE_POLICY_BTREE)
}

/// One entry that an update changes.
struct Change {
    index: u32,
    old: u32,
    gref: Gref,
}

/// Who asks for an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// The deletion of a VDI.
    Deletion,
    /// A client that keeps a table, connected since then. It deletes snapshots by clearing their entries, but discards blocks
    /// in the same way: what is a snapshot for a shorter time is the working VDI to it.
    Client(Instant),
    /// The same with a cached inode that is told when it is stale (tgt).
    Target(Instant),
    /// DISCARD_OBJ: snapshots stay as they are.
    Discard,
}

/// Writes table entries: `data` at byte `offset` of the inode, both multiples of 4 and inside the table.
pub async fn update(
    sheep: &Arc<Sheep>,
    vid: VdiId,
    offset: u64,
    data: Bytes,
    by: By,
) -> Result<(), ResultCode> {
    let oid = Oid::inode(vid);
    let _serial = sheep.gateway.maps.turn(oid, 0..1, true).await;
    if by == By::Discard && sheep.redundancy(vid, &sheep.views.load()).snapshot {
        return Err(ResultCode::READONLY);
    }
    let adds = inode::table(&data).iter().any(|v| v.get() != 0);
    if adds && read_lookup_header(sheep, vid).await?.is_deleted() {
        return Err(ResultCode::NO_VDI);
    }
    let stale = participation(sheep, vid) == Some(Participation::Invalidated);
    invalidate_others(sheep, vid).await?;
    let first = ((offset - TABLE_OFFSET as u64) / 4) as u32;
    let begun = sheep.views.epoch();
    let changes = changes(sheep, oid, first, offset, &data).await?;
    let knows = match by {
        By::Client(since) | By::Target(since) => sheep.vdis.snapshot_since(vid).is_none_or(|t| t <= since),
        By::Deletion | By::Discard => true,
    };
    if !knows && !changes.is_empty() {
        return Err(ResultCode::READONLY);
    }
    let own = |c: &Change| inode::table(&data)[(c.index - first) as usize].get() == vid.get();
    let view = sheep.views.load();
    if sheep.redundancy(vid, &view).snapshot && changes.iter().any(own) {
        return Err(ResultCode::READONLY);
    }
    sheep.gateway.write_object(sheep, oid, offset, data.clone()).await?;
    let steady = sheep.views.epoch() == begun;
    if !steady {
        // This node may have been out of the cluster meanwhile, and not held back: what it then missed it has learned first.
        let _ = sheep.tables.subscribe().wait_for(|learned| *learned).await;
    }
    if sheep.redundancy(vid, &sheep.views.load()).snapshot && changes.iter().any(own) {
        // The VDI became a snapshot meanwhile: whoever took it may not have seen the entries. Take them back; the client
        // sends them to the new working VDI.
        for change in changes.iter().filter(|c| own(c)) {
            let old = Bytes::copy_from_slice(&change.old.to_le_bytes());
            sheep.gateway.write_object(sheep, oid, inode::table_offset(change.index), old).await?;
        }
        return Err(ResultCode::READONLY);
    }
    clear_grefs(sheep, oid, &changes).await?;
    let stale = !changes.is_empty() && invalidate_late(sheep, vid).await? || stale;
    if stale && matches!(by, By::Target(_)) {
        sheep.gateway.stale.lock().insert(vid);
    }
    // Counts that were read in another epoch may be old. What is not dropped for that `vdi/leaks.rs` finds.
    let drops = changes.iter().filter(|c| c.old != 0 && steady).map(|c| {
        let reference = Reference {
            data: Oid::data(VdiId::new(c.old), c.index),
            generation: c.gref.generation.get() as u32,
            count: c.gref.count.get() as u32,
        };
        Pending::new(sheep, reference)
    });
    if view.flags.contains(ClusterFlags::RECYCLE_VID) {
        for reference in drops {
            crate::vdi::reclaim::drop_reference(sheep, reference).await;
        }
    } else {
        for reference in drops {
            sheep.gateway.reclaim.enqueue(reference).await;
        }
    }
    Ok(())
}

async fn changes(
    sheep: &Arc<Sheep>,
    oid: Oid,
    first: u32,
    offset: u64,
    data: &Bytes,
) -> Result<Vec<Change>, ResultCode> {
    let old = sheep.gateway.read_object(sheep, oid, offset, data.len()).await?;
    let new = inode::table(data);
    let differing: Vec<usize> =
        inode::table(&old).iter().zip(new).enumerate().filter(|(_, (a, b))| a != b).map(|(i, _)| i).collect();
    let (Some(&low), Some(&high)) = (differing.first(), differing.last()) else { return Ok(Vec::new()) };
    let span = high - low + 1;
    let bytes = sheep.gateway.read_object(sheep, oid, gref_offset(first + low as u32), span * 8).await?;
    let grefs = inode::grefs(&bytes);
    let change =
        |i: usize| Change { index: first + i as u32, old: inode::table(&old)[i].get(), gref: grefs[i - low] };
    Ok(differing.into_iter().map(change).collect())
}

/// Zeroes the generation references of changed entries, run by run; those that are zero already are left alone.
async fn clear_grefs(sheep: &Arc<Sheep>, oid: Oid, changes: &[Change]) -> Result<(), ResultCode> {
    let set: Vec<u32> = changes.iter().filter(|c| c.gref != Gref::default()).map(|c| c.index).collect();
    for run in set.chunk_by(|a, b| a + 1 == *b) {
        let zeros = sheepdog_buffer::zeros(run.len() * 8);
        sheep.gateway.write_object(sheep, oid, gref_offset(run[0]), zeros).await?;
    }
    Ok(())
}

async fn cohere(sheep: &Arc<Sheep>, vid: VdiId, validate: bool) -> ResultCode {
    let body = CoherenceRequest { vid, validate: validate.into() };
    let request = Request::new(Opcode::INODE_COHERENCE).with_coherence(body);
    sheep.cluster.submit_internal(request, Bytes::new()).await.response.result
}

/// This node's part in a shared lock.
pub fn participation(sheep: &Sheep, vid: VdiId) -> Option<Participation> {
    sheep.vdis.with_lock(vid, |lock| lock.participation(sheep.me)).flatten()
}

/// Before a table changes, clients of other nodes that share the VDI must learn that theirs is stale.
async fn invalidate_others(sheep: &Arc<Sheep>, vid: VdiId) -> Result<(), ResultCode> {
    match participation(sheep, vid) {
        None | Some(Participation::Modified) => Ok(()),
        Some(_) => {
            cohere(sheep, vid, false).await.ok()?;
            sharers_catch_up(sheep, vid, Until::Informed).await;
            Ok(())
        }
    }
}

/// After a table has changed: a node that refreshed its inode since [`invalidate_others`] may have read the old table and
/// must do so again. `true` = the client here must, too: another node changed the table meanwhile.
async fn invalidate_late(sheep: &Arc<Sheep>, vid: VdiId) -> Result<bool, ResultCode> {
    let state = participation(sheep, vid);
    invalidate_others(sheep, vid).await?;
    Ok(state == Some(Participation::Invalidated))
}

/// A refresh read makes the client's inode current. It is announced before the inode is read, and those who share the VDI have
/// heard of it: a table update that comes later invalidates this node again, one that came earlier has ended when the
/// inode is read.
pub async fn validate_refresh(sheep: &Arc<Sheep>, vid: VdiId) {
    if participation(sheep, vid) != Some(Participation::Invalidated) {
        return;
    }
    let result = cohere(sheep, vid, true).await;
    if !result.is_ok() {
        tracing::warn!("{vid:?}: refresh was not announced: {result}");
    }
    sharers_catch_up(sheep, vid, Until::Idle).await;
    drop(sheep.gateway.map_barrier(vid).await);
}

/// What the nodes that share a VDI are waited for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Until {
    /// They know what the cluster has said so far: the one that said it hears it first.
    Informed,
    /// And they have ended their table updates.
    Idle,
}

async fn sharers_catch_up(sheep: &Arc<Sheep>, vid: VdiId, until: Until) {
    let sharers = sheep.vdis.with_lock(vid, |lock| lock.participants()).unwrap_or_default();
    let others = sharers.into_iter().filter(|node| *node != sheep.me);
    join_all(others.map(|node| catch_up(sheep, vid, node, until))).await;
}

async fn catch_up(sheep: &Arc<Sheep>, vid: VdiId, node: NodeId, until: Until) {
    let kind = (until == Until::Idle).into();
    let body = OrderRequest { oid: Oid::inode(vid), what: order::CATCH_UP, kind, ..OrderRequest::zeroed() };
    let end = tokio::time::Instant::now() + SETTLE;
    while sheep.views.load().is_member(&node) {
        match tell(sheep, node, body, Bytes::new(), SETTLE).await {
            Ok(()) => return,
            // A node of the original.
            Err(ResultCode::INVALID_PARMS) if until == Until::Informed => return,
            Err(ResultCode::INVALID_PARMS) => return settle(sheep, vid, &[node], |_| true).await,
            _ if tokio::time::Instant::now() >= end => {
                return tracing::warn!("{vid:?}: {node} may not know that its inode is stale");
            }
            _ => tokio::time::sleep(SETTLE_PAUSE).await,
        }
    }
}

/// How long other nodes may take to end their table updates.
const SETTLE: Duration = Duration::from_secs(5);
/// Between two questions to one node.
const SETTLE_PAUSE: Duration = Duration::from_millis(2);

/// Waits until these members, of the original, refuse writes to the announced snapshot `vid` and have ended the table updates
/// that they began before. Others are held (`gateway/hold.rs`).
pub async fn settle_snapshot(sheep: &Arc<Sheep>, vid: VdiId, members: &[NodeId]) {
    settle(sheep, vid, members, |answer| answer == ResultCode::READONLY).await;
}

/// Waits until every member has ended the table updates of `vid` that it has in progress.
pub async fn settle_updates(sheep: &Arc<Sheep>, vid: VdiId) {
    let view = sheep.views.load();
    let others: Vec<NodeId> = view.others(sheep.me).collect();
    settle(sheep, vid, &others, |_| true).await;
    drop(sheep.gateway.map_barrier(vid).await);
}

/// Asks members by a write of nothing to an object that cannot exist, which waits for table updates in progress. An answer counts
/// if it is `done`; a member that gives none in time is left out.
async fn settle(sheep: &Arc<Sheep>, vid: VdiId, members: &[NodeId], done: fn(ResultCode) -> bool) {
    // Behind every table: a write to an object that is just being removed would bring it back.
    let body = ObjRequest { oid: Oid::data(vid, u32::MAX), ..ObjRequest::zeroed() };
    let probe = Request::new(Opcode::WRITE_OBJ).flag(Flags::WRITE).with_obj(body);
    let all = join_all(members.iter().map(|node| async move {
        loop {
            let reply = sheep.peers.call(node, probe, Bytes::new(), SETTLE).await;
            let answered = reply.is_ok_and(|r| done(r.response.result));
            if answered || !sheep.views.load().is_member(node) {
                return;
            }
            tokio::time::sleep(SETTLE_PAUSE).await;
        }
    }));
    if tokio::time::timeout(SETTLE, all).await.is_err() {
        tracing::warn!("{vid:?}: not every node has ended its table updates in time");
    }
}

impl super::Gateway {
    /// Keeps table updates of `vid` out until the value is dropped, and waits for those in progress here.
    pub async fn map_barrier(&self, vid: VdiId) -> crate::order::Turn {
        self.maps.turn(Oid::inode(vid), 0..1, true).await
    }

    /// The turn of a write to an index node: beside others, not beside a barrier.
    pub async fn index_turn(&self, vid: VdiId) -> crate::order::Turn {
        self.maps.turn(Oid::inode(vid), 0..1, false).await
    }
}
