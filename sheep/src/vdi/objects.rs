//! Inodes as cluster operations read and write them: whole prefixes, only the bytes that are used.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sheepdog_proto::inode::{GREF_OFFSET, INODE_HEADER_LEN, INODE_LOOKUP_LEN, InodeHeader, TABLE_OFFSET};
use sheepdog_proto::{Oid, ResultCode, VdiId, Wire};

use crate::sheep::Sheep;

/// An inode's header and the used prefixes of its two tables.
#[derive(Clone)]
pub struct Inode {
    /// The header.
    pub header: InodeHeader,
    /// Owners of the first blocks; blocks behind are unallocated.
    pub table: Vec<u32>,
    /// Generation and count of each of them.
    pub grefs: Vec<(i32, i32)>,
}

/// How long a lookup waits for one inode.
const LOOKUP_DEADLINE: Duration = Duration::from_secs(20);

/// The part of a header that a name lookup needs.
pub async fn read_lookup_header(sheep: &Arc<Sheep>, vid: VdiId) -> Result<InodeHeader, ResultCode> {
    // A lookup holds up the whole cluster: it does not wait for an inode whose homes are away.
    let read = sheep.gateway.read_object(sheep, Oid::inode(vid), 0, INODE_LOOKUP_LEN);
    let head = tokio::time::timeout(LOOKUP_DEADLINE, read).await.map_err(|_| ResultCode::NETWORK_ERROR)??;
    let mut whole = [0; INODE_HEADER_LEN];
    whole[..head.len()].copy_from_slice(&head);
    Ok(InodeHeader::from_bytes(&whole))
}

/// Header, table and generation references of a flat VDI. The table is read beyond the VDI's size, too: clients may have
/// made it smaller, and what lies behind is still referenced.
pub async fn read_inode(sheep: &Arc<Sheep>, vid: VdiId) -> Result<Inode, ResultCode> {
    let oid = Oid::inode(vid);
    let head = sheep.gateway.read_object(sheep, oid, 0, INODE_HEADER_LEN).await?;
    let header = InodeHeader::get(&head);
    let table =
        sheep.gateway.read_object(sheep, oid, TABLE_OFFSET as u64, GREF_OFFSET - TABLE_OFFSET).await?;
    let table: Vec<u32> = sheepdog_proto::inode::table(&table).iter().map(|v| v.get()).collect();
    let used = table.iter().rposition(|v| *v != 0).map_or(0, |last| last + 1);
    let grefs = sheep.gateway.read_object(sheep, oid, GREF_OFFSET as u64, used * 8).await?;
    let grefs = sheepdog_proto::inode::grefs(&grefs).iter();
    let grefs = grefs.map(|g| (g.generation.get(), g.count.get())).collect();
    Ok(Inode { header, table: table[..used].to_vec(), grefs })
}

impl Inode {
    /// Bytes of the generation references.
    pub fn encode_grefs(&self) -> Bytes {
        let bytes = self.grefs.iter().flat_map(|(g, c)| [g.to_le_bytes(), c.to_le_bytes()].concat());
        Bytes::from(bytes.collect::<Vec<u8>>())
    }

    /// Bytes of the table.
    pub fn encode_table(&self) -> Bytes {
        Bytes::from(self.table.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
    }

    /// Every allocated reference is copied once more.
    pub fn count_copy(&mut self) {
        for (owner, (_, count)) in self.table.iter().zip(&mut self.grefs) {
            if *owner != 0 {
                *count = count.wrapping_add(1);
            }
        }
    }

    /// References of a VDI derived from this one: one generation further, not copied yet.
    pub fn derived_grefs(&self) -> Vec<(i32, i32)> {
        let derive = |(owner, (generation, _)): (&u32, &(i32, i32))| match owner {
            0 => (0, 0),
            _ => (generation.wrapping_add(1), 0),
        };
        self.table.iter().zip(&self.grefs).map(derive).collect()
    }
}

/// Creates an inode object in one step: a child with its table but without its references would give its parent's
/// blocks away.
pub async fn create_inode(sheep: &Arc<Sheep>, inode: &Inode) -> Result<(), ResultCode> {
    let oid = Oid::inode(inode.header.vdi_id);
    let mut bytes = [inode.header.to_bytes().as_slice(), &inode.encode_table()].concat();
    if inode.grefs.iter().any(|g| *g != (0, 0)) {
        bytes.resize(GREF_OFFSET, 0);
        bytes.extend_from_slice(&inode.encode_grefs());
    }
    sheep.gateway.create_object(sheep, oid, 0, bytes.into()).await
}
