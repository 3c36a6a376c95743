//! ORDER_PEER: what nodes of this project agree on among themselves (spec 06, 15.1 A3, A4).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use sheepdog_client::Reply;
use sheepdog_proto::header::{OrderResponse, order};
use sheepdog_proto::{Epoch, Flags, NodeId, Opcode, Request, Response, ResultCode, VdiId, Wire};

use sheepdog_store::Replica;

use super::{list, objects, result};
use crate::gateway::grants::Verdict;
use crate::gateway::object::is_coded;
use crate::gateway::{arbiter, hold, sequencer};
use crate::intents::Fate;
use crate::recovery::object::has_any;
use crate::recovery::{early, lacking};
use crate::settle;
use crate::sheep::Sheep;
use crate::vdi::orphans;

/// How long LEVEL waits before the sender is to ask again.
const LEVEL_WAIT: Duration = Duration::from_secs(2);

/// Whether a request is answered while this node is ending: what makes objects equal, which its last requests may wait for.
pub fn is_settling(request: &Request) -> bool {
    let reading = request.opcode == Opcode::READ_PEER && request.flags.contains(Flags::RECOVERY);
    let what = request.order().what;
    let settling = [
        order::SETTLE,
        order::PULL,
        order::DONE,
        order::RECALL,
        order::DECIDE,
        order::READ_STRIP,
        order::WRITE_STRIP,
        order::DIGEST,
        order::OUTCOME,
        order::LOOSE,
        order::LEVEL,
        order::HAS,
        order::LEFT_OUT,
        order::EARLY,
    ];
    reading
        || request.opcode == Opcode::GET_HASH
        || request.opcode == Opcode::ORDER_PEER && settling.contains(&what)
}

/// ORDER_PEER.
pub fn order_peer<'a>(sheep: &'a Arc<Sheep>, request: Request, payload: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        let outcome = match request.order().what {
            order::PERFORM => return sequencer::perform(sheep, &request, payload).await,
            order::CLAIM => claim(sheep, &request, &payload).await,
            order::YIELD => give_back(sheep, &request).await,
            order::SETTLE => settle(sheep, &request, &payload).await,
            order::PULL => pull(sheep, &request, &payload).await,
            order::DONE => done(sheep, &request, &payload),
            order::RECALL => return recall(sheep, &request, &payload).await,
            order::OUTCOME => return outcome(sheep, &request, &payload),
            order::LOOSE => return loose(sheep, &request),
            order::DECIDE => decide(sheep, &request, &payload).await,
            order::DIGEST => return objects::digest(sheep, &request).await,
            order::READ_STRIP => return read_strip(sheep, &request).await,
            order::WRITE_STRIP => write_strip(sheep, &request, payload).await,
            order::LEVEL => level(sheep, &request).await,
            order::HAS => has(sheep, &request),
            order::LEFT_OUT => return left_out(sheep, &request),
            order::REPAIR => repair(sheep, &request).await,
            order::HOLD | order::LET_GO => hold(sheep, &request, &payload).await,
            order::CATCH_UP => catch_up(sheep, &request).await,
            order::EARLY => return early_writes(sheep, &request).await,
            _ => Err(ResultCode::INVALID_PARMS),
        };
        match outcome {
            Ok(answer) => Reply::empty(Response::to(&request, ResultCode::SUCCESS).with_order(answer)),
            Err(code) => result(&request, code),
        }
    })
}

async fn claim(sheep: &Arc<Sheep>, request: &Request, payload: &[u8]) -> Result<OrderResponse, ResultCode> {
    let node = NodeId::decode(payload).map_err(|_| ResultCode::INVALID_PARMS)?;
    let view = sequencer::at_epoch(sheep, request.epoch).await?;
    if !view.is_member(&node) {
        return Err(ResultCode::OLD_NODE_VER);
    }
    let body = request.order();
    let write = body.kind != 0;
    let Verdict { direct, serial } =
        sheep.gateway.arbiter.claim(sheep, node, body.oid.vid(), write, request.epoch).await?;
    Ok(OrderResponse { verdict: if direct { 1 } else { 2 }, serial })
}

