//! Operations that go through the first home of their object, on both sides (spec 06, 15.1 A4).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sheepdog_client::Reply;
use sheepdog_proto::header::{OrderRequest, order};
use sheepdog_proto::{
    ClusterStatus, Epoch, Flags, NodeId, ObjectKind, Oid, Opcode, Request, Response, ResultCode,
};

use super::grants::first_home;
use super::numbers::Number;
use super::object::{BACKOFF, conclude, is_coded};
use super::op::{Op, Scratch};
use super::replicas::Failure;
use crate::order::Turn;
use crate::peer::check_range;
use crate::peers::Lane;
use crate::sheep::Sheep;
use crate::view::View;

/// How long an operation may take at the first home. It ends earlier with the epoch; a home that died ends it, too.
const THROUGH_DEADLINE: Duration = Duration::from_secs(600);

/// How long a write waits for its VDI to be announced here.
const ANNOUNCE_WAIT: Duration = Duration::from_secs(1);

/// How long a request of a newer epoch waits for it here.
const EPOCH_WAIT: Duration = Duration::from_secs(10);

/// Has `first` execute the operation. `None` = it is a node of the original, which cannot.
pub async fn send(
    sheep: &Arc<Sheep>,
    first: NodeId,
    view: &View,
    oid: Oid,
    op: &Op,
) -> Result<Option<Bytes>, Failure> {
    let mut body = OrderRequest {
        oid,
        what: order::PERFORM,
        kind: op.opcode().0,
        offset: op.offset() as u32,
        ..OrderRequest::zeroed()
    };
    let request = Request::new(Opcode::ORDER_PEER).epoch(view.epoch);
    let (request, payload) = match op {
        Op::Read { len, .. } => {
            body.length = *len as u32;
            (request.length(*len), Bytes::new())
        }
        Op::Write { data, .. } | Op::Create { data, .. } => (request.flag(Flags::WRITE), data.clone()),
        Op::Add { data, new, .. } => {
            (body.kind, body.regions) = (order::ADD, (new.start as u64) << 32 | new.len() as u64);
            (request.flag(Flags::WRITE), data.clone())
        }
        Op::Repair { suspect } => {
            body.offset = (*suspect).into();
            (request.flag(Flags::WRITE), Bytes::new())
        }
    };
    // A node that is leaving does not wait: the first home may be waiting for it to be gone. Nor does anybody for a home that
    // has left: a connection to a silent one may have been opened after all others to it were closed.
    let over = |view: &View| view.status == ClusterStatus::Killed || !view.is_member(&first);
    let answer = tokio::select! {
        answer = sheep.peers.call_on(Lane::Through, &first, request.with_order(body), payload, THROUGH_DEADLINE) => answer,
        view = sheep.views.until(over) => {
            let killed = view.status == ClusterStatus::Killed;
            return Err(if killed { ResultCode::KILLED } else { ResultCode::NETWORK_ERROR }.into());
        }
    };
    let reply = answer.map_err(|error| {
        tracing::debug!("{first}: {error}");
        Failure::from(ResultCode::NETWORK_ERROR)
    })?;
    let refused = reply.response.result == ResultCode::INVALID_PARMS && reply.response.order().verdict == 0;
    match reply.response.result {
        ResultCode::SUCCESS if reply.data.len() == body.length as usize => Ok(Some(reply.data)),
        ResultCode::SUCCESS => Err(ResultCode::NETWORK_ERROR.into()),
        _ if refused => Ok(None),
        code => Err(Failure { code, peer_epoch: reply.response.epoch }),
    }
}

/// Executes an operation that another gateway sent here. Answers that a node of the original could not give carry a
/// verdict.
pub async fn perform(sheep: &Arc<Sheep>, request: &Request, payload: Bytes) -> Reply {
    let body = request.order();
    let offset = u64::from(body.offset);
    let op = match Opcode(body.kind) {
        Opcode(order::ADD) => {
            let (start, len) = ((body.regions >> 32) as usize, body.regions as u32 as usize);
            if start + len > payload.len() {
                return Reply::empty(Response::to(request, ResultCode::INVALID_PARMS));
            }
            Op::Add { offset, data: payload, new: start..start + len }
        }
        Opcode::READ_OBJ => Op::Read { offset, len: request.data_length as usize },
        Opcode::WRITE_OBJ => Op::Write { offset, data: payload },
        Opcode::CREATE_AND_WRITE_OBJ => Op::Create { offset, data: payload },
        Opcode::REPAIR_REPLICA => Op::Repair { suspect: body.offset as u8 },
        _ => return Reply::empty(Response::to(request, ResultCode::INVALID_PARMS)),
    };
    let outcome = match op.is_write() == request.flags.contains(Flags::WRITE) {
        true => in_turn(sheep, body.oid, &op, request.epoch).await,
        false => Err(ResultCode::INVALID_PARMS.into()),
    };
    match outcome {
        Ok(data) => super::reply_data(request, data),
        Err(failure) => {
            let mut response = Response::to(request, failure.code);
            let mut answer = response.order();
            answer.verdict = 1;
            response = response.with_order(answer);
            Reply::empty(response)
        }
    }
}

