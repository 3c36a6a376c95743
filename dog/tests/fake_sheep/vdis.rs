//! VDI operations of the fake cluster (spec 01, 7.2 to 7.4 and 14).

use sheepdog_proto::attr::{ATTR_LEN, AttrHeader};
use sheepdog_proto::header::VdiResponse;
use sheepdog_proto::inode::{GREF_OFFSET, INODE_LEN, InodeHeader, TABLE_OFFSET};
use sheepdog_proto::{
    ClusterFlags, CopyPolicy, Flags, Oid, Request, ResultCode, VdiId, Wire, cstr, fixed_str, hash,
};

use super::State;

enum Found {
    /// The VDI looked for.
    Vdi(u32),
    /// Nothing; the last snapshot of the name, if there is one.
    Nothing(ResultCode, Option<u32>),
}

impl State {
    fn header(&self, vid: u32) -> InodeHeader {
        InodeHeader::get(&self.objects[&Oid::inode(VdiId::new(vid))])
    }

    fn recycles(&self) -> bool {
        self.info.flags.contains(ClusterFlags::RECYCLE_VID)
    }

    /// Where the ids of a name begin.
    fn start(&self, name: &[u8]) -> u32 {
        if self.recycles() { 1 } else { hash::name_hash(name).max(1) }
    }

    fn first_free(&self, name: &[u8]) -> u32 {
        (self.start(name)..).find(|vid| !self.used.contains(vid)).unwrap()
    }

    fn lookup(&self, name: &[u8], tag: &[u8], snapid: u32) -> Found {
        let start = self.start(name);
        let mut result = ResultCode::NO_VDI;
        for vid in (start..self.first_free(name)).rev() {
            let header = self.header(vid);
            if header.name() != name {
                continue;
            }
            if tag.is_empty() && snapid == 0 {
                return if header.is_snapshot() {
                    Found::Nothing(ResultCode::NO_VDI, Some(vid))
                } else {
                    Found::Vdi(vid)
                };
            }
            if !header.is_snapshot() {
                result = ResultCode::NO_TAG;
            } else if (!tag.is_empty() && header.tag() == tag) || header.snap_id == snapid {
                return Found::Vdi(vid);
            }
        }
        Found::Nothing(result, None)
    }

    fn response(&self, vid: u32) -> VdiResponse {
        let header = self.header(vid);
        VdiResponse {
            vdi_id: VdiId::new(vid),
            copies: header.nr_copies,
            block_size_shift: header.block_size_shift,
            ..VdiResponse::zeroed()
        }
    }

    pub fn find_vdi(&self, request: &Request, payload: &[u8]) -> Result<VdiResponse, ResultCode> {
        let (name, tag) = payload.split_at(256);
        match self.lookup(cstr(name), cstr(tag), request.vdi().snapid) {
            Found::Vdi(vid) => Ok(self.response(vid)),
            Found::Nothing(code, _) => Err(code),
        }
    }

    pub fn delete_vdi(&mut self, request: &Request, payload: &[u8]) -> Result<VdiResponse, ResultCode> {
        let found = self.find_vdi(request, payload)?;
        let inode = self.objects.get_mut(&Oid::inode(found.vdi_id)).ok_or(ResultCode::NO_OBJ)?;
        inode[..256].fill(0);
        inode[536..544].fill(0);
        inode[TABLE_OFFSET..].fill(0);
        if self.recycles() {
            self.used.remove(&found.vdi_id.get());
        } else {
            self.deleted.insert(found.vdi_id.get());
        }
        Ok(VdiResponse { vdi_id: found.vdi_id, ..VdiResponse::zeroed() })
    }

