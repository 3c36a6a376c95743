//! DEL_VDI (spec 05, section 11): frees what is left of the table, then empties the inode.

use std::sync::Arc;

use bytes::Bytes;
use sheepdog_proto::header::VdiResponse;
use sheepdog_proto::inode::{
    GREF_OFFSET, INODE_HEADER_LEN, InodeHeader, STORE_POLICY_BTREE, TABLE_OFFSET, table_offset,
};
use sheepdog_proto::{Oid, Request, ResultCode, VdiId};

use super::lookup::{Query, lookup};
use super::objects::{Inode, read_inode};
use super::tree;
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
        tree::free_blocks(sheep, vid).await?;
    } else {
        clear_table(sheep, vid, &inode).await?;
    }
    remove_vmstate(sheep, &inode.header).await?;
    empty_inode(sheep, &inode).await?;
    if inode.header.store_policy != STORE_POLICY_BTREE {
        // A client that did not know may have added entries until just now; an inode without name takes none.
        map::settle_updates(sheep, vid).await;
        if let Err(code) = clear_rest(sheep, vid).await {
            tracing::error!("{vid:?} is deleted, but blocks added meanwhile were not freed: {code}");
        }
    }
    Ok(VdiResponse { vdi_id: vid, ..VdiResponse::zeroed() })
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
            // The size is the client's word: a gap this long is the end.
            Err(ResultCode::NO_OBJ) if index >= counted || absent == MAX_VMSTATE_GAP => break,
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
        let zeros = sheepdog_buffer::zeros(GREF_OFFSET - TABLE_OFFSET);
        sheep.gateway.write_object(sheep, oid, TABLE_OFFSET as u64, zeros).await?;
    }
    let bytes = Bytes::copy_from_slice(&header.to_bytes()[..INODE_HEADER_LEN]);
    sheep.gateway.write_object(sheep, oid, 0, bytes).await
}
