//! The bytes of messages (spec 04, 13.2). What comes from the group is checked before use; scratch areas are written as
//! zeros and never read.

use sheepdog_proto::cluster::ClusterInfoHeader;
use sheepdog_proto::{ClusterInfo, DecodeError, MAX_CLUSTER_MESSAGE, NodeRecord, Wire, wire};
use thiserror::Error;

/// Entries of the member table that every message carries.
pub const MAX_MEMBERS: usize = 1024;
/// Bytes before the payload.
pub const HEAD_LEN: usize = MessageHead::LEN + MAX_MEMBERS * TableEntry::LEN;
/// Bytes of the cluster info in a JOIN or ACCEPT.
const INFO_LEN: usize = MAX_CLUSTER_MESSAGE;
/// Longest member list of a cluster info in a message.
pub const MAX_INFO_NODES: usize = (INFO_LEN - ClusterInfoHeader::LEN) / NodeRecord::LEN;
/// In the last entry of an ACCEPT's table: the entries before it list who has or wants the mutex. Members of the
/// original read the table's first `nr_nodes` entries only.
const BLOCKS_MAGIC: u32 = u32::from_le_bytes(*b"BLKS");

const _: () = assert!(HEAD_LEN == 90_208 && HEAD_LEN + INFO_LEN == 221_280);

/// A process of the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcessId {
    /// Its corosync node.
    pub nodeid: u32,
    /// Its process id there.
    pub pid: u32,
}

wire! {
    /// The fixed part of a message.
    MessageHead [96] {
        /// Of the process that the message is about.
        0 => nodeid: u32,
        /// As above.
        4 => pid: u32,
        /// Its record.
        8 => node: NodeRecord,
        /// A [`Kind`].
        88 => kind: u16,
        /// ACCEPT: members before the joiner.
        90 => nr_nodes: u16,
        /// Bytes behind the table.
        92 => msg_len: u32,
    }
}

wire! {
    /// An entry of the member table.
    TableEntry [88] {
        /// The member's corosync node.
        0 => nodeid: u32,
        /// Its process id there.
        4 => pid: u32,
        /// Its record.
        8 => node: NodeRecord,
    }
}

/// A member: the process and its record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// The process.
    pub process: ProcessId,
    /// Its record.
    pub node: NodeRecord,
}

/// Type of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// A process that is in the group asks to become a member.
    Join = 0,
    /// The answer.
    Accept = 1,
    /// A member becomes a gateway.
    Leave = 2,
    /// A message.
    Notify = 3,
    /// A request for the mutex.
    Block = 4,
    /// The mutex is released, with a message.
    Unblock = 5,
    /// A changed record.
    UpdateNode = 6,
}

impl Kind {
    fn from_u16(kind: u16) -> Option<Kind> {
        use Kind::{Accept, Block, Join, Leave, Notify, Unblock, UpdateNode};
        [Join, Accept, Leave, Notify, Block, Unblock, UpdateNode].into_iter().find(|k| *k as u16 == kind)
    }
}

/// What a message carries besides its sender.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// What the joiner knows.
    Join(ClusterInfo),
    /// The answer to the sender's JOIN, the members before it, and, if a process of this project answers, who had or
    /// wanted the mutex when the joiner entered the group.
    Accept(ClusterInfo, Vec<Peer>, Option<Vec<ProcessId>>),
    /// Nothing.
    Leave,
    /// A message.
    Notify(Vec<u8>),
    /// Nothing.
    Block,
    /// A message.
    Unblock(Vec<u8>),
    /// Nothing: the sender's record is the new one.
    UpdateNode,
}

impl Body {
    fn kind(&self) -> Kind {
        match self {
            Body::Join(_) => Kind::Join,
            Body::Accept(..) => Kind::Accept,
            Body::Leave => Kind::Leave,
            Body::Notify(_) => Kind::Notify,
            Body::Block => Kind::Block,
            Body::Unblock(_) => Kind::Unblock,
            Body::UpdateNode => Kind::UpdateNode,
        }
    }
}

/// A message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Whom it is about: the sender, or the joiner of an ACCEPT.
    pub sender: Peer,
    /// The rest.
    pub body: Body,
}

/// Why bytes are no message.
#[derive(Debug, Error)]
pub enum BadMessage {
    /// The head or the cluster info.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// A number outside the seven types.
    #[error("message type {0}")]
    Kind(u16),
    /// Length fields that contradict the message.
    #[error("{got} bytes with nr_nodes {nr_nodes}, msg_len {msg_len}")]
    Length {
        /// Bytes of the message.
        got: usize,
        /// As in the head.
        nr_nodes: u16,
        /// As in the head.
        msg_len: u32,
    },
}

