use super::*;
use proptest::prelude::*;
use std::net::IpAddr;

fn node(host: u8, port: u16, zone: u32, nr_vnodes: u16) -> NodeRecord {
    let nid = NodeId::new(IpAddr::from([10, 0, 0, host]), port);
    NodeRecord { nid, nr_vnodes, zone, space: 0 }
}

fn ring(nodes: Vec<NodeRecord>) -> Ring {
    Ring::new(nodes, Weights::Recorded).expect("few nodes")
}

#[test]
fn an_empty_ring_and_one_of_gateways_hold_nothing() {
    for ring in [ring(vec![]), ring(vec![node(1, 7000, 1, 0), node(2, 7000, 2, 0)])] {
        assert!(ring.is_empty());
        assert_eq!(ring.nr_zones(), 0);
        assert_eq!(ring.copies(3, 3), 0);
        assert!(ring.homes(Oid(1), 3).is_empty());
        assert_eq!(ring.nodes_of(Oid(1), 3).count(), 0);
    }
}

#[test]
fn copies_beyond_the_zones_give_the_shorter_list() {
    let ring = ring(vec![node(1, 7000, 1, 9), node(1, 7001, 1, 9), node(2, 7000, 2, 9), node(3, 7000, 3, 0)]);
    assert_eq!(ring.nr_zones(), 2, "the gateway's zone holds no data");
    assert_eq!(ring.homes(Oid(5), usize::MAX).len(), 2);
    assert_eq!(ring.copies(0, 3), 2);
    assert_eq!(ring.copies(1, 3), 1, "the request's number wins");
}

#[test]
fn nodes_are_kept_in_node_order_without_repetition() {
    let (a, b) = (node(9, 7000, 1, 1), node(10, 6999, 2, 1));
    let again = NodeRecord { zone: 7, ..a };
    let ring = ring(vec![b, a, again]);
    assert_eq!(ring.nodes(), [a, b]);
    assert_eq!((ring.index_of(&a.nid), ring.index_of(&b.nid)), (Some(0), Some(1)));
    assert_eq!(ring.index_of(&node(9, 7001, 1, 1).nid), None);
}

#[test]
fn a_strip_belongs_to_one_position_and_a_replica_to_any() {
    let ring = ring((1..=4).map(|i| node(i, 7000, i.into(), 20)).collect());
    let homes = ring.homes(Oid(77), 3);
    assert!(ring.owns(Oid(77), 3, homes[1], None));
    assert!(ring.owns(Oid(77), 3, homes[1], Some(1)));
    assert!(!ring.owns(Oid(77), 3, homes[1], Some(0)));
    let other = (0..4).find(|i| !homes.contains(i)).expect("four nodes, three copies");
    assert!(!ring.owns(Oid(77), 3, other, None));
    assert!(!ring.owns(Oid(77), 3, other, Some(0)));
}

#[test]
fn input_beyond_the_limits_is_refused() {
    let nodes = vec![node(1, 7000, 1, 1); MAX_NODES + 1];
    assert_eq!(Ring::new(nodes, Weights::Recorded).map(|r| r.len()), Err(Error::TooManyNodes(MAX_NODES + 1)));
    let disks = vec![NodeDisk { id: 1, space: u64::MAX }];
    assert_eq!(
        Ring::of_disks(vec![(node(1, 7000, 1, 1), disks)]).map(|r| r.len()),
        Err(Error::TooManyPoints(1 << 32))
    );
}

fn nodes() -> impl Strategy<Value = Vec<NodeRecord>> {
    let one = (1u8..=200, 7000u16..7003, prop_oneof![0u32..4, 0u32..40, 0u32..200], 0u16..20);
    prop::collection::vec(one, 1..120)
        .prop_map(|list| list.into_iter().map(|(host, port, zone, n)| node(host, port, zone, n)).collect())
}

/// The rule of spec 02, section 6, written down literally.
fn literal_walk(ring: &Ring, oid: Oid, n: usize) -> Vec<u16> {
    let points: Vec<(u64, u16)> = ring.points().collect();
    let start = points.iter().position(|&(hash, _)| hash >= hash_oid(oid)).unwrap_or(0);
    let mut out: Vec<u16> = Vec::new();
    for step in 0..points.len() {
        let node = points[(start + step) % points.len()].1;
        let zone = |i: u16| ring.nodes()[usize::from(i)].zone;
        if out.len() < n && !out.iter().any(|&other| zone(other) == zone(node)) {
            out.push(node);
        }
    }
    out
}

proptest! {
    #[test]
    fn homes_follow_the_literal_walk_with_one_node_per_zone(nodes in nodes(), oids in prop::collection::vec(any::<u64>(), 10)) {
        let ring = ring(nodes);
        for oid in oids.into_iter().map(Oid) {
            let all = ring.homes(oid, MAX_COPIES);
            prop_assert_eq!(all.len(), ring.nr_zones());
            prop_assert_eq!(&all[..], literal_walk(&ring, oid, ring.nr_zones()));
            let mut zones: Vec<u32> = ring.nodes_of(oid, MAX_COPIES).map(|n| n.zone).collect();
            zones.sort_unstable();
            zones.dedup();
            prop_assert_eq!(zones.len(), all.len());
            for copies in 0..=all.len() {
                prop_assert_eq!(&ring.homes(oid, copies)[..], &all[..copies], "prefix");
            }
            for (i, &node) in all.iter().enumerate() {
                prop_assert_eq!(ring.position(oid, MAX_COPIES, node), Some(i));
            }
        }
    }

    #[test]
    fn a_leaving_node_moves_only_its_own_copies(
        nodes in nodes(), leaver in any::<prop::sample::Index>(), oids in prop::collection::vec(any::<u64>(), 10),
        copies in 1usize..8,
    ) {
        let before = ring(nodes);
        let leaver = leaver.index(before.nodes().len());
        let mut rest = before.nodes().to_vec();
        let gone = rest.remove(leaver).nid;
        let after = ring(rest);
        for oid in oids.into_iter().map(Oid) {
            let old: Vec<NodeId> = before.nodes_of(oid, copies).map(|n| n.nid).collect();
            let new: Vec<NodeId> = after.nodes_of(oid, copies).map(|n| n.nid).collect();
            let lost = old.iter().position(|&n| n == gone);
            match lost {
                None => prop_assert_eq!(&old, &new),
                Some(at) => {
                    prop_assert_eq!(&old[..at], &new[..at]);
                    // Without a neighbour in its zone, the survivors keep their order and at most one node is new.
                    let zone = before.nodes()[leaver].zone;
                    if after.nodes().iter().all(|n| n.zone != zone) {
                        let survivors: Vec<NodeId> = old.iter().copied().filter(|&n| n != gone).collect();
                        prop_assert_eq!(&new[..survivors.len()], &survivors[..]);
                    }
                }
            }
        }
    }

    #[test]
    fn a_smaller_weight_keeps_a_prefix_of_the_points(count in 1u16..200, less in 0u16..200) {
        let less = less.min(count);
        let [large, small] = [count, less].map(|n| {
            ring(vec![node(1, 7000, 1, n)]).points().map(|(hash, _)| hash).collect::<std::collections::BTreeSet<_>>()
        });
        prop_assert!(small.is_subset(&large));
        prop_assert_eq!((small.len(), large.len()), (less.into(), count.into()));
    }
}
