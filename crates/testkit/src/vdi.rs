//! VDIs over the raw protocol, in the way of QEMU: the client keeps the block table and creates, writes, copies.

use std::io;

use sheepdog_proto::header::VdiRequest;
use sheepdog_proto::inode::{self, GREF_OFFSET, INODE_HEADER_LEN, InodeHeader};
use sheepdog_proto::{Flags, Oid, Opcode, Request, Response, ResultCode, VdiId, Wire, fixed_str};

use crate::client::Client;

/// An opened VDI.
#[derive(Debug, Clone)]
pub struct Vdi {
    /// Its header as last read.
    pub header: InodeHeader,
    /// Owner of each block, as many as `vdi_size` spans.
    pub table: Vec<u32>,
}

/// The 256 bytes of a name, or the 512 of a name and a tag.
pub fn name_payload(name: &str, tag: Option<&str>) -> Vec<u8> {
    let mut bytes = fixed_str::<256>(name.as_bytes()).to_vec();
    if let Some(tag) = tag {
        bytes.extend(fixed_str::<256>(tag.as_bytes()));
    }
    bytes
}

fn fail(result: ResultCode) -> io::Error {
    io::Error::other(result)
}

/// The result that a daemon answered, if that is what the error is.
pub fn refusal(error: &io::Error) -> Option<ResultCode> {
    error.get_ref()?.downcast_ref::<ResultCode>().copied()
}

impl Client {
    /// A VDI operation with a name and perhaps a tag as payload.
    pub fn vdi_op(&mut self, opcode: Opcode, name: &str, tag: Option<&str>, body: VdiRequest) -> Response {
        let payload = name_payload(name, tag);
        let request = Request::new(opcode).flag(Flags::WRITE).with_vdi(body).length(payload.len());
        self.must(request, &payload).0
    }

    /// Creates a VDI of `size` bytes with the cluster's defaults.
    pub fn create_vdi(&mut self, name: &str, size: u64) -> Result<VdiId, ResultCode> {
        let body = VdiRequest { vdi_size: size, ..VdiRequest::zeroed() };
        let response = self.vdi_op(Opcode::NEW_VDI, name, None, body);
        response.result.ok().map(|()| response.vdi().vdi_id)
    }

    /// Looks a VDI up. An empty tag and snapshot id 0 mean the working VDI.
    pub fn lookup(&mut self, name: &str, tag: &str, snapid: u32) -> Result<VdiId, ResultCode> {
        let body = VdiRequest { snapid, ..VdiRequest::zeroed() };
        let response = self.vdi_op(Opcode::GET_VDI_INFO, name, Some(tag), body);
        response.result.ok().map(|()| response.vdi().vdi_id)
    }

    /// Makes a snapshot in the way of the tools: the tag into the old inode, then NEW_VDI. Gives the new working VDI.
    pub fn snapshot(&mut self, name: &str, tag: &str) -> Result<VdiId, ResultCode> {
        let old = self.lookup(name, "", 0)?;
        let vdi = Vdi::open(self, old).map_err(|_| ResultCode::VDI_READ)?;
        let written = self.write_obj(Oid::inode(old), 256, &fixed_str::<256>(tag.as_bytes()));
        written.map_err(|_| ResultCode::NETWORK_ERROR)?.ok()?;
        let body = VdiRequest {
            vdi_size: vdi.header.vdi_size,
            base_vdi_id: old,
            copies: vdi.header.nr_copies,
            copy_policy: vdi.header.copy_policy,
            block_size_shift: vdi.header.block_size_shift,
            snapid: 1,
            ..VdiRequest::zeroed()
        };
        let response = self.vdi_op(Opcode::NEW_VDI, name, None, body);
        response.result.ok().map(|()| response.vdi().vdi_id)
    }

    /// Clones a snapshot.
    pub fn clone_vdi(&mut self, base: VdiId, name: &str) -> Result<VdiId, ResultCode> {
        let vdi = Vdi::open(self, base).map_err(|_| ResultCode::VDI_READ)?;
        let body = VdiRequest {
            vdi_size: vdi.header.vdi_size,
            base_vdi_id: base,
            copies: vdi.header.nr_copies,
            copy_policy: vdi.header.copy_policy,
            block_size_shift: vdi.header.block_size_shift,
            ..VdiRequest::zeroed()
        };
        let response = self.vdi_op(Opcode::NEW_VDI, name, None, body);
        response.result.ok().map(|()| response.vdi().vdi_id)
    }

