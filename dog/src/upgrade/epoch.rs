//! `dog upgrade epoch-convert`.

use sheepdog_proto::node::encode_nodes;
use sheepdog_proto::{NodeId, NodeRecord, Wire};

use super::{destination, read_source, write_destination};
use crate::args::OldVersion;
use crate::context::Context;
use crate::exit::{Outcome, SYSTEM, Stop, fail};
use crate::out;

/// Bytes of the time behind the records.
const TIME_LEN: usize = 8;

sheepdog_proto::wire! {
    /// A node of release 0.7. Release 0.8 has 24 bytes before it that mean nothing.
    OldNode [56] {
        /// Identity.
        0 => nid: NodeId,
        /// Weight.
        40 => nr_vnodes: u16,
        /// Failure domain.
        44 => zone: u32,
        /// Bytes offered.
        48 => space: u64,
    }
}

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let target = destination(context)?;
    let Some(version) = context.options.old_version else {
        return Err(fail(Stop::Usage, "please specify original version of epoch file"));
    };
    let old = read_source(context, "epoch log file")?;
    let skip = match version {
        OldVersion::V07 => 0,
        OldVersion::V08 => 24,
    };
    let record = skip + OldNode::LEN;
    let records = old.len().checked_sub(TIME_LEN).filter(|len| len % record == 0);
    let Some(end) = records else {
        return Err(fail(SYSTEM, "invalid epoch log file size"));
    };
    let nodes: Vec<NodeRecord> = old[..end].chunks_exact(record).map(|r| convert(&r[skip..])).collect();
    write_destination(target, &[&encode_nodes(&nodes), &old[end..]].concat())?;
    out::log("number of vnodes of each nodes:");
    for node in nodes {
        out::log(format_args!("\t{} == {}", node.nid, node.nr_vnodes));
    }
    out::log("please supply the above numbers to sheeps with -V option");
    Ok(())
}

fn convert(bytes: &[u8]) -> NodeRecord {
    let OldNode { nid, nr_vnodes, zone, space } = OldNode::get(bytes);
    NodeRecord { nid, nr_vnodes, zone, space }
}
