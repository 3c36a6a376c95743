//! `dog cluster snapshot load` (spec 07, 15.8).
//!
//! The cluster is formatted only after every file of the snapshot has been read and verified.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};
use sheepdog_proto::cluster::EpochRecord;
use sheepdog_proto::header::VdiStateRequest;
use sheepdog_proto::inode::{GREF_OFFSET, TABLE_OFFSET, table};
use sheepdog_proto::{Oid, Opcode, Request, VdiId};

use super::content::{Content, SnapshotError, TrunkEntry};
use super::{failed, find, is_named};
use crate::cluster::format::{Defaults, format};
use crate::context::Context;
use crate::exit::{Outcome, SYSTEM, Stop, fail};
use crate::inode::InodeHeader;
use crate::objects::{Write, like, new_vdi, report_write};
use crate::out;
use crate::session::{Failed, success};
use crate::terminal::{Progress, Unit};

/// Objects written at the same time.
const WRITE_AHEAD: usize = 4;
/// How long the daemons may take to be ready after formatting.
const READY_WITHIN: Duration = Duration::from_secs(30);
/// How often they are asked.
const POLL: Duration = Duration::from_millis(100);

const FAIL: &str = "Fail to load snapshot";

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let Some(path) = context.arg(1) else {
        return Err(fail(Stop::Usage, "Please specify the path to save snapshot."));
    };
    let damaged = |e: SnapshotError| failed(e, FAIL);
    let (content, log, record) = find(path, context.name()?).map_err(damaged)?;
    let header = log.header.ok_or(SnapshotError::Magic).map_err(damaged)?;
    let trunk = content.trunk(&record.trunk).map_err(damaged)?;
    let wanted = select(&content, trunk, &context.args[2..]).map_err(damaged)?;
    if wanted.is_empty() {
        out::log("Objects of specified VDIs are not found in local cluster snapshot storage.");
        return Err(fail(SYSTEM, FAIL));
    }
    // Everything is read once before anything is destroyed.
    for entry in &wanted {
        content.object(entry).map_err(damaged)?;
    }
    let defaults = Defaults {
        copies: header.copies,
        policy: header.copy_policy,
        block_size_shift: header.block_size_shift,
    };
    let stop = |stop: Stop| match stop {
        Stop::Now(status) => Stop::Now(status),
        _ => fail(SYSTEM, FAIL),
    };
    format(context, &defaults).await.map_err(stop)?;
    wait_until_ready(context).await.map_err(stop)?;
    load_objects(context, &content, &wanted).await.map_err(stop)?;
    make_working_vdis(context, &content, &wanted).await.map_err(stop)
}

/// The objects to load: all, or those of the named VDIs and of deleted ones.
fn select(
    content: &Content,
    trunk: Vec<TrunkEntry>,
    names: &[Vec<u8>],
) -> Result<Vec<TrunkEntry>, SnapshotError> {
    if names.is_empty() {
        return Ok(trunk);
    }
    let mut oids = BTreeSet::new();
    let mut found = false;
    for entry in trunk.iter().filter(|entry| entry.oid.is_inode()) {
        let header = content.inode_header(entry)?;
        if !header.is_deleted() && !is_named(&header, names) {
            continue;
        }
        found |= !header.is_deleted();
        oids.insert(entry.oid);
        let inode = content.object(entry)?;
        let owners = table(&inode[TABLE_OFFSET..GREF_OFFSET]).iter().map(|owner| owner.get());
        let data = (0..).zip(owners).filter(|(_, owner)| *owner != 0);
        oids.extend(data.map(|(index, owner)| Oid::data(VdiId::new(owner), index)));
        let blocks = header.vm_state_size.div_ceil(header.block_size()).min(u32::MAX.into());
        oids.extend((0..blocks as u32).map(|index| Oid::vmstate(header.vdi_id, index)));
    }
    if !found {
        return Ok(Vec::new());
    }
    Ok(trunk.into_iter().filter(|entry| oids.contains(&entry.oid)).collect())
}

/// Formatting returns before all daemons serve.
async fn wait_until_ready(context: &Context) -> Outcome {
    let deadline = Instant::now() + READY_WITHIN;
    loop {
        let request = Request::new(Opcode::STAT_CLUSTER).length(EpochRecord::LEN);
        match success(context.session.ask(request).await) {
            Ok(_) => return Ok(()),
            Err(e) if Instant::now() > deadline => return Err(fail(SYSTEM, e)),
            Err(_) => tokio::time::sleep(POLL).await,
        }
    }
}

async fn load_objects(context: &Context, content: &Content, entries: &[TrunkEntry]) -> Outcome {
    let mut known = BTreeSet::new();
    // Every VDI is announced before any of its objects is written.
    for entry in entries {
        if known.insert(entry.oid.vid()) {
            announce(context, entry).await.map_err(|e| lost(entry.oid, e))?;
        }
    }
    let progress = Progress::new(entries.len() as u64, Unit::Count);
    let mut writes = stream::iter(entries)
        .map(|entry| async move {
            let data = content.object(entry).map_err(|e| {
                e.report();
                Failed::Transport
            });
            let mut write =
                Write::new(&InodeHeader::zeroed(), entry.oid, 0, data.map_err(|e| (entry.oid, e))?);
            (write.copies, write.policy) = (entry.copies, entry.copy_policy);
            write.creating().send(&context.session).await.map_err(|e| (entry.oid, e))
        })
        .buffered(WRITE_AHEAD);
    let mut done = 0;
    while let Some(result) = writes.next().await {
        result.map_err(|(oid, e)| {
            report_write(oid, e);
            lost(oid, e)
        })?;
        done += 1;
        progress.show(done);
    }
    Ok(())
}

fn lost(oid: Oid, _why: Failed) -> Stop {
    fail(SYSTEM, format_args!("Fail to load object, oid {oid}"))
}

async fn announce(context: &Context, entry: &TrunkEntry) -> Result<(), Failed> {
    let body = VdiStateRequest {
        new_vid: entry.oid.vid(),
        copies: entry.copies,
        copy_policy: entry.copy_policy,
        block_size_shift: entry.block_size_shift,
        set_bitmap: 1,
        ..VdiStateRequest::zeroed()
    };
    success(context.session.ask(Request::new(Opcode::NOTIFY_VDI_ADD).with_vdi_state(body)).await).map(drop)
}

/// Gives every VDI a working VDI on top of its last snapshot.
async fn make_working_vdis(context: &Context, content: &Content, entries: &[TrunkEntry]) -> Outcome {
    let mut last: BTreeMap<Vec<u8>, InodeHeader> = BTreeMap::new();
    for entry in entries.iter().filter(|entry| entry.oid.is_inode()) {
        let header = content.inode_header(entry).map_err(|e| failed(e, FAIL))?;
        if header.is_deleted() {
            continue;
        }
        let known = last.entry(header.name().to_vec()).or_insert(header);
        if header.snap_id > known.snap_id {
            *known = header;
        }
    }
    for (name, header) in last {
        new_vdi(&context.session, &name, like(&header, header.vdi_id, 0)).await?;
    }
    Ok(())
}