    /// Header of an inode.
    pub fn inode(&mut self, vid: VdiId) -> io::Result<InodeHeader> {
        let (response, bytes) = self.read_obj(Oid::inode(vid), 0, INODE_HEADER_LEN)?;
        response.result.ok().map_err(fail)?;
        InodeHeader::decode(&bytes).map_err(io::Error::other)
    }

    /// Generation references of the first `count` blocks: (generation, count).
    pub fn grefs(&mut self, vid: VdiId, count: usize) -> io::Result<Vec<(i32, i32)>> {
        let (response, bytes) = self.read_obj(Oid::inode(vid), GREF_OFFSET as u32, 8 * count)?;
        response.result.ok().map_err(fail)?;
        Ok(inode::grefs(&bytes).iter().map(|g| (g.generation.get(), g.count.get())).collect())
    }

    /// Values of a ledger's low slots; none if there is no ledger.
    pub fn ledger(&mut self, data: Oid) -> io::Result<Option<Vec<i32>>> {
        let (response, bytes) = self.read_obj(Oid::ledger_of(data), 0, 4096)?;
        match response.result {
            ResultCode::SUCCESS => Ok(Some(sheepdog_proto::ledger::Ledger::decode(&bytes).slots().to_vec())),
            ResultCode::NO_OBJ => Ok(None),
            other => Err(fail(other)),
        }
    }
}

impl Vdi {
    /// Reads the header and the used part of the table.
    pub fn open(client: &mut Client, vid: VdiId) -> io::Result<Vdi> {
        let header = client.inode(vid)?;
        let blocks = header.nr_blocks() as usize;
        let (response, bytes) = client.read_obj(Oid::inode(vid), INODE_HEADER_LEN as u32, 4 * blocks)?;
        response.result.ok().map_err(fail)?;
        let table = inode::table(&bytes).iter().map(|v| v.get()).collect();
        Ok(Vdi { header, table })
    }

    /// The VDI's id.
    pub fn vid(&self) -> VdiId {
        self.header.vdi_id
    }

    /// Block index, offset inside it and length of each piece of a range.
    pub fn pieces(&self, offset: u64, length: usize) -> Vec<(u32, u32, usize)> {
        let block = self.header.block_size();
        let end = offset + length as u64;
        let mut pieces = Vec::new();
        let mut at = offset;
        while at < end {
            let inside = at % block;
            let count = (block - inside).min(end - at);
            pieces.push(((at / block) as u32, inside as u32, count as usize));
            at += count;
        }
        pieces
    }

    /// Writes, creating blocks and copying them from snapshots as needed. The error says that the outcome is unknown, or
    /// what the daemon refused.
    pub fn write(&mut self, client: &mut Client, offset: u64, data: &[u8]) -> io::Result<()> {
        let own = self.vid();
        let mut done = 0;
        for (index, inside, count) in self.pieces(offset, data.len()) {
            let piece = &data[done..done + count];
            let oid = Oid::data(own, index);
            let owner = VdiId::new(self.table[index as usize]);
            if owner == own {
                client.write_obj(oid, inside, piece)?.ok().map_err(fail)?;
            } else {
                let source = (!owner.is_none()).then(|| Oid::data(owner, index));
                client.create_obj(oid, source, inside, piece)?.ok().map_err(fail)?;
                self.set_owner(client, index, own)?;
            }
            done += count;
        }
        Ok(())
    }

    /// Writes a table entry.
    pub fn set_owner(&mut self, client: &mut Client, index: u32, owner: VdiId) -> io::Result<()> {
        let offset = inode::table_offset(index) as u32;
        client.write_obj(Oid::inode(self.vid()), offset, &owner.encode())?.ok().map_err(fail)?;
        self.table[index as usize] = owner.get();
        Ok(())
    }

    /// Reads; blocks that nobody owns are zeros.
    pub fn read(&self, client: &mut Client, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut data = Vec::with_capacity(length);
        for (index, inside, count) in self.pieces(offset, length) {
            let owner = VdiId::new(self.table[index as usize]);
            if owner.is_none() {
                data.resize(data.len() + count, 0);
                continue;
            }
            let (response, bytes) = client.read_obj(Oid::data(owner, index), inside, count)?;
            response.result.ok().map_err(fail)?;
            if bytes.len() != count {
                return Err(io::Error::other(format!("{} bytes instead of {count}", bytes.len())));
            }
            data.extend(bytes);
        }
        Ok(data)
    }
}
