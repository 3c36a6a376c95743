//! `dog vdi import` (our addition): creates an image from a file, standard input or a web server.
//!
//! Blocks of zeros are not written, several others at a time. The image exists from the beginning, as long as the
//! source or, while that is not known, as long as an image can be; one that could not be completed is deleted again.

use std::io;

use futures_util::{StreamExt, stream};
use sheepdog_proto::header::VdiRequest;
use sheepdog_proto::inode::{STORE_POLICY_BTREE, STORE_POLICY_FLAT};
use sheepdog_proto::{CopyPolicy, Flags, MAX_DATA_OBJS, Oid, VdiId};

use crate::args::ImageFormat;
use crate::context::Context;
use crate::exit::{FAILURE, Outcome, SYSTEM, Stop, fail};
use crate::inode::{Inode, InodeHeader, Part, enter_block, enter_flat};
use crate::numbers::human_size;
use crate::objects::{Write, new_vdi, report_write};
use crate::out::{self, errno_text};
use crate::session::{Failed, Session};
use crate::terminal::{Progress, Unit};
use crate::vdi::create::{HYPER_SHIFT, MAX_HYPER_SIZE, check_size, default_shift};
use crate::vdi::import_source::{Item, Source};
use crate::vdi::{ahead, delete, qemu_img, resize};

/// Objects written at the same time.
const WRITE_AHEAD: usize = 8;
/// Status after Ctrl-C, as shells report it.
const INTERRUPTED: i32 = 130;

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let name = context.name()?;
    if name.is_empty() {
        return Err(fail(Stop::Usage, "The VDI name must not be empty"));
    }
    let Some(word) = context.arg(1) else {
        return Err(fail(Stop::Usage, "Please specify the file to import"));
    };
    let source = Source::open(word)?;
    let qcow2 = match context.options.format {
        Some(format) => format == ImageFormat::Qcow2,
        None => source.is_qcow2(),
    };
    if !qcow2 {
        let size = source.size();
        let vid = create(context, name, size).await?;
        return complete(context, name, fill(context, vid, source)).await;
    }
    let (path, temporary) = source.into_file()?;
    let size = qemu_img::virtual_size(&path)?;
    create(context, name, Some(size)).await?;
    let outcome = complete(context, name, qemu_img::import(context, name, &path)).await;
    drop(temporary);
    outcome
}

/// Creates the image; without a size the largest there can be.
async fn create(context: &Context, name: &[u8], size: Option<u64>) -> Result<VdiId, Stop> {
    let options = &context.options;
    let shift = if options.hyper { Some(HYPER_SHIFT) } else { options.shift };
    let actual_shift = match shift {
        Some(shift) => shift,
        None => default_shift(&context.session, name).await?,
    };
    let largest = if options.hyper { MAX_HYPER_SIZE } else { (MAX_DATA_OBJS as u64) << actual_shift };
    let size = size.unwrap_or(largest);
    check_size(size, actual_shift, options.hyper)?;
    let (copies, policy) = options.copies.unwrap_or((0, CopyPolicy::REPLICATED));
    let body = VdiRequest {
        vdi_size: size,
        copies,
        copy_policy: policy.to_byte(),
        store_policy: if options.hyper { STORE_POLICY_BTREE } else { STORE_POLICY_FLAT },
        block_size_shift: shift.unwrap_or(0),
        ..Default::default()
    };
    new_vdi(&context.session, name, body).await
}

/// Waits for the import, or Ctrl-C; what was not completed is deleted.
async fn complete(context: &Context, name: &[u8], work: impl Future<Output = Outcome>) -> Outcome {
    let outcome = tokio::select! {
        outcome = work => outcome,
        _ = tokio::signal::ctrl_c() => Err(fail(Stop::Code(INTERRUPTED), "interrupted")),
    };
    if outcome.is_err() {
        delete::delete(&context.session, name, None, &context.options).await;
    }
    outcome
}

/// Why a block was not written.
enum Problem {
    Input(io::Error),
    Object(Oid, Failed),
}

impl Problem {
    fn report(self) -> Stop {
        match self {
            Problem::Input(e) => fail(SYSTEM, format_args!("Failed to read the image: {}", errno_text(&e))),
            Problem::Object(oid, e) => {
                report_write(oid, e);
                fail(FAILURE, "Failed to write VDI")
            }
        }
    }
}

/// What became of an item.
enum Done {
    Written(u32),
    End(u64),
}

async fn fill(context: &Context, vid: VdiId, source: Source) -> Outcome {
    let session = &context.session;
    let mut inode = Inode::read(session, vid, &Part::Map).await.map_err(|e| {
        e.report();
        fail(FAILURE, "Failed to read a newly created VDI object")
    })?;
    let (header, hyper) = (inode.header, inode.is_hyper());
    let (known, block_size) = (source.size(), header.block_size());
    let progress = known.map(|size| Progress::new(size, Unit::Bytes));
    let input = source.read(block_size as usize, ahead(WRITE_AHEAD / 2, block_size));
    let items = stream::unfold(input, |mut input| async { input.recv().await.map(|item| (item, input)) });
    let done = items.map(|item| write(session, &header, hyper, item));
    let mut done = std::pin::pin!(done.buffered(ahead(WRITE_AHEAD, block_size)));
    while let Some(result) = done.next().await {
        match result.map_err(Problem::report)? {
            Done::Written(index) => {
                if hyper {
                    enter_block(session, &mut inode, index, Flags::DIRECT).await?;
                }
                let reached = (u64::from(index) + 1) * block_size;
                match &progress {
                    Some(progress) => progress.show(reached.min(known.unwrap_or(reached))),
                    None => show_amount(reached),
                }
            }
            Done::End(size) => {
                if let Some(progress) = &progress {
                    progress.show(size);
                    return Ok(());
                }
                show_end();
                return resize::set_size(session, &header, size).await;
            }
        }
    }
    Err(fail(SYSTEM, "Failed to read the image: the reader ended"))
}

/// Creates the block's object and enters it in a flat map; a tree is changed by the caller, in order.
async fn write(
    session: &Session,
    header: &InodeHeader,
    hyper: bool,
    item: io::Result<Item>,
) -> Result<Done, Problem> {
    let (index, data) = match item.map_err(Problem::Input)? {
        Item::Block(index, data) => (index, data),
        Item::End(size) => return Ok(Done::End(size)),
    };
    let oid = Oid::data(header.vdi_id, index);
    let object = Write::new(header, oid, 0, data).creating();
    object.send(session).await.map_err(|e| Problem::Object(oid, e))?;
    if !hyper {
        let entry = enter_flat(header, index, Flags::DIRECT);
        entry.send(session).await.map_err(|e| Problem::Object(Oid::inode(header.vdi_id), e))?;
    }
    Ok(Done::Written(index))
}

/// Progress towards an unknown end.
fn show_amount(bytes: u64) {
    if out::is_terminal() {
        out!("\r{:>10}", human_size(bytes));
    }
}

fn show_end() {
    if out::is_terminal() {
        out!("\n");
    }
}
