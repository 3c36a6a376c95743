//! `dog vdi read` (spec 07, 10.1).
//!
//! Objects are read several at a time and written in order.

use std::ops::Range;

use futures_util::{StreamExt, stream};
use sheepdog_proto::Flags;

use crate::context::Context;
use crate::exit::{FAILURE, Outcome, SYSTEM, fail};
use crate::inode::{Inode, Part, open};
use crate::objects::{read, report_read};
use crate::out::errno_text;
use crate::session::Session;
use crate::vdi::stream::{Output, Writer};
use crate::vdi::{ahead, pieces, range_operands};

/// Objects read at the same time.
const READ_AHEAD: usize = 8;

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let name = context.name()?;
    let range = range_operands(context)?;
    let session = &context.session;
    let part = Part::Bytes(range.clone());
    let inode = open(session, name, context.options.snapshot.as_ref(), part).await?;
    let size = inode.header.vdi_size;
    if range.start > size {
        return Err(fail(FAILURE, "Read offset is beyond the end of the VDI"));
    }
    to_stdout(session, &inode, range.start..range.end.min(size)).await
}

/// Writes a range of bytes of an image to stdout.
pub async fn to_stdout(session: &Session, inode: &Inode, range: Range<u64>) -> Outcome {
    let mut data = stream::iter(pieces(range, inode.header.block_size()))
        .map(|piece| async move {
            let Some(oid) = inode.block(piece.index) else { return Ok(Output::Zeros(piece.length)) };
            let data = read(session, oid, piece.offset, piece.length, Flags::NONE).await;
            data.map(Output::Data).map_err(|e| (oid, e))
        })
        .buffered(ahead(READ_AHEAD, inode.header.block_size()));
    let writer = Writer::start();
    let mut failure = None;
    while let Some(result) = data.next().await {
        match result {
            Ok(output) => {
                if !writer.put(output).await {
                    break;
                }
            }
            Err(error) => {
                failure = Some(error);
                break;
            }
        }
    }
    let written = writer.finish().await;
    if let Some((oid, e)) = failure {
        report_read(oid, e);
        return Err(fail(FAILURE, "Failed to read VDI"));
    }
    written.map_err(|e| fail(SYSTEM, format_args!("Failed to write to stdout: {}", errno_text(&e))))?;
    let _ = nix::unistd::fsync(std::io::stdout()); // pipes cannot be synced
    Ok(())
}
