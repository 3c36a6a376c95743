//! Keeps table updates of a VDI out on every node while a snapshot or clone copies its table (spec 05, 26: "snapshot
//! against map update", "delete against clone").
//!
//! Updates are serialised per VDI in each gateway. Whoever derives a VDI takes that place in all gateways: an update is
//! either in the table that is copied, or comes after the base's counts were raised and drops what they say. A member that
//! does not answer may be in the middle of an update, and go on with it later: nothing is derived before it has answered or
//! is no member any more. Nodes of the original cannot hold anything back; with them it is as it was.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use parking_lot::Mutex;
use sheepdog_proto::header::{OrderRequest, order};
use sheepdog_proto::{Flags, NodeId, Oid, Opcode, Request, ResultCode, VdiId, Wire};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout_at};

use crate::order::Turn;
use crate::sheep::Sheep;

/// How long a node may take to end the updates that it has in progress before it is asked again.
const TAKE: Duration = Duration::from_secs(5);
/// How long a silent member is waited for. Cluster drivers take one out that is silent for so long, but for the local one.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two questions to a node.
const PAUSE: Duration = Duration::from_millis(50);
/// A hold whose owner was not heard of again ends by itself. Above what any derivation takes.
const LONGEST: Duration = Duration::from_secs(300);
/// Deadline of letting go.
const LET_GO: Duration = Duration::from_secs(5);
/// `kind` of LET_GO: only when the VDI is known as a snapshot.
const AS_SNAPSHOT: u8 = 1;

/// What other nodes hold here, by VDI, node and number; each ends when its sender is dropped.
#[derive(Default)]
pub struct Holds {
    held: Mutex<HashMap<(VdiId, NodeId, u32), oneshot::Sender<()>>>,
    next: AtomicU32,
}

/// Table updates of a VDI wait everywhere until this is dropped.
pub struct Held {
    sheep: Arc<Sheep>,
    vid: VdiId,
    /// Nodes that were asked, with the number of each question.
    asked: Arc<Mutex<Vec<(NodeId, u32)>>>,
    /// Members of the original.
    deaf: Vec<NodeId>,
    /// [`AS_SNAPSHOT`] or 0.
    kind: u8,
    _here: Turn,
}

impl Held {
    /// The VDI was announced as a snapshot: no update goes on at a node that does not know.
    pub fn becomes_snapshot(&mut self) {
        self.kind = AS_SNAPSHOT;
    }

    /// Members that cannot hold anything back.
    pub fn deaf(&self) -> &[NodeId] {
        &self.deaf
    }

    /// Lets go, and returns when every member has: from then on all refuse writes to the snapshot.
    pub async fn let_go(self) {
        let asked = std::mem::take(&mut *self.asked.lock());
        let (sheep, vid, kind) = (self.sheep.clone(), self.vid, self.kind);
        drop(self); // this node knows
        let end = Instant::now() + PATIENCE;
        join_all(asked.into_iter().map(|(node, serial)| {
            let sheep = &sheep;
            async move {
                while ask(sheep, node, vid, (order::LET_GO, kind), serial, LET_GO).await.is_err()
                    && sheep.views.load().is_member(&node)
                {
                    if Instant::now() > end {
                        tracing::warn!("{node} does not say that it knows of the snapshot {vid:?}");
                        return;
                    }
                    sleep(PAUSE).await;
                }
            }
        }))
        .await;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let (sheep, vid, kind) = (self.sheep.clone(), self.vid, self.kind);
        for (node, serial) in std::mem::take(&mut *self.asked.lock()) {
            let sheep = sheep.clone();
            tokio::spawn(async move { ask(&sheep, node, vid, (order::LET_GO, kind), serial, LET_GO).await });
        }
    }
}

async fn ask(
    sheep: &Arc<Sheep>,
    node: NodeId,
    vid: VdiId,
    (what, kind): (u8, u8),
    serial: u32,
    deadline: Duration,
) -> Result<(), ResultCode> {
    let body = OrderRequest { oid: Oid::inode(vid), what, kind, serial, ..OrderRequest::zeroed() };
    tell(sheep, node, body, Bytes::from(sheep.me.encode()), deadline).await
}

