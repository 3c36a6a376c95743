//! NEW_VDI: create, snapshot, clone, roll back (spec 05, sections 4 and 6 to 8).
//!
//! The work part runs on one node while the cluster is blocked. Order: nothing is announced before it is known that it
//! can be done; the base's counts are written before the child, so that a failure in between leaks and never loses.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use sheepdog_proto::btree::BtreeNode;
use sheepdog_proto::header::{VdiRequest, VdiResponse, VdiStateRequest};
use sheepdog_proto::inode::{GREF_OFFSET, InodeHeader, STORE_POLICY_BTREE, STORE_POLICY_FLAT};
use sheepdog_proto::{
    ClusterFlags, CopyPolicy, MAX_BLOCK_SHIFT, MAX_COPIES, MAX_DATA_OBJS, MAX_NAME_LEN, MIN_BLOCK_SHIFT, Oid,
    Opcode, Request, ResultCode, VdiId, cstr,
};

use super::lookup::{Found, Query, lookup};
use super::objects::{Inode, create_inode, read_inode, read_lookup_header};
use crate::gateway::map;
use crate::sheep::Sheep;
use crate::view::View;

/// Offset of `snap_ctime` in an inode.
const SNAP_CTIME_AT: u64 = 520;
/// Largest hypervolume in bytes: 2^32 blocks of 4 MiB.
const MAX_HYPER_SIZE: u64 = 1 << 54;

/// A checked request.
struct Params {
    name: Vec<u8>,
    size: u64,
    copies: u8,
    policy: CopyPolicy,
    shift: u8,
    store_policy: u8,
}

/// Now, as inodes store it: seconds in the upper half, nanoseconds (of microsecond resolution) in the lower.
pub fn inode_time() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_secs() << 32 | u64::from(now.subsec_micros() * 1000)
}

fn check(view: &View, body: &VdiRequest, payload: &[u8]) -> Result<Params, ResultCode> {
    if payload.len() != MAX_NAME_LEN {
        return Err(ResultCode::INVALID_PARMS);
    }
    let (copies, policy) = match body.copies {
        0 => (view.nr_copies, view.copy_policy),
        copies => (copies, body.copy_policy),
    };
    let policy = CopyPolicy::from_byte(policy).map_err(|_| ResultCode::INVALID_PARMS)?;
    let copies = if policy.is_erasure() { policy.strips() } else { copies };
    let shift = if body.block_size_shift == 0 { view.block_size_shift } else { body.block_size_shift };
    let name = cstr(payload);
    let valid = !name.is_empty()
        && name.len() < MAX_NAME_LEN
        && (MIN_BLOCK_SHIFT..=MAX_BLOCK_SHIFT).contains(&shift)
        && (1..=MAX_COPIES).contains(&usize::from(copies))
        && body.store_policy <= STORE_POLICY_BTREE
        && body.vdi_size <= max_size(body.store_policy, shift);
    if !valid {
        return Err(ResultCode::INVALID_PARMS);
    }
    Ok(Params {
        name: name.to_vec(),
        size: body.vdi_size,
        copies,
        policy,
        shift,
        store_policy: body.store_policy,
    })
}

fn max_size(store_policy: u8, shift: u8) -> u64 {
    if store_policy == STORE_POLICY_FLAT { (MAX_DATA_OBJS as u64) << shift } else { MAX_HYPER_SIZE }
}

/// Work part of NEW_VDI: the result, and an answer that names the new working VDI. Copies and block size are told with
/// errors, too.
pub async fn new_vdi(sheep: &Arc<Sheep>, request: &Request, payload: &[u8]) -> (ResultCode, VdiResponse) {
    let body = request.vdi();
    let params = match check(&sheep.views.load(), &body, payload) {
        Ok(params) => params,
        Err(code) => return (code, VdiResponse::zeroed()),
    };
    let answer =
        VdiResponse { copies: params.copies, block_size_shift: params.shift, ..VdiResponse::zeroed() };
    match derive(sheep, &body, &params).await {
        Ok(vdi_id) => (ResultCode::SUCCESS, VdiResponse { vdi_id, ..answer }),
        Err(code) => (code, answer),
    }
}

