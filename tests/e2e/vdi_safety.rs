//! Cases in which the original lost data, crashed or poisoned a name (the weak spots of spec 05): the safe behaviour.

use std::collections::BTreeSet;
use std::time::Duration;

use sheepdog_proto::header::{ObjRequest, RefRequest, VdiRequest, VdiStateRequest};
use sheepdog_proto::inode::{GREF_OFFSET, INODE_HEADER_LEN, STORE_POLICY_BTREE, TABLE_OFFSET, table_offset};
use sheepdog_proto::{
    CopyPolicy, Epoch, Flags, Oid, Opcode, Request, ResultCode, VDI_BITMAP_LEN, VdiId, VdiState, Wire,
};
use sheepdog_testkit::vdi::name_payload;
use sheepdog_testkit::{Builder, Client, Cluster, Vdi, wait, wait_for};

const BLOCK: u64 = 4 << 20;

fn states(client: &mut Client) -> Vec<VdiState> {
    let request = Request::new(Opcode::GET_VDI_COPIES).length(512 * VdiState::LEN);
    let (response, bytes) = client.must(request, &[]);
    assert_eq!(response.result, ResultCode::SUCCESS);
    bytes.chunks_exact(VdiState::LEN).map(VdiState::get).collect()
}

fn bits(client: &mut Client, opcode: Opcode) -> Vec<u32> {
    let (_, bytes) = client.must(Request::new(opcode).length(VDI_BITMAP_LEN), &[]);
    (0..VDI_BITMAP_LEN as u32 * 8).filter(|i| bytes[(*i / 8) as usize] >> (i % 8) & 1 == 1).collect()
}

fn delete(client: &mut Client, name: &str, snapid: u32) {
    let response = client.vdi_op(Opcode::DEL_VDI, name, None, VdiRequest { snapid, ..VdiRequest::zeroed() });
    assert_eq!(response.result, ResultCode::SUCCESS, "{name} {snapid}");
}

fn wait_empty(cluster: &Cluster) {
    wait("all objects but inodes to be gone", || {
        (0..cluster.nodes.len()).all(|i| cluster.objects_of(i).keys().all(|oid| oid.is_inode()))
    });
}

/// 05, 6: all nodes die when the base of a snapshot is written and its working VDI is not. The snapshot is whole, the name
/// is free, and `dog vdi clone` makes it again from the snapshot; nothing is left when all of it is deleted.
#[test]
fn a_name_is_made_again_after_a_crash_between_snapshot_and_working_vdi() {
    let mut cluster = Cluster::new(3);
    cluster.dog(&["vdi", "create", "vm", "16M"]).ok();
    cluster.dog_in(&["vdi", "write", "vm", "0", "9M"], &[7; 9 << 20]).ok();
    cluster.dog(&["vdi", "snapshot", "vm", "-s", "s"]).ok();
    let working = cluster.client().lookup("vm", "", 0).expect("the working VDI");
    cluster.kill9_all();
    // As it was a moment earlier.
    for node in 0..3 {
        let path = cluster.object_path(node, Oid::inode(working)).expect("its inode");
        std::fs::remove_file(path).expect("remove");
    }
    (0..3).for_each(|i| cluster.start(i));
    cluster.wait_recovered();
    made_again(&mut cluster);
}

