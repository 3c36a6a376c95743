//! The gateway: client object requests, fanned out to the nodes that store the object (spec 06, sections 3 to 6).
//!
//! [`execute`] checks a request and adds its side effects (copy-on-write, reference counting on table updates);
//! [`object`] brings one object operation to all replicas, with the one retry loop there is; [`grants`] decides whether
//! directly or through the object's first home ([`arbiter`], [`sequencer`]); [`op`] is a single attempt in one epoch,
//! by [`replicas`], or [`coded`] for erasure-coded objects; [`numbers`] tells homes which writes are done; [`map`]
//! updates block tables, [`guard`] inode headers, [`hold`] keeps both out while a VDI is derived; [`drops`] drops
//! references.

pub mod arbiter;
pub mod coded;
mod drops;
pub mod grants;
mod guard;
pub mod hold;
pub mod map;
pub mod numbers;
pub mod object;
mod op;
pub mod replicas;
pub mod sequencer;

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use sheepdog_client::Reply;
use sheepdog_proto::inode::{GREF_OFFSET, INODE_LOOKUP_LEN, TABLE_OFFSET, is_table_update};
use sheepdog_proto::{Flags, ObjectKind, Oid, Opcode, Request, Response, ResultCode, VdiId};

use self::arbiter::Arbiter;
use self::grants::Grants;
use self::hold::Holds;
use self::numbers::Numbers;
use crate::clients::Client;
use crate::order::Order;
use crate::peer::check_range;
use crate::sheep::Sheep;
use crate::vdi::locks::Participation;
use crate::vdi::reclaim::Reclaim;

/// Requests in progress at this gateway.
pub struct Gateway {
    /// Order of requests per object.
    order: Order,
    /// Serialises table updates per VDI.
    maps: Order,
    /// References to drop in the background.
    pub reclaim: Reclaim,
    /// VDIs that this gateway may use directly.
    pub grants: Grants,
    /// Claims of gateways that this node decides.
    pub arbiter: Arbiter,
    /// Numbers of the writes in progress.
    pub numbers: Numbers,
    /// VDIs whose table updates other nodes hold back.
    pub holds: Holds,
    /// Shared VDIs whose table changed here while the client's inode was stale: it must read the inode again.
    stale: Mutex<HashSet<VdiId>>,
}

impl Gateway {
    /// A gateway with nothing in progress.
    pub fn new(reclaim: Reclaim) -> Gateway {
        Gateway {
            order: Order::default(),
            maps: Order::default(),
            reclaim,
            grants: Grants::default(),
            arbiter: Arbiter::default(),
            numbers: Numbers::default(),
            holds: Holds::default(),
            stale: Mutex::default(),
        }
    }
}

/// The inode length that QEMU and tgt read to refresh their cached inode.
const REFRESH_LEN: usize = GREF_OFFSET;

fn reply(request: &Request, result: ResultCode) -> Reply {
    Reply::empty(Response::to(request, result))
}

/// An answer with data.
pub fn reply_data(request: &Request, data: Bytes) -> Reply {
    let response = Response { data_length: data.len() as u32, ..Response::to(request, ResultCode::SUCCESS) };
    Reply { response, data }
}

/// Executes a gateway request of a client.
pub async fn execute(sheep: &Arc<Sheep>, client: &Client, request: Request, payload: Bytes) -> Reply {
    let _active = sheep.stats.gateway(&request);
    sheep.tables_arrived().await;
    match request.opcode {
        Opcode::READ_OBJ => match read(sheep, &request).await {
            Ok(data) => reply_data(&request, data),
            Err(result) => reply(&request, result),
        },
        Opcode::WRITE_OBJ | Opcode::CREATE_AND_WRITE_OBJ => {
            let result = write(sheep, client, &request, payload).await;
            reply(&request, result.err().unwrap_or(ResultCode::SUCCESS))
        }
        Opcode::REMOVE_OBJ => {
            let result = sheep.gateway.remove_object(sheep, request.obj().oid).await;
            reply(&request, result.err().unwrap_or(ResultCode::SUCCESS))
        }
        Opcode::DECREF_OBJ => {
            let result = sheep.gateway.decref_object(sheep, request.reference()).await;
            reply(&request, result.err().unwrap_or(ResultCode::SUCCESS))
        }
        _ => reply(&request, ResultCode::INVALID_PARMS),
    }
}

