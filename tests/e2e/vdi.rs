//! VDIs over the protocol: create, look up, write, snapshot, clone, delete, attributes (spec 01, 7 and 05).

use std::collections::HashMap;

use serde_json::Value;
use sheepdog_proto::attr::{ATTR_LEN, AttrHeader};
use sheepdog_proto::header::{ObjRequest, VdiRequest};
use sheepdog_proto::inode::{TABLE_OFFSET, table_offset};
use sheepdog_proto::{Flags, Oid, Opcode, Request, ResultCode, VDI_BITMAP_LEN, VdiId, Wire, fixed_str};
use sheepdog_testkit::vectors::load;
use sheepdog_testkit::{Client, Cluster, Vdi, wait};

const BLOCK: u64 = 4 << 20;

fn bits(client: &mut Client, opcode: Opcode) -> Vec<u32> {
    let (response, bytes) = client.must(Request::new(opcode).length(VDI_BITMAP_LEN), &[]);
    assert_eq!(response.result, ResultCode::SUCCESS);
    let set = |i: &u32| bytes[(*i / 8) as usize] >> (i % 8) & 1 == 1;
    (0..VDI_BITMAP_LEN as u32 * 8).filter(set).collect()
}

/// DEL_VDI as `dog` does it: the map first.
fn delete(client: &mut Client, name: &str, tag: Option<&str>) -> ResultCode {
    let vid = match client.lookup(name, tag.unwrap_or(""), 0) {
        Ok(vid) => vid,
        Err(result) => return result,
    };
    let vdi = Vdi::open(client, vid).expect("open");
    let zeros = vec![0; 4 * vdi.table.len()];
    let cleared = client.write_obj(Oid::inode(vid), TABLE_OFFSET as u32, &zeros).expect("clearing the map");
    assert_eq!(cleared, ResultCode::SUCCESS);
    client.vdi_op(Opcode::DEL_VDI, name, tag, VdiRequest::zeroed()).result
}

#[test]
fn a_created_vdi_is_found_everywhere_and_only_once() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    let vid = client.create_vdi("test", 16 << 20).expect("create");
    assert_eq!(vid.get(), 0x7c2b25);
    assert_eq!(client.create_vdi("test", 16 << 20), Err(ResultCode::VDI_EXIST));
    for i in 0..3 {
        let mut client = cluster.nodes[i].client();
        assert_eq!(client.lookup("test", "", 0), Ok(vid), "node {i}");
        assert_eq!(client.create_vdi("test", 1 << 20), Err(ResultCode::VDI_EXIST), "node {i}");
        assert_eq!(bits(&mut client, Opcode::READ_VDIS), [0x7c2b25], "node {i}");
        let inode = client.inode(vid).expect("inode");
        assert_eq!((inode.name(), inode.vdi_size, inode.nr_copies), (b"test".as_slice(), 16 << 20, 3));
        assert_eq!((inode.snap_id, inode.block_size_shift, inode.snap_ctime), (1, 22, 0));
    }
    assert_eq!(cluster.holders(Oid::inode(vid)), [0, 1, 2]);
    cluster.assert_replicas_equal(3);
}

#[test]
fn the_lookup_table_of_the_original_holds() {
    let vectors = load("vdi-misc.json");
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    client.create_vdi("test", 16 << 20).expect("create");
    client.snapshot("test", "t1").expect("snapshot t1");
    client.snapshot("test", "t2").expect("snapshot t2");
    let check = |client: &mut Client, case: &Value| {
        let text = |key: &str| case[key].as_str().unwrap_or_default();
        let snapid = case["snapid"].as_u64().expect("snapid") as u32;
        let expected = match case["vid"].as_str() {
            Some(vid) => Ok(VdiId::new(u32::from_str_radix(vid, 16).expect("vid"))),
            None => Err(text("result").to_string()),
        };
        let got = client.lookup(text("name"), text("tag"), snapid);
        assert_eq!(got.map_err(|e| e.name().unwrap_or("?").to_string()), expected, "{case}");
    };
    let cases = vectors["lookup"].as_array().expect("lookup");
    let (before, after): (Vec<&Value>, Vec<&Value>) =
        cases.iter().partition(|c| !c["when"].as_str().expect("when").contains("deleted"));
    assert!(before.len() >= 13 && after.len() >= 5);
    for case in before {
        check(&mut client, case);
    }
    assert_eq!(delete(&mut client, "test", None), ResultCode::SUCCESS);
    for case in after {
        check(&mut client, case);
        check(&mut cluster.nodes[2].client(), case);
    }
}

