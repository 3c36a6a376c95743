//! Main parts of cluster operations: executed by every node, in the driver's order (spec 04, section 9).

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use sheepdog_client::Reply;
use sheepdog_proto::config::EpochLog;
use sheepdog_proto::message::ClusterMessage;
use sheepdog_proto::node::decode_nodes;
use sheepdog_proto::{
    CopyPolicy, MAX_BLOCK_SHIFT, MAX_COPIES, MIN_BLOCK_SHIFT, NodeId, NodeRecord, Request, Response,
    ResultCode, VdiId, Wire, cstr,
};
use sheepdog_store::Layout;

use super::task::{LockChange, Task};
use crate::sheep::Sheep;
use crate::start;
use crate::vdi::orphans;
use crate::vdi::table::Redundancy;

/// A main part: its value is the operation's result.
pub type Main = for<'a> fn(&'a mut Task, &'a ClusterMessage, &'a NodeRecord) -> BoxFuture<'a, ResultCode>;

async fn apply(task: &mut Task, outcome: Result<Vec<super::state::Action>, ResultCode>) -> ResultCode {
    match outcome {
        Ok(actions) => {
            task.act(actions).await;
            ResultCode::SUCCESS
        }
        Err(code) => code,
    }
}

/// Store drivers that this version has, in the order of the original's list.
pub const STORE_DRIVERS: &[Layout] = &[Layout::Tree, Layout::Plain];

/// MAKE_FS.
pub fn make_fs<'a>(
    task: &'a mut Task,
    message: &'a ClusterMessage,
    _: &'a NodeRecord,
) -> BoxFuture<'a, ResultCode> {
    Box::pin(async move {
        let store = String::from_utf8_lossy(cstr(&message.data)).into_owned();
        let Some(layout) = Layout::by_name(&store) else {
            tracing::error!("backend store '{store}' is not supported");
            return ResultCode::NO_STORE;
        };
        // The choice of this node alone, if it made one.
        if let Err(error) = start::driver(&task.sheep.meta, store.as_bytes()) {
            tracing::error!("{error}");
            return ResultCode::NO_STORE;
        }
        let body = message.request.cluster();
        let outcome = task.state.format(&body, layout.name().as_bytes());
        apply(task, outcome).await
    })
}

/// SHUTDOWN.
pub fn shutdown<'a>(
    task: &'a mut Task,
    _: &'a ClusterMessage,
    _: &'a NodeRecord,
) -> BoxFuture<'a, ResultCode> {
    Box::pin(async move {
        let recovering = !task.sheep.recovery.is_idle();
        let actions = task.state.shutdown(recovering);
        apply(task, Ok(actions)).await
    })
}

/// FORCE_RECOVER, work part: the members of the last epoch.
pub fn force_recover_work<'a>(sheep: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        let view = sheep.views.load();
        let refuse = |code| Reply::empty(Response::to(&request, code));
        if view.status != sheepdog_proto::ClusterStatus::Wait || !view.joined {
            return refuse(ResultCode::FORCE_RECOVER);
        }
        let Ok(log) = sheep.meta.read_epoch(view.epoch) else { return refuse(ResultCode::FORCE_RECOVER) };
        let nodes = sheepdog_proto::node::encode_nodes(&log.nodes);
        if nodes.len() > request.reply_capacity() {
            return refuse(ResultCode::INVALID_PARMS);
        }
        let mut reply = crate::gateway::reply_data(&request, nodes.into());
        reply.response.epoch = view.epoch;
        reply
    })
}

/// FORCE_RECOVER, main part.
pub fn force_recover<'a>(
    task: &'a mut Task,
    message: &'a ClusterMessage,
    _: &'a NodeRecord,
) -> BoxFuture<'a, ResultCode> {
    Box::pin(async move {
        let outcome = task.state.force_recover(message.response.epoch, decode_nodes(&message.data));
        apply(task, outcome).await
    })
}

/// CLEANUP.
pub fn cleanup<'a>(
    task: &'a mut Task,
    _: &'a ClusterMessage,
    _: &'a NodeRecord,
) -> BoxFuture<'a, ResultCode> {
    Box::pin(async move {
        if !task.sheep.recovery.is_idle() {
            return ResultCode::NODE_IN_RECOVERY;
        }
        if let Some(store) = &task.sheep.store
            && let Err(error) = store.purge_stale(task.state.epoch()).await
        {
            tracing::error!("cannot remove stale objects: {error}");
            return ResultCode::EIO;
        }
        ResultCode::SUCCESS
    })
}

