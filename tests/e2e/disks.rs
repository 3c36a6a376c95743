//! Disks of running nodes: plugged, unplugged, failing (spec 02, 10.5; spec 03, section 15; spec 06, 10.10).

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use sheepdog_proto::admin::{MD_INFO_LEN, MdInfo, decode_md_info};
use sheepdog_proto::{Flags, Opcode, Request, ResultCode, cstr};
use sheepdog_testkit::disk::{self, object_files};
use sheepdog_testkit::load::{Load, Region, Summary};
use sheepdog_testkit::{Builder, Client, Cluster, Vdi, wait};

const WRITERS: usize = 4;
const BLOCK: u64 = 4 << 20;

fn change(client: &mut Client, opcode: Opcode, paths: &[&Path]) -> ResultCode {
    let names: Vec<String> = paths.iter().map(|p| p.display().to_string()).collect();
    let payload = [names.join(",").as_bytes(), &[0]].concat();
    client.must(Request::new(opcode).flag(Flags::WRITE).length(payload.len()), &payload).0.result
}

fn plug(cluster: &Cluster, node: usize, disk: &Path) -> ResultCode {
    change(&mut cluster.nodes[node].client(), Opcode::MD_PLUG_DISKS, &[disk])
}

fn unplug(cluster: &Cluster, node: usize, disk: &Path) -> ResultCode {
    change(&mut cluster.nodes[node].client(), Opcode::MD_UNPLUG_DISKS, &[disk])
}

fn info(client: &mut Client) -> Vec<MdInfo> {
    let (response, payload) = client.must(Request::new(Opcode::MD_INFO).length(MD_INFO_LEN), &[]);
    assert_eq!(response.result, ResultCode::SUCCESS);
    decode_md_info(&payload).expect("disk information")
}

fn listed(cluster: &Cluster, node: usize) -> Vec<PathBuf> {
    let disks = info(&mut cluster.nodes[node].client());
    disks.iter().map(|d| String::from_utf8_lossy(cstr(&d.path)).into_owned().into()).collect()
}

fn wait_drained(cluster: &Cluster, node: usize, disk: &Path) {
    let line = format!("unplugged {}: all its objects are on the other disks", disk.display());
    wait(&line, || cluster.nodes[node].log().contains(&line) && object_files(disk).is_empty());
}

fn load(cluster: &mut Cluster) -> Load {
    let mut client = cluster.client();
    let vid = client.create_vdi("load", 16 * BLOCK * WRITERS as u64).expect("create");
    let regions = Region::divide(&mut client, vid, WRITERS).expect("regions");
    let ports = cluster.nodes.iter().map(|n| n.port).collect();
    let load = Load::start(regions, ports, SmallRng::from_os_rng().random());
    wait("the load to begin", || load.operations() > 300);
    load
}

fn more_work(load: &Load) {
    let before = load.operations();
    wait("more work", || load.operations() > before + 150);
}

/// Nothing acknowledged is lost and no client saw an error.
fn judge(cluster: &mut Cluster, load: Load) {
    let mut regions = load.stop();
    cluster.wait_recovered();
    for region in &mut regions {
        region.settle(&mut cluster.client());
    }
    let summary = Summary::of(&regions);
    eprintln!("{} writes, {} unknown, slowest {:?}", summary.acknowledged, summary.unknown, summary.slowest);
    assert!(summary.violations.is_empty(), "{:#?}", summary.violations);
    assert!(summary.errors.is_empty(), "{:#?}", summary.errors);
    for node in cluster.running() {
        let mut client = cluster.nodes[node].client();
        let lost: Vec<String> = regions.iter().flat_map(|r| r.verify(&mut client)).collect();
        assert!(lost.is_empty(), "lost, asked at node {node}: {lost:#?}");
    }
}

/// With one copy there is nothing to fetch from anybody: every object has to move.
#[test]
fn plugging_and_unplugging_under_load_loses_nothing_even_with_one_copy() {
    let mut cluster = Builder::new(2).disks(2).copies(1).start();
    let load = load(&mut cluster);
    let mut disks = cluster.nodes[0].disks.clone();
    for round in 0..4 {
        let new = cluster.dir().join(format!("new{round}"));
        assert_eq!(plug(&cluster, 0, &new), ResultCode::SUCCESS);
        let old = disks.remove(0);
        disks.push(new);
        more_work(&load);
        assert_eq!(unplug(&cluster, 0, &old), ResultCode::SUCCESS);
        let mut now = disks.clone();
        now.sort();
        assert_eq!(listed(&cluster, 0), now, "at once");
        more_work(&load);
        wait_drained(&cluster, 0, &old);
    }
    cluster.nodes[0].disks = disks.clone();
    judge(&mut cluster, load);
    cluster.assert_replicas_equal(1);
    assert_eq!(cluster.epoch(0), Some(1), "no epoch was spent");
    assert!(disks.iter().all(|d| !object_files(d).is_empty()), "each has its share");
}

