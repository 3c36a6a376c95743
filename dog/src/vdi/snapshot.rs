//! `dog vdi snapshot` (spec 07, 9.2).

use sheepdog_proto::inode::INODE_HEADER_LEN;
use sheepdog_proto::{MAX_NAME_LEN, Oid, ResultCode, fixed_str};

use crate::args::Snapshot;
use crate::context::Context;
use crate::exit::{FAILURE, Outcome, Stop, fail};
use crate::inode::{Inode, Part, open, read_named};
use crate::objects::{Write, like, lookup, new_vdi};
use crate::out::{self, text};
use crate::session::Failed;

/// Offset of the tag in an inode.
const TAG_OFFSET: u64 = 256;

const _: () = assert!(TAG_OFFSET as usize + MAX_NAME_LEN <= INODE_HEADER_LEN);

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let name = context.name()?;
    let tag = match &context.options.snapshot {
        Some(Snapshot::Id(_)) => {
            return Err(fail(Stop::Usage, "Please specify a non-integer value for a snapshot tag name"));
        }
        Some(Snapshot::Tag(tag)) => tag.clone(),
        None => Vec::new(),
    };
    let inode = working_vdi(context, name, &tag).await?;
    if inode.is_hyper() && !context.options.hyper {
        return Err(fail(FAILURE, "creating a snapshot of hypervolume is not supported"));
    }
    if context.options.reduce && !owns_objects(context, &inode, name).await? {
        if context.options.verbose {
            let name = text(name);
            out::log(format_args!("VDI {name} doesn't have its own objects, skipping creation of snapshot"));
        }
        return Ok(());
    }
    write_tag(context, &inode, &tag).await.map_err(raw_status)?;
    let body = like(&inode.header, inode.vid(), 1);
    let new = match new_vdi(&context.session, name, body).await {
        Ok(vid) => vid,
        Err(stop) => {
            if stop == FAILURE {
                undo_tag(context, &inode).await;
            }
            return Err(stop);
        }
    };
    let old = inode.vid();
    if context.options.verbose && context.options.raw {
        out!("{new} {old}\n");
    } else if context.options.verbose {
        out!("new VID of original VDI: {new}, VDI ID of newly created snapshot: {old}\n");
    }
    Ok(())
}

/// The working VDI must not keep the tag of a snapshot that was refused. One that was taken keeps it: then the inode
/// says so, or there was no answer.
async fn undo_tag(context: &Context, inode: &Inode) {
    let name = inode.header.name();
    if let Ok(now) = read_named(&context.session, inode.vid(), name, None, Part::Header).await
        && !now.header.is_snapshot()
    {
        let _ = write_tag(context, inode, inode.header.tag()).await; // the refusal is what is reported
    }
}

/// The working VDI, after making sure that the tag is free.
async fn working_vdi(context: &Context, name: &[u8], tag: &[u8]) -> Result<Inode, Stop> {
    let session = &context.session;
    let wanted = (!tag.is_empty()).then(|| Snapshot::Tag(tag.to_vec()));
    match lookup(session, name, wanted.as_ref()).await {
        Ok(vid) => {
            let inode = read_named(session, vid, name, wanted.as_ref(), Part::Header).await?;
            if !inode.header.is_snapshot() {
                return Ok(inode);
            }
            let (name, tag) = (text(name), text(tag));
            Err(fail(
                FAILURE,
                format_args!(
                    "Failed to create snapshot for {name}, maybe snapshot id (0) or tag ({tag}) is existed"
                ),
            ))
        }
        Err(Failed::Refused(ResultCode::NO_TAG)) => open(session, name, None, Part::Header).await,
        Err(e) => Err(fail(FAILURE, format_args!("Failed to create snapshot for {}: {e}", text(name)))),
    }
}

async fn owns_objects(context: &Context, inode: &Inode, name: &[u8]) -> Result<bool, Stop> {
    let whole = read_named(&context.session, inode.vid(), name, None, Part::Map).await?;
    Ok(whole.map.allocated().any(|(_, owner)| owner == inode.vid()))
}

async fn write_tag(context: &Context, inode: &Inode, tag: &[u8]) -> Result<(), Failed> {
    let field = fixed_str::<MAX_NAME_LEN>(tag).to_vec();
    let mut write = Write::new(&inode.header, Oid::inode(inode.vid()), TAG_OFFSET, field);
    write.flags = sheepdog_proto::Flags::NONE;
    write.send_or_report(&context.session).await
}

/// The original hands the raw result on as status.
fn raw_status(error: Failed) -> Stop {
    Stop::Code((error.code().0 & 0xff) as i32)
}
