//! `dog node recovery info|set-throttle|get-throttle` (spec 07, 13.3).

use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use sheepdog_proto::admin::{
    RECOVERY_NOTIFY, RECOVERY_OBJECTS, RECOVERY_PREPARE, RecoveryState, RecoveryThrottling,
};
use sheepdog_proto::{Flags, NodeId, NodeRecord, Opcode, Request, ResultCode, Wire};

use crate::context::Context;
use crate::exit::{BAD_ARGUMENT, FAILURE, MINUS_ONE, Outcome, SYSTEM, Stop, fail};
use crate::json;
use crate::numbers::parse_whole;
use crate::out::{self, text};
use crate::session::success;
use crate::terminal::{Progress, Unit};

/// How often `-P` asks.
const POLL: Duration = Duration::from_secs(1);

/// Runs `recovery` and `recovery info`.
pub async fn info(context: &Context) -> Outcome {
    if context.options.progress && !context.options.json {
        return follow(context).await;
    }
    let as_json = context.options.json;
    let mut rows = Vec::new();
    if !context.options.raw && !as_json {
        out!("Nodes In Recovery:\n  Id   Host:Port         V-Nodes       Zone       Progress\n");
    }
    for (id, node) in context.cluster.nodes.iter().enumerate() {
        let state = state(context, &node.nid).await.map_err(|problem| match problem {
            Problem::Transport => FAILURE,
            Problem::Result(code) => fail(FAILURE, code),
        })?;
        if as_json {
            rows.push(json::with(json::node(id, node), fields(&state)));
        } else if state.in_recovery != 0 {
            print_row(context, id, node, &state);
        }
    }
    if as_json {
        json::print(&json!({ "nodes": rows }));
    }
    Ok(())
}

/// The fields that tell of a node's recovery.
pub fn fields(state: &RecoveryState) -> serde_json::Value {
    json!({
        "recovering": state.in_recovery != 0,
        "phase": phase(state),
        "finished": state.nr_finished,
        "total": state.nr_total,
        "unfound": state.nr_unfound,
    })
}

/// What a node's recovery is doing.
pub fn phase(state: &RecoveryState) -> &'static str {
    match state.state {
        _ if state.in_recovery == 0 => "idle",
        RECOVERY_PREPARE => "preparing",
        RECOVERY_OBJECTS => "copying",
        RECOVERY_NOTIFY => "notifying",
        _ => "unknown",
    }
}

fn print_row(context: &Context, id: usize, node: &NodeRecord, state: &RecoveryState) {
    let (place, vnodes, zone) = (node.nid.host_port(), node.nr_vnodes, node.zone);
    let (done, total) = (state.nr_finished, state.nr_total);
    if context.options.raw {
        out!("{id} {place} {vnodes} {zone} {done} {total}\n");
    } else {
        let percent = if total == 0 { 0.0 } else { done as f64 / total as f64 * 100.0 };
        out!("{id:4}   {place:<20}{vnodes:5}{zone:11}{percent:11.1}%");
        // An addition: the original counts what it cannot find as done.
        match state.nr_unfound {
            0 => out!("\n"),
            unfound => out!("   {unfound} unfound\n"),
        }
    }
}

enum Problem {
    Transport,
    Result(ResultCode),
}

async fn state(context: &Context, node: &NodeId) -> Result<RecoveryState, Problem> {
    let request = Request::new(Opcode::STAT_RECOVERY).length(RecoveryState::LEN);
    let reply = context.session.send(node, request, Bytes::new()).await.map_err(|_| Problem::Transport)?;
    match reply.response.result {
        ResultCode::SUCCESS => {
            RecoveryState::decode(&reply.data).map_err(|_| Problem::Result(ResultCode::UNKNOWN))
        }
        other => Err(Problem::Result(other)),
    }
}

/// Shows the gateway's progress until its recovery ends.
async fn follow(context: &Context) -> Outcome {
    let gateway = context.session.gateway();
    let mut total = None;
    loop {
        let state = state(context, &gateway).await.map_err(|problem| match problem {
            Problem::Transport => fail(SYSTEM, "Failed to execute request"),
            Problem::Result(code) => fail(SYSTEM, code),
        })?;
        if state.in_recovery == 0 {
            break;
        }
        match state.state {
            RECOVERY_PREPARE => out!("\rpreparing a checked object list..."),
            RECOVERY_NOTIFY => out!("\rnotifying a completion of recovery..."),
            RECOVERY_OBJECTS => {
                total = Some(state.nr_total);
                Progress::new(state.nr_total, Unit::Count).show(state.nr_finished);
            }
            _ => {}
        }
        tokio::time::sleep(POLL).await;
    }
    if let Some(total) = total {
        Progress::new(total, Unit::Count).show(total);
    }
    Ok(())
}

/// Runs `recovery set-throttle`.
pub async fn set_throttle(context: &Context) -> Outcome {
    let (max, interval) = throttle_operands(context)?;
    let limits =
        RecoveryThrottling { max_exec_count: max, queue_work_interval: interval, ..Default::default() };
    let request = Request::new(Opcode::SET_RECOVERY).flag(Flags::WRITE);
    success(context.session.tell(request, limits.encode()).await)
        .map(drop)
        .map_err(|_| fail(MINUS_ONE, "Failed to execute request"))
}

fn throttle_operands(context: &Context) -> Result<(u32, u64), Stop> {
    let max = context.arg(0).unwrap_or_default();
    let Some(interval) = context.arg(1) else {
        let text = format!("Invalid interval max ({}), interval ((null))", text(max));
        return Err(fail(BAD_ARGUMENT, text));
    };
    let max_number = parse_whole(max)
        .and_then(|n| u32::try_from(n).ok())
        .ok_or_else(|| fail(BAD_ARGUMENT, format_args!("Invalid max ({})", text(max))))?;
    let interval_number = parse_whole(interval)
        .and_then(|n| u64::try_from(n).ok())
        .ok_or_else(|| fail(BAD_ARGUMENT, format_args!("Invalid interval ({})", text(interval))))?;
    if (max_number == 0) != (interval_number == 0) {
        let text = format!("Invalid interval max ({}), interval ({})", text(max), text(interval));
        return Err(fail(BAD_ARGUMENT, text));
    }
    Ok((max_number, interval_number))
}

/// Runs `recovery get-throttle`.
pub async fn get_throttle(context: &Context) -> Outcome {
    let request = Request::new(Opcode::GET_RECOVERY).length(RecoveryThrottling::LEN);
    let failed = || fail(MINUS_ONE, "Failed to execute request");
    let reply = success(context.session.ask(request).await).map_err(|_| failed())?;
    let limits = RecoveryThrottling::decode(&reply.data).map_err(|_| failed())?;
    if context.options.json {
        let interval = limits.queue_work_interval;
        json::print(&json!({ "max": limits.max_exec_count, "interval_ms": interval }));
        return Ok(());
    }
    out::log(format_args!("max ({}), interval ({})", limits.max_exec_count, limits.queue_work_interval));
    Ok(())
}
