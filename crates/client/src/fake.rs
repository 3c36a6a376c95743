//! An in-memory sheep for tests: objects in a map, VDIs with snapshots and clones, faults on demand.
//!
//! It answers the requests a volume makes as spec 01 and 05 say, including `READONLY` for snapshots, the table rule
//! of 01, 12.5 and the removal of objects that no table names any more. Requests run atomically, but each one may
//! be held up before and after, so that tests see every order of answers.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;
use sheepdog_proto::btree::{BTREE_NODE_LEN, BtreeNode};
use sheepdog_proto::header::{ClusterDefaultResponse, VdiResponse};
use sheepdog_proto::inode::{
    GREF_OFFSET, INODE_HEADER_LEN, InodeHeader, STORE_POLICY_BTREE, TABLE_OFFSET, is_table_update, table,
};
use sheepdog_proto::{
    Flags, MAX_NAME_LEN, ObjectKind, Oid, Opcode, Request, Response, ResultCode, VDI_BITMAP_LEN, VdiId, Wire,
    cstr, hash,
};

use crate::frame::{Stream, split};
use crate::service::{CallFuture, Reply, Service};

/// Bytes of a page of a fake object.
const PAGE: usize = 4096;

/// Pages by number; what is absent is zero.
#[derive(Clone, Default)]
struct Object(BTreeMap<usize, Box<[u8; PAGE]>>);

impl Object {
    fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        for (page, bytes) in self.0.range(offset / PAGE..(offset + len).div_ceil(PAGE)) {
            let start = (page * PAGE).max(offset);
            let end = ((page + 1) * PAGE).min(offset + len);
            out[start - offset..end - offset].copy_from_slice(&bytes[start - page * PAGE..end - page * PAGE]);
        }
        out
    }

    fn write(&mut self, offset: usize, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let at = offset + done;
            let n = (PAGE - at % PAGE).min(data.len() - done);
            let page = self.0.entry(at / PAGE).or_insert_with(|| Box::new([0; PAGE]));
            page[at % PAGE..at % PAGE + n].copy_from_slice(&data[done..done + n]);
            done += n;
        }
    }
}

type Fault = Box<dyn Fn(&Request) -> Option<ResultCode> + Send + Sync>;

#[derive(Default)]
struct State {
    objects: HashMap<Oid, Object>,
    /// Ids ever used.
    used: BTreeMap<u32, InodeHeader>,
    locked: HashSet<VdiId>,
    log: Vec<Request>,
    fault: Option<Fault>,
}

/// The sheep.
#[derive(Default)]
pub struct FakeSheep {
    state: Mutex<State>,
    /// log2 of the default block size; 0 = 22.
    shift: u8,
    /// The cluster uses locks.
    locks: bool,
    /// FLUSH_VDI is answered SUCCESS.
    write_back: bool,
    /// DISCARD_OBJ spares snapshots.
    discards: bool,
    delays: AtomicU64,
    seed: AtomicU64,
    in_flight: AtomicUsize,
}

impl FakeSheep {
    /// A sheep with 1 MiB blocks by default, no locks, write-through.
    pub fn new() -> FakeSheep {
        FakeSheep { shift: 20, ..FakeSheep::default() }
    }

    /// With locks (cluster flag USE_LOCK).
    pub fn with_locks(mut self) -> FakeSheep {
        self.locks = true;
        self
    }

    /// Answers flushes as a sheep that buffers.
    pub fn with_write_back(mut self) -> FakeSheep {
        self.write_back = true;
        self
    }

    /// A sheep whose discards can be relied on.
    pub fn with_discards(mut self) -> FakeSheep {
        self.discards = true;
        self
    }

    /// With another default block size.
    pub fn with_block_shift(mut self, shift: u8) -> FakeSheep {
        self.shift = shift;
        self
    }

    /// Holds every request up by as many as `most` turns of the scheduler, before and after it runs.
    pub fn delay_up_to(&self, most: u64, seed: u64) {
        self.delays.store(most, Ordering::Relaxed);
        self.seed.store(seed | 1, Ordering::Relaxed);
    }

