//! `dog vdi alter-copy` (spec 07, 11.6).

use futures_util::StreamExt;
use sheepdog_proto::header::VdiStateRequest;
use sheepdog_proto::{CopyPolicy, Oid, Opcode, Request};

use crate::context::Context;
use crate::exit::{FAILURE, Outcome, Stop, fail};
use crate::inode::{Inode, Part, open};
use crate::objects::Write;
use crate::out;
use crate::session::success;
use crate::terminal::confirm;
use crate::vdi::name_text;
use crate::walk::walk;

/// Copies set where `-c` is absent.
pub const DEFAULT_COPIES: u8 = 3;
/// Offset of policy, store policy, copies and block size shift in an inode: four bytes that change together or not.
const REDUNDANCY_OFFSET: u64 = 552;

/// The copies asked for; erasure coding is a usage error.
pub fn wanted_copies(context: &Context, what: &str) -> Result<u8, Stop> {
    match context.options.copies {
        Some((_, policy)) if policy != CopyPolicy::REPLICATED => {
            Err(fail(Stop::Usage, "Changing redundancy level of erasure coded vdi is not supported yet."))
        }
        Some((copies, _)) => Ok(copies),
        None => {
            out!("The {what}'s redundancy level is not specified, use {DEFAULT_COPIES} as default.\n");
            Ok(DEFAULT_COPIES)
        }
    }
}

/// Asks if there are more copies than nodes.
pub fn confirm_copies(context: &Context, copies: u8) -> Outcome {
    let nodes = context.cluster.nodes.len();
    if usize::from(copies) <= nodes || context.options.force {
        return Ok(());
    }
    confirm(&format!(
        "Number of copies ({copies}) is larger than number of nodes ({nodes}).\nAre you sure you want to continue? \
         [yes/no]: "
    ))
}

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let name = context.name()?;
    let copies = wanted_copies(context, "vdi")?;
    confirm_copies(context, copies)?;
    let inode = open(&context.session, name, None, Part::Header)
        .await
        .map_err(|_| fail(FAILURE, format_args!("Reading {}'s vdi object failure.", context.arg_text(0))))?;
    let old = inode.header.nr_copies;
    check_changeable(context, &inode, copies).await?;
    if !context.options.force {
        confirm(
            "    __\n   ()'`;\n   /\\|`  Caution! Changing VDI's redundancy level will affect\n  /  |   the VDI \
             itself only and trigger recovery.\n(/_)_|_  Are you sure you want to continue? [yes/no]: ",
        )?;
    }
    let name = name_text(&inode);
    if alter(context, &inode, copies).await.is_err() {
        return Err(fail(FAILURE, format_args!("Changing {name}'s redundancy level failure.")));
    }
    out::log(format_args!("{name}'s redundancy level is set to {copies}, the old one was {old}."));
    Ok(())
}

async fn check_changeable(context: &Context, inode: &Inode, copies: u8) -> Outcome {
    let name = name_text(inode);
    if inode.header.copy_policy != 0 {
        let text = format!("{name}'s copy policy is erasure code, changing it is not supported yet.");
        return Err(fail(FAILURE, text));
    }
    if inode.header.nr_copies == copies && !is_half_done(context, inode).await? {
        let text = format!("{name}'s redundancy level is already set to {copies}, nothing changed.");
        return Err(fail(FAILURE, text));
    }
    let mut standalone = inode.header.parent_vdi_id.is_none();
    let mut others = walk(&context.session, Part::Header).await?;
    while let Some(other) = others.next().await {
        standalone &= other.header.parent_vdi_id != inode.vid() || other.header.name() != inode.header.name();
    }
    if standalone {
        return Ok(());
    }
    out::log("Only standalone vdi supports changing redundancy level.");
    Err(fail(FAILURE, format_args!("Please clone {name} with -n (--no-share) option first.")))
}

/// Whether an earlier change stopped between its two steps: the inode says something else than the nodes do (spec 05, 19).
async fn is_half_done(context: &Context, inode: &Inode) -> Result<bool, Stop> {
    let states = super::lock::states(&context.session).await?;
    Ok(states.get(&inode.vid()).is_some_and(|state| state.nr_copies != inode.header.nr_copies))
}

/// Writes the inode with its old redundancy, then tells every node the new one.
async fn alter(context: &Context, inode: &Inode, copies: u8) -> Result<(), crate::session::Failed> {
    let header = &inode.header;
    let fields = vec![header.copy_policy, header.store_policy, copies, header.block_size_shift];
    let write = Write::new(header, Oid::inode(inode.vid()), REDUNDANCY_OFFSET, fields);
    write.send_or_report(&context.session).await?;
    let body = VdiStateRequest {
        new_vid: inode.vid(),
        copies,
        copy_policy: header.copy_policy,
        block_size_shift: header.block_size_shift,
        ..VdiStateRequest::zeroed()
    };
    let request = Request::new(Opcode::ALTER_VDI_COPY).with_vdi_state(body);
    success(context.session.ask(request).await).map(drop)
}