/// The same, but only the node dies through which the snapshot is made, and another one does not answer at that moment, so
/// that the inode of the working VDI may be on some of its homes.
#[test]
fn a_name_outlives_the_node_that_makes_a_snapshot() {
    let mut cluster = Builder::new(6).copies(3).local().start();
    let (name, vid, silent, requester) = (0..)
        .find_map(|n| {
            let name = format!("vm{n}");
            let vid = cluster.client().create_vdi(&name, 16 << 20).expect("create");
            let next = VdiId::new(vid.get() + 1);
            let [base, child] = [vid, next].map(|vid| cluster.homes(Oid::inode(vid), 3));
            // Not the first home, through which the others get it.
            let silent = child.iter().copied().skip(1).find(|home| *home != 0 && !base.contains(home))?;
            let requester = (1..6).find(|i| !base.contains(i) && !child.contains(i))?;
            Some((name, vid, silent, requester))
        })
        .expect("there are names enough");
    let mut client = cluster.client();
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    for block in 0..3 {
        vdi.write(&mut client, block * BLOCK, &[7; 3 << 20]).expect("write");
    }
    client.write_obj(Oid::inode(vid), 256, &name_payload("s", None)).expect("the tag");
    let mut through = cluster.nodes[requester].client();
    let body = VdiRequest {
        vdi_size: 16 << 20,
        base_vdi_id: vid,
        copies: 3,
        block_size_shift: 22,
        snapid: 1,
        ..VdiRequest::zeroed()
    };
    let request = Request::new(Opcode::NEW_VDI).flag(Flags::WRITE).with_vdi(body);
    let payload = name_payload(&name, None);
    through.send(request.length(payload.len()), &payload).expect("send");
    // Before the announcement it would be waited for.
    let child = VdiId::new(vid.get() + 1);
    while !states(&mut client).iter().any(|state| state.vid == child) {}
    cluster.sigstop(silent);
    wait("the base to be a snapshot", || client.inode(vid).is_ok_and(|header| header.snap_ctime != 0));
    // Now the working VDI's inode is being written to the homes that answer, and to the silent one.
    wait("a part of the homes to have the child", || !cluster.holders(Oid::inode(child)).is_empty());
    cluster.kill9(requester);
    cluster.sigcont(silent);
    cluster.wait_members(5);
    cluster.wait_gathered();
    if !cluster.holders(Oid::inode(child)).is_empty() {
        for node in cluster.running() {
            let mut client = cluster.nodes[node].client();
            wait("the name to go on with what was made", || client.lookup(&name, "", 0) == Ok(child));
        }
    }
    cluster.start(requester);
    cluster.wait_recovered();
    let mut client = cluster.client();
    let snapshot = Vdi::open(&mut client, vid).expect("open");
    assert_eq!(snapshot.read(&mut client, BLOCK, 4096).expect("the snapshot"), [7; 4096]);
    let working = match client.lookup(&name, "", 0) {
        Ok(working) => working,
        Err(ResultCode::NO_VDI) => client.clone_vdi(vid, &name).expect("made again"),
        Err(code) => panic!("{name}: {code}"),
    };
    let mut again = Vdi::open(&mut client, working).expect("open");
    assert_eq!(again.read(&mut client, 2 * BLOCK, 4096).expect("the working VDI"), [7; 4096]);
    again.write(&mut client, 0, &[8; 4096]).expect("write");
    assert_eq!(snapshot.read(&mut client, 0, 4096).expect("the snapshot"), [7; 4096]);
    cluster.assert_replicas_equal(3);
}

/// 05, 6: the node dies that has announced a snapshot and has written nothing yet. The VDI stays a working one.
#[test]
fn an_announced_snapshot_that_was_not_made_is_taken_back() {
    let mut cluster = Cluster::new(4);
    let mut client = cluster.client();
    let vid = client.create_vdi("vm", 16 << 20).expect("create");
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    vdi.write(&mut client, 0, &[7; 4096]).expect("write");
    let body = VdiStateRequest {
        old_vid: vid,
        new_vid: VdiId::new(vid.get() + 1),
        copies: 3,
        set_bitmap: 0,
        copy_policy: 0,
        block_size_shift: 22,
    };
    let request = Request::new(Opcode::NOTIFY_VDI_ADD).with_vdi_state(body);
    assert_eq!(cluster.nodes[3].client().must(request, &[]).0.result, ResultCode::SUCCESS);
    let write = |cluster: &Cluster, node: usize| {
        cluster.nodes[node].client().write_obj(Oid::data(vid, 0), 0, &[8; 512]).expect("an answer")
    };
    wait("the announcement", || write(&cluster, 1) == ResultCode::READONLY);
    cluster.kill9(3);
    for node in 0..3 {
        wait("the VDI to be writable", || write(&cluster, node) == ResultCode::SUCCESS);
    }
    // One that came to be stays.
    let working = client.snapshot("vm", "s").expect("snapshot");
    assert_ne!(working, vid);
    cluster.start(3);
    cluster.wait_recovered();
    for node in 0..4 {
        assert_eq!(write(&cluster, node), ResultCode::READONLY);
    }
}

