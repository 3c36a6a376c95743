//! The epoch history, as STAT_CLUSTER gives it (spec 07, 11.4 and 14.1).

use sheepdog_proto::cluster::EpochRecord;
use sheepdog_proto::header::ClusterRequest;
use sheepdog_proto::node::decode_nodes;
use sheepdog_proto::{MAX_NODES, NodeRecord, Opcode, Request, ResultCode, Wire};

use crate::session::{ClusterView, Session, Transport};

/// Most bytes asked for; older epochs are left out of longer histories.
const MAX_ANSWER: usize = 256 << 20;

/// One epoch.
#[derive(Debug, Clone)]
pub struct EpochNodes {
    /// Its record. Creation time, redundancy, flags and store are only in the newest.
    pub record: EpochRecord,
    /// Its members.
    pub nodes: Vec<NodeRecord>,
}

/// The answer.
#[derive(Debug, Clone)]
pub struct Epochs {
    /// The cluster's status; records may come with any.
    pub result: ResultCode,
    /// Newest first.
    pub list: Vec<EpochNodes>,
}

/// Fetches the history from the gateway, with more room for nodes until it suffices.
pub async fn fetch(session: &Session, view: &ClusterView) -> Result<Epochs, Transport> {
    let mut slots = view.nodes.len().max(1);
    loop {
        let record = EpochRecord::LEN + slots * NodeRecord::LEN;
        let length = (view.epoch.0 as usize).saturating_mul(record).min(MAX_ANSWER / record * record);
        let body = ClusterRequest { nodes_nr: slots as u32, ..ClusterRequest::zeroed() };
        let request = Request::new(Opcode::STAT_CLUSTER).length(length).with_cluster(body);
        let reply = session.ask(request).await?;
        if reply.response.result == ResultCode::BUFFER_SMALL && slots < MAX_NODES {
            slots = (slots * 2).min(MAX_NODES);
            continue;
        }
        let list = reply.data.chunks_exact(record).map(decode).collect();
        return Ok(Epochs { result: reply.response.result, list });
    }
}

fn decode(bytes: &[u8]) -> EpochNodes {
    let record = EpochRecord::get(bytes);
    let mut nodes = decode_nodes(&bytes[EpochRecord::LEN..]);
    nodes.truncate(record.nr_nodes as usize);
    nodes.sort_by_key(|node| node.nid);
    EpochNodes { record, nodes }
}
