//! `dog cluster recover force|enable|disable` (spec 07, 14.4).

use sheepdog_proto::{MAX_NODES, NodeRecord, Opcode, Request, ResultCode};

use crate::context::Context;
use crate::exit::{FAILURE, Outcome, SYSTEM, fail};
use crate::terminal::confirm;

/// Runs `recover force`.
pub async fn force(context: &Context) -> Outcome {
    if !context.options.force {
        confirm(
            "Caution! Please try starting all the cluster nodes normally before\nrunning this command.\n\nThe cluster \
             may need to be force recovered if:\n  - the master node fails to start because of epoch mismatch; or\n  - \
             some nodes fail to start after a cluster shutdown.\n\nAre you sure you want to continue? [yes/no]: ",
        )?;
    }
    let request = Request::new(Opcode::FORCE_RECOVER).length(MAX_NODES * NodeRecord::LEN);
    let reply = context.session.ask(request).await.map_err(|_| SYSTEM)?;
    match reply.response.result {
        ResultCode::SUCCESS => Ok(()),
        other => Err(fail(FAILURE, format_args!("failed to execute request, {other}"))),
    }
}

/// Runs `recover enable`.
pub async fn enable(context: &Context) -> Outcome {
    switch(context, Opcode::ENABLE_RECOVER, "enable").await
}

/// Runs `recover disable`.
pub async fn disable(context: &Context) -> Outcome {
    switch(context, Opcode::DISABLE_RECOVER, "disable").await
}

async fn switch(context: &Context, opcode: Opcode, state: &str) -> Outcome {
    let session = &context.session;
    session.light(&session.gateway(), Request::new(opcode)).await.map_err(|_| FAILURE)?;
    out!("Cluster recovery: {state}\n");
    Ok(())
}
