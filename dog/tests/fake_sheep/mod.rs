//! A cluster in memory that speaks the protocol: what `dog` needs to be tested without a daemon.
//!
//! Every node serves the same objects. Nothing is ever reclaimed and no placement is done, so that answers are simple;
//! names, ids, inodes and maps are those of spec 01 and 05. Each cluster has a loopback address of its own, so that
//! tests may use the captured ports and still run in parallel.

#![allow(clippy::unwrap_used)] // a panic here is a failed test

mod vdis;

use std::collections::{BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hasher};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sheepdog_proto::admin::{MdInfo, RecoveryState, RecoveryThrottling, SdStat, encode_md_info};
use sheepdog_proto::cluster::{ClusterInfoHeader, EpochRecord};
use sheepdog_proto::header::{HashResponse, NodeResponse};
use sheepdog_proto::inode::INODE_LEN;
use sheepdog_proto::node::encode_nodes;
use sheepdog_proto::{
    ClusterFlags, ClusterInfo, Epoch, Flags, NodeId, NodeRecord, Oid, Opcode, Request, Response, ResultCode,
    VDI_BITMAP_LEN, Wire, cstr, fixed_str,
};

/// First port.
pub const PORT: u16 = 7700;

/// One request as it arrived.
#[allow(dead_code)] // not every test looks at the log
#[derive(Debug, Clone)]
pub struct Recorded {
    pub port: u16,
    pub request: Request,
    pub payload: Vec<u8>,
}

/// The cluster's state.
pub struct State {
    nodes: Vec<NodeRecord>,
    objects: HashMap<Oid, Vec<u8>>,
    used: BTreeSet<u32>,
    deleted: BTreeSet<u32>,
    info: ClusterInfoHeader,
    /// Members and time of every epoch, oldest first.
    epochs: Vec<Vec<NodeRecord>>,
    log_level: i32,
    throttle: RecoveryThrottling,
    clock: u64,
    /// Answers to GET_HASH are held back until so many requests wait on their connection.
    pub hashes_together: usize,
    /// The next request of this kind is executed and its answer lost with the connection.
    pub lose_answer: Option<Opcode>,
    /// Requests of this kind are refused.
    pub refuse: Option<(Opcode, ResultCode)>,
    /// Everything received.
    pub log: Vec<Recorded>,
}

/// A running cluster.
#[allow(dead_code)] // not every test looks at the state
pub struct FakeCluster {
    pub address: Ipv4Addr,
    pub state: Arc<Mutex<State>>,
}

impl FakeCluster {
    /// Starts `count` nodes with 64 fixed vnodes, node `i` in zone `i`, not formatted.
    pub fn start(count: u16) -> FakeCluster {
        let (address, listeners) = listen(count);
        let node = |i: u16| NodeRecord {
            nid: NodeId::new(address.into(), PORT + i),
            nr_vnodes: 64,
            zone: i.into(),
            space: 1 << 36,
        };
        let state = State {
            nodes: (0..count).map(node).collect(),
            objects: HashMap::new(),
            used: BTreeSet::new(),
            deleted: BTreeSet::new(),
            info: ClusterInfoHeader::default(),
            epochs: Vec::new(),
            log_level: 6,
            throttle: RecoveryThrottling::default(),
            clock: 1_704_189_141,
            hashes_together: 1,
            lose_answer: None,
            refuse: None,
            log: Vec::new(),
        };
        let state = Arc::new(Mutex::new(state));
        for (listener, port) in listeners.into_iter().zip(PORT..) {
            let state = state.clone();
            std::thread::spawn(move || {
                for stream in listener.incoming().map_while(Result::ok) {
                    let state = state.clone();
                    std::thread::spawn(move || serve(stream, port, &state));
                }
            });
        }
        FakeCluster { address, state }
    }
}

