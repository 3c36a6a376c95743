//! `dog vdi check` (spec 07, 11.5) and its part of `dog cluster check`.
//!
//! Copies are compared on the nodes that hold them by the present placement. The VDI may be in use: copies that differ
//! are looked at again, and only a difference that stays is repaired, because a repair made from a moment between two
//! writes would undo an acknowledged write.

mod existence;
mod replicas;
mod strips;

use futures_util::{StreamExt, stream};
use sheepdog_placement::Ring;
use sheepdog_proto::{CopyPolicy, NodeRecord, Oid};

use crate::context::Context;
use crate::exit::{FAILURE, Outcome, fail};
use crate::inode::{BlockMap, Inode, Part};
use crate::terminal::{Progress, Unit};
use crate::vdi::name_text;
use crate::vdi::object::open_for_objects;
use crate::{out, placement};

/// Objects checked at the same time.
const CHECK_AHEAD: usize = 8;
/// Bytes of strips held at the same time, at most; a single object may exceed it.
const MAX_STRIP_BYTES: u64 = 256 << 20;
/// Looks at an object before it counts as being changed.
const ROUNDS: usize = 3;
/// Pause before looking again: longer than a write takes to reach every copy.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(200);

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let inode = open_for_objects(context, Part::Map).await?;
    let ring = placement::ring(&context.cluster.nodes)?;
    if context.options.exist {
        return existence::check(context, &ring, &inode).await;
    }
    check_vdi(context, &ring, &inode).await
}

/// Checks and repairs a VDI.
pub async fn check_vdi(context: &Context, ring: &Ring, inode: &Inode) -> Outcome {
    let header = &inode.header;
    let policy = CopyPolicy::from_byte(header.copy_policy).unwrap_or_default();
    let copies = usize::from(header.nr_copies).min(ring.nr_zones());
    if policy.is_erasure() && copies < usize::from(header.nr_copies) {
        let text = "ABORT: Not enough active zones for consistency-checking erasure coded VDI";
        return Err(fail(FAILURE, text));
    }
    let progress = Progress::new(header.vdi_size, Unit::Bytes);
    let check = |oid: Oid| async move {
        let homes: Vec<NodeRecord> = ring.nodes_of(oid, copies).copied().collect();
        if policy.is_erasure() && oid.is_data() {
            strips::check(context, oid, inode, policy, &homes).await
        } else {
            replicas::check(context, oid, &homes).await
        }
    };
    let ahead = if policy.is_erasure() {
        (MAX_STRIP_BYTES / (2 * header.block_size())).clamp(1, CHECK_AHEAD as u64) as usize
    } else {
        CHECK_AHEAD
    };
    let objects = std::iter::once(Oid::inode(inode.vid())).chain(data_objects(inode, &progress));
    let mut checks = stream::iter(objects).map(check).buffer_unordered(ahead);
    while let Some(result) = checks.next().await {
        result?;
    }
    if let BlockMap::Flat { entries, .. } = &inode.map {
        progress.show(entries.len() as u64 * header.block_size());
    }
    out!("finish check&repair {}\n", name_text(inode));
    Ok(())
}

/// The allocated data objects; every block of a flat map moves the progress bar.
fn data_objects<'a>(inode: &'a Inode, progress: &'a Progress) -> Box<dyn Iterator<Item = Oid> + 'a> {
    let block_size = inode.header.block_size();
    match &inode.map {
        BlockMap::Flat { entries, .. } => Box::new((0..entries.len() as u64).filter_map(move |index| {
            progress.show(index * block_size);
            inode.block(index)
        })),
        BlockMap::Tree(tree) => Box::new(tree.allocated().map(move |(index, owner)| {
            progress.show(u64::from(index) * block_size);
            Oid::data(owner, index)
        })),
    }
}

/// The message of a node that did not give what it should.
fn unreadable(oid: Oid, node: &NodeRecord, why: impl std::fmt::Display) -> crate::exit::Stop {
    fail(FAILURE, format_args!("failed to read {oid} from {}, {why}", node.nid.host_port()))
}

/// An object whose copies keep changing.
fn report_busy(oid: Oid) {
    out::log(format_args!("object {oid} is being written, not checked"));
}
