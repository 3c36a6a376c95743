//! Where objects live, computed from a node list (spec 02, sections 5 and 6).

use sheepdog_proto::hash::{hash_oid, next_hash};
use sheepdog_proto::{NodeRecord, Oid};

/// Number of distinct zones of the nodes that hold data.
pub fn zones(nodes: &[NodeRecord]) -> usize {
    let mut zones: Vec<u32> = nodes.iter().filter(|n| n.nr_vnodes != 0).map(|n| n.zone).collect();
    zones.sort_unstable();
    zones.dedup();
    zones.len().min(sheepdog_proto::MAX_COPIES)
}

/// The consistent-hashing ring of one epoch.
pub struct Ring<'a> {
    nodes: &'a [NodeRecord],
    /// Points ascending: position and index of the node.
    points: Vec<(u64, usize)>,
}

impl<'a> Ring<'a> {
    /// The ring of a node list.
    pub fn new(nodes: &'a [NodeRecord]) -> Ring<'a> {
        let mut points = Vec::new();
        for (index, node) in nodes.iter().enumerate() {
            let mut hash = node.nid.ring_seed();
            for _ in 0..node.nr_vnodes {
                hash = next_hash(hash);
                points.push((hash, index));
            }
        }
        points.sort_unstable();
        Ring { nodes, points }
    }

    /// Indexes of the nodes of an object's first `copies` copies, one per zone; fewer where there are fewer zones.
    pub fn nodes_of(&self, oid: Oid, copies: usize) -> Vec<usize> {
        let start = self.points.partition_point(|(hash, _)| *hash < hash_oid(oid));
        let mut chosen: Vec<usize> = Vec::new();
        let order = self.points[start..].iter().chain(&self.points[..start]);
        for (_, index) in order {
            if chosen.len() == copies {
                break;
            }
            if chosen.iter().all(|c| self.nodes[*c].zone != self.nodes[*index].zone) {
                chosen.push(*index);
            }
        }
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sheepdog_proto::NodeId;

    fn node(port: u16, zone: u32) -> NodeRecord {
        let nid = NodeId::new([127, 0, 0, 1].into(), port);
        NodeRecord { nid, nr_vnodes: 64, zone, space: 1 << 30 }
    }

    #[test]
    fn captured_locations_are_found_again() {
        let nodes: Vec<NodeRecord> = (0..6).map(|i| node(7700 + i, i.into())).collect();
        let ring = Ring::new(&nodes);
        assert_eq!(ring.nodes_of(Oid(0x80a0_3911_0000_0000), 3), [3, 0, 4]);
        assert_eq!(ring.nodes_of(Oid(0x00a0_3907_0000_0000), 3), [2, 0, 5]);
        assert_eq!(ring.nodes_of(Oid(0x0039_33f9_0000_0000), 6), [0, 2, 5, 3, 1, 4]);
    }

    #[test]
    fn fewer_zones_than_copies_give_a_shorter_list() {
        let nodes = [node(7700, 1), node(7701, 1), node(7702, 2)];
        assert_eq!(Ring::new(&nodes).nodes_of(Oid(1), 3).len(), 2);
        assert_eq!(zones(&nodes), 2);
        assert!(Ring::new(&[]).nodes_of(Oid(1), 3).is_empty());
    }
}