/// COMPLETE_RECOVERY.
pub fn complete_recovery<'a>(
    task: &'a mut Task,
    message: &'a ClusterMessage,
    _: &'a NodeRecord,
) -> BoxFuture<'a, ResultCode> {
    Box::pin(async move {
        let Ok(node) = NodeRecord::decode(&message.data) else { return ResultCode::INVALID_PARMS };
        let actions = task.state.completed(message.request.obj().tgt_epoch, node.nid);
        apply(task, Ok(actions)).await
    })
}

/// ENABLE_RECOVER.
pub fn enable_recover<'a>(
    task: &'a mut Task,
    _: &'a ClusterMessage,
    _: &'a NodeRecord,
) -> BoxFuture<'a, ResultCode> {
    Box::pin(async move {
        let actions = task.state.set_recovery_disabled(false);
        apply(task, Ok(actions)).await
    })
}

/// DISABLE_RECOVER.
pub fn disable_recover<'a>(
    task: &'a mut Task,
    _: &'a ClusterMessage,
    _: &'a NodeRecord,
) -> BoxFuture<'a, ResultCode> {
    Box::pin(async move {
        let actions = task.state.set_recovery_disabled(true);
        apply(task, Ok(actions)).await
    })
}

/// ALTER_CLUSTER_COPY.
pub fn alter_cluster_copy<'a>(
    task: &'a mut Task,
    message: &'a ClusterMessage,
    _: &'a NodeRecord,
) -> BoxFuture<'a, ResultCode> {
    Box::pin(async move {
        let body = message.request.cluster();
        let outcome = task.state.alter_copies(body.copies, body.copy_policy);
        apply(task, outcome).await
    })
}

/// REWEIGHT: announces this node's space if it changed by 1 % or more.
pub fn reweight<'a>(
    task: &'a mut Task,
    _: &'a ClusterMessage,
    _: &'a NodeRecord,
) -> BoxFuture<'a, ResultCode> {
    Box::pin(async move {
        let Some(store) = &task.sheep.store else { return ResultCode::SUCCESS };
        let space = store.space();
        let (old, new) = (task.state.me.space, space.free + space.used);
        if old != 0 && new.abs_diff(old) >= old.div_ceil(100) {
            let node = NodeRecord { space: new, ..task.state.me };
            let handle = task.sheep.cluster.clone();
            tokio::spawn(async move { handle.update_node(node).await });
        }
        ResultCode::SUCCESS
    })
}

/// NOTIFY_VDI_ADD.
pub fn notify_vdi_add<'a>(
    task: &'a mut Task,
    message: &'a ClusterMessage,
    sender: &'a NodeRecord,
) -> BoxFuture<'a, ResultCode> {
    Box::pin(async move {
        let body = message.request.vdi_state();
        let Ok(policy) = CopyPolicy::from_byte(body.copy_policy) else { return ResultCode::INVALID_PARMS };
        if !valid_redundancy(body.copies, body.block_size_shift) {
            return ResultCode::INVALID_PARMS;
        }
        let redundancy = Redundancy {
            copies: body.copies,
            policy,
            block_size_shift: body.block_size_shift,
            snapshot: false,
            known: true,
        };
        // The new VDI of a snapshot whose node could not say any more that it is made.
        let completes = body.set_bitmap != 0 && !body.old_vid.is_none();
        if completes && task.sheep.vdis.is_in_use(body.new_vid) {
            return ResultCode::SUCCESS;
        }
        task.sheep.vdis.announce(sender.nid, body.old_vid, body.new_vid, redundancy, body.set_bitmap != 0);
        if completes {
            carry_lock_over(task, body.new_vid);
        }
        ResultCode::SUCCESS
    })
}

fn valid_redundancy(copies: u8, shift: u8) -> bool {
    (1..=MAX_COPIES).contains(&usize::from(copies)) && (MIN_BLOCK_SHIFT..=MAX_BLOCK_SHIFT).contains(&shift)
}

