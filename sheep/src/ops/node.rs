//! Questions to and orders for this node.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use sheepdog_client::Reply;
use sheepdog_proto::admin::{MD_INFO_LEN, RecoveryThrottling, encode_md_info};
use sheepdog_proto::header::NodeResponse;
use sheepdog_proto::{ClusterFlags, Flags, NodeRecord, Request, ResultCode, Wire};

use super::{fixed, result};
use crate::disks;
use crate::sheep::Sheep;
use crate::shell::log;
use crate::shell::log::Severity;
use crate::shell::options::DEFAULT_VNODES;

/// STAT_SHEEP.
pub fn stat_sheep<'a>(sheep: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        let space = sheep.store.as_ref().map(|s| s.space());
        let (free, used) = space.map_or((0, 0), |s| (s.free, s.used));
        let body = NodeResponse { store_size: free + used, store_free: free, ..NodeResponse::zeroed() };
        let mut reply = result(&request, ResultCode::SUCCESS);
        reply.response = reply.response.with_node(body);
        reply
    })
}

/// STAT.
pub fn stat<'a>(sheep: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move { fixed(&request, sheep.stats.snapshot().encode()) })
}

/// GET_LOGLEVEL.
pub fn get_log_level<'a>(_: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move { fixed(&request, (log::level() as i32).encode()) })
}

/// SET_LOGLEVEL.
pub fn set_log_level<'a>(_: &'a Arc<Sheep>, request: Request, payload: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        match i32::decode(&payload).ok().and_then(Severity::from_number) {
            Some(level) => {
                log::set_level(level);
                result(&request, ResultCode::SUCCESS)
            }
            None => result(&request, ResultCode::INVALID_PARMS),
        }
    })
}

/// KILL_NODE.
pub fn kill_node<'a>(sheep: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        sheep.cluster.kill();
        result(&request, ResultCode::SUCCESS)
    })
}

/// STAT_RECOVERY: the round of recovery, else the moving of objects off unplugged disks.
pub fn stat_recovery<'a>(sheep: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        let mut state = sheep.recovery.state();
        if state.in_recovery == 0
            && let Some(draining) = sheep.disks.draining(sheep)
        {
            state = draining;
        }
        fixed(&request, state.encode())
    })
}

/// GET_RECOVERY.
pub fn get_recovery<'a>(sheep: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move { fixed(&request, sheep.recovery.throttling().encode()) })
}

/// SET_RECOVERY.
pub fn set_recovery<'a>(sheep: &'a Arc<Sheep>, request: Request, payload: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        match RecoveryThrottling::decode(&payload) {
            Ok(limits) => {
                sheep.recovery.set_throttling(limits);
                result(&request, ResultCode::SUCCESS)
            }
            Err(_) => result(&request, ResultCode::INVALID_PARMS),
        }
    })
}

/// MD_INFO.
pub fn md_info<'a>(sheep: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        if request.data_length as usize != MD_INFO_LEN || request.flags.contains(Flags::WRITE) {
            return result(&request, ResultCode::INVALID_PARMS);
        }
        let disks = sheep.store.as_ref().map(|s| s.md_info()).unwrap_or_default();
        fixed(&request, encode_md_info(&disks))
    })
}

/// MD_PLUG_DISKS.
pub fn md_plug<'a>(sheep: &'a Arc<Sheep>, request: Request, payload: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move { result(&request, disks::plug(sheep, &payload).await) })
}

/// MD_UNPLUG_DISKS.
pub fn md_unplug<'a>(sheep: &'a Arc<Sheep>, request: Request, payload: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move { result(&request, disks::unplug(sheep, &payload).await) })
}

fn my_record(sheep: &Sheep) -> Option<NodeRecord> {
    sheep.views.load().members().iter().find(|n| n.nid == sheep.me).copied()
}

/// GET_VNODES.
pub fn get_vnodes<'a>(sheep: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        let auto = sheep.views.load().flags.contains(ClusterFlags::AUTO_VNODES);
        let vnodes = match my_record(sheep) {
            _ if sheep.store.is_none() => 0,
            Some(node) if !auto => node.nr_vnodes,
            _ => DEFAULT_VNODES,
        };
        fixed(&request, i32::from(vnodes).encode())
    })
}

/// SET_VNODES: any payload of at least 4 bytes (spec 02, 4.1).
pub fn set_vnodes<'a>(sheep: &'a Arc<Sheep>, request: Request, payload: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        if sheep.store.is_none() {
            return result(&request, ResultCode::GATEWAY_MODE);
        }
        if sheep.views.load().flags.contains(ClusterFlags::AUTO_VNODES) {
            return result(&request, ResultCode::INVALID_VNODES_STRATEGY);
        }
        let count = i32::decode(&payload).ok().and_then(|n| u16::try_from(n).ok()).filter(|n| *n > 0);
        let (Some(nr_vnodes), Some(me)) = (count, my_record(sheep)) else {
            return result(&request, ResultCode::INVALID_PARMS);
        };
        let code = sheep.cluster.update_node(NodeRecord { nr_vnodes, ..me }).await;
        result(&request, code)
    })
}

/// TRACE_*: this build has no tracing; listing gives nothing, switching succeeds without effect, as the original's.
pub fn trace<'a>(_: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move { result(&request, ResultCode::SUCCESS) })
}

/// TRACE_READ_BUF: there are no trace records.
pub fn trace_read<'a>(_: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move { result(&request, ResultCode::SUCCESS) })
}

/// NFS_CREATE, NFS_DELETE: not built in.
pub fn nfs<'a>(_: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move { result(&request, ResultCode::NO_SUPPORT) })
}

/// FLUSH_DEL_CACHE: there is no cache to flush.
pub fn flush_del_cache<'a>(_: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move { result(&request, ResultCode::SUCCESS) })
}
