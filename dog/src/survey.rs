//! The state of all nodes at one moment, for `dog top` and `dog cluster health`.
//!
//! Nodes are asked at the same time, each with a deadline, so that one that hangs costs no more than that.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use sheepdog_proto::admin::{RecoveryState, SdStat};
use sheepdog_proto::cluster::EpochRecord;
use sheepdog_proto::{MAX_NODES, NodeId, NodeRecord, Opcode, Request, ResultCode, Wire, node::decode_nodes};

use crate::session::Session;

/// How long a node may take for all its answers.
pub const DEADLINE: Duration = Duration::from_secs(5);

/// What a node says.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeState {
    /// Bytes for objects.
    pub size: u64,
    /// Bytes free of them.
    pub free: u64,
    /// Request counters.
    pub stat: SdStat,
    /// Recovery.
    pub recovery: RecoveryState,
}

/// The cluster as its nodes see it.
#[derive(Debug, Clone)]
pub struct Survey {
    /// The gateway's status: success while the cluster serves.
    pub status: ResultCode,
    /// The newest epoch, with the cluster's defaults; absent before the first format.
    pub record: Option<EpochRecord>,
    /// Members in node order, and what each says; `None` for those that do not answer in time.
    pub nodes: Vec<(NodeRecord, Option<NodeState>)>,
}

/// The gateway does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unreachable;

/// Asks everybody.
pub async fn survey(session: &Session) -> Result<Survey, Unreachable> {
    let gateway = within(from_gateway(session)).await;
    let (status, record, nodes) = gateway.ok_or(Unreachable)?;
    let ask = |node: NodeId| within(async move { state(session, &node).await });
    let states = join_all(nodes.iter().map(|node| ask(node.nid))).await;
    Ok(Survey { status, record, nodes: nodes.into_iter().zip(states).collect() })
}

async fn within<T>(answer: impl Future<Output = Option<T>>) -> Option<T> {
    tokio::time::timeout(DEADLINE, answer).await.ok().flatten()
}

async fn from_gateway(session: &Session) -> Option<(ResultCode, Option<EpochRecord>, Vec<NodeRecord>)> {
    if !session.reach(&session.gateway()).await {
        return None;
    }
    let request = Request::new(Opcode::GET_NODE_LIST).length(MAX_NODES * NodeRecord::LEN);
    let mut nodes = decode_nodes(&session.ask(request).await.ok()?.data);
    nodes.sort_by_key(|node| node.nid);
    let request = Request::new(Opcode::STAT_CLUSTER).length(EpochRecord::LEN);
    let reply = session.ask(request).await.ok()?;
    Some((reply.response.result, EpochRecord::decode(&reply.data).ok(), nodes))
}

async fn state(session: &Session, node: &NodeId) -> Option<NodeState> {
    if !session.reach(node).await {
        return None;
    }
    let ask = |request| session.send(node, request, Bytes::new());
    let space = ask(Request::new(Opcode::STAT_SHEEP)).await.ok()?.response.node();
    let stat = ask(Request::new(Opcode::STAT).length(SdStat::LEN)).await.ok()?;
    let recovery = ask(Request::new(Opcode::STAT_RECOVERY).length(RecoveryState::LEN)).await.ok()?;
    Some(NodeState {
        size: space.store_size,
        free: space.store_free,
        stat: SdStat::decode(&stat.data).unwrap_or_default(),
        recovery: RecoveryState::decode(&recovery.data).unwrap_or_default(),
    })
}
