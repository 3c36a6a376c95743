//! `dog node kill` (spec 07, 13.4).

use sheepdog_proto::{NodeId, Opcode, Request};

use crate::context::Context;
use crate::exit::{BAD_ARGUMENT, FAILURE, Outcome, Stop, fail};
use crate::numbers::parse_whole;

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let node = victim(context)?;
    let reply = context.session.light(&node, Request::new(Opcode::KILL_NODE)).await;
    reply.map(drop).map_err(|_| fail(FAILURE, "Failed to execute request"))
}

fn victim(context: &Context) -> Result<NodeId, Stop> {
    let Some(id) = context.arg(0) else {
        if context.options.local {
            return Ok(context.session.gateway());
        }
        return Err(fail(BAD_ARGUMENT, "please specify -l option or node id"));
    };
    if context.options.local {
        let text = "don't use -l option and specify node id at the same time";
        return Err(fail(BAD_ARGUMENT, text));
    }
    let text = context.arg_text(0);
    let index = parse_whole(id).filter(|id| *id >= 0).ok_or_else(|| {
        fail(BAD_ARGUMENT, format_args!("Invalid node id '{text}', please specify a numeric value"))
    })?;
    let node = usize::try_from(index).ok().and_then(|index| context.cluster.nodes.get(index));
    node.map(|node| node.nid).ok_or_else(|| fail(BAD_ARGUMENT, format_args!("Invalid node id '{text}'")))
}
