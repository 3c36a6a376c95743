//! Where every object lives: on which nodes of the cluster, and on which disk inside a node.
//!
//! There is no central map. Every process computes the same ring from the same node list, so all of this is exact to the
//! bit: node order, vnode counts with their single-precision rounding, hashes, and the walk that takes one node per zone
//! (spec 02, sections 2 to 10). Pure functions and immutable values: a [`Ring`] is built once per epoch and shared.
//!
//! * [`Ring`]: object id to nodes; the position in its answer is the copy or strip index.
//! * [`DiskRing`]: object id to disk of one node.
//! * [`Weights`]: where the vnode counts of a ring come from.

mod disks;
mod points;
mod ring;
mod weights;

pub use disks::{Disk, DiskRing, MAX_DISKS, disk_hash, disk_path};
pub use ring::{Homes, NodeDisk, Ring};
pub use weights::{DEFAULT_VNODES, Weights};

/// Why no ring can be built. Lists of a working cluster never give one; they come from damaged or hostile input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// More nodes than a cluster can have.
    #[error("{0} nodes in a list, a cluster has at most {max}", max = sheepdog_proto::MAX_NODES)]
    TooManyNodes(usize),
    /// More disks than a node can have.
    #[error("{0} disks on a node, at most {MAX_DISKS} are possible")]
    TooManyDisks(usize),
    /// Weights or disk sizes that add up to a ring which does not fit the memory.
    #[error("{0} ring points asked for by weights or disk sizes, at most {max} are possible", max = points::MAX_POINTS)]
    TooManyPoints(u64),
}
