//! This node's objects: existence, hashes, lists, repair; and the discard of a block.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, join_all};
use sheepdog_client::Reply;
use sheepdog_proto::header::{HashResponse, ObjRequest};
use sheepdog_proto::inode::table_offset;
use sheepdog_proto::{Epoch, Flags, NodeId, Oid, Opcode, Request, ResultCode, Wire};
use sheepdog_store::{DigestOf, StoreError, SyncMode};

use super::{list, result};
use crate::gateway::map;
use crate::gateway::object::is_coded;
use crate::holds::Held;
use crate::sheep::Sheep;
use crate::view::View;

/// How long a hash or list request of a newer epoch waits for this node to get there.
const EPOCH_WAIT: Duration = Duration::from_secs(5);
/// Deadline of a flush on another node.
const FLUSH_DEADLINE: Duration = Duration::from_secs(60);
/// How often a repair waits for writes in progress, and the pause between.
const QUIET_TRIES: u32 = 20;
const QUIET_PAUSE: Duration = Duration::from_millis(100);
/// Deadline of a repair copy.
const REPAIR_DEADLINE: Duration = Duration::from_secs(30);

fn is_here(sheep: &Sheep, oid: Oid) -> bool {
    let view = sheep.views.load();
    let coded = is_coded(oid, &sheep.redundancy(oid.vid(), &view));
    let name =
        if coded { sheep.my_replica(oid, &view).map(|(name, _)| name) } else { Some(Sheep::replica(oid)) };
    sheep.store.as_ref().zip(name).is_some_and(|(store, name)| store.exists(name))
}

/// EXIST.
pub fn exist<'a>(sheep: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        let here = is_here(sheep, request.obj().oid);
        result(&request, if here { ResultCode::SUCCESS } else { ResultCode::NO_OBJ })
    })
}

/// OIDS_EXIST: answers those that are not here.
pub fn oids_exist<'a>(sheep: &'a Arc<Sheep>, request: Request, payload: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        let missing = payload.chunks_exact(8).map(Oid::get).filter(|oid| !is_here(sheep, *oid));
        let missing: Vec<u8> = missing.flat_map(|oid| oid.0.to_le_bytes()).collect();
        if missing.is_empty() {
            return result(&request, ResultCode::SUCCESS);
        }
        let mut reply = list(&request, missing);
        if reply.response.result.is_ok() {
            reply.response.result = ResultCode::NO_OBJ;
        }
        reply
    })
}

/// GET_OBJ_LIST.
pub fn get_obj_list<'a>(sheep: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        // A list of an earlier epoch could lack what is being created in it right now.
        if let Err(code) = at_epoch(sheep, request.epoch).await {
            return result(&request, code);
        }
        let mut oids = sheep.store.as_ref().map(|s| s.list()).unwrap_or_default();
        oids.extend(sheep.early.oids());
        list(&request, oids.iter().flat_map(|oid| oid.0.to_le_bytes()).collect())
    })
}

/// GET_HASH. A question of a newer epoch waits for that epoch: until then replica writes of the old one may be on
/// their way to the object.
pub fn get_hash<'a>(sheep: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        let body = request.obj();
        let digest = hash_of(sheep, &request, body.oid, body.tgt_epoch, false).await;
        digest_reply(sheep, &request, body.oid, digest)
    })
}

/// ORDER_PEER, DIGEST: as GET_HASH, at the cost of what is not zero.
pub async fn digest(sheep: &Arc<Sheep>, request: &Request) -> Reply {
    let body = request.order();
    let digest = hash_of(sheep, request, body.oid, Epoch(body.serial), true).await;
    digest_reply(sheep, request, body.oid, digest)
}

fn digest_reply(
    sheep: &Arc<Sheep>,
    request: &Request,
    oid: Oid,
    digest: Result<[u8; 20], ResultCode>,
) -> Reply {
    let mut reply = result(request, digest.as_ref().err().copied().unwrap_or(ResultCode::SUCCESS));
    reply.response = match digest {
        Ok(digest) => reply.response.with_hash(HashResponse { digest }),
        Err(ResultCode::NO_OBJ) => sheep.tombstones.mark(oid, reply.response),
        Err(_) => reply.response,
    };
    reply
}

