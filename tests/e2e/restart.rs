//! Whole clusters that stop and come back: orderly, crashed, in parts, in any order (spec 04, 22.4, 22.5 and 22.7).

use std::fs;
use std::time::Duration;

use sheepdog_proto::{ClusterStatus, Oid, Opcode, Request, ResultCode, VDI_BITMAP_LEN};
use sheepdog_testkit::{Cluster, Vdi, wait};

const BLOCK: u64 = 4 << 20;

fn shutdown_byte(cluster: &Cluster, index: usize) -> u8 {
    fs::read(cluster.nodes[index].dir.join("config")).expect("config")[27]
}

fn shutdown(cluster: &mut Cluster) {
    let (response, _) = cluster.client().must(Request::new(Opcode::SHUTDOWN), &[]);
    assert_eq!(response.result, ResultCode::SUCCESS);
    for node in &mut cluster.nodes {
        assert_eq!(node.wait_exit(Duration::from_secs(30)).code(), Some(0), "node {}", node.index);
    }
}

/// A VDI with something in each of its blocks.
fn fill(cluster: &mut Cluster, name: &str) -> Vdi {
    let mut client = cluster.client();
    let vid = client.create_vdi(name, 4 * BLOCK).expect("create");
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    for block in 0..4 {
        vdi.write(&mut client, block * BLOCK + 8192, &vec![block as u8 + 1; 65_536]).expect("write");
    }
    vdi
}

fn assert_filled(cluster: &mut Cluster, vdi: &Vdi) {
    for index in cluster.running() {
        let mut client = cluster.nodes[index].client();
        for block in 0..4 {
            let bytes = vdi.read(&mut client, block * BLOCK, 8192 + 65_536 + 4096).expect("read");
            assert!(bytes[..8192].iter().all(|b| *b == 0), "block {block} at node {index}");
            assert!(
                bytes[8192..8192 + 65_536].iter().all(|b| *b == block as u8 + 1),
                "block {block} at {index}"
            );
            assert!(bytes[8192 + 65_536..].iter().all(|b| *b == 0), "block {block} at node {index}");
        }
    }
}

/// 22.4
#[test]
fn a_part_of_a_cluster_waits_for_the_rest_until_it_is_forced() {
    let mut cluster = Cluster::new(3);
    let vdi = fill(&mut cluster, "kept");
    shutdown(&mut cluster);
    assert!((0..3).all(|i| shutdown_byte(&cluster, i) == 1), "an orderly end");

    cluster.start(0);
    cluster.start(1);
    cluster.wait_members(2);
    cluster.wait_status(0, ClusterStatus::Wait);
    let mut client = cluster.client();
    let status = client.must(Request::new(Opcode::STAT_CLUSTER).length(4096), &[]).0.result;
    assert_eq!(status.to_string(), "Waiting for other nodes to join cluster");
    let bitmap = client.must(Request::new(Opcode::READ_VDIS).length(VDI_BITMAP_LEN), &[]);
    assert_eq!((bitmap.0.result, bitmap.1.len()), (ResultCode::SUCCESS, VDI_BITMAP_LEN));
    assert_eq!(client.lookup("kept", "", 0), Err(ResultCode::WAIT_FOR_JOIN));
    assert_eq!(client.must(Request::new(Opcode::STAT_SHEEP), &[]).0.result, ResultCode::WAIT_FOR_JOIN);
    let info = cluster.info(0).expect("an answer");
    assert_eq!((info.header.status, info.nodes.len(), info.header.epoch.0), (2, 3, 1));

    let force = Request::new(Opcode::FORCE_RECOVER).length(6144 * 80);
    let (response, nodes) = client.must(force, &[]);
    assert_eq!((response.result, nodes.len()), (ResultCode::SUCCESS, 3 * 80), "the list of the last epoch");
    cluster.wait_epoch(2);
    cluster.wait_running();
    assert_filled(&mut cluster, &vdi);
    cluster.start(2);
    cluster.wait_epoch(3);
    cluster.wait_recovered();
    assert_filled(&mut cluster, &vdi);
    cluster.assert_replicas_equal(3);
}

/// 22.5, first part
#[test]
fn a_cluster_that_was_shut_down_comes_back_as_it_was() {
    let mut cluster = Cluster::new(3);
    let vdi = fill(&mut cluster, "kept");
    shutdown(&mut cluster);
    for i in [2, 0, 1] {
        cluster.start(i);
    }
    cluster.wait_running();
    cluster.wait_epoch(1);
    wait("the shutdown byte to be cleared", || (0..3).all(|i| shutdown_byte(&cluster, i) == 0));
    assert_filled(&mut cluster, &vdi);
    assert_eq!(cluster.client().lookup("kept", "", 0), Ok(vdi.vid()));
    let log = cluster.nodes[0].log();
    assert!(!log.contains("all nodes are recovered, epoch 1"), "there was nothing to recover");
}

