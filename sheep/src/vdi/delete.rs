//! DEL_VDI (spec 05, section 11): frees what is left of the table, then empties the inode. The whole cluster waits
//! meanwhile, so the blocks of a hypervolume are removed afterwards.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use sheepdog_proto::header::VdiResponse;
use sheepdog_proto::inode::{GREF_OFFSET, INODE_HEADER_LEN, InodeHeader, STORE_POLICY_BTREE, table_offset};
use sheepdog_proto::{ClusterFlags, Oid, Request, ResultCode, VdiId};

use super::lookup::{Query, lookup};
use super::objects::{Inode, read_inode};
use super::{reclaim, tree};
use crate::gateway::map;
use crate::sheep::Sheep;

/// Table entries cleared in one update.
const BATCH: usize = 4096;

/// Blocks of saved memory that may be missing in a row.
const MAX_VMSTATE_GAP: usize = 64;

/// Work part of DEL_VDI. On any failure the VDI stays and is not marked deleted (mandated deviation 6).
pub async fn del_vdi(
    sheep: &Arc<Sheep>,
    request: &Request,
    payload: &[u8],
) -> Result<VdiResponse, ResultCode> {
    let query = Query::parse(payload, request.vdi().snapid)?;
    let vid = lookup(sheep, &query).await.result?;
    let inode = read_inode(sheep, vid).await?;
    if inode.header.store_policy == STORE_POLICY_BTREE {
        delete_hypervolume(sheep, &inode).await?;
    } else {
        delete_flat(sheep, &inode).await?;
    }
    Ok(VdiResponse { vdi_id: vid, ..VdiResponse::zeroed() })
}

async fn delete_flat(sheep: &Arc<Sheep>, inode: &Inode) -> Result<(), ResultCode> {
    let vid = inode.header.vdi_id;
    clear_table(sheep, vid, inode).await?;
    remove_vmstate(sheep, &inode.header).await?;
    empty_inode(sheep, inode).await?;
    // A client that did not know may have added entries until just now; an inode without name takes none.
    map::settle_updates(sheep, vid).await;
    if let Err(code) = clear_rest(sheep, vid).await {
        tracing::error!("{vid:?} is deleted, but blocks added meanwhile were not freed: {code}");
    }
    Ok(())
}

async fn delete_hypervolume(sheep: &Arc<Sheep>, inode: &Inode) -> Result<(), ResultCode> {
    let freed = tree::freed_by(sheep, inode.header.vdi_id).await?;
    remove_vmstate(sheep, &inode.header).await?;
    empty_inode(sheep, inode).await?;
    if sheep.views.load().flags.contains(ClusterFlags::RECYCLE_VID) {
        // The next VDI may have these objects' names.
        reclaim::remove_all(sheep, freed.oids()).await;
    } else {
        reclaim::remove_later(sheep, freed.oids());
    }
    Ok(())
}

async fn clear_table(sheep: &Arc<Sheep>, vid: VdiId, inode: &Inode) -> Result<(), ResultCode> {
    for (i, chunk) in inode.table.chunks(BATCH).enumerate() {
        if chunk.iter().any(|v| *v != 0) {
            let zeros = sheepdog_buffer::zeros(chunk.len() * 4);
            map::update(sheep, vid, table_offset((i * BATCH) as u32), zeros, map::By::Deletion).await?;
        }
    }
    Ok(())
}

async fn clear_rest(sheep: &Arc<Sheep>, vid: VdiId) -> Result<(), ResultCode> {
    let inode = read_inode(sheep, vid).await?;
    clear_table(sheep, vid, &inode).await
}

/// The blocks that the size counts, and those behind them to the first that is missing: a savevm that died has written
/// memory before it writes the size.
async fn remove_vmstate(sheep: &Arc<Sheep>, header: &InodeHeader) -> Result<(), ResultCode> {
    let counted = header.vm_state_size.div_ceil(header.block_size()).min(u64::from(u32::MAX)) as u32;
    let mut absent = 0;
    for index in 0..=u32::MAX {
        match sheep.gateway.remove_object(sheep, Oid::vmstate(header.vdi_id, index)).await {
            Ok(()) => absent = 0,
            // What there is behind goes with the family (orphans.rs) if it cannot be removed now.
            Err(_) if index >= counted => break,
            // The size is the client's word: a gap this long is the end.
            Err(ResultCode::NO_OBJ) if absent == MAX_VMSTATE_GAP => break,
            Err(ResultCode::NO_OBJ) => absent += 1,
            Err(code) => return Err(code),
        }
    }
    Ok(())
}

/// The name, the size and everything behind the header become zero; the rest of the header stays.
async fn empty_inode(sheep: &Arc<Sheep>, inode: &Inode) -> Result<(), ResultCode> {
    if inode.header.is_deleted() {
        return Ok(());
    }
    let oid = Oid::inode(inode.header.vdi_id);
    let header = InodeHeader { name: [0; 256], vdi_size: 0, ..inode.header };
    if inode.header.store_policy == STORE_POLICY_BTREE {
        // At once: an index without its header, or the other way round, would be a VDI that lost its blocks.
        let mut bytes = BytesMut::zeroed(GREF_OFFSET);
        bytes[..INODE_HEADER_LEN].copy_from_slice(&header.to_bytes());
        return sheep.gateway.write_object(sheep, oid, 0, bytes.freeze()).await;
    }
    let bytes = Bytes::copy_from_slice(&header.to_bytes()[..INODE_HEADER_LEN]);
    sheep.gateway.write_object(sheep, oid, 0, bytes).await
}
