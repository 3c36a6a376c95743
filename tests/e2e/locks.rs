//! The lock sequence of `vdi-misc.json`: normal and shared locks, inode coherence.

use serde_json::{Value, json};
use sheepdog_proto::header::{ObjRequest, VdiRequest};
use sheepdog_proto::vdi_state::{LOCKED, PART_INVALIDATED, PART_MODIFIED, PART_SHARED, SHARED, UNLOCKED};
use sheepdog_proto::{ClusterFlags, Flags, Oid, Opcode, Request, ResultCode, VdiId, VdiState, Wire};
use sheepdog_testkit::vdi::name_payload;
use sheepdog_testkit::vectors::load;
use sheepdog_testkit::{Builder, Cluster, wait_for};

/// State of the lock in the words of the vectors, as node 0 answers.
pub(crate) fn lock_state(cluster: &Cluster, vid: VdiId) -> Value {
    let (response, bytes) =
        cluster.nodes[0].client().must(Request::new(Opcode::GET_VDI_COPIES).length(512 * VdiState::LEN), &[]);
    assert_eq!(response.result, ResultCode::SUCCESS);
    let state = bytes.chunks_exact(VdiState::LEN).map(VdiState::get).find(|s| s.vid == vid).expect("the VDI");
    let node = |port: u16| cluster.nodes.iter().position(|n| n.port == port).expect("one of ours");
    match state.lock_state {
        UNLOCKED => json!({"lock_state": "UNLOCKED"}),
        LOCKED => json!({"lock_state": "LOCKED", "owner_node": node(state.lock_owner.port)}),
        SHARED => {
            let who =
                state.participants.iter().zip(state.participants_state).take(state.nr_participants as usize);
            let list: Vec<Value> = who
                .map(|(nid, what)| {
                    let what = match what {
                        PART_MODIFIED => "MODIFIED",
                        PART_SHARED => "SHARED",
                        PART_INVALIDATED => "INVALIDATED",
                        other => panic!("participant state {other}"),
                    };
                    json!([format!("node{}", node(nid.port)), what])
                })
                .collect();
            json!({"lock_state": "SHARED", "participants": list})
        }
        other => panic!("lock state {other}"),
    }
}

fn step_request(words: &[&str], vid: VdiId) -> (Request, Vec<u8>) {
    let lock_type = u32::from(words.contains(&"type=shared"));
    let inode = ObjRequest { oid: Oid::inode(vid), ..ObjRequest::zeroed() };
    let (mut request, payload) = match words[1] {
        "LOCK_VDI" => {
            let payload = name_payload("locked", Some(""));
            let body = VdiRequest { lock_type, ..VdiRequest::zeroed() };
            (Request::new(Opcode::LOCK_VDI).flag(Flags::WRITE).with_vdi(body).length(payload.len()), payload)
        }
        "RELEASE_VDI" => {
            let body = VdiRequest { lock_type, base_vdi_id: vid, ..VdiRequest::zeroed() };
            (Request::new(Opcode::RELEASE_VDI).with_vdi(body), Vec::new())
        }
        "READ_OBJ" => {
            let length = words.iter().position(|w| *w == "length").expect("length") + 1;
            let length = words[length].parse().expect("number");
            (Request::new(Opcode::READ_OBJ).with_obj(inode).length(length), Vec::new())
        }
        "WRITE_OBJ" => {
            let body = ObjRequest { offset: sheepdog_proto::inode::TABLE_OFFSET as u32, ..inode };
            (Request::new(Opcode::WRITE_OBJ).flag(Flags::WRITE).with_obj(body).length(4), vec![0; 4])
        }
        other => panic!("step {other}"),
    };
    if words.ends_with(&["flag", "TGT"]) {
        request = request.flag(Flags::TGT);
    }
    (request, payload)
}

#[test]
fn locks_change_as_the_original_changed_them() {
    let vectors = load("vdi-misc.json");
    let cluster = Builder::new(3).flags(ClusterFlags::AUTO_VNODES.with(ClusterFlags::USE_LOCK)).start();
    let vid = cluster.nodes[0].client().create_vdi("locked", 4 << 20).expect("create");
    for (number, step) in vectors["lock_sequence"]["steps"].as_array().expect("steps").iter().enumerate() {
        let words: Vec<&str> = step["do"].as_str().expect("do").split(' ').collect();
        let node: usize = words[0].strip_prefix("node").expect("node").parse().expect("number");
        let (request, payload) = step_request(&words, vid);
        let (response, _) = cluster.nodes[node].client().must(request, &payload);
        assert_eq!(response.result.name(), step["result"].as_str(), "step {number}: {}", step["do"]);
        // Node 0 may hear of it a moment after the client of another node has its answer.
        let expected = &step["state"];
        let mut last = Value::Null;
        let what = format!("step {number}, {}: state {expected}", step["do"]);
        wait_for(&what, std::time::Duration::from_secs(20), || {
            let state = lock_state(&cluster, vid);
            if state != last {
                eprintln!("step {number} {}: {state}", step["do"]);
                last = state;
            }
            (last == *expected).then_some(())
        });
    }
}

