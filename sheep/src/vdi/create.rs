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
use super::tree;
use crate::gateway::hold::hold;
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
    // A derived VDI's map is its base's, whatever the request says: checked when the base is known.
    let derived = !body.base_vdi_id.is_none();
    let limit = if derived { MAX_HYPER_SIZE } else { max_size(body.store_policy, shift) };
    let valid = !name.is_empty()
        && name.len() < MAX_NAME_LEN
        && (MIN_BLOCK_SHIFT..=MAX_BLOCK_SHIFT).contains(&shift)
        && (1..=MAX_COPIES).contains(&usize::from(copies))
        && body.store_policy <= STORE_POLICY_BTREE
        && body.vdi_size <= limit;
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
    let mut params = match check(&sheep.views.load(), &body, payload) {
        Ok(params) => params,
        Err(code) => return (code, VdiResponse::zeroed()),
    };
    let made = derive(sheep, &body, &mut params).await;
    let answer =
        VdiResponse { copies: params.copies, block_size_shift: params.shift, ..VdiResponse::zeroed() };
    match made {
        Ok(vdi_id) => (ResultCode::SUCCESS, VdiResponse { vdi_id, ..answer }),
        Err(code) => (code, answer),
    }
}

async fn derive(sheep: &Arc<Sheep>, body: &VdiRequest, params: &mut Params) -> Result<VdiId, ResultCode> {
    let found = lookup(sheep, &Query::working(&params.name)).await;
    let base = body.base_vdi_id;
    match (body.snapid != 0, found.result) {
        (false, Ok(_)) => return Err(ResultCode::VDI_EXIST),
        (false, Err(ResultCode::NO_VDI)) if base.is_none() => return create(sheep, params, &found).await,
        (false, Err(ResultCode::NO_VDI)) | (true, Ok(_)) => {}
        (_, Err(code)) => return Err(code),
    }
    fit_to_base(sheep, params, base).await?;
    match found.result {
        Ok(working) if base == working => snapshot(sheep, params, &found, working).await,
        Ok(working) => live_rollback(sheep, params, &found, working, base).await,
        Err(_) => clone(sheep, params, &found, base).await,
    }
}

/// A derived VDI has its base's map, so its base's block size, whatever the request says; and its size must fit.
async fn fit_to_base(sheep: &Arc<Sheep>, params: &mut Params, base: VdiId) -> Result<(), ResultCode> {
    let unreadable = |code| {
        tracing::error!("failed to read the base VDI {base:?}: {code}");
        ResultCode::BASE_VDI_READ
    };
    let header = read_lookup_header(sheep, base).await.map_err(unreadable)?;
    if header.is_deleted() {
        return Err(unreadable(ResultCode::NO_VDI));
    }
    params.shift = header.block_size_shift;
    if params.size > max_size(header.store_policy, params.shift) {
        return Err(ResultCode::INVALID_PARMS);
    }
    Ok(())
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
    child.header.store_policy = base.header.store_policy;
    child
}

/// Writes a child, with its index if it is a hypervolume.
async fn write_derived(sheep: &Arc<Sheep>, base: VdiId, child: &mut Inode) -> Result<(), ResultCode> {
    if child.header.store_policy == STORE_POLICY_BTREE {
        tree::copy_index(sheep, base, child).await.map_err(|code| {
            tracing::error!("failed to copy the index of {base:?}: {code}");
            ResultCode::VDI_WRITE
        })?;
    }
    write_child(sheep, child).await
}

/// Writes the inode of an announced vid.
async fn write_child(sheep: &Arc<Sheep>, child: &Inode) -> Result<(), ResultCode> {
    create_inode(sheep, child).await.map_err(|code| {
        tracing::error!("failed to write the inode of {:?}: {code}", child.header.vdi_id);
        ResultCode::VDI_WRITE
    })
}

/// Undoes a derivation that failed half-way, as far as it is certain that its child is nowhere: a child keeps its base a
/// snapshot and counted.
async fn take_back(sheep: &Arc<Sheep>, before: &Inode, marked: Option<VdiId>, child: &Inode) {
    let vid = child.header.vdi_id;
    match sheep.gateway.remove_object(sheep, Oid::inode(vid)).await {
        Ok(()) | Err(ResultCode::NO_OBJ) => {}
        Err(code) => return tracing::error!("{vid:?} was not finished and cannot be removed: {code}"),
    }
    if child.header.store_policy == STORE_POLICY_BTREE {
        tree::remove_index(sheep, child).await;
    }
    if let Err(code) = write_base_grefs(sheep, before).await {
        tracing::error!("{:?} keeps references of a VDI that was not created: {code}", before.header.vdi_id);
    }
    if let Some(working) = marked
        && let Err(code) = mark_snapshot(sheep, working, 0).await
    {
        tracing::error!("{working:?} stays a snapshot without a working VDI: {code}");
    }
}

/// Refuses what the cluster would refuse to write, before anything is announced: an announcement cannot be taken back.
fn check_writable(sheep: &Sheep, params: &Params, base: VdiId, code: ResultCode) -> Result<(), ResultCode> {
    let view = sheep.views.load();
    let base = if base.is_none() { 0 } else { sheep.redundancy(base, &view).copies };
    let copies = params.copies.max(base);
    match crate::gateway::object::refusal(&view, copies, true) {
        Some(refusal) => {
            tracing::error!("no VDI can be written now: {refusal}");
            Err(code)
        }
        None => Ok(()),
    }
}

