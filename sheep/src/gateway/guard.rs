//! Header writes of clients (spec 05, sections 6 and 13). Clients write whole headers back as they once read them; one
//! that read it before a snapshot must not turn the snapshot into a working VDI again, nor rename an inode's vid.

use std::sync::Arc;

use bytes::Bytes;
use sheepdog_proto::inode::{INODE_HEADER_LEN, INODE_LOOKUP_LEN, InodeHeader, STORE_POLICY_BTREE};
use sheepdog_proto::{Oid, ResultCode};

use crate::sheep::Sheep;

/// Bytes of `snap_ctime` in an inode.
const SNAP_CTIME: std::ops::Range<u64> = 520..528;

/// Bytes of `btree_counter` in an inode.
const COUNTER: std::ops::Range<usize> = 568..572;

/// Writes `data` at `offset`, which lies in the header; what follows in the same request goes along unaccounted.
pub async fn write_header(sheep: &Arc<Sheep>, oid: Oid, offset: u64, data: Bytes) -> Result<(), ResultCode> {
    let _serial = sheep.gateway.map_barrier(oid.vid()).await;
    let old = sheep.gateway.read_object(sheep, oid, 0, INODE_LOOKUP_LEN).await?;
    let mut bytes = [0; INODE_HEADER_LEN];
    bytes[..old.len()].copy_from_slice(&old);
    let before = InodeHeader::from_bytes(&bytes);
    let start = offset as usize;
    let inside = data.len().min(INODE_HEADER_LEN - start);
    bytes[start..start + inside].copy_from_slice(&data[..inside]);
    let after = InodeHeader::from_bytes(&bytes);
    if after.vdi_id != before.vdi_id {
        return Err(ResultCode::INVALID_PARMS);
    }
    let touches_mark = offset < SNAP_CTIME.end && offset + data.len() as u64 > SNAP_CTIME.start;
    // Whoever takes the snapshot announces it first and marks the inode later.
    let snapshot = before.is_snapshot() || sheep.redundancy(oid.vid(), &sheep.views.load()).snapshot;
    if touches_mark && snapshot && !after.is_snapshot() {
        return Err(ResultCode::READONLY);
    }
    if before.store_policy == STORE_POLICY_BTREE && start + data.len() > INODE_HEADER_LEN {
        // The root of an index, sent with the header as the client once read it.
        if snapshot {
            return Err(ResultCode::READONLY);
        }
        if start == 0 {
            let data = crate::vdi::tree::keep_header(&old, &data, COUNTER);
            return sheep.gateway.write_object(sheep, oid, offset, data).await;
        }
    }
    sheep.gateway.write_object(sheep, oid, offset, data).await
}