/// Sends ORDER_PEER about a VDI in the present epoch; only whether it succeeded matters.
pub(super) async fn tell(
    sheep: &Arc<Sheep>,
    node: NodeId,
    body: OrderRequest,
    payload: Bytes,
    deadline: Duration,
) -> Result<(), ResultCode> {
    let request = Request::new(Opcode::ORDER_PEER).flag(Flags::WRITE).epoch(sheep.views.epoch());
    let reply = sheep.peers.call(&node, request.with_order(body), payload, deadline).await;
    reply.map_err(|_| ResultCode::NETWORK_ERROR)?.response.result.ok()
}

/// Keeps updates of `vid` out of every gateway, after those in progress have ended. Fails if a member does not answer.
pub async fn hold(sheep: &Arc<Sheep>, vid: VdiId) -> Result<Held, ResultCode> {
    let mut held = Held {
        sheep: sheep.clone(),
        vid,
        asked: Arc::default(),
        deaf: Vec::new(),
        kind: 0,
        _here: sheep.gateway.map_barrier(vid).await,
    };
    let view = sheep.views.load();
    let others = view.others(sheep.me);
    let end = Instant::now() + PATIENCE;
    let all = others.map(|node| {
        let asked = held.asked.clone();
        async move { (node, timeout_at(end, hold_at(sheep, node, vid, &asked)).await) }
    });
    for (node, outcome) in join_all(all).await {
        match outcome {
            Ok(true) => {}
            Ok(false) => held.deaf.push(node),
            Err(_) => {
                tracing::error!("{node} does not answer: no snapshot or clone of {vid:?} is taken");
                return Err(ResultCode::NETWORK_ERROR);
            }
        }
    }
    Ok(held)
}

/// Asks until the node holds updates back, or is no member any more. `false` = it is one of the original.
async fn hold_at(sheep: &Arc<Sheep>, node: NodeId, vid: VdiId, asked: &Mutex<Vec<(NodeId, u32)>>) -> bool {
    loop {
        // An answer may be lost and the hold be there: each question has a number, and each is let go.
        let serial = sheep.gateway.holds.next.fetch_add(1, Ordering::Relaxed);
        asked.lock().push((node, serial));
        match ask(sheep, node, vid, (order::HOLD, 0), serial, TAKE + LET_GO).await {
            Ok(()) => return true,
            Err(ResultCode::INVALID_PARMS) => {
                asked.lock().retain(|(asked, _)| *asked != node);
                return false;
            }
            Err(_) if !sheep.views.load().is_member(&node) => return true,
            Err(code) => tracing::debug!("{node} does not hold table updates of {vid:?} back: {code}"),
        }
        sleep(PAUSE).await;
    }
}

/// HOLD of `node`, a member: returns once updates in progress here have ended.
pub async fn hold_for(sheep: &Arc<Sheep>, node: NodeId, vid: VdiId, serial: u32) -> Result<(), ResultCode> {
    let (stop, ended) = oneshot::channel::<()>();
    sheep.gateway.holds.held.lock().insert((vid, node, serial), stop);
    let turn = tokio::time::timeout(TAKE, sheep.gateway.map_barrier(vid)).await;
    let Ok(turn) = turn else {
        end(sheep, node, vid, serial);
        return Err(ResultCode::NETWORK_ERROR);
    };
    let sheep = sheep.clone();
    tokio::spawn(async move {
        let left = async {
            loop {
                let view = sheep.views.load();
                if !view.is_member(&node) {
                    return;
                }
                sheep.views.changed_from(&view).await;
            }
        };
        tokio::select! {
            _ = ended => {}
            () = left => {}
            () = tokio::time::sleep(LONGEST) => tracing::warn!("{node} never let {vid:?} go"),
        }
        end(&sheep, node, vid, serial);
        drop(turn);
    });
    Ok(())
}

/// LET_GO of `node`.
pub async fn let_go(sheep: &Sheep, node: NodeId, vid: VdiId, body: &OrderRequest) {
    if body.kind == AS_SNAPSHOT {
        // The announcement is on its way here.
        let known = async {
            while !sheep.vdis.get(vid).is_some_and(|entry| entry.snapshot) {
                sleep(Duration::from_millis(1)).await;
            }
        };
        let _ = tokio::time::timeout(LONGEST, known).await;
    }
    end(sheep, node, vid, body.serial);
}

fn end(sheep: &Sheep, node: NodeId, vid: VdiId, serial: u32) {
    sheep.gateway.holds.held.lock().remove(&(vid, node, serial));
}