/// The view once this node has reached `epoch`.
async fn at_epoch(sheep: &Arc<Sheep>, epoch: Epoch) -> Result<Arc<View>, ResultCode> {
    let wait = sheep.views.until(|view| !view.epoch.is_before(epoch));
    tokio::time::timeout(EPOCH_WAIT, wait).await.map_err(|_| ResultCode::NETWORK_ERROR)
}

async fn hash_of(
    sheep: &Arc<Sheep>,
    request: &Request,
    oid: Oid,
    tgt_epoch: Epoch,
    blocks: bool,
) -> Result<[u8; 20], ResultCode> {
    let view = at_epoch(sheep, request.epoch).await?;
    let store = sheep.store.as_ref().ok_or(ResultCode::NO_OBJ)?;
    let redundancy = sheep.redundancy(oid.vid(), &view);
    if is_coded(oid, &redundancy) {
        return Err(ResultCode::NO_OBJ);
    }
    let size = oid.size(redundancy.block_size_shift);
    let replica = Sheep::replica(oid);
    let of = match redundancy.snapshot && oid.is_data() {
        _ if blocks => DigestOf::Blocks,
        true => DigestOf::Frozen,
        false => DigestOf::All,
    };
    // When recovery asks, an unreadable file is not the same as none, and "none" must be true for that epoch. For a check
    // (`dog` names no epoch) it is: a replica to be replaced.
    let fault = |e: StoreError| match request.epoch {
        Epoch(0) => crate::faults::peer_result(sheep, &e),
        _ => crate::faults::recovery_result(sheep, &e),
    };
    let open = sheep.early.has_of(oid, view.epoch);
    let here = match open {
        // The last writes of it are still to become part of the file.
        true if store.exists(replica) && request.epoch != Epoch(0) => return Err(ResultCode::AGAIN),
        true => Err(StoreError::NoObject),
        false => store.hash(replica, size, None, of).await,
    };
    match here {
        Err(StoreError::NoObject) if tgt_epoch != Epoch(0) => {
            match store.hash(replica, size, Some(tgt_epoch), of).await {
                Err(StoreError::NoObject)
                    if !sheep.history.covers(tgt_epoch) || sheep.early.has_of(oid, tgt_epoch) =>
                {
                    Err(ResultCode::AGAIN)
                }
                other => other.map_err(fault),
            }
        }
        other => other.map_err(fault),
    }
}

/// REPAIR_REPLICA: replaces this node's replica by a copy of the given node's.
pub fn repair_replica<'a>(sheep: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        let body = request.forward();
        let outcome = repair(sheep, body.oid, body.node(), Flags::default()).await;
        result(&request, outcome.err().unwrap_or(ResultCode::SUCCESS))
    })
}

/// Replaces this node's replica by a copy of a member's, read with `flags`. Writes in progress are not undone.
pub async fn repair(sheep: &Arc<Sheep>, oid: Oid, source: NodeId, flags: Flags) -> Result<(), ResultCode> {
    let store = sheep.store.as_ref().ok_or(ResultCode::NO_OBJ)?;
    let view = sheep.views.load();
    let redundancy = sheep.redundancy(oid.vid(), &view);
    // Only a member's replica may replace this one: the address comes from a client.
    if !view.is_member(&source) || source == sheep.me || is_coded(oid, &redundancy) {
        return Err(ResultCode::INVALID_PARMS);
    }
    let size = oid.size(redundancy.block_size_shift);
    let read = Request::new(Opcode::READ_PEER)
        .flag(flags)
        .epoch(view.epoch)
        .length(size as usize)
        .with_obj(ObjRequest { oid, ..ObjRequest::zeroed() });
    let replica = Sheep::replica(oid);
    // Writes that reach this replica while the copy is made would be undone by it: hold them back, from whatever
    // gateway they come, and let those in progress end. The source has them first, or they follow the copy.
    let _held = hold_quiet(sheep, oid).await?;
    let reply = sheep.peers.call(&source, read, Bytes::new(), REPAIR_DEADLINE).await;
    let reply = reply.map_err(|_| ResultCode::NETWORK_ERROR)?;
    reply.response.result.ok()?;
    let _pass = sheep.gate.enter(view.epoch).ok_or(ResultCode::OLD_NODE_VER)?;
    if let Ok(mine) = store.read(replica, 0, size as usize).await
        && mine == reply.data
    {
        return Ok(());
    }
    store.create(replica, size, 0, reply.data).await.map_err(|e| crate::faults::peer_result(sheep, &e))
}

