//! `dog vm list`, which the first guides show (spec 07, section 18): the working VDIs, and where each is in use.
//!
//! The original dropped it; `dog vdi lock list` is what it has today. The text is that of the guides.

use futures_util::StreamExt;
use serde_json::json;
use sheepdog_proto::NodeId;
use sheepdog_proto::vdi_state::UNLOCKED;

use crate::context::Context;
use crate::exit::Outcome;
use crate::inode::{Inode, Part};
use crate::numbers::human_size;
use crate::vdi::list::usage;
use crate::vdi::lock::{lock_fields, lock_owners, states};
use crate::vdi::pad_right;
use crate::walk::walk;
use crate::{json, out};

const HEADING: &str = "\
Name            |Vdi size |Allocated| Shared  | Status
----------------+---------+---------+---------+------------
";

/// Runs the command.
pub async fn list(context: &Context) -> Outcome {
    let states = states(&context.session).await?;
    let as_json = context.options.json;
    if !as_json {
        out::write(HEADING.as_bytes());
    }
    let highlight = out::is_terminal();
    let mut rows = Vec::new();
    let mut inodes = walk(&context.session, Part::Map).await?;
    while let Some(inode) = inodes.next().await {
        if inode.header.is_snapshot() {
            continue;
        }
        let lock = states.get(&inode.vid()).filter(|state| state.lock_state != UNLOCKED);
        if as_json {
            let (own, shared) = usage(&inode);
            let mut fields = json::vdi(&inode);
            fields.extend([("used".into(), own.into()), ("shared".into(), shared.into())]);
            let lock = lock.map_or_else(|| json!({ "lock": null, "owners": [] }), lock_fields);
            rows.push(json::with(fields, lock));
        } else {
            out::write(&row(&inode, lock.map(lock_owners).as_deref(), highlight));
        }
    }
    if as_json {
        json::print(&json!({ "vms": rows }));
    }
    Ok(())
}

/// A row; in bold if the VDI is in use.
fn row(inode: &Inode, owners: Option<&[NodeId]>, highlight: bool) -> Vec<u8> {
    let (own, shared) = usage(inode);
    let status = owners.map_or_else(
        || "not running".to_owned(),
        |owners| {
            let hosts: Vec<String> =
                owners.iter().map(|node| NodeId { port: 0, ..*node }.host_port()).collect();
            format!("running on {}", hosts.join(", "))
        },
    );
    let sizes = [inode.header.vdi_size, own, shared].map(|bytes| format!("{:>9}", human_size(bytes)));
    let (bold, normal) = if highlight && owners.is_some() { ("\x1b[1m", "\x1b[0m") } else { ("", "") };
    let name = pad_right(inode.header.name(), 16);
    let rest = format!("|{}| {status}{normal}\n", sizes.join("|"));
    [bold.as_bytes(), &name, rest.as_bytes()].concat()
}
