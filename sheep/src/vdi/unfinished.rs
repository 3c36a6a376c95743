//! Snapshots that were announced and not made.
//!
//! NEW_VDI tells every node first that the working VDI is a snapshot, then writes the inodes. If it fails in between, or
//! its node is lost, the VDI would be read-only for ever: no inode says that it is a snapshot, and its name still leads to
//! it. So every node then reads its inode and takes the announcement back if nothing is there.

use std::sync::Arc;
use std::time::Duration;

use sheepdog_proto::NodeId;

use super::objects::read_lookup_header;
use super::orphans::is_settled;
use crate::sheep::Sheep;

/// Between two looks. What the lost node was writing is on all homes or on none by then.
const PAUSE: Duration = Duration::from_secs(2);

/// `node` is gone, or its NEW_VDI has failed: settles what it announced, in the background.
pub fn settle(sheep: &Arc<Sheep>, node: NodeId) {
    for (vid, which) in sheep.vdis.unfinished_of(node) {
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
