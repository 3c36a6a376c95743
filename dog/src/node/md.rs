//! `dog node md info|plug|unplug` (spec 07, 13.5).

use bytes::Bytes;
use sheepdog_proto::admin::{MD_INFO_LEN, decode_md_info};
use sheepdog_proto::{Flags, NodeId, Opcode, Request, cstr};

use crate::context::Context;
use crate::exit::{FAILURE, Outcome, SYSTEM, fail};
use crate::numbers::{human_size, percent};
use crate::out::{self};
use crate::session::{Failed, success};
use crate::terminal::confirm;

/// Runs `md info`.
pub async fn info(context: &Context) -> Outcome {
    let raw = context.options.raw;
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

async fn node_info(context: &Context, node: &NodeId) -> Outcome {
    let request = Request::new(Opcode::MD_INFO).length(MD_INFO_LEN);
    let failed = |why: &dyn std::fmt::Display| {
        fail(FAILURE, format_args!("failed to get multi-disk information: {why}"))
    };
    let reply = success(context.session.send(node, request, Bytes::new()).await).map_err(|e| failed(&e))?;
    for disk in decode_md_info(&reply.data).map_err(|e| failed(&e))? {
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