/// 05, 26: a member that is silent may be in the middle of a table update. Nothing is copied before it answers.
#[test]
fn a_snapshot_waits_for_a_silent_member() {
    let mut cluster = Builder::new(4).local().start();
    let mut client = cluster.client();
    let (name, vid, silent) = (0..)
        .find_map(|n| {
            let name = format!("vm{n}");
            let vid = client.create_vdi(&name, 16 << 20).expect("create");
            let homes = cluster.homes(Oid::inode(vid), 3);
            Some((name, vid, (1..4).find(|i| !homes.contains(i))?))
        })
        .expect("there are names enough");
    cluster.sigstop(silent);
    let (mut through, of) = (cluster.client(), name.clone());
    let taken = std::thread::spawn(move || through.snapshot(&of, "s"));
    // Longer than a node may take that answers.
    std::thread::sleep(Duration::from_secs(7));
    assert!(!taken.is_finished());
    assert_eq!(client.inode(vid).expect("the inode").snap_ctime, 0, "nothing was written");
    cluster.sigcont(silent);
    let working = taken.join().expect("the thread").expect("the snapshot");
    assert_eq!(client.lookup(&name, "", 0), Ok(working));
}

/// The name `vm`, which has a snapshot `s` full of sevens and no working VDI, gets one again.
fn made_again(cluster: &mut Cluster) {
    let snapshot_is_whole = |cluster: &mut Cluster| {
        let back = cluster.client().lookup("vm", "s", 0).expect("the snapshot");
        let mut client = cluster.client();
        let vdi = Vdi::open(&mut client, back).expect("open");
        assert!(vdi.read(&mut client, 0, 9 << 20).expect("read").iter().all(|byte| *byte == 7));
    };
    snapshot_is_whole(cluster);
    let list = cluster.dog(&["vdi", "list", "-r"]).ok();
    assert!(list.starts_with("s vm 1 ") && list.lines().count() == 1, "{list}");
    let missing = cluster.dog(&["vdi", "read", "vm"]);
    assert!(missing.code != 0 && missing.stderr.contains("No VDI found"), "{missing:?}");
    cluster.dog(&["vdi", "clone", "-s", "s", "vm", "vm"]).ok();
    let vid = cluster.client().lookup("vm", "", 0).expect("the working VDI");
    let mut client = cluster.client();
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    assert!(vdi.read(&mut client, 0, 9 << 20).expect("read").iter().all(|byte| *byte == 7));
    vdi.write(&mut client, 0, &[8; 4096]).expect("write");
    vdi.write(&mut client, BLOCK, &[8; 4096]).expect("write");
    snapshot_is_whole(cluster);
    // The snapshot's blocks count a reference of the VDI that was lost; without the snapshot nobody names the first two.
    let base = cluster.client().lookup("vm", "s", 0).expect("the snapshot");
    cluster.dog(&["vdi", "delete", "vm", "-s", "s"]).ok();
    let left = |cluster: &Cluster| {
        let objects = (0..cluster.nodes.len()).flat_map(|i| cluster.objects_of(i).into_keys());
        let blocks = objects.filter(|oid| oid.is_data() && oid.vid() == base).map(|oid| oid.index());
        blocks.collect::<BTreeSet<u32>>()
    };
    assert_eq!(left(cluster), [0, 1, 2].into());
    wait_for("what nobody names to be removed", Duration::from_secs(180), || {
        (left(cluster) == [2].into()).then_some(())
    });
    assert_eq!(vdi.read(&mut client, 2 * BLOCK, 1 << 20).expect("read"), vec![7; 1 << 20]);
    cluster.dog(&["vdi", "snapshot", "vm", "-s", "t"]).ok();
    cluster.dog(&["vdi", "delete", "vm", "-s", "t"]).ok();
    cluster.dog(&["vdi", "delete", "vm"]).ok();
    wait_empty(cluster);
}

