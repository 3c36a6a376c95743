//! Offsets of `cluster.json`, the files of `store.json`, the records of `vdi-misc.json`, redundancy texts of
//! `erasure.json`, and the worked examples for ledgers and index nodes.

mod common;

use std::collections::HashMap;

use common::{list, load, number, text, unhex};
use sheepdog_proto::admin::RecoveryThrottling;
use sheepdog_proto::btree::{
    BTREE_MAGIC, BTREE_NODE_LEN, BtreeHeader, BtreeNode, InnerEntry, LeafEntry, MAX_LEAF_ENTRIES,
};
use sheepdog_proto::cluster::{CLUSTER_INFO_LEN, ClusterInfoHeader, EpochRecord};
use sheepdog_proto::config::{EpochLog, StoreConfig};
use sheepdog_proto::ledger::{LEDGER_SLOTS, Ledger};
use sheepdog_proto::message::MESSAGE_HEADER_LEN;
use sheepdog_proto::redundancy::{format_copies, parse_copies};
use sheepdog_proto::vdi_state::UNLOCKED;
use sheepdog_proto::{CopyPolicy, NodeId, NodeRecord, Oid, VdiId, VdiState, Wire, cstr};

fn ones<T: Wire>() -> T {
    T::get(&vec![0xff; T::SIZE])
}

/// Bytes of a structure of which only one field is set.
macro_rules! only {
    ($ty:ident, $field:ident) => {{
        let value = $ty { $field: ones(), ..$ty::zeroed() };
        (stringify!($field), value.encode())
    }};
}