/// Binds the ports on a loopback address that nobody uses, as long as the captured one: columns depend on it.
fn listen(count: u16) -> (Ipv4Addr, Vec<TcpListener>) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let seed = std::process::id().wrapping_mul(61).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let digit = |place: u32| (seed / place % 10) as u8;
        let address = Ipv4Addr::new(127, digit(100), digit(10), 1 + digit(1) % 9);
        if address == Ipv4Addr::LOCALHOST {
            continue;
        }
        let listeners: io::Result<Vec<TcpListener>> =
            (PORT..PORT + count).map(|port| TcpListener::bind((address, port))).collect();
        if let Ok(listeners) = listeners {
            return (address, listeners);
        }
    }
}

/// How long a client may be silent.
const PATIENCE: Duration = Duration::from_secs(60);

/// Serves one connection until it ends.
fn serve(mut stream: TcpStream, port: u16, state: &Mutex<State>) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let (mut answers, mut waiting) = (Vec::new(), 0);
    let mut head = [0; Request::LEN];
    while stream.read_exact(&mut head).is_ok() {
        let request = Request::from_bytes(&head);
        let mut payload = Vec::new();
        if request.has_payload() {
            payload.resize(request.data_length as usize, 0);
            if stream.read_exact(&mut payload).is_err() {
                return;
            }
        }
        let mut state = state.lock().unwrap();
        let (response, data) = state.answer(port, &request, payload);
        if state.lose_answer == Some(request.opcode) {
            state.lose_answer = None;
            return;
        }
        answers.extend([&response.to_bytes()[..], &data].concat());
        waiting += 1;
        if request.opcode == Opcode::GET_HASH && waiting < state.hashes_together {
            continue;
        }
        drop(state);
        // In one piece: two would wait for each other's acknowledgement.
        if stream.write_all(&answers).is_err() {
            return;
        }
        answers.clear();
        waiting = 0;
    }
}

/// Outcome of an operation: header fields and payload.
type Answer = Result<(Response, Vec<u8>), ResultCode>;

impl State {
    fn answer(&mut self, port: u16, request: &Request, payload: Vec<u8>) -> (Response, Vec<u8>) {
        let (mut response, data) = match self.execute(port, request, &payload) {
            Ok((response, data)) => (response, data),
            Err(code) => (Response::to(request, code), Vec::new()),
        };
        response.opcode = request.opcode;
        response.id = request.id;
        response.epoch = self.info.epoch;
        response.data_length = data.len() as u32;
        assert!(data.len() <= request.reply_capacity(), "{request:?}");
        self.log.push(Recorded { port, request: *request, payload });
        (response, data)
    }

    fn formatted(&self) -> Result<(), ResultCode> {
        if self.info.ctime == 0 { Err(ResultCode::WAIT_FOR_FORMAT) } else { Ok(()) }
    }

    fn execute(&mut self, port: u16, request: &Request, payload: &[u8]) -> Answer {
        let ok = Response::to(request, ResultCode::SUCCESS);
        let data = match request.opcode {
            Opcode::GET_NODE_LIST => encode_nodes(&self.nodes),
            Opcode::STAT_CLUSTER => return Ok(self.stat_cluster(request)),
            Opcode::CLUSTER_INFO => {
                let info = ClusterInfo { header: self.info, nodes: self.nodes.clone() };
                info.encode_padded(request.data_length as usize)
            }
            Opcode::READ_VDIS => bitmap(&self.used),
            Opcode::READ_DEL_VDIS => bitmap(&self.deleted),
            Opcode::GET_VDI_COPIES => Vec::new(),
            Opcode::MAKE_FS => return self.make_fs(request, payload).map(|()| (ok, Vec::new())),
            Opcode::GET_STORE_LIST => b"tree plain \0".to_vec(),
            Opcode::GET_LOGLEVEL => self.log_level.encode(),
            Opcode::SET_LOGLEVEL => {
                self.log_level = i32::decode(payload).map_err(|_| ResultCode::INVALID_PARMS)?;
                Vec::new()
            }
            Opcode::GET_RECOVERY => self.throttle.encode(),
            Opcode::SET_RECOVERY => {
                self.throttle = RecoveryThrottling::decode(payload).map_err(|_| ResultCode::INVALID_PARMS)?;
                Vec::new()
            }
            Opcode::FORCE_RECOVER => return Err(ResultCode::FORCE_RECOVER),
            _ => {
                self.formatted()?;
                return self.execute_formatted(port, request, payload);
            }
        };
        Ok((ok, data))
    }

