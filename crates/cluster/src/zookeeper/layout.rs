//! The bytes of znodes (spec 04, 12.2 and 12.3). What comes from a znode is checked before use; scratch areas are
//! written as zeros and never read.

use sheepdog_proto::cluster::CLUSTER_INFO_LEN;
use sheepdog_proto::node::{decode_nodes, encode_nodes};
use sheepdog_proto::{
    ClusterInfo, DecodeError, MAX_CLUSTER_MESSAGE, MAX_NODES, NodeId, NodeRecord, Wire, wire,
};
use thiserror::Error;

/// Bytes of the buffer of a JOIN or ACCEPT.
pub const JOIN_BUF_LEN: usize = CLUSTER_INFO_LEN + MAX_NODES * NodeRecord::LEN;
/// Bytes of a whole JOIN or ACCEPT entry.
pub const JOIN_LEN: usize = EntryHead::LEN + JOIN_BUF_LEN;
/// Bytes of a znode that holds a node string.
const NODE_STRING_LEN: usize = 256;

const _: () = assert!(CLUSTER_INFO_LEN == 491_568 && JOIN_BUF_LEN == 983_088 && JOIN_LEN == 983_256);

wire! {
    /// The fixed part of a queue entry.
    EntryHead [168] {
        /// Unique id, compared by its author alone.
        0 => id: u64,
        /// A [`Kind`].
        8 => kind: u32,
        /// Who the entry is about; in a LEAVE only address and port mean anything.
        56 => sender: NodeRecord,
        /// Bytes of the cluster info part of a JOIN or ACCEPT, else 0.
        144 => msg_len: u64,
        /// ACCEPT: members before the joiner. Undefined in a JOIN.
        152 => nr_nodes: u64,
        /// Bytes behind the head.
        160 => buf_len: u64,
    }
}

/// Type of a queue entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// A join nobody answered yet.
    Join = 1,
    /// An answered join.
    Accept = 2,
    /// The node is gone.
    Leave = 3,
    /// A request for the mutex.
    Block = 4,
    /// The mutex is released, with a message.
    Unblock = 5,
    /// A message.
    Notify = 6,
    /// A changed record.
    UpdateNode = 7,
}

impl Kind {
    fn from_u32(kind: u32) -> Option<Kind> {
        use Kind::{Accept, Block, Join, Leave, Notify, Unblock, UpdateNode};
        [Join, Accept, Leave, Block, Unblock, Notify, UpdateNode].into_iter().find(|k| *k as u32 == kind)
    }
}

/// What an entry carries besides its sender.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// What the joiner knows.
    Join(ClusterInfo),
    /// The answer and the members before the joiner.
    Accept(ClusterInfo, Vec<NodeRecord>),
    /// Nothing.
    Leave,
    /// Nothing.
    Block,
    /// A message.
    Unblock(Vec<u8>),
    /// A message.
    Notify(Vec<u8>),
    /// Nothing: the sender is the new record.
    UpdateNode,
}

impl Body {
    /// Its type.
    pub fn kind(&self) -> Kind {
        match self {
            Body::Join(_) => Kind::Join,
            Body::Accept(..) => Kind::Accept,
            Body::Leave => Kind::Leave,
            Body::Block => Kind::Block,
            Body::Unblock(_) => Kind::Unblock,
            Body::Notify(_) => Kind::Notify,
            Body::UpdateNode => Kind::UpdateNode,
        }
    }
}

/// A queue entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// See [`EntryHead`].
    pub id: u64,
    /// See [`EntryHead`].
    pub sender: NodeRecord,
    /// The rest.
    pub body: Body,
}

/// Why bytes are no queue entry.
#[derive(Debug, Error)]
pub enum BadEntry {
    /// The head or the cluster info.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// A number outside the seven types.
    #[error("entry type {0}")]
    Kind(u32),
    /// Length fields that contradict the type or the znode.
    #[error("a {kind:?} entry of {got} bytes with msg_len {msg_len}, nr_nodes {nr_nodes}, buf_len {buf_len}")]
    Length {
        /// Its type.
        kind: Kind,
        /// Bytes of the znode.
        got: usize,
        /// As in the head.
        msg_len: u64,
        /// As in the head.
        nr_nodes: u64,
        /// As in the head.
        buf_len: u64,
    },
}

