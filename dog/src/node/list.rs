//! `dog node list` (spec 07, 13.1).

use crate::context::Context;
use crate::exit::Outcome;
use crate::json;
use serde_json::json;

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    if context.options.json {
        let nodes: Vec<_> = context
            .cluster
            .nodes
            .iter()
            .enumerate()
            .map(|(id, node)| {
                json::with(
                    json::node(id, node),
                    json!({ "vnodes": node.nr_vnodes, "zone": node.zone, "space": node.space }),
                )
            })
            .collect();
        json::print(&json!({ "epoch": context.cluster.epoch.0, "nodes": nodes }));
        return Ok(());
    }
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
