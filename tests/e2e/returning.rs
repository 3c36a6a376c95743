//! Nodes that come back after others went on without them: nothing old is taken for new, nothing is lost, nothing that was
//! removed returns (spec 06, 14.1 and T2, T3, T19; W-02, W-09).

use std::fs;
use std::time::{Duration, Instant};

use sheepdog_proto::header::ClusterRequest;
use sheepdog_proto::{ClusterFlags, Oid, Opcode, Request, ResultCode, VdiId};
use sheepdog_testkit::{Builder, Client, Cluster, Vdi, wait};

const BLOCK: u64 = 4 << 20;

/// A VDI with something in each of its blocks.
fn filled(cluster: &mut Cluster, name: &str, blocks: u32, byte: u8) -> Vdi {
    let mut client = cluster.client();
    let vid = client.create_vdi(name, u64::from(blocks) * BLOCK).expect("create");
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    for block in 0..blocks {
        vdi.write(&mut client, u64::from(block) * BLOCK, &[byte; 4096]).expect("write");
    }
    vdi
}

/// What a node answers to a read of the object's first bytes; none if it does not know within a second.
fn asked(cluster: &Cluster, node: usize, oid: Oid) -> Option<(ResultCode, Vec<u8>)> {
    let mut client = cluster.nodes[node].client();
    client.set_timeout(Duration::from_secs(1)).expect("timeout");
    client.read_obj(oid, 0, 4096).ok().map(|(response, data)| (response.result, data))
}

fn assert_everywhere(cluster: &mut Cluster, vid: VdiId, blocks: u32, byte: u8) {
    for node in cluster.running() {
        let mut client = cluster.nodes[node].client();
        for block in 0..blocks {
            let (response, data) = client.read_obj(Oid::data(vid, block), 0, 4096).expect("read");
            assert_eq!(response.result, ResultCode::SUCCESS, "block {block} at node {node}");
            assert!(data.iter().all(|b| *b == byte), "block {block} at node {node}: {:02x?}", &data[..8]);
        }
    }
}

fn kill_both(cluster: &mut Cluster, a: usize, b: usize) {
    for node in [a, b] {
        cluster.nodes[node].signal(nix::sys::signal::Signal::SIGKILL);
    }
    cluster.kill9(a);
    cluster.kill9(b);
}

/// T3, W-02: an old version on one node, an empty replacement of a holder of the newest, the other holder away.
#[test]
fn an_old_version_is_never_taken_while_the_newest_is_away() {
    let mut cluster = Builder::new(5).copies(2).start();
    let vdi = filled(&mut cluster, "versions", 12, 1);
    let oid = Oid::data(vdi.vid(), 0);
    let old = cluster.homes(oid, 2)[0];
    cluster.kill9(old);
    cluster.wait_gathered();
    let mut client = cluster.client();
    for block in 0..12 {
        let written = client.write_obj(Oid::data(vdi.vid(), block), 0, &[2; 4096]).expect("write");
        assert_eq!(written, ResultCode::SUCCESS);
    }
    let newest = cluster.homes(oid, 2);
    kill_both(&mut cluster, newest[0], newest[1]);
    // Those that are left have everything that they know of.
    cluster.wait_gathered();
    cluster.wipe(newest[0]);
    cluster.start(newest[0]);
    cluster.wait_gathered();
    cluster.start(old);
    cluster.wait_members(4);
    cluster.wait_running();

    let waited = Instant::now() + Duration::from_secs(3);
    while Instant::now() < waited {
        for node in cluster.running() {
            if let Some((result, data)) = asked(&cluster, node, oid) {
                assert!(result != ResultCode::SUCCESS, "node {node} answered version {}", data[0]);
            }
        }
    }
    wait("the object to be told unfound", || {
        let states: Vec<_> = cluster.running().into_iter().filter_map(|n| cluster.recovery(n)).collect();
        states.iter().any(|s| s.nr_unfound > 0 && s.nr_finished < s.nr_total)
    });
    let shown = cluster.dog(&["node", "recovery"]).ok();
    assert!(shown.contains(" unfound"), "{shown}");
    let epoch = cluster.epoch(old).expect("it runs");
    for node in cluster.running() {
        let log = cluster.nodes[node].log();
        assert!(!log.contains(&format!("all nodes are recovered, epoch {epoch}\n")), "node {node}");
    }
    let health = cluster.dog(&["cluster", "health"]);
    assert_eq!(health.code, 2, "{}", health.stdout);

    cluster.start(newest[1]);
    cluster.wait_gathered();
    assert_everywhere(&mut cluster, vdi.vid(), 12, 2);
    cluster.assert_replicas_equal(2);
    assert!(!cluster.dog(&["node", "recovery"]).ok().contains("unfound"));
}

