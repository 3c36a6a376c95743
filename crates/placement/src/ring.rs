//! The node ring: which nodes hold an object (spec 02, sections 2, 3, 5 to 7 and 9).

use sheepdog_proto::hash::{fnv1a64, hash_oid};
use sheepdog_proto::{MAX_COPIES, MAX_NODES, NodeId, NodeRecord, Oid};

use crate::points::Points;
use crate::{Error, Weights};

/// Ring space of one point of a disk in a cluster of disk vnodes: 4 GiB.
const DISK_VNODE_SPACE: u64 = 1 << 32;

/// The members of one epoch and the ring they form. Immutable; build once per membership change and share.
///
/// Nodes are referred to by their index in node order, the order of node lists on the wire.
#[derive(Debug, Clone)]
pub struct Ring {
    nodes: Box<[NodeRecord]>,
    /// Dense number of the zone of each node: its rank among the zone values of all nodes.
    zones: Box<[u16]>,
    nr_dense_zones: usize,
    nr_zones: usize,
    points: Points<u16>,
}

/// A disk in the node record of a cluster of disk vnodes (spec 02, 4.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeDisk {
    /// [`crate::disk_hash`] of its path; 0 = unused entry.
    pub id: u64,
    /// Its size in bytes.
    pub space: u64,
}

impl Ring {
    /// The ring of `nodes`, in any order. Of records with equal identity the first counts. [`Ring::nodes`] then has the
    /// effective vnode counts.
    pub fn new(nodes: impl Into<Vec<NodeRecord>>, weights: Weights) -> Result<Self, Error> {
        let mut nodes = in_node_order(nodes.into(), |node| node.nid)?;
        weights.apply(&mut nodes);
        let chains = nodes.iter().map(|node| (node.nid.ring_seed(), u64::from(node.nr_vnodes)));
        let points = Points::from_chains((0..).zip(chains).map(|(i, (seed, count))| (i, seed, count)))?;
        Ok(Self::assemble(nodes, points))
    }

    /// The ring of a cluster of disk vnodes: points come from the disks of the nodes, and the vnode count of each node
    /// becomes their number (spec 02, 5.3).
    pub fn of_disks(nodes: impl Into<Vec<(NodeRecord, Vec<NodeDisk>)>>) -> Result<Self, Error> {
        let mut nodes = in_node_order(nodes.into(), |(node, _)| node.nid)?;
        let count = |disk: &NodeDisk| disk.space.div_ceil(DISK_VNODE_SPACE);
        for (node, disks) in &mut nodes {
            disks.retain(|disk| disk.id != 0);
            node.nr_vnodes = disks.iter().map(count).fold(0, u64::wrapping_add) as u16;
        }
        let chains = (0..).zip(&nodes).flat_map(|(i, (node, disks))| {
            let seed = node.nid.ring_seed().to_le_bytes();
            disks.iter().map(move |disk| (i, fnv1a64(&seed, disk.id), count(disk)))
        });
        let points = Points::from_chains(chains)?;
        Ok(Self::assemble(nodes.into_iter().map(|(node, _)| node).collect(), points))
    }

    fn assemble(nodes: Vec<NodeRecord>, points: Points<u16>) -> Self {
        let mut known: Vec<u32> = nodes.iter().map(|node| node.zone).collect();
        known.sort_unstable();
        known.dedup();
        let dense = |zone: u32| known.partition_point(|&other| other < zone) as u16;
        let zones: Box<[u16]> = nodes.iter().map(|node| dense(node.zone)).collect();
        let mut storing: Vec<u16> =
            nodes.iter().zip(&zones).filter(|(node, _)| node.nr_vnodes != 0).map(|(_, &zone)| zone).collect();
        storing.sort_unstable();
        storing.dedup();
        Self {
            nr_zones: storing.len().min(MAX_COPIES),
            nr_dense_zones: known.len(),
            nodes: nodes.into(),
            zones,
            points,
        }
    }

    /// The nodes in node order, with effective vnode counts.
    pub fn nodes(&self) -> &[NodeRecord] {
        &self.nodes
    }

    /// Index of a node in [`Ring::nodes`].
    pub fn index_of(&self, node: &NodeId) -> Option<u16> {
        self.nodes.binary_search_by(|other| other.nid.cmp(node)).ok().map(|i| i as u16)
    }

    /// Number of zones that hold data, at most 31: the most copies of an object there can be. 0 if no node stores anything.
    pub fn nr_zones(&self) -> usize {
        self.nr_zones
    }

