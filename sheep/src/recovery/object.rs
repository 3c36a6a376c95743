//! Recovering one replicated object (spec 06, 10.5, with rule A1 of 15.1).
//!
//! The search begins at the round's target epoch and goes back one epoch at a time. It goes back only when every node
//! that was at home for the object in that epoch has said that it does not have it: a home that is away may hold a
//! newer version than any older epoch has, so then the object waits.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sheepdog_placement::{Ring, Weights};
use sheepdog_proto::header::ObjRequest;
use sheepdog_proto::{Epoch, Flags, NodeId, NodeRecord, Oid, Opcode, Request, ResultCode};
use sheepdog_store::StoreError;

use super::Active;
use crate::cluster::ops::epoch_log;
use crate::gateway::coded::code_of;
use crate::gateway::object::is_coded;
use crate::sheep::Sheep;

/// Deadline of a copy from another node.
pub const COPY_DEADLINE: Duration = Duration::from_secs(30);

/// How it ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Recovered {
    /// The object is in the working directory.
    Here,
    /// No node that ever stored it has it: it was removed.
    Nowhere,
    /// A newer round began.
    Replaced,
    /// Not now; the reason.
    Later(String),
}

/// What one epoch's homes said.
enum Search {
    Found,
    Replaced,
    /// Every home answered that it does not have it.
    Absent,
    Unknown(String),
}

/// Recovers `oid` for the round.
pub async fn recover(sheep: &Arc<Sheep>, active: &Active, oid: Oid) -> Recovered {
    let Some(store) = &sheep.store else { return Recovered::Nowhere };
    let view = sheep.views.load();
    if view.epoch != active.round.epoch {
        return Recovered::Replaced;
    }
    let Some((replica, size)) = sheep.my_replica(oid, &view) else { return Recovered::Nowhere };
    if store.exists(replica) {
        return Recovered::Here;
    }
    let redundancy = sheep.redundancy(oid.vid(), &view);
    if is_coded(oid, &redundancy) {
        return match code_of(redundancy.policy) {
            Ok(code) => super::strip::recover(sheep, active, store, replica, code, size).await,
            Err(code) => Recovered::Later(code.to_string()),
        };
    }
    let floor = sheep.recovery.last_gathered();
    let mut local = LocalCandidate::find(sheep, active.round.epoch, floor, oid).await;
    let mut epoch = active.round.tgt_epoch;
    let mut nodes = Some(active.round.old.clone());
    loop {
        let Some(members) = nodes.take() else {
            return Recovered::Later(format!("the members of epoch {epoch} are not known"));
        };
        match search(sheep, active, oid, epoch, members, redundancy.copies, &mut local).await {
            Search::Found => return Recovered::Here,
            Search::Replaced => return Recovered::Replaced,
            Search::Unknown(reason) => return Recovered::Later(reason),
            Search::Absent => {}
        }
        if epoch.0 <= 1 || epoch.0 <= floor.0 {
            return Recovered::Nowhere;
        }
        epoch = Epoch(epoch.0 - 1);
        nodes = epoch_log(sheep, epoch).await.map(|log| log.nodes);
    }
}

/// A stale copy on this node that may equal the current version.
struct LocalCandidate(Option<(Epoch, [u8; 20])>);

impl LocalCandidate {
    async fn find(sheep: &Sheep, round: Epoch, floor: Epoch, oid: Oid) -> LocalCandidate {
        let Some(store) = &sheep.store else { return LocalCandidate(None) };
        let replica = Sheep::replica(oid);
        let stale = store.stale_epochs(replica).into_iter();
        let newest = stale.filter(|e| e.is_before(round) && !e.is_before(floor)).max();
        let Some(epoch) = newest else { return LocalCandidate(None) };
        let size = sheep.size_of(oid, &sheep.views.load());
        let hash = store.hash(replica, size, Some(epoch), false).await;
        LocalCandidate(hash.ok().map(|h| (epoch, h)))
    }
}