    /// Answers requests for which `fault` gives a result with that result, without executing them.
    pub fn set_fault(&self, fault: impl Fn(&Request) -> Option<ResultCode> + Send + Sync + 'static) {
        self.state.lock().fault = Some(Box::new(fault));
    }

    /// Executes everything again.
    pub fn clear_fault(&self) {
        self.state.lock().fault = None;
    }

    /// Requests received since the last call.
    pub fn take_log(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.lock().log)
    }

    /// Data objects stored.
    pub fn data_objects(&self) -> Vec<Oid> {
        let mut oids: Vec<_> =
            self.state.lock().objects.keys().copied().filter(|oid| oid.is_data()).collect();
        oids.sort();
        oids
    }

    /// VDIs that are locked.
    pub fn locked(&self) -> usize {
        self.state.lock().locked.len()
    }

    /// Requests being executed.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    fn turns(&self) -> u64 {
        let most = self.delays.load(Ordering::Relaxed);
        if most == 0 {
            return 0;
        }
        let mut x = self.seed.load(Ordering::Relaxed);
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.seed.store(x, Ordering::Relaxed);
        x % (most + 1)
    }

    fn execute(&self, request: &Request, payload: &[u8]) -> Reply {
        let mut state = self.state.lock();
        state.log.push(*request);
        if let Some(code) = state.fault.as_ref().and_then(|fault| fault(request)) {
            return Reply::empty(Response::to(request, code));
        }
        let outcome = match request.opcode {
            Opcode::READ_OBJ => state.read(request),
            Opcode::WRITE_OBJ => state.write(request, payload),
            Opcode::CREATE_AND_WRITE_OBJ => state.create(request, payload),
            Opcode::REMOVE_OBJ => {
                state.objects.remove(&request.obj().oid).map(|_| Bytes::new()).ok_or(ResultCode::NO_OBJ)
            }
            Opcode::DISCARD_OBJ if self.discards => state.discard(request, payload),
            Opcode::FLUSH_VDI if self.write_back => Ok(Bytes::new()),
            Opcode::READ_VDIS => Ok(state.bitmap(|_| true)),
            Opcode::READ_DEL_VDIS => Ok(state.bitmap(InodeHeader::is_deleted)),
            Opcode::GET_CLUSTER_DEFAULT => {
                let body = ClusterDefaultResponse {
                    nr_copies: 3,
                    copy_policy: 0,
                    block_size_shift: self.shift.max(20),
                };
                return Reply::empty(Response::to(request, ResultCode::SUCCESS).with_cluster_default(body));
            }
            Opcode::GET_VDI_INFO | Opcode::LOCK_VDI | Opcode::NEW_VDI | Opcode::RELEASE_VDI => {
                return self.vdi_operation(&mut state, request, payload);
            }
            _ => Err(ResultCode::INVALID_PARMS),
        };
        match outcome {
            Ok(data) => {
                let mut response = Response::to(request, ResultCode::SUCCESS);
                response.data_length = data.len() as u32;
                Reply { response, data }
            }
            Err(code) => Reply::empty(Response::to(request, code)),
        }
    }

    fn vdi_operation(&self, state: &mut State, request: &Request, payload: &[u8]) -> Reply {
        let body = request.vdi();
        let name = cstr(payload.get(..MAX_NAME_LEN).unwrap_or(payload));
        let tag = cstr(payload.get(MAX_NAME_LEN..2 * MAX_NAME_LEN).unwrap_or_default());
        let (code, vid) = match request.opcode {
            Opcode::RELEASE_VDI => {
                state.locked.remove(&body.base_vdi_id);
                (ResultCode::SUCCESS, VdiId::NONE)
            }
            Opcode::NEW_VDI => {
                match state.new_vdi(request, name, if self.shift == 0 { 22 } else { self.shift }) {
                    Ok(vid) => (ResultCode::SUCCESS, vid),
                    Err(code) => (code, VdiId::NONE),
                }
            }
            opcode => match state.find(name, tag, body.snapid) {
                Err(code) => (code, VdiId::NONE),
                Ok(vid) if opcode == Opcode::LOCK_VDI && state.is_hypervolume(vid) => {
                    (ResultCode::INVALID_PARMS, vid)
                }
                Ok(vid) if opcode == Opcode::LOCK_VDI && self.locks && !state.locked.insert(vid) => {
                    (ResultCode::VDI_LOCKED, vid)
                }
                Ok(vid) => (ResultCode::SUCCESS, vid),
            },
        };
        let shift = state.used.get(&vid.get()).map_or(0, |header| header.block_size_shift);
        let body = VdiResponse { vdi_id: vid, copies: 3, block_size_shift: shift, ..VdiResponse::zeroed() };
        Reply::empty(Response::to(request, code).with_vdi(body))
    }
}

