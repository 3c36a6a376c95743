//! Writes of part of an object that one of its homes has still to recover: they do not wait for it, and are as safe as any
//! other (`recovery/early.rs`).

use std::path::PathBuf;

use sheepdog_proto::admin::RECOVERY_OBJECTS;
use sheepdog_proto::{Oid, ResultCode, VdiId};
use sheepdog_testkit::load::{Load, Region, Summary};
use sheepdog_testkit::{Builder, Cluster, Vdi, wait};

const BLOCK: u64 = 4 << 20;
const BLOCKS: u32 = 48;

/// A block that a home has still to recover.
#[derive(Clone, Copy)]
struct Half {
    oid: Oid,
    /// The home that has it.
    has: usize,
    /// The one that does not.
    lacks: usize,
}

/// A VDI with two copies of each block, a node of which died, and the blocks that were on it and are not recovered.
fn half(nodes: usize, dead: usize) -> (Cluster, VdiId, Vec<Half>) {
    let mut cluster = Builder::new(nodes).copies(2).start();
    let mut client = cluster.client();
    let vid = client.create_vdi("volume", u64::from(BLOCKS) * BLOCK).expect("create");
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    for block in 0..BLOCKS {
        vdi.write(&mut client, u64::from(block) * BLOCK, &[1; 16384]).expect("write");
    }
    cluster.dog(&["cluster", "recover", "disable"]).ok();
    cluster.kill9(dead);
    cluster.wait_running();
    wait("the lists", || {
        cluster.running().iter().all(|i| cluster.recovery(*i).is_some_and(|s| s.state == RECOVERY_OBJECTS))
    });
    let mut blocks = Vec::new();
    for oid in (0..BLOCKS).map(|block| Oid::data(vid, block)) {
        let homes = cluster.homes(oid, 2);
        let (has, lacks): (Vec<usize>, Vec<usize>) =
            homes.into_iter().partition(|home| cluster.object_path(*home, oid).is_some());
        if let ([has], [lacks]) = (&has[..], &lacks[..]) {
            blocks.push(Half { oid, has: *has, lacks: *lacks });
        }
    }
    assert!(blocks.len() > 3, "{} blocks to recover", blocks.len());
    (cluster, vid, blocks)
}

/// Overwrites 4 KiB in two pieces that overlap.
fn overwrite(cluster: &mut Cluster, oid: Oid, byte: u8) {
    let mut client = cluster.client();
    for (offset, len, byte) in [(4096, 3072, byte ^ 0x80), (5120, 3072, byte), (4096, 1024, byte)] {
        let written = client.write_obj(oid, offset, &vec![byte; len]).expect("write");
        assert_eq!(written, ResultCode::SUCCESS);
    }
}

/// The first 16 KiB of a block whose second 4 KiB were overwritten with `byte`.
fn expected(byte: u8) -> Vec<u8> {
    let mut bytes = vec![1; 16384];
    bytes[4096..8192].fill(byte);
    bytes
}

fn assert_contents(cluster: &mut Cluster, oid: Oid, byte: u8) {
    for node in cluster.running() {
        let (response, data) = cluster.nodes[node].client().read_obj(oid, 0, 16384).expect("read");
        assert_eq!(response.result, ResultCode::SUCCESS, "{oid} at node {node}");
        assert!(data == expected(byte), "{oid} at node {node}");
    }
}

fn enable(cluster: &mut Cluster) {
    cluster.dog(&["cluster", "recover", "enable"]).ok();
    cluster.wait_gathered();
    cluster.assert_replicas_equal(2);
}

fn log_of(cluster: &Cluster, node: usize) -> PathBuf {
    cluster.nodes[node].dir.join("early_writes")
}

#[test]
fn a_write_does_not_wait_for_its_object_to_be_recovered() {
    let (mut cluster, vid, blocks) = half(4, 3);
    for block in &blocks {
        overwrite(&mut cluster, block.oid, 7);
        assert!(cluster.object_path(block.lacks, block.oid).is_none(), "{} was recovered for it", block.oid);
        assert!(log_of(&cluster, block.lacks).exists());
    }
    // A read through the home that lacks it is answered, too.
    for block in &blocks {
        assert_contents(&mut cluster, block.oid, 7);
    }
    enable(&mut cluster);
    for block in (0..BLOCKS).map(|block| Oid::data(vid, block)) {
        assert_contents(&mut cluster, block, if blocks.iter().any(|b| b.oid == block) { 7 } else { 1 });
    }
}

/// The only home with the object dies for good. What was written since it was alone with it is on top of the older version
/// that returns.
#[test]
fn early_writes_outlive_the_node_that_had_the_object() {
    let (mut cluster, _, blocks) = half(5, 4);
    let Half { has, .. } = blocks[0];
    let of_it: Vec<Half> = blocks.iter().copied().filter(|b| b.has == has).collect();
    for block in &of_it {
        overwrite(&mut cluster, block.oid, 7);
    }
    cluster.kill9(has);
    cluster.wait_running();
    cluster.start(4);
    cluster.wait_members(4);
    enable(&mut cluster);
    for block in &of_it {
        assert_contents(&mut cluster, block.oid, 7);
    }
}

