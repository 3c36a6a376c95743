//! `dog nfs create|delete` (spec 07, 16.1).

use sheepdog_proto::{Flags, Opcode, Request};

use crate::context::Context;
use crate::exit::{Outcome, SYSTEM, fail};
use crate::session::{Failed, success};

/// Runs `nfs create`.
pub async fn create(context: &Context) -> Outcome {
    ask(context, Opcode::NFS_CREATE).await
}

/// Runs `nfs delete`.
pub async fn delete(context: &Context) -> Outcome {
    ask(context, Opcode::NFS_DELETE).await
}

async fn ask(context: &Context, opcode: Opcode) -> Outcome {
    let name = [context.name()?, b"\0"].concat();
    let request = Request::new(opcode).flag(Flags::WRITE);
    match success(context.session.tell(request, name).await) {
        Ok(_) => Ok(()),
        Err(Failed::Transport) => Err(SYSTEM),
        // The original says "create" for both, and scripts know it.
        Err(e) => Err(fail(SYSTEM, format_args!("failed to create nfs {}, {e}", context.arg_text(0)))),
    }
}