impl State {
    fn inode(&self, vid: VdiId) -> Option<&Object> {
        self.objects.get(&Oid::inode(vid))
    }

    /// The headers as stored, after writes of clients.
    fn refresh(&mut self, oid: Oid) {
        let vid = oid.vid();
        if let Some(object) = self.objects.get(&oid)
            && let Ok(header) = InodeHeader::decode(&object.read(0, INODE_HEADER_LEN))
        {
            self.used.insert(vid.get(), header);
        }
    }

    fn is_snapshot(&self, vid: VdiId) -> bool {
        self.used.get(&vid.get()).is_some_and(InodeHeader::is_snapshot)
    }

    fn is_hypervolume(&self, vid: VdiId) -> bool {
        self.used.get(&vid.get()).is_some_and(|header| header.store_policy == STORE_POLICY_BTREE)
    }

    fn full_size(&self, oid: Oid) -> usize {
        let shift = self.used.get(&oid.vid().get()).map_or(22, |header| header.block_size_shift);
        oid.size(shift) as usize
    }

    fn read(&self, request: &Request) -> Result<Bytes, ResultCode> {
        let body = request.obj();
        let object = self.objects.get(&body.oid).ok_or(ResultCode::NO_OBJ)?;
        let (offset, len) = (body.offset as usize, request.data_length as usize);
        if offset + len > self.full_size(body.oid) {
            return Err(ResultCode::INVALID_PARMS);
        }
        Ok(object.read(offset, len).into())
    }

    fn check_data_write(&self, request: &Request, payload: &[u8]) -> Result<(), ResultCode> {
        let body = request.obj();
        if !request.flags.contains(Flags::WRITE)
            || body.offset as usize + payload.len() > self.full_size(body.oid)
        {
            return Err(ResultCode::INVALID_PARMS);
        }
        let oid = body.oid;
        let root = oid.is_inode() && body.offset == 0 && self.is_hypervolume(oid.vid());
        let follows = oid.is_data() || oid.kind() == ObjectKind::Btree || root;
        if follows && self.is_snapshot(oid.vid()) {
            return Err(ResultCode::READONLY);
        }
        Ok(())
    }

    fn discard(&mut self, request: &Request, payload: &[u8]) -> Result<Bytes, ResultCode> {
        let oid = request.obj().oid;
        if self.is_snapshot(oid.vid()) {
            return Err(ResultCode::READONLY);
        }
        self.update_table(Oid::inode(oid.vid()), TABLE_OFFSET + 4 * oid.index() as usize, payload)
    }

    fn create(&mut self, request: &Request, payload: &[u8]) -> Result<Bytes, ResultCode> {
        self.check_data_write(request, payload)?;
        let body = request.obj();
        let mut object = Object::default();
        if request.flags.contains(Flags::COW) && payload.len() < self.full_size(body.oid) {
            object = self.objects.get(&body.cow_oid).cloned().ok_or(ResultCode::NO_OBJ)?;
        }
        object.write(body.offset as usize, payload);
        self.objects.insert(body.oid, object);
        Ok(Bytes::new())
    }

