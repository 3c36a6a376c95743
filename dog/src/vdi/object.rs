//! `dog vdi object map` and `location` (spec 07, 11.1 and 11.2).

use bytes::Bytes;
use futures_util::future::join_all;
use serde_json::{Value, json};
use sheepdog_proto::header::ObjRequest;
use sheepdog_proto::{NodeId, Oid, Opcode, Request, ResultCode, VdiId};

use crate::context::Context;
use crate::exit::{FAILURE, Outcome, Stop, fail};
use crate::inode::{Inode, Part, open};
use crate::json;
use crate::{out, placement};

/// Runs `object map`.
pub async fn map(context: &Context) -> Outcome {
    let name = context.name()?;
    let options = &context.options;
    let inode = open(&context.session, name, options.snapshot.as_ref(), Part::Map)
        .await
        .map_err(|_| fail(FAILURE, format_args!("FATAL: {} not found", context.arg_text(0))))?;
    if options.json {
        let block = |index: u64, owner: VdiId| json!({ "index": index, "vdi_id": json::vid(owner) });
        let objects: Vec<Value> = match options.index {
            Some(index) => vec![block(index, inode.map.get(index))],
            None => inode.map.allocated().map(|(index, owner)| block(index.into(), owner)).collect(),
        };
        json::print(&json!({ "vdi_id": json::vid(inode.vid()), "objects": objects }));
        return Ok(());
    }
    out!("Index       VID\n");
    let row = |index: u64, owner: VdiId| out!("{index:08} {:8x}\n", owner.get());
    match options.index {
        Some(index) => row(index, inode.map.get(index)),
        None => inode.map.allocated().for_each(|(index, owner)| row(index.into(), owner)),
    }
    Ok(())
}

/// Opens the VDI of a command whose failure message is `FATAL: no inode objects`.
pub async fn open_for_objects(context: &Context, part: Part) -> Result<Inode, Stop> {
    open(&context.session, context.name()?, context.options.snapshot.as_ref(), part)
        .await
        .map_err(|_| fail(FAILURE, "FATAL: no inode objects"))
}

/// Runs `object location`.
pub async fn location(context: &Context) -> Outcome {
    let part = if context.options.index.is_some() { Part::Map } else { Part::Header };
    let inode = open_for_objects(context, part).await?;
    let nodes = context.cluster.nodes.len();
    let vid = inode.vid();
    let copies = inode.header.nr_copies;
    if context.options.json {
        return location_json(context, &inode).await;
    }
    let oid = match context.options.index {
        None => {
            out!("Looking for the inode object 0x{vid} with {nodes} nodes\n\n");
            Oid::inode(vid)
        }
        Some(index) if index > u32::MAX.into() => {
            out!("The offset is too large!\n");
            return Err(FAILURE);
        }
        Some(index) => match inode.block(index) {
            Some(oid) => {
                out!(
                    "Looking for the object {oid} (vid 0x{vid} idx {index}, {copies} copies) with {nodes} nodes\n\n"
                );
                oid
            }
            None => {
                out!("The inode object 0x{vid} idx {index} is not allocated\n");
                return Ok(());
            }
        },
    };
    ask_everyone(context, oid).await;
    print_expected(context, oid, copies.into())
}

async fn location_json(context: &Context, inode: &Inode) -> Outcome {
    let oid = match context.options.index {
        None => Oid::inode(inode.vid()),
        Some(index) => inode.block(index).filter(|_| index <= u32::MAX.into()).ok_or_else(|| {
            fail(FAILURE, format_args!("The inode object 0x{} idx {index} is not allocated", inode.vid()))
        })?,
    };
    let nodes = &context.cluster.nodes;
    let ring = placement::ring(nodes)?;
    let copies = usize::from(inode.header.nr_copies).min(ring.nr_zones());
    let expected: Vec<_> = ring.nodes_of(oid, copies).map(|node| node.nid).collect();
    let answers = answers(context, oid).await;
    let rows = nodes.iter().zip(answers).enumerate().map(|(id, (node, answer))| {
        let state = match answer {
            None => "unreachable".to_string(),
            Some(ResultCode::SUCCESS) => "present".into(),
            Some(ResultCode::NO_OBJ) => "absent".into(),
            Some(other) => other.to_string(),
        };
        json::with(json::node(id, node), json!({ "state": state, "expected": expected.contains(&node.nid) }))
    });
    json::print(&json!({ "oid": oid.to_string(), "nodes": rows.collect::<Vec<_>>() }));
    Ok(())
}

/// Asks every node whether it has the object; `None` for nodes that do not answer.
async fn answers(context: &Context, oid: Oid) -> Vec<Option<ResultCode>> {
    let ask = |node: NodeId| async move {
        // Nodes that cannot be reached are left out of the output.
        if !context.session.reach(&node).await {
            return None;
        }
        let body = ObjRequest { oid, ..ObjRequest::zeroed() };
        let request = Request::new(Opcode::EXIST).epoch(context.cluster.epoch).with_obj(body);
        let reply = context.session.send(&node, request, Bytes::new()).await.ok()?;
        Some(reply.response.result)
    };
    join_all(context.cluster.nodes.iter().map(|node| ask(node.nid))).await
}

/// Asks every node whether it has the object; answers are printed in node order.
async fn ask_everyone(context: &Context, oid: Oid) {
    let nodes = &context.cluster.nodes;
    let results = answers(context, oid).await;
    for (node, result) in nodes.iter().zip(results) {
        let place = node.nid.host_port();
        match result {
            None => {}
            Some(ResultCode::SUCCESS) => out!("{place} has the object\n"),
            Some(ResultCode::NO_OBJ) => out!("{place} doesn't have the object\n"),
            Some(ResultCode::OLD_NODE_VER | ResultCode::NEW_NODE_VER) => {
                out::log("The node list has changed: please try again");
            }
            Some(other) => out::log(format_args!("{place}: hit an unexpected error ({other})")),
        }
    }
}

fn print_expected(context: &Context, oid: Oid, copies: usize) -> Outcome {
    let nodes = &context.cluster.nodes;
    if nodes.len() < copies {
        out!(
            "\nBecause number of nodes ({}) is less than number of copies ({copies}), the object should be located \
             at every nodes.\n",
            nodes.len()
        );
        return Ok(());
    }
    let ring = placement::ring(nodes)?;
    let places: Vec<String> = ring.nodes_of(oid, copies).map(|node| node.nid.host_port()).collect();
    out!("\nAccording to sheepdog algorithm, the object should be located at:\n{}\n", places.join(" "));
    Ok(())
}