/// The same, and the node that took the writes dies, too, and returns. In another epoch more was written.
#[test]
fn early_writes_survive_the_nodes_that_took_them() {
    let (mut cluster, _, blocks) = half(6, 5);
    let Half { oid, has, lacks } = blocks[0];
    overwrite(&mut cluster, oid, 7);
    // Somebody who has nothing to do with it leaves: the next epoch.
    let other = cluster.running().into_iter().find(|n| ![has, lacks].contains(n)).expect("six nodes");
    cluster.kill9(other);
    cluster.wait_running();
    assert!(cluster.homes(oid, 2).iter().all(|home| [has, lacks].contains(home)));
    overwrite(&mut cluster, oid, 9);
    cluster.kill9(lacks);
    cluster.kill9(has);
    cluster.wait_running();
    for node in [lacks, 5, other] {
        cluster.start(node);
    }
    cluster.wait_members(5);
    cluster.dog(&["cluster", "recover", "enable"]).ok();
    cluster.wait_gathered();
    cluster.assert_replicas_equal(2);
    assert_contents(&mut cluster, oid, 9);
}

#[test]
fn early_writes_survive_the_loss_of_all_nodes() {
    let (mut cluster, _, blocks) = half(4, 3);
    for block in &blocks {
        overwrite(&mut cluster, block.oid, 7);
    }
    cluster.kill9_all();
    for node in 0..3 {
        cluster.spawn(node);
    }
    cluster.wait_members(3);
    // The epoch goes on, so nobody announces that it is recovered.
    cluster.dog(&["cluster", "recover", "enable"]).ok();
    cluster.wait_recovered();
    cluster.assert_replicas_equal(2);
    for block in &blocks {
        assert_contents(&mut cluster, block.oid, 7);
    }
}

/// A node joins and takes the place of a home; the other home dies. The former home has the version of before.
#[test]
fn early_writes_of_a_joiner_are_put_on_top_of_what_a_former_home_has() {
    let mut cluster = Builder::new(4).copies(2).start();
    assert_eq!(cluster.stop(3), Some(0));
    cluster.wait_gathered();
    let mut client = cluster.client();
    let vid = client.create_vdi("volume", u64::from(BLOCKS) * BLOCK).expect("create");
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    for block in 0..BLOCKS {
        vdi.write(&mut client, u64::from(block) * BLOCK, &[1; 16384]).expect("write");
    }
    let before: Vec<Vec<usize>> = (0..BLOCKS).map(|block| cluster.homes(Oid::data(vid, block), 2)).collect();
    cluster.dog(&["cluster", "recover", "disable"]).ok();
    cluster.start(3);
    cluster.wait_running();
    wait("the list", || cluster.recovery(3).is_some_and(|s| s.state == RECOVERY_OBJECTS));
    let mut written = Vec::new();
    for block in 0..BLOCKS {
        let oid = Oid::data(vid, block);
        let homes = cluster.homes(oid, 2);
        let stayed = homes.iter().find(|n| before[block as usize].contains(n));
        if homes.contains(&3)
            && let Some(stayed) = stayed
        {
            overwrite(&mut cluster, oid, 7);
            assert!(cluster.object_path(3, oid).is_none(), "block {block} was recovered for it");
            written.push((oid, *stayed));
        }
    }
    let (_, dies) = *written.first().expect("blocks move to a joiner");
    cluster.kill9(dies);
    cluster.wait_members(3);
    enable(&mut cluster);
    for (oid, _) in written {
        assert_contents(&mut cluster, oid, 7);
    }
}

/// With no home that has the object there is nothing to be on top of: the write waits until one does.
#[test]
fn a_write_waits_if_no_home_has_the_object() {
    let mut cluster = Builder::new(3).copies(1).start();
    assert_eq!(cluster.stop(2), Some(0));
    cluster.wait_gathered();
    let mut client = cluster.client();
    let vid = client.create_vdi("volume", u64::from(BLOCKS) * BLOCK).expect("create");
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    for block in 0..BLOCKS {
        vdi.write(&mut client, u64::from(block) * BLOCK, &[1; 16384]).expect("write");
    }
    cluster.dog(&["cluster", "recover", "disable"]).ok();
    cluster.start(2);
    cluster.wait_running();
    wait("the list", || cluster.recovery(2).is_some_and(|s| s.state == RECOVERY_OBJECTS));
    for oid in (0..BLOCKS).map(|block| Oid::data(vid, block)) {
        if cluster.homes(oid, 1) == [2] {
            overwrite(&mut cluster, oid, 7);
            assert!(cluster.object_path(2, oid).is_some(), "{oid}: acknowledged without anybody having it");
            assert_contents(&mut cluster, oid, 7);
        }
    }
}

/// Writers and readers all over a volume that is being recovered, again and again, by nodes that are gateways, too.
#[test]
fn writes_and_reads_race_with_the_recovery_of_their_objects() {
    let mut cluster = Builder::new(5).copies(2).start();
    let mut client = cluster.client();
    let vid = client.create_vdi("volume", 64 * BLOCK).expect("create");
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    for block in 0..64 {
        vdi.write(&mut client, block * BLOCK, &[0; 4096]).expect("write");
    }
    let regions = Region::divide(&mut client, vid, 8).expect("regions");
    let ports = cluster.nodes[..4].iter().map(|n| n.port).collect();
    let load = Load::start(regions, ports, 7);
    for _ in 0..3 {
        for running in [false, true] {
            let before = load.operations();
            wait("work", || load.operations() > before + 300);
            if running {
                cluster.start(4)
            } else {
                cluster.kill9(4)
            }
            cluster.wait_recovered();
        }
    }
    let mut regions = load.stop();
    regions.iter_mut().for_each(|r| r.settle(&mut client));
    for node in cluster.running() {
        let mut client = cluster.nodes[node].client();
        let lost: Vec<String> = regions.iter().flat_map(|r| r.verify(&mut client)).collect();
        assert!(lost.is_empty(), "node {node}: {lost:?}");
    }
    let summary = Summary::of(&regions);
    assert!(summary.violations.is_empty() && summary.errors.is_empty(), "{:?}", summary.violations);
    cluster.assert_replicas_equal(2);
}