#[test]
fn fields_lie_where_the_original_has_them() {
    let vectors = load("cluster.json");
    let mut offsets = HashMap::new();
    let mut sizes = HashMap::new();
    for line in list(&vectors["offsets"]) {
        let words: Vec<&str> = line.as_str().expect("line").split_whitespace().collect();
        match words[..] {
            ["==", name, "size", size] => drop(sizes.insert(name, size.parse::<usize>().expect("size"))),
            [name, field, "off", off, "size", size] => {
                let range = (off.parse::<usize>().expect("off"), size.parse::<usize>().expect("size"));
                offsets.insert((name, field), range);
            }
            _ => {}
        }
    }
    assert_eq!(sizes["node_id"], NodeId::SIZE);
    assert_eq!(sizes["sd_node"], NodeRecord::LEN);
    assert_eq!(sizes["cluster_info"], CLUSTER_INFO_LEN);
    assert_eq!(offsets[&("cluster_info", "nodes")].0, ClusterInfoHeader::LEN);
    assert_eq!(sizes["epoch_log"], EpochRecord::LEN);
    assert_eq!(sizes["vdi_op_message"], MESSAGE_HEADER_LEN);
    assert_eq!(sizes["vdi_state"], VdiState::LEN);
    assert_eq!(sizes["recovery_throttling"], RecoveryThrottling::LEN);
    assert_eq!(sizes["sheepdog_config"], StoreConfig::LEN);

    let fields = [
        ("node_id", only!(NodeId, addr)),
        ("node_id", only!(NodeId, port)),
        ("node_id", only!(NodeId, io_addr)),
        ("node_id", only!(NodeId, io_port)),
        ("sd_node", only!(NodeRecord, nr_vnodes)),
        ("sd_node", only!(NodeRecord, zone)),
        ("sd_node", only!(NodeRecord, space)),
        ("cluster_info", only!(ClusterInfoHeader, proto_ver)),
        ("cluster_info", only!(ClusterInfoHeader, disable_recovery)),
        ("cluster_info", only!(ClusterInfoHeader, nr_nodes)),
        ("cluster_info", only!(ClusterInfoHeader, epoch)),
        ("cluster_info", only!(ClusterInfoHeader, ctime)),
        ("cluster_info", only!(ClusterInfoHeader, flags)),
        ("cluster_info", only!(ClusterInfoHeader, nr_copies)),
        ("cluster_info", only!(ClusterInfoHeader, copy_policy)),
        ("cluster_info", only!(ClusterInfoHeader, block_size_shift)),
        ("cluster_info", only!(ClusterInfoHeader, default_store)),
        ("epoch_log", only!(EpochRecord, ctime)),
        ("epoch_log", only!(EpochRecord, time)),
        ("epoch_log", only!(EpochRecord, epoch)),
        ("epoch_log", only!(EpochRecord, nr_nodes)),
        ("epoch_log", only!(EpochRecord, disable_recovery)),
        ("epoch_log", only!(EpochRecord, nr_copies)),
        ("epoch_log", only!(EpochRecord, copy_policy)),
        ("epoch_log", only!(EpochRecord, flags)),
        ("epoch_log", { ("drv_name", only!(EpochRecord, store).1) }),
        ("vdi_state", only!(VdiState, vid)),
        ("vdi_state", only!(VdiState, nr_copies)),
        ("vdi_state", only!(VdiState, snapshot)),
        ("vdi_state", only!(VdiState, deleted)),
        ("vdi_state", only!(VdiState, copy_policy)),
        ("vdi_state", only!(VdiState, block_size_shift)),
        ("vdi_state", only!(VdiState, parent_vid)),
        ("vdi_state", only!(VdiState, lock_state)),
        ("vdi_state", only!(VdiState, lock_owner)),
        ("vdi_state", only!(VdiState, nr_participants)),
        ("vdi_state", only!(VdiState, participants_state)),
        ("vdi_state", only!(VdiState, participants)),
        ("recovery_throttling", only!(RecoveryThrottling, max_exec_count)),
        ("recovery_throttling", only!(RecoveryThrottling, queue_work_interval)),
        ("recovery_throttling", only!(RecoveryThrottling, throttling)),
        ("sheepdog_config", only!(StoreConfig, ctime)),
        ("sheepdog_config", only!(StoreConfig, flags)),
        ("sheepdog_config", only!(StoreConfig, copies)),
        ("sheepdog_config", only!(StoreConfig, default_store)),
        ("sheepdog_config", only!(StoreConfig, shutdown)),
        ("sheepdog_config", only!(StoreConfig, copy_policy)),
        ("sheepdog_config", only!(StoreConfig, block_size_shift)),
        ("sheepdog_config", only!(StoreConfig, version)),
        ("sheepdog_config", only!(StoreConfig, space)),
    ];
    for (name, (field, bytes)) in fields {
        let (off, size) = offsets[&(name, field)];
        let first = bytes.iter().position(|b| *b != 0);
        let last = bytes.iter().rposition(|b| *b != 0);
        assert_eq!(first, Some(off), "{name}.{field} starts elsewhere");
        // Padding at the end of a field (high byte of a vid, tail of a node id) stays zero.
        let end = last.map_or(0, |l| l + 1);
        assert!(end <= off + size && end + 4 >= off + size, "{name}.{field} ends at {end}");
    }
    // "status off: 20": the one field whose offset the original prints apart.
    assert_eq!(only!(ClusterInfoHeader, status).1[20], 0xff);
    assert_eq!(only!(NodeRecord, nid).1[24], 0xff);
    assert_eq!(offsets[&("sd_node", "nid")].0, 24);
}

#[test]
fn config_files_are_decoded_and_written_bit_for_bit() {
    let vectors = load("store.json");
    let cases = list(&vectors["config"]);
    assert!(cases.len() >= 6);
    for v in cases {
        let bytes = unhex(text(v, "hex"));
        let config = StoreConfig::decode(&bytes).expect("config");
        assert_eq!(config.encode(), bytes, "{v}");
        let d = &v["decoded"];
        assert_eq!(config.ctime, number(d, "ctime"), "{v}");
        assert_eq!(u64::from(config.flags.0), number(d, "flags"), "{v}");
        assert_eq!(u64::from(config.copies), number(d, "copies"), "{v}");
        assert_eq!(cstr(&config.default_store), text(d, "default_store").as_bytes(), "{v}");
        assert_eq!(u64::from(config.shutdown), number(d, "shutdown"), "{v}");
        assert_eq!(u64::from(config.copy_policy), number(d, "copy_policy"), "{v}");
        assert_eq!(u64::from(config.block_size_shift), number(d, "block_size_shift"), "{v}");
        assert_eq!(u64::from(config.version), number(d, "version"), "{v}");
        assert_eq!(config.space, number(d, "space"), "{v}");
    }
}