/// Holds an object once every write of it that came here is done on all homes: the source has it, too.
async fn hold_quiet(sheep: &Arc<Sheep>, oid: Oid) -> Result<Held, ResultCode> {
    for _ in 0..QUIET_TRIES {
        let held = sheep.holds.hold(oid).await;
        sheep.gate.drain().await;
        if sheep.intents.becomes_quiet(oid).await {
            return Ok(held);
        }
        // One of them may be waiting for this home, where it is sent again.
        drop(held);
        tokio::time::sleep(QUIET_PAUSE).await;
    }
    Err(ResultCode::NETWORK_ERROR)
}

/// DISCARD_OBJ: gives a block back through the reference count; snapshots are read-only. Our own clients send as many
/// entries, zeros, as there are adjacent blocks to give back.
pub fn discard<'a>(sheep: &'a Arc<Sheep>, request: Request, payload: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        let entries = if payload.is_empty() { sheepdog_buffer::zeros(4) } else { payload };
        let outcome = discard_blocks(sheep, request.obj().oid, entries).await;
        result(&request, outcome.err().unwrap_or(ResultCode::SUCCESS))
    })
}

async fn discard_blocks(sheep: &Arc<Sheep>, first: Oid, entries: Bytes) -> Result<(), ResultCode> {
    let end = first.index() as usize + entries.len() / 4;
    let zeros = entries.len().is_multiple_of(4) && sheepdog_buffer::is_zero(&entries);
    if !first.is_data() || !zeros || end > sheepdog_proto::MAX_DATA_OBJS {
        return Err(ResultCode::INVALID_PARMS);
    }
    let vid = first.vid();
    if sheep.redundancy(vid, &sheep.views.load()).snapshot {
        return Err(ResultCode::READONLY);
    }
    if map::is_btree(sheep, vid).await? {
        return Err(ResultCode::NO_SUPPORT);
    }
    map::update(sheep, vid, table_offset(first.index()), entries, map::By::Discard).await
}

/// FLUSH_VDI. In the default mode every acknowledged write is durable and clients need not ask: `INVALID_PARMS` tells
/// them so (spec 06, 6.7). Under `-n` it makes what was acknowledged before durable on every node.
pub fn flush_vdi<'a>(sheep: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        let _active = sheep.stats.gateway(&request);
        let buffered = sheep.store.as_ref().is_some_and(|s| s.sync_mode() == SyncMode::NoSync);
        let code = if buffered { flush_all(sheep).await } else { ResultCode::INVALID_PARMS };
        result(&request, code)
    })
}

/// Flushes every node. A member that does not know how (the original) leaves the answer at `INVALID_PARMS`, which is
/// what it would answer itself.
async fn flush_all(sheep: &Arc<Sheep>) -> ResultCode {
    let view = sheep.views.load();
    let others = view.others(sheep.me);
    let asked = others.map(|node| async move {
        let request = Request::new(Opcode::FLUSH_PEER);
        let reply = sheep.peers.call(&node, request, Bytes::new(), FLUSH_DEADLINE).await;
        reply.map_or(ResultCode::NETWORK_ERROR, |r| r.response.result)
    });
    let (own, answers) = tokio::join!(flush_own(sheep), join_all(asked));
    let failed = answers.into_iter().chain([own]).find(|code| !code.is_ok());
    match failed {
        None => ResultCode::SUCCESS,
        Some(ResultCode::INVALID_PARMS) => ResultCode::INVALID_PARMS,
        Some(code) => {
            tracing::error!("flush failed: {code}");
            ResultCode::EIO
        }
    }
}

async fn flush_own(sheep: &Arc<Sheep>) -> ResultCode {
    match &sheep.store {
        Some(store) => store.flush().await.map_or_else(|e| e.result(), |()| ResultCode::SUCCESS),
        None => ResultCode::SUCCESS,
    }
}

/// FLUSH_PEER: makes what this node acknowledged durable.
pub fn flush_peer<'a>(sheep: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move { result(&request, flush_own(sheep).await) })
}