#[test]
fn bad_creations_are_refused_and_leave_nothing() {
    let mut cluster = Cluster::new(2);
    let mut client = cluster.client();
    let create = |client: &mut Client, name: &str, body: VdiRequest| {
        client.vdi_op(Opcode::NEW_VDI, name, None, body).result
    };
    let size = VdiRequest { vdi_size: 1 << 20, ..VdiRequest::zeroed() };
    let cases = [
        ("policy without parity", VdiRequest { copies: 3, copy_policy: 0x20, ..size }),
        ("policy without data", VdiRequest { copies: 3, copy_policy: 0x03, ..size }),
        ("40 copies", VdiRequest { copies: 40, ..size }),
        ("a block of 32 bytes", VdiRequest { copies: 2, block_size_shift: 5, ..size }),
        ("a block of 4 GiB", VdiRequest { copies: 2, block_size_shift: 32, ..size }),
    ];
    for (what, body) in cases {
        assert_eq!(create(&mut client, "bad", body), ResultCode::INVALID_PARMS, "{what}");
    }
    assert_eq!(create(&mut client, "", size), ResultCode::INVALID_PARMS, "no name");
    let request = Request::new(Opcode::NEW_VDI).flag(Flags::WRITE).with_vdi(size);
    let unterminated = client.must(request.length(256), &[b'x'; 256]).0.result;
    assert_eq!(unterminated, ResultCode::INVALID_PARMS, "a name without its end");
    assert_eq!(client.must(request.length(4), b"bob\0").0.result, ResultCode::INVALID_PARMS, "a short name");
    let missing = VdiRequest { base_vdi_id: VdiId::new(0x123456), ..size };
    assert!(!create(&mut client, "clone", missing).is_ok(), "a base that does not exist");
    let working = client.create_vdi("working", 4 << 20).expect("create");
    let of_working = VdiRequest { base_vdi_id: working, ..size };
    assert!(!create(&mut client, "clone", of_working).is_ok(), "only snapshots are cloned");
    for i in 0..2 {
        let seen = bits(&mut cluster.nodes[i].client(), Opcode::READ_VDIS);
        assert_eq!(seen, [working.get()], "node {i}");
    }
}

#[test]
fn reads_of_what_was_never_written_are_zeros_and_writes_past_the_end_are_refused() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    let vid = client.create_vdi("edges", 8 << 20).expect("create");
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    vdi.write(&mut client, 4096, &[7; 512]).expect("write");
    let oid = Oid::data(vid, 0);
    let (response, data) = client.read_obj(oid, 0, BLOCK as usize).expect("the whole object");
    assert!(response.result.is_ok() && data.len() == BLOCK as usize);
    assert!(data[..4096].iter().chain(&data[4608..]).all(|b| *b == 0));
    assert_eq!(data[4096..4608], [7; 512]);

    let (response, data) = client.read_obj(oid, BLOCK as u32 - 256, 1024).expect("a read past the end");
    assert!(data.iter().all(|b| *b == 0), "never memory");
    assert!(response.result == ResultCode::INVALID_PARMS || data.len() == 1024, "{response:?}");
    for offset in [BLOCK as u32 - 256, BLOCK as u32, u32::MAX - 100] {
        let result = client.write_obj(oid, offset, &[1; 512]).expect("an answer");
        assert_eq!(result, ResultCode::INVALID_PARMS, "write at {offset}");
        let result = client.create_obj(Oid::data(vid, 1), None, offset, &[1; 512]).expect("an answer");
        assert_eq!(result, ResultCode::INVALID_PARMS, "create at {offset}");
    }
    let zero = client.write_obj(oid, 0, &[]).expect("an answer");
    assert_eq!(zero, ResultCode::SUCCESS, "zero lengths succeed");
    let (response, _) = client.read_obj(Oid::data(vid, 1), 0, 0).expect("an answer");
    assert_eq!(response.result, ResultCode::NO_OBJ, "of an object that is there");
    assert_eq!(client.write_obj(Oid::data(vid, 1), 0, &[1; 512]).expect("an answer"), ResultCode::NO_OBJ);
    for home in cluster.holders(oid) {
        let path = cluster.object_path(home, oid).expect("a file");
        assert_eq!(path.metadata().expect("metadata").len(), BLOCK, "node {home}");
    }
}