/// Waits until this node has reached `epoch`; an error if it is past it.
pub async fn at_epoch(sheep: &Arc<Sheep>, epoch: Epoch) -> Result<Arc<View>, ResultCode> {
    let reached = sheep.views.until(|v| v.status == ClusterStatus::Killed || !v.epoch.is_before(epoch));
    let view = tokio::time::timeout(EPOCH_WAIT, reached).await.map_err(|_| ResultCode::NETWORK_ERROR)?;
    if view.status == ClusterStatus::Killed { Err(ResultCode::KILLED) } else { of_epoch(view, epoch) }
}

/// As [`at_epoch`], also while this node is ending: its last requests wait for what others ask it meanwhile.
pub async fn member_at(sheep: &Arc<Sheep>, epoch: Epoch) -> Result<Arc<View>, ResultCode> {
    let reached = sheep.views.until(|v| !v.epoch.is_before(epoch));
    let view = tokio::time::timeout(EPOCH_WAIT, reached).await.map_err(|_| ResultCode::NETWORK_ERROR)?;
    of_epoch(view, epoch)
}

fn of_epoch(view: Arc<View>, epoch: Epoch) -> Result<Arc<View>, ResultCode> {
    if epoch.is_before(view.epoch) { Err(ResultCode::OLD_NODE_VER) } else { Ok(view) }
}

/// The turn of a part of `oid`, or an error when the epoch ends first: by then another node may be the first home, whose
/// operations must not wait for this one's.
async fn turn(
    sheep: &Arc<Sheep>,
    oid: Oid,
    range: std::ops::Range<u64>,
    write: bool,
    epoch: Epoch,
) -> Result<Turn, Failure> {
    tokio::select! {
        biased;
        _ = sheep.views.until(|v| v.epoch != epoch || v.status == ClusterStatus::Killed) => Err(ResultCode::OLD_NODE_VER.into()),
        turn = sheep.gateway.order.turn(oid, range, write) => Ok(turn),
    }
}

/// Waits for the announcement of a new VDI, which may reach this node after the first object of it; without, its copies
/// and policy would be taken for the cluster's. Attributes belong to names, which are never announced.
async fn announced(sheep: &Arc<Sheep>, oid: Oid) {
    let known = async {
        while !sheep.redundancy(oid.vid(), &sheep.views.load()).known {
            tokio::time::sleep(BACKOFF.0).await;
        }
    };
    if oid.kind() != ObjectKind::Attr {
        let _ = tokio::time::timeout(ANNOUNCE_WAIT, known).await; // nobody announces what nobody creates
    }
}

async fn in_turn(sheep: &Arc<Sheep>, oid: Oid, op: &Op, epoch: Epoch) -> Result<Bytes, Failure> {
    let view = at_epoch(sheep, epoch).await?;
    sheep.tables_arrived().await;
    if first_home(&view, oid) != Some(sheep.me) {
        return Err(ResultCode::INVALID_PARMS.into());
    }
    if op.is_write() {
        announced(sheep, oid).await;
    }
    check_range(op.offset(), op.len() as u64, sheep.size_of(oid, &view))?;
    let coded = is_coded(oid, &sheep.redundancy(oid.vid(), &view));
    let number = op.is_write().then(|| sheep.gateway.numbers.begin(sheep));
    let mut held = Some(turn(sheep, oid, op.range(coded), op.is_write(), epoch).await?);
    let result = attempts(sheep, oid, op, epoch, &mut held, number.as_ref()).await;
    let error = result.as_ref().err().map(|failure| failure.code);
    if error == Some(ResultCode::OLD_NODE_VER) {
        // Its gateway does it again. The end of the epoch settles what came of this.
        return result;
    }
    conclude(sheep, oid, op, number, error.as_ref()).await;
    result
}

async fn attempts(
    sheep: &Arc<Sheep>,
    oid: Oid,
    op: &Op,
    epoch: Epoch,
    held: &mut Option<Turn>,
    number: Option<&Number>,
) -> Result<Bytes, Failure> {
    let mut scratch = Scratch::default();
    let mut pause = BACKOFF.0;
    loop {
        let view = sheep.views.load();
        if view.epoch != epoch || view.status == ClusterStatus::Killed {
            return Err(ResultCode::OLD_NODE_VER.into());
        }
        let kept = sheep.redundancy(oid.vid(), &view);
        let failure = match op.attempt(sheep, &view, oid, kept, &mut scratch, number).await {
            Ok(data) => return Ok(data),
            Err(failure) => failure,
        };
        match failure.code {
            ResultCode::STALE_OBJ if scratch.heal => return Err(ResultCode::NO_OBJ.into()),
            ResultCode::STALE_OBJ => {
                if let Some(number) = number {
                    op.begin_anew(sheep, oid, number).await;
                }
                drop(held.take());
                *held = Some(turn(sheep, oid, 0..u64::MAX, true, epoch).await?);
                scratch = Scratch { heal: true, ..Scratch::default() };
                continue;
            }
            code if !code.is_retriable() => return Err(failure),
            _ => {}
        }
        let _ = tokio::time::timeout(pause, sheep.views.changed_from(&view)).await;
        pause = (pause * 2).min(BACKOFF.1);
    }
}