async fn hold(sheep: &Arc<Sheep>, request: &Request, payload: &[u8]) -> Result<OrderResponse, ResultCode> {
    let node = NodeId::decode(payload).map_err(|_| ResultCode::INVALID_PARMS)?;
    if !sheep.views.load().is_member(&node) {
        return Err(ResultCode::OLD_NODE_VER);
    }
    let body = request.order();
    if body.what == order::HOLD {
        hold::hold_for(sheep, node, body.oid.vid(), body.serial).await?;
    } else {
        hold::let_go(sheep, node, body.oid.vid(), &body).await;
    }
    Ok(OrderResponse { verdict: 1, serial: body.serial })
}

async fn catch_up(sheep: &Arc<Sheep>, request: &Request) -> Result<OrderResponse, ResultCode> {
    orphans::say_deleted(sheep, VdiId::NONE).await.ok()?;
    let body = request.order();
    if body.kind == 1 {
        drop(sheep.gateway.map_barrier(body.oid.vid()).await);
    }
    Ok(OrderResponse::zeroed())
}

async fn give_back(sheep: &Arc<Sheep>, request: &Request) -> Result<OrderResponse, ResultCode> {
    let body = request.order();
    let free = arbiter::give_back(sheep, body.oid.vid(), request.epoch, body.serial).await;
    Ok(OrderResponse { verdict: free.into(), serial: body.serial })
}

async fn settle(sheep: &Arc<Sheep>, request: &Request, payload: &[u8]) -> Result<OrderResponse, ResultCode> {
    let body = request.order();
    let view = sequencer::member_at(sheep, request.epoch).await?;
    if is_coded(body.oid, &sheep.redundancy(body.oid.vid(), &view)) {
        match settle::decode_ids(payload) {
            ids if ids.is_empty() => settle::mend_parity(sheep, body.oid, request.epoch).await?,
            ids => settle::judge(sheep, body.oid, Epoch(body.serial), &ids, request.epoch).await?,
        }
    } else {
        let reporter = NodeId::decode(payload).map_err(|_| ResultCode::INVALID_PARMS)?;
        settle::lead_for(sheep, body.oid, body.regions, reporter, request.epoch).await?;
    }
    Ok(OrderResponse::zeroed())
}

async fn pull(sheep: &Arc<Sheep>, request: &Request, payload: &[u8]) -> Result<OrderResponse, ResultCode> {
    let body = request.order();
    let source = NodeId::decode(payload).map_err(|_| ResultCode::INVALID_PARMS)?;
    settle::follow(sheep, body.oid, body.regions, source, request.epoch).await?;
    Ok(OrderResponse::zeroed())
}

fn done(sheep: &Arc<Sheep>, request: &Request, payload: &[u8]) -> Result<OrderResponse, ResultCode> {
    let mut numbers = payload.chunks_exact(4).map(u32::get);
    let writer = numbers.next().filter(|w| *w != 0).ok_or(ResultCode::INVALID_PARMS)?;
    let open: Vec<u32> = numbers.collect();
    let undecided = sheep.intents.has_open_of_before(writer, sheep.views.epoch());
    sheep.intents.done(writer, request.order().serial, &open);
    Ok(OrderResponse { verdict: undecided.into(), ..OrderResponse::zeroed() })
}

async fn recall(sheep: &Arc<Sheep>, request: &Request, payload: &[u8]) -> Reply {
    let body = request.order();
    let written = Epoch(body.serial);
    // Later than in that epoch: what is not here by then does not come any more.
    if let Err(code) = sequencer::member_at(sheep, request.epoch).await {
        return result(request, code);
    }
    let ids = settle::decode_ids(payload);
    list(request, ids.iter().map(|id| sheep.intents.fate(body.oid, *id, written) as u8).collect())
}

fn outcome(sheep: &Arc<Sheep>, request: &Request, payload: &[u8]) -> Reply {
    let ids = settle::decode_ids(payload);
    let outcomes = sheep.gateway.numbers.outcomes(&ids, Epoch(request.order().serial));
    list(request, outcomes.iter().map(|outcome| *outcome as u8).collect())
}