/// 05, 9: an inherited entry sent again with its old value keeps its reference.
#[test]
fn entries_sent_again_keep_their_references() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    let base = client.create_vdi("vm", 16 << 20).expect("create");
    let mut vdi = Vdi::open(&mut client, base).expect("open");
    for block in 0..3 {
        vdi.write(&mut client, block * BLOCK, &[7; 4096]).expect("write");
    }
    let working = client.snapshot("vm", "s").expect("snapshot");
    // Entry 0 is new, 1 and 2 are sent again: what a client does after one of three copies failed.
    assert!(
        client
            .create_obj(Oid::data(working, 0), Some(Oid::data(base, 0)), 0, &[8; 512])
            .expect("copy")
            .is_ok()
    );
    let entries: Vec<u8> = [working, base, base].iter().flat_map(|v| v.encode()).collect();
    let result = client.write_obj(Oid::inode(working), table_offset(0) as u32, &entries).expect("an answer");
    assert_eq!(result, ResultCode::SUCCESS);
    assert_eq!(client.grefs(working, 3).expect("grefs"), [(0, 0), (1, 0), (1, 0)]);
    // The next overwrite must not remove the snapshot's object.
    let mut current = Vdi::open(&mut client, working).expect("open");
    current.write(&mut client, BLOCK, &[9; 512]).expect("write");
    let ledger = |client: &mut Client, i| client.ledger(Oid::data(base, i)).expect("ledger");
    wait("the ledger", || ledger(&mut client, 1) == Some(vec![1, -1]));
    for block in 0..3 {
        assert_eq!(vdi.read(&mut client, block * BLOCK, 4096).expect("the snapshot"), [7; 4096]);
    }
    delete(&mut client, "vm", 1);
    delete(&mut client, "vm", 0);
    wait_empty(&cluster);
}

/// 05, 9: an update that is only partly in the table, or not made of whole entries, is refused whole.
#[test]
fn updates_that_leave_the_table_are_refused() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    let vid = client.create_vdi("edge", 4 << 40).expect("create");
    let mut write = |offset: usize, data: &[u8]| {
        client.write_obj(Oid::inode(vid), offset as u32, data).expect("an answer")
    };
    let entry = vid.encode();
    assert_eq!(write(GREF_OFFSET - 4, &[entry.as_slice(), &[1; 4]].concat()), ResultCode::INVALID_PARMS);
    assert_eq!(write(TABLE_OFFSET + 2, &entry), ResultCode::INVALID_PARMS, "not on an entry");
    assert_eq!(write(TABLE_OFFSET + 4, &entry[..3]), ResultCode::INVALID_PARMS, "not a whole entry");
    assert_eq!(write(GREF_OFFSET - 4, &entry), ResultCode::SUCCESS, "the last entry");
    let last = (1 << 20) - 1;
    let (_, bytes) = client.read_obj(Oid::inode(vid), table_offset(last) as u32, 12).expect("read");
    assert_eq!(bytes, [entry.as_slice(), &[0; 8]].concat());
}

/// 05, 6: what a client wrote under the old vid before a snapshot is found after it, whichever node the late table
/// update comes through.
#[test]
fn a_late_table_update_goes_to_the_working_vdi() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    let old = client.create_vdi("late", 16 << 20).expect("create");
    assert!(client.create_obj(Oid::data(old, 2), None, 0, &[5; 4096]).expect("create").is_ok());
    let working = client.snapshot("late", "s").expect("snapshot");
    for node in 0..3 {
        let mut other = cluster.nodes[node].client();
        let late =
            other.write_obj(Oid::inode(old), table_offset(2) as u32, &old.encode()).expect("an answer");
        assert_eq!(late, ResultCode::READONLY, "node {node}");
    }
    // The client looks the name up again and sends the same entry there.
    assert_eq!(client.lookup("late", "", 0), Ok(working));
    let again =
        client.write_obj(Oid::inode(working), table_offset(2) as u32, &old.encode()).expect("an answer");
    assert_eq!(again, ResultCode::SUCCESS);
    let current = Vdi::open(&mut client, working).expect("open");
    assert_eq!(current.read(&mut client, 2 * BLOCK, 4096).expect("read"), [5; 4096]);
    delete(&mut client, "late", 0);
    delete(&mut client, "late", 1);
    wait_empty(&cluster);
}