/// T2 with two copies: the objects of two nodes that die together are away, even when all others have recovered without
/// them, and return with the nodes, although they are at home elsewhere by then.
#[test]
fn objects_whose_homes_all_died_come_back_with_them() {
    let mut cluster = Builder::new(7).copies(2).start();
    for spare in 4..7 {
        assert_eq!(cluster.stop(spare), Some(0));
    }
    cluster.wait_gathered();
    let vdi = filled(&mut cluster, "pairs", 60, 7);
    let mut client = cluster.client();
    for block in 0..60 {
        client.write_obj(Oid::data(vdi.vid(), block), 0, &[8; 4096]).expect("write").ok().expect("written");
    }
    let homes: Vec<Vec<usize>> = (0..60).map(|block| cluster.homes(Oid::data(vdi.vid(), block), 2)).collect();
    let (a, b) = (homes[0][0], homes[0][1]);
    let lost: Vec<usize> = (0..60).filter(|i| homes[*i].contains(&a) && homes[*i].contains(&b)).collect();
    kill_both(&mut cluster, a, b);
    cluster.wait_gathered();
    for block in &lost {
        let node = cluster.running()[0];
        let (result, _) = asked(&cluster, node, Oid::data(vdi.vid(), *block as u32)).expect("an answer");
        assert_eq!(result, ResultCode::NO_OBJ, "block {block} has no home any more");
    }
    // New homes, that never saw the objects, and another epoch in which everybody has everything.
    for spare in 4..7 {
        cluster.start(spare);
    }
    cluster.wait_members(5);
    cluster.wait_gathered();
    cluster.start(a);
    cluster.wait_members(6);
    cluster.start(b);
    cluster.wait_gathered();
    assert_everywhere(&mut cluster, vdi.vid(), 60, 8);
    cluster.assert_replicas_equal(2);
    wait("stale copies to go", || (0..7).all(|i| cluster.nodes[i].stale_files().is_empty()));
}

fn data_files(cluster: &Cluster, vid: VdiId) -> Vec<(usize, Oid)> {
    let all = (0..cluster.nodes.len()).flat_map(|n| cluster.objects_of(n).into_keys().map(move |o| (n, o)));
    all.filter(|(_, oid)| oid.is_data() && oid.vid() == vid).collect()
}

/// T19: a deleted VDI, and blocks that a VDI which lives on has discarded.
#[test]
fn what_was_removed_while_a_home_was_away_does_not_return() {
    let mut cluster = Cluster::new(4);
    let dead = filled(&mut cluster, "dead", 8, 3);
    let mut living = filled(&mut cluster, "living", 8, 4);
    let away = 3;
    cluster.kill9(away);
    cluster.wait_gathered();
    cluster.dog(&["vdi", "delete", "dead"]).ok();
    let mut client = cluster.client();
    for block in 0..4 {
        living.set_owner(&mut client, block, VdiId::NONE).expect("discard");
    }
    let running = cluster.running();
    let left = |cluster: &Cluster| {
        let files = [data_files(cluster, dead.vid()), data_files(cluster, living.vid())].concat();
        let gone = |oid: &Oid| oid.vid() == dead.vid() || oid.index() < 4;
        files.into_iter().filter(|(node, oid)| running.contains(node) && gone(oid)).count()
    };
    wait("the blocks to be removed", || left(&cluster) == 0);
    // One block is written again: the new one stays.
    let again = Oid::data(living.vid(), 0);
    assert_eq!(client.create_obj(again, None, 0, &[5; 4096]).expect("create"), ResultCode::SUCCESS);
    living.set_owner(&mut client, 0, living.vid()).expect("map");

    cluster.start(away);
    cluster.wait_gathered();
    assert_eq!(data_files(&cluster, dead.vid()), []);
    let kept: Vec<u32> = data_files(&cluster, living.vid()).into_iter().map(|(_, oid)| oid.index()).collect();
    assert!(kept.iter().all(|index| ![1, 2, 3].contains(index)), "{kept:?}");
    for node in 0..4 {
        let (response, data) = cluster.nodes[node].client().read_obj(again, 0, 4096).expect("read");
        assert_eq!((response.result, data[0]), (ResultCode::SUCCESS, 5), "node {node}");
        let log = cluster.nodes[node].log();
        assert!(!log.contains("objects that deleted VDIs left"), "nothing came back to be removed");
    }
    cluster.assert_replicas_equal(3);
    wait("stale copies to go", || (0..4).all(|i| cluster.nodes[i].stale_files().is_empty()));
}

/// The same when those that removed it have restarted meanwhile.
#[test]
fn removals_are_remembered_across_restarts() {
    let mut cluster = Builder::new(3).copies(2).start();
    let mut living = filled(&mut cluster, "living", 12, 4);
    cluster.kill9(2);
    cluster.wait_gathered();
    let mut client = cluster.client();
    for block in 0..12 {
        living.set_owner(&mut client, block, VdiId::NONE).expect("discard");
    }
    let files = |cluster: &Cluster, nodes: usize| {
        data_files(cluster, living.vid()).into_iter().filter(|(node, _)| *node < nodes).count()
    };
    wait("the blocks to be removed", || files(&cluster, 2) == 0);
    for node in [0, 1] {
        cluster.kill9(node);
        cluster.wait_running();
        cluster.start(node);
        cluster.wait_gathered();
    }
    cluster.start(2);
    cluster.wait_gathered();
    assert_eq!(files(&cluster, 3), 0);
}