#[test]
fn a_second_create_replaces_the_object_whole() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    let vid = client.create_vdi("twice", 4 << 20).expect("create");
    let oid = Oid::data(vid, 0);
    assert!(client.create_obj(oid, None, 0, &[1; 65_536]).expect("create").is_ok());
    assert!(client.create_obj(oid, None, 1 << 20, &[2; 512]).expect("create").is_ok());
    let (_, data) = client.read_obj(oid, 0, BLOCK as usize).expect("read");
    assert!(data[..1 << 20].iter().all(|b| *b == 0));
    assert_eq!(data[1 << 20..(1 << 20) + 512], [2; 512]);
    cluster.assert_replicas_equal(3);
}

#[test]
fn requests_without_the_flag_they_need_are_refused() {
    let mut cluster = Cluster::new(2);
    let mut client = cluster.client();
    let vid = client.create_vdi("flags", 4 << 20).expect("create");
    let body = ObjRequest { oid: Oid::data(vid, 0), ..ObjRequest::zeroed() };
    for opcode in [Opcode::CREATE_AND_WRITE_OBJ, Opcode::WRITE_OBJ] {
        let request = Request::new(opcode).with_obj(body).length(4096);
        assert_eq!(client.must(request, &[]).0.result, ResultCode::INVALID_PARMS, "{opcode}");
    }
    assert!(client.create_obj(Oid::data(vid, 0), None, 0, &[3; 4096]).expect("create").is_ok());
    // Swallowed and served (01, 4), without a payload in the answer.
    let request = Request::new(Opcode::READ_OBJ).flag(Flags::WRITE).with_obj(body).length(512);
    let (_, data) = client.must(request, &[0; 512]);
    assert!(data.is_empty(), "an answer to WRITE carries nothing");
    assert_eq!(client.lookup("flags", "", 0), Ok(vid), "the connection is still in step");
}

