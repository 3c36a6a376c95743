//! Copies of a VDI that are altered while homes are missing or have not recovered yet (spec 05, 19; 06, A1).

use sheepdog_proto::{Oid, ResultCode};
use sheepdog_testkit::{Builder, Cluster, Vdi, disk, wait};

const BLOCK: u64 = 4 << 20;

/// Blocks of a VDI of three copies, each with its number and a version.
struct Blocks {
    vdi: Vdi,
    count: u32,
}

impl Blocks {
    fn new(cluster: &mut Cluster, count: u32) -> Blocks {
        let mut client = cluster.client();
        let vid = client.create_vdi("vm", u64::from(count) * BLOCK).expect("create");
        let mut blocks = Blocks { vdi: Vdi::open(&mut client, vid).expect("open"), count };
        blocks.write(cluster, 1);
        blocks
    }

    fn oid(&self, block: u32) -> Oid {
        Oid::data(self.vdi.vid(), block)
    }

    fn write(&mut self, cluster: &mut Cluster, version: u8) {
        for block in 0..self.count {
            let bytes = [version ^ block as u8; 4096];
            self.vdi.write(&mut cluster.client(), u64::from(block) * BLOCK, &bytes).expect("write");
        }
    }

    fn assert_version(&self, cluster: &mut Cluster, version: u8) {
        for node in cluster.running() {
            let mut client = cluster.nodes[node].client();
            for block in 0..self.count {
                let (response, data) = client.read_obj(self.oid(block), 0, 4096).expect("read");
                assert_eq!(response.result, ResultCode::SUCCESS, "block {block} at node {node}");
                let right = data.iter().all(|b| *b == version ^ block as u8);
                assert!(right, "block {block} at node {node}: begins {:02x?}", &data[..4]);
            }
        }
    }

    /// Blocks of which `node` is the first home.
    fn led_by(&self, cluster: &mut Cluster, node: usize) -> Vec<u32> {
        (0..self.count).filter(|block| cluster.homes(self.oid(*block), 1) == [node]).collect()
    }
}

fn alter(cluster: &mut Cluster, copies: u8) {
    cluster.dog(&["vdi", "alter-copy", "vm", "-c", &copies.to_string(), "-f"]).ok();
}

fn recovery(cluster: &mut Cluster, what: &str) {
    cluster.dog(&["cluster", "recover", what]).ok();
}

/// The only home that stays has just joined, and the first home of before is gone for good: what the others have, who are no
/// homes any more, is found.
#[test]
fn fewer_copies_while_the_home_that_stays_is_new_lose_nothing() {
    const NEW: usize = 4;
    let mut cluster = Builder::new(5).copies(3).start();
    cluster.kill9(NEW);
    cluster.wait_gathered();
    cluster.wipe(NEW);
    let blocks = Blocks::new(&mut cluster, 64);
    let before: Vec<Vec<u32>> = (0..NEW).map(|node| blocks.led_by(&mut cluster, node)).collect();
    recovery(&mut cluster, "disable");
    cluster.start(NEW);
    cluster.wait_running();
    let moved = blocks.led_by(&mut cluster, NEW);
    let only_here = |node: &usize| before[*node].iter().filter(|block| moved.contains(block)).count();
    let gone = (0..NEW).max_by_key(only_here).expect("nodes");
    assert!(only_here(&gone) > 0);
    cluster.kill9(gone);
    cluster.wait_running();
    alter(&mut cluster, 1);
    recovery(&mut cluster, "enable");
    cluster.wait_recovered();
    blocks.assert_version(&mut cluster, 1);
    cluster.assert_replicas_equal(1);
}

/// The same when it lost a disk: what was written in this very epoch is on the others alone.
#[test]
fn fewer_copies_while_the_home_that_stays_rebuilds_a_disk_lose_nothing() {
    let mut cluster = Builder::new(4).disks(2).copies(3).start();
    let mut blocks = Blocks::new(&mut cluster, 24);
    blocks.write(&mut cluster, 2);
    recovery(&mut cluster, "disable");
    let mut missing = 0;
    for node in 0..4 {
        let lost = cluster.nodes[node].disks.pop().expect("two disks");
        let led = blocks.led_by(&mut cluster, node);
        if missing == 0 {
            let on_it = disk::object_files(&lost);
            missing = led.iter().filter(|b| on_it.iter().any(|(oid, _)| *oid == blocks.oid(**b))).count();
            disk::remove(&lost);
            let line = format!("removed disk {}, 1 left", lost.display());
            wait(&line, || cluster.nodes[node].log().contains(&line));
        }
    }
    assert!(missing > 0);
    alter(&mut cluster, 1);
    recovery(&mut cluster, "enable");
    cluster.wait_recovered();
    blocks.assert_version(&mut cluster, 2);
    cluster.assert_replicas_equal(1);
}

/// More copies, which the new homes do not have yet when the only one is gone: what they put away earlier is not taken for it.
#[test]
fn what_was_put_away_when_copies_became_fewer_does_not_come_back_with_more() {
    let mut cluster = Builder::new(4).copies(3).start();
    let mut blocks = Blocks::new(&mut cluster, 16);
    cluster.kill9(3);
    cluster.wait_gathered();
    cluster.start(3);
    cluster.wait_gathered();
    alter(&mut cluster, 1);
    cluster.wait_recovered();
    blocks.write(&mut cluster, 2);
    recovery(&mut cluster, "disable");
    alter(&mut cluster, 3);
    let away = (0..4).max_by_key(|node| blocks.led_by(&mut cluster, *node).len()).expect("nodes");
    assert!(!blocks.led_by(&mut cluster, away).is_empty());
    cluster.kill9(away);
    cluster.wait_running();
    recovery(&mut cluster, "enable");
    wait("what only it has to be missed", || {
        (0..4).any(|node| node != away && cluster.recovery(node).is_some_and(|r| r.nr_unfound > 0))
    });
    cluster.start(away);
    cluster.wait_gathered();
    blocks.assert_version(&mut cluster, 2);
    cluster.assert_replicas_equal(3);
}
