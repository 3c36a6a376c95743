//! How recovery goes about it: interrupted, disabled, throttled, without room, past damage (spec 06, section 10; T13 to
//! T15, T20).

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use sheepdog_proto::{ClusterFlags, NodeRecord, Oid, Opcode, Request, ResultCode, VdiId};
use sheepdog_testkit::{Builder, Cluster, Vdi, disk, wait};

const BLOCK: u64 = 4 << 20;

fn filled(cluster: &mut Cluster, name: &str, blocks: u32) -> Vdi {
    let mut client = cluster.client();
    let vid = client.create_vdi(name, u64::from(blocks) * BLOCK).expect("create");
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    for block in 0..blocks {
        vdi.write(&mut client, u64::from(block) * BLOCK, &[block as u8 + 1; 4096]).expect("write");
    }
    vdi
}

fn assert_filled(cluster: &mut Cluster, vid: VdiId, blocks: u32) {
    for node in cluster.running() {
        let mut client = cluster.nodes[node].client();
        for block in 0..blocks {
            let (response, data) = client.read_obj(Oid::data(vid, block), 0, 4096).expect("read");
            assert_eq!(response.result, ResultCode::SUCCESS, "block {block} at node {node}");
            assert!(data.iter().all(|b| *b == block as u8 + 1), "block {block} at node {node}");
        }
    }
}

fn stale(cluster: &Cluster) -> usize {
    cluster.nodes.iter().map(|n| n.stale_files().len()).sum()
}

fn gathered(cluster: &Cluster, epoch: u32) -> bool {
    cluster.nodes.iter().any(|n| n.log().contains(&format!("all nodes are recovered, epoch {epoch}\n")))
}

/// T13: a member that does not give its list keeps everybody from saying that all is recovered.
#[test]
fn recovery_is_not_complete_while_a_list_is_missing() {
    let mut cluster = Builder::new(4).copies(2).start();
    let vdi = filled(&mut cluster, "lists", 12);
    cluster.sigstop(3);
    // Not killed: over ZooKeeper both would then be lost, at the same time.
    cluster.stop(2);
    wait("two nodes to see the loss", || [0, 1].iter().all(|i| cluster.epoch(*i) == Some(2)));
    let until = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until {
        for node in [0, 1] {
            let state = cluster.recovery(node).expect("an answer");
            assert_eq!((state.in_recovery, state.nr_total), (1, 0), "node {node} is making its list");
        }
    }
    assert!(!gathered(&cluster, 2));
    cluster.sigcont(3);
    cluster.wait_gathered();
    assert!(gathered(&cluster, 2));
    assert_filled(&mut cluster, vdi.vid(), 12);
    cluster.assert_replicas_equal(2);
}

/// T13, W-03: nodes too small for what would be theirs; nothing is copied, nothing announced, nothing purged, and the status
/// says that there is something left to do. With one more node it goes on.
#[test]
fn recovery_that_would_fill_a_disk_waits_for_another_node() {
    let flags = ClusterFlags::AUTO_VNODES.with(ClusterFlags::AVOID_DISKFULL);
    let mut cluster = Builder::new(3).disks(1).copies(2).flags(flags).disk_size(76 << 20).start();
    let vdi = filled(&mut cluster, "big", 20);
    cluster.kill9(2);
    cluster.wait_running();
    let told = |c: &Cluster, node: usize| {
        let log = c.nodes[node].log();
        ["will cause disk full, stopping whole cluster", "canceling recovery because of disk full", "ASAP"]
            .iter()
            .all(|line| log.contains(line))
    };
    wait("the nodes to give up", || told(&cluster, 0) && told(&cluster, 1));
    // What is asked for is recovered all the same.
    let oid = Oid::data(vdi.vid(), 3);
    let (response, data) = cluster.client().read_obj(oid, 0, 4096).expect("read");
    assert_eq!((response.result, data[0]), (ResultCode::SUCCESS, 4));
    let until = Instant::now() + Duration::from_secs(1);
    while Instant::now() < until {
        for node in [0, 1] {
            let state = cluster.recovery(node).expect("an answer");
            assert!(state.in_recovery == 1 && state.nr_finished < state.nr_total, "{state:?}");
        }
    }
    assert!(!gathered(&cluster, 2));
    cluster.start(2);
    cluster.wait_gathered();
    assert_filled(&mut cluster, vdi.vid(), 20);
    cluster.assert_replicas_equal(2);
}