/// 05, 15: a node that was away during a snapshot and a deletion comes back with inodes that know of neither.
#[test]
fn a_node_with_an_old_state_clears_no_flags() {
    let mut cluster = Cluster::new(4);
    let mut client = cluster.client();
    let snap = client.create_vdi("snap", 8 << 20).expect("create");
    let gone = client.create_vdi("gone", 8 << 20).expect("create");
    Vdi::open(&mut client, snap).expect("open").write(&mut client, 0, &[1; 4096]).expect("write");
    cluster.kill9(3);
    cluster.wait_running();
    client.snapshot("snap", "s").expect("snapshot");
    delete(&mut client, "gone", 0);
    cluster.start(3);
    cluster.wait_recovered();
    let check = |cluster: &Cluster| {
        for node in &cluster.nodes {
            let mut client = node.client();
            let records = states(&mut client);
            let state = |vid| records.iter().find(|s| s.vid == vid).expect("a record");
            assert_eq!((state(snap).snapshot, state(snap).deleted), (1, 0), "node {}", node.index);
            assert_eq!(state(gone).deleted, 1, "node {}", node.index);
            assert_eq!(bits(&mut client, Opcode::READ_DEL_VDIS), [gone.get()], "node {}", node.index);
            let write = client.write_obj(Oid::data(snap, 0), 0, &[9; 512]).expect("an answer");
            assert_eq!(write, ResultCode::READONLY, "node {}", node.index);
        }
    };
    check(&cluster);
    // 05, 11: both marks come back from the inodes when all nodes start again.
    cluster.kill9_all();
    for node in 0..4 {
        cluster.spawn(node);
    }
    cluster.wait_running();
    check(&cluster);
}

/// 05, 7 and 15: what could not be created leaves no vid that blocks names, not even after nodes joined.
#[test]
fn failed_creations_poison_no_name() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    let before = states(&mut client).len();
    for (base, snapid) in [(0x12_3456, 0), (0x12_3456, 1)] {
        let body =
            VdiRequest { vdi_size: BLOCK, base_vdi_id: VdiId::new(base), snapid, ..VdiRequest::zeroed() };
        let result = client.vdi_op(Opcode::NEW_VDI, "child", None, body).result;
        let expected = if snapid == 0 { ResultCode::BASE_VDI_READ } else { ResultCode::NO_VDI };
        assert_eq!(result, expected);
    }
    assert_eq!(states(&mut client).len(), before, "nothing was announced");
    // A vid that was announced by somebody who died before its inode existed.
    let probed = sheepdog_proto::hash::name_hash(b"poisoned");
    let body = VdiStateRequest {
        old_vid: VdiId::NONE,
        new_vid: VdiId::new(probed),
        copies: 3,
        set_bitmap: 1,
        copy_policy: 0,
        block_size_shift: 22,
    };
    let request = Request::new(Opcode::NOTIFY_VDI_ADD).with_vdi_state(body);
    assert_eq!(client.must(request, &[]).0.result, ResultCode::SUCCESS);
    cluster.kill9(2);
    cluster.start(2);
    cluster.wait_recovered();
    for (node, name) in [(0, "child"), (1, "poisoned"), (2, "third")] {
        let mut client = cluster.nodes[node].client();
        assert_eq!(client.lookup(name, "", 0), Err(ResultCode::NO_VDI), "{name}");
        let vid = client.create_vdi(name, BLOCK).expect("create");
        assert_eq!(client.lookup(name, "", 0), Ok(vid), "{name}");
    }
    let list = cluster.dog(&["vdi", "list"]).ok();
    assert!(["child", "poisoned", "third"].iter().all(|n| list.contains(n)), "{list}");
}

/// 05, 7: a clone of another redundancy leaves its base's alone.
#[test]
fn a_clone_of_another_policy_leaves_its_base_readable() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    let policy = CopyPolicy::erasure(2, 1).expect("valid").to_byte();
    let body = VdiRequest { vdi_size: 8 << 20, copies: 3, copy_policy: policy, ..VdiRequest::zeroed() };
    let response = client.vdi_op(Opcode::NEW_VDI, "base", None, body);
    assert_eq!(response.result, ResultCode::SUCCESS);
    let base = response.vdi().vdi_id;
    Vdi::open(&mut client, base).expect("open").write(&mut client, 0, &[3; 8192]).expect("write");
    client.snapshot("base", "s").expect("snapshot");
    // As qemu-img does: no copies, so the cluster's redundancy.
    let body = VdiRequest { vdi_size: 8 << 20, base_vdi_id: base, ..VdiRequest::zeroed() };
    let response = client.vdi_op(Opcode::NEW_VDI, "clone", None, body);
    assert_eq!(response.result, ResultCode::SUCCESS);
    let clone = response.vdi().vdi_id;
    for node in 0..3 {
        let mut client = cluster.nodes[node].client();
        for vid in [base, clone] {
            let vdi = Vdi::open(&mut client, vid).expect("open");
            assert_eq!(vdi.read(&mut client, 0, 8192).expect("read"), [3; 8192], "node {node} {vid:?}");
        }
        let policies: Vec<u8> = [base, clone]
            .map(|vid| states(&mut client).into_iter().find(|s| s.vid == vid).expect("known").copy_policy)
            .to_vec();
        assert_eq!(policies, [policy, 0], "node {node}");
    }
    let mut copy = Vdi::open(&mut client, clone).expect("open");
    copy.write(&mut client, 512, &[4; 512]).expect("copy-on-write across policies");
    assert_eq!(
        copy.read(&mut client, 0, 2048).expect("read"),
        [[3; 512], [4; 512], [3; 512], [3; 512]].concat()
    );
    for (name, snapid) in [("base", 1), ("base", 0), ("clone", 0)] {
        delete(&mut client, name, snapid);
    }
    wait_empty(&cluster);
}