impl Entry {
    /// Reads an entry.
    pub fn decode(bytes: &[u8]) -> Result<Entry, BadEntry> {
        let head = EntryHead::decode(bytes)?;
        let kind = Kind::from_u32(head.kind).ok_or(BadEntry::Kind(head.kind))?;
        let length = || BadEntry::Length {
            kind,
            got: bytes.len(),
            msg_len: head.msg_len,
            nr_nodes: head.nr_nodes,
            buf_len: head.buf_len,
        };
        let len = usize::try_from(head.buf_len).ok().filter(|n| *n <= JOIN_BUF_LEN).ok_or_else(length)?;
        let buf = bytes.get(EntryHead::LEN..).and_then(|buf| buf.get(..len)).ok_or_else(length)?;
        let message = || if len <= MAX_CLUSTER_MESSAGE { Ok(buf.to_vec()) } else { Err(length()) };
        let body = match kind {
            Kind::Join | Kind::Accept => {
                let msg_len = usize::try_from(head.msg_len).ok().filter(|n| *n <= len).ok_or_else(length)?;
                let (info, rest) = buf.split_at(msg_len);
                let info = ClusterInfo::decode(info)?;
                if kind == Kind::Join {
                    Body::Join(info)
                } else {
                    let bytes = usize::try_from(head.nr_nodes)
                        .ok()
                        .filter(|n| *n <= MAX_NODES)
                        .and_then(|n| rest.get(..n * NodeRecord::LEN));
                    Body::Accept(info, decode_nodes(bytes.ok_or_else(length)?))
                }
            }
            Kind::Leave => Body::Leave,
            Kind::Block => Body::Block,
            Kind::Unblock => Body::Unblock(message()?),
            Kind::Notify => Body::Notify(message()?),
            Kind::UpdateNode => Body::UpdateNode,
        };
        Ok(Entry { id: head.id, sender: head.sender, body })
    }

    /// The bytes of the znode.
    pub fn encode(&self) -> Vec<u8> {
        let (msg_len, nr_nodes, buf) = match &self.body {
            Body::Join(info) => (CLUSTER_INFO_LEN, 0, info.encode_padded(JOIN_BUF_LEN)),
            Body::Accept(info, members) => {
                let mut buf = info.encode_padded(CLUSTER_INFO_LEN);
                buf.extend(encode_nodes(members));
                buf.resize(JOIN_BUF_LEN, 0);
                (CLUSTER_INFO_LEN, members.len(), buf)
            }
            Body::Unblock(message) | Body::Notify(message) => (0, 0, message.clone()),
            Body::Leave | Body::Block | Body::UpdateNode => (0, 0, Vec::new()),
        };
        let head = EntryHead {
            id: self.id,
            kind: self.body.kind() as u32,
            sender: self.sender,
            msg_len: msg_len as u64,
            nr_nodes: nr_nodes as u64,
            buf_len: buf.len() as u64,
        };
        let mut out = Vec::with_capacity(EntryHead::LEN + buf.len());
        out.extend_from_slice(&head.to_bytes());
        out.extend(buf);
        out
    }
}

/// Data of a `/master` or `/lock` node: the node string, filled up with NULs.
pub fn encode_node_string(node: &NodeId) -> Vec<u8> {
    let mut out = node.to_string().into_bytes();
    out.resize(NODE_STRING_LEN, 0);
    out
}

/// The node a `/master` or `/lock` node belongs to. What follows the first NUL is the author's memory.
pub fn decode_node_string(bytes: &[u8]) -> Option<NodeId> {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    NodeId::parse(std::str::from_utf8(&bytes[..end]).ok()?)
}

/// Data of a `/member` node: session id and password. The client library keeps the password to itself.
pub fn encode_session(id: i64) -> Vec<u8> {
    let mut out = id.to_le_bytes().to_vec();
    out.resize(24, 0);
    out
}

/// Data of a `/queue_pos` node.
pub fn encode_position(position: i32) -> Vec<u8> {
    position.to_le_bytes().to_vec()
}

/// The position in a `/queue_pos` node; anything else than four bytes counts as "none yet".
pub fn decode_position(bytes: &[u8]) -> i32 {
    bytes.try_into().map_or(-1, i32::from_le_bytes)
}

/// Path of the queue entry with this number.
pub fn queue_path(number: i64) -> String {
    format!("/queue/{number:010}")
}

/// Path of a node's membership.
pub fn member_path(node: &NodeId) -> String {
    format!("/member/{node}")
}

/// Path of a node's checkpoint.
pub fn position_path(node: &NodeId) -> String {
    format!("/queue_pos/{node}")
}
