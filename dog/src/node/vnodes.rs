//! `dog node vnodes set` (spec 07, 13.8).

use sheepdog_proto::{Flags, Opcode, Request};

use crate::context::Context;
use crate::exit::{BAD_ARGUMENT, MINUS_ONE, Outcome, fail};
use crate::numbers::parse_whole;
use crate::session::success;

/// Runs the command.
pub async fn set(context: &Context) -> Outcome {
    let vnodes = parse_whole(context.name()?).and_then(|n| u16::try_from(n).ok()).filter(|n| *n > 0);
    let vnodes = vnodes.ok_or_else(|| {
        let text = context.arg_text(0);
        let complaint = format!("Invalid number of vnodes '{text}': must be an integer between 1 and 65535");
        fail(BAD_ARGUMENT, complaint)
    })?;
    // Eight bytes: the original sends four more that mean nothing.
    let payload = u64::from(vnodes).to_le_bytes().to_vec();
    success(context.session.tell(Request::new(Opcode::SET_VNODES).flag(Flags::WRITE), payload).await)
        .map(drop)
        .map_err(|_| fail(MINUS_ONE, "Failed to execute request"))
}
