//! `dog node md info|plug|unplug` (spec 07, 13.5).

use bytes::Bytes;
use serde_json::{Value, json};
use sheepdog_proto::admin::{MD_INFO_LEN, MdInfo, decode_md_info};
use sheepdog_proto::{Flags, NodeId, Opcode, Request, cstr};

use crate::context::Context;
use crate::exit::{FAILURE, Outcome, SYSTEM, Stop, fail};
use crate::json;
use crate::numbers::{human_size, percent};
use crate::out::{self, text};
use crate::session::{Failed, success};
use crate::terminal::confirm;

/// Runs `md info`.
pub async fn info(context: &Context) -> Outcome {
    let raw = context.options.raw;
    if context.options.json {
        return as_json(context).await;
    }
    if !raw {
        out!("Id\tSize\tUsed\tAvail\tUse%\tPath\n");
    }
    if !context.options.all {
        return node_info(context, &context.session.gateway()).await;
    }
    for (id, node) in context.cluster.nodes.iter().enumerate() {
        if !raw {
            out!("Node {id}:\n");
        }
        node_info(context, &node.nid).await?;
    }
    Ok(())
}

async fn as_json(context: &Context) -> Outcome {
    let gateway = context.session.gateway();
    let mut nodes = Vec::new();
    for (id, node) in context.cluster.nodes.iter().enumerate() {
        if context.options.all || node.nid == gateway {
            let disks = disks(context, &node.nid).await?;
            nodes.push(json::with(json::node(id, node), json!({ "disks": disks_json(&disks) })));
        }
    }
    if nodes.is_empty() {
        // The gateway was named by another of its addresses.
        let disks = disks(context, &gateway).await?;
        nodes.push(json!({ "id": null, "address": gateway.host_port(), "disks": disks_json(&disks) }));
    }
    json::print(&json!({ "nodes": nodes }));
    Ok(())
}

fn disks_json(disks: &[MdInfo]) -> Vec<Value> {
    let disk = |disk: &MdInfo| {
        let (free, used) = (disk.free, disk.used);
        json!({
            "id": disk.idx,
            "path": text(cstr(&disk.path)),
            "size": free.saturating_add(used),
            "used": used,
            "available": free,
        })
    };
    disks.iter().map(disk).collect()
}

async fn disks(context: &Context, node: &NodeId) -> Result<Vec<MdInfo>, Stop> {
    let request = Request::new(Opcode::MD_INFO).length(MD_INFO_LEN);
    let failed = |why: &dyn std::fmt::Display| {
        fail(FAILURE, format_args!("failed to get multi-disk information: {why}"))
    };
    let reply = success(context.session.send(node, request, Bytes::new()).await).map_err(|e| failed(&e))?;
    decode_md_info(&reply.data).map_err(|e| failed(&e))
}

async fn node_info(context: &Context, node: &NodeId) -> Outcome {
    for disk in disks(context, node).await? {
        let total = disk.free.saturating_add(disk.used);
        let use_percent = percent(disk.used, total);
        let line = if context.options.raw {
            let place = node.host_port();
            format!("{place} {} {total} {} {} {use_percent}% ", disk.idx, disk.used, disk.free)
        } else {
            let (total, used, free) = (human_size(total), human_size(disk.used), human_size(disk.free));
            format!("{:2}\t{total}\t{used}\t{free}\t{use_percent:3}%\t", disk.idx)
        };
        out::write(&[line.as_bytes(), cstr(&disk.path), b"\n"].concat());
    }
    Ok(())
}

/// Runs `md plug`.
pub async fn plug(context: &Context) -> Outcome {
    change(context, Opcode::MD_PLUG_DISKS, "The directories to be plugged will be purged.").await
}

/// Runs `md unplug`.
pub async fn unplug(context: &Context) -> Outcome {
    change(context, Opcode::MD_UNPLUG_DISKS, "Recovery will be triggered after unplugging.").await
}

async fn change(context: &Context, opcode: Opcode, caution: &str) -> Outcome {
    let disks = [context.name()?, b"\0"].concat();
    if !context.options.force {
        confirm(&format!(
            "    __\n   ()'`;\n   /\\|`\n  /  |   Caution! {caution}\n(/_)_|_  Are you sure you want to continue? \
             [yes/no]: "
        ))?;
    }
    let request = Request::new(opcode).flag(Flags::WRITE);
    success(context.session.tell(request, disks).await).map(drop).map_err(|e| match e {
        Failed::Transport => SYSTEM,
        Failed::Refused(_) => {
            fail(FAILURE, "Failed to execute request, look for sheep.log for more information")
        }
    })
}
