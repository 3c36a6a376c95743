//! Questions about the cluster: members, epochs, defaults (spec 04, 9.4).

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use sheepdog_client::Reply;
use sheepdog_proto::cluster::{CLUSTER_INFO_LEN, EpochRecord};
use sheepdog_proto::header::{ClusterDefaultResponse, NodeResponse};
use sheepdog_proto::node::encode_nodes;
use sheepdog_proto::{ClusterStatus, Epoch, MAX_NODES, NodeRecord, Request, ResultCode};

use super::{fixed, list, result};
use crate::cluster::ops::{STORE_DRIVERS, epoch_log};
use crate::sheep::Sheep;

/// GET_NODE_LIST.
pub fn get_node_list<'a>(sheep: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        let view = sheep.views.load();
        let nodes = if view.joined { view.members() } else { &[] };
        let mut reply = list(&request, encode_nodes(nodes));
        if reply.response.result.is_ok() {
            let body = NodeResponse { nr_nodes: nodes.len() as u32, ..NodeResponse::zeroed() };
            reply.response = reply.response.with_node(body);
        }
        reply
    })
}

/// GET_CLUSTER_DEFAULT.
pub fn get_cluster_default<'a>(sheep: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        let view = sheep.views.load();
        let body = ClusterDefaultResponse {
            nr_copies: view.nr_copies,
            copy_policy: view.copy_policy,
            block_size_shift: view.block_size_shift,
        };
        let mut reply = result(&request, ResultCode::SUCCESS);
        reply.response = reply.response.with_cluster_default(body);
        reply
    })
}

/// CLUSTER_INFO.
pub fn cluster_info<'a>(sheep: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move { fixed(&request, sheep.views.load().info.encode_padded(CLUSTER_INFO_LEN)) })
}

/// GET_STORE_LIST: every driver's name, each followed by a blank.
pub fn get_store_list<'a>(_: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        let mut text: String = STORE_DRIVERS.iter().map(|driver| format!("{} ", driver.name())).collect();
        text.push('\0');
        let mut data = text.into_bytes();
        data.truncate(request.reply_capacity());
        list(&request, data)
    })
}

/// Longest STAT_CLUSTER answer, in bytes; older epochs are left out.
const MAX_HISTORY: usize = 64 << 20;

fn status_result(status: ClusterStatus, ctime: u64) -> ResultCode {
    match status {
        ClusterStatus::Ok => ResultCode::SUCCESS,
        ClusterStatus::Wait if ctime == 0 => ResultCode::WAIT_FOR_FORMAT,
        ClusterStatus::Wait => ResultCode::WAIT_FOR_JOIN,
        ClusterStatus::Shutdown => ResultCode::SHUTDOWN,
        ClusterStatus::Killed => ResultCode::SYSTEM_ERROR,
    }
}

/// STAT_CLUSTER: one record per epoch, newest first, as many as fit; the result is the cluster's status.
pub fn stat_cluster<'a>(sheep: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        let view = sheep.views.load();
        let slots = request.cluster().nodes_nr as usize;
        if slots > MAX_NODES {
            return result(&request, ResultCode::INVALID_PARMS);
        }
        let record_len = EpochRecord::LEN + slots * NodeRecord::LEN;
        let room = request.reply_capacity().min(MAX_HISTORY) / record_len;
        let mut data = Vec::new();
        let newest = if view.joined { view.epoch.0 } else { 0 };
        for (i, epoch) in (1..=newest).rev().take(room).enumerate() {
            let log = epoch_log(sheep, Epoch(epoch)).await;
            let mut record = EpochRecord { epoch: Epoch(epoch), ..EpochRecord::zeroed() };
            let mut nodes = Vec::new();
            if let Some(log) = log {
                record.time = log.time as u64;
                nodes = log.nodes;
            }
            if i == 0 {
                let h = &view.info.header;
                record.ctime = h.ctime;
                record.disable_recovery = h.disable_recovery;
                record.nr_copies = h.nr_copies;
                record.copy_policy = h.copy_policy;
                record.flags = h.flags;
                record.store = h.default_store;
            }
            if slots == 0 {
                record.time = 0;
                nodes.clear();
            } else if nodes.len() > slots {
                return result(&request, ResultCode::BUFFER_SMALL);
            }
            record.nr_nodes = nodes.len() as u32;
            data.extend(record.to_bytes());
            data.extend(encode_nodes(&nodes));
            data.resize((i + 1) * record_len, 0);
        }
        let mut reply = list(&request, data);
        reply.response.result = status_result(view.status, view.ctime);
        reply
    })
}

/// GET_EPOCH: this node's log of an epoch.
pub fn get_epoch<'a>(sheep: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        match sheep.meta.read_epoch(request.obj().tgt_epoch) {
            Ok(log) => list(&request, log.encode()),
            Err(_) => result(&request, ResultCode::NO_TAG),
        }
    })
}