/// A read answered without waiting for anything, if its data is in this node's page cache.
pub fn try_read_inline(sheep: &Arc<Sheep>, request: &Request) -> Option<Reply> {
    let body = request.obj();
    let len = request.data_length as usize;
    if request.flags.contains(Flags::WRITE) || request.flags.contains(Flags::TGT) {
        return None;
    }
    let view = sheep.views.load();
    let store = sheep.store.as_ref()?;
    let redundancy = sheep.redundancy(body.oid.vid(), &view);
    let size = body.oid.size(redundancy.block_size_shift);
    if len as u64 > size || object::is_coded(body.oid, &redundancy) {
        return None;
    }
    view.my_position(body.oid, redundancy.copies)?;
    if !sheep.recovery.is_idle() || !sheep.intents.all_settled() {
        return None;
    }
    let offset = u64::from(body.offset);
    let free = !body.oid.follows_policy() || redundancy.snapshot;
    let using = sheep.gateway.grants.begin_directly(body.oid.vid(), view.epoch, false);
    if !free && using.is_none() {
        return None;
    }
    let _turn = sheep.gateway.order.try_turn(body.oid, offset..offset + len as u64, false)?;
    let data = store.try_read_cached(Sheep::replica(body.oid), offset, len)?.ok()?;
    let _active = sheep.stats.gateway(request);
    Some(reply_data(request, data))
}

/// Whether the request must be refused because this node's client holds a stale inode (spec 01, 8.1 and 17.2).
fn is_invalidated(sheep: &Sheep, request: &Request, oid: Oid) -> bool {
    request.flags.contains(Flags::TGT)
        && (map::participation(sheep, oid.vid()) == Some(Participation::Invalidated)
            || sheep.gateway.stale.lock().contains(&oid.vid()))
}

async fn read(sheep: &Arc<Sheep>, request: &Request) -> Result<Bytes, ResultCode> {
    let body = request.obj();
    let refresh = body.oid.is_inode() && body.offset == 0 && request.data_length as usize == REFRESH_LEN;
    if !refresh && is_invalidated(sheep, request, body.oid) {
        return Err(ResultCode::INODE_INVALIDATED);
    }
    let len = request.data_length as usize;
    if refresh {
        sheep.gateway.stale.lock().remove(&body.oid.vid());
        map::validate_refresh(sheep, body.oid.vid()).await;
    }
    sheep.gateway.read_object(sheep, body.oid, body.offset.into(), len).await
}