/// Objects of one copy that moved to a new node, whose move was interrupted by a crash of everything.
fn moving(blocks: u32) -> (Cluster, Vdi) {
    let mut cluster = Builder::new(4).copies(1).start();
    cluster.kill9(3);
    cluster.wait_gathered();
    let vdi = filled(&mut cluster, "moving", blocks, 9);
    cluster.dog(&["cluster", "recover", "disable"]).ok();
    cluster.wipe(3);
    cluster.start(3);
    cluster.wait_epoch(3);
    let moved = |cluster: &Cluster| (0..3).map(|i| cluster.nodes[i].stale_files().len()).sum::<usize>();
    wait("objects to be moved away", || moved(&cluster) > 0);
    cluster.kill9_all();
    for node in &cluster.nodes[..3] {
        assert!(node.stale_files().iter().all(|(name, _)| name.ends_with(".2")), "{:?}", node.stale_files());
    }
    assert!(cluster.objects_of(3).keys().all(|oid| !oid.is_data()), "node 3 has none of them yet");
    (cluster, vdi)
}

/// A power cut between the epoch log and the moves, by a daemon that did them in that order: the next start moves them
/// with the suffix of the new epoch.
#[test]
fn objects_moved_away_under_a_later_epoch_are_found() {
    let (mut cluster, vdi) = moving(48);
    for node in &cluster.nodes[..3] {
        for (name, path) in node.stale_files() {
            let late = name.replace(".2", ".3");
            fs::rename(&path, path.with_file_name(late)).expect("rename");
        }
    }
    for node in 0..4 {
        cluster.start(node);
    }
    cluster.wait_recovered();
    assert_everywhere(&mut cluster, vdi.vid(), 48, 9);
    cluster.assert_replicas_equal(1);
}

/// A power cut between the moves and the epoch log: the old epoch goes on, and what was moved away is the only copy.
#[test]
fn objects_moved_away_for_an_epoch_that_never_was_are_found() {
    let (mut cluster, vdi) = moving(48);
    for node in &cluster.nodes[..3] {
        fs::remove_file(node.dir.join("epoch/00000003")).expect("remove the log");
    }
    for node in 0..3 {
        cluster.start(node);
    }
    cluster.wait_recovered();
    cluster.wait_epoch(2);
    assert_everywhere(&mut cluster, vdi.vid(), 48, 9);
    cluster.assert_replicas_equal(1);
}

/// A crash in the middle of a format: the node has some objects of the old cluster, the old configuration and the old
/// epochs. It must not claim to be a member who lost everything.
#[test]
fn a_node_that_crashed_in_a_format_starts_as_an_empty_one() {
    let mut cluster = Cluster::new(3);
    let vdi = filled(&mut cluster, "kept", 6, 6);
    cluster.kill9(2);
    cluster.wait_gathered();
    let node = &cluster.nodes[2];
    fs::write(node.dir.join("formatting"), "").expect("the mark of a format");
    for (_, path) in cluster.objects_of(2).into_iter().step_by(2) {
        fs::remove_file(path).expect("half erased");
    }
    cluster.start(2);
    cluster.wait_gathered();
    let log = cluster.nodes[2].log();
    assert!(log.contains("a format was interrupted"), "{log}");
    assert!(!cluster.nodes[2].dir.join("formatting").exists());
    assert_everywhere(&mut cluster, vdi.vid(), 6, 6);
    cluster.assert_replicas_equal(3);
    // And as a member of the cluster it restarts like any other.
    cluster.kill9_all();
    for node in 0..3 {
        cluster.start(node);
    }
    cluster.wait_recovered();
    assert_everywhere(&mut cluster, vdi.vid(), 6, 6);
}

#[test]
fn a_format_leaves_no_mark_and_forgets_the_old_cluster() {
    let mut cluster = Cluster::new(2);
    let vdi = filled(&mut cluster, "old", 4, 1);
    let mut client: Client = cluster.client();
    client.create_vdi("second", BLOCK).expect("create");
    let format = ClusterRequest {
        copies: 2,
        flags: ClusterFlags::AUTO_VNODES,
        block_size_shift: 22,
        ..ClusterRequest::zeroed()
    };
    cluster.format(format, "plain");
    cluster.wait_epoch(1);
    for node in &cluster.nodes {
        assert!(!node.dir.join("formatting").exists());
    }
    assert_eq!(data_files(&cluster, vdi.vid()), []);
    assert_eq!(cluster.client().lookup("old", "", 0), Err(ResultCode::NO_VDI));
    let again = filled(&mut cluster, "old", 4, 2);
    assert_everywhere(&mut cluster, again.vid(), 4, 2);
    let (response, _) = cluster.client().must(Request::new(Opcode::SHUTDOWN), &[]);
    assert_eq!(response.result, ResultCode::SUCCESS);
}
