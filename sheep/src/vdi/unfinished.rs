//! Snapshots that were announced and of which it is open what became of them.
//!
//! NEW_VDI tells every node first that the working VDI is a snapshot, then writes the inodes: the old one's, that it is a
//! snapshot, and the new one's. If it fails in between, or its node is lost, the VDI would be read-only for ever, or its name
//! without a working VDI although there is one. So every node then reads the inodes. If the old one says nothing of a
//! snapshot, the announcement is taken back; if the new one is there, the nodes tell each other that it is in use, as NEW_VDI
//! would have.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sheepdog_proto::header::VdiStateRequest;
use sheepdog_proto::{NodeId, Opcode, Request, ResultCode, VdiId};

use super::objects::read_lookup_header;
use super::orphans::is_settled;
use super::table::Unfinished;
use crate::sheep::Sheep;

/// Between two looks. What the lost node was writing is on all homes or on none by then.
const PAUSE: Duration = Duration::from_secs(2);

/// `node` is gone, or its NEW_VDI has failed: settles what it announced, in the background.
pub fn settle(sheep: &Arc<Sheep>, node: NodeId) {
    for (vid, Unfinished { which, child, .. }) in sheep.vdis.unfinished_of(node) {
        let sheep = sheep.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(PAUSE).await;
                if !is_settled(&sheep) {
                    continue;
                }
                match read_lookup_header(&sheep, vid).await {
                    Ok(header) => {
                        let is_snapshot = header.is_snapshot() || header.is_deleted();
                        if is_snapshot && let Err(code) = complete(&sheep, vid, child).await {
                            tracing::debug!("{child:?}: {code}");
                            continue;
                        }
                        if sheep.vdis.settle_unfinished(vid, which, is_snapshot) && !is_snapshot {
                            tracing::warn!("{vid:?}: the snapshot that {node} announced was not made");
                        }
                        return;
                    }
                    Err(code) => tracing::debug!("{vid:?}: {code}"),
                }
            }
        });
    }
}

/// Tells everybody that `child`, which goes on where `vid` became a snapshot, is in use, if it was made.
async fn complete(sheep: &Arc<Sheep>, vid: VdiId, child: VdiId) -> Result<(), ResultCode> {
    let header = match read_lookup_header(sheep, child).await {
        Ok(header) => header,
        Err(ResultCode::NO_OBJ) => return Ok(()),
        Err(code) => return Err(code),
    };
    if header.is_deleted() || sheep.vdis.is_in_use(child) {
        return Ok(());
    }
    tracing::warn!("{child:?} was made of {vid:?} by a node that could not say so any more");
    let body = VdiStateRequest {
        old_vid: vid,
        new_vid: child,
        copies: header.nr_copies,
        set_bitmap: 1,
        copy_policy: header.copy_policy,
        block_size_shift: header.block_size_shift,
    };
    let request = Request::new(Opcode::NOTIFY_VDI_ADD).with_vdi_state(body);
    sheep.cluster.submit_internal(request, Bytes::new()).await.response.result.ok()
}