async fn derive(sheep: &Arc<Sheep>, body: &VdiRequest, params: &Params) -> Result<VdiId, ResultCode> {
    let found = lookup(sheep, &Query::working(&params.name)).await;
    let base = body.base_vdi_id;
    match (body.snapid != 0, found.result) {
        (false, Ok(_)) => Err(ResultCode::VDI_EXIST),
        (false, Err(ResultCode::NO_VDI)) if base.is_none() => create(sheep, params, &found).await,
        (false, Err(ResultCode::NO_VDI)) => clone(sheep, params, &found, base).await,
        (true, Ok(working)) if base == working => snapshot(sheep, params, &found, working).await,
        (true, Ok(working)) => live_rollback(sheep, params, &found, working, base).await,
        (_, Err(code)) => Err(code),
    }
}

/// Tells every node that `old` is a snapshot and how objects of `new` are stored, and waits until it is so here.
async fn announce(sheep: &Arc<Sheep>, old: VdiId, new: VdiId, params: &Params) -> Result<(), ResultCode> {
    let body = VdiStateRequest {
        old_vid: old,
        new_vid: new,
        copies: params.copies,
        set_bitmap: 0,
        copy_policy: params.policy.to_byte(),
        block_size_shift: params.shift,
    };
    let request = Request::new(Opcode::NOTIFY_VDI_ADD).with_vdi_state(body);
    sheep.cluster.submit_internal(request, Bytes::new()).await.response.result.ok()
}

fn free_id(found: &Found) -> Result<VdiId, ResultCode> {
    found.free.ok_or(ResultCode::FULL_VDI)
}

fn new_inode(params: &Params, vid: VdiId, snap_id: u32, parent: VdiId, time: u64) -> Inode {
    let header = InodeHeader {
        name: sheepdog_proto::fixed_str(&params.name),
        create_time: time,
        vdi_size: params.size,
        copy_policy: params.policy.to_byte(),
        store_policy: params.store_policy,
        nr_copies: params.copies,
        block_size_shift: params.shift,
        snap_id,
        vdi_id: vid,
        parent_vdi_id: parent,
        ..InodeHeader::zeroed()
    };
    Inode { header, table: Vec::new(), grefs: Vec::new() }
}

fn child_of(base: &Inode, params: &Params, vid: VdiId, snap_id: u32, time: u64) -> Inode {
    let mut child = new_inode(params, vid, snap_id, base.header.vdi_id, time);
    child.table = base.table.clone();
    child.grefs = base.derived_grefs();
    child
}

/// Writes the inode of an announced vid; if that fails the vid is a phantom.
async fn write_child(sheep: &Arc<Sheep>, child: &Inode) -> Result<(), ResultCode> {
    let vid = child.header.vdi_id;
    create_inode(sheep, child).await.map_err(|code| {
        tracing::error!("failed to write the inode of {vid:?}: {code}");
        sheep.vdis.mark_phantom(vid);
        let sheep = sheep.clone();
        tokio::spawn(async move { sheep.gateway.remove_object(&sheep, Oid::inode(vid)).await });
        ResultCode::VDI_WRITE
    })
}

async fn create(sheep: &Arc<Sheep>, params: &Params, found: &Found) -> Result<VdiId, ResultCode> {
    let vid = free_id(found)?;
    announce(sheep, found.survivor, vid, params).await?;
    let mut inode = new_inode(params, vid, found.next_snap_id, VdiId::NONE, inode_time());
    if params.store_policy == STORE_POLICY_BTREE {
        let root = BtreeNode::Leaf(Vec::new()).encode();
        inode.table = sheepdog_proto::inode::table(&root).iter().map(|v| v.get()).collect();
    }
    write_child(sheep, &inode).await?;
    Ok(vid)
}

async fn read_base(sheep: &Arc<Sheep>, base: VdiId) -> Result<Inode, ResultCode> {
    let inode = read_inode(sheep, base).await.map_err(|code| {
        tracing::error!("failed to read the base VDI {base:?}: {code}");
        ResultCode::BASE_VDI_READ
    })?;
    if inode.header.store_policy == STORE_POLICY_BTREE {
        return Err(ResultCode::NO_SUPPORT);
    }
    Ok(inode)
}

async fn write_base_grefs(sheep: &Arc<Sheep>, base: &Inode) -> Result<(), ResultCode> {
    let oid = Oid::inode(base.header.vdi_id);
    sheep.gateway.write_object(sheep, oid, GREF_OFFSET as u64, base.encode_grefs()).await
}

