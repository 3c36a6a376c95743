//! `dog cluster check` (spec 07, 14.5): every VDI, one after the other.

use futures_util::StreamExt;

use crate::context::Context;
use crate::exit::Outcome;
use crate::inode::Part;
use crate::out::{self, text};
use crate::placement;
use crate::vdi::check::check_vdi;
use crate::walk::walk;

/// Runs the command; what the checks find does not change the status.
pub async fn run(context: &Context) -> Outcome {
    let ring = placement::ring(&context.cluster.nodes)?;
    let mut inodes = walk(&context.session, Part::Map).await?;
    while let Some(inode) = inodes.next().await {
        let header = &inode.header;
        let name = header.name();
        let what = if header.is_snapshot() {
            let details = format!(" (id: {}, tag: \"{}\")\n", header.snap_id, text(header.tag()));
            [b"fix snapshot ", name, details.as_bytes()].concat()
        } else {
            [b"fix vdi ", name, b"\n"].concat()
        };
        out::write(&what);
        let _ = check_vdi(context, &ring, &inode).await; // it has said what is wrong
    }
    Ok(())
}
