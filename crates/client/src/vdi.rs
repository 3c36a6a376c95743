//! Requests that find, list, create and snapshot VDIs and read their inodes: what tools and front ends share.
//!
//! Every function is one or a few requests to a [`Service`]; results other than success come back as
//! [`ClientError::Refused`]. Reads of inodes are bounded and checked for length (spec 01, sections 7 and 12).

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::StreamExt;
use sheepdog_proto::header::{ObjRequest, VdiRequest};
use sheepdog_proto::inode::{self, GREF_OFFSET, INODE_HEADER_LEN, InodeHeader};
use sheepdog_proto::{
    CopyPolicy, Flags, MAX_DATA_OBJS, MAX_NAME_LEN, Oid, Opcode, Request, VDI_BITMAP_LEN, VdiId, Wire,
    fixed_str,
};

use crate::service::{ClientError, Reply, Service};

/// Inode headers read at once by [`list`].
const LIST_PARALLEL: usize = 16;

/// Which snapshot of a name is meant.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum SnapshotRef {
    /// By its number, 1 and up.
    Id(u32),
    /// By its tag.
    Tag(String),
}

/// What a lookup tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VdiInfo {
    /// The VDI.
    pub vid: VdiId,
    /// Its copies.
    pub copies: u8,
    /// log2 of its block size.
    pub block_size_shift: u8,
}

/// Parameters of a new VDI; zeros mean the cluster's defaults.
#[derive(Debug, Clone, Copy, Default)]
pub struct NewVdi {
    /// Bytes.
    pub size: u64,
    /// Copies; 0 = the cluster's copies and policy.
    pub copies: u8,
    /// Erasure policy.
    pub copy_policy: CopyPolicy,
    /// [`inode::STORE_POLICY_FLAT`] or [`inode::STORE_POLICY_BTREE`].
    pub store_policy: u8,
    /// log2 of the block size.
    pub block_size_shift: u8,
    /// Snapshot to clone; [`VdiId::NONE`] for an empty VDI.
    pub base: VdiId,
}

fn check_name(name: &str) -> Result<(), ClientError> {
    // A longer name would be cut and then mean another VDI.
    if name.is_empty() || name.len() >= MAX_NAME_LEN || name.as_bytes().contains(&0) {
        return Err(ClientError::Refused(sheepdog_proto::ResultCode::INVALID_PARMS));
    }
    Ok(())
}

fn name_and_tag(name: &str, tag: &str) -> Bytes {
    let mut payload = BytesMut::with_capacity(2 * MAX_NAME_LEN);
    payload.put_slice(&fixed_str::<MAX_NAME_LEN>(name.as_bytes()));
    payload.put_slice(&fixed_str::<MAX_NAME_LEN>(tag.as_bytes()));
    payload.freeze()
}

fn info_of(reply: &Reply) -> VdiInfo {
    let vdi = reply.response.vdi();
    VdiInfo { vid: vdi.vdi_id, copies: vdi.copies, block_size_shift: vdi.block_size_shift }
}

async fn named(
    service: &dyn Service,
    opcode: Opcode,
    name: &str,
    snapshot: Option<&SnapshotRef>,
    store_policy: u8,
) -> Result<VdiInfo, ClientError> {
    check_name(name)?;
    let (snapid, tag) = match snapshot {
        None => (0, ""),
        Some(SnapshotRef::Id(id)) => (*id, ""),
        Some(SnapshotRef::Tag(tag)) => {
            check_name(tag)?;
            (0, tag.as_str())
        }
    };
    if snapshot == Some(&SnapshotRef::Id(0)) {
        return Err(ClientError::Refused(sheepdog_proto::ResultCode::NO_TAG)); // 0 would mean the current VDI
    }
    let request = Request::new(opcode).flag(Flags::WRITE).length(2 * MAX_NAME_LEN).with_vdi(VdiRequest {
        snapid,
        store_policy,
        ..VdiRequest::zeroed()
    });
    let reply = service.call(request, name_and_tag(name, tag)).await?.success()?;
    Ok(info_of(&reply))
}