#[test]
fn epoch_files_are_decoded_and_written_bit_for_bit() {
    let vectors = load("store.json");
    let cases = list(&vectors["epoch"]);
    assert!(cases.len() >= 4);
    for v in cases {
        let bytes = unhex(text(v, "hex"));
        let log = EpochLog::decode(&bytes).expect("epoch");
        assert_eq!(log.encode(), bytes, "{v}");
        assert_eq!(log.time as u64, number(&v["decoded"], "time"));
        let nodes = list(&v["decoded"]["nodes"]);
        assert_eq!(log.nodes.len(), nodes.len());
        for (node, d) in log.nodes.iter().zip(nodes) {
            assert_eq!(node.nid.addr.to_vec(), unhex(text(d, "addr")));
            assert_eq!(u64::from(node.nid.port), number(d, "port"));
            assert_eq!(u64::from(node.nr_vnodes), number(d, "nr_vnodes"));
            assert_eq!(u64::from(node.zone), number(d, "zone"));
            assert_eq!(node.space, number(d, "space"));
        }
    }
    assert!(EpochLog::decode(&[0; 7]).is_err());
    assert!(EpochLog::decode(&[0; 100]).is_err(), "a length that no epoch has");
}

#[test]
fn vdi_state_records_say_what_the_original_means() {
    let misc = load("vdi-misc.json");
    let records: Vec<VdiState> = list(&misc["vdi_state_records"]["records"])
        .iter()
        .map(|hex| {
            let mut bytes = unhex(hex.as_str().expect("record"));
            bytes.resize(VdiState::LEN, 0);
            let state = VdiState::decode(&bytes).expect("record");
            assert_eq!(state.encode(), bytes);
            state
        })
        .collect();
    let seen: Vec<_> = records.iter().map(|s| (s.vid.get(), s.snapshot, s.parent_vid.get())).collect();
    assert_eq!(seen, [(0x7c2b25, 1, 0), (0x7c2b26, 1, 0x7c2b25), (0x7c2b27, 0, 0x7c2b26)]);
    for s in &records {
        assert_eq!((s.nr_copies, s.block_size_shift, s.lock_state, s.deleted), (3, 22, UNLOCKED, 0));
    }
}

/// Numbers above 255, which the original cuts to eight bits and spec 02, section 12 lets us refuse.
fn is_cut_by_the_original(text: &str) -> bool {
    text.split(':').take(2).any(|f| f.parse::<u64>().is_ok_and(|n| n > 255))
}

#[test]
fn redundancy_texts_are_read_as_the_original_reads_them() {
    let vectors = load("erasure.json");
    let cases = list(&vectors["copies_text"]);
    assert!(cases.len() >= 59);
    let mut refused = 0;
    for v in cases {
        let input = text(v, "text");
        let expected = (number(v, "copies") != 0).then(|| {
            let policy = CopyPolicy::from_byte(number(v, "policy") as u8).expect("policy");
            (number(v, "copies") as u8, policy)
        });
        if is_cut_by_the_original(input) {
            refused += 1;
            assert_eq!(parse_copies(input), None, "{input:?} is refused, not truncated");
        } else {
            assert_eq!(parse_copies(input), expected, "{input:?}");
        }
    }
    assert_eq!(refused, 12, "the list of deviations");
    assert_eq!(format_copies(6, 0x22), "4:2");
    assert_eq!(format_copies(3, 0), "3");
}

#[test]
fn every_policy_byte_is_valid_or_refused() {
    let valid: Vec<u8> = (0..=255).filter(|b| CopyPolicy::from_byte(*b).is_ok()).collect();
    assert_eq!(valid.len(), 1 + 4 * 15);
    for byte in valid {
        let policy = CopyPolicy::from_byte(byte).expect("valid");
        assert_eq!(policy.to_byte(), byte);
        if byte != 0 {
            assert_eq!(CopyPolicy::erasure(policy.data_strips(), policy.parity_strips()), Some(policy));
        }
    }
}

fn ledger_after(drops: &[(u32, u32)]) -> Vec<Vec<i32>> {
    let mut ledger = Ledger::absent();
    drops
        .iter()
        .map(|(generation, count)| {
            assert!(ledger.drop_reference(*generation, *count));
            assert_eq!(Ledger::decode(&ledger.encode()), ledger);
            ledger.slots().to_vec()
        })
        .collect()
}

