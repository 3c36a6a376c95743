//! `dog vdi track` (spec 07, 11.4): where an object belonged in every epoch.

use serde_json::json;
use sheepdog_proto::{NodeRecord, Oid, ResultCode};

use crate::cluster::epochs::{self, Epochs};
use crate::context::Context;
use crate::exit::{FAILURE, Outcome, SYSTEM, fail};
use crate::inode::Part;
use crate::json;
use crate::placement;
use crate::vdi::object::open_for_objects;

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let options = &context.options;
    let part = if options.index.is_some() { Part::Map } else { Part::Header };
    let inode = open_for_objects(context, part).await?;
    let nodes = context.cluster.nodes.len();
    let vid = inode.vid();
    // What comes before the epochs is for people only.
    macro_rules! say {
        ($($arg:tt)*) => { if !options.json { out!($($arg)*) } };
    }
    let oid = match (options.oid, options.index) {
        (Some(oid), _) => {
            say!("Tracking the object {oid} (the inode vid 0x{vid}) with {nodes} nodes\n");
            oid
        }
        (None, None) => {
            say!("Tracking the inode object 0x{vid} with {nodes} nodes\n");
            Oid::inode(vid)
        }
        (None, Some(index)) if index > u32::MAX.into() => {
            out!("The offset is too large!\n");
            return Err(FAILURE);
        }
        (None, Some(index)) => {
            let oid = Oid::data(inode.map.get(index), index as u32);
            say!("Tracking the object {oid} (the inode vid 0x{vid} idx {index}) with {nodes} nodes\n");
            oid
        }
    };
    let Epochs { result, list } =
        epochs::fetch(&context.session, &context.cluster).await.map_err(|_| SYSTEM)?;
    if result != ResultCode::SUCCESS && list.is_empty() {
        return Err(fail(FAILURE, result));
    }
    let copies = usize::from(inode.header.nr_copies);
    let mut rows = Vec::new();
    for epoch in &list {
        say!("\nobj {oid} locations at epoch {}, copies = {copies}\n", epoch.record.epoch);
        say!("---------------------------------------------------\n");
        let places: Vec<NodeRecord> = if epoch.nodes.len() < copies {
            epoch.nodes.clone()
        } else {
            placement::ring(&epoch.nodes)?.nodes_of(oid, copies).copied().collect()
        };
        if options.json {
            let places: Vec<String> = places.iter().map(|node| node.nid.host_port()).collect();
            rows.push(json!({ "epoch": epoch.record.epoch.0, "nodes": places }));
            continue;
        }
        for node in places {
            out!("{}\n", node.nid.host_port());
        }
    }
    if options.json {
        json::print(&json!({ "oid": oid.to_string(), "epochs": rows }));
    }
    Ok(())
}
