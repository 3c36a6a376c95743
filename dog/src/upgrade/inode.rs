//! `dog upgrade inode-convert`.

use sheepdog_proto::inode::{GREF_OFFSET, INODE_LEN, TABLE_OFFSET};
use sheepdog_proto::{VdiId, Wire};

use super::{destination, read_source, write_destination};
use crate::args::OldVersion;
use crate::context::Context;
use crate::exit::{FAILURE, Outcome, SYSTEM, Stop, fail};
use crate::inode::InodeHeader;

sheepdog_proto::wire! {
    /// The header of releases 0.7 and 0.8, up to its child ids.
    OldHeader [568] {
        /// Name.
        0 => name: [u8; 256],
        /// Tag.
        256 => tag: [u8; 256],
        /// As today.
        512 => create_time: u64,
        /// As today.
        520 => snap_ctime: u64,
        /// As today.
        528 => vm_clock_nsec: u64,
        /// As today.
        536 => vdi_size: u64,
        /// As today.
        544 => vm_state_size: u64,
        /// Policy byte.
        552 => copy_policy: u8,
        /// Upper half of a 16-bit policy in 0.7, the store policy in 0.8.
        553 => store_policy: u8,
        /// As today.
        554 => nr_copies: u8,
        /// As today.
        555 => block_size_shift: u8,
        /// As today.
        556 => snap_id: u32,
        /// As today.
        560 => vdi_id: VdiId,
        /// As today.
        564 => parent_vdi_id: VdiId,
    }
}

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let target = destination(context)?;
    let Some(version) = context.options.old_version else {
        return Err(fail(FAILURE, "please specify original version of inode file"));
    };
    let old = read_source(context, "original inode file")?;
    let needed = match version {
        OldVersion::V07 => GREF_OFFSET,
        OldVersion::V08 => GREF_OFFSET + 4, // the number of the next index node follows the table
    };
    if old.len() < needed {
        return Err(fail(SYSTEM, "invalid original inode file size"));
    }
    let header = OldHeader::get(&old);
    if header.snap_ctime != 0 {
        return Err(fail(Stop::Usage, "snapshot cannot be converted"));
    }
    let new = InodeHeader {
        name: header.name,
        tag: header.tag,
        create_time: header.create_time,
        vm_clock_nsec: header.vm_clock_nsec,
        vdi_size: header.vdi_size,
        vm_state_size: header.vm_state_size,
        copy_policy: header.copy_policy,
        nr_copies: header.nr_copies,
        block_size_shift: header.block_size_shift,
        vdi_id: header.vdi_id,
        ..InodeHeader::zeroed()
    };
    let mut bytes = vec![0; INODE_LEN];
    new.put(&mut bytes);
    bytes[TABLE_OFFSET..GREF_OFFSET].copy_from_slice(&old[TABLE_OFFSET..GREF_OFFSET]);
    write_destination(target, &bytes)
}