/// T14: everything stops in the middle of a recovery.
#[test]
fn recovery_goes_on_after_a_restart_of_all_nodes() {
    let mut cluster = Builder::new(4).copies(2).start();
    cluster.kill9(3);
    cluster.wait_gathered();
    let vdi = filled(&mut cluster, "moving", 60);
    for node in 0..3 {
        cluster.dog_at(node, &["node", "recovery", "set-throttle", "1", "300"], &[]).ok();
    }
    cluster.nodes[3].args_mut().extend(["-R".into(), "max=1,interval=300".into()]);
    cluster.start(3);
    cluster.wait_epoch(3);
    wait("a part to be recovered", || {
        cluster.recovery(3).is_some_and(|s| s.nr_total > 3 && (2..s.nr_total).contains(&s.nr_finished))
    });
    assert!(stale(&cluster) > 0);
    let (response, _) = cluster.client().must(Request::new(Opcode::SHUTDOWN), &[]);
    assert_eq!(response.result, ResultCode::SUCCESS);
    for node in &mut cluster.nodes {
        assert_eq!(node.wait_exit(Duration::from_secs(30)).code(), Some(0));
    }
    let args = cluster.nodes[3].args_mut();
    args.truncate(args.len() - 2);
    for node in 0..4 {
        cluster.start(node);
    }
    cluster.wait_recovered();
    assert_filled(&mut cluster, vdi.vid(), 60);
    cluster.assert_replicas_equal(2);
    // The next epoch that everybody completes takes the stale copies along.
    cluster.kill9(0);
    cluster.wait_gathered();
    cluster.start(0);
    cluster.wait_gathered();
    wait("stale copies to go", || stale(&cluster) == 0);
    assert_filled(&mut cluster, vdi.vid(), 60);
}

/// T15, W-08, W-17, W-23: what a crash, a sick file system or an operator may leave in a store.
#[test]
fn a_damaged_store_starts_and_is_repaired_by_the_others() {
    let mut cluster = Cluster::new(3);
    let vdi = filled(&mut cluster, "damaged", 8);
    for whole in [false, true] {
        if whole {
            cluster.kill9_all();
        } else {
            cluster.kill9(1);
            cluster.wait_gathered();
        }
        let path = |index| cluster.object_path(1, Oid::data(vdi.vid(), index)).expect("a replica");
        let epoch = if whole { 3 } else { 1 };
        let inode = cluster.object_path(1, Oid::inode(vdi.vid())).expect("the inode");
        let moved = inode
            .parent()
            .expect("a directory")
            .join(format!(".stale/{:016x}.{epoch}", Oid::inode(vdi.vid()).0));
        fs::rename(&inode, moved).expect("rename");
        let stray = path(0).with_extension("tmp");
        fs::write(&stray, b"half").expect("write");
        fs::remove_file(path(0)).expect("remove");
        let directory = path(1);
        fs::remove_file(&directory).expect("remove");
        fs::create_dir(&directory).expect("mkdir");
        fs::File::options().write(true).open(path(2)).expect("open").set_len(100).expect("truncate");
        let foreign = path(3).with_file_name("lost+found");
        fs::write(&foreign, b"?").expect("write");
        for node in 0..3 {
            if cluster.nodes[node].pid().is_none() {
                cluster.start(node);
            }
        }
        cluster.wait_recovered();
        assert!(cluster.nodes[1].is_running(), "the node stays");
        assert!(!stray.exists() && foreign.exists());
        fs::remove_dir(&directory).ok();
        assert_filled(&mut cluster, vdi.vid(), 8);
        // A directory in the place of a file is the operator's to remove; until then that replica is missing.
        let mut client = cluster.client();
        for block in 0..8 {
            let written = client.write_obj(Oid::data(vdi.vid(), block), 8192, &[7; 512]).expect("write");
            assert_eq!(written, ResultCode::SUCCESS, "block {block}");
        }
        cluster.dog(&["vdi", "check", "damaged"]).ok();
        cluster.assert_replicas_equal(3);
    }
}