    fn execute_formatted(&mut self, port: u16, request: &Request, payload: &[u8]) -> Answer {
        let mut response = Response::to(request, ResultCode::SUCCESS);
        let body = request.obj();
        let mut data = Vec::new();
        if let Some((opcode, code)) = self.refuse
            && opcode == request.opcode
        {
            return Err(code);
        }
        match request.opcode {
            Opcode::STAT_SHEEP => {
                let space =
                    NodeResponse { store_size: 1 << 36, store_free: 1 << 35, ..NodeResponse::zeroed() };
                response = response.with_node(space);
            }
            Opcode::STAT_RECOVERY => data = RecoveryState::default().encode(),
            Opcode::STAT => data = SdStat::default().encode(),
            Opcode::MD_INFO => {
                let disk = MdInfo { idx: 0, free: 1 << 35, used: 0, path: fixed_str(b"/disk") };
                data = encode_md_info(&[disk]);
            }
            Opcode::REWEIGHT
            | Opcode::OIDS_EXIST
            | Opcode::ALTER_VDI_COPY
            | Opcode::RELEASE_VDI
            | Opcode::MD_PLUG_DISKS
            | Opcode::MD_UNPLUG_DISKS
            | Opcode::KILL_NODE
            | Opcode::SHUTDOWN
            | Opcode::NFS_CREATE => {}
            Opcode::NFS_DELETE => return Err(ResultCode::NO_VDI),
            Opcode::ENABLE_RECOVER => self.info.disable_recovery = 0,
            Opcode::DISABLE_RECOVER => self.info.disable_recovery = 1,
            Opcode::ALTER_CLUSTER_COPY => self.info.nr_copies = request.cluster().copies,
            Opcode::SET_VNODES => {
                let vnodes = u32::decode(payload).map_err(|_| ResultCode::INVALID_PARMS)?;
                self.nodes[usize::from(port - PORT)].nr_vnodes = vnodes as u16;
                self.new_epoch();
            }
            Opcode::READ_OBJ => data = self.read(body.oid, body.offset, request.data_length)?,
            Opcode::CREATE_AND_WRITE_OBJ => self.create(request, payload)?,
            Opcode::WRITE_OBJ => self.write(body.oid, body.offset, payload)?,
            Opcode::EXIST => drop(self.objects.get(&body.oid).ok_or(ResultCode::NO_OBJ)?),
            Opcode::GET_HASH => {
                let object = self.objects.get(&body.oid).ok_or(ResultCode::NO_OBJ)?;
                // Any hash does, and SHA-1 is slow without optimisation.
                let mut hasher = DefaultHasher::new();
                hasher.write(object);
                let mut digest = [0; 20];
                hasher.finish().put(&mut digest);
                response = response.with_hash(HashResponse { digest });
            }
            Opcode::NEW_VDI => response = response.with_vdi(self.new_vdi(request, payload)?),
            Opcode::GET_VDI_INFO => response = response.with_vdi(self.find_vdi(request, payload)?),
            Opcode::DEL_VDI => response = response.with_vdi(self.delete_vdi(request, payload)?),
            Opcode::GET_VDI_ATTR => response = response.with_vdi(self.attribute(request, payload)?),
            _ => return Err(ResultCode::NO_SUPPORT),
        }
        Ok((response, data))
    }

    fn new_epoch(&mut self) {
        self.info.epoch = self.info.epoch.next();
        self.epochs.push(self.nodes.clone());
    }