/// Without the cluster flag a lock is a lookup.
#[test]
fn without_the_lock_flag_everybody_may_open() {
    let cluster = Builder::new(2).copies(2).start();
    let vid = cluster.nodes[0].client().create_vdi("open", 4 << 20).expect("create");
    for node in [0, 1, 0] {
        let body = VdiRequest::zeroed();
        let response = cluster.nodes[node].client().vdi_op(Opcode::LOCK_VDI, "open", Some(""), body);
        assert_eq!((response.result, response.vdi().vdi_id), (ResultCode::SUCCESS, vid));
    }
    assert_eq!(lock_state(&cluster, vid), json!({"lock_state": "UNLOCKED"}));
}

/// 05, 18: a node that joins learns who holds what.
#[test]
fn a_joining_node_learns_the_locks() {
    let mut cluster = Builder::new(3).flags(ClusterFlags::AUTO_VNODES.with(ClusterFlags::USE_LOCK)).start();
    let vid = cluster.nodes[1].client().create_vdi("held", 4 << 20).expect("create");
    let lock = |cluster: &Cluster, node: usize| {
        cluster.nodes[node].client().vdi_op(Opcode::LOCK_VDI, "held", Some(""), VdiRequest::zeroed()).result
    };
    assert_eq!(lock(&cluster, 1), ResultCode::SUCCESS);
    cluster.kill9(0);
    cluster.wait_epoch(2);
    cluster.start(0);
    cluster.wait_epoch(3);
    // COLLECTING_CINFO is allowed while it asks the others; never SUCCESS.
    let answer = wait_for("node 0 to know the lock", std::time::Duration::from_secs(30), || {
        Some(lock(&cluster, 0)).filter(|r| *r != ResultCode::COLLECTING_CINFO)
    });
    assert_eq!(answer, ResultCode::VDI_LOCKED);
    assert_eq!(lock_state(&cluster, vid), json!({"lock_state": "LOCKED", "owner_node": 1}));
}

/// A normal lock goes with the working VDI: whoever has it open goes on with the new one and releases that.
#[test]
fn a_snapshot_takes_the_lock_along() {
    let cluster = Builder::new(3).flags(ClusterFlags::AUTO_VNODES.with(ClusterFlags::USE_LOCK)).start();
    let lock = |node: usize, lock_type: u32| {
        let body = VdiRequest { lock_type, ..VdiRequest::zeroed() };
        cluster.nodes[node].client().vdi_op(Opcode::LOCK_VDI, "held", Some(""), body).result
    };
    let release = |vid: VdiId| {
        let body = VdiRequest { base_vdi_id: vid, ..VdiRequest::zeroed() };
        cluster.nodes[2].client().must(Request::new(Opcode::RELEASE_VDI).with_vdi(body), &[]).0.result
    };
    let old = cluster.nodes[0].client().create_vdi("held", 4 << 20).expect("create");
    assert_eq!(lock(1, 0), ResultCode::SUCCESS);
    let new = cluster.nodes[0].client().snapshot("held", "s").expect("snapshot");
    assert_eq!(lock_state(&cluster, old), json!({"lock_state": "UNLOCKED"}));
    assert_eq!(lock_state(&cluster, new), json!({"lock_state": "LOCKED", "owner_node": 1}));
    assert_eq!(lock(2, 0), ResultCode::VDI_LOCKED);
    // A live rollback is another new working VDI.
    let body = VdiRequest { vdi_size: 4 << 20, base_vdi_id: old, snapid: 1, ..VdiRequest::zeroed() };
    let rolled = cluster.nodes[2].client().vdi_op(Opcode::NEW_VDI, "held", None, body);
    assert_eq!(rolled.result, ResultCode::SUCCESS);
    let third = rolled.vdi().vdi_id;
    assert_eq!(lock(0, 0), ResultCode::VDI_LOCKED);
    assert_eq!(release(third), ResultCode::SUCCESS);
    // Who shares a VDI locks the new one again, as tgt does.
    assert_eq!(lock(1, 1), ResultCode::SUCCESS);
    let fourth = cluster.nodes[0].client().snapshot("held", "t").expect("snapshot");
    assert_eq!(lock_state(&cluster, fourth), json!({"lock_state": "UNLOCKED"}));
    assert_eq!(lock(1, 1), ResultCode::SUCCESS);
}

