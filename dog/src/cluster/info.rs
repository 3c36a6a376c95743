//! `dog cluster info` (spec 07, 14.1).

use serde_json::{Value, json};
use sheepdog_proto::redundancy::format_copies;
use sheepdog_proto::{ClusterFlags, NodeRecord, ResultCode, cstr};

use super::epochs::{self, EpochNodes, Epochs};
use crate::context::Context;
use crate::exit::{Outcome, SYSTEM};
use crate::json;
use crate::numbers::{clock, ctime, day, seconds};
use crate::out::text;

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let Epochs { result, list } =
        epochs::fetch(&context.session, &context.cluster).await.map_err(|_| SYSTEM)?;
    let options = &context.options;
    if options.json {
        json::print(&document(result, &list));
        return Ok(());
    }
    let prefix = |name: &'static str| if options.raw { "" } else { name };
    let newest = list.first().map(|epoch| &epoch.record);
    let running = match newest {
        Some(record) if record.disable_recovery != 0 => "running, auto-recovery disabled",
        _ => "running, auto-recovery enabled",
    };
    let ok = result == ResultCode::SUCCESS;
    let status = if ok { running.to_string() } else { result.to_string() };
    out!("{}{status}\n", prefix("Cluster status: "));
    if options.verbose {
        let flags = newest.map_or(ClusterFlags::NONE, |record| record.flags);
        match newest.filter(|_| ok) {
            Some(record) => {
                let copies = format_copies(record.nr_copies, record.copy_policy);
                let store = text(cstr(&record.store));
                out!("{}{store} with {copies} redundancy policy\n", prefix("Cluster store: "));
                let auto = flags.contains(ClusterFlags::AUTO_VNODES);
                let strategy = if auto { "auto" } else { "fixed" };
                out!("{}{strategy}\n", prefix("Cluster vnodes strategy: "));
            }
            None => out!("{}{result}\n", prefix("Cluster store: ")),
        }
        let mode = if flags.contains(ClusterFlags::DISKMODE) { "disk" } else { "node" };
        out!("{}{mode}\n", prefix("Cluster vnode mode: "));
    } else {
        out!("\n");
    }
    if let Some(record) = newest.filter(|_| !options.raw) {
        out!("Cluster created at {}\n\n", ctime(seconds(record.ctime)));
        out!("Epoch Time           Version [Host:Port:V-Nodes,,,]\n");
    }
    for (at, epoch) in list.iter().enumerate() {
        let time = epoch.record.time;
        if options.raw {
            out!("{time} {} [", epoch.record.epoch);
        } else {
            out!("{} {} {:6} [", day(time), clock(time), epoch.record.epoch.0);
        }
        let members = if options.diff { changes(epoch, list.get(at + 1)) } else { members(&epoch.nodes) };
        out!("{members}]\n");
    }
    Ok(())
}

/// Everything that the listings show, whatever the options.
fn document(result: ResultCode, list: &[EpochNodes]) -> Value {
    let running = result == ResultCode::SUCCESS;
    let epoch = |epoch: &EpochNodes| {
        let node = |node: &NodeRecord| json!({ "address": node.nid.host_port(), "vnodes": node.nr_vnodes });
        json!({
            "epoch": epoch.record.epoch.0,
            "time": epoch.record.time,
            "nodes": epoch.nodes.iter().map(node).collect::<Vec<_>>(),
        })
    };
    let record = list.first().map(|epoch| &epoch.record);
    let flag = |flag| record.map(|record| record.flags.contains(flag));
    let vnodes = |auto| if auto { "auto" } else { "fixed" };
    json!({
        "running": running,
        "status": if running { "running".to_string() } else { result.to_string() },
        "auto_recovery": record.map(|record| record.disable_recovery == 0),
        "created": record.map(|record| seconds(record.ctime)),
        "copies": record.map(|record| format_copies(record.nr_copies, record.copy_policy)),
        "store": record.map(|record| text(cstr(&record.store))),
        "vnodes": flag(ClusterFlags::AUTO_VNODES).map(vnodes),
        "epoch": record.map(|record| record.epoch.0),
        "epochs": list.iter().map(epoch).collect::<Vec<_>>(),
    })
}

fn members(nodes: &[NodeRecord]) -> String {
    let nodes = nodes.iter().map(|node| format!("{}:{}", node.nid.host_port(), node.nr_vnodes));
    nodes.collect::<Vec<_>>().join(", ")
}

/// Who joined and who left since the epoch before.
fn changes(epoch: &EpochNodes, before: Option<&EpochNodes>) -> String {
    let Some(before) = before else { return "formated".into() };
    let only_in = |these: &[NodeRecord], those: &[NodeRecord], sign: char| {
        let these = these.iter().filter(|node| those.iter().all(|other| other.nid != node.nid));
        these.map(|node| format!("{sign}{}", node.nid.host_port())).collect::<Vec<_>>().join(", ")
    };
    only_in(&epoch.nodes, &before.nodes, '+') + &only_in(&before.nodes, &epoch.nodes, '-')
}
