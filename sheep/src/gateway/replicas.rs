//! One attempt at an operation on all replicas, in one epoch (spec 06, sections 5 and 6).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, join_all};
use futures_util::stream::{FuturesUnordered, StreamExt};
use sheepdog_client::Reply;
use sheepdog_proto::header::ObjRequest;
use sheepdog_proto::{CopyPolicy, Epoch, Flags, NodeId, Oid, Opcode, Request, ResultCode};

use super::coded::code_of;
use super::object::is_coded;
use crate::peer;
use crate::peers::IO_DEADLINE;
use crate::recovery::early;
use crate::sheep::Sheep;
use crate::vdi::table::Redundancy;
use crate::view::View;

/// A read that is not answered within this time is also asked of the next replica.
const HEDGE_AFTER: Duration = Duration::from_secs(1);

/// Why an attempt failed.
#[derive(Debug, Clone, Copy)]
pub struct Failure {
    /// The result.
    pub code: ResultCode,
    /// The epoch of the replica that gave it.
    pub peer_epoch: Epoch,
}

impl From<ResultCode> for Failure {
    fn from(code: ResultCode) -> Failure {
        Failure { code, peer_epoch: Epoch(0) }
    }
}

/// Sends one peer request to `node`, which may be this one.
pub async fn call(
    sheep: &Arc<Sheep>,
    node: NodeId,
    request: Request,
    payload: Bytes,
) -> Result<Reply, Failure> {
    let reply = if node == sheep.me {
        let mut reply = peer::execute(sheep, request, payload, &|| true).await;
        reply.response.epoch = sheep.views.epoch();
        reply
    } else {
        if matches!(request.opcode, Opcode::WRITE_PEER | Opcode::CREATE_AND_WRITE_PEER) {
            sheep.gateway.numbers.touch(node);
        }
        sheep.peers.call(&node, request, payload, IO_DEADLINE).await.map_err(|error| {
            tracing::debug!("{node}: {error}");
            Failure::from(ResultCode::NETWORK_ERROR)
        })?
    };
    let short = request.opcode == Opcode::READ_PEER && reply.data.len() != request.data_length as usize;
    if reply.response.result.is_ok() && short {
        tracing::error!("{node}: answered {} bytes of {}", reply.data.len(), request.data_length);
        return Err(ResultCode::NETWORK_ERROR.into());
    }
    match reply.response.result {
        ResultCode::SUCCESS => Ok(reply),
        // A node that cannot go on leaves; its disks are no fault of whoever asks (spec 06, 3.7).
        ResultCode::EIO if !request.flags.contains(Flags::RECOVERY) => {
            if node == sheep.me {
                sheep.cluster.leave();
            }
            Err(ResultCode::NETWORK_ERROR.into())
        }
        code => Err(Failure { code, peer_epoch: reply.response.epoch }),
    }
}

/// The homes of the object that `request` names; this node last.
pub fn homes(sheep: &Sheep, view: &View, request: &Request, copies: u8) -> Result<Vec<NodeId>, Failure> {
    let oid = request.obj().oid;
    let mut nodes: Vec<NodeId> = view.ring.nodes_of(oid, copies.into()).map(|n| n.nid).collect();
    if nodes.is_empty() {
        return Err(Failure::from(ResultCode::WAIT_FOR_JOIN));
    }
    // Others first: their requests are on the way while this node writes.
    nodes.sort_by_key(|n| *n == sheep.me);
    Ok(nodes)
}

/// The failure that decides: one that a retry cures, or else the last one.
pub fn deciding(failures: &[Failure]) -> Option<Failure> {
    failures.iter().find(|f| f.code.is_retriable()).or(failures.last()).copied()
}

/// Sends the same request to all of `nodes`.
pub async fn on_all(
    sheep: &Arc<Sheep>,
    nodes: &[NodeId],
    request: Request,
    payload: &Bytes,
) -> Vec<Result<Reply, Failure>> {
    join_all(nodes.iter().map(|node| call(sheep, *node, request, payload.clone()))).await
}

/// The operation must succeed on every home.
pub async fn fan_out(
    sheep: &Arc<Sheep>,
    view: &View,
    request: Request,
    payload: Bytes,
    copies: u8,
) -> Result<(), Failure> {
    let nodes = homes(sheep, view, &request, copies)?;
    let results = on_all(sheep, &nodes, request, &payload).await;
    let failures: Vec<Failure> = results.into_iter().filter_map(Result::err).collect();
    deciding(&failures).map_or(Ok(()), Err)
}

/// As [`fan_out`]; `STALE_OBJ` when the object exists on some homes and is missing on others.
pub async fn write(
    sheep: &Arc<Sheep>,
    view: &View,
    request: Request,
    payload: Bytes,
    copies: u8,
) -> Result<(), Failure> {
    let nodes = homes(sheep, view, &request, copies)?;
    let results = on_all(sheep, &nodes, request, &payload).await;
    let failures: Vec<Failure> = results.iter().filter_map(|r| r.as_ref().err().copied()).collect();
    let Some(failure) = deciding(&failures) else {
        // Some home must have the object itself, or it does not exist.
        let everywhere_early = results.iter().flatten().all(|reply| early::is_marked(&reply.response));
        return if everywhere_early { Err(ResultCode::NETWORK_ERROR.into()) } else { Ok(()) };
    };
    let missing = failures.iter().all(|f| f.code == ResultCode::NO_OBJ);
    if missing && failures.len() < nodes.len() { Err(ResultCode::STALE_OBJ.into()) } else { Err(failure) }
}

