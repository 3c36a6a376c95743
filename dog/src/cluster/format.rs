//! `dog cluster format` (spec 07, 14.2).

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use sheepdog_proto::cluster::{CLUSTER_INFO_LEN, ClusterInfoHeader};
use sheepdog_proto::header::ClusterRequest;
use sheepdog_proto::{ClusterFlags, CopyPolicy, Flags, Opcode, Request, ResultCode, Wire, cstr};

use crate::args::Options;
use crate::context::Context;
use crate::exit::{FAILURE, Outcome, SYSTEM, Stop, fail};
use crate::out::{self, text};
use crate::placement;
use crate::session::Failed;
use crate::terminal::confirm;
use crate::walk::bitmap;

/// Store used without `-b`.
const DEFAULT_STORE: &[u8] = b"plain";
/// Room for the names of stores.
const STORE_LIST_LEN: usize = 512;

/// Redundancy and block size of VDIs that do not say; 0 = the daemons' defaults.
pub struct Defaults {
    /// Copies.
    pub copies: u8,
    /// Policy byte.
    pub policy: u8,
    /// log2 of the block size.
    pub block_size_shift: u8,
}

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let (copies, policy) = context.options.copies.unwrap_or((0, CopyPolicy::REPLICATED));
    let block_size_shift = context.options.shift.unwrap_or(0);
    format(context, &Defaults { copies, policy: policy.to_byte(), block_size_shift }).await
}

/// Formats the cluster, asking where that would destroy something.
pub async fn format(context: &Context, defaults: &Defaults) -> Outcome {
    check_vnode_strategy(context).await?;
    let copies = defaults.copies;
    let zones = placement::ring(&context.cluster.nodes)?.nr_zones();
    if usize::from(copies) > zones {
        confirm(&format!(
            "Number of copies ({copies}) is larger than number of zones ({zones}).\nAre you sure you want to \
             continue? [yes/no]: "
        ))?;
    }
    confirm_not_empty(context).await?;
    let store = context.options.store.as_deref().unwrap_or(DEFAULT_STORE);
    out::write(&[b"using backend ", store, b" store\n"].concat());
    let body = ClusterRequest {
        copies,
        copy_policy: defaults.policy,
        block_size_shift: defaults.block_size_shift,
        ctime: now(),
        flags: cluster_flags(&context.options),
        ..ClusterRequest::zeroed()
    };
    let request = Request::new(Opcode::MAKE_FS).flag(Flags::WRITE).with_cluster(body);
    let name = [store, b"\0"].concat();
    let result = match context.session.tell(request, name).await {
        Err(e) => return Err(fail(SYSTEM, format_args!("Format failed: {}", Failed::from(e)))),
        Ok(reply) => reply.response.result,
    };
    if result == ResultCode::SUCCESS {
        return Ok(());
    }
    let failure = fail(SYSTEM, format_args!("Format failed: {result}"));
    if result == ResultCode::NO_STORE {
        print_stores(context).await;
    }
    Err(failure)
}

fn cluster_flags(options: &Options) -> ClusterFlags {
    [
        (options.strict, ClusterFlags::STRICT),
        (!options.fixed_vnodes, ClusterFlags::AUTO_VNODES),
        (options.lock, ClusterFlags::USE_LOCK),
        (options.recycle, ClusterFlags::RECYCLE_VID),
        (options.avoid_diskfull, ClusterFlags::AVOID_DISKFULL),
    ]
    .into_iter()
    .filter(|(on, _)| *on)
    .fold(ClusterFlags::NONE, |all, (_, flag)| all.with(flag))
}

/// The time as clusters store it: seconds << 32 | nanoseconds.
fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_secs() << 32 | u64::from(now.subsec_micros() * 1000)
}

/// Every node with vnodes must have been started the way `-V` says.
async fn check_vnode_strategy(context: &Context) -> Outcome {
    for node in context.cluster.nodes.iter() {
        let request = Request::new(Opcode::CLUSTER_INFO).length(CLUSTER_INFO_LEN);
        let reply = context
            .session
            .send(&node.nid, request, Bytes::new())
            .await
            .map_err(|_| fail(FAILURE, "Fail to execute request"))?;
        if reply.response.result != ResultCode::SUCCESS {
            return Err(fail(FAILURE, reply.response.result));
        }
        let info = ClusterInfoHeader::decode(&reply.data).map_err(|e| fail(FAILURE, e))?;
        if node.nr_vnodes > 0 {
            check_strategy(context.options.fixed_vnodes, info.flags.contains(ClusterFlags::AUTO_VNODES))?;
        }
    }
    Ok(())
}

fn check_strategy(fixed_wanted: bool, auto: bool) -> Result<(), Stop> {
    match (fixed_wanted, auto) {
        (true, true) => Err(fail(
            FAILURE,
            "Can not apply the option of '-V', because there are vnode strategy of sheep is auto in the cluster",
        )),
        (false, false) => Err(fail(
            FAILURE,
            "Need to specify the option of '-V', because there are vnode strategy of sheep is fixed in the cluster",
        )),
        _ => Ok(()),
    }
}

async fn confirm_not_empty(context: &Context) -> Outcome {
    let used = bitmap(&context.session, Opcode::READ_VDIS).await?.ok_or(FAILURE)?;
    if context.options.force || used.iter().all(|byte| *byte == 0) {
        return Ok(());
    }
    confirm(
        "    __\n   ()'`;\n   /\\|`\n  /  |   Caution! The cluster is not empty.\n(/_)_|_  Are you sure you want to \
         continue? [yes/no]: ",
    )
}

async fn print_stores(context: &Context) {
    let request = Request::new(Opcode::GET_STORE_LIST).length(STORE_LIST_LEN);
    if let Ok(reply) = context.session.ask(request).await {
        out!("Available stores:\n---------------------------------------\n{}\n", text(cstr(&reply.data)));
    }
}