async fn search(
    sheep: &Arc<Sheep>,
    active: &Active,
    oid: Oid,
    epoch: Epoch,
    members: Vec<NodeRecord>,
    copies: u8,
    local: &mut LocalCandidate,
) -> Search {
    let view = sheep.views.load();
    let weights = Weights::of_cluster(view.flags);
    let Ok(ring) = Ring::new(members, weights) else { return Search::Unknown("unusable epoch log".into()) };
    let mut homes: Vec<NodeId> = ring.nodes_of(oid, copies.into()).map(|n| n.nid).collect();
    if let Some(at) = homes.iter().position(|n| *n == sheep.me) {
        homes.rotate_left(at);
    }
    let mut unknown = None;
    for home in homes {
        if active.is_replaced() {
            return Search::Replaced;
        }
        if !view.is_member(&home) {
            unknown = Some(format!("{home}, which stored it at epoch {epoch}, is away"));
            continue;
        }
        match try_home(sheep, active, oid, epoch, home, local).await {
            Ok(()) => return Search::Found,
            Err(ResultCode::OLD_NODE_VER) => return Search::Replaced,
            Err(ResultCode::NO_OBJ) => {}
            Err(code) => unknown = Some(format!("{home}: {code}")),
        }
    }
    unknown.map_or(Search::Absent, Search::Unknown)
}

async fn try_home(
    sheep: &Arc<Sheep>,
    active: &Active,
    oid: Oid,
    epoch: Epoch,
    home: NodeId,
    local: &mut LocalCandidate,
) -> Result<(), ResultCode> {
    if home == sheep.me {
        return if epoch.is_before(active.round.epoch) {
            link(sheep, active, oid, epoch).await
        } else {
            Err(ResultCode::NO_OBJ)
        };
    }
    if let Some((stale, hash)) = local.0 {
        if remote_hash(sheep, active, oid, epoch, home).await? == hash {
            return link(sheep, active, oid, stale).await;
        }
        local.0 = None;
    }
    copy(sheep, active, oid, epoch, home).await
}

fn peer_request(opcode: Opcode, active: &Active, oid: Oid, tgt_epoch: Epoch) -> Request {
    let body = ObjRequest { oid, tgt_epoch, ..ObjRequest::zeroed() };
    Request::new(opcode).epoch(active.round.epoch).with_obj(body)
}

async fn remote_hash(
    sheep: &Arc<Sheep>,
    active: &Active,
    oid: Oid,
    epoch: Epoch,
    home: NodeId,
) -> Result<[u8; 20], ResultCode> {
    let request = peer_request(Opcode::GET_HASH, active, oid, epoch);
    let reply = sheep.peers.call(&home, request, Bytes::new(), COPY_DEADLINE).await;
    let reply = reply.map_err(|_| ResultCode::NETWORK_ERROR)?;
    reply.response.result.ok().map(|()| reply.response.hash().digest)
}

/// Makes the stale copy of `epoch` the working one again.
async fn link(sheep: &Arc<Sheep>, active: &Active, oid: Oid, epoch: Epoch) -> Result<(), ResultCode> {
    let store = sheep.store.as_ref().ok_or(ResultCode::NO_OBJ)?;
    let _pass = sheep.gate.enter(active.round.epoch).ok_or(ResultCode::OLD_NODE_VER)?;
    match store.link_stale(Sheep::replica(oid), epoch).await {
        Ok(true) => Ok(()),
        Ok(false) | Err(StoreError::NoObject) => Err(ResultCode::NO_OBJ),
        Err(error) => Err(crate::faults::peer_result(sheep, &error)),
    }
}

async fn copy(
    sheep: &Arc<Sheep>,
    active: &Active,
    oid: Oid,
    epoch: Epoch,
    home: NodeId,
) -> Result<(), ResultCode> {
    let store = sheep.store.as_ref().ok_or(ResultCode::NO_OBJ)?;
    let size = sheep.size_of(oid, &sheep.views.load());
    let mut request =
        peer_request(Opcode::READ_PEER, active, oid, epoch).flag(Flags::RECOVERY).length(size as usize);
    if active.round.wildcard {
        request = request.flag(Flags::WILDCARD);
    }
    let reply = sheep.peers.call(&home, request, Bytes::new(), COPY_DEADLINE).await;
    let reply = reply.map_err(|_| ResultCode::NETWORK_ERROR)?;
    reply.response.result.ok()?;
    if reply.data.len() as u64 != size {
        return Err(ResultCode::NETWORK_ERROR);
    }
    // The epoch must not move between the copy and its becoming the working object.
    let _pass = sheep.gate.enter(active.round.epoch).ok_or(ResultCode::OLD_NODE_VER)?;
    let created = store.create_if_absent(Sheep::replica(oid), size, 0, reply.data).await;
    created.map(drop).map_err(|error| crate::faults::peer_result(sheep, &error))
}
