//! `dog vdi graph` (spec 07, 8.3): Graphviz source.

use futures_util::StreamExt;

use crate::context::Context;
use crate::exit::Outcome;
use crate::inode::{Inode, Part};
use crate::numbers::{clock, day, human_size, seconds};
use crate::out;
use crate::vdi::pad_left;
use crate::walk::walk;

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    out!("digraph G {{\n  node [shape = \"box\", fontname = \"Courier\"];\n\n");
    out!("  \"0\" [shape = \"ellipse\", label = \"root\"];\n\n");
    let mut inodes = walk(&context.session, Part::Header).await?;
    while let Some(inode) = inodes.next().await {
        out::write(&node(&inode));
    }
    out!("}}\n");
    Ok(())
}

fn node(inode: &Inode) -> Vec<u8> {
    let header = &inode.header;
    let created = seconds(header.create_time);
    let vid = inode.vid();
    let head = format!("  \"{}\" -> \"{vid}\";\n  \"{vid}\" [\n    group = \"", header.parent_vdi_id);
    let details = format!(
        "\\nTag:  {:>10x}\\nSize: {:>10}\\nDate: {:>10}\\nTime: {:>10}\"{}\n  ];\n\n",
        inode.shown_id(),
        human_size(header.vdi_size),
        day(created),
        clock(created),
        if header.is_snapshot() { "" } else { ",\n    color=\"red\"" },
    );
    let label = b"\",\n    label = \"Name: ";
    [head.as_bytes(), header.name(), label, &pad_left(header.name(), 10), details.as_bytes()].concat()
}
