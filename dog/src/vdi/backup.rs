//! `dog vdi backup` (spec 07, 12.1 and 12.2): the difference of two snapshots as a stream.

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use sheepdog_proto::{Flags, Oid, ResultCode};

use crate::context::Context;
use crate::exit::{FAILURE, Outcome, SYSTEM, Stop, fail};
use crate::inode::{Inode, Part, open};
use crate::objects::read;
use crate::out::{self, errno_text};
use crate::session::{Failed, Session};
use crate::vdi::ahead;

/// Version of the stream.
pub const STREAM_VERSION: u32 = 1;
/// Magic of the stream.
pub const STREAM_MAGIC: u32 = 0x1192_1192;
/// Index of the record that ends it.
pub const END_INDEX: u32 = u32::MAX;
/// Granularity of the comparison, bytes.
const SECTOR: usize = 512;
/// Pairs of objects compared at the same time.
const READ_AHEAD: usize = 4;

sheepdog_proto::wire! {
    /// Start of the stream.
    StreamHeader [8] {
        /// [`STREAM_VERSION`].
        0 => version: u32,
        /// [`STREAM_MAGIC`].
        4 => magic: u32,
    }
}

sheepdog_proto::wire! {
    /// Start of a record; `length` bytes of data follow.
    RecordHeader [16] {
        /// Block, or [`END_INDEX`].
        0 => index: u32,
        /// Byte offset in it.
        4 => offset: u32,
        /// Bytes.
        8 => length: u32,
    }
}

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let name = context.name()?;
    let (Some(from), Some(to)) = (&context.options.from, &context.options.snapshot) else {
        return Err(fail(Stop::Usage, "Please specify snapshots with '-F' and '-s' options"));
    };
    let session = &context.session;
    let from = &open(session, name, Some(from), Part::Map).await?;
    let to = &open(session, name, Some(to), Part::Map).await?;
    emit(&StreamHeader { version: STREAM_VERSION, magic: STREAM_MAGIC }.to_bytes())?;
    // Equal owners mean the same object: nothing to compare.
    let changed = (0..to.header.nr_blocks()).filter(|index| from.map.get(*index) != to.map.get(*index));
    let mut records = stream::iter(changed)
        .map(|index| async move { compare(session, from, to, index).await.map_err(|e| (index, e)) })
        .buffered(ahead(READ_AHEAD, 2 * to.header.block_size()));
    while let Some(record) = records.next().await {
        match record {
            Ok(None) => {}
            Ok(Some((header, data))) => {
                emit(&header.to_bytes())?;
                emit(&data)?;
            }
            Err((index, FailedRead { vid, .. })) => {
                return Err(fail(FAILURE, format_args!("Failed to read object {vid:x}, {index}")));
            }
        }
    }
    emit(&RecordHeader { index: END_INDEX, ..RecordHeader::zeroed() }.to_bytes())
}

fn emit(bytes: &[u8]) -> Outcome {
    out::direct(bytes)
        .map_err(|e| fail(SYSTEM, format_args!("failed to write backup data: {}", errno_text(&e))))
}

struct FailedRead {
    vid: u32,
}

/// The record of a block, if it differs.
async fn compare(
    session: &Session,
    from: &Inode,
    to: &Inode,
    index: u64,
) -> Result<Option<(RecordHeader, Bytes)>, FailedRead> {
    let block_size = from.header.block_size() as usize;
    let old = whole_block(session, from, index, block_size).await?;
    let new = whole_block(session, to, index, block_size).await?;
    let Some(range) = difference(&old, &new) else { return Ok(None) };
    let header = RecordHeader { index: index as u32, offset: range.start as u32, length: range.len() as u32 };
    Ok(Some((header, new.slice(range))))
}

/// A block's content; holes and missing objects are zeros.
async fn whole_block(
    session: &Session,
    inode: &Inode,
    index: u64,
    block_size: usize,
) -> Result<Bytes, FailedRead> {
    let owner = inode.map.get(index);
    if owner.is_none() {
        return Ok(vec![0; block_size].into());
    }
    let oid = Oid::data(owner, index as u32);
    match read(session, oid, 0, block_size, Flags::DIRECT).await {
        Ok(data) => Ok(data),
        Err(Failed::Refused(ResultCode::NO_OBJ)) => Ok(vec![0; block_size].into()),
        Err(e) => {
            crate::objects::report_read(oid, e);
            Err(FailedRead { vid: owner.get() })
        }
    }
}

/// From the first to the last sector that differs.
fn difference(old: &[u8], new: &[u8]) -> Option<std::ops::Range<usize>> {
    let differs = |sector: &usize| {
        let end = (*sector + SECTOR).min(new.len());
        old[*sector..end] != new[*sector..end]
    };
    let sectors = || (0..new.len()).step_by(SECTOR);
    let first = sectors().find(differs)?;
    let last = sectors().rev().find(differs)?;
    Some(first..(last + SECTOR).min(new.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_sectors_are_trimmed_at_both_ends() {
        let old = vec![0; 4096];
        let mut new = old.clone();
        assert_eq!(difference(&old, &new), None);
        new[1030] = 1;
        assert_eq!(difference(&old, &new), Some(1024..1536));
        new[4095] = 1;
        assert_eq!(difference(&old, &new), Some(1024..4096));
    }

    #[test]
    fn headers_have_the_captured_bytes() {
        let header = StreamHeader { version: STREAM_VERSION, magic: STREAM_MAGIC };
        assert_eq!(header.to_bytes(), [1, 0, 0, 0, 0x92, 0x11, 0x92, 0x11]);
        let record = RecordHeader { index: 1, offset: 1024, length: 512 };
        assert_eq!(record.to_bytes()[..12], [1, 0, 0, 0, 0, 4, 0, 0, 0, 2, 0, 0]);
    }
}