/// T20, and 10.12: objects that are asked for come even while recovery is disabled; all of it goes on when enabled.
#[test]
fn disabled_recovery_serves_what_is_asked_for_and_goes_on_when_enabled() {
    let mut cluster = Builder::new(4).copies(2).start();
    let vdi = filled(&mut cluster, "paused", 40);
    cluster.dog(&["cluster", "recover", "disable"]).ok();
    cluster.kill9(3);
    cluster.wait_running();
    let mut client = cluster.client();
    for block in 0..20 {
        let oid = Oid::data(vdi.vid(), block);
        let byte = block as u8 + 1;
        assert_eq!(client.write_obj(oid, 0, &[byte; 4096]).expect("write"), ResultCode::SUCCESS);
    }
    let pending = |c: &Cluster| (0..3).filter_map(|i| c.recovery(i)).filter(|s| s.in_recovery == 1).count();
    assert!(pending(&cluster) > 0, "something is left to do");
    assert!(!gathered(&cluster, 2));
    let begun = Instant::now();
    cluster.dog(&["cluster", "recover", "enable"]).ok();
    cluster.wait_gathered();
    eprintln!("recovered {:?} after it was enabled", begun.elapsed());
    assert!(gathered(&cluster, 2));
    assert_filled(&mut cluster, vdi.vid(), 40);
    cluster.assert_replicas_equal(2);
}

/// 10.13: so many objects per interval and node, and not what is asked for.
#[test]
fn throttled_recovery_takes_its_time_and_requests_do_not_wait_for_it() {
    let mut cluster = Builder::new(3).copies(2).start();
    cluster.kill9(2);
    cluster.wait_gathered();
    let vdi = filled(&mut cluster, "slow", 40);
    cluster.wipe(2);
    cluster.nodes[2].args_mut().extend(["-R".into(), "max=2,interval=400".into()]);
    cluster.start(2);
    cluster.wait_running();
    let got = cluster.dog_at(2, &["node", "recovery", "get-throttle"], &[]);
    assert!([got.stdout, got.stderr].concat().contains("max (2), interval (400)"));
    wait("the list", || cluster.recovery(2).is_some_and(|s| s.nr_total > 10));
    let begun = Instant::now();
    let start = cluster.recovery(2).expect("an answer").nr_finished;
    let until = begun + Duration::from_secs(2);
    wait("two seconds", || Instant::now() >= until);
    let done = cluster.recovery(2).map_or(u64::MAX, |s| s.nr_finished) - start;
    // 2 s are 5 intervals: 10 objects, with one interval more at either end.
    assert!((6..=14).contains(&done), "{done} objects in {:?}", begun.elapsed());
    // The last ones are far from their turn.
    let mut client = cluster.nodes[2].client();
    let mut slowest = Duration::ZERO;
    for block in (30..40).rev() {
        let asked = Instant::now();
        let written = client.write_obj(Oid::data(vdi.vid(), block), 4096, &[1; 512]).expect("write");
        assert_eq!(written, ResultCode::SUCCESS);
        slowest = slowest.max(asked.elapsed());
    }
    assert!(slowest < Duration::from_millis(1500), "requests waited {slowest:?}");
    cluster.dog_at(2, &["node", "recovery", "set-throttle", "0", "0"], &[]).ok();
    cluster.wait_gathered();
    assert_filled(&mut cluster, vdi.vid(), 40);
    cluster.assert_replicas_equal(2);
}

/// A round that rests for an hour between two objects goes on as soon as it need not any more.
#[test]
fn a_change_of_the_throttle_takes_effect_at_once() {
    let mut cluster = Builder::new(3).copies(2).start();
    cluster.kill9(2);
    cluster.wait_gathered();
    let vdi = filled(&mut cluster, "rests", 24);
    cluster.wipe(2);
    cluster.nodes[2].args_mut().extend(["-R".into(), "max=1,interval=3600000".into()]);
    cluster.start(2);
    cluster.wait_running();
    let finished = |cluster: &mut Cluster| cluster.recovery(2).map_or(0, |s| s.nr_finished);
    wait("the first object", || finished(&mut cluster) > 0);
    // Who asks for an object does not wait for the hour to pass.
    let mut client = cluster.nodes[2].client();
    for block in 20..24 {
        let written = client.write_obj(Oid::data(vdi.vid(), block), 4096, &[1; 512]).expect("write");
        assert_eq!(written, ResultCode::SUCCESS);
    }
    let before = finished(&mut cluster);
    cluster.dog_at(2, &["node", "recovery", "set-throttle", "4", "3600000"], &[]).ok();
    wait("three more objects", || finished(&mut cluster) >= before + 3);
    cluster.dog_at(2, &["node", "recovery", "set-throttle", "0", "0"], &[]).ok();
    cluster.wait_gathered();
    assert_filled(&mut cluster, vdi.vid(), 20);
    cluster.assert_replicas_equal(2);
}

