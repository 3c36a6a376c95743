//! Wire and disk structures of Sheepdog: headers, opcodes, results, object ids, hashes, inodes, cluster records.
//!
//! Everything here is plain data: no I/O, no clocks, no async. Every layout is declared once, with its offsets as the
//! specification's tables give them ([`wire!`]), so that decoding is total: any bytes give a value or a
//! [`DecodeError`], never a panic, and encoding leaves unused bytes zero. All integers are little-endian
//! (spec 01, section 1). Big arrays (inode tables, ledgers) are viewed by bulk casts in [`inode`].

#[macro_use]
mod wire;

pub mod admin;
pub mod attr;
pub mod btree;
pub mod cluster;
pub mod config;
pub mod flags;
pub mod hash;
pub mod header;
pub mod inode;
pub mod ledger;
pub mod message;
pub mod node;
pub mod oid;
pub mod op;
pub mod redundancy;
pub mod result;
pub mod vdi_state;

pub use cluster::{ClusterInfo, ClusterStatus};
pub use flags::{ClusterFlags, Flags};
pub use header::{Request, Response};
pub use node::{NodeId, NodeRecord};
pub use oid::{ObjectKind, Oid, VdiId};
pub use op::Opcode;
pub use redundancy::CopyPolicy;
pub use result::ResultCode;
pub use vdi_state::VdiState;
pub use wire::{DecodeError, Epoch, Wire, cstr, fixed_str};

/// Bytes of a request or response header.
pub const HEADER_LEN: usize = 48;
/// Public protocol version, for opcodes below 0x80 (spec 01, 5.1).
pub const PROTO_VERSION: u8 = 0x02;
/// Internal protocol version, for opcodes of 0x80 and above.
pub const INTERNAL_PROTO_VERSION: u8 = 0x0a;
/// Default TCP port of a sheep.
pub const DEFAULT_PORT: u16 = 7000;
/// Most replicas, or data plus parity strips, of one object; also the most participants of a shared lock.
pub const MAX_COPIES: usize = 31;
/// Most nodes of a cluster in the 80-byte node record format.
pub const MAX_NODES: usize = 6144;
/// Number of VDI ids; ids are 1..2^24.
pub const NR_VDIS: usize = 1 << 24;
/// Bytes of a VDI bitmap (READ_VDIS, READ_DEL_VDIS).
pub const VDI_BITMAP_LEN: usize = NR_VDIS / 8;
/// Longest name or tag field, with its NUL.
pub const MAX_NAME_LEN: usize = 256;
/// Most data objects of a flat VDI.
pub const MAX_DATA_OBJS: usize = 1 << 20;
/// Default block size: 4 MiB.
pub const DEFAULT_BLOCK_SHIFT: u8 = 22;
/// Smallest block size shift accepted: 1 MiB.
pub const MIN_BLOCK_SHIFT: u8 = 20;
/// Largest block size shift accepted: 2 GiB.
pub const MAX_BLOCK_SHIFT: u8 = 31;
/// Longest payload of one cluster message, its two headers included (spec 04, 2.6).
pub const MAX_CLUSTER_MESSAGE: usize = 128 << 10;