#[test]
fn snapshots_keep_their_data_and_clones_start_from_it() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    let base = client.create_vdi("vm", 16 << 20).expect("create");
    let mut vdi = Vdi::open(&mut client, base).expect("open");
    vdi.write(&mut client, 0, &[1; 8192]).expect("write");
    vdi.write(&mut client, BLOCK, &[2; 8192]).expect("write");

    let working = client.snapshot("vm", "s1").expect("snapshot");
    assert_eq!(working.get(), base.get() + 1);
    for i in 0..3 {
        let refused =
            cluster.nodes[i].client().write_obj(Oid::data(base, 0), 0, &[9; 512]).expect("an answer");
        assert_eq!(refused, ResultCode::READONLY, "node {i}");
    }
    assert_eq!(client.grefs(base, 3).expect("grefs"), [(0, 1), (0, 1), (0, 0)]);
    assert_eq!(client.grefs(working, 3).expect("grefs"), [(1, 0), (1, 0), (0, 0)]);

    let mut current = Vdi::open(&mut client, working).expect("open");
    current.write(&mut client, 4096, &[3; 4096]).expect("copy-on-write");
    assert_eq!(current.read(&mut client, 0, 8192).expect("read"), [[1; 4096], [3; 4096]].concat());
    let old = Vdi::open(&mut client, base).expect("open the snapshot");
    assert_eq!(old.read(&mut client, 0, 8192).expect("read"), [1; 8192]);
    let first = Oid::data(base, 0);
    wait("the ledger of the object that was left", || {
        client.ledger(first).expect("ledger") == Some(vec![1, -1])
    });

    let clone = client.clone_vdi(base, "copy").expect("clone");
    let mut copy = Vdi::open(&mut client, clone).expect("open the clone");
    assert_eq!(copy.read(&mut client, 0, 8192).expect("read"), [1; 8192]);
    copy.write(&mut client, BLOCK + 512, &[4; 512]).expect("write to the clone");
    assert_eq!(old.read(&mut client, BLOCK, 8192).expect("read"), [2; 8192]);
    assert_eq!(client.inode(clone).expect("inode").parent_vdi_id, base);

    // Everything goes, by a tool that comes later; so do all objects but the inodes.
    let mut tool = cluster.client();
    for (name, tag) in [("vm", Some("s1")), ("vm", None), ("copy", None)] {
        assert_eq!(delete(&mut tool, name, tag), ResultCode::SUCCESS, "{name} {tag:?}");
    }
    wait("all objects but inodes to be gone", || {
        (0..3).all(|i| cluster.objects_of(i).keys().all(|oid| oid.is_inode()))
    });
    cluster.assert_replicas_equal(3);
}

/// Mandated correction 6: the server frees the table that a client left behind.
#[test]
fn deleting_with_a_live_map_frees_the_objects() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    let vid = client.create_vdi("full", 16 << 20).expect("create");
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    for block in 0..3 {
        vdi.write(&mut client, block * BLOCK, &[1; 4096]).expect("write");
    }
    client.snapshot("full", "s").expect("snapshot");
    let response = client.vdi_op(Opcode::DEL_VDI, "full", None, VdiRequest::zeroed());
    assert_eq!(response.result, ResultCode::SUCCESS);
    assert_eq!(client.lookup("full", "", 0), Err(ResultCode::NO_VDI));
    assert_eq!(client.lookup("full", "s", 0), Ok(vid), "the snapshot lives");
    assert_eq!(vdi.read(&mut client, 0, 4096).expect("read the snapshot"), [1; 4096]);

    let body = VdiRequest { snapid: 1, ..VdiRequest::zeroed() };
    assert_eq!(client.vdi_op(Opcode::DEL_VDI, "full", None, body).result, ResultCode::SUCCESS);
    wait("all objects but inodes to be gone", || {
        (0..3).all(|i| cluster.objects_of(i).keys().all(|oid| oid.is_inode()))
    });
    assert_eq!(bits(&mut client, Opcode::READ_DEL_VDIS), [vid.get(), vid.get() + 1]);
}

/// Mandated correction 7: a late table entry of the VDI's own does not land in a snapshot.
#[test]
fn late_table_updates_of_a_snapshot_are_refused() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    let vid = client.create_vdi("late", 16 << 20).expect("create");
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    vdi.write(&mut client, 0, &[1; 512]).expect("write");
    client.snapshot("late", "s").expect("snapshot");
    let new = client.write_obj(Oid::inode(vid), table_offset(1) as u32, &vid.encode()).expect("an answer");
    assert_eq!(new, ResultCode::READONLY);
    let same = client.write_obj(Oid::inode(vid), table_offset(0) as u32, &vid.encode()).expect("an answer");
    assert_eq!(same, ResultCode::SUCCESS, "an entry that does not change");
    let tag = client.write_obj(Oid::inode(vid), 256, &fixed_str::<256>(b"renamed")).expect("an answer");
    assert_eq!(tag, ResultCode::SUCCESS, "tags of snapshots stay writable");
    assert_eq!(client.lookup("late", "renamed", 0), Ok(vid));
}

