//! `dog vdi delete` (spec 07, 9.6), also a step of rollback and restore.
//!
//! The map is cleared in batches first, so that the daemons reclaim the data gradually. A hypervolume's map is never
//! touched: it is a tree, and the daemon releases its blocks itself.

use std::time::Duration;

use sheepdog_proto::header::VdiRequest;
use sheepdog_proto::inode::table_offset;
use sheepdog_proto::{Flags, Oid, Opcode, Request};

use crate::args::{Options, Snapshot};
use crate::context::Context;
use crate::exit::Outcome;
use crate::inode::{BlockMap, Inode, Part};
use crate::objects::{Write, find, name_and_tag};
use crate::out::{self, text};
use crate::session::{Session, success};

/// Runs the command. It never fails: scripts rely on the status 0 whatever happened.
pub async fn run(context: &Context) -> Outcome {
    let name = context.name()?;
    let options = &context.options;
    delete(&context.session, name, options.snapshot.as_ref(), options).await;
    Ok(())
}

/// Deletes a VDI; `true` if that succeeded. Failures are reported.
pub async fn delete(session: &Session, name: &[u8], snapshot: Option<&Snapshot>, options: &Options) -> bool {
    let Ok(vid) = find(session, name, snapshot).await else { return false };
    let inode = match Inode::read(session, vid, &Part::Map).await {
        Ok(inode) => inode,
        Err(_) => {
            out::log(format_args!("failed to read inode object: {}", Oid::inode(vid)));
            return false;
        }
    };
    if !clear_map(session, &inode, options).await {
        return false;
    }
    if options.max_reclaim.is_some() {
        return true; // the VDI stays, to be reclaimed further by later runs
    }
    let body = VdiRequest { snapid: snapshot.map_or(0, Snapshot::id), ..VdiRequest::zeroed() };
    let request = Request::new(Opcode::DEL_VDI).flag(Flags::WRITE).with_vdi(body);
    let tag = snapshot.map_or(&b""[..], Snapshot::tag);
    match success(session.tell(request, name_and_tag(name, tag)).await) {
        Ok(_) => true,
        Err(e) => {
            out::log(format_args!("Failed to delete {}: {e}", text(name)));
            false
        }
    }
}

/// Sets map entries to 0 in batches; `false` if one could not be written.
async fn clear_map(session: &Session, inode: &Inode, options: &Options) -> bool {
    let BlockMap::Flat { entries, .. } = &inode.map else { return true };
    let oid = Oid::inode(inode.vid());
    let mut left = options.max_reclaim.unwrap_or(u64::MAX);
    let mut at = 0;
    let mut first = true;
    while let Some(batch) = next_batch(entries, at, options.batch, left) {
        if !first {
            tokio::time::sleep(Duration::from_secs(options.interval)).await;
        }
        first = false;
        let zeros = vec![0; 4 * (batch.end - batch.start)];
        let write = Write::new(&inode.header, oid, table_offset(batch.start as u32), zeros);
        if write.send(session).await.is_err() {
            out::log(format_args!("failed to update inode for discarding objects: {oid}"));
            return false;
        }
        left -= batch.cleared;
        at = batch.end;
    }
    true
}

#[derive(Debug, PartialEq, Eq)]
struct Batch {
    start: usize,
    end: usize,
    /// Non-zero entries in it.
    cleared: u64,
}

/// The next run from `at` on: it begins and ends with a non-zero entry and has at most `size` and `left` of them.
fn next_batch(entries: &[u32], at: usize, size: usize, left: u64) -> Option<Batch> {
    let most = usize::try_from(left).unwrap_or(usize::MAX).min(size);
    let mut used = (at..entries.len()).filter(|i| entries[*i] != 0);
    let start = used.next().filter(|_| most > 0)?;
    let mut batch = Batch { start, end: start + 1, cleared: 1 };
    for index in used.take(most - 1) {
        batch.end = index + 1;
        batch.cleared += 1;
    }
    Some(batch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_begin_and_end_with_allocated_blocks() {
        let entries = [0, 5, 0, 5, 5, 0, 0, 5, 0];
        let batch = |start, end, cleared| Some(Batch { start, end, cleared });
        assert_eq!(next_batch(&entries, 0, 128, u64::MAX), batch(1, 8, 4));
        assert_eq!(next_batch(&entries, 0, 2, u64::MAX), batch(1, 4, 2));
        assert_eq!(next_batch(&entries, 4, 2, u64::MAX), batch(4, 8, 2));
        assert_eq!(next_batch(&entries, 0, 128, 1), batch(1, 2, 1));
        assert_eq!(next_batch(&entries, 0, 128, 0), None);
        assert_eq!(next_batch(&entries, 8, 128, 9), None);
    }
}