/// A client that wrote nothing since somebody took snapshots closes the vid that it opened.
#[test]
fn a_lock_is_given_back_by_the_vid_that_was_locked() {
    let cluster = Builder::new(3).flags(ClusterFlags::AUTO_VNODES.with(ClusterFlags::USE_LOCK)).start();
    let lock = |node: usize| {
        cluster.nodes[node].client().vdi_op(Opcode::LOCK_VDI, "held", Some(""), VdiRequest::zeroed()).result
    };
    let release = |node: usize, vid: VdiId| {
        let body = VdiRequest { base_vdi_id: vid, ..VdiRequest::zeroed() };
        cluster.nodes[node].client().must(Request::new(Opcode::RELEASE_VDI).with_vdi(body), &[]).0.result
    };
    let opened = cluster.nodes[0].client().create_vdi("held", 4 << 20).expect("create");
    assert_eq!(lock(1), ResultCode::SUCCESS);
    cluster.nodes[0].client().snapshot("held", "s").expect("snapshot");
    let working = cluster.nodes[0].client().snapshot("held", "t").expect("snapshot");
    assert_eq!(lock_state(&cluster, working), json!({"lock_state": "LOCKED", "owner_node": 1}));
    // Only from the node that has it: others may have opened the snapshot.
    assert_eq!(release(2, opened), ResultCode::SUCCESS);
    assert_eq!(lock(2), ResultCode::VDI_LOCKED);
    assert_eq!(release(1, opened), ResultCode::SUCCESS);
    assert_eq!(lock(2), ResultCode::SUCCESS);
    // Once only: the next one to lock it keeps it.
    assert_eq!(release(2, opened), ResultCode::SUCCESS);
    assert_eq!(lock(0), ResultCode::VDI_LOCKED, "node 0 has heard of all that by now");
    assert_eq!(lock_state(&cluster, working), json!({"lock_state": "LOCKED", "owner_node": 2}));
}

/// 05, 16: with `--lock-grace` the lock of a node that is gone for so long is released, and only then.
#[test]
fn locks_of_a_lost_node_are_released_after_the_grace() {
    let flags = ClusterFlags::AUTO_VNODES.with(ClusterFlags::USE_LOCK);
    let mut cluster = Builder::new(4).flags(flags).arg("--lock-grace").arg("8").start();
    let lock = |cluster: &Cluster, node: usize, name: &str| {
        cluster.nodes[node].client().vdi_op(Opcode::LOCK_VDI, name, Some(""), VdiRequest::zeroed()).result
    };
    let [lost, kept] = ["lost", "kept"].map(|name| cluster.nodes[0].client().create_vdi(name, 4 << 20));
    let (lost, kept) = (lost.expect("create"), kept.expect("create"));
    assert_eq!(lock(&cluster, 3, "lost"), ResultCode::SUCCESS);
    assert_eq!(lock(&cluster, 2, "kept"), ResultCode::SUCCESS);
    cluster.kill9(3);
    cluster.wait_epoch(2);
    assert_eq!(lock(&cluster, 0, "lost"), ResultCode::VDI_LOCKED);
    // The same for a node that is back in time.
    cluster.kill9(2);
    cluster.wait_epoch(3);
    cluster.start(2);
    cluster.wait_epoch(4);
    wait_for("the lock to be released", std::time::Duration::from_secs(30), || {
        (lock(&cluster, 1, "lost") == ResultCode::SUCCESS).then_some(())
    });
    let locked = json!({"lock_state": "LOCKED", "owner_node": 1});
    wait_for("node 0 to hear of it", std::time::Duration::from_secs(30), || {
        (lock_state(&cluster, lost) == locked).then_some(())
    });
    wait_for("the grace to pass for node 2", std::time::Duration::from_secs(30), || {
        (0..2).any(|n| cluster.nodes[n].log().contains("is back within the grace")).then_some(())
    });
    assert_eq!(lock_state(&cluster, lost), locked);
    assert_eq!(lock_state(&cluster, kept), json!({"lock_state": "LOCKED", "owner_node": 2}));
    assert_eq!(lock(&cluster, 1, "kept"), ResultCode::VDI_LOCKED);
}
