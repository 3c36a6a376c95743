//! Rings and placements against `tests/vectors/placement.json` and `md.json`, which the original's own code and a running
//! cluster of it produced.

use serde_json::Value;
use sheepdog_placement::{Disk, DiskRing, NodeDisk, Ring, Weights, disk_hash, disk_path};
use sheepdog_proto::hash::{FNV_INIT, fnv1a64, hash_oid, next_hash, sd_hash};
use sheepdog_proto::{NodeId, NodeRecord, Oid};
use std::net::IpAddr;
use std::path::Path;

fn vectors(file: &str) -> Value {
    let path = format!("{}/../../tests/vectors/{file}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_slice(&std::fs::read(path).expect("vectors are in the repository")).expect("valid JSON")
}

fn array<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    let list = value[key].as_array().unwrap_or_else(|| panic!("{key} is an array"));
    assert!(!list.is_empty(), "{key}");
    list
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_else(|| panic!("{key} is a string"))
}

fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_else(|| panic!("{key} is a number"))
}

fn hash(value: &Value) -> u64 {
    u64::from_str_radix(value.as_str().expect("a hash is a string"), 16).expect("hex")
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).expect("hex")).collect()
}

fn pairs(list: &[Value]) -> Vec<(u64, u64)> {
    list.iter().map(|pair| (hash(&pair[0]), pair[1].as_u64().expect("an index"))).collect()
}

/// Length, first points and fold of a ring.
fn check_ring(set: &Value, points: Vec<(u64, u64)>) {
    let name = text(set, "name");
    assert_eq!(points.len() as u64, number(set, "ring_len"), "{name}");
    let head = pairs(array(set, "ring_head"));
    assert_eq!(points[..head.len()], head, "{name}");
    let fold = points.iter().fold(FNV_INIT, |fold, &(hash, owner)| {
        fnv1a64(&owner.to_le_bytes(), fnv1a64(&hash.to_le_bytes(), fold))
    });
    assert_eq!(fold, hash(&set["ring_fold"]), "{name}");
}

fn record(node: &Value) -> NodeRecord {
    let addr = unhex(text(node, "addr_hex")).try_into().expect("16 bytes");
    NodeRecord {
        nid: NodeId { addr, port: number(node, "port") as u16, ..NodeId::zeroed() },
        nr_vnodes: number(node, "nr_vnodes") as u16,
        zone: number(node, "zone") as u32,
        space: number(node, "space"),
    }
}

fn node_disks(node: &Value) -> Vec<NodeDisk> {
    let disk = |disk: &Value| NodeDisk { id: hash(&disk["disk_id"]), space: number(disk, "space") };
    array(node, "disks").iter().map(disk).collect()
}

#[test]
fn hashes_match() {
    let vectors = vectors("placement.json");
    for case in array(&vectors, "hash_bytes") {
        let bytes = unhex(text(case, "hex"));
        assert_eq!(fnv1a64(&bytes, FNV_INIT), hash(&case["fnv1a"]));
        assert_eq!(sd_hash(&bytes), hash(&case["ring"]));
        assert_eq!(next_hash(sd_hash(&bytes)), hash(&case["ring_next"]));
    }
    for case in array(&vectors, "hash_oid") {
        assert_eq!(hash_oid(Oid(hash(&case["oid"]))), hash(&case["ring"]));
    }
}

#[test]
fn rings_and_objects_of_all_node_sets_match() {
    let vectors = vectors("placement.json");
    assert_eq!(array(&vectors, "sets").len(), 14);
    for set in array(&vectors, "sets") {
        let name = text(set, "name");
        let effective: Vec<NodeRecord> = array(set, "nodes").iter().map(record).collect();
        for (node, case) in effective.iter().zip(array(set, "nodes")) {
            assert_eq!(node.nid.ring_seed(), hash(&case["node_hash"]), "{name}");
            assert_eq!(node.nid.to_string(), text(case, "label"), "{name}");
        }
        let ring = build(set, &effective).expect("few nodes");
        assert_eq!(ring.nodes(), effective, "{name}: node order and effective counts");
        assert_eq!(ring.nr_zones() as u64, number(set, "nr_zones"), "{name}");
        assert_eq!(ring.collisions(), 0, "{name}");
        check_ring(set, ring.points().map(|(hash, node)| (hash, node.into())).collect());
        for object in array(set, "objects") {
            let oid = Oid(hash(&object[0]));
            let expected: Vec<u64> =
                object[1].as_array().expect("a list").iter().map(|i| i.as_u64().expect("an index")).collect();
            for copies in 1..=expected.len() {
                let homes: Vec<u64> = ring.homes(oid, copies).iter().map(|&i| i.into()).collect();
                assert_eq!(homes, expected[..copies], "{name} {oid}");
            }
            assert_eq!(ring.homes(oid, 31).len(), expected.len(), "{name} {oid}");
        }
    }
}