/// 22.5, second part
#[test]
fn a_cluster_killed_as_a_whole_checks_itself_when_it_returns() {
    let mut cluster = Cluster::new(3);
    let vdi = fill(&mut cluster, "kept");
    cluster.kill9_all();
    // What a crash may take with it: the epoch is recovered against itself, so it comes back.
    let lost = cluster.object_path(0, Oid::data(vdi.vid(), 1)).expect("three copies on three nodes");
    fs::remove_file(&lost).expect("remove");
    for i in [1, 2, 0] {
        cluster.start(i);
    }
    cluster.wait_recovered();
    cluster.wait_epoch(1);
    wait("the lost object to be back", || lost.is_file());
    assert_filled(&mut cluster, &vdi);
    cluster.assert_replicas_equal(3);
}

/// 22.5, third part: the last one knows most.
#[test]
fn nodes_stopped_one_by_one_wait_for_the_last_one() {
    let mut cluster = Cluster::new(3);
    let vdi = fill(&mut cluster, "kept");
    assert_eq!(cluster.stop(0), Some(0));
    cluster.wait_epoch(2);
    cluster.wait_recovered();
    assert_eq!(cluster.stop(1), Some(0));
    cluster.wait_epoch(3);
    cluster.wait_recovered();
    // Written while only node 2 is there: nobody else has it.
    let mut vdi = vdi;
    let mut client = cluster.client();
    vdi.write(&mut client, BLOCK + 8192, &vec![2; 65_536]).expect("write");
    vdi.write(&mut client, 3 * BLOCK + 2 * 1024 * 1024, &[0x77; 4096]).expect("write");
    assert_eq!(cluster.stop(2), Some(0));

    cluster.start(1);
    cluster.start(0);
    cluster.wait_members(2);
    cluster.wait_status(0, ClusterStatus::Wait);
    cluster.wait_status(1, ClusterStatus::Wait);
    assert_eq!(cluster.client().lookup("kept", "", 0), Err(ResultCode::WAIT_FOR_JOIN));
    cluster.start(2);
    cluster.wait_recovered();
    cluster.wait_epoch(4);
    assert_filled(&mut cluster, &vdi);
    for i in 0..3 {
        let bytes =
            vdi.read(&mut cluster.nodes[i].client(), 3 * BLOCK + 2 * 1024 * 1024, 4096).expect("read");
        assert_eq!(bytes, [0x77; 4096], "the newest version, asked at node {i}");
    }
    cluster.assert_replicas_equal(3);
}

/// A node that was away while data changed gets the new version before it serves.
#[test]
fn a_returning_node_never_shows_old_data() {
    let mut cluster = Cluster::new(4);
    let mut vdi = fill(&mut cluster, "kept");
    for round in 0..4u8 {
        let away = usize::from(round);
        cluster.kill9(away);
        cluster.wait_running();
        let mut client = cluster.client();
        for block in 0..4 {
            vdi.write(&mut client, block * BLOCK, &vec![0x80 + round; 4096]).expect("write with a node down");
        }
        cluster.start(away);
        cluster.wait_members(4);
        cluster.wait_status(away, ClusterStatus::Ok);
        let mut returned = cluster.nodes[away].client();
        for block in 0..4 {
            let bytes = vdi.read(&mut returned, block * BLOCK, 4096).expect("read at the returned node");
            assert_eq!(bytes, vec![0x80 + round; 4096], "round {round}, block {block}");
        }
    }
    cluster.wait_recovered();
    cluster.assert_replicas_equal(3);
}

/// Every node restarts once, one after the other, and nothing is lost (05, 15: tables are rebuilt from disks and peers).
#[test]
fn vdis_survive_a_rolling_restart() {
    let mut cluster = Cluster::new(3);
    let vdi = fill(&mut cluster, "kept");
    let snapshot = vdi.vid();
    let working = cluster.client().snapshot("kept", "s1").expect("snapshot");
    let body = Request::new(Opcode::READ_DEL_VDIS).length(VDI_BITMAP_LEN);
    for i in 0..3 {
        assert_eq!(cluster.stop(i), Some(0));
        cluster.wait_running();
        cluster.start(i);
        cluster.wait_recovered();
    }
    for i in 0..3 {
        let mut client = cluster.nodes[i].client();
        assert_eq!(client.lookup("kept", "", 0), Ok(working), "node {i}");
        assert_eq!(client.lookup("kept", "s1", 0), Ok(snapshot), "node {i}");
        assert!(client.must(body, &[]).1.iter().all(|b| *b == 0), "nothing is deleted");
        // Still a snapshot for the gateway: its data objects are read-only.
        let refused = client.write_obj(Oid::data(snapshot, 0), 0, &[1; 512]).expect("an answer");
        assert_eq!(refused, ResultCode::READONLY, "node {i}");
    }
    assert_filled(&mut cluster, &vdi);
}