#[test]
fn discarding_goes_through_the_reference_count_and_not_into_snapshots() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    let vid = client.create_vdi("trim", 16 << 20).expect("create");
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    vdi.write(&mut client, 0, &[1; 4096]).expect("write");
    vdi.write(&mut client, BLOCK, &[2; 4096]).expect("write");
    let discard = |client: &mut Client, oid| {
        let body = ObjRequest { oid, ..ObjRequest::zeroed() };
        client.must(Request::new(Opcode::DISCARD_OBJ).with_obj(body), &[]).0.result
    };
    assert_eq!(discard(&mut client, Oid::data(vid, 1)), ResultCode::SUCCESS);
    wait("the object to be gone", || cluster.holders(Oid::data(vid, 1)).is_empty());
    assert_eq!(Vdi::open(&mut client, vid).expect("open").table, [vid.get(), 0, 0, 0]);

    let working = client.snapshot("trim", "s").expect("snapshot");
    assert_eq!(discard(&mut client, Oid::data(vid, 0)), ResultCode::READONLY);
    assert_eq!(discard(&mut client, Oid::data(working, 0)), ResultCode::SUCCESS);
    assert_eq!(Vdi::open(&mut client, working).expect("open").table, [0; 4]);
    assert_eq!(vdi.read(&mut client, 0, 4096).expect("the snapshot's data"), [1; 4096]);

    // Several blocks at once, as the daemon's own volumes ask for.
    let mut vdi = Vdi::open(&mut client, working).expect("open");
    for block in 1..4 {
        vdi.write(&mut client, block * BLOCK, &[3; 4096]).expect("write");
    }
    let many = |client: &mut Client, oid, entries: &[u8]| {
        let body = ObjRequest { oid, ..ObjRequest::zeroed() };
        let request = Request::new(Opcode::DISCARD_OBJ).flag(Flags::WRITE).length(entries.len());
        client.must(request.with_obj(body), entries).0.result
    };
    let middle = Oid::data(working, 1);
    assert_eq!(many(&mut client, middle, &[0; 6]), ResultCode::INVALID_PARMS);
    assert_eq!(many(&mut client, middle, &[0, 0, 0, 0, 1, 0, 0, 0]), ResultCode::INVALID_PARMS);
    assert_eq!(many(&mut client, Oid::data(working, (1 << 20) - 1), &[0; 8]), ResultCode::INVALID_PARMS);
    assert_eq!(many(&mut client, Oid::data(vid, 0), &[0; 8]), ResultCode::READONLY);
    assert_eq!(many(&mut client, middle, &[0; 8]), ResultCode::SUCCESS);
    assert_eq!(Vdi::open(&mut client, working).expect("open").table, [0, 0, 0, working.get()]);
    wait("the objects to be gone", || (1..3).all(|idx| cluster.holders(Oid::data(working, idx)).is_empty()));
}

fn attribute_header(name: &str, key: &str) -> AttrHeader {
    AttrHeader { name: fixed_str(name.as_bytes()), key: fixed_str(key.as_bytes()), ..AttrHeader::zeroed() }
}

fn attribute(name: &str, key: &str, value: &[u8]) -> Vec<u8> {
    let head = AttrHeader { value_len: value.len() as u32, ..attribute_header(name, key) };
    let mut bytes = head.encode();
    bytes.extend(value);
    bytes.resize(ATTR_LEN, 0);
    bytes
}