/// The ring from what the nodes announce: reversed order, and for weights from space not the effective counts.
fn build(set: &Value, effective: &[NodeRecord]) -> Result<Ring, sheepdog_placement::Error> {
    let mut announced: Vec<NodeRecord> = effective.to_vec();
    announced.reverse();
    if set["disk_mode"] == true {
        let disks = array(set, "nodes").iter().rev().map(node_disks);
        let nodes: Vec<_> =
            announced.into_iter().map(|n| NodeRecord { nr_vnodes: 128, ..n }).zip(disks).collect();
        return Ring::of_disks(nodes);
    }
    let auto = match text(set, "strategy") {
        "auto" => true,
        "fixed" => false,
        other => panic!("strategy {other}"),
    };
    if auto && announced.iter().any(|n| n.space != 0) {
        announced.iter_mut().for_each(|n| n.nr_vnodes = 128);
    }
    Ring::new(announced, if auto { Weights::FromSpace } else { Weights::Recorded })
}

#[test]
fn recomputing_effective_weights_changes_nothing() {
    let vectors = vectors("placement.json");
    let auto = array(&vectors, "sets").iter().filter(|s| s["strategy"] == "auto" && s["disk_mode"] == false);
    for set in auto {
        let mut nodes: Vec<NodeRecord> = array(set, "nodes").iter().map(record).collect();
        let effective = nodes.clone();
        Weights::FromSpace.apply(&mut nodes);
        assert_eq!(nodes, effective, "{}", text(set, "name"));
    }
}

#[test]
fn default_zones_match() {
    let vectors = vectors("placement.json");
    let sets = array(&vectors, "sets").iter().filter(|s| text(s, "name").contains("default_zone"));
    let nodes: Vec<NodeRecord> = sets.flat_map(|s| array(s, "nodes")).map(record).collect();
    assert!(!nodes.is_empty());
    for node in nodes {
        assert_eq!(node.nid.default_zone(), node.zone, "{}", node.nid);
    }
}

#[test]
fn a_running_cluster_of_the_original_agrees() {
    let vectors = vectors("placement.json");
    let nodes: Vec<NodeRecord> = (0..6)
        .map(|i| NodeRecord {
            nid: NodeId::new(IpAddr::from([127, 0, 0, 1]), 7200 + i),
            nr_vnodes: 128,
            zone: i.into(),
            space: 0,
        })
        .collect();
    let ring = Ring::new(nodes, Weights::Recorded).expect("few nodes");
    for live in array(&vectors, "live") {
        for object in array(live, "objects") {
            let oid = Oid(hash(&object[0]));
            let ports: Vec<u64> = ring.nodes_of(oid, 6).map(|n| n.nid.port.into()).collect();
            let expected: Vec<u64> =
                object[1].as_array().expect("a list").iter().map(|p| p.as_u64().expect("a port")).collect();
            assert_eq!(ports, expected, "{oid}");
        }
    }
}

#[test]
fn disk_rings_match() {
    let vectors = vectors("md.json");
    for set in array(&vectors, "sets") {
        let name = text(set, "name");
        let disks: Vec<Disk> = array(set, "disks")
            .iter()
            .map(|d| Disk { path: text(d, "path").into(), size: number(d, "space") })
            .collect();
        let mut typed: Vec<Disk> = disks
            .iter()
            .map(|d| Disk { path: disk_path(&d.path.join("")).to_owned(), size: d.size })
            .collect();
        typed.reverse();
        let ring = if set["disk_mode"] == true {
            let addr: IpAddr = text(set, "node_addr").parse().expect("an address");
            DiskRing::of_disk_mode(typed, &NodeId::new(addr, number(set, "node_port") as u16))
        } else {
            DiskRing::new(typed)
        }
        .expect("few disks");
        assert_eq!(ring.disks(), disks, "{name}");
        assert_eq!(disks.iter().map(|d| d.size).sum::<u64>(), number(set, "node_space"), "{name}");
        let mut counts = vec![0; disks.len()];
        ring.points().for_each(|(_, disk)| counts[usize::from(disk)] += 1);
        for (case, count) in array(set, "disks").iter().zip(counts) {
            assert_eq!(disk_hash(Path::new(text(case, "path"))), hash(&case["path_hash"]), "{name}");
            assert_eq!(count, number(case, "nr_vdisks"), "{name}");
        }
        check_ring(set, ring.points().map(|(hash, disk)| (hash, disk.into())).collect());
        for (oid, disk) in pairs(array(set, "objects")) {
            assert_eq!(ring.disk_of(Oid(oid)), Some(disk as usize), "{name} {oid:016x}");
        }
    }
}

#[test]
fn only_the_objects_of_a_removed_disk_move() {
    let vectors = vectors("md.json");
    let set =
        |name| array(&vectors, "sets").iter().find(|s| text(s, "name") == name).expect("the set exists");
    let (five, four) = (set("five_disks"), set("five_disks_minus_d2"));
    let path = |set: &Value, i: u64| text(&array(set, "disks")[i as usize], "path").to_owned();
    let mut moved = 0;
    for ((oid, before), (same, after)) in
        pairs(array(five, "objects")).into_iter().zip(pairs(array(four, "objects")))
    {
        assert_eq!(oid, same);
        if path(five, before) == "/d2" {
            moved += 1;
        } else {
            assert_eq!(path(five, before), path(four, after), "{oid:016x}");
        }
    }
    assert!(moved > 0);
}
