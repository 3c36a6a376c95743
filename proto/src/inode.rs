//! The inode: header, block table and generation references (spec 01, section 12; spec 05, section 1).
//!
//! An inode is 12.5 MB, mostly zeros. It is handled as bytes: the header through [`InodeHeader`], ranges of the two
//! tables through the bulk views [`table`] and [`grefs`].

use zerocopy::little_endian::{I32, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::{MAX_DATA_OBJS, VdiId, cstr};

/// Bytes of the header: what listings read and QEMU writes back.
pub const INODE_HEADER_LEN: usize = 4664;
/// Bytes a name lookup reads: everything up to and including the parent.
pub const INODE_LOOKUP_LEN: usize = 568;
/// Offset of the block table.
pub const TABLE_OFFSET: usize = INODE_HEADER_LEN;
/// Offset of the generation references; also the inode's length as QEMU and tgt know it (a refresh read).
pub const GREF_OFFSET: usize = TABLE_OFFSET + 4 * MAX_DATA_OBJS;
/// Bytes of the whole object.
pub const INODE_LEN: usize = GREF_OFFSET + 8 * MAX_DATA_OBJS;

const _: () = assert!(GREF_OFFSET == 4_198_968 && INODE_LEN == 12_587_576);

/// `store_policy` of a flat block table.
pub const STORE_POLICY_FLAT: u8 = 0;
/// `store_policy` of a hypervolume, whose blocks are indexed by a B-tree.
pub const STORE_POLICY_BTREE: u8 = 1;

wire! {
    /// The first 4664 bytes of an inode.
    InodeHeader [4664] {
        /// Name; empty = deleted.
        0 => name: [u8; 256],
        /// Snapshot tag.
        256 => tag: [u8; 256],
        /// Seconds << 32 | nanoseconds.
        512 => create_time: u64,
        /// 0 = working VDI; anything else = snapshot.
        520 => snap_ctime: u64,
        /// QEMU's.
        528 => vm_clock_nsec: u64,
        /// Bytes.
        536 => vdi_size: u64,
        /// Bytes of saved VM memory.
        544 => vm_state_size: u64,
        /// Policy byte.
        552 => copy_policy: u8,
        /// [`STORE_POLICY_FLAT`] or [`STORE_POLICY_BTREE`].
        553 => store_policy: u8,
        /// Copies, or data plus parity strips.
        554 => nr_copies: u8,
        /// log2 of the block size.
        555 => block_size_shift: u8,
        /// 1, 2, ... along the chain of snapshots.
        556 => snap_id: u32,
        /// Own vid.
        560 => vdi_id: VdiId,
        /// What it was derived from; 0 = nothing.
        564 => parent_vdi_id: VdiId,
        /// Next index node number of a hypervolume.
        568 => btree_counter: u32,
        /// Kept as found: clients write back what they read.
        572 => unused: [u8; 4092],
    }
}

impl InodeHeader {
    /// The name's bytes.
    pub fn name(&self) -> &[u8] {
        cstr(&self.name)
    }

    /// The tag's bytes.
    pub fn tag(&self) -> &[u8] {
        cstr(&self.tag)
    }

    /// Whether this is a snapshot: `snap_ctime` alone decides.
    pub fn is_snapshot(&self) -> bool {
        self.snap_ctime != 0
    }

    /// Whether the VDI was deleted.
    pub fn is_deleted(&self) -> bool {
        self.name[0] == 0
    }

    /// Bytes of a data object. Shifts out of range count as the default.
    pub fn block_size(&self) -> u64 {
        match self.block_size_shift {
            s @ crate::MIN_BLOCK_SHIFT..=crate::MAX_BLOCK_SHIFT => 1 << s,
            _ => 1 << crate::DEFAULT_BLOCK_SHIFT,
        }
    }

    /// Number of blocks that `vdi_size` spans, at most what the table holds for a flat VDI.
    pub fn nr_blocks(&self) -> u64 {
        let blocks = self.vdi_size.div_ceil(self.block_size());
        if self.store_policy == STORE_POLICY_BTREE { blocks } else { blocks.min(MAX_DATA_OBJS as u64) }
    }
}

/// A reference to a data object: how far it is from the reference that created it, and how often it was copied.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Gref {
    /// Copies between the creating reference and this one.
    pub generation: I32,
    /// How often this one was copied.
    pub count: I32,
}

/// Byte offset of block `index`'s table entry.
pub fn table_offset(index: u32) -> u64 {
    TABLE_OFFSET as u64 + 4 * u64::from(index)
}

/// Byte offset of block `index`'s generation reference.
pub fn gref_offset(index: u32) -> u64 {
    GREF_OFFSET as u64 + 8 * u64::from(index)
}

/// Bytes of a table range as entries; trailing bytes that are no whole entry are left out.
pub fn table(bytes: &[u8]) -> &[U32] {
    let whole = bytes.len() / 4 * 4;
    <[U32]>::ref_from_bytes(&bytes[..whole]).unwrap_or(&[])
}

/// As [`table`], to write.
pub fn table_mut(bytes: &mut [u8]) -> &mut [U32] {
    let whole = bytes.len() / 4 * 4;
    <[U32]>::mut_from_bytes(&mut bytes[..whole]).unwrap_or(&mut [])
}

/// Bytes of a range of generation references; trailing bytes that are no whole one are left out.
pub fn grefs(bytes: &[u8]) -> &[Gref] {
    let whole = bytes.len() / 8 * 8;
    <[Gref]>::ref_from_bytes(&bytes[..whole]).unwrap_or(&[])
}

/// As [`grefs`], to write.
pub fn grefs_mut(bytes: &mut [u8]) -> &mut [Gref] {
    let whole = bytes.len() / 8 * 8;
    <[Gref]>::mut_from_bytes(&mut bytes[..whole]).unwrap_or(&mut [])
}

/// Whether a write of an inode lies entirely within the block table (spec 01, 12.5).
pub fn is_table_update(offset: u64, length: u64) -> bool {
    offset >= TABLE_OFFSET as u64 && offset.saturating_add(length) <= GREF_OFFSET as u64
}