    /// Number of ring points.
    pub fn len(&self) -> usize {
        self.points.len()
    }

    /// Whether no node stores anything.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The ring points, (hash, node index), in ascending order.
    pub fn points(&self) -> impl ExactSizeIterator<Item = (u64, u16)> + '_ {
        self.points.iter()
    }

    /// Number of points left out because another point had the same hash: worth an error in the log, since the original
    /// would have stopped (spec 02, 4.3).
    pub fn collisions(&self) -> usize {
        self.points.collisions()
    }

    /// Number of copies a client request works on (spec 02, section 7): what it asks for, or the volume's if it asks for
    /// none, limited by the zones.
    pub fn copies(&self, requested: u8, volume: u8) -> usize {
        usize::from(if requested != 0 { requested } else { volume }).min(self.nr_zones)
    }

    /// The nodes that hold an object of `copies` copies or strips, by index; the position is the copy or strip index.
    ///
    /// Never more than [`Ring::nr_zones`], so the list is shorter where zones are missing. At most one node per zone. The
    /// list for fewer copies is a prefix of that for more. Does not allocate.
    #[inline]
    pub fn homes(&self, oid: Oid, copies: usize) -> Homes {
        let mut homes = Homes::default();
        let wanted = copies.min(self.nr_zones);
        if wanted == 0 {
            return homes;
        }
        // Bit `zone % 64` of the zones chosen: exact up to 64 zones, beyond that a hint to be confirmed.
        let mut chosen = 0u64;
        for node in self.points.walk(hash_oid(oid)) {
            let zone = self.zones[usize::from(node)];
            let bit = 1 << (zone & 63);
            if chosen & bit != 0 && (self.nr_dense_zones <= 64 || self.holds_zone(&homes, zone)) {
                continue;
            }
            chosen |= bit;
            homes.nodes[usize::from(homes.len)] = node;
            homes.len += 1;
            if usize::from(homes.len) == wanted {
                break;
            }
        }
        homes
    }

    fn holds_zone(&self, homes: &Homes, zone: u16) -> bool {
        homes.iter().any(|&node| self.zones[usize::from(node)] == zone)
    }

    /// The records of [`Ring::homes`], in its order.
    pub fn nodes_of(&self, oid: Oid, copies: usize) -> impl Iterator<Item = &NodeRecord> {
        let homes = self.homes(oid, copies);
        (0..homes.len()).map(move |i| &self.nodes[usize::from(homes[i])])
    }

    /// Copy or strip index of a node for an object; none if the object is not the node's.
    pub fn position(&self, oid: Oid, copies: usize, node: u16) -> Option<usize> {
        self.homes(oid, copies).position(node)
    }

    /// Whether a file of an object is where it belongs on `node`: any position for a replica, exactly position `strip` for
    /// a strip. Other files are stale (spec 02, section 9).
    pub fn owns(&self, oid: Oid, copies: usize, node: u16, strip: Option<u8>) -> bool {
        let position = self.position(oid, copies, node);
        match strip {
            None => position.is_some(),
            Some(strip) => position == Some(strip.into()),
        }
    }
}

/// Sorts into node order and drops all but the first of records with equal identity.
fn in_node_order<T>(mut nodes: Vec<T>, id: impl Fn(&T) -> NodeId) -> Result<Vec<T>, Error> {
    if nodes.len() > MAX_NODES {
        return Err(Error::TooManyNodes(nodes.len()));
    }
    nodes.sort_by_key(&id);
    nodes.dedup_by_key(|node| id(node));
    Ok(nodes)
}

/// The nodes of one object, as indexes into [`Ring::nodes`]; a slice with inline storage.
#[derive(Clone, Copy)]
pub struct Homes {
    len: u8,
    nodes: [u16; MAX_COPIES],
}

impl Homes {
    /// Copy or strip index of a node.
    pub fn position(&self, node: u16) -> Option<usize> {
        self.iter().position(|&other| other == node)
    }
}

impl Default for Homes {
    fn default() -> Self {
        Self { len: 0, nodes: [0; MAX_COPIES] }
    }
}

impl std::ops::Deref for Homes {
    type Target = [u16];

    fn deref(&self) -> &[u16] {
        &self.nodes[..usize::from(self.len)]
    }
}

impl PartialEq for Homes {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Homes {}

impl std::fmt::Debug for Homes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests;