/// 05, 10: an object that has a ledger is not removed by a drop that says it was never shared.
#[test]
fn a_drop_as_unshared_removes_nothing_that_has_a_ledger() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    let vid = client.create_vdi("shared", 8 << 20).expect("create");
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    for block in 0..2 {
        vdi.write(&mut client, block * BLOCK, &[1; 4096]).expect("write");
    }
    let oid = Oid::data(vid, 0);
    let body = RefRequest { oid: Oid::ledger_of(oid), generation: 0, count: 2 };
    assert!(client.must(Request::new(Opcode::DECREF_OBJ).with_reference(body), &[]).0.result.is_ok());
    assert_eq!(client.ledger(oid).expect("ledger"), Some(vec![0, 2]));
    vdi.set_owner(&mut client, 0, VdiId::NONE).expect("discard");
    vdi.set_owner(&mut client, 1, VdiId::NONE).expect("discard");
    wait("the object without a ledger to go", || cluster.holders(Oid::data(vid, 1)).is_empty());
    assert_eq!(cluster.holders(oid), [0, 1, 2]);
    assert_eq!(client.ledger(oid).expect("ledger"), Some(vec![0, 2]));
    // The two references that the ledger knows of go; with them the object, once.
    for _ in 0..2 {
        let body = RefRequest { oid: Oid::ledger_of(oid), generation: 1, count: 0 };
        assert!(client.must(Request::new(Opcode::DECREF_OBJ).with_reference(body), &[]).0.result.is_ok());
    }
    assert!(cluster.holders(oid).is_empty() && cluster.holders(Oid::ledger_of(oid)).is_empty());
}

/// 05, 5: a missing tag is an empty one.
#[test]
fn a_snapshot_id_with_a_name_alone_is_looked_up() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    let first = client.create_vdi("test", BLOCK).expect("create");
    client.snapshot("test", "t1").expect("snapshot");
    let payload = name_payload("test", None);
    for (snapid, expected) in [(1, ResultCode::SUCCESS), (2, ResultCode::NO_TAG), (7, ResultCode::NO_TAG)] {
        let body = VdiRequest { snapid, ..VdiRequest::zeroed() };
        for opcode in [Opcode::GET_VDI_INFO, Opcode::LOCK_VDI] {
            let response = client.vdi_op(opcode, "test", None, body);
            assert_eq!(response.result, expected, "{opcode} {snapid}");
            if expected.is_ok() {
                assert_eq!(response.vdi().vdi_id, first);
            }
        }
    }
    for length in [0, 255, 257, 511, 513, 1024] {
        let mut bytes = payload.clone();
        bytes.resize(length, 0);
        let request = Request::new(Opcode::GET_VDI_INFO).flag(sheepdog_proto::Flags::WRITE).length(length);
        assert_eq!(client.must(request, &bytes).0.result, ResultCode::INVALID_PARMS, "{length} bytes");
    }
}