/// Finds a VDI by name, or a snapshot of it (GET_VDI_INFO).
pub async fn lookup(
    service: &dyn Service,
    name: &str,
    snapshot: Option<&SnapshotRef>,
) -> Result<VdiInfo, ClientError> {
    named(service, Opcode::GET_VDI_INFO, name, snapshot, inode::STORE_POLICY_FLAT).await
}

/// Finds the current VDI of a name and takes its normal lock, if the cluster uses locks (LOCK_VDI).
/// `store_policy` says whose index the caller knows: hypervolumes are refused to others.
pub async fn lock(service: &dyn Service, name: &str, store_policy: u8) -> Result<VdiInfo, ClientError> {
    named(service, Opcode::LOCK_VDI, name, None, store_policy).await
}

/// Gives a normal lock back (RELEASE_VDI). Releasing what is not locked is no error.
pub async fn release(service: &dyn Service, name: &str, vid: VdiId) -> Result<(), ClientError> {
    let payload = Bytes::copy_from_slice(&fixed_str::<MAX_NAME_LEN>(name.as_bytes()));
    let request = Request::new(Opcode::RELEASE_VDI)
        .flag(Flags::WRITE)
        .length(payload.len())
        .with_vdi(VdiRequest { base_vdi_id: vid, ..VdiRequest::zeroed() });
    service.call(request, payload).await?.success().map(drop)
}

/// Reads exactly `len` bytes of an object.
pub async fn read_object(
    service: &dyn Service,
    oid: Oid,
    offset: u32,
    len: usize,
) -> Result<Bytes, ClientError> {
    let request = Request::new(Opcode::READ_OBJ).length(len).with_obj(ObjRequest {
        oid,
        offset,
        ..ObjRequest::zeroed()
    });
    let data = service.call(request, Bytes::new()).await?.success()?.data;
    if data.len() != len {
        return Err(ClientError::Protocol("short read"));
    }
    Ok(data)
}

/// Writes into an existing object; durable when it returns.
pub async fn write_object(
    service: &dyn Service,
    oid: Oid,
    offset: u32,
    data: Bytes,
) -> Result<(), ClientError> {
    let request = Request::new(Opcode::WRITE_OBJ)
        .flag(Flags::WRITE.with(Flags::DIRECT))
        .length(data.len())
        .with_obj(ObjRequest { oid, offset, ..ObjRequest::zeroed() });
    service.call(request, data).await?.success().map(drop)
}

/// Reads a VDI's inode header.
pub async fn read_header(service: &dyn Service, vid: VdiId) -> Result<InodeHeader, ClientError> {
    let bytes = read_object(service, Oid::inode(vid), 0, INODE_HEADER_LEN).await?;
    InodeHeader::decode(&bytes).map_err(|_| ClientError::Protocol("short inode header"))
}

/// Reads the header and the table area of an inode: 4 198 968 bytes, the read that validates a stale inode.
pub async fn read_inode(service: &dyn Service, vid: VdiId) -> Result<Bytes, ClientError> {
    read_object(service, Oid::inode(vid), 0, GREF_OFFSET).await
}

/// Reads the first `blocks` entries of a flat VDI's table.
pub async fn read_table(service: &dyn Service, vid: VdiId, blocks: usize) -> Result<Vec<u32>, ClientError> {
    let len = 4 * blocks.min(MAX_DATA_OBJS);
    let bytes = read_object(service, Oid::inode(vid), inode::TABLE_OFFSET as u32, len).await?;
    Ok(inode::table(&bytes).iter().map(|entry| entry.get()).collect())
}