/// The table of spec 05, section 10: one object, two snapshots, one clone, dropped in both orders.
#[test]
fn a_ledger_reaches_zero_with_the_last_reference_in_any_order() {
    let (base, first, second, clone) = ((0, 1), (1, 2), (2, 0), (2, 0));
    assert_eq!(
        ledger_after(&[clone, base, first, second]),
        [vec![1, 0, -1], vec![0, 1, -1], vec![0, 0, 1], vec![]]
    );
    assert_eq!(
        ledger_after(&[clone, second, first, base]),
        [vec![1, 0, -1], vec![1, 0, -2], vec![1, -1], vec![]]
    );
}

#[test]
fn a_ledger_bounds_its_generations() {
    let mut ledger = Ledger::absent();
    for generation in [LEDGER_SLOTS as u32 - 1, LEDGER_SLOTS as u32, i32::MAX as u32, u32::MAX] {
        assert!(!ledger.drop_reference(generation, 1), "{generation}");
        assert_eq!(ledger, Ledger::absent());
    }
    assert!(ledger.drop_reference(LEDGER_SLOTS as u32 - 2, u32::MAX), "counters wrap");
    assert!(!ledger.is_zero());
}

/// Spec 01, section 13: a fresh root, a leaf and an inner node.
#[test]
fn index_nodes_have_the_layout_of_the_original() {
    let fresh = BtreeNode::Leaf(vec![]);
    assert_eq!(fresh.encode(), unhex("7462010000000000"));
    assert_eq!(BtreeNode::decode(&fresh.encode()), fresh);

    let leaf =
        BtreeNode::Leaf(vec![LeafEntry { idx: 5, vdi_id: 0x7c2b25 }, LeafEntry { idx: 9, vdi_id: 0x7c2b26 }]);
    assert_eq!(
        leaf.encode(),
        unhex("7462010002000000050000 00252b7c0009000000262b7c00".replace(' ', "").as_str())
    );
    assert_eq!(BtreeNode::decode(&leaf.encode()), leaf);

    let inner = BtreeNode::Inner(vec![InnerEntry { idx: 9, oid: Oid::btree(VdiId::new(0x7c2b25), 1) }]);
    assert_eq!(
        inner.encode(),
        unhex("74620200010000000900000000000000 01000000252b7c10".replace(' ', "").as_str())
    );
    assert_eq!(BtreeNode::decode(&inner.encode()), inner);
}

/// Nodes that the HTTP service of the original wrote (`http.json`).
#[test]
fn captured_index_nodes_decode() {
    let vectors = load("http.json");
    let trees = vectors["inode_btree"].as_object().expect("trees");
    assert!(trees.len() >= 4);
    for (name, v) in trees {
        let bytes = unhex(text(v, "bytes_4664_hex"));
        let BtreeNode::Leaf(entries) = BtreeNode::decode(&bytes) else { panic!("{name}: not a leaf") };
        let header = BtreeHeader::decode(&bytes).expect("header");
        assert_eq!((header.magic, header.depth), (BTREE_MAGIC, 1), "{name}");
        assert!(!entries.is_empty() && entries.is_sorted_by_key(|e| e.idx), "{name}: {entries:?}");
        let whole = entries.len() == header.entries as usize;
        assert!(whole || bytes.len() < BtreeHeader::LEN + header.entries as usize * LeafEntry::LEN, "{name}");
    }
}

#[test]
fn an_index_node_never_claims_more_entries_than_it_has_bytes() {
    let mut bytes = BtreeHeader { magic: BTREE_MAGIC, depth: 1, entries: u32::MAX }.encode();
    bytes.extend([1; 24]);
    assert_eq!(
        BtreeNode::decode(&bytes),
        BtreeNode::Leaf(vec![LeafEntry { idx: 0x0101_0101, vdi_id: 0x0101_0101 }; 3])
    );
    assert_eq!(BtreeNode::decode(&[0xff; 64]), BtreeNode::Leaf(vec![]), "wrong magic: empty");
    bytes.resize(BTREE_NODE_LEN + 64, 1);
    let BtreeNode::Leaf(entries) = BtreeNode::decode(&bytes) else { panic!("not a leaf") };
    assert!(entries.len() <= MAX_LEAF_ENTRIES, "{} entries in one node", entries.len());
}