    pub fn new_vdi(&mut self, request: &Request, payload: &[u8]) -> Result<VdiResponse, ResultCode> {
        let name = cstr(payload).to_vec();
        let body = request.vdi();
        let (current, last) = match self.lookup(&name, b"", 0) {
            Found::Vdi(vid) => (Some(vid), Some(vid)),
            Found::Nothing(_, last) => (None, last),
        };
        match (body.snapid != 0, current) {
            (false, Some(_)) => return Err(ResultCode::VDI_EXIST),
            (true, None) => return Err(ResultCode::NO_VDI),
            _ => {}
        }
        let (mut copies, mut policy) = (body.copies, body.copy_policy);
        if copies == 0 {
            (copies, policy) = (self.info.nr_copies, self.info.copy_policy);
        }
        let strict = self.info.flags.contains(ClusterFlags::STRICT);
        if strict && usize::from(copies) > self.nodes.len() {
            return Err(ResultCode::VDI_WRITE);
        }
        let vid = self.first_free(&name);
        self.clock += 1;
        let time = self.clock << 32;
        if let Some(current) = current.filter(|_| body.snapid != 0) {
            let inode = self.objects.get_mut(&Oid::inode(VdiId::new(current))).ok_or(ResultCode::NO_OBJ)?;
            time.put(&mut inode[520..]);
        }
        let mut inode = vec![0; INODE_LEN];
        if !body.base_vdi_id.is_none() {
            let base = self.objects.get(&Oid::inode(body.base_vdi_id)).ok_or(ResultCode::BASE_VDI_READ)?;
            inode[TABLE_OFFSET..GREF_OFFSET].copy_from_slice(&base[TABLE_OFFSET..GREF_OFFSET]);
        } else if body.store_policy == 1 {
            inode[TABLE_OFFSET..TABLE_OFFSET + 4].copy_from_slice(&[0x74, 0x62, 1, 0]);
        }
        let shift =
            if body.block_size_shift == 0 { self.info.block_size_shift } else { body.block_size_shift };
        let header = InodeHeader {
            name: fixed_str(&name),
            create_time: time,
            vdi_size: body.vdi_size,
            copy_policy: policy,
            store_policy: body.store_policy,
            nr_copies: CopyPolicy::from_byte(policy).map_or(copies, |p| p.strips().max(copies)),
            block_size_shift: shift,
            snap_id: last.map_or(1, |vid| self.header(vid).snap_id + 1),
            vdi_id: VdiId::new(vid),
            parent_vdi_id: body.base_vdi_id,
            ..InodeHeader::zeroed()
        };
        header.put(&mut inode);
        self.objects.insert(Oid::inode(header.vdi_id), inode);
        self.used.insert(vid);
        Ok(self.response(vid))
    }

    pub fn attribute(&mut self, request: &Request, payload: &[u8]) -> Result<VdiResponse, ResultCode> {
        let wanted = AttrHeader::decode(payload).map_err(|_| ResultCode::INVALID_PARMS)?;
        if !matches!(self.lookup(cstr(&wanted.name), cstr(&wanted.tag), wanted.snap_id), Found::Vdi(_)) {
            return Err(ResultCode::NO_VDI);
        }
        let name = hash::name_hash(&wanted.name);
        let oid = Oid::attr(name, wanted.id());
        let present = self.objects.get(&oid).is_some_and(|record| record[0] != 0);
        let has = |flag: Flags| request.flags.contains(flag);
        if has(Flags::ATTR_DEL) {
            self.objects.get_mut(&oid).filter(|_| present).ok_or(ResultCode::NO_OBJ)?[0] = 0;
        } else if has(Flags::ATTR_CREAT) {
            if present && has(Flags::ATTR_EXCL) {
                return Err(ResultCode::VDI_EXIST);
            }
            assert_eq!(payload.len(), ATTR_LEN);
            self.objects.insert(oid, payload.to_vec());
        } else if !present {
            return Err(ResultCode::NO_OBJ);
        }
        Ok(VdiResponse { vdi_id: VdiId::new(name), attr_id: oid.index(), ..VdiResponse::zeroed() })
    }
}
