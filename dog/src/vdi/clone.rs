//! `dog vdi clone` (spec 07, 9.3).

use sheepdog_proto::VdiId;

use crate::context::Context;
use crate::exit::{Outcome, Stop, fail};
use crate::inode::{Part, open};
use crate::objects::{like, new_vdi};
use crate::out::{self};
use crate::vdi::create::{FillBlock, fill};

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let source = context.name()?;
    let options = &context.options;
    let Some(target) = context.arg(1) else {
        return Err(fail(Stop::Usage, "Destination VDI name must be specified"));
    };
    if target.is_empty() {
        return Err(fail(Stop::Usage, "The VDI name must not be empty"));
    }
    let Some(snapshot) = &options.snapshot else {
        out::log("Only snapshot VDIs can be cloned");
        return Err(fail(Stop::Usage, "Please specify the '-s' option"));
    };
    let session = &context.session;
    let copies_data = options.prealloc || options.no_share;
    let part = if copies_data { Part::Map } else { Part::Header };
    let inode = open(session, source, Some(snapshot), part).await?;
    let base = if options.no_share { VdiId::NONE } else { inode.vid() };
    let vid = new_vdi(session, target, like(&inode.header, base, 0)).await?;
    if copies_data {
        let clone =
            open(session, target, None, if inode.is_hyper() { Part::Map } else { Part::Header }).await?;
        let blocks = (0..inode.header.nr_blocks()).map(|index| {
            let block = match inode.block(index) {
                Some(oid) => FillBlock::CopyOf(oid),
                None if options.prealloc => FillBlock::Empty,
                None => FillBlock::Skip,
            };
            (index as u32, block)
        });
        fill(session, clone, blocks).await?;
    }
    if options.verbose && options.raw {
        out!("{vid}\n");
    } else if options.verbose {
        out!("VDI ID of newly created clone: {vid}\n");
    }
    Ok(())
}