/// Undoes what a failed derivation wrote into its base, if that is still possible.
async fn restore_base(sheep: &Arc<Sheep>, before: &Inode, code: ResultCode) -> ResultCode {
    if let Err(e) = write_base_grefs(sheep, before).await {
        tracing::error!("{:?} keeps references of a VDI that was not created: {e}", before.header.vdi_id);
    }
    code
}

async fn snapshot(
    sheep: &Arc<Sheep>,
    params: &Params,
    found: &Found,
    working: VdiId,
) -> Result<VdiId, ResultCode> {
    let vid = free_id(found)?;
    let header = read_lookup_header(sheep, working).await.map_err(|_| ResultCode::BASE_VDI_READ)?;
    if header.store_policy == STORE_POLICY_BTREE {
        return Err(ResultCode::NO_SUPPORT);
    }
    announce(sheep, working, vid, params).await?;
    // Only now the table is final: from the announcement on, new entries of the old vid are refused.
    map::settle_snapshot(sheep, working).await;
    let _no_updates = sheep.gateway.map_barrier(working).await;
    let before = read_base(sheep, working).await?;
    let mut base = before.clone();
    base.count_copy();
    let time = inode_time();
    write_base_grefs(sheep, &base).await.map_err(|_| ResultCode::BASE_VDI_WRITE)?;
    mark_snapshot(sheep, working, time).await.map_err(|_| ResultCode::BASE_VDI_WRITE)?;
    let child = child_of(&base, params, vid, before.header.snap_id.wrapping_add(1), time);
    if let Err(code) = write_child(sheep, &child).await {
        return Err(restore_base(sheep, &before, code).await);
    }
    Ok(vid)
}

async fn mark_snapshot(sheep: &Arc<Sheep>, vid: VdiId, time: u64) -> Result<(), ResultCode> {
    let bytes = Bytes::copy_from_slice(&time.to_le_bytes());
    sheep.gateway.write_object(sheep, Oid::inode(vid), SNAP_CTIME_AT, bytes).await
}

async fn clone(sheep: &Arc<Sheep>, params: &Params, found: &Found, base: VdiId) -> Result<VdiId, ResultCode> {
    let vid = free_id(found)?;
    let _no_updates = sheep.gateway.map_barrier(base).await;
    let before = read_base(sheep, base).await?;
    if !before.header.is_snapshot() {
        return Err(ResultCode::INVALID_PARMS);
    }
    // A base of another policy keeps its own on all nodes only if it is not named (spec 05, section 7).
    // Under -R the table's parents decide which ids are free again: there the base must be named.
    let same_policy = before.header.copy_policy == params.policy.to_byte();
    let recycle = sheep.views.load().flags.contains(ClusterFlags::RECYCLE_VID);
    announce(sheep, if same_policy || recycle { base } else { VdiId::NONE }, vid, params).await?;
    let mut counted = before.clone();
    counted.count_copy();
    write_base_grefs(sheep, &counted).await.map_err(|_| ResultCode::BASE_VDI_WRITE)?;
    let child = child_of(&counted, params, vid, found.next_snap_id, inode_time());
    if let Err(code) = write_child(sheep, &child).await {
        return Err(restore_base(sheep, &before, code).await);
    }
    Ok(vid)
}

/// The working VDI becomes a snapshot and the name goes on from `base` (spec 05, section 8 b).
async fn live_rollback(
    sheep: &Arc<Sheep>,
    params: &Params,
    found: &Found,
    working: VdiId,
    base: VdiId,
) -> Result<VdiId, ResultCode> {
    let vid = free_id(found)?;
    let _no_updates = sheep.gateway.map_barrier(base).await;
    let before = read_base(sheep, base).await?;
    if !before.header.is_snapshot() {
        return Err(ResultCode::INVALID_PARMS);
    }
    announce(sheep, working, vid, params).await?;
    map::settle_snapshot(sheep, working).await;
    let time = inode_time();
    mark_snapshot(sheep, working, time).await.map_err(|_| ResultCode::VDI_WRITE)?;
    let mut counted = before.clone();
    counted.count_copy();
    write_base_grefs(sheep, &counted).await.map_err(|_| ResultCode::VDI_WRITE)?;
    let child = child_of(&counted, params, vid, found.next_snap_id, time);
    if let Err(code) = write_child(sheep, &child).await {
        return Err(restore_base(sheep, &before, code).await);
    }
    Ok(vid)
}