/// A10: metadata first. Seen from outside by throttling: inodes are there before most of the data.
#[test]
fn metadata_is_recovered_before_data() {
    let mut cluster = Builder::new(3).copies(2).start();
    cluster.kill9(2);
    cluster.wait_gathered();
    for name in ["a", "b", "c", "d"] {
        filled(&mut cluster, name, 8);
    }
    // Until the homes have been told that these writes are done, 30 ms later: what is not done is asked for at once.
    std::thread::sleep(Duration::from_secs(1));
    cluster.wipe(2);
    cluster.nodes[2].args_mut().extend(["-R".into(), "max=1,interval=100".into()]);
    cluster.start(2);
    cluster.wait_running();
    let mut first_data = false;
    wait("data", || {
        let objects = cluster.objects_of(2);
        let data = objects.keys().filter(|oid| oid.is_data()).count();
        if data > 1 && !first_data {
            first_data = true;
            let ring = cluster.ring();
            let port = cluster.nodes[2].port;
            let inodes = cluster.objects_of(0).into_keys().chain(cluster.objects_of(1).into_keys());
            let mine = inodes.filter(|o| o.is_inode() && ring.nodes_of(*o, 2).any(|n| n.nid.port == port));
            // Once more: a directory that changes while it is read may show what is new and not what came before it.
            let objects = cluster.objects_of(2);
            for oid in mine {
                assert!(objects.contains_key(&oid), "{oid} after data");
            }
        }
        first_data
    });
    cluster.dog_at(2, &["node", "recovery", "set-throttle", "0", "0"], &[]).ok();
    cluster.wait_gathered();
    cluster.assert_replicas_equal(2);
}

/// 10.7: objects that lie where no placement rule would look.
#[test]
fn wildcard_recovery_finds_objects_on_any_node() {
    let mut cluster = Builder::new(4).copies(1).start();
    let vdi = filled(&mut cluster, "scattered", 16);
    let (response, _) = cluster.client().must(Request::new(Opcode::SHUTDOWN), &[]);
    assert_eq!(response.result, ResultCode::SUCCESS);
    for node in &mut cluster.nodes {
        node.wait_exit(Duration::from_secs(30));
    }
    // As if the rule had changed: every data object goes to the next node.
    let all: Vec<BTreeMap<Oid, _>> = (0..4).map(|n| cluster.objects_of(n)).collect();
    for (node, objects) in all.into_iter().enumerate() {
        for (oid, path) in objects.into_iter().filter(|(oid, _)| oid.is_data()) {
            let dir = cluster.nodes[(node + 1) % 4].dir.join("obj");
            fs::rename(path, dir.join(format!("{:016x}", oid.0))).expect("rename");
        }
    }
    for node in 0..4 {
        cluster.nodes[node].args_mut().push("-W".into());
        cluster.start(node);
    }
    cluster.wait_recovered();
    assert_filled(&mut cluster, vdi.vid(), 16);
    cluster.assert_replicas_equal(1);
    let line = "starting wild card recovery, objects will be searched from all nodes";
    assert!(cluster.nodes.iter().all(|n| n.log().contains(line)));
}

/// 06, 12: more copies, then fewer, of one VDI and of the cluster's default.
#[test]
fn copies_of_a_vdi_and_of_the_cluster_can_be_altered() {
    let mut cluster = Builder::new(4).copies(2).start();
    let vdi = filled(&mut cluster, "altered", 8);
    let held = |cluster: &Cluster| -> Vec<usize> {
        (0..8).map(|block| cluster.holders(Oid::data(vdi.vid(), block)).len()).collect()
    };
    assert_eq!(held(&cluster), [2; 8]);
    for copies in [3, 1, 4, 2] {
        cluster.dog_in(&["vdi", "alter-copy", "altered", "-c", &copies.to_string()], b"yes\n").ok();
        wait(&format!("{copies} copies"), || held(&cluster) == [copies; 8]);
        cluster.wait_recovered();
        assert_filled(&mut cluster, vdi.vid(), 8);
    }
    assert_eq!(cluster.epoch(0), Some(1));
    cluster.dog_in(&["cluster", "alter-copy", "-c", "3"], b"yes\n").ok();
    let new = filled(&mut cluster, "new", 4);
    for block in 0..4 {
        assert_eq!(cluster.holders(Oid::data(new.vid(), block)).len(), 3);
    }
    assert_eq!(held(&cluster), [2; 8], "existing ones keep theirs");
}

