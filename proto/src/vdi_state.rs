//! Records of the VDI state table, exchanged when nodes join (spec 05, section 15).

use crate::{MAX_COPIES, NodeId, VdiId};

/// `lock_state`: nobody holds the VDI.
pub const UNLOCKED: u32 = 1;
/// `lock_state`: one owner node.
pub const LOCKED: u32 = 2;
/// `lock_state`: up to 31 participant nodes.
pub const SHARED: u32 = 3;

/// Participant state: changed the table last.
pub const PART_MODIFIED: u32 = 1;
/// Participant state: its cached inode is current.
pub const PART_SHARED: u32 = 2;
/// Participant state: it must read the inode again.
pub const PART_INVALIDATED: u32 = 3;

wire! {
    /// One VDI's entry of the state table.
    VdiState [1428] {
        /// The VDI.
        0 => vid: VdiId,
        /// Copies, or data plus parity strips.
        4 => nr_copies: u8,
        /// 1 = snapshot.
        5 => snapshot: u8,
        /// 1 = deleted.
        6 => deleted: u8,
        /// Policy byte.
        7 => copy_policy: u8,
        /// log2 of the block size.
        8 => block_size_shift: u8,
        /// 1 = announced, but not in use: its inode was never finished. Nodes of the original always send 0.
        9 => announced_only: u8,
        /// Fewest copies since all nodes had everything; 0 = they were not altered. Nodes of the original always send 0.
        10 => least_copies: u8,
        /// Most copies since then; 0 = they were not altered.
        11 => most_copies: u8,
        /// What it was derived from; 0 = nothing.
        12 => parent_vid: VdiId,
        /// [`UNLOCKED`], [`LOCKED`] or [`SHARED`].
        16 => lock_state: u32,
        /// Owner of a normal lock.
        20 => lock_owner: NodeId,
        /// Participants of a shared lock.
        60 => nr_participants: u32,
        /// Their states.
        64 => participants_state: [u32; MAX_COPIES],
        /// Their nodes.
        188 => participants: [NodeId; MAX_COPIES],
    }
}
