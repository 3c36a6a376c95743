//! `dog node list` (spec 07, 13.1).

use crate::context::Context;
use crate::exit::Outcome;

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    if !context.options.raw {
        out!("  Id   Host:Port         V-Nodes       Zone\n");
    }
    for (id, node) in context.cluster.nodes.iter().enumerate() {
        let (place, vnodes, zone) = (node.nid.host_port(), node.nr_vnodes, node.zone);
        if context.options.raw {
            out!("{id} {place} {vnodes} {zone}\n");
        } else {
            out!("{id:4}   {place:<20}\t{vnodes:2}{zone:11}\n");
        }
    }
    Ok(())
}
