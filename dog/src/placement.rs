//! Where objects live, computed from a node list (spec 02).

use sheepdog_placement::{Ring, Weights};
use sheepdog_proto::NodeRecord;

use crate::exit::{SYSTEM, Stop, fail};

/// The ring of a node list; the counts in it are the effective ones already. Lists that no cluster has are reported.
pub fn ring(nodes: &[NodeRecord]) -> Result<Ring, Stop> {
    Ring::new(nodes, Weights::Recorded).map_err(|e| fail(SYSTEM, e))
}