async fn create(sheep: &Arc<Sheep>, params: &Params, found: &Found) -> Result<VdiId, ResultCode> {
    let vid = free_id(found)?;
    check_writable(sheep, params, VdiId::NONE, ResultCode::VDI_WRITE)?;
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
    let mut inode = read_inode(sheep, base).await.map_err(|code| {
        tracing::error!("failed to read the base VDI {base:?}: {code}");
        ResultCode::BASE_VDI_READ
    })?;
    if inode.header.store_policy == STORE_POLICY_BTREE {
        // What was read is an index, which is copied by itself and has no counts.
        (inode.table, inode.grefs) = (Vec::new(), Vec::new());
    }
    Ok(inode)
}

/// Only snapshots are cloned and rolled back to.
async fn read_base_snapshot(sheep: &Arc<Sheep>, base: VdiId) -> Result<Inode, ResultCode> {
    let inode = read_base(sheep, base).await?;
    if inode.header.is_snapshot() { Ok(inode) } else { Err(ResultCode::INVALID_PARMS) }
}

async fn write_base_grefs(sheep: &Arc<Sheep>, base: &Inode) -> Result<(), ResultCode> {
    if base.grefs.is_empty() {
        return Ok(());
    }
    let oid = Oid::inode(base.header.vdi_id);
    sheep.gateway.write_object(sheep, oid, GREF_OFFSET as u64, base.encode_grefs()).await
}

async fn snapshot(
    sheep: &Arc<Sheep>,
    params: &Params,
    found: &Found,
    working: VdiId,
) -> Result<VdiId, ResultCode> {
    let vid = free_id(found)?;
    check_writable(sheep, params, working, ResultCode::BASE_VDI_WRITE)?;
    let mut no_updates = hold(sheep, working).await?;
    announce(sheep, working, vid, params).await?;
    // From now on new entries of the old vid are refused.
    no_updates.becomes_snapshot();
    map::settle_snapshot(sheep, working, no_updates.deaf()).await;
    let before = read_base(sheep, working).await?;
    let mut base = before.clone();
    base.count_copy();
    let time = inode_time();
    let mut child = child_of(&base, params, vid, before.header.snap_id.wrapping_add(1), time);
    let made = async {
        write_base_grefs(sheep, &base).await.map_err(|_| ResultCode::BASE_VDI_WRITE)?;
        mark_snapshot(sheep, working, time).await.map_err(|_| ResultCode::BASE_VDI_WRITE)?;
        write_derived(sheep, working, &mut child).await
    };
    if let Err(code) = made.await {
        take_back(sheep, &before, Some(working), &child).await;
        return Err(code);
    }
    no_updates.let_go().await;
    Ok(vid)
}

async fn mark_snapshot(sheep: &Arc<Sheep>, vid: VdiId, time: u64) -> Result<(), ResultCode> {
    let bytes = Bytes::copy_from_slice(&time.to_le_bytes());
    sheep.gateway.write_object(sheep, Oid::inode(vid), SNAP_CTIME_AT, bytes).await
}

async fn clone(sheep: &Arc<Sheep>, params: &Params, found: &Found, base: VdiId) -> Result<VdiId, ResultCode> {
    let vid = free_id(found)?;
    let _no_updates = hold(sheep, base).await?;
    let before = read_base_snapshot(sheep, base).await?;
    check_writable(sheep, params, base, ResultCode::BASE_VDI_WRITE)?;
    // A base of another policy keeps its own on all nodes only if it is not named (spec 05, section 7).
    // Under -R the table's parents decide which ids are free again, and in hypervolumes which blocks are: there the base
    // must be named.
    let hyper = before.header.store_policy == STORE_POLICY_BTREE;
    let same_policy = before.header.copy_policy == params.policy.to_byte();
    let recycle = sheep.views.load().flags.contains(ClusterFlags::RECYCLE_VID);
    announce(sheep, if same_policy || recycle || hyper { base } else { VdiId::NONE }, vid, params).await?;
    let mut counted = before.clone();
    counted.count_copy();
    let mut child = child_of(&counted, params, vid, found.next_snap_id, inode_time());
    let made = async {
        write_base_grefs(sheep, &counted).await.map_err(|_| ResultCode::BASE_VDI_WRITE)?;
        write_derived(sheep, base, &mut child).await
    };
    if let Err(code) = made.await {
        take_back(sheep, &before, None, &child).await;
        return Err(code);
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
    let _no_updates = hold(sheep, base).await?;
    let before = read_base_snapshot(sheep, base).await?;
    check_writable(sheep, params, base, ResultCode::VDI_WRITE)?;
    let mut left = hold(sheep, working).await?;
    announce(sheep, working, vid, params).await?;
    left.becomes_snapshot();
    map::settle_snapshot(sheep, working, left.deaf()).await;
    let time = inode_time();
    let mut counted = before.clone();
    counted.count_copy();
    let mut child = child_of(&counted, params, vid, found.next_snap_id, time);
    let made = async {
        mark_snapshot(sheep, working, time).await.map_err(|_| ResultCode::VDI_WRITE)?;
        write_base_grefs(sheep, &counted).await.map_err(|_| ResultCode::VDI_WRITE)?;
        write_derived(sheep, base, &mut child).await
    };
    if let Err(code) = made.await {
        take_back(sheep, &before, Some(working), &child).await;
        return Err(code);
    }
    left.let_go().await;
    Ok(vid)
}
