//! The bytes of the queue file (spec 04, 11.2). Every length that comes from the file is checked before use; the
//! scratch areas of node records are written as zeros and never read.

use sheepdog_proto::{MAX_CLUSTER_MESSAGE, NodeId, NodeRecord, Wire, wire};

/// Bytes of a whole queue file.
pub const FILE_LEN: u64 = NONBLOCK.base + (SLOTS * EVENT_LEN) as u64;
/// Events of one ring.
pub const SLOTS: usize = 500;
/// Bytes of one event.
pub const EVENT_LEN: usize = LNODES_OFF + MAX_LOCAL_NODES * LocalNode::LEN;
/// Most processes an event can list.
pub const MAX_LOCAL_NODES: usize = 1024;
/// Bytes of an event's buffer.
pub const BUF_LEN: usize = MAX_CLUSTER_MESSAGE;
/// Offset of the buffer in an event.
pub const BUF_OFF: usize = EventHead::LEN;
/// Offset of the 8-byte number of processes.
pub const NR_LNODES_OFF: usize = BUF_OFF + BUF_LEN;
/// Offset of the process list.
pub const LNODES_OFF: usize = NR_LNODES_OFF + 8;
/// Offset of the "a block handler accepted it" byte.
pub const CALLBACKED_OFF: usize = 96;
/// Offset of the "void" byte.
pub const REMOVED_OFF: usize = 97;

const _: () = assert!(EVENT_LEN == 221_304 && FILE_LEN == 221_304_016);

/// One of the two rings: where its position and its events are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ring {
    /// Offset of the i32 index of the newest event.
    pub pos: u64,
    base: u64,
}

/// Requests for the cluster-wide mutex.
pub const BLOCK: Ring = Ring { pos: 0, base: 8 };
/// Everything else.
pub const NONBLOCK: Ring =
    Ring { pos: 8 + (SLOTS * EVENT_LEN) as u64, base: 16 + (SLOTS * EVENT_LEN) as u64 };

impl Ring {
    /// File offset of a slot.
    pub fn slot(self, slot: usize) -> u64 {
        debug_assert!(slot < SLOTS);
        self.base + (slot * EVENT_LEN) as u64
    }
}

/// The slot behind `slot`.
pub fn next(slot: usize) -> usize {
    (slot + 1) % SLOTS
}

/// How many slots `newer` is ahead of `older`.
pub fn distance(older: usize, newer: usize) -> usize {
    (newer + SLOTS - older) % SLOTS
}

wire! {
    /// One sheep process.
    LocalNode [88] {
        /// What it announced.
        0 => node: NodeRecord,
        /// Its process id.
        80 => pid: i32,
        /// It left, but is alive and still listed.
        84 => gateway: u8,
    }
}

impl LocalNode {
    /// Whether both are the same incarnation of the same node.
    pub fn is(&self, other: &LocalNode) -> bool {
        self.pid == other.pid && self.node.nid == other.node.nid
    }
}

wire! {
    /// The fixed part before an event's buffer.
    EventHead [112] {
        /// An [`EventKind`], 0 in a slot never written.
        0 => kind: u32,
        /// Who the event is about.
        8 => sender: LocalNode,
        /// See [`CALLBACKED_OFF`].
        96 => callbacked: u8,
        /// See [`REMOVED_OFF`].
        97 => removed: u8,
        /// Meaningful bytes of the buffer.
        104 => buf_len: u64,
    }
}

/// Type of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum EventKind {
    /// A join nobody answered yet.
    Join = 1,
    /// An answered join.
    Accept = 2,
    /// The process is gone.
    Leave = 3,
    /// The node left, its process goes on.
    Gateway = 4,
    /// A request for the mutex.
    Block = 5,
    /// A message.
    Notify = 6,
    /// A changed record.
    UpdateNode = 7,
}

