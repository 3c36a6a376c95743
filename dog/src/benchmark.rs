//! `dog benchmark io` (spec 07, 16.3): writes whole objects of zeros, round robin over a preallocated VDI.

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use sheepdog_proto::Oid;

use crate::context::Context;
use crate::exit::{FAILURE, Outcome, SYSTEM, Stop, fail};
use crate::inode::{Inode, Part, open};
use crate::objects::Write;
use crate::out::{self, text};
use crate::terminal::confirm;

/// Writes without `-t`.
const DEFAULT_TOTAL: u64 = 1000;
/// Writes in flight with `-w dynamic`, and with `-w fixed` without `-n`.
const DEFAULT_AHEAD: u64 = 16;
/// Most writes in flight.
const MAX_AHEAD: u64 = 256;

/// Runs the command. It prints nothing; `-T` shows the time.
pub async fn run(context: &Context) -> Outcome {
    let name = context.name()?;
    if !context.options.force {
        confirm(
            "Caution! benchmark io command will erase all data of target VDI.\n Are you sure you want to continue? \
             [yes/no]",
        )?;
    }
    let ahead = writes_in_flight(context)?;
    let inode = open(&context.session, name, None, Part::Map).await.map_err(|_| {
        let name = text(name);
        fail(SYSTEM, format_args!("failed to lookup VDI {name}: Unknown error"))
    })?;
    let blocks = inode.header.nr_blocks();
    let owned = inode.map.allocated().filter(|(_, owner)| *owner == inode.vid()).count() as u64;
    if owned < blocks || blocks == 0 {
        return Err(fail(SYSTEM, format_args!("VDI {} has unallocated data", text(name))));
    }
    let total = context.options.total.unwrap_or(DEFAULT_TOTAL);
    write_blocks(context, &inode, total, ahead).await
}

fn writes_in_flight(context: &Context) -> Result<usize, Stop> {
    let ahead = match context.options.workqueue.as_deref() {
        None | Some(b"ordered") => 1,
        Some(b"dynamic") => DEFAULT_AHEAD,
        Some(b"fixed") => context.options.threads.unwrap_or(DEFAULT_AHEAD),
        Some(other) => {
            out::log(format_args!("unknown workqueue type: {}", text(other)));
            return Err(fail(SYSTEM, "assumed workqueue types: ordered, dynamic"));
        }
    };
    Ok(ahead.clamp(1, MAX_AHEAD) as usize)
}

async fn write_blocks(context: &Context, inode: &Inode, total: u64, ahead: usize) -> Outcome {
    let blocks = inode.header.nr_blocks();
    let zeros = Bytes::from(vec![0; inode.header.block_size() as usize]);
    let mut writes = stream::iter(0..total)
        .map(|n| {
            let oid = Oid::data(inode.vid(), (n % blocks) as u32);
            let write = Write::new(&inode.header, oid, 0, zeros.clone());
            async move { write.send(&context.session).await.map_err(|e| (oid, e)) }
        })
        .buffer_unordered(ahead);
    while let Some(result) = writes.next().await {
        result.map_err(|(oid, e)| fail(FAILURE, format_args!("failed to write object {oid}, {e}")))?;
    }
    Ok(())
}
