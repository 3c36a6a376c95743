//! `dog cluster ...` (spec 07, section 14).

pub mod alter_copy;
pub mod check;
pub mod epochs;
pub mod format;
pub mod health;
pub mod info;
pub mod recover;
pub mod snapshot;

use sheepdog_proto::{Opcode, Request};

use crate::context::Context;
use crate::exit::{FAILURE, Outcome, fail};

/// Runs `cluster shutdown`.
pub async fn shutdown(context: &Context) -> Outcome {
    let session = &context.session;
    let reply = session.light(&session.gateway(), Request::new(Opcode::SHUTDOWN)).await;
    reply.map(drop).map_err(|_| fail(FAILURE, "failed to execute request"))
}

/// Runs `cluster reweight`.
pub async fn reweight(context: &Context) -> Outcome {
    let session = &context.session;
    let reply = session.light(&session.gateway(), Request::new(Opcode::REWEIGHT)).await;
    reply.map(drop).map_err(|_| FAILURE)
}