    fn write(&mut self, request: &Request, payload: &[u8]) -> Result<Bytes, ResultCode> {
        self.check_data_write(request, payload)?;
        let body = request.obj();
        let (oid, offset) = (body.oid, body.offset as usize);
        if oid.is_inode() && is_table_update(offset as u64, payload.len() as u64) {
            return self.update_table(oid, offset, payload);
        }
        self.objects.get_mut(&oid).ok_or(ResultCode::NO_OBJ)?.write(offset, payload);
        if oid.is_inode() {
            self.refresh(oid);
        }
        Ok(Bytes::new())
    }

    fn update_table(&mut self, oid: Oid, offset: usize, payload: &[u8]) -> Result<Bytes, ResultCode> {
        assert!(offset.is_multiple_of(4) && payload.len().is_multiple_of(4), "table entries are whole");
        let vid = oid.vid();
        let header = self.used.get(&vid.get()).ok_or(ResultCode::NO_OBJ)?;
        assert!(header.store_policy != STORE_POLICY_BTREE, "an index is not written as a table");
        let object = self.objects.get_mut(&oid).ok_or(ResultCode::NO_OBJ)?;
        let old = object.read(offset, payload.len());
        let changes: Vec<_> =
            table(&old).iter().zip(table(payload)).map(|(o, n)| (o.get(), n.get())).collect();
        if header.is_snapshot() && changes.iter().any(|(old, new)| *new == vid.get() && old != new) {
            return Err(ResultCode::READONLY);
        }
        object.write(offset, payload);
        let first = (offset - TABLE_OFFSET) / 4;
        for (at, (old, new)) in changes.into_iter().enumerate() {
            if old != 0 && old != new {
                self.drop_reference(old, (first + at) as u32);
            }
        }
        Ok(Bytes::new())
    }

    fn drop_reference(&mut self, owner: u32, idx: u32) {
        let offset = TABLE_OFFSET + 4 * idx as usize;
        let named = self.used.keys().any(|vid| {
            self.inode(VdiId::new(*vid)).is_some_and(|inode| inode.read(offset, 4) == owner.to_le_bytes())
        });
        if !named {
            self.objects.remove(&Oid::data(VdiId::new(owner), idx));
        }
    }

    fn bitmap(&self, select: impl Fn(&InodeHeader) -> bool) -> Bytes {
        let mut bits = vec![0u8; VDI_BITMAP_LEN];
        for (vid, header) in &self.used {
            if select(header) {
                bits[*vid as usize / 8] |= 1 << (vid % 8);
            }
        }
        bits.into()
    }

    fn find(&self, name: &[u8], tag: &[u8], snapid: u32) -> Result<VdiId, ResultCode> {
        let mut missing = ResultCode::NO_VDI;
        for (vid, header) in self.used.iter().rev().filter(|(_, header)| header.name() == name) {
            let vid = VdiId::new(*vid);
            if tag.is_empty() && snapid == 0 {
                return if header.is_snapshot() { Err(ResultCode::NO_VDI) } else { Ok(vid) };
            }
            if !header.is_snapshot() {
                missing = ResultCode::NO_TAG;
            } else if header.snap_id == snapid || (!tag.is_empty() && header.tag() == tag) {
                return Ok(vid);
            }
        }
        Err(missing)
    }

