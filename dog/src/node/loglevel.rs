//! `dog node log level set|get|list` (spec 07, 13.7). Results go to stderr.

use serde_json::json;
use sheepdog_proto::{Flags, Opcode, Request, Wire};

use crate::context::Context;
use crate::exit::{MINUS_ONE, Outcome, Stop, fail};
use crate::json;
use crate::out;
use crate::session::success;

const LEVELS: [&str; 8] = ["emerg", "alert", "crit", "err", "warning", "notice", "info", "debug"];

fn log_levels() {
    for (number, name) in LEVELS.iter().enumerate() {
        out::log(format_args!("{name}\t({number})"));
    }
}

fn failed() -> Stop {
    fail(MINUS_ONE, "Failed to execute request")
}

/// Runs `log level list`.
pub async fn list(context: &Context) -> Outcome {
    if context.options.json {
        let level = |(number, name)| json!({ "level": number, "name": name });
        json::print(&json!({ "levels": LEVELS.iter().enumerate().map(level).collect::<Vec<_>>() }));
        return Ok(());
    }
    log_levels();
    Ok(())
}

/// Runs `log level get`.
pub async fn get(context: &Context) -> Outcome {
    let request = Request::new(Opcode::GET_LOGLEVEL).length(i32::SIZE);
    let reply = success(context.session.ask(request).await).map_err(|_| failed())?;
    let level = i32::decode(&reply.data).map_err(|_| failed())?;
    let name = usize::try_from(level).ok().and_then(|level| LEVELS.get(level));
    if context.options.json {
        json::print(&json!({ "level": level, "name": name }));
        return Ok(());
    }
    match name {
        Some(name) => out::log(format_args!("{name} ({level})")),
        None => out::log(format_args!("unknown loglevel ({level})")),
    }
    Ok(())
}

/// Runs `log level set`.
pub async fn set(context: &Context) -> Outcome {
    let name = context.arg_text(0);
    let Some(level) = LEVELS.iter().position(|level| *level == name) else {
        let stop = fail(MINUS_ONE, format_args!("invalid loglevel: {name}"));
        out::log("available loglevels:");
        log_levels();
        return Err(stop);
    };
    let request = Request::new(Opcode::SET_LOGLEVEL).flag(Flags::WRITE);
    let reply = context.session.tell(request, (level as i32).encode()).await;
    success(reply).map(drop).map_err(|_| failed())
}