/// Weights: fixed ones set on a node, a share of nothing for gateways, and one copy per zone.
#[test]
fn objects_follow_fixed_weights_zones_and_gateways() {
    let mut cluster = Builder::new(5)
        .copies(2)
        .zones(&[1, 1, 2, 3, 4])
        .gateway(4)
        .flags(ClusterFlags::NONE)
        .node_arg(0, "-V64")
        .node_arg(1, "-V64")
        .node_arg(2, "-V64")
        .node_arg(3, "-V64")
        .start();
    let vdi = filled(&mut cluster, "weighted", 40);
    let share = |cluster: &Cluster, node: usize| {
        cluster.objects_of(node).keys().filter(|oid| oid.vid() == vdi.vid() && oid.is_data()).count()
    };
    let before = share(&cluster, 3);
    assert!(before > 0 && share(&cluster, 4) == 0, "a gateway stores nothing");
    for block in 0..40 {
        let holders = cluster.holders(Oid::data(vdi.vid(), block));
        assert!(holders != [0, 1], "two copies in one zone: block {block}");
    }
    cluster.dog_at(3, &["node", "vnodes", "set", "512"], &[]).ok();
    cluster.wait_epoch(2);
    cluster.wait_gathered();
    assert!(share(&cluster, 3) > before, "{} objects, {before} before", share(&cluster, 3));
    assert_filled(&mut cluster, vdi.vid(), 40);
    cluster.assert_replicas_equal(2);
    // The weight is announced, and the original's rule: a restart must bring the same one.
    cluster.kill9(4);
    cluster.wait_gathered();
    cluster.start(4);
    cluster.wait_gathered();
    assert_filled(&mut cluster, vdi.vid(), 40);
}

/// 04, 10; 06, 4: in strict mode writes need as many zones as copies.
#[test]
fn a_strict_cluster_refuses_writes_without_enough_zones() {
    let flags = ClusterFlags::AUTO_VNODES.with(ClusterFlags::STRICT);
    let mut cluster = Builder::new(3).copies(3).flags(flags).start();
    let vdi = filled(&mut cluster, "strict", 4);
    cluster.kill9(2);
    cluster.wait_gathered();
    let mut client = cluster.client();
    let written = client.write_obj(Oid::data(vdi.vid(), 0), 0, &[1; 512]).expect("an answer");
    assert_eq!(written, ResultCode::HALT);
    let (response, data) = client.read_obj(Oid::data(vdi.vid(), 0), 0, 512).expect("read");
    assert!(response.result == ResultCode::HALT || data == [1; 512], "{:?}", response.result);
    cluster.start(2);
    cluster.wait_gathered();
    let written = cluster.client().write_obj(Oid::data(vdi.vid(), 0), 0, &[1; 512]).expect("an answer");
    assert_eq!(written, ResultCode::SUCCESS);
    cluster.assert_replicas_equal(3);
}

/// A node whose space changed by more than 1 % announces it when told to: one epoch, objects move by the new weights.
#[test]
fn reweighting_follows_the_space_of_the_disks() {
    let mut cluster = Builder::new(3).disks(2).copies(2).disk_size(1 << 30).start();
    let vdi = filled(&mut cluster, "space", 40);
    let lost = cluster.nodes[1].disks.pop().expect("two disks");
    disk::remove(&lost);
    wait("the loss to be noticed", || {
        cluster.nodes[1].log().contains(&format!("removed disk {}, 1 left", lost.display()))
    });
    cluster.wait_recovered();
    assert_eq!(cluster.epoch(0), Some(1));
    let before: Vec<u16> = cluster.members(0).iter().map(|n| n.nr_vnodes).collect();
    cluster.dog(&["cluster", "reweight"]).ok();
    wait("a new epoch", || cluster.epoch(0) > Some(1));
    cluster.wait_gathered();
    let members = cluster.members(0);
    let port = cluster.nodes[1].port;
    let (me, others): (Vec<NodeRecord>, Vec<NodeRecord>) = members.iter().partition(|n| n.nid.port == port);
    assert!(others.iter().all(|n| n.space > me[0].space), "{members:?}, vnodes before {before:?}");
    assert_filled(&mut cluster, vdi.vid(), 40);
    cluster.assert_replicas_equal(2);
}
