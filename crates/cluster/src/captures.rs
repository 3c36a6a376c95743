//! Reading the captured messages of the original (`tests/vectors/cluster.json`), for the drivers' tests.

use serde_json::Value;
use sheepdog_proto::{ClusterInfo, NodeRecord};

/// The whole file.
pub fn vectors() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/vectors/cluster.json");
    serde_json::from_slice(&std::fs::read(path).expect("vector file")).expect("JSON")
}

/// Bytes of hexadecimal text.
pub fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).expect("hex")).collect()
}

/// A number of hexadecimal text.
pub fn hex(value: &Value) -> u64 {
    u64::from_str_radix(value.as_str().expect("hex text").trim_start_matches("0x"), 16).expect("hex")
}

/// A number.
pub fn num(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// A buffer of which the file has the runs that are not zero.
pub fn captured(event: &Value, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    for segment in event["segments"].as_array().expect("segments") {
        let (off, data) = (num(&segment["off"]) as usize, unhex(segment["hex"].as_str().expect("hex")));
        bytes[off..off + data.len()].copy_from_slice(&data);
    }
    bytes
}

/// Compares a node with its description.
pub fn check_node(got: &NodeRecord, want: &Value) {
    assert_eq!(got.nid.socket_addr().ip().to_string(), want["addr"].as_str().expect("addr"));
    assert_eq!(u64::from(got.nid.port), num(&want["port"]));
    assert_eq!(u64::from(got.nid.io_port), num(&want["io_port"]));
    assert_eq!(u64::from(got.nr_vnodes), num(&want["nr_vnodes"]));
    assert_eq!(u64::from(got.zone), num(&want["zone"]));
    assert_eq!(got.space, num(&want["space"]));
}

/// Compares nodes with their descriptions.
pub fn check_nodes(got: &[NodeRecord], want: &Value) {
    let want = want.as_array().expect("a list");
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).for_each(|(got, want)| check_node(got, want));
}

/// Compares a cluster info with its description.
pub fn check_info(got: &ClusterInfo, want: &Value) {
    let h = &got.header;
    assert_eq!(u64::from(h.proto_ver), num(&want["proto_ver"]));
    assert_eq!(u64::from(h.disable_recovery), num(&want["disable_recovery"]));
    assert_eq!(got.nodes.len() as u64, num(&want["nr_nodes"]));
    assert_eq!(u64::from(h.epoch.0), num(&want["epoch"]));
    assert_eq!(h.ctime, hex(&want["ctime"]));
    assert_eq!(u64::from(h.flags.0), hex(&want["flags"]));
    assert_eq!(u64::from(h.nr_copies), num(&want["nr_copies"]));
    assert_eq!(u64::from(h.copy_policy), num(&want["copy_policy"]));
    assert_eq!(u64::from(h.status), num(&want["status"]));
    assert_eq!(u64::from(h.block_size_shift), num(&want["block_size_shift"]));
    let store = sheepdog_proto::cstr(&h.default_store);
    assert_eq!(store, want["default_store"].as_str().expect("name").as_bytes());
    check_nodes(&got.nodes, &want["nodes"]);
}
