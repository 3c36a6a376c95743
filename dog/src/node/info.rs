//! `dog node info` (spec 07, 13.2).

use futures_util::StreamExt;
use serde_json::json;
use sheepdog_proto::{Opcode, Request};

use crate::context::Context;
use crate::exit::{Outcome, SYSTEM, Stop, fail};
use crate::inode::Part;
use crate::json;
use crate::numbers::{human_size, percent};
use crate::walk::walk;

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let raw = context.options.raw;
    let size = |bytes: u64| if raw { bytes.to_string() } else { human_size(bytes) };
    if context.options.json {
        return as_json(context).await;
    }
    if !raw {
        out!("Id\tSize\tUsed\tAvail\tUse%\n");
    }
    let (mut answers, mut total, mut free) = (0, 0u64, 0u64);
    for node in &context.cluster.nodes {
        // Nodes that do not answer are left out and take no id.
        let Ok(reply) = context.session.light(&node.nid, Request::new(Opcode::STAT_SHEEP)).await else {
            continue;
        };
        let space = reply.response.node();
        let used = space.store_size.saturating_sub(space.store_free);
        let use_percent = percent(used, space.store_size);
        let (all, used, avail) = (size(space.store_size), size(used), size(space.store_free));
        if raw {
            out!("{answers} {all} {used} {avail} {use_percent}%\n");
        } else {
            out!("{answers:2}\t{all}\t{used}\t{avail}\t{use_percent:3}%\n");
        }
        answers += 1;
        total = total.saturating_add(space.store_size);
        free = free.saturating_add(space.store_free);
    }
    if answers == 0 {
        return Err(fail(SYSTEM, "Cannot get information from any nodes"));
    }
    let virtual_size = virtual_size(context).await?;
    let used = total.saturating_sub(free);
    let use_percent = percent(used, total);
    let (all, used, avail, images) = (size(total), size(used), size(free), size(virtual_size));
    if raw {
        out!("Total {all} {used} {avail} {use_percent}% {images}\n");
    } else {
        out!("Total\t{all}\t{used}\t{avail}\t{use_percent:3}%\n\nTotal virtual image size\t{images}\n");
    }
    Ok(())
}

/// The sizes of all working VDIs together.
async fn virtual_size(context: &Context) -> Result<u64, Stop> {
    let mut inodes = walk(&context.session, Part::Header).await?;
    let mut sum = 0u64;
    while let Some(inode) = inodes.next().await {
        if !inode.header.is_snapshot() {
            sum = sum.saturating_add(inode.header.vdi_size);
        }
    }
    Ok(sum)
}

/// Nodes that do not answer are left out; the others keep their ids.
async fn as_json(context: &Context) -> Outcome {
    let mut nodes = Vec::new();
    let (mut total, mut free) = (0u64, 0u64);
    for (id, node) in context.cluster.nodes.iter().enumerate() {
        let reply = context.session.light(&node.nid, Request::new(Opcode::STAT_SHEEP)).await;
        let Ok(space) = reply.map(|reply| reply.response.node()) else { continue };
        nodes.push(json::with(json::node(id, node), json::space(space.store_size, space.store_free)));
        total = total.saturating_add(space.store_size);
        free = free.saturating_add(space.store_free);
    }
    if nodes.is_empty() {
        return Err(fail(SYSTEM, "Cannot get information from any nodes"));
    }
    let virtual_size = virtual_size(context).await?;
    json::print(&json!({ "nodes": nodes, "total": json::space(total, free), "virtual_size": virtual_size }));
    Ok(())
}
