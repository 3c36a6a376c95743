//! `dog node stat` (spec 07, 13.6).

use std::time::Duration;

use serde_json::{Value, json};
use sheepdog_proto::admin::SdStat;
use sheepdog_proto::{Opcode, Request, Wire};

use crate::context::Context;
use crate::exit::{BAD_ARGUMENT, FAILURE, Outcome, SYSTEM, Stop, fail};
use crate::json;
use crate::numbers::human_size;
use crate::session::{Failed, success};

/// How often `-w` asks.
const POLL: Duration = Duration::from_secs(1);

/// Counters of one kind of requests.
#[derive(Debug, Clone, Copy)]
struct Counters {
    active: u64,
    total: u64,
    write: u64,
    read: u64,
    remove: u64,
    flush: u64,
    /// Bytes received.
    rx: u64,
    /// Bytes sent.
    tx: u64,
}

fn client(stat: &SdStat) -> Counters {
    Counters {
        active: stat.gway_active_nr,
        total: stat.gway_total_nr,
        write: stat.gway_total_write_nr,
        read: stat.gway_total_read_nr,
        remove: stat.gway_total_remove_nr,
        flush: stat.gway_total_flush_nr,
        rx: stat.gway_total_rx,
        tx: stat.gway_total_tx,
    }
}

fn peer(stat: &SdStat) -> Counters {
    Counters {
        active: stat.peer_active_nr,
        total: stat.peer_total_nr,
        write: stat.peer_total_write_nr,
        read: stat.peer_total_read_nr,
        remove: stat.peer_total_remove_nr,
        flush: 0,
        rx: stat.peer_total_rx,
        tx: stat.peer_total_tx,
    }
}

/// The counters of both kinds; here reads are under "read".
fn counters(stat: &SdStat) -> Value {
    let fields = |c: Counters| {
        json!({
            "active": c.active,
            "total": c.total,
            "read": c.read,
            "write": c.write,
            "remove": c.remove,
            "flush": c.flush,
            "written_bytes": c.rx,
            "read_bytes": c.tx,
        })
    };
    json!({ "client": fields(client(stat)), "peer": fields(peer(stat)) })
}

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let raw = context.options.raw;
    let size = |bytes: u64| if raw { bytes.to_string() } else { human_size(bytes) };
    if context.options.watch && context.options.json {
        return Err(fail(BAD_ARGUMENT, "--json prints one document: do not use it with -w"));
    }
    if context.options.watch {
        return watch(context, size).await;
    }
    let stat = fetch(context).await?;
    if context.options.json {
        json::print(&counters(&stat));
        return Ok(());
    }
    if !raw {
        out!("Request\tActive\tTotal\tWrite\tRead\tRemove\tFlush\tAll WR\tAll RD\n");
    }
    for (name, c) in [("Client\t", client(&stat)), ("Peer\t", peer(&stat))] {
        let name = if raw { "" } else { name };
        let (rx, tx) = (size(c.rx), size(c.tx));
        // Reads stand under "Write" and writes under "Read": what scripts have always got.
        let numbers = [c.active, c.total, c.read, c.write, c.remove, c.flush].map(|n| n.to_string());
        out!("{name}{}\t{rx}\t{tx}\n", numbers.join("\t"));
    }
    Ok(())
}

async fn fetch(context: &Context) -> Result<SdStat, Stop> {
    let failed =
        |why: &dyn std::fmt::Display| fail(FAILURE, format_args!("failed to get stat information: {why}"));
    let request = Request::new(Opcode::STAT).length(SdStat::LEN);
    match success(context.session.ask(request).await) {
        Ok(reply) => SdStat::decode(&reply.data).map_err(|e| failed(&e)),
        Err(Failed::Transport) => Err(SYSTEM),
        Err(e) => Err(failed(&e)),
    }
}

/// Prints the counters and their change every second, until stopped.
async fn watch(context: &Context, size: impl Fn(u64) -> String) -> Outcome {
    let mut before = fetch(context).await?;
    loop {
        let stat = fetch(context).await?;
        if !context.options.raw {
            out!("Request\tActive\tTotal\tWrite\tRead\tRemove\tFlush\tAll WR\tAll RD\tWRBW\tRDBW\tRPS\n");
        }
        let rows = [("Client\t", client(&stat), client(&before)), ("Peer\t", peer(&stat), peer(&before))];
        for (name, c, old) in rows {
            let name = if context.options.raw { "" } else { name };
            let numbers = [c.active, c.total, c.write, c.read, c.remove, c.flush].map(|n| n.to_string());
            out!(
                "{name}{}\t{}\t{}\t{}\t{}\t{}\n",
                numbers.join("\t"),
                size(c.rx),
                size(c.tx),
                size(c.rx.saturating_sub(old.rx)),
                size(c.tx.saturating_sub(old.tx)),
                c.total.saturating_sub(old.total)
            );
        }
        before = stat;
        tokio::time::sleep(POLL).await;
    }
}