fn loose(sheep: &Arc<Sheep>, request: &Request) -> Reply {
    list(request, lacking::encode(&sheep.intents.loose()))
}

async fn level(sheep: &Arc<Sheep>, request: &Request) -> Result<OrderResponse, ResultCode> {
    let wanted = request.order().serial;
    sequencer::member_at(sheep, request.epoch).await?;
    let reached = sheep.views.until(|v| v.epoch != request.epoch || v.alters >= wanted);
    let view = tokio::time::timeout(LEVEL_WAIT, reached).await.map_err(|_| ResultCode::AGAIN)?;
    if view.epoch == request.epoch { Ok(OrderResponse::zeroed()) } else { Err(ResultCode::OLD_NODE_VER) }
}

fn has(sheep: &Arc<Sheep>, request: &Request) -> Result<OrderResponse, ResultCode> {
    let body = request.order();
    let names: Vec<Replica> = match body.kind {
        0 => vec![Sheep::replica(body.oid)],
        strips => (0..strips).map(|index| Replica { oid: body.oid, strip: Some(index) }).collect(),
    };
    if names.iter().any(|name| has_any(sheep, *name)) {
        Ok(OrderResponse::zeroed())
    } else {
        Err(ResultCode::NO_OBJ)
    }
}

async fn early_writes(sheep: &Arc<Sheep>, request: &Request) -> Reply {
    let body = request.order();
    let answer = match sequencer::member_at(sheep, request.epoch).await {
        Ok(view) => early::answer(sheep, &view, body.oid, Epoch(body.serial)),
        Err(code) => Err(code),
    };
    match answer {
        Ok(patches) => list(request, patches),
        Err(code) => result(request, code),
    }
}

async fn repair(sheep: &Arc<Sheep>, request: &Request) -> Result<OrderResponse, ResultCode> {
    let body = request.order();
    if !is_coded(body.oid, &sheep.redundancy(body.oid.vid(), &sheep.views.load())) {
        return Err(ResultCode::INVALID_PARMS);
    }
    sheep.gateway.repair_strips(sheep, body.oid, body.kind).await?;
    Ok(OrderResponse::zeroed())
}

fn left_out(sheep: &Arc<Sheep>, request: &Request) -> Reply {
    list(request, settle::encode_ids(&sheep.intents.open_of(named_strip(request))))
}

fn named_strip(request: &Request) -> Replica {
    let body = request.order();
    Replica { oid: body.oid, strip: Some(body.kind) }
}

async fn read_strip(sheep: &Arc<Sheep>, request: &Request) -> Reply {
    let body = request.order();
    let strip = match request.data_length == body.length && !request.flags.contains(Flags::WRITE) {
        true => {
            settle::strip_as_it_is(sheep, named_strip(request), body.offset.into(), body.length as usize)
                .await
        }
        false => Err(ResultCode::INVALID_PARMS),
    };
    match strip {
        Ok(data) => crate::gateway::reply_data(request, data),
        Err(code) => result(request, code),
    }
}

async fn write_strip(
    sheep: &Arc<Sheep>,
    request: &Request,
    payload: Bytes,
) -> Result<OrderResponse, ResultCode> {
    let offset = request.order().offset.into();
    settle::mend_strip(sheep, named_strip(request), offset, payload, request.epoch).await?;
    Ok(OrderResponse::zeroed())
}

async fn decide(sheep: &Arc<Sheep>, request: &Request, payload: &[u8]) -> Result<OrderResponse, ResultCode> {
    let body = request.order();
    let ids = settle::decode_ids(payload);
    // A node of an earlier version takes what is loose for kept.
    let fate = match (body.kind, body.length) {
        (1, 1) => Fate::Loose,
        (1, _) => Fate::Kept,
        _ => Fate::Undone,
    };
    settle::decide(sheep, body.oid, fate, &ids, Epoch(body.serial), request.epoch).await?;
    Ok(OrderResponse::zeroed())
}
