//! `dog cluster snapshot save|list|show|load` (spec 07, section 15): complete copies of all snapshot VDIs in a
//! content-addressed directory on this machine.

mod content;
mod load;
mod log;
mod save;

use serde_json::json;
use sheepdog_proto::{ObjectKind, Oid, cstr};

use crate::context::Context;
use crate::exit::{Outcome, SYSTEM, Stop, fail};
use crate::inode::InodeHeader;
use crate::json;
use crate::numbers::{ctime, parse_long};
use crate::out::{self, text};

use content::{Content, SnapshotError};
use log::{Log, Record};

pub use load::run as load;
pub use save::run as save;

/// Prints why, then the command's own line; the status is 2.
fn failed(why: SnapshotError, line: impl std::fmt::Display) -> Stop {
    why.report();
    fail(SYSTEM, line)
}

/// Runs `snapshot list`.
pub async fn list(context: &Context) -> Outcome {
    let failed = |e| failed(e, "Fail to list snapshot.");
    let content = Content::open(context.name()?).map_err(failed)?;
    let log = Log::read(&content).map_err(failed)?;
    if context.options.json {
        let snapshot = |record: &Record| {
            let tag = text(cstr(&record.tag)).into_owned();
            let (index, time) = (record.index, record.time);
            json!({ "index": index, "tag": tag, "time": time })
        };
        json::print(&json!({ "snapshots": log.records.iter().map(snapshot).collect::<Vec<_>>() }));
        return Ok(());
    }
    out!("Index\t\tTag\t\tSnapshot Time\n");
    for record in &log.records {
        let time = ctime(record.time);
        out!("{}\t\t{}\t\t{time}\n", record.index, text(cstr(&record.tag)));
    }
    Ok(())
}

/// Runs `snapshot show`. The result goes to stderr.
pub async fn show(context: &Context) -> Outcome {
    let Some(path) = context.arg(1) else {
        return Err(fail(Stop::Usage, "Please specify the path to show snapshot."));
    };
    let failed = |e| failed(e, "Fail to show snapshot");
    let (content, _, record) = find(path, context.name()?).map_err(failed)?;
    let names = &context.args[2..];
    let mut number = 0;
    let mut rows = Vec::new();
    for entry in content.trunk(&record.trunk).map_err(failed)? {
        if entry.oid.kind() != ObjectKind::Inode {
            continue;
        }
        let header = content.inode_header(&entry).map_err(failed)?;
        if names.is_empty() || is_named(&header, names) {
            number += 1;
            let (name, tag) = (text(header.name()), text(header.tag()));
            if context.options.json {
                rows.push(json!({ "vdi_id": json::vid(header.vdi_id), "name": name, "tag": tag }));
                continue;
            }
            out::log(format_args!("{number}. VDI id: {}, name: {name}, tag: {tag}", header.vdi_id));
        }
    }
    if context.options.json {
        json::print(&json!({ "vdis": rows }));
    }
    Ok(())
}

/// Opens a directory and finds the snapshot that a word names: by its index or by its tag.
fn find(path: &[u8], word: &[u8]) -> Result<(Content, Log, Record), SnapshotError> {
    let content = Content::open(path)?;
    let log = Log::read(&content)?;
    let index = parse_long(word, 10).0;
    let found = log.records.iter().find(|r| i64::from(r.index) == index || cstr(&r.tag) == word);
    let record = *found.ok_or(SnapshotError::Unknown)?;
    Ok((content, log, record))
}

fn is_named(header: &InodeHeader, names: &[Vec<u8>]) -> bool {
    names.iter().any(|name| name == header.name())
}

/// Bytes of an object in a VDI with the given block size.
fn object_len(oid: Oid, block_size_shift: u8) -> usize {
    oid.size(block_size_shift) as usize
}
