//! Files of the metadata directory: `config` and `epoch/NNNNNNNN` (spec 03, sections 3 and 4).

use crate::node::{decode_nodes, encode_nodes};
use crate::{ClusterFlags, DecodeError, NodeRecord, Wire};

/// The store format version this project reads and writes.
pub const STORE_VERSION: u16 = 6;

wire! {
    /// The `config` file, 40 bytes without padding.
    StoreConfig [40] {
        /// Creation time of the cluster; 0 = never formatted.
        0 => ctime: u64,
        /// Cluster flags.
        8 => flags: ClusterFlags,
        /// Default copies.
        10 => copies: u8,
        /// Store driver name, NUL-padded.
        11 => default_store: [u8; 16],
        /// 1 after an orderly cluster shutdown.
        27 => shutdown: u8,
        /// Default policy byte.
        28 => copy_policy: u8,
        /// log2 of the default block size.
        29 => block_size_shift: u8,
        /// [`STORE_VERSION`].
        30 => version: u16,
        /// Bytes this node offers.
        32 => space: u64,
    }
}

/// An epoch log: the members of an epoch and when this node wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EpochLog {
    /// Members in node order, with the weights of that epoch.
    pub nodes: Vec<NodeRecord>,
    /// Seconds since 1970.
    pub time: i64,
}

impl EpochLog {
    /// Decodes a file or a GET_EPOCH answer: whole records, then 8 bytes of time.
    pub fn decode(bytes: &[u8]) -> Result<EpochLog, DecodeError> {
        let list = bytes.len().checked_sub(8).ok_or(DecodeError::Truncated {
            what: "epoch log",
            need: 8,
            got: bytes.len(),
        })?;
        if !list.is_multiple_of(NodeRecord::LEN) {
            return Err(DecodeError::Invalid { what: "epoch log length", value: bytes.len() as u64 });
        }
        Ok(EpochLog { nodes: decode_nodes(&bytes[..list]), time: i64::get(&bytes[list..]) })
    }

    /// The file's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = encode_nodes(&self.nodes);
        out.extend(self.time.to_le_bytes());
        out
    }
}
