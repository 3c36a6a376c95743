//! `dog upgrade object-location`.

use sheepdog_proto::Oid;
use sheepdog_proto::node::decode_nodes;

use super::path;
use crate::context::Context;
use crate::exit::{Outcome, SYSTEM, Stop, fail};
use crate::numbers::parse_hex;
use crate::out::{self, errno_text, text};
use crate::placement;

/// Bytes of the time behind the records of an epoch file.
const TIME_LEN: usize = 8;

/// Runs the command: prints the node of the object's first copy.
pub async fn run(context: &Context) -> Outcome {
    let file = context.name()?;
    let oid = context.arg(1).and_then(parse_hex).map(Oid);
    let oid = oid.ok_or_else(|| fail(Stop::Usage, "please specify object id in hex format"))?;
    let name = text(file);
    let unusable = || fail(SYSTEM, format_args!("failed to construct vnode info from epoch file {name}"));
    let bytes = std::fs::read(path(file)).map_err(|e| {
        out::log(format_args!("failed to read epoch file {name}: {}", errno_text(&e)));
        unusable()
    })?;
    let nodes = decode_nodes(&bytes[..bytes.len().saturating_sub(TIME_LEN)]);
    let ring = placement::ring(&nodes)?;
    let first = ring.nodes_of(oid, 1).next().ok_or_else(unusable)?;
    out::log(first.nid);
    Ok(())
}