impl Message {
    /// Reads a message.
    pub fn decode(bytes: &[u8]) -> Result<Message, BadMessage> {
        let head = MessageHead::decode(bytes)?;
        let kind = Kind::from_u16(head.kind).ok_or(BadMessage::Kind(head.kind))?;
        let length =
            || BadMessage::Length { got: bytes.len(), nr_nodes: head.nr_nodes, msg_len: head.msg_len };
        let payload = bytes.get(HEAD_LEN..).ok_or_else(length)?;
        let payload = payload.get(..head.msg_len as usize).ok_or_else(length)?;
        if payload.len() > MAX_CLUSTER_MESSAGE || usize::from(head.nr_nodes) > MAX_MEMBERS {
            return Err(length());
        }
        let table = &bytes[MessageHead::LEN..HEAD_LEN];
        let body = match kind {
            Kind::Join => Body::Join(ClusterInfo::decode(payload)?),
            Kind::Accept => {
                let members = (0..usize::from(head.nr_nodes)).map(|i| peer(&entry(table, i))).collect();
                Body::Accept(ClusterInfo::decode(payload)?, members, decode_blocks(table, head.nr_nodes))
            }
            Kind::Leave => Body::Leave,
            Kind::Notify => Body::Notify(payload.to_vec()),
            Kind::Block => Body::Block,
            Kind::Unblock => Body::Unblock(payload.to_vec()),
            Kind::UpdateNode => Body::UpdateNode,
        };
        let process = ProcessId { nodeid: head.nodeid, pid: head.pid };
        Ok(Message { sender: Peer { process, node: head.node }, body })
    }

    /// The bytes to send.
    pub fn encode(&self) -> Vec<u8> {
        let (members, blocks, payload) = match &self.body {
            Body::Join(info) => (&[][..], None, info.encode_padded(INFO_LEN)),
            Body::Accept(info, members, blocks) => {
                (&members[..], blocks.as_deref(), info.encode_padded(INFO_LEN))
            }
            Body::Notify(message) | Body::Unblock(message) => (&[][..], None, message.clone()),
            Body::Leave | Body::Block | Body::UpdateNode => (&[][..], None, Vec::new()),
        };
        let head = MessageHead {
            nodeid: self.sender.process.nodeid,
            pid: self.sender.process.pid,
            node: self.sender.node,
            kind: self.body.kind() as u16,
            nr_nodes: members.len() as u16,
            msg_len: payload.len() as u32,
        };
        let mut out = Vec::with_capacity(HEAD_LEN + payload.len());
        out.extend_from_slice(&head.to_bytes());
        for Peer { process, node } in members {
            let entry = TableEntry { nodeid: process.nodeid, pid: process.pid, node: *node };
            out.extend_from_slice(&entry.to_bytes());
        }
        out.resize(HEAD_LEN, 0);
        if let Some(blocks) = blocks {
            encode_blocks(&mut out[MessageHead::LEN..], members.len(), blocks);
        }
        out.extend(payload);
        out
    }
}

fn entry(table: &[u8], index: usize) -> TableEntry {
    TableEntry::get(&table[index * TableEntry::LEN..][..TableEntry::LEN])
}

fn peer(entry: &TableEntry) -> Peer {
    Peer { process: ProcessId { nodeid: entry.nodeid, pid: entry.pid }, node: entry.node }
}

fn decode_blocks(table: &[u8], nr_nodes: u16) -> Option<Vec<ProcessId>> {
    let last = entry(table, MAX_MEMBERS - 1);
    let count = usize::try_from(last.pid).ok()?;
    let free = (MAX_MEMBERS - 1).checked_sub(usize::from(nr_nodes))?;
    if last.nodeid != BLOCKS_MAGIC || count > free {
        return None;
    }
    Some((0..count).map(|i| peer(&entry(table, MAX_MEMBERS - 2 - i)).process).collect())
}

fn encode_blocks(table: &mut [u8], members: usize, blocks: &[ProcessId]) {
    if members + blocks.len() >= MAX_MEMBERS {
        return;
    }
    let mut put = |index: usize, nodeid, pid| {
        let entry = TableEntry { nodeid, pid, node: NodeRecord::zeroed() };
        table[index * TableEntry::LEN..][..TableEntry::LEN].copy_from_slice(&entry.to_bytes());
    };
    put(MAX_MEMBERS - 1, BLOCKS_MAGIC, blocks.len() as u32);
    for (i, process) in blocks.iter().enumerate() {
        put(MAX_MEMBERS - 2 - i, process.nodeid, process.pid);
    }
}
