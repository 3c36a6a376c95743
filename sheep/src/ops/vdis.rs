//! The VDI table on the wire, and work parts of VDI operations that only look things up.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use sheepdog_client::Reply;
use sheepdog_proto::header::VdiResponse;
use sheepdog_proto::inode::STORE_POLICY_BTREE;
use sheepdog_proto::{ClusterFlags, Epoch, Flags, Request, ResultCode, VDI_BITMAP_LEN, Wire};

use super::{list, result};
use crate::sheep::Sheep;
use crate::vdi::lookup::{Query, lookup};
use crate::vdi::objects::read_lookup_header;
use crate::vdi::{attr, create, delete};

/// How long a node that joined waits for an answer of one that is behind before it asks again.
const CATCH_UP: Duration = Duration::from_secs(1);

fn bitmap(request: &Request, bits: Vec<u8>) -> Reply {
    if request.data_length as usize != VDI_BITMAP_LEN || request.flags.contains(Flags::WRITE) {
        return result(request, ResultCode::INVALID_PARMS);
    }
    list(request, bits)
}

/// READ_VDIS.
pub fn read_vdis<'a>(sheep: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move { bitmap(&request, sheep.vdis.in_use_bitmap()) })
}

/// READ_DEL_VDIS.
pub fn read_del_vdis<'a>(sheep: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move { bitmap(&request, sheep.vdis.deleted_bitmap()) })
}

/// GET_VDI_COPIES. A node of this project that joins names the epoch of its join in the field of the target epoch: before this
/// node has reached it, it may not know of VDIs that the other one will hear nothing of.
pub fn get_vdi_copies<'a>(sheep: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        if !has_reached(sheep, request.obj().tgt_epoch).await {
            return result(&request, ResultCode::AGAIN);
        }
        let records = sheep.vdis.records();
        list(&request, records.into_iter().flat_map(|r| sheep.recovery.altered.mark(r).encode()).collect())
    })
}

/// Waits a little until this node has reached an epoch. `false` = it has not.
async fn has_reached(sheep: &Sheep, epoch: Epoch) -> bool {
    let reached = sheep.views.until(|view| epoch == Epoch(0) || !view.epoch.is_before(epoch));
    tokio::time::timeout(CATCH_UP, reached).await.is_ok()
}

/// VDI_STATE_CHECKPOINT_CTL: lock state of a joining node (spec 05, section 18).
pub fn checkpoint<'a>(sheep: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        if !sheep.views.load().flags.contains(ClusterFlags::USE_LOCK) {
            return result(&request, ResultCode::SUCCESS);
        }
        let body = request.checkpoint();
        if body.get == 0 {
            sheep.vdis.free_checkpoint(body.tgt_epoch);
            return result(&request, ResultCode::SUCCESS);
        }
        match sheep.vdis.checkpoint_record(body.tgt_epoch, body.vid) {
            Ok(record) => list(&request, record.encode()),
            Err(code) => result(&request, code),
        }
    })
}

fn vdi_answer(request: &Request, (code, body): (ResultCode, VdiResponse)) -> Reply {
    let mut reply = result(request, code);
    reply.response = reply.response.with_vdi(body);
    reply
}

fn vdi_reply(request: &Request, outcome: Result<VdiResponse, ResultCode>) -> Reply {
    let answer = match outcome {
        Ok(body) => (ResultCode::SUCCESS, body),
        Err(code) => (code, VdiResponse::zeroed()),
    };
    vdi_answer(request, answer)
}

async fn find(sheep: &Arc<Sheep>, request: &Request, payload: &[u8]) -> Result<VdiResponse, ResultCode> {
    let query = Query::parse(payload, request.vdi().snapid)?;
    let vid = lookup(sheep, &query).await.result?;
    let redundancy = sheep.redundancy(vid, &sheep.views.load());
    Ok(VdiResponse {
        vdi_id: vid,
        copies: redundancy.copies,
        block_size_shift: redundancy.block_size_shift,
        ..VdiResponse::zeroed()
    })
}

/// GET_VDI_INFO.
pub fn get_vdi_info<'a>(sheep: &'a Arc<Sheep>, request: Request, payload: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move { vdi_reply(&request, find(sheep, &request, &payload).await) })
}

/// LOCK_VDI, work part. Hypervolumes are refused to clients that do not say, by the store policy in their request, that
/// they know their index: QEMU and tgt would take it for a table and destroy it (spec 01, 13).
pub fn lock_vdi<'a>(sheep: &'a Arc<Sheep>, request: Request, payload: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move {
        let outcome = async {
            if sheep.vdis.is_collecting() {
                return Err(ResultCode::COLLECTING_CINFO);
            }
            let found = find(sheep, &request, &payload).await?;
            let header = read_lookup_header(sheep, found.vdi_id).await?;
            let knows = request.vdi().store_policy == STORE_POLICY_BTREE;
            let hyper = header.store_policy == STORE_POLICY_BTREE;
            if hyper && !knows { Err(ResultCode::INVALID_PARMS) } else { Ok(found) }
        };
        vdi_reply(&request, outcome.await)
    })
}

/// RELEASE_VDI, work part: nothing but the order.
pub fn release_vdi<'a>(_: &'a Arc<Sheep>, request: Request, _: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move { result(&request, ResultCode::SUCCESS) })
}

/// NEW_VDI, work part.
pub fn new_vdi<'a>(sheep: &'a Arc<Sheep>, request: Request, payload: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move { vdi_answer(&request, create::new_vdi(sheep, &request, &payload).await) })
}

/// DEL_VDI, work part.
pub fn del_vdi<'a>(sheep: &'a Arc<Sheep>, request: Request, payload: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move { vdi_reply(&request, delete::del_vdi(sheep, &request, &payload).await) })
}

/// GET_VDI_ATTR, work part.
pub fn get_vdi_attr<'a>(sheep: &'a Arc<Sheep>, request: Request, payload: Bytes) -> BoxFuture<'a, Reply> {
    Box::pin(async move { vdi_answer(&request, attr::get_vdi_attr(sheep, &request, &payload).await) })
}
