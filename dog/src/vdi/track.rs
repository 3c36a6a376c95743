//! `dog vdi track` (spec 07, 11.4): where an object belonged in every epoch.

use sheepdog_proto::{NodeRecord, Oid, ResultCode};

use crate::cluster::epochs::{self, Epochs};
use crate::context::Context;
use crate::exit::{FAILURE, Outcome, SYSTEM, fail};
use crate::inode::Part;
use crate::placement;
use crate::vdi::object::open_for_objects;

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let options = &context.options;
    let part = if options.index.is_some() { Part::Map } else { Part::Header };
    let inode = open_for_objects(context, part).await?;
    let nodes = context.cluster.nodes.len();
    let vid = inode.vid();
    let oid = match (options.oid, options.index) {
        (Some(oid), _) => {
            out!("Tracking the object {oid} (the inode vid 0x{vid}) with {nodes} nodes\n");
            oid
        }
        (None, None) => {
            out!("Tracking the inode object 0x{vid} with {nodes} nodes\n");
            Oid::inode(vid)
        }
        (None, Some(index)) if index > u32::MAX.into() => {
            out!("The offset is too large!\n");
            return Err(FAILURE);
        }
        (None, Some(index)) => {
            let oid = Oid::data(inode.map.get(index), index as u32);
            out!("Tracking the object {oid} (the inode vid 0x{vid} idx {index}) with {nodes} nodes\n");
            oid
        }
    };
    let Epochs { result, list } =
        epochs::fetch(&context.session, &context.cluster).await.map_err(|_| SYSTEM)?;
    if result != ResultCode::SUCCESS && list.is_empty() {
        return Err(fail(FAILURE, result));
    }
    let copies = usize::from(inode.header.nr_copies);
    for epoch in &list {
        out!("\nobj {oid} locations at epoch {}, copies = {copies}\n", epoch.record.epoch);
        out!("---------------------------------------------------\n");
        let places: Vec<NodeRecord> = if epoch.nodes.len() < copies {
            epoch.nodes.clone()
        } else {
            placement::ring(&epoch.nodes)?.nodes_of(oid, copies).copied().collect()
        };
        for node in places {
            out!("{}\n", node.nid.host_port());
        }
    }
    Ok(())
}