async fn bitmap(service: &dyn Service, opcode: Opcode) -> Result<Bytes, ClientError> {
    let request = Request::new(opcode).length(VDI_BITMAP_LEN);
    let data = service.call(request, Bytes::new()).await?.success()?.data;
    if data.len() != VDI_BITMAP_LEN {
        return Err(ClientError::Protocol("short VDI bitmap"));
    }
    Ok(data)
}

/// Ids in use and not deleted, ascending (READ_VDIS, READ_DEL_VDIS).
pub async fn list_ids(service: &dyn Service) -> Result<Vec<VdiId>, ClientError> {
    let (used, deleted) =
        tokio::try_join!(bitmap(service, Opcode::READ_VDIS), bitmap(service, Opcode::READ_DEL_VDIS))?;
    let mut ids = Vec::new();
    for (byte, (used, deleted)) in used.iter().zip(deleted.iter()).enumerate() {
        let live = used & !deleted;
        if live != 0 {
            ids.extend(
                (0..8).filter(|bit| live & (1 << bit) != 0).map(|bit| VdiId::new((byte * 8 + bit) as u32)),
            );
        }
    }
    Ok(ids)
}

/// Headers of all VDIs and snapshots, ascending by id. Deleted ones are left out; a header that cannot be read is
/// listed with its error.
pub async fn list(
    service: &dyn Service,
) -> Result<Vec<(VdiId, Result<InodeHeader, ClientError>)>, ClientError> {
    let ids = list_ids(service).await?;
    let headers = futures_util::stream::iter(ids)
        .map(|vid| async move { (vid, read_header(service, vid).await) })
        .buffered(LIST_PARALLEL);
    let present = headers
        .filter(|(_, header)| std::future::ready(!matches!(header, Ok(header) if header.is_deleted())));
    Ok(present.collect().await)
}

async fn new_vdi(service: &dyn Service, name: &str, body: VdiRequest) -> Result<VdiId, ClientError> {
    check_name(name)?;
    let payload = Bytes::copy_from_slice(&fixed_str::<MAX_NAME_LEN>(name.as_bytes()));
    let request = Request::new(Opcode::NEW_VDI).flag(Flags::WRITE).length(payload.len()).with_vdi(body);
    let reply = service.call(request, payload).await?.success()?;
    Ok(reply.response.vdi().vdi_id)
}

/// Creates a VDI, empty or as a clone of a snapshot.
pub async fn create(service: &dyn Service, name: &str, new: &NewVdi) -> Result<VdiId, ClientError> {
    let body = VdiRequest {
        vdi_size: new.size,
        base_vdi_id: new.base,
        copies: new.copies,
        copy_policy: new.copy_policy.to_byte(),
        store_policy: new.store_policy,
        block_size_shift: new.block_size_shift,
        ..VdiRequest::zeroed()
    };
    new_vdi(service, name, body).await
}

/// Snapshots the current VDI of `name`: it keeps its id and becomes the snapshot, the name gets the new id returned.
/// The tag is written before (spec 05, section 6).
pub async fn snapshot(service: &dyn Service, name: &str, tag: &str) -> Result<VdiId, ClientError> {
    if tag.len() >= MAX_NAME_LEN {
        return Err(ClientError::Refused(sheepdog_proto::ResultCode::INVALID_PARMS));
    }
    let info = lookup(service, name, None).await?;
    let header = read_header(service, info.vid).await?;
    if !tag.is_empty() {
        let field = Bytes::copy_from_slice(&fixed_str::<MAX_NAME_LEN>(tag.as_bytes()));
        write_object(service, Oid::inode(info.vid), MAX_NAME_LEN as u32, field).await?;
    }
    let body = VdiRequest {
        vdi_size: header.vdi_size,
        base_vdi_id: info.vid,
        copies: header.nr_copies,
        copy_policy: header.copy_policy,
        store_policy: header.store_policy,
        block_size_shift: header.block_size_shift,
        snapid: 1,
        ..VdiRequest::zeroed()
    };
    new_vdi(service, name, body).await
}