/// 05, 13: a header that was read before a snapshot and is written after it, to the old vid.
#[test]
fn old_headers_do_not_undo_snapshots() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    let vid = client.create_vdi("vm", 8 << 20).expect("create");
    Vdi::open(&mut client, vid).expect("open").write(&mut client, 0, &[1; 512]).expect("write");
    let mut head = client.inode(vid).expect("inode");
    head.vdi_size = 16 << 20;
    let resized = head.encode();
    client.snapshot("vm", "s").expect("snapshot");
    let write =
        |client: &mut Client, bytes: &[u8]| client.write_obj(Oid::inode(vid), 0, bytes).expect("an answer");
    assert_eq!(resized.len(), INODE_HEADER_LEN);
    assert_eq!(write(&mut client, &resized), ResultCode::READONLY);
    assert_eq!(write(&mut cluster.nodes[2].client(), &resized), ResultCode::READONLY);
    assert!(client.inode(vid).expect("inode").is_snapshot());
    let now = client.inode(vid).expect("inode");
    assert_eq!(write(&mut client, &now.encode()), ResultCode::SUCCESS, "as it is");
    let other = sheepdog_proto::inode::InodeHeader { vdi_id: VdiId::new(0x1234), ..now };
    assert_eq!(write(&mut client, &other.encode()), ResultCode::INVALID_PARMS, "another vid");
}

/// 05, 13: sizes only grow by the tools, but nothing stops other clients; blocks behind the end are not forgotten.
#[test]
fn blocks_behind_a_smaller_end_are_kept_and_freed() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    let vid = client.create_vdi("vm", 16 << 20).expect("create");
    Vdi::open(&mut client, vid).expect("open").write(&mut client, 3 * BLOCK, &[6; 512]).expect("write");
    let resize = |client: &mut Client, vid, size: u64| {
        let result = client.write_obj(Oid::inode(vid), 536, &size.to_le_bytes()).expect("an answer");
        assert_eq!(result, ResultCode::SUCCESS);
    };
    resize(&mut client, vid, 4 << 20);
    let working = client.snapshot("vm", "s").expect("snapshot");
    resize(&mut client, working, 16 << 20);
    let vdi = Vdi::open(&mut client, working).expect("open");
    assert_eq!(vdi.read(&mut client, 3 * BLOCK, 512).expect("read"), [6; 512]);
    resize(&mut client, working, 4 << 20);
    delete(&mut client, "vm", 0);
    delete(&mut client, "vm", 1);
    wait_empty(&cluster);
}

/// 05, 26: a client that goes on writing to a VDI while it is deleted gets errors and leaves nothing.
#[test]
fn writers_of_a_deleted_vdi_leave_nothing() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    let vid = client.create_vdi("busy", 256 << 20).expect("create");
    let ports: Vec<u16> = cluster.nodes.iter().map(|n| n.port).collect();
    let ready = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for (t, port) in ports.iter().enumerate() {
            let (port, ready) = (*port, &ready);
            scope.spawn(move || {
                let mut client = Client::connect(port).expect("connect");
                let mut vdi = Vdi::open(&mut client, vid).expect("open");
                let mut refused = 0;
                for block in (t as u64..64).step_by(3) {
                    ready.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    refused += u32::from(vdi.write(&mut client, block * BLOCK, &[1; 4096]).is_err());
                }
                assert!(refused > 0, "writes to a deleted VDI were acknowledged");
            });
        }
        wait("the writers", || ready.load(std::sync::atomic::Ordering::Relaxed) > 6);
        delete(&mut client, "busy", 0);
    });
    assert_eq!(client.lookup("busy", "", 0), Err(ResultCode::NO_VDI));
    wait_empty(&cluster);
    let again = client.create_vdi("busy", BLOCK).expect("the name is free");
    assert_eq!(again.get(), vid.get() + 1);
}

/// 05, 11 and 22: a hypervolume whose root was cleared, as the original's dog does before deleting one.
#[test]
fn a_hypervolume_with_a_broken_root_is_deleted() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    let body = VdiRequest { vdi_size: 8 << 40, store_policy: STORE_POLICY_BTREE, ..VdiRequest::zeroed() };
    let vid = {
        let response = client.vdi_op(Opcode::NEW_VDI, "hyper", None, body);
        assert_eq!(response.result, ResultCode::SUCCESS);
        response.vdi().vdi_id
    };
    let cleared = client.write_obj(Oid::inode(vid), TABLE_OFFSET as u32, &[0; 512]).expect("an answer");
    assert_eq!(cleared, ResultCode::SUCCESS);
    delete(&mut client, "hyper", 0);
    assert_eq!(client.lookup("hyper", "", 0), Err(ResultCode::NO_VDI));
    assert_eq!(cluster.running(), [0, 1, 2]);
}

