//! Object reads and writes through the gateway, VDI lookup and creation (spec 07, 7.3 and 7.5).

use bytes::Bytes;
use sheepdog_proto::header::{ObjRequest, VdiRequest};
use sheepdog_proto::{Flags, MAX_NAME_LEN, Oid, Opcode, Request, VdiId, fixed_str};

use crate::args::Snapshot;
use crate::exit::{FAILURE, SYSTEM, Stop, fail};
use crate::inode::InodeHeader;
use crate::out::text;
use crate::session::{Failed, Session, success};

/// Reads a part of an object; nothing is printed but transport failures.
pub async fn read(
    session: &Session,
    oid: Oid,
    offset: u64,
    length: usize,
    flags: Flags,
) -> Result<Bytes, Failed> {
    let body = ObjRequest { oid, offset: offset as u32, ..ObjRequest::zeroed() };
    let request = Request::new(Opcode::READ_OBJ).flag(flags).length(length).with_obj(body);
    let reply = success(session.ask(request).await)?;
    if reply.data.len() == length {
        return Ok(reply.data);
    }
    // Some daemons cut trailing zeros off.
    let mut data = reply.data.to_vec();
    data.resize(length, 0);
    Ok(data.into())
}

/// As [`read`], bypassing caches; failures are reported.
pub async fn read_or_report(
    session: &Session,
    oid: Oid,
    offset: u64,
    length: usize,
) -> Result<Bytes, Failed> {
    let data = read(session, oid, offset, length, Flags::DIRECT).await;
    data.inspect_err(|e| report_read(oid, *e))
}

/// The message of a failed read.
pub fn report_read(oid: Oid, error: Failed) {
    crate::out::log(format_args!("Failed to read object {oid} {error}"));
}

/// The message of a failed write.
pub fn report_write(oid: Oid, error: Failed) {
    crate::out::log(format_args!("Failed to write object {oid}: {error}"));
}

/// A write or create.
#[derive(Debug, Clone)]
pub struct Write {
    /// The object.
    pub oid: Oid,
    /// Byte offset in it.
    pub offset: u64,
    /// What to write; may be empty when creating.
    pub data: Bytes,
    /// Create it (replacing what exists) rather than write into it.
    pub create: bool,
    /// Object whose content a created one starts from.
    pub cow: Option<Oid>,
    /// Copies of the VDI.
    pub copies: u8,
    /// Its policy byte.
    pub policy: u8,
    /// Flags besides WRITE and COW.
    pub flags: Flags,
}

impl Write {
    /// A write with the redundancy of `inode`, bypassing caches.
    pub fn new(inode: &InodeHeader, oid: Oid, offset: u64, data: impl Into<Bytes>) -> Write {
        Write {
            oid,
            offset,
            data: data.into(),
            create: false,
            cow: None,
            copies: inode.nr_copies,
            policy: inode.copy_policy,
            flags: Flags::DIRECT,
        }
    }

    /// The same, creating the object.
    pub fn creating(self) -> Write {
        Write { create: true, ..self }
    }

    /// Sends it; nothing is printed but transport failures.
    pub async fn send(self, session: &Session) -> Result<(), Failed> {
        let opcode = if self.create { Opcode::CREATE_AND_WRITE_OBJ } else { Opcode::WRITE_OBJ };
        let body = ObjRequest {
            oid: self.oid,
            cow_oid: self.cow.unwrap_or_default(),
            copies: self.copies,
            copy_policy: self.policy,
            offset: self.offset as u32,
            ..ObjRequest::zeroed()
        };
        let cow = if self.cow.is_some() { Flags::COW } else { Flags::NONE };
        let request = Request::new(opcode).flag(Flags::WRITE).flag(self.flags).flag(cow).with_obj(body);
        success(session.tell(request, self.data).await).map(drop)
    }

    /// Sends it; failures are reported.
    pub async fn send_or_report(self, session: &Session) -> Result<(), Failed> {
        let oid = self.oid;
        self.send(session).await.inspect_err(|e| report_write(oid, *e))
    }
}

/// Name and tag fields of lookups and deletions, 512 bytes.
pub fn name_and_tag(name: &[u8], tag: &[u8]) -> Vec<u8> {
    [fixed_str::<MAX_NAME_LEN>(name), fixed_str::<MAX_NAME_LEN>(tag)].concat()
}

/// Finds a VDI: the working one without `snapshot`. Nothing is printed but transport failures.
pub async fn lookup(session: &Session, name: &[u8], snapshot: Option<&Snapshot>) -> Result<VdiId, Failed> {
    let tag = snapshot.map_or(&b""[..], Snapshot::tag);
    let body = VdiRequest { snapid: snapshot.map_or(0, Snapshot::id), ..VdiRequest::zeroed() };
    let request = Request::new(Opcode::GET_VDI_INFO).flag(Flags::WRITE).with_vdi(body);
    let reply = success(session.tell(request, name_and_tag(name, tag)).await)?;
    Ok(reply.response.vdi().vdi_id)
}

/// As [`lookup`]; failures are reported.
pub async fn find(session: &Session, name: &[u8], snapshot: Option<&Snapshot>) -> Result<VdiId, Stop> {
    lookup(session, name, snapshot).await.map_err(|e| {
        let id = snapshot.map_or(0, Snapshot::id) as i32;
        let tag = text(snapshot.map_or(&b""[..], Snapshot::tag));
        let name = text(name);
        fail(FAILURE, format_args!("Failed to open VDI {name} (snapshot id: {id} snapshot tag: {tag}): {e}"))
    })
}

/// Creates a VDI, snapshot or clone; failures are reported. `SYSTEM` = there was no answer, it may have been created;
/// `FAILURE` = it was refused.
pub async fn new_vdi(session: &Session, name: &[u8], body: VdiRequest) -> Result<VdiId, Stop> {
    let request = Request::new(Opcode::NEW_VDI).flag(Flags::WRITE).with_vdi(body);
    let field = fixed_str::<MAX_NAME_LEN>(name).to_vec();
    match success(session.tell(request, field).await) {
        Ok(reply) => Ok(reply.response.vdi().vdi_id),
        Err(e) => {
            let stop = if e == Failed::Transport { SYSTEM } else { FAILURE };
            Err(fail(stop, format_args!("Failed to create VDI {}: {e}", text(name))))
        }
    }
}

/// NEW_VDI's parameters with size, redundancy and block size of an existing VDI.
pub fn like(inode: &InodeHeader, base: VdiId, snapid: u32) -> VdiRequest {
    VdiRequest {
        vdi_size: inode.vdi_size,
        base_vdi_id: base,
        copies: inode.nr_copies,
        copy_policy: inode.copy_policy,
        store_policy: inode.store_policy,
        block_size_shift: inode.block_size_shift,
        snapid,
        ..VdiRequest::zeroed()
    }
}