#[test]
fn what_cannot_be_plugged_or_unplugged_is_refused() {
    let mut cluster = Builder::new(2).disks(2).copies(2).start();
    let vid = cluster.client().create_vdi("kept", 4 * BLOCK).expect("create");
    let mut vdi = Vdi::open(&mut cluster.client(), vid).expect("open");
    vdi.write(&mut cluster.client(), 0, &[7; 65_536]).expect("write");
    let (first, second) = (cluster.nodes[0].disks[0].clone(), cluster.nodes[0].disks[1].clone());
    let meta = cluster.nodes[0].dir.clone();
    let root = cluster.dir().to_owned();
    let epochs = meta.join("epoch");
    let other_meta = cluster.nodes[1].dir.clone();
    let missing = root.join("no/parent");
    for path in [&first, &meta, &root, &epochs, &other_meta, &missing, Path::new("relative"), Path::new("")] {
        assert_eq!(plug(&cluster, 0, path), ResultCode::UNKNOWN, "{}", path.display());
    }
    assert_eq!(unplug(&cluster, 0, &root), ResultCode::UNKNOWN);
    for line in [
        format!("duplicate path {}", first.display()),
        format!("{} is meta-store, abort", other_meta.display()),
        format!("can't mkdir for {}, No such file or directory", missing.display()),
        format!("invalid path {}", root.display()),
    ] {
        wait(&line, || cluster.nodes[0].log().contains(&line));
    }
    assert_eq!(listed(&cluster, 0), [first.clone(), second]);
    // Some fail, some do not: success.
    let new = root.join("new");
    let mut client = cluster.nodes[0].client();
    assert_eq!(change(&mut client, Opcode::MD_PLUG_DISKS, &[&first, &new]), ResultCode::SUCCESS);
    assert_eq!(listed(&cluster, 0).len(), 3);
    cluster.wait_recovered();
    let data = vdi.read(&mut cluster.client(), 0, 65_536).expect("read");
    assert!(data.iter().all(|b| *b == 7));
}

#[test]
fn a_node_whose_last_disk_is_unplugged_leaves_and_ends() {
    let mut cluster = Builder::new(3).disks(2).copies(2).start();
    let load = load(&mut cluster);
    let disks = cluster.nodes[2].disks.clone();
    let mut client = cluster.nodes[2].client();
    let both: Vec<&Path> = disks.iter().map(PathBuf::as_path).collect();
    assert_eq!(change(&mut client, Opcode::MD_UNPLUG_DISKS, &both), ResultCode::SUCCESS);
    assert_eq!(cluster.nodes[2].wait_exit(Duration::from_secs(60)).code(), Some(0));
    assert!(cluster.nodes[2].log().contains("no disks plugged, going down"));
    cluster.wait_epoch(2);
    judge(&mut cluster, load);
    cluster.assert_replicas_equal(2);
}

/// Spec 06, 10.10: the node stays, in the same epoch, and what was on the disk comes back from the others.
fn lose_a_disk(lose: impl Fn(&Path)) -> Cluster {
    let mut cluster = Builder::new(3).disks(2).copies(2).start();
    let load = load(&mut cluster);
    let lost = cluster.nodes[1].disks[1].clone();
    assert!(!object_files(&lost).is_empty());
    lose(&lost);
    wait("the loss to be noticed", || listed(&cluster, 1).len() == 1);
    more_work(&load);
    assert_eq!(cluster.epoch(0), Some(1));
    cluster.nodes[1].disks.pop();
    judge(&mut cluster, load);
    cluster.assert_replicas_equal(2);
    let size = info(&mut cluster.nodes[1].client());
    assert!(size[0].used > 0, "the other disk has everything");
    cluster
}

