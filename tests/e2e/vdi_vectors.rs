//! The parts of `vdi-misc.json` that have no test of their own: state records, ids of attributes, the backup stream.

use std::io::Write;
use std::process::{Command, Stdio};

use sheepdog_proto::attr::{ATTR_LEN, AttrHeader};
use sheepdog_proto::{Flags, Oid, Opcode, Request, ResultCode, VdiId, VdiState, Wire, fixed_str, hash};
use sheepdog_testkit::vectors::{load, unhex};
use sheepdog_testkit::{Cluster, binaries};

/// `dog` at node 0; gives its standard output as bytes.
fn dog(cluster: &Cluster, args: &[&str], stdin: &[u8]) -> Vec<u8> {
    let mut child = Command::new(binaries::dog())
        .args(args)
        .args(["-a", "127.0.0.1", "-p", &cluster.nodes[0].port.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("dog");
    let mut input = child.stdin.take().expect("piped");
    input.write_all(stdin).expect("dog reads its input");
    drop(input);
    let output = child.wait_with_output().expect("dog ends");
    assert!(output.status.success(), "dog {args:?}: {output:?}");
    output.stdout
}

#[test]
fn the_state_table_is_answered_byte_by_byte_as_the_original_did() {
    let vectors = load("vdi-misc.json");
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    client.create_vdi("test", 16 << 20).expect("create");
    client.snapshot("test", "t1").expect("snapshot");
    client.snapshot("test", "t2").expect("snapshot");
    let records = vectors["vdi_state_records"]["records"].as_array().expect("records");
    for node in &cluster.nodes {
        let request = Request::new(Opcode::GET_VDI_COPIES).length(512 * VdiState::LEN);
        let (response, bytes) = node.client().must(request, &[]);
        assert_eq!((response.result, bytes.len()), (ResultCode::SUCCESS, records.len() * VdiState::LEN));
        for (mut found, record) in bytes.chunks(VdiState::LEN).map(<[u8]>::to_vec).zip(records) {
            found[9] = 0; // 1 until the node has heard that the VDI is made
            let expected = unhex(record.as_str().expect("hex"));
            assert_eq!(found[..expected.len()], expected, "node {}", node.index);
            assert!(found[expected.len()..].iter().all(|b| *b == 0), "node {}", node.index);
        }
        let small = Request::new(Opcode::GET_VDI_COPIES).length(2 * VdiState::LEN);
        assert_eq!(node.client().must(small, &[]).0.result, ResultCode::BUFFER_SMALL);
    }
}

#[test]
fn attributes_and_names_get_the_ids_of_the_original() {
    let vectors = load("vdi-misc.json");
    for (name, expected) in vectors["name_hash"].as_object().expect("hashes") {
        let found = format!("{:06x}", hash::name_hash(name.as_bytes()));
        assert_eq!(found, expected.as_str().expect("hex"), "{name}");
    }
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    for case in vectors["attr_id"].as_array().expect("attributes") {
        let text = |key: &str| case[key].as_str().expect("text");
        let snap_id = case["snap_id"].as_u64().expect("a number") as u32;
        let head = AttrHeader {
            name: fixed_str(text("name").as_bytes()),
            tag: fixed_str(text("tag").as_bytes()),
            key: fixed_str(text("key").as_bytes()),
            snap_id,
            ..AttrHeader::zeroed()
        };
        let name_hash = hash::name_hash(text("name").as_bytes());
        assert_eq!(format!("{:08x}", head.id()), text("attr_id"), "{case}");
        assert_eq!(Oid::attr(name_hash, head.id()).to_string(), text("oid"), "{case}");
        if !text("tag").is_empty() || snap_id != 0 {
            continue; // of snapshots that would have to be made first
        }
        if client.lookup(text("name"), "", 0).is_err() {
            client.create_vdi(text("name"), 4 << 20).expect("create");
        }
        let mut record = head.encode();
        record.resize(ATTR_LEN, 0);
        let flags = Flags::WRITE.with(Flags::ATTR_CREAT);
        let response =
            client.must(Request::new(Opcode::GET_VDI_ATTR).flag(flags).length(ATTR_LEN), &record).0;
        let body = response.vdi();
        assert_eq!(
            (response.result, format!("{:08x}", body.attr_id), body.vdi_id),
            (ResultCode::SUCCESS, text("attr_id").to_string(), VdiId::new(name_hash)),
            "{case}"
        );
        assert_eq!(cluster.holders(Oid(u64::from_str_radix(text("oid"), 16).expect("hex"))), [0, 1, 2]);
    }
}

#[test]
fn the_backup_stream_is_the_originals_and_restores_to_the_same_contents() {
    let vectors = load("vdi-misc.json");
    let cluster = Cluster::new(3);
    let mut stream = Vec::new();
    for command in vectors["backup_stream"]["commands"].as_array().expect("commands") {
        let command = command.as_str().expect("text");
        let (words, input) = command.split_once(" < ").map_or((command, None), |(c, i)| (c, Some(i)));
        let stdin = input.map_or(Vec::new(), |text| {
            // 4096 x 'a'
            let (count, byte) = text.split_once(" x ").expect("N x 'c'");
            vec![byte.as_bytes()[1]; count.parse().expect("a number")]
        });
        let args: Vec<&str> = words.split(' ').skip(1).collect();
        stream = dog(&cluster, &args, &stdin);
    }
    let expected = unhex(vectors["backup_stream"]["stream_hex"].as_str().expect("hex"));
    assert!(stream == expected, "the stream differs: {} bytes instead of {}", stream.len(), expected.len());

    // The difference applied on top of s1 is a new snapshot with the contents of s2.
    let wanted = dog(&cluster, &["vdi", "read", "b", "-s", "s2"], &[]);
    dog(&cluster, &["vdi", "restore", "b", "-s", "s1"], &stream);
    let restored = dog(&cluster, &["vdi", "read", "b", "-s", "3"], &[]);
    assert!(restored == wanted && wanted.len() == 16 << 20, "{} and {} bytes", restored.len(), wanted.len());
}