/// NOTIFY_VDI_DEL: object lists here follow the files, so there is nothing to forget. Between nodes of this project: a VDI
/// whose deletion nobody ended.
pub fn notify_vdi_del<'a>(
    task: &'a mut Task,
    message: &'a ClusterMessage,
    _: &'a NodeRecord,
) -> BoxFuture<'a, ResultCode> {
    Box::pin(async {
        if let Ok(vid) = VdiId::decode(&message.data)
            && !vid.is_none()
        {
            tokio::spawn(orphans::look_whether_deleted(task.sheep.clone(), vid));
        }
        ResultCode::SUCCESS
    })
}

/// DELETE_CACHE: obsolete.
pub fn delete_cache<'a>(
    _: &'a mut Task,
    _: &'a ClusterMessage,
    _: &'a NodeRecord,
) -> BoxFuture<'a, ResultCode> {
    Box::pin(async { ResultCode::SUCCESS })
}

/// NEW_VDI.
pub fn new_vdi<'a>(
    task: &'a mut Task,
    message: &'a ClusterMessage,
    sender: &'a NodeRecord,
) -> BoxFuture<'a, ResultCode> {
    Box::pin(async move {
        let vid = message.response.vdi().vdi_id;
        task.sheep.vdis.finish(sender.nid);
        task.sheep.vdis.set_in_use(vid);
        // A snapshot or a live rollback: clients with the VDI open go on with the new one (spec 05, 16).
        if message.request.vdi().snapid != 0 {
            carry_lock_over(task, vid);
        }
        ResultCode::SUCCESS
    })
}

fn carry_lock_over(task: &mut Task, vid: VdiId) {
    if task.sheep.vdis.is_collecting() {
        task.lock_log.push(LockChange::CarriedOver(vid));
    } else {
        task.sheep.vdis.carry_lock_over(vid);
    }
}

/// DEL_VDI.
pub fn del_vdi<'a>(
    task: &'a mut Task,
    message: &'a ClusterMessage,
    _: &'a NodeRecord,
) -> BoxFuture<'a, ResultCode> {
    Box::pin(async move {
        let vid = message.response.vdi().vdi_id;
        task.sheep.vdis.set_deleted(vid);
        let recycle = task.state.info.header.flags.contains(sheepdog_proto::ClusterFlags::RECYCLE_VID);
        if recycle && let Some(family) = task.sheep.vdis.dead_family(vid) {
            recycle_family(task, &family).await;
        }
        ResultCode::SUCCESS
    })
}

/// The ids of a dead family are free again; what this node still has of them is removed.
async fn recycle_family(task: &Task, family: &[VdiId]) {
    family.iter().for_each(|vid| task.sheep.vdis.recycle(*vid));
    let Some(store) = &task.sheep.store else { return };
    for replica in store.working() {
        let is_attr = replica.oid.kind() == sheepdog_proto::ObjectKind::Attr;
        if !is_attr && family.contains(&replica.oid.vid()) {
            if !replica.oid.is_inode() {
                tracing::warn!("{} was leaked by a deleted VDI, removing it", replica.oid);
            }
            task.sheep.tombstones.add(replica.oid, task.state.epoch());
            if let Err(error) = store.remove(replica).await {
                tracing::error!("cannot remove {}: {error}", replica.oid);
            }
        }
    }
}

/// LOCK_VDI.
pub fn lock_vdi<'a>(
    task: &'a mut Task,
    message: &'a ClusterMessage,
    sender: &'a NodeRecord,
) -> BoxFuture<'a, ResultCode> {
    Box::pin(async move {
        if !task.state.info.header.flags.contains(sheepdog_proto::ClusterFlags::USE_LOCK) {
            return ResultCode::SUCCESS;
        }
        let (vid, lock_type) = (message.response.vdi().vdi_id, message.request.vdi().lock_type);
        if task.sheep.vdis.is_collecting() {
            task.lock_log.push(LockChange::Acquire(vid, sender.nid, lock_type));
            return ResultCode::SUCCESS;
        }
        let locked = task.sheep.vdis.with_lock(vid, |lock| lock.acquire(sender.nid, lock_type));
        locked.unwrap_or(ResultCode::NO_VDI)
    })
}

