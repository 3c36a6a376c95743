//! Keeps table updates of a VDI out on every node while a snapshot or clone copies its table (spec 05, 26: "snapshot
//! against map update", "delete against clone").
//!
//! Updates are serialised per VDI in each gateway. Whoever derives a VDI takes that place in all gateways: an update is
//! either in the table that is copied, or comes after the base's counts were raised and drops what they say. Nodes of the
//! original cannot hold anything back; with them it is as it was.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use parking_lot::Mutex;
use sheepdog_proto::header::{OrderRequest, order};
use sheepdog_proto::{NodeId, Oid, Opcode, Request, ResultCode, VdiId, Wire};
use tokio::sync::oneshot;

use crate::order::Turn;
use crate::sheep::Sheep;

/// How long a node may take to end the updates that it has in progress; then it is about to leave.
const TAKE: Duration = Duration::from_secs(5);
/// A hold whose owner was not heard of again ends by itself. Above what any derivation takes.
const LONGEST: Duration = Duration::from_secs(300);
/// Deadline of letting go.
const LET_GO: Duration = Duration::from_secs(5);

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
    serial: u32,
    nodes: Vec<NodeId>,
    _here: Turn,
}

impl Drop for Held {
    fn drop(&mut self) {
        let (sheep, nodes) = (self.sheep.clone(), std::mem::take(&mut self.nodes));
        let (vid, serial) = (self.vid, self.serial);
        tokio::spawn(async move {
            let all = nodes.into_iter().map(|node| {
                let sheep = sheep.clone();
                async move { ask(&sheep, node, vid, order::LET_GO, serial, LET_GO).await }
            });
            join_all(all).await;
        });
    }
}

async fn ask(
    sheep: &Arc<Sheep>,
    node: NodeId,
    vid: VdiId,
    what: u8,
    serial: u32,
    deadline: Duration,
) -> Result<(), ResultCode> {
    let body = OrderRequest { oid: Oid::inode(vid), what, serial, ..OrderRequest::zeroed() };
    let request =
        Request::new(Opcode::ORDER_PEER).flag(sheepdog_proto::Flags::WRITE).epoch(sheep.views.epoch());
    let me = Bytes::from(sheep.me.encode());
    let reply = sheep.peers.call(&node, request.with_order(body), me, deadline).await;
    reply.map_err(|_| ResultCode::NETWORK_ERROR)?.response.result.ok()
}

/// Keeps updates of `vid` out of every gateway, after those in progress have ended.
pub async fn hold(sheep: &Arc<Sheep>, vid: VdiId) -> Held {
    let here = sheep.gateway.map_barrier(vid).await;
    let serial = sheep.gateway.holds.next.fetch_add(1, Ordering::Relaxed);
    let view = sheep.views.load();
    let others: Vec<NodeId> = view.members().iter().map(|n| n.nid).filter(|n| *n != sheep.me).collect();
    let asked = others.iter().map(|node| ask(sheep, *node, vid, order::HOLD, serial, TAKE + LET_GO));
    for (node, answer) in others.iter().zip(join_all(asked).await) {
        // INVALID_PARMS: a node of the original.
        if let Err(code) = answer
            && code != ResultCode::INVALID_PARMS
        {
            tracing::warn!("{node} does not hold table updates of {vid:?} back: {code}");
        }
    }
    Held { sheep: sheep.clone(), vid, serial, nodes: others, _here: here }
}

/// HOLD of `node`, a member: returns once updates in progress here have ended.
pub async fn hold_for(sheep: &Arc<Sheep>, node: NodeId, vid: VdiId, serial: u32) -> Result<(), ResultCode> {
    let (end, ended) = oneshot::channel::<()>();
    sheep.gateway.holds.held.lock().insert((vid, node, serial), end);
    let turn = tokio::time::timeout(TAKE, sheep.gateway.map_barrier(vid)).await;
    let Ok(turn) = turn else {
        let_go(sheep, node, vid, serial);
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
        let_go(&sheep, node, vid, serial);
        drop(turn);
    });
    Ok(())
}

/// LET_GO of `node`.
pub fn let_go(sheep: &Sheep, node: NodeId, vid: VdiId, serial: u32) {
    sheep.gateway.holds.held.lock().remove(&(vid, node, serial));
}