impl EventKind {
    /// From the number in the file.
    pub fn from_u32(kind: u32) -> Option<EventKind> {
        use EventKind::{Accept, Block, Gateway, Join, Leave, Notify, UpdateNode};
        [Join, Accept, Leave, Gateway, Block, Notify, UpdateNode].into_iter().find(|k| *k as u32 == kind)
    }
}

/// A whole event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueEvent {
    /// Its type.
    pub kind: EventKind,
    /// Who it is about.
    pub sender: LocalNode,
    /// See [`CALLBACKED_OFF`].
    pub callbacked: bool,
    /// See [`REMOVED_OFF`].
    pub removed: bool,
    /// Cluster info or message.
    pub buf: Vec<u8>,
    /// All processes after this event.
    pub lnodes: Vec<LocalNode>,
}

impl QueueEvent {
    /// The meaningful bytes from the event's start to the end of its buffer.
    pub fn encode_front(&self) -> Vec<u8> {
        let head = EventHead {
            kind: self.kind as u32,
            sender: self.sender,
            callbacked: self.callbacked.into(),
            removed: self.removed.into(),
            buf_len: self.buf.len() as u64,
        };
        let mut out = head.to_bytes().to_vec();
        out.extend_from_slice(&self.buf);
        out
    }

    /// The meaningful bytes from [`NR_LNODES_OFF`] on.
    pub fn encode_back(&self) -> Vec<u8> {
        let mut out = (self.lnodes.len() as u64).to_le_bytes().to_vec();
        out.extend(self.lnodes.iter().flat_map(|n| n.to_bytes()));
        out
    }
}

/// Type and buffer length of a head, or what is wrong with them.
pub fn check_head(head: &EventHead) -> Result<(EventKind, usize), String> {
    let kind = EventKind::from_u32(head.kind).ok_or_else(|| format!("event type {}", head.kind))?;
    let len = usize::try_from(head.buf_len).ok().filter(|n| *n <= BUF_LEN);
    Ok((kind, len.ok_or_else(|| format!("event buffer of {} bytes", head.buf_len))?))
}

/// The number of processes of an event, or what is wrong with it.
pub fn check_nr_lnodes(nr: u64) -> Result<usize, String> {
    usize::try_from(nr).ok().filter(|n| *n <= MAX_LOCAL_NODES).ok_or_else(|| format!("event with {nr} nodes"))
}

/// Decodes a process list.
pub fn decode_lnodes(bytes: &[u8]) -> Vec<LocalNode> {
    bytes.chunks_exact(LocalNode::LEN).map(LocalNode::get).collect()
}

/// The process list after an event of `kind` about `sender` (spec 04, 11.3).
pub fn apply(lnodes: &mut Vec<LocalNode>, kind: EventKind, sender: &LocalNode) {
    let at = find(lnodes, sender);
    match (kind, at) {
        (EventKind::Join, _) => lnodes.push(*sender),
        (EventKind::Leave, Some(i)) => drop(lnodes.remove(i)),
        (EventKind::Gateway, Some(i)) => lnodes[i].gateway = 1,
        (EventKind::UpdateNode, Some(i)) => lnodes[i].node = sender.node,
        _ => {}
    }
}

/// The entry of `node`: its own incarnation if listed, else any of the same address.
fn find(lnodes: &[LocalNode], node: &LocalNode) -> Option<usize> {
    let own = lnodes.iter().position(|n| n.is(node));
    own.or_else(|| lnodes.iter().position(|n| n.node.nid == node.node.nid))
}

/// The members among the processes, in node order; of two with one address the last wins.
pub fn members(lnodes: &[LocalNode], without: Option<NodeId>) -> Vec<NodeRecord> {
    let listed = lnodes.iter().filter(|n| n.gateway == 0 && Some(n.node.nid) != without);
    let map: std::collections::BTreeMap<_, _> = listed.map(|n| (n.node.nid, n.node)).collect();
    map.into_values().collect()
}