async fn write(
    sheep: &Arc<Sheep>,
    client: &Client,
    request: &Request,
    payload: Bytes,
) -> Result<(), ResultCode> {
    let body = request.obj();
    let oid = body.oid;
    if !request.flags.contains(Flags::WRITE) {
        return Err(ResultCode::INVALID_PARMS);
    }
    // New entries are taken from a client with a stale inode, too: if it read the inode first it would forget them.
    let offset = u64::from(body.offset);
    let adds = oid.is_inode()
        && is_table_update(offset, payload.len() as u64)
        && payload.iter().any(|byte| *byte != 0);
    if !adds && is_invalidated(sheep, request, oid) {
        return Err(ResultCode::INODE_INVALIDATED);
    }
    let view = sheep.views.load();
    let redundancy = sheep.redundancy(oid.vid(), &view);
    if oid.is_data() && payload.is_empty() {
        // How another node asks whether this one knows of a snapshot and is done with what came before.
        drop(sheep.gateway.map_barrier(oid.vid()).await);
    }
    if oid.is_data() && sheep.redundancy(oid.vid(), &view).snapshot {
        return Err(ResultCode::READONLY);
    }
    let in_table = oid.is_inode() && offset >= TABLE_OFFSET as u64;
    let content = matches!(oid.kind(), ObjectKind::Data | ObjectKind::VmState | ObjectKind::Btree);
    if (content || in_table) && sheep.holders.refuses(sheep, client, oid.vid(), request.flags).await {
        return Err(ResultCode::VDI_LOCKED);
    }
    // Index nodes of a hypervolume: not while a snapshot copies them, and not into a snapshot.
    let index = oid.kind() == ObjectKind::Btree;
    let _index = if index { Some(sheep.gateway.index_turn(oid.vid()).await) } else { None };
    if index && sheep.redundancy(oid.vid(), &sheep.views.load()).snapshot {
        return Err(ResultCode::READONLY);
    }
    let len = payload.len() as u64;
    check_range(offset, len, oid.size(redundancy.block_size_shift))?;
    if request.opcode == Opcode::CREATE_AND_WRITE_OBJ {
        let new = match request.flags.contains(Flags::COW) {
            true => copy_on_write(sheep, oid, body.cow_oid, offset, payload).await?,
            false => NewObject { offset, new: 0..payload.len(), data: payload },
        };
        return create(sheep, oid, new).await;
    }
    if oid.is_inode() && offset >= TABLE_OFFSET as u64 && offset < GREF_OFFSET as u64 {
        if !is_table_update(offset, len) || !offset.is_multiple_of(4) || !len.is_multiple_of(4) {
            return Err(ResultCode::INVALID_PARMS);
        }
        if !map::is_btree(sheep, oid.vid()).await? {
            let by = match request.flags.contains(Flags::TGT) {
                true => map::By::Target(client.since),
                false => map::By::Client(client.since),
            };
            return map::update(sheep, oid.vid(), offset, payload, by).await;
        }
    }
    let into_table = offset < TABLE_OFFSET as u64 && offset + len > TABLE_OFFSET as u64;
    if oid.is_inode() && (offset < INODE_LOOKUP_LEN as u64 || into_table) {
        return guard::write_header(sheep, oid, offset, payload).await;
    }
    sheep.gateway.write_object(sheep, oid, offset, payload).await
}

/// What a creation makes of an object, and the part of it that the client wrote.
struct NewObject {
    offset: u64,
    data: Bytes,
    new: Range<usize>,
}

/// Creates an object. Of a VDI that is shared another client may have created it a moment ago, and its table told neither of
/// them: what that one wrote stays (spec 05, 17). Who has a VDI alone replaces what is there.
async fn create(sheep: &Arc<Sheep>, oid: Oid, object: NewObject) -> Result<(), ResultCode> {
    let NewObject { offset, data, new } = object;
    if oid.is_data() && sheep.vdis.with_lock(oid.vid(), |lock| lock.is_shared()) == Some(true) {
        return sheep.gateway.add_to_object(sheep, oid, offset, data, new).await;
    }
    sheep.gateway.create_object(sheep, oid, offset, data).await
}

/// The whole of `base`, overlaid by `payload` (spec 06, 6.5).
async fn copy_on_write(
    sheep: &Arc<Sheep>,
    oid: Oid,
    base: Oid,
    offset: u64,
    payload: Bytes,
) -> Result<NewObject, ResultCode> {
    let view = sheep.views.load();
    let size = sheep.size_of(oid, &view);
    let new = offset as usize..offset as usize + payload.len();
    if payload.len() as u64 == size {
        return Ok(NewObject { offset: 0, data: payload, new });
    }
    let base_size = sheep.size_of(base, &view).min(size) as usize;
    let old = sheep.gateway.read_object(sheep, base, 0, base_size).await?;
    let mut whole = sheepdog_buffer::PageBuf::dirty(size as usize);
    whole[..base_size].copy_from_slice(&old);
    whole[base_size..].fill(0);
    whole[new.clone()].copy_from_slice(&payload);
    Ok(NewObject { offset: 0, data: whole.freeze(), new })
}
