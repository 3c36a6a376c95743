//! `dog vdi lock list` and `unlock` (spec 07, 10.4).

use std::collections::BTreeMap;

use futures_util::StreamExt;
use serde_json::{Value, json};
use sheepdog_proto::header::VdiRequest;
use sheepdog_proto::vdi_state::{
    LOCKED, PART_INVALIDATED, PART_MODIFIED, PART_SHARED, SHARED, UNLOCKED, VdiState,
};
use sheepdog_proto::{MAX_COPIES, NodeId, Opcode, Request, ResultCode, VdiId, Wire};

use crate::args::Snapshot;
use crate::context::Context;
use crate::exit::{FAILURE, Outcome, SYSTEM, Stop, fail};
use crate::inode::Part;
use crate::json;
use crate::objects::lookup;
use crate::out::{self, text};
use crate::session::Session;
use crate::vdi::{kind, pad_right};
use crate::walk::walk;

/// Records asked for first.
const FIRST_RECORDS: usize = 512;
/// Most records ever asked for: one for every VDI id.
const MAX_RECORDS: usize = sheepdog_proto::NR_VDIS;
/// Lock types of RELEASE_VDI.
const NORMAL_LOCK: u32 = 0;
const SHARED_LOCK: u32 = 1;

/// The state table, by id. Failures are reported.
pub async fn states(session: &Session) -> Result<BTreeMap<VdiId, VdiState>, Stop> {
    let mut records = FIRST_RECORDS;
    loop {
        let request = Request::new(Opcode::GET_VDI_COPIES).length(records * VdiState::LEN);
        match session.ask(request).await {
            Ok(reply) if reply.response.result == ResultCode::SUCCESS => {
                let states = reply.data.chunks_exact(VdiState::LEN).map(VdiState::get);
                return Ok(states.map(|state| (state.vid, state)).collect());
            }
            Ok(reply) if reply.response.result == ResultCode::BUFFER_SMALL && records < MAX_RECORDS / 8 => {
                records *= 2;
            }
            _ => return Err(fail(SYSTEM, "Failed to get VDI state")),
        }
    }
}

/// Runs `lock list`.
pub async fn list(context: &Context) -> Outcome {
    let states = states(&context.session).await?;
    let as_json = context.options.json;
    let mut rows = Vec::new();
    if !as_json {
        out!("  Name         Id  VDI id  Tag            Owner node(s)\n");
    }
    let mut inodes = walk(&context.session, Part::Header).await?;
    while let Some(inode) = inodes.next().await {
        let Some(state) = states.get(&inode.vid()).filter(|s| s.lock_state != UNLOCKED) else { continue };
        if as_json {
            rows.push(json::with(json::vdi(&inode), lock_fields(state)));
            continue;
        }
        let header = &inode.header;
        let head = format!("{} ", kind(header, ' '));
        let middle = format!("  {:5}  {:6x}  ", inode.shown_id(), inode.vid().get());
        let (name, tag) = (pad_right(header.name(), 8), pad_right(header.tag(), 13));
        let end = format!(" {}\n", owners(state));
        out::write(&[head.as_bytes(), &name, middle.as_bytes(), &tag, end.as_bytes()].concat());
    }
    if as_json {
        json::print(&json!({ "locks": rows }));
    }
    Ok(())
}

/// Kind and owners of a lock.
pub fn lock_fields(state: &VdiState) -> Value {
    let (kind, owners) = match state.lock_state {
        LOCKED => ("exclusive", vec![json!({ "address": state.lock_owner.to_string(), "state": "locked" })]),
        SHARED => {
            let owner = |(node, part): (&NodeId, u32)| {
                let state = participant_state(part);
                json!({ "address": node.to_string(), "state": state.trim_matches(['(', ')']) })
            };
            ("shared", participants(state).map(owner).collect())
        }
        _ => ("unknown", Vec::new()),
    };
    json!({ "lock": kind, "owners": owners })
}

fn participants(state: &VdiState) -> impl Iterator<Item = (&NodeId, u32)> {
    let count = (state.nr_participants as usize).min(MAX_COPIES);
    state.participants.iter().zip(state.participants_state).take(count)
}

/// The nodes through which a VDI is in use.
pub fn lock_owners(state: &VdiState) -> Vec<NodeId> {
    match state.lock_state {
        LOCKED => vec![state.lock_owner],
        SHARED => participants(state).map(|(node, _)| *node).collect(),
        _ => Vec::new(),
    }
}

/// The owners, each with a blank before it.
fn owners(state: &VdiState) -> String {
    match state.lock_state {
        LOCKED => format!(" {}", state.lock_owner),
        SHARED => {
            participants(state).map(|(node, part)| format!(" {node}{}", participant_state(part))).collect()
        }
        _ => String::new(),
    }
}

fn participant_state(state: u32) -> String {
    match state {
        PART_MODIFIED => "(modified)".into(),
        PART_SHARED => "(shared)".into(),
        PART_INVALIDATED => "(invalidated)".into(),
        other => format!("(UNKNOWN {other}, BUG!)"),
    }
}

/// Runs `lock unlock`.
pub async fn unlock(context: &Context) -> Outcome {
    let name = context.name()?;
    let snapshot = context.options.snapshot.as_ref();
    let vid = lookup(&context.session, name, snapshot).await.map_err(|e| {
        fail(FAILURE, format_args!("Failed to find VDI {}: {e}", describe(name, snapshot, None)))
    })?;
    let what = describe(name, snapshot, Some(vid));
    let states = states(&context.session).await?;
    let Some(state) = states.get(&vid) else {
        return Err(fail(SYSTEM, format_args!("Failed to find VDI state {what}")));
    };
    let lock_type = match state.lock_state {
        LOCKED => NORMAL_LOCK,
        SHARED => SHARED_LOCK,
        UNLOCKED => return Err(fail(FAILURE, format_args!("VDI {what} is not locked"))),
        other => return Err(fail(SYSTEM, format_args!("VDI {what} unknown lock state ({other})"))),
    };
    let body = VdiRequest { base_vdi_id: vid, lock_type, ..VdiRequest::zeroed() };
    // The result is not looked at: releasing a lock that this node does not take part in changes nothing.
    context.session.ask(Request::new(Opcode::RELEASE_VDI).with_vdi(body)).await.map_err(|_| FAILURE)?;
    Ok(())
}

/// `<name>`, `<name> (snapid=1)`, `<name> (tag=x, vid=910c72)`, ...
fn describe(name: &[u8], snapshot: Option<&Snapshot>, vid: Option<VdiId>) -> String {
    let mut details = Vec::new();
    match snapshot {
        Some(Snapshot::Id(id)) => details.push(format!("snapid={id}")),
        Some(Snapshot::Tag(tag)) => details.push(format!("tag={}", text(tag))),
        None => {}
    }
    details.extend(vid.map(|vid| format!("vid={vid}")));
    let name = text(name);
    if details.is_empty() { name.into_owned() } else { format!("{name} ({})", details.join(", ")) }
}