    fn make_fs(&mut self, request: &Request, payload: &[u8]) -> Result<(), ResultCode> {
        let store = cstr(payload);
        if !matches!(store, b"plain" | b"tree") {
            return Err(ResultCode::NO_STORE);
        }
        let body = request.cluster();
        self.info = ClusterInfoHeader {
            ctime: body.ctime,
            flags: body.flags,
            nr_copies: if body.copies == 0 { 3 } else { body.copies },
            copy_policy: body.copy_policy,
            block_size_shift: if body.block_size_shift == 0 { 22 } else { body.block_size_shift },
            default_store: fixed_str(store),
            epoch: Epoch(0),
            ..ClusterInfoHeader::default()
        };
        self.objects.clear();
        self.used.clear();
        self.deleted.clear();
        self.epochs.clear();
        self.new_epoch();
        Ok(())
    }

    fn stat_cluster(&self, request: &Request) -> (Response, Vec<u8>) {
        let slots = request.cluster().nodes_nr as usize;
        let mut data = Vec::new();
        for (at, nodes) in self.epochs.iter().enumerate().rev() {
            let mut record = EpochRecord {
                time: self.clock,
                epoch: Epoch(at as u32 + 1),
                nr_nodes: if slots > 0 { nodes.len() as u32 } else { 0 },
                ..EpochRecord::default()
            };
            if at + 1 == self.epochs.len() {
                record.ctime = self.info.ctime;
                record.disable_recovery = self.info.disable_recovery;
                record.nr_copies = self.info.nr_copies;
                record.copy_policy = self.info.copy_policy;
                record.flags = self.info.flags.without(ClusterFlags::DISKMODE);
                record.store = self.info.default_store;
            }
            let mut bytes = record.encode();
            bytes.extend(encode_nodes(&nodes[..nodes.len().min(slots)]));
            bytes.resize(EpochRecord::LEN + slots * NodeRecord::LEN, 0);
            if data.len() + bytes.len() > request.data_length as usize {
                break;
            }
            data.extend(bytes);
        }
        let result = self.formatted().err().unwrap_or(ResultCode::SUCCESS);
        (Response::to(request, result), data)
    }

    fn object_size(&self, oid: Oid) -> usize {
        let inode = self.objects.get(&Oid::inode(oid.vid()));
        oid.size(inode.map_or(22, |bytes| bytes[555])) as usize
    }

    fn read(&self, oid: Oid, offset: u32, length: u32) -> Result<Vec<u8>, ResultCode> {
        let object = self.objects.get(&oid).ok_or(ResultCode::NO_OBJ)?;
        let range = offset as usize..offset as usize + length as usize;
        object.get(range).map(<[u8]>::to_vec).ok_or(ResultCode::INVALID_PARMS)
    }

    fn write(&mut self, oid: Oid, offset: u32, payload: &[u8]) -> Result<(), ResultCode> {
        let object = self.objects.get_mut(&oid).ok_or(ResultCode::NO_OBJ)?;
        let range = offset as usize..offset as usize + payload.len();
        object.get_mut(range).ok_or(ResultCode::INVALID_PARMS)?.copy_from_slice(payload);
        Ok(())
    }

    fn create(&mut self, request: &Request, payload: &[u8]) -> Result<(), ResultCode> {
        let body = request.obj();
        let zones = self.nodes.len();
        if body.copy_policy != 0 && zones < usize::from(body.copy_policy >> 4) * 2 {
            return Err(ResultCode::SYSTEM_ERROR);
        }
        let object = if request.flags.contains(Flags::COW) {
            self.objects.get(&body.cow_oid).ok_or(ResultCode::NO_OBJ)?.clone()
        } else {
            vec![0; self.object_size(body.oid)]
        };
        self.objects.insert(body.oid, object);
        self.write(body.oid, body.offset, payload)
    }
}

fn bitmap(ids: &BTreeSet<u32>) -> Vec<u8> {
    let mut bits = vec![0; VDI_BITMAP_LEN];
    for id in ids {
        bits[*id as usize / 8] |= 1 << (id % 8);
    }
    bits
}

const _: () = assert!(INODE_LEN == 12_587_576);