#[test]
fn attributes_are_created_read_replaced_and_deleted() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    client.create_vdi("test", 4 << 20).expect("create");
    let call = |client: &mut Client, flags: Flags, key: &str, value: &[u8]| {
        let request = Request::new(Opcode::GET_VDI_ATTR).flag(Flags::WRITE.with(flags)).length(ATTR_LEN);
        let response = client.must(request, &attribute("test", key, value)).0;
        (response.result, response.vdi().attr_id)
    };
    let exclusive = Flags::ATTR_CREAT.with(Flags::ATTR_EXCL);
    assert_eq!(call(&mut client, Flags::NONE, "k", b"").0, ResultCode::NO_OBJ);
    assert_eq!(call(&mut client, exclusive, "k", b"one"), (ResultCode::SUCCESS, 0x594a_8b4e));
    assert_eq!(call(&mut client, exclusive, "k", b"two").0, ResultCode::VDI_EXIST);
    assert_eq!(call(&mut client, Flags::ATTR_CREAT, "k", b"three").0, ResultCode::SUCCESS);
    let (_, record) = client.read_obj(Oid::attr(0x7c2b25, 0x594a_8b4e), 0, ATTR_LEN).expect("read");
    assert_eq!(AttrHeader::get(&record).value_len, 5);
    assert_eq!(record[784..789], *b"three");
    assert_eq!(call(&mut client, Flags::ATTR_DEL, "k", b"").0, ResultCode::SUCCESS);
    assert_eq!(call(&mut client, Flags::NONE, "k", b"").0, ResultCode::NO_OBJ);
    assert_eq!(call(&mut client, Flags::ATTR_DEL, "k", b"").0, ResultCode::NO_OBJ);
    // The snapshot that is looked up and the one that is recorded must be the same.
    let body = VdiRequest { snapid: 1, ..VdiRequest::zeroed() };
    let other =
        Request::new(Opcode::GET_VDI_ATTR).flag(Flags::WRITE.with(Flags::ATTR_CREAT)).length(ATTR_LEN);
    let response = client.must(other.with_vdi(body), &attribute("test", "k", b"four")).0;
    assert_eq!(response.result, ResultCode::INVALID_PARMS);
    let short = Request::new(Opcode::GET_VDI_ATTR).flag(Flags::WRITE).length(100);
    assert_eq!(client.must(short, &[0; 100]).0.result, ResultCode::INVALID_PARMS);
}

/// Whoever creates an attribute exclusively at the same time through different nodes: one of them does, and its value is what
/// all nodes then read.
#[test]
fn one_of_several_exclusive_creators_of_an_attribute_succeeds() {
    const ROUNDS: usize = 120;
    let mut cluster = Cluster::new(3);
    cluster.client().create_vdi("test", 4 << 20).expect("create");
    let start = std::sync::Barrier::new(3);
    let create = |node: usize| {
        let mut client = cluster.nodes[node].client();
        client.set_timeout(std::time::Duration::from_secs(60)).expect("a longer timeout");
        let flags = Flags::WRITE.with(Flags::ATTR_CREAT).with(Flags::ATTR_EXCL);
        let request = Request::new(Opcode::GET_VDI_ATTR).flag(flags).length(ATTR_LEN);
        let once = |round: usize| {
            start.wait();
            let value = format!("node {node}");
            client.must(request, &attribute("test", &format!("key {round}"), value.as_bytes())).0
        };
        (0..ROUNDS).map(once).collect::<Vec<_>>()
    };
    let answers: [Vec<_>; 3] = std::thread::scope(|scope| {
        let creators = [0, 1, 2].map(|node| scope.spawn(move || create(node)));
        creators.map(|creator| creator.join().expect("no panic"))
    });
    let [a, b, c] = answers;
    let mut won = [0; 3];
    for (round, ((a, b), c)) in a.into_iter().zip(b).zip(c).enumerate() {
        let answers = [a, b, c];
        let results = answers.map(|answer| answer.result);
        let winners: Vec<usize> = (0..3).filter(|node| results[*node].is_ok()).collect();
        let [winner] = winners[..] else { panic!("round {round}: {results:?}") };
        let refused = results.iter().filter(|result| **result == ResultCode::VDI_EXIST).count();
        assert_eq!(refused, 2, "round {round}: {results:?}");
        won[winner] += 1;
        let place = answers[winner].vdi();
        for node in &cluster.nodes {
            let oid = Oid::attr(place.vdi_id.get(), place.attr_id);
            let (_, record) = node.client().read_obj(oid, 0, ATTR_LEN).expect("read");
            let value = &record[AttrHeader::LEN..AttrHeader::LEN + 6];
            assert_eq!(value, format!("node {winner}").as_bytes(), "round {round}");
        }
    }
    assert!(won.iter().filter(|n| **n > 0).count() > 1, "they did not compete: {won:?}");
}

