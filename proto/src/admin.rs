//! Structures of the administration protocol (spec 01, section 15).

use crate::{DecodeError, Wire};

/// Disk slots of an MD_INFO answer.
pub const MAX_DISKS: usize = 64;
/// Bytes of an MD_INFO answer: 64 records, their number and padding.
pub const MD_INFO_LEN: usize = MAX_DISKS * MdInfo::LEN + 8;

const _: () = assert!(MD_INFO_LEN == 263_688);

wire! {
    /// One disk of a node.
    MdInfo [4120] {
        /// 0, 1, ... in path order.
        0 => idx: i32,
        /// Bytes free.
        8 => free: u64,
        /// Bytes used by objects.
        16 => used: u64,
        /// NUL-terminated path.
        24 => path: [u8; 4096],
    }
}

/// Encodes an MD_INFO answer; disks past the 64th do not fit and are left out.
pub fn encode_md_info(disks: &[MdInfo]) -> Vec<u8> {
    let mut out = vec![0; MD_INFO_LEN];
    let count = disks.len().min(MAX_DISKS);
    for (i, disk) in disks.iter().take(count).enumerate() {
        disk.put(&mut out[i * MdInfo::LEN..]);
    }
    (count as i32).put(&mut out[MAX_DISKS * MdInfo::LEN..]);
    out
}

/// Decodes an MD_INFO answer.
pub fn decode_md_info(bytes: &[u8]) -> Result<Vec<MdInfo>, DecodeError> {
    if bytes.len() < MD_INFO_LEN {
        return Err(DecodeError::Truncated { what: "disk information", need: MD_INFO_LEN, got: bytes.len() });
    }
    let count = i32::get(&bytes[MAX_DISKS * MdInfo::LEN..]);
    let count = usize::try_from(count)
        .ok()
        .filter(|n| *n <= MAX_DISKS)
        .ok_or(DecodeError::Invalid { what: "number of disks", value: count as u32 as u64 })?;
    Ok(bytes.chunks_exact(MdInfo::LEN).take(count).map(MdInfo::get).collect())
}

wire! {
    /// Counters of a node (STAT). "active" numbers are requests in progress, "rx" and "tx" bytes.
    SdStat [120] {
        /// Gateway requests in progress.
        0 => gway_active_nr: u64,
        /// Peer requests in progress.
        8 => peer_active_nr: u64,
        /// Gateway requests since start.
        16 => gway_total_nr: u64,
        /// Peer requests since start.
        24 => peer_total_nr: u64,
        /// Payload bytes of gateway requests with WRITE.
        32 => gway_total_rx: u64,
        /// Bytes asked for by gateway requests without WRITE.
        40 => gway_total_tx: u64,
        /// As gway_total_rx, peer requests.
        48 => peer_total_rx: u64,
        /// As gway_total_tx, peer requests.
        56 => peer_total_tx: u64,
        /// Stays 0 (spec 06, 3.11).
        64 => gway_total_remove_nr: u64,
        /// Reads.
        72 => gway_total_read_nr: u64,
        /// Writes and creates.
        80 => gway_total_write_nr: u64,
        /// FLUSH_VDI requests.
        88 => gway_total_flush_nr: u64,
        /// Removes.
        96 => peer_total_remove_nr: u64,
        /// Reads.
        104 => peer_total_read_nr: u64,
        /// Writes and creates.
        112 => peer_total_write_nr: u64,
    }
}

/// `RecoveryState::state`: making the list of objects.
pub const RECOVERY_PREPARE: u32 = 0;
/// `RecoveryState::state`: copying objects.
pub const RECOVERY_OBJECTS: u32 = 1;
/// `RecoveryState::state`: telling the cluster.
pub const RECOVERY_NOTIFY: u32 = 2;

wire! {
    /// Progress of a node's recovery (STAT_RECOVERY). All zero when idle.
    RecoveryState [24] {
        /// 1 = a round is active.
        0 => in_recovery: u8,
        /// Objects, at most 65,535, that are not to be had now. Padding in the original: it says 0.
        2 => nr_unfound: u16,
        /// Phase.
        4 => state: u32,
        /// Objects done.
        8 => nr_finished: u64,
        /// Objects in the list; 0 while preparing.
        16 => nr_total: u64,
    }
}

wire! {
    /// Limits of a node's recovery (GET_RECOVERY, SET_RECOVERY).
    RecoveryThrottling [24] {
        /// Objects per interval.
        0 => max_exec_count: u32,
        /// Milliseconds.
        8 => queue_work_interval: u64,
        /// 1 = both numbers are above 0.
        16 => throttling: u8,
    }
}