/// 05, 19 and 01, 7.6: redundancy that no object could be placed by is refused everywhere.
#[test]
fn redundancy_that_cannot_be_is_refused() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    let vid = client.create_vdi("vm", BLOCK).expect("create");
    let good = VdiStateRequest {
        old_vid: VdiId::NONE,
        new_vid: vid,
        copies: 2,
        set_bitmap: 0,
        copy_policy: 0,
        block_size_shift: 22,
    };
    let bad = [
        VdiStateRequest { copies: 0, ..good },
        VdiStateRequest { copies: 32, ..good },
        VdiStateRequest { copy_policy: 0x20, ..good },
        VdiStateRequest { copy_policy: 0x01, ..good },
        VdiStateRequest { block_size_shift: 19, ..good },
        VdiStateRequest { block_size_shift: 40, ..good },
    ];
    for body in bad {
        for opcode in [Opcode::NOTIFY_VDI_ADD, Opcode::ALTER_VDI_COPY] {
            let request = Request::new(opcode).with_vdi_state(body);
            assert_eq!(client.must(request, &[]).0.result, ResultCode::INVALID_PARMS, "{opcode} {body:?}");
        }
    }
    let coded = VdiStateRequest { copy_policy: 0x21, copies: 3, ..good };
    let request = Request::new(Opcode::ALTER_VDI_COPY).with_vdi_state(coded);
    assert_eq!(client.must(request, &[]).0.result, ResultCode::INVALID_PARMS);
    let unknown = VdiStateRequest { new_vid: VdiId::new(vid.get() + 1), ..good };
    let request = Request::new(Opcode::ALTER_VDI_COPY).with_vdi_state(unknown);
    assert_eq!(client.must(request, &[]).0.result, ResultCode::NO_VDI);
    cluster.dog(&["vdi", "create", "coded", "4M", "-c", "2:1"]).ok();
    let new_vid = client.lookup("coded", "", 0).expect("it exists");
    let request = Request::new(Opcode::ALTER_VDI_COPY).with_vdi_state(VdiStateRequest { new_vid, ..good });
    assert_eq!(client.must(request, &[]).0.result, ResultCode::INVALID_PARMS);
    let state = states(&mut client).into_iter().find(|s| s.vid == vid).expect("known");
    assert_eq!((state.nr_copies, state.copy_policy, state.block_size_shift), (3, 0, 22));
    let oid = Oid::data(vid, 0);
    assert!(client.create_obj(oid, None, 0, &[1; 512]).expect("create").is_ok());
    let body = ObjRequest { oid, ..ObjRequest::zeroed() };
    assert!(client.must(Request::new(Opcode::READ_OBJ).with_obj(body).length(512), &[]).0.result.is_ok());
}

/// Whoever joins sees no event from before its join: a member that has not come so far must not be taken for one that knows
/// no more. It would lack VDIs for good, and two of one name could be made.
#[test]
fn a_table_is_not_told_to_a_node_that_joined_later_than_its_teller_has_heard() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.nodes[0].client();
    client.set_timeout(Duration::from_secs(30)).expect("a longer timeout");
    let epoch = cluster.epoch(0).expect("it serves");
    let ask = move |client: &mut Client, epoch| {
        let body = ObjRequest { tgt_epoch: Epoch(epoch), ..ObjRequest::zeroed() };
        let request = Request::new(Opcode::GET_VDI_COPIES).length(512 * VdiState::LEN).with_obj(body);
        client.must(request, &[]).0
    };
    for reached in [0, epoch] {
        assert_eq!(ask(&mut client, reached).result, ResultCode::SUCCESS);
    }
    assert_eq!(ask(&mut client, epoch + 1).result, ResultCode::AGAIN);
    let asking = std::thread::spawn(move || {
        loop {
            let told = ask(&mut client, epoch + 1);
            if told.result != ResultCode::AGAIN {
                return (told, client);
            }
        }
    });
    cluster.kill9(2);
    let (told, mut client) = asking.join().expect("no panic");
    assert_eq!((told.result, told.epoch), (ResultCode::SUCCESS, Epoch(epoch + 1)));
    assert_eq!(ask(&mut client, epoch + 2).result, ResultCode::AGAIN);
    // A node that joins asks so, and gets what it needs.
    let vid = client.create_vdi("before", 8 << 20).expect("create");
    cluster.start(2);
    cluster.wait_members(3);
    wait("its table", || bits(&mut cluster.nodes[2].client(), Opcode::READ_VDIS) == [vid.get()]);
}
