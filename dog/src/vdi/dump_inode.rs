//! `dog vdi object dump-inode` (spec 07, 11.3): shows a local file that holds an inode object.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;

use sheepdog_proto::Wire;
use sheepdog_proto::inode::{GREF_OFFSET, INODE_LEN, InodeHeader, TABLE_OFFSET, grefs, table};

use crate::context::Context;
use crate::exit::{FAILURE, Outcome, fail};
use crate::out::{self, errno_text};

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let path = std::path::Path::new(std::ffi::OsStr::from_bytes(context.name()?));
    let failed = |what, e: &io::Error| {
        fail(FAILURE, format_args!("failed to {what} inode object file: {}", errno_text(e)))
    };
    let mut file = File::open(path).map_err(|e| failed("open", &e))?;
    let mut bytes = vec![0; INODE_LEN];
    file.read_exact(&mut bytes).map_err(|e| failed("read", &e))?;
    let header = InodeHeader::get(&bytes);
    print_header(&header);
    let owners = table(&bytes[TABLE_OFFSET..GREF_OFFSET]);
    let references = grefs(&bytes[GREF_OFFSET..]);
    out!("data_vdi_id:\n");
    for (index, owner) in owners.iter().enumerate().filter(|(_, owner)| owner.get() != 0) {
        out!("{index}: {:x}\n", owner.get());
    }
    out!("gref:\n");
    for (index, (owner, gref)) in owners.iter().zip(references).enumerate() {
        let (generation, count) = (gref.generation.get(), gref.count.get());
        if owner.get() != 0 {
            out!("{index}: {:x}, {generation}, {count}\n", owner.get());
        } else if generation != 0 || count != 0 {
            out!(
                "WARNING: index {index} doesn't have data vdi ID but its generation and count is not zero\
                 ({generation}, {count})"
            );
        }
    }
    Ok(())
}

fn print_header(header: &InodeHeader) {
    out::write(&[b"name: ", header.name(), b"\ntag: ", header.tag(), b"\n"].concat());
    out!("create_time: {:x}\n", header.create_time);
    out!("snap_ctime: {:x}\n", header.snap_ctime);
    out!("vm_clock_nsec: {:x}\n", header.vm_clock_nsec);
    out!("vdi_size: {}\n", header.vdi_size);
    out!("vm_state_size: {}\n", header.vm_state_size);
    out!("copy_policy: {}\n", header.copy_policy);
    out!("store_policy: {}\n", header.store_policy);
    out!("nr_copies: {}\n", header.nr_copies);
    out!("block_size_shift: {}\n", header.block_size_shift);
    out!("snap_id: {}\n", header.snap_id);
    out!("vdi_id: {}\n", header.vdi_id);
    out!("parent_vdi_id: {}\n", header.parent_vdi_id);
    out!("btree_counter: {}\n", header.btree_counter);
}
