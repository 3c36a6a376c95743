//! `dog vdi resize` (spec 07, 9.5).

use sheepdog_proto::{MAX_DATA_OBJS, Oid};

use crate::args::size_operand;
use crate::context::Context;
use crate::exit::{FAILURE, Outcome, Stop, fail};
use crate::inode::{InodeHeader, Part, open};
use crate::objects::Write;
use crate::session::Session;
use crate::vdi::create::MAX_HYPER_SIZE;

/// Offset of the size in an inode.
const SIZE_OFFSET: u64 = 536;

/// Runs the command. Only the size is written, so that other changes of the header are not undone.
pub async fn run(context: &Context) -> Outcome {
    let name = context.name()?;
    let Some(size) = context.arg(1) else {
        return Err(fail(Stop::Usage, "Please specify the new size for the VDI"));
    };
    let size = size_operand(size)?;
    let inode = open(&context.session, name, None, Part::Header).await?;
    let header = &inode.header;
    let limit = header.block_size() * MAX_DATA_OBJS as u64;
    if inode.is_hyper() && size > MAX_HYPER_SIZE {
        let text = format!("New VDI size is too large This volume's max size is {MAX_HYPER_SIZE}");
        return Err(fail(Stop::Usage, text));
    }
    if !inode.is_hyper() && size > limit {
        let text = format!("New VDI size is too large. This volume's max size is {limit}");
        return Err(fail(Stop::Usage, text));
    }
    if size < header.vdi_size {
        return Err(fail(Stop::Usage, "Shrinking VDIs is not implemented"));
    }
    set_size(&context.session, header, size).await
}

/// Writes the size into an inode; failures are reported.
pub async fn set_size(session: &Session, header: &InodeHeader, size: u64) -> Outcome {
    let write = Write::new(header, Oid::inode(header.vdi_id), SIZE_OFFSET, size.to_le_bytes().to_vec());
    let written = write.send_or_report(session).await;
    written.map_err(|_| fail(FAILURE, "Failed to update an inode header"))
}