#[test]
fn objects_of_a_deleted_disk_come_back_from_the_other_nodes() {
    let mut cluster = lose_a_disk(disk::remove);
    // The same, with the one that is left.
    let last = cluster.nodes[1].disks[0].clone();
    disk::remove(&last);
    let vid = cluster.nodes[0].client().create_vdi("after", 64 * BLOCK).expect("create");
    let mut vdi = Vdi::open(&mut cluster.nodes[0].client(), vid).expect("open");
    for block in 0..64 {
        vdi.write(&mut cluster.nodes[0].client(), block * BLOCK, &[1; 4096]).expect("write");
    }
    assert_eq!(cluster.nodes[1].wait_exit(Duration::from_secs(60)).code(), Some(0));
    assert!(cluster.nodes[1].log().contains("no disks available, going down"));
    cluster.wait_epoch(2);
    cluster.wait_recovered();
    cluster.assert_replicas_equal(2);
    for block in 0..64 {
        let data = vdi.read(&mut cluster.nodes[2].client(), block * BLOCK, 4096).expect("read");
        assert!(data.iter().all(|b| *b == 1), "block {block}");
    }
}

#[test]
fn objects_of_an_unreadable_disk_come_back_and_the_disk_may_be_plugged_again() {
    let mut cluster = lose_a_disk(|disk| {
        fs::rename(disk, disk.with_extension("away")).expect("rename");
        fs::write(disk, "no directory").expect("write");
    });
    let disk = cluster.dir().join("n1-d1");
    assert_eq!(plug(&cluster, 1, &disk), ResultCode::UNKNOWN, "still no directory");
    fs::remove_file(&disk).expect("remove");
    fs::rename(disk.with_extension("away"), &disk).expect("rename");
    assert_eq!(plug(&cluster, 1, &disk), ResultCode::SUCCESS);
    cluster.nodes[1].disks.push(disk.clone());
    wait("objects to move to the new disk", || !object_files(&disk).is_empty());
    cluster.wait_recovered();
    cluster.assert_replicas_equal(2);
    // It is listed on the command line and holds nothing old.
    assert_eq!(cluster.stop(1), Some(0));
    cluster.start(1);
    cluster.wait_recovered();
    cluster.assert_replicas_equal(2);
    assert!(!cluster.nodes[1].log().contains("was removed before"));
}

#[test]
fn a_disk_that_vanishes_from_an_idle_node_is_noticed_and_replaced() {
    let mut cluster = Builder::new(2).disks(2).copies(2).start();
    let vid = cluster.client().create_vdi("idle", 32 * BLOCK).expect("create");
    let mut vdi = Vdi::open(&mut cluster.client(), vid).expect("open");
    for block in 0..32 {
        vdi.write(&mut cluster.client(), block * BLOCK, &[block as u8 + 1; 4096]).expect("write");
    }
    let lost = cluster.nodes[0].disks.remove(1);
    assert!(!object_files(&lost).is_empty());
    disk::remove(&lost);
    wait("the loss to be noticed", || listed(&cluster, 0).len() == 1);
    cluster.wait_recovered();
    cluster.assert_replicas_equal(2);
    assert_eq!(cluster.epoch(0), Some(1));
}

/// A disk that was plugged into the running node and is forgotten on the next command line: nothing on this node may
/// claim to know what is missing, and after the restart everything comes back from the others.
#[test]
fn a_plugged_disk_that_the_next_start_forgets_is_recovered_from_the_others() {
    let mut cluster = Builder::new(2).disks(1).copies(2).start();
    let vid = cluster.client().create_vdi("forgotten", 32 * BLOCK).expect("create");
    let mut vdi = Vdi::open(&mut cluster.client(), vid).expect("open");
    let new = cluster.dir().join("new");
    assert_eq!(plug(&cluster, 1, &new), ResultCode::SUCCESS);
    for block in 0..32 {
        vdi.write(&mut cluster.nodes[0].client(), block * BLOCK, &[block as u8 + 1; 4096]).expect("write");
    }
    assert!(!object_files(&new).is_empty());
    let (response, _) = cluster.client().must(Request::new(Opcode::SHUTDOWN), &[]);
    assert_eq!(response.result, ResultCode::SUCCESS);
    for node in &mut cluster.nodes {
        assert_eq!(node.wait_exit(Duration::from_secs(30)).code(), Some(0));
    }
    cluster.start(0);
    cluster.start(1);
    cluster.wait_recovered();
    cluster.assert_replicas_equal(2);
    for block in 0..32 {
        let data = vdi.read(&mut cluster.nodes[1].client(), block * BLOCK, 4096).expect("read");
        assert!(data.iter().all(|b| *b == block as u8 + 1), "block {block}");
    }
}
