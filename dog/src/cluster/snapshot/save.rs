//! `dog cluster snapshot save` (spec 07, 15.5).

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use futures_util::{StreamExt, stream};
use sheepdog_proto::cluster::{CLUSTER_INFO_LEN, ClusterInfoHeader};
use sheepdog_proto::{Flags, MAX_NAME_LEN, Oid, Opcode, Request, Wire, cstr, fixed_str};

use super::content::{Content, SnapshotError, TrunkEntry};
use super::log::{Log, LogHeader, Record};
use super::{is_named, object_len};
use crate::context::Context;
use crate::exit::{Outcome, SYSTEM, Stop, fail};
use crate::inode::{InodeHeader, Part};
use crate::numbers::parse_long;
use crate::objects::{read, report_read};
use crate::out::{self, text};
use crate::session::{Failed, success};
use crate::terminal::{Progress, Unit};
use crate::walk::walk_all;

/// Objects read, hashed and written at the same time with `-m`, each by a thread; one without.
const AT_ONCE: usize = 8;

/// Why nothing was saved; the reason has been printed.
struct NotSaved;

impl From<SnapshotError> for NotSaved {
    fn from(error: SnapshotError) -> NotSaved {
        error.report();
        NotSaved
    }
}

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let tag = context.name()?;
    if parse_long(tag, 10).1 > 0 {
        return Err(fail(Stop::Usage, "Tag should not start with number."));
    }
    let Some(path) = context.arg(1) else {
        return Err(fail(Stop::Usage, "Please specify the path to save snapshot."));
    };
    save(context, tag, path)
        .await
        .map_err(|NotSaved| fail(SYSTEM, format_args!("Fail to save snapshot to path: {}.", text(path))))
}

async fn save(context: &Context, tag: &[u8], path: &[u8]) -> Result<(), NotSaved> {
    let content = Content::open(path)?;
    let log = Log::read(&content)?;
    let tag = fixed_str::<MAX_NAME_LEN>(tag);
    if log.records.iter().any(|record| cstr(&record.tag) == cstr(&tag)) {
        out::log("Snapshot tag has already been used for another snapshot, please, use another one.");
        return Err(NotSaved);
    }
    let objects = collect(context).await?;
    let header = match log.header {
        Some(header) => header,
        None => cluster_defaults(context).await?,
    };
    let entries = save_objects(context, &content, objects).await?;
    let record = Record {
        index: log.records.len() as u32 + 1,
        tag,
        time: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        trunk: content.put_trunk(&entries)?,
    };
    Ok(log.append(&content, header, &record)?)
}

/// The objects of all snapshots, or of those of the named VDIs, each once.
async fn collect(context: &Context) -> Result<BTreeMap<Oid, TrunkEntry>, NotSaved> {
    let names = &context.args[2..];
    let mut objects = BTreeMap::new();
    let mut named_snapshots = 0;
    let mut inodes = walk_all(&context.session, Part::Map).await.map_err(|_| NotSaved)?;
    while let Some(inode) = inodes.next().await {
        let header = &inode.header;
        if !header.is_snapshot() || !(names.is_empty() || is_named(header, names)) {
            continue;
        }
        named_snapshots += usize::from(!header.is_deleted());
        let data = inode.map.allocated().map(|(index, owner)| Oid::data(owner, index));
        let all = std::iter::once(Oid::inode(inode.vid())).chain(data).chain(vm_state(header));
        objects.extend(all.map(|oid| (oid, entry(oid, header))));
    }
    if named_snapshots > 0 {
        return Ok(objects);
    }
    out::log("Cannot execute. It may be caused by:");
    if names.is_empty() {
        out::log("1. The cluster is empty.");
        out::log("2. All VDIs of the cluster don't have snapshots.");
    } else {
        out::log("1. The specified VDIs are not found.");
        out::log("2. The specified VDIs don't have snapshots.");
    }
    Err(NotSaved)
}

fn vm_state(header: &InodeHeader) -> impl Iterator<Item = Oid> {
    let vid = header.vdi_id;
    let count = header.vm_state_size.div_ceil(header.block_size()).min(u32::MAX.into());
    (0..count as u32).map(move |index| Oid::vmstate(vid, index))
}

fn entry(oid: Oid, header: &InodeHeader) -> TrunkEntry {
    TrunkEntry {
        oid,
        copies: header.nr_copies,
        copy_policy: header.copy_policy,
        block_size_shift: header.block_size_shift,
        ..TrunkEntry::zeroed()
    }
}

async fn cluster_defaults(context: &Context) -> Result<LogHeader, NotSaved> {
    let request = Request::new(Opcode::CLUSTER_INFO).length(CLUSTER_INFO_LEN);
    let failed = |why: &dyn std::fmt::Display| {
        out::log(format_args!("Fail to execute request: {why}"));
        NotSaved
    };
    let reply = success(context.session.ask(request).await).map_err(|e| failed(&e))?;
    let info = ClusterInfoHeader::decode(&reply.data).map_err(|e| failed(&e))?;
    Ok(LogHeader::of_cluster(info.nr_copies, info.copy_policy, info.block_size_shift))
}

/// Copies every object into the directory; one that cannot be read fails the snapshot.
async fn save_objects(
    context: &Context,
    content: &Content,
    objects: BTreeMap<Oid, TrunkEntry>,
) -> Result<Vec<TrunkEntry>, NotSaved> {
    let progress = Progress::new(objects.len() as u64, Unit::Count);
    let at_once = if context.options.multithread { AT_ONCE } else { 1 };
    let mut objects = stream::iter(objects.into_values())
        .map(|entry| async move { save_object(context, content, entry).await.map_err(|e| (entry.oid, e)) })
        .buffered(at_once);
    let mut saved = Vec::new();
    while let Some(result) = objects.next().await {
        saved.push(result.map_err(|(oid, e)| {
            match e {
                Unsaved::Read(e) => report_read(oid, e),
                Unsaved::Write(e) => e.report(),
            }
            out::log(format_args!("Fail to save object, oid {oid}"));
            NotSaved
        })?);
        progress.show(saved.len() as u64);
    }
    Ok(saved)
}

/// Why an object was not saved.
enum Unsaved {
    Read(Failed),
    Write(SnapshotError),
}

/// Copies one object. Hashing and writing are a thread's: they take longer than reading.
async fn save_object(context: &Context, content: &Content, entry: TrunkEntry) -> Result<TrunkEntry, Unsaved> {
    let length = object_len(entry.oid, entry.block_size_shift);
    let data = read(&context.session, entry.oid, 0, length, Flags::DIRECT).await.map_err(Unsaved::Read)?;
    let content = content.clone();
    let put = tokio::task::spawn_blocking(move || content.put_object(&data)).await;
    let slices = put.expect("a panic ends the process").map_err(Unsaved::Write)?;
    Ok(TrunkEntry { slices, ..entry })
}