/// 05, 29 rule 8: a savevm that died before it wrote the size has left memory.
#[test]
fn saved_memory_goes_with_its_vdi_whatever_its_size_says() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    let vid = client.create_vdi("vm", 4 << 20).expect("create");
    let memory = |index| Oid::vmstate(vid, index);
    for index in 0..5 {
        assert!(client.create_obj(memory(index), None, 0, &[1; 512]).expect("create").is_ok());
    }
    assert_eq!(cluster.holders(memory(4)), [0, 1, 2]);
    assert!(delete(&mut client, "vm", None).is_ok());
    assert!((0..5).all(|index| cluster.holders(memory(index)).is_empty()));
}

/// Two keys whose ids, 32-bit hashes, are the same.
fn colliding_keys(name: &str) -> (String, String) {
    let mut seen = HashMap::new();
    for n in 0u32.. {
        let key = format!("key-{n}");
        let id = attribute_header(name, &key).id();
        if let Some(other) = seen.insert(id, key.clone()) {
            return (other, key);
        }
    }
    unreachable!("there are more keys than ids")
}

#[test]
fn attributes_whose_ids_collide_are_kept_apart() {
    let mut cluster = Cluster::new(3);
    cluster.client().create_vdi("test", 4 << 20).expect("create");
    let (a, b) = colliding_keys("test");
    let set = |key: &str, value: &str| cluster.dog_at(0, &["vdi", "setattr", "test", key, value], b"");
    let get = |key: &str| cluster.dog_at(1, &["vdi", "getattr", "test", key], b"");
    set(&a, "one").ok();
    assert_ne!(get(&b).code, 0, "not the other one's value");
    set(&b, "two").ok();
    assert_eq!([get(&a).ok(), get(&b).ok()], ["one", "two"]);
    let again = cluster.dog_at(2, &["vdi", "setattr", "-x", "test", &b, "three"], b"");
    assert_ne!(again.code, 0, "it is there");
    cluster.dog_at(2, &["vdi", "setattr", "-d", "test", &a], b"").ok();
    assert_ne!(get(&a).code, 0);
    assert_eq!(get(&b).ok(), "two", "found behind the deleted one");
    set(&a, "four").ok();
    assert_eq!([get(&a).ok(), get(&b).ok()], ["four", "two"]);
}

/// Many clients create at once: every name gets one vid, nobody gets another's.
#[test]
fn concurrent_creations_never_share_an_id() {
    let mut cluster = Cluster::new(3);
    let ports: Vec<u16> = cluster.nodes.iter().map(|n| n.port).collect();
    let created: Vec<(String, VdiId)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..6)
            .map(|t| {
                let port = ports[t % 3];
                scope.spawn(move || {
                    let mut client = Client::connect(port).expect("connect");
                    let names = (0..5).map(|i| format!("vdi-{t}-{i}"));
                    names
                        .map(|n| (n.clone(), client.create_vdi(&n, 4 << 20).expect("create")))
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        threads.into_iter().flat_map(|t| t.join().expect("no panic")).collect()
    });
    let mut vids: Vec<u32> = created.iter().map(|(_, v)| v.get()).collect();
    vids.sort();
    vids.dedup();
    assert_eq!(vids.len(), 30, "thirty different ids");
    for node in 0..3 {
        let mut client = cluster.nodes[node].client();
        // Nodes that were not asked hear of a creation a moment later.
        wait("the node to know all ids", || bits(&mut client, Opcode::READ_VDIS) == vids);
        for (name, vid) in &created {
            assert_eq!(client.lookup(name, "", 0), Ok(*vid), "{name} at node {node}");
        }
    }
    cluster.assert_replicas_equal(3);
}
