//! How many vnodes a node has (spec 02, section 4).

use sheepdog_proto::{ClusterFlags, NodeRecord};

/// Vnodes a node of average space gets, and the count a node announces when weights follow space.
pub const DEFAULT_VNODES: u16 = 128;

/// Where the vnode counts of a ring come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weights {
    /// The counts in the node records: clusters of fixed weights, and tools, which get effective counts from sheep.
    Recorded,
    /// Recomputed from the space of all nodes, ignoring the recorded counts.
    FromSpace,
}

impl Weights {
    /// What a sheep of a cluster with these flags uses.
    pub fn of_cluster(flags: ClusterFlags) -> Self {
        if flags.contains(ClusterFlags::AUTO_VNODES) { Self::FromSpace } else { Self::Recorded }
    }

    /// Makes the counts in `nodes` the effective ones.
    pub fn apply(self, nodes: &mut [NodeRecord]) {
        if self == Self::FromSpace {
            weigh_by_space(nodes);
        }
    }
}

/// Spec 02, 4.2. Single precision and round-half-to-even are part of the definition. Space sums wrap as they do in the
/// original. Without any space the counts stay.
fn weigh_by_space(nodes: &mut [NodeRecord]) {
    let spaces = nodes.iter().map(|node| node.space).filter(|&space| space != 0);
    let (sum, count) = spaces.fold((0u64, 0u64), |(sum, n), space| (sum.wrapping_add(space), n + 1));
    if count == 0 {
        return;
    }
    let average = (sum / count) as f32;
    for node in nodes {
        let factor = node.space as f32 / average;
        node.nr_vnodes = (f32::from(DEFAULT_VNODES) * factor).round_ties_even() as i32 as u16;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(spaces: &[u64]) -> Vec<u16> {
        let mut nodes: Vec<NodeRecord> =
            spaces.iter().map(|&space| NodeRecord { space, nr_vnodes: 77, ..NodeRecord::zeroed() }).collect();
        Weights::of_cluster(ClusterFlags::AUTO_VNODES).apply(&mut nodes);
        nodes.iter().map(|node| node.nr_vnodes).collect()
    }

    #[test]
    fn space_gives_weights_around_128() {
        assert_eq!(counts(&[5, 5, 5]), [128; 3]);
        assert_eq!(counts(&[1 << 40, 3 << 40]), [64, 192]);
        assert_eq!(counts(&[0, 8, 8]), [0, 128, 128], "a gateway neither counts nor gets vnodes");
        assert_eq!(counts(&[1, 1023]), [0, 256], "a quarter of a vnode rounds to none");
        assert_eq!(counts(&[3, 509]), [2, 254], "1.5 rounds to the even 2");
    }

    #[test]
    fn without_space_or_in_a_fixed_cluster_the_counts_stay() {
        assert_eq!(counts(&[0, 0]), [77, 77]);
        let mut nodes = [NodeRecord { space: 9, nr_vnodes: 77, ..NodeRecord::zeroed() }];
        Weights::of_cluster(ClusterFlags::STRICT).apply(&mut nodes);
        assert_eq!(nodes[0].nr_vnodes, 77);
    }

    #[test]
    fn sums_that_overflow_do_not_panic() {
        assert_eq!(counts(&[u64::MAX, 1]).len(), 2);
        assert_eq!(counts(&[u64::MAX, u64::MAX]).len(), 2);
    }
}