    fn new_vdi(&mut self, request: &Request, name: &[u8], shift: u8) -> Result<VdiId, ResultCode> {
        let body = request.vdi();
        let current = self.find(name, b"", 0);
        let mut vid = hash::name_hash(name).max(1);
        while self.used.contains_key(&vid) {
            vid += 1;
        }
        let vid = VdiId::new(vid);
        let mut header = InodeHeader::zeroed();
        header.name[..name.len()].copy_from_slice(name);
        header.vdi_size = body.vdi_size;
        header.store_policy = body.store_policy;
        header.nr_copies = if body.copies == 0 { 3 } else { body.copies };
        header.block_size_shift = if body.block_size_shift == 0 { shift } else { body.block_size_shift };
        header.vdi_id = vid;
        header.parent_vdi_id = body.base_vdi_id;
        header.snap_id = 1;
        let mut inode = Object::default();
        if body.snapid != 0 {
            let current = current?;
            header.snap_id = self.used.get(&current.get()).map_or(0, |base| base.snap_id) + 1;
            let base = self.objects.get_mut(&Oid::inode(current)).ok_or(ResultCode::BASE_VDI_READ)?;
            base.write(520, &1u64.to_le_bytes());
            self.refresh(Oid::inode(current));
        } else if current.is_ok() {
            return Err(ResultCode::VDI_EXIST);
        }
        if !body.base_vdi_id.is_none() {
            inode = self.inode(body.base_vdi_id).cloned().ok_or(ResultCode::BASE_VDI_READ)?;
        } else if body.store_policy == STORE_POLICY_BTREE {
            inode.write(TABLE_OFFSET, &[0x74, 0x62, 1, 0, 0, 0, 0, 0]);
        }
        if header.store_policy == STORE_POLICY_BTREE {
            header.btree_counter = self.copy_leaves(&mut inode, vid);
        }
        inode.write(0, &header.to_bytes());
        self.objects.insert(Oid::inode(vid), inode);
        self.used.insert(vid.get(), header);
        Ok(vid)
    }
}

impl State {
    /// Gives an index copied from another VDI leaves of its own. How many it has.
    fn copy_leaves(&mut self, inode: &mut Object, vid: VdiId) -> u32 {
        let root = inode.read(TABLE_OFFSET, BTREE_NODE_LEN);
        let BtreeNode::Inner(mut entries) = BtreeNode::decode(&root) else { return 0 };
        for (number, entry) in (0..).zip(&mut entries) {
            let copy = Oid::btree(vid, number);
            let leaf = self.objects.get(&entry.oid).cloned().unwrap_or_default();
            self.objects.insert(copy, leaf);
            entry.oid = copy;
        }
        let leaves = entries.len() as u32;
        inode.write(TABLE_OFFSET, &BtreeNode::Inner(entries).encode());
        leaves
    }
}

impl Service for FakeSheep {
    fn discards(&self) -> bool {
        self.discards
    }

    fn call(&self, mut request: Request, payload: Bytes) -> CallFuture<'_> {
        if request.flags.contains(Flags::WRITE) {
            request.data_length = payload.len() as u32;
        }
        Box::pin(async move {
            self.in_flight.fetch_add(1, Ordering::Relaxed);
            for _ in 0..self.turns() {
                tokio::task::yield_now().await;
            }
            let reply = self.execute(&request, &payload);
            for _ in 0..self.turns() {
                tokio::task::yield_now().await;
            }
            self.in_flight.fetch_sub(1, Ordering::Relaxed);
            Ok(reply)
        })
    }
}

/// Serves a connection, one request after the other, until the peer closes or `answers` answers were sent. The request
/// after the last answer is executed and its answer lost with the connection.
pub async fn serve(sheep: Arc<FakeSheep>, stream: Stream, answers: usize) -> std::io::Result<()> {
    let (mut reader, writer) = split(stream);
    let mut sent = 0;
    while let Some(header) = reader.header().await? {
        let request = Request::from_bytes(&header);
        let len = if request.has_payload() { request.data_length as usize } else { 0 };
        let payload = reader.payload(len).await?;
        let Ok(mut reply) = sheep.call(request, payload).await else { break };
        if sent == answers {
            break;
        }
        sent += 1;
        reply.response.data_length = reply.data.len() as u32;
        writer.send(reply.response.to_bytes(), reply.data, None, true);
    }
    writer.close();
    Ok(())
}

/// A VDI's table as the sheep has it, for tests that check what was written.
pub async fn stored_table(sheep: &FakeSheep, vid: VdiId, blocks: usize) -> Vec<u32> {
    let state = sheep.state.lock();
    let bytes = state.inode(vid).map(|inode| inode.read(TABLE_OFFSET, (4 * blocks).min(GREF_OFFSET)));
    bytes.map(|bytes| table(&bytes).iter().map(|entry| entry.get()).collect()).unwrap_or_default()
}

/// A shared sheep as the service that volumes take.
pub fn service(sheep: &Arc<FakeSheep>) -> Arc<dyn Service> {
    sheep.clone()
}
