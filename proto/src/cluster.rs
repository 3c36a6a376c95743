//! Cluster state on the wire: cluster info (also the join message) and epoch records (spec 04, 2.3 and 9.4).

use crate::node::{decode_nodes, encode_nodes};
use crate::{ClusterFlags, DecodeError, Epoch, MAX_NODES, NodeRecord, Wire};

/// Status of a node's cluster (spec 04, 3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ClusterStatus {
    /// Serving.
    Ok = 1,
    /// Not formatted, or members of the last epoch are missing.
    Wait = 2,
    /// Orderly cluster shutdown.
    Shutdown = 3,
    /// This node is ending.
    Killed = 4,
}

impl ClusterStatus {
    /// From the byte on the wire.
    pub fn from_byte(byte: u8) -> Result<ClusterStatus, DecodeError> {
        Ok(match byte {
            1 => ClusterStatus::Ok,
            2 => ClusterStatus::Wait,
            3 => ClusterStatus::Shutdown,
            4 => ClusterStatus::Killed,
            b => return Err(DecodeError::Invalid { what: "cluster status", value: b.into() }),
        })
    }
}

wire! {
    /// The first 48 bytes of a cluster info.
    ClusterInfoHeader [48] {
        /// Internal protocol version of the node that answered a join; 0 in a join request.
        0 => proto_ver: u8,
        /// Recovery is disabled.
        1 => disable_recovery: u8,
        /// Members in the list; negative values are invalid.
        2 => nr_nodes: i16,
        /// 0 = never formatted.
        4 => epoch: Epoch,
        /// Creation time, seconds << 32 | nanoseconds; 0 = not formatted. The cluster's identity.
        8 => ctime: u64,
        /// Cluster flags.
        16 => flags: ClusterFlags,
        /// Default copies.
        18 => nr_copies: u8,
        /// Default policy byte.
        19 => copy_policy: u8,
        /// A [`ClusterStatus`] byte.
        20 => status: u8,
        /// log2 of the default block size.
        21 => block_size_shift: u8,
        /// Store driver name, NUL-padded.
        25 => default_store: [u8; 16],
    }
}

/// Bytes of a whole cluster info: header and 6144 node slots.
pub const CLUSTER_INFO_LEN: usize = ClusterInfoHeader::LEN + MAX_NODES * NodeRecord::LEN;

/// What a node knows about its cluster: the header's fields and the members at `epoch`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterInfo {
    /// Everything but the member list; `nr_nodes` is recomputed when encoding.
    pub header: ClusterInfoHeader,
    /// Members at `epoch`, in node order.
    pub nodes: Vec<NodeRecord>,
}

impl ClusterInfo {
    /// Decodes the meaningful prefix. A list that the buffer cuts short is an error.
    pub fn decode(bytes: &[u8]) -> Result<ClusterInfo, DecodeError> {
        let header = ClusterInfoHeader::decode(bytes)?;
        let count = usize::try_from(header.nr_nodes)
            .ok()
            .filter(|n| *n <= MAX_NODES)
            .ok_or(DecodeError::Invalid { what: "nr_nodes", value: header.nr_nodes as u16 as u64 })?;
        let need = ClusterInfoHeader::LEN + count * NodeRecord::LEN;
        let list = bytes.get(ClusterInfoHeader::LEN..need).ok_or(DecodeError::Truncated {
            what: "cluster info",
            need,
            got: bytes.len(),
        })?;
        Ok(ClusterInfo { header, nodes: decode_nodes(list) })
    }

    /// Header and members, without the empty slots behind them.
    pub fn encode_prefix(&self) -> Vec<u8> {
        let header = ClusterInfoHeader { nr_nodes: self.nodes.len() as i16, ..self.header };
        let mut out = header.to_bytes().to_vec();
        out.extend(encode_nodes(&self.nodes));
        out
    }

    /// The prefix padded with zeros, or cut, to `len` bytes (drivers carry fixed sizes).
    pub fn encode_padded(&self, len: usize) -> Vec<u8> {
        let mut out = self.encode_prefix();
        out.resize(len, 0);
        out
    }
}

wire! {
    /// One epoch of a STAT_CLUSTER answer; `nodes_nr` node records follow it.
    EpochRecord [48] {
        /// Cluster creation time; in the first record only.
        0 => ctime: u64,
        /// When the epoch was logged, seconds since 1970.
        8 => time: u64,
        /// The epoch.
        16 => epoch: Epoch,
        /// Members.
        20 => nr_nodes: u32,
        /// Recovery is disabled; first record only.
        24 => disable_recovery: u8,
        /// Default copies; first record only.
        25 => nr_copies: u8,
        /// Default policy byte; first record only.
        26 => copy_policy: u8,
        /// Cluster flags; first record only.
        30 => flags: ClusterFlags,
        /// Store driver; first record only.
        32 => store: [u8; 16],
    }
}