/// RELEASE_VDI: never fails.
pub fn release_vdi<'a>(
    task: &'a mut Task,
    message: &'a ClusterMessage,
    sender: &'a NodeRecord,
) -> BoxFuture<'a, ResultCode> {
    Box::pin(async move {
        let body = message.request.vdi();
        let vid = body.base_vdi_id;
        // For a node that is gone: only what it still owns.
        let named = message.data.len() == <NodeId as Wire>::SIZE; // clients send the VDI's name
        let owner = if named { NodeId::decode(&message.data).ok() } else { None };
        if task.sheep.vdis.is_collecting() {
            task.lock_log.push(match owner {
                Some(owner) => LockChange::ReleaseOfLost(vid, owner),
                None => LockChange::Release(vid, sender.nid, body.lock_type),
            });
            return ResultCode::SUCCESS;
        }
        match owner {
            Some(owner) => drop(task.sheep.vdis.with_lock(vid, |lock| lock.release_of(owner))),
            None => task.sheep.vdis.release_lock(vid, sender.nid, body.lock_type),
        }
        ResultCode::SUCCESS
    })
}

/// INODE_COHERENCE.
pub fn inode_coherence<'a>(
    task: &'a mut Task,
    message: &'a ClusterMessage,
    sender: &'a NodeRecord,
) -> BoxFuture<'a, ResultCode> {
    Box::pin(async move {
        let body = message.request.coherence();
        if task.sheep.vdis.is_collecting() {
            task.lock_log.push(LockChange::Cohered(body.vid, sender.nid, body.validate != 0));
            return ResultCode::SUCCESS;
        }
        let result = task.sheep.vdis.with_lock(body.vid, |lock| lock.cohere(sender.nid, body.validate != 0));
        result.unwrap_or(ResultCode::NO_VDI)
    })
}

/// ALTER_VDI_COPY.
pub fn alter_vdi_copy<'a>(
    task: &'a mut Task,
    message: &'a ClusterMessage,
    _: &'a NodeRecord,
) -> BoxFuture<'a, ResultCode> {
    Box::pin(async move {
        let body = message.request.vdi_state();
        if body.copy_policy != 0 || !valid_redundancy(body.copies, body.block_size_shift) {
            return ResultCode::INVALID_PARMS;
        }
        match task.sheep.vdis.get(body.new_vid) {
            Some(vdi) if vdi.copy_policy != 0 => return ResultCode::INVALID_PARMS,
            // A node whose table is on its way gets the entry with it.
            None if task.sheep.tables_are_here() => return ResultCode::NO_VDI,
            None => {}
            Some(vdi) => {
                let (sheep, epoch) = (&task.sheep, task.state.epoch());
                let (has_all, losses) = (sheep.recovery.is_idle(), sheep.history.losses());
                tokio::task::block_in_place(|| {
                    let altered = &sheep.recovery.altered;
                    altered.note(body.new_vid, vdi.nr_copies, body.copies, epoch, has_all, losses);
                });
            }
        }
        task.sheep.vdis.alter_copies(body.new_vid, body.copies, body.block_size_shift);
        let actions = task.state.copies_altered();
        apply(task, Ok(actions)).await
    })
}

/// The epoch log of `epoch`: this node's, or another member's, which is kept.
pub async fn epoch_log(sheep: &Arc<Sheep>, epoch: sheepdog_proto::Epoch) -> Option<EpochLog> {
    if let Ok(log) = sheep.meta.read_epoch(epoch) {
        return Some(log);
    }
    let capacity = sheepdog_proto::MAX_NODES * NodeRecord::LEN + 8;
    let view = sheep.views.load();
    for node in view.members().iter().filter(|n| n.nid != sheep.me) {
        let body = sheepdog_proto::header::ObjRequest { tgt_epoch: epoch, ..Default::default() };
        let request = Request::new(sheepdog_proto::Opcode::GET_EPOCH).length(capacity).with_obj(body);
        let deadline = std::time::Duration::from_secs(5);
        let Ok(reply) = sheep.peers.call(&node.nid, request, Bytes::new(), deadline).await else { continue };
        let Ok(log) = reply.success().map_err(drop).and_then(|r| EpochLog::decode(&r.data).map_err(drop))
        else {
            continue;
        };
        if let Err(error) = tokio::task::block_in_place(|| sheep.meta.keep_epoch(epoch, &log)) {
            tracing::warn!("cannot keep the log of epoch {epoch}: {error}");
        }
        return Some(log);
    }
    None
}
