//! The arbiter of a VDI, on the first home of its inode: which gateways use the VDI ([`super::grants`]).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use parking_lot::Mutex;
use sheepdog_proto::header::{OrderRequest, order};
use sheepdog_proto::{Epoch, NodeId, Oid, Opcode, Request, ResultCode, VdiId};
use tokio::sync::Mutex as AsyncMutex;

use super::grants::Verdict;
use super::numbers;
use crate::peers::Lane;
use crate::sheep::Sheep;

/// A gateway that does not give a grant back within this time keeps others waiting.
const YIELD_DEADLINE: Duration = Duration::from_secs(3);

/// Who uses one VDI in one epoch.
#[derive(Default)]
struct Users {
    epoch: Epoch,
    serial: u32,
    /// By node: whether it writes.
    nodes: HashMap<NodeId, bool>,
    /// Operations go through the first homes.
    shared: bool,
}

impl Users {
    /// The nodes whose grants are in the way of a claim.
    fn in_the_way(&self, claimant: NodeId, write: bool) -> Vec<NodeId> {
        let others = || self.nodes.iter().filter(|(node, _)| **node != claimant);
        let conflict = self.shared || write || others().any(|(_, writes)| *writes);
        if conflict { others().map(|(node, _)| *node).collect() } else { Vec::new() }
    }

    fn grant(&mut self, claimant: NodeId, write: bool) -> Verdict {
        let before = self.nodes.entry(claimant).or_default();
        *before |= write;
        self.serial += 1;
        Verdict { direct: !self.shared, serial: self.serial }
    }
}

/// The claims that this node decides.
#[derive(Default)]
pub struct Arbiter {
    vdis: Mutex<HashMap<VdiId, Arc<AsyncMutex<Users>>>>,
}

impl Arbiter {
    /// Decides a claim of `node` in `epoch`.
    pub async fn claim(
        &self,
        sheep: &Arc<Sheep>,
        node: NodeId,
        vid: VdiId,
        write: bool,
        epoch: Epoch,
    ) -> Result<Verdict, ResultCode> {
        let users = self.vdis.lock().entry(vid).or_default().clone();
        let mut users = users.lock().await;
        if sheep.views.epoch() != epoch {
            return Err(ResultCode::OLD_NODE_VER);
        }
        if users.epoch != epoch {
            *users = Users { epoch, ..Users::default() };
        }
        let others = users.in_the_way(node, write);
        if !others.is_empty() {
            // From here on until all have answered nobody may go on as if it were alone.
            users.shared = true;
            let serial = users.serial;
            let asked = others
                .into_iter()
                .map(|other| async move { (other, call_back(sheep, other, vid, epoch, serial).await) });
            for (other, answer) in join_all(asked).await {
                if answer? {
                    users.nodes.remove(&other);
                }
            }
        }
        users.shared &= users.nodes.keys().any(|other| *other != node);
        Ok(users.grant(node, write))
    }

    /// Forgets what was claimed in epochs other than `epoch`.
    pub fn forget_other(&self, epoch: Epoch) {
        // Somebody who has one locked is deciding a claim.
        self.vdis.lock().retain(|_, users| users.try_lock().map_or(true, |users| users.epoch == epoch));
    }
}

/// Ends what this gateway does directly with a VDI. Homes know then that its writes are done: one that seemed open could not
/// be judged any more once another gateway has written over it, should this node die at that moment.
pub async fn give_back(sheep: &Arc<Sheep>, vid: VdiId, epoch: Epoch, serial: u32) -> bool {
    let free = sheep.gateway.grants.give_back(vid, epoch, serial).await;
    numbers::tell_now(sheep).await;
    free
}

/// `true` = it does not use the VDI any more.
async fn call_back(
    sheep: &Arc<Sheep>,
    node: NodeId,
    vid: VdiId,
    epoch: Epoch,
    serial: u32,
) -> Result<bool, ResultCode> {
    if node == sheep.me {
        let given = give_back(sheep, vid, epoch, serial);
        return tokio::time::timeout(YIELD_DEADLINE, given).await.map_err(|_| ResultCode::NETWORK_ERROR);
    }
    let body = OrderRequest { oid: Oid::inode(vid), what: order::YIELD, serial, ..OrderRequest::zeroed() };
    let request = Request::new(Opcode::ORDER_PEER).epoch(epoch).with_order(body);
    let reply = sheep.peers.call_on(Lane::Control, &node, request, Bytes::new(), YIELD_DEADLINE).await;
    let reply = reply.map_err(|_| ResultCode::NETWORK_ERROR)?;
    reply.response.result.ok()?;
    Ok(reply.response.order().verdict == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(port: u16) -> NodeId {
        NodeId { port, ..NodeId::zeroed() }
    }

    #[test]
    fn readers_do_not_meet_and_a_writer_meets_everybody() {
        let mut users = Users::default();
        assert!(users.in_the_way(node(1), true).is_empty());
        assert!(users.grant(node(1), false).direct);
        assert!(users.in_the_way(node(2), false).is_empty(), "two readers");
        assert!(users.grant(node(2), false).direct);
        assert_eq!(users.in_the_way(node(2), true), [node(1)]);
        users.nodes.remove(&node(1));
        users.grant(node(2), true);
        assert_eq!(users.in_the_way(node(1), false), [node(2)], "somebody writes");
        assert!(users.in_the_way(node(2), false).is_empty());
    }
}