/// Gives every home that lacks the object a copy of it.
pub async fn heal(
    sheep: &Arc<Sheep>,
    view: &View,
    read: Request,
    create: Request,
    copies: u8,
) -> Result<(), Failure> {
    let nodes = homes(sheep, view, &read, copies)?;
    let results = on_all(sheep, &nodes, read, &Bytes::new()).await;
    let good = results.iter().find_map(|r| r.as_ref().ok().map(|reply| reply.data.clone()));
    let failures: Vec<Failure> = results.iter().filter_map(|r| r.as_ref().err().copied()).collect();
    if let Some(failure) = failures.iter().find(|f| f.code != ResultCode::NO_OBJ) {
        return Err(*failure);
    }
    let Some(data) = good else { return Err(ResultCode::NO_OBJ.into()) };
    for (node, result) in nodes.iter().zip(&results) {
        if result.is_err() {
            call(sheep, *node, create, data.clone()).await?;
        }
    }
    Ok(())
}

/// Whether the object is there: a replica, or as many strips as its code needs. Fewer are what a creation left that was cut
/// short, or more losses than the code bears; recovery makes nothing of them.
pub async fn is_there(sheep: &Arc<Sheep>, view: &View, oid: Oid, kept: Redundancy) -> Result<bool, Failure> {
    let coded = is_coded(oid, &kept);
    let (policy, needed) = match coded {
        true => (kept.policy, code_of(kept.policy)?.data_strips()),
        false => (CopyPolicy::default(), 1),
    };
    let body = ObjRequest {
        oid,
        copies: kept.copies,
        copy_policy: policy.to_byte(),
        alters: 1,
        ..ObjRequest::zeroed()
    };
    let homes: Vec<NodeId> = view.ring.nodes_of(oid, kept.copies.into()).map(|n| n.nid).collect();
    if homes.is_empty() {
        return Err(ResultCode::WAIT_FOR_JOIN.into());
    }
    let asked = homes.iter().enumerate().map(|(index, home)| {
        let ec_index = if coded { index as u8 } else { 0 };
        let request = Request::new(Opcode::READ_PEER).epoch(view.epoch).length(1);
        call(sheep, *home, request.with_obj(ObjRequest { ec_index, ..body }), Bytes::new())
    });
    let (there, failures): (Vec<_>, Vec<_>) = join_all(asked).await.into_iter().partition(Result::is_ok);
    if there.len() >= needed {
        return Ok(true);
    }
    let failures = failures.into_iter().filter_map(Result::err);
    match failures.filter(|failure| failure.code != ResultCode::NO_OBJ).collect::<Vec<_>>().as_slice() {
        [] => Ok(false),
        others => Err(deciding(others).unwrap_or(ResultCode::NETWORK_ERROR.into())),
    }
}

/// Reads from this node's replica if there is one and it is not still to be recovered, else from the others, beginning
/// anywhere.
pub async fn read(sheep: &Arc<Sheep>, view: &View, request: Request, copies: u8) -> Result<Bytes, Failure> {
    let mut nodes = homes(sheep, view, &request, copies)?;
    let mine = nodes.iter().position(|n| *n == sheep.me).map(|at| nodes.remove(at));
    let missing = mine.is_some() && sheep.recovery.is_missing(sheep, request.obj().oid, view);
    let mut failures = Vec::new();
    if let Some(me) = mine.filter(|_| !missing) {
        match call(sheep, me, request, Bytes::new()).await {
            Ok(reply) => return Ok(reply.data),
            Err(failure) => failures.push(failure),
        }
    }
    if !nodes.is_empty() {
        let start = rand::random_range(0..nodes.len());
        nodes.rotate_left(start);
    }
    nodes.extend(mine.filter(|_| missing));
    let mut waiting: FuturesUnordered<BoxFuture<'_, Result<Reply, Failure>>> = FuturesUnordered::new();
    let mut next = nodes.into_iter();
    loop {
        if waiting.is_empty() {
            let Some(node) = next.next() else { break };
            waiting.push(Box::pin(call(sheep, node, request, Bytes::new())));
        }
        match tokio::time::timeout(HEDGE_AFTER, waiting.next()).await {
            Ok(Some(Ok(reply))) => return Ok(reply.data),
            Ok(Some(Err(failure))) => failures.push(failure),
            Ok(None) => {}
            Err(_) => match next.next() {
                Some(node) => waiting.push(Box::pin(call(sheep, node, request, Bytes::new()))),
                None => match waiting.next().await {
                    Some(Ok(reply)) => return Ok(reply.data),
                    Some(Err(failure)) => failures.push(failure),
                    None => {}
                },
            },
        }
    }
    Err(deciding(&failures).unwrap_or(ResultCode::NETWORK_ERROR.into()))
}
