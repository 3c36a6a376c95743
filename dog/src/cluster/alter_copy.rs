//! `dog cluster alter-copy` (spec 07, 14.6).

use sheepdog_proto::cluster::EpochRecord;
use sheepdog_proto::header::ClusterRequest;
use sheepdog_proto::{Opcode, Request, ResultCode, Wire};

use crate::context::Context;
use crate::exit::{FAILURE, Outcome, SYSTEM, fail};
use crate::out;
use crate::session::success;
use crate::terminal::confirm;
use crate::vdi::alter_copy::{confirm_copies, wanted_copies};

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let copies = wanted_copies(context, "cluster")?;
    confirm_copies(context, copies)?;
    let request = Request::new(Opcode::STAT_CLUSTER).length(EpochRecord::LEN);
    let reply = context.session.ask(request).await.map_err(|_| SYSTEM)?;
    if reply.response.result != ResultCode::SUCCESS {
        return Err(fail(FAILURE, format_args!("Response's result: {}", reply.response.result)));
    }
    let record = EpochRecord::decode(&reply.data).map_err(|e| fail(FAILURE, e))?;
    if record.copy_policy != 0 {
        let text = "The cluster's copy policy is erasure code, changing it is not supported yet.";
        return Err(fail(FAILURE, text));
    }
    let old = record.nr_copies;
    if old == copies {
        let text = format!("The cluster's redundancy level is already set to {copies}, nothing changed.");
        return Err(fail(FAILURE, text));
    }
    if !context.options.force {
        confirm(
            "    __\n   ()'`;\n   /\\|`  Caution! Changing cluster's redundancy level will affect\n  /  |   all the \
             VDIs to be created later.\n(/_)_|_  Are you sure you want to continue? [yes/no]: ",
        )?;
    }
    let body = ClusterRequest { copies, ..ClusterRequest::zeroed() };
    let request = Request::new(Opcode::ALTER_CLUSTER_COPY).with_cluster(body);
    success(context.session.ask(request).await)
        .map_err(|_| fail(FAILURE, "Changing the cluster's redundancy level failure."))?;
    out::log(format_args!("The cluster's redundancy level is set to {copies}, the old one was {old}."));
    Ok(())
}
