//! Disks that fill up, become read-only or fail under a running node (spec 03, section 10; spec 06, T13, W-16, W-17).
//!
//! These tests mount small file systems, each in a mount namespace of its own: nothing stays behind.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use sheepdog_proto::admin::{MD_INFO_LEN, MdInfo, decode_md_info};
use sheepdog_proto::{Oid, Opcode, Request, ResultCode, VdiId};
use sheepdog_testkit::binaries::system;
use sheepdog_testkit::disk::set_size;
use sheepdog_testkit::load::{Load, Region, Summary};
use sheepdog_testkit::{Builder, Client, Cluster, Vdi, in_own_mounts, wait};

const BLOCK: u64 = 4 << 20;

fn run(program: &str, package: &str, args: &[&str]) -> bool {
    let output = Command::new(system(program, package)).args(args).output().expect("a program runs");
    if !output.status.success() {
        eprintln!("{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    output.status.success()
}

fn mount(args: &[&str], at: &Path) {
    let at = at.display().to_string();
    assert!(run("mount", "mount", &[args, &[&at]].concat()), "mount {args:?} {at}");
}

/// A file system of its own, with nothing on it, for a stopped node's disk.
fn small_disk(cluster: &mut Cluster, node: usize, mega: u64, space: u64) {
    let disk = cluster.nodes[node].disks[0].clone();
    mount(&["-t", "tmpfs", "-o", &format!("size={mega}m"), "tmpfs"], &disk);
    // A tmpfs has user attributes since Linux 6.6.
    set_size(&disk, space);
}

fn disks(cluster: &Cluster, node: usize) -> Vec<MdInfo> {
    let request = Request::new(Opcode::MD_INFO).length(MD_INFO_LEN);
    let (response, payload) = cluster.nodes[node].client().must(request, &[]);
    assert_eq!(response.result, ResultCode::SUCCESS);
    decode_md_info(&payload).expect("disk information")
}

fn whole(block: u32, version: u8) -> Vec<u8> {
    (0..BLOCK).map(|i| (i >> 9) as u8 ^ block as u8 ^ version).collect()
}

fn create_whole(cluster: &mut Cluster, vid: VdiId, block: u32) -> ResultCode {
    let data = whole(block, 1);
    cluster.client().create_obj(Oid::data(vid, block), None, 0, &data).expect("an answer")
}

/// A node whose disk is full: clients are told, nothing acknowledged is lost, the node and its disk stay, a recovery that
/// does not fit is not complete, and space that is freed is used.
#[test]
fn a_full_disk_refuses_and_recovery_onto_it_does_not_end() {
    if in_own_mounts("sick_disks::a_full_disk_refuses_and_recovery_onto_it_does_not_end") {
        return;
    }
    let mut cluster = Builder::new(4).disks(1).copies(2).disk_size(1 << 30).start();
    cluster.kill9(3);
    cluster.wait_gathered();
    cluster.wipe(3);
    small_disk(&mut cluster, 3, 32, 1 << 30);
    let vid = cluster.client().create_vdi("full", 64 * BLOCK).expect("create");
    for block in 0..40 {
        assert_eq!(create_whole(&mut cluster, vid, block), ResultCode::SUCCESS);
    }
    // About 20 of 40 objects would be at home there, and there is no room for them.
    cluster.start(3);
    cluster.wait_running();
    let epoch = cluster.epoch(3).expect("it runs");
    wait("the recovery to be stuck", || cluster.recovery(3).is_some_and(|s| s.nr_unfound > 0));
    let until = Instant::now() + Duration::from_secs(1);
    while Instant::now() < until {
        let state = cluster.recovery(3).expect("an answer");
        assert!(state.in_recovery == 1 && state.nr_finished < state.nr_total, "{state:?}");
    }
    assert!(
        cluster.nodes.iter().all(|n| !n.log().contains(&format!("all nodes are recovered, epoch {epoch}\n")))
    );
    let kept: usize = cluster.nodes.iter().map(|n| n.stale_files().len()).sum();
    assert!(kept > 0, "what moved away is kept until it is somewhere else");
    assert_eq!(disks(&cluster, 3).len(), 1, "a full disk is no broken disk");

    // New objects that belong there are refused, whatever was written is right.
    let codes: Vec<ResultCode> = (40..56).map(|block| create_whole(&mut cluster, vid, block)).collect();
    assert!(codes.contains(&ResultCode::NO_SPACE) && codes.contains(&ResultCode::SUCCESS), "{codes:?}");
    assert!(codes.iter().all(|c| matches!(*c, ResultCode::NO_SPACE | ResultCode::SUCCESS)), "{codes:?}");
    assert!(cluster.nodes[3].is_running());

    // Without the node everything is complete again.
    cluster.kill9(3);
    cluster.wait_gathered();
    let mut client = cluster.client();
    for block in (0..56).filter(|b| *b < 40 || codes[*b as usize - 40].is_ok()) {
        let (response, data) = client.read_obj(Oid::data(vid, block), 0, BLOCK as usize).expect("read");
        assert_eq!(response.result, ResultCode::SUCCESS, "block {block}");
        assert!(data == whole(block, 1), "block {block}");
    }
    cluster.nodes[3].disks.clear();
}

/// A snapshot for which there is no room, neither for the inode of the new working VDI nor for the counts in that of the
/// snapshot: the VDI stays what it was, and nothing is left.
#[test]
fn a_snapshot_that_finds_no_room_leaves_the_vdi_as_it_was() {
    if in_own_mounts("sick_disks::a_snapshot_that_finds_no_room_leaves_the_vdi_as_it_was") {
        return;
    }
    let mut cluster = Builder::new(5).disks(1).copies(2).disk_size(1 << 30).start();
    cluster.kill9(4);
    cluster.wait_gathered();
    cluster.wipe(4);
    small_disk(&mut cluster, 4, 64, 1 << 30);
    cluster.start(4);
    cluster.wait_recovered();
    let mut client = cluster.client();
    client.set_timeout(Duration::from_secs(60)).expect("a longer timeout");
    // One whose child has a home on the small disk, and one that has itself.
    let mut names = (0..).map(|n| format!("vm{n}"));
    let mut find = |cluster: &mut Cluster, client: &mut Client, base: bool| {
        names.find_map(|name| {
            let vid = client.create_vdi(&name, 8 * BLOCK).expect("create");
            let on_it =
                [vid, VdiId::new(vid.get() + 1)].map(|v| cluster.homes(Oid::inode(v), 2).contains(&4));
            let data_elsewhere = (0..2).all(|block| !cluster.homes(Oid::data(vid, block), 2).contains(&4));
            (on_it == [base, !base] && data_elsewhere).then_some((name, vid))
        })
    };
    let found = [false, true].map(|base| find(&mut cluster, &mut client, base).expect("names enough"));
    let mut open = Vec::new();
    for (_, vid) in &found {
        let mut vdi = Vdi::open(&mut client, *vid).expect("open");
        vdi.write(&mut client, 0, &[1; 65536]).expect("write");
        open.push(vdi);
    }
    let filler = cluster.nodes[4].disks[0].join("filler");
    let mut file = fs::File::create(&filler).expect("a file");
    while std::io::Write::write_all(&mut file, &[1; 4096]).is_ok() {}
    for ((name, vid), code) in found.iter().zip([ResultCode::VDI_WRITE, ResultCode::BASE_VDI_WRITE]) {
        assert_eq!(client.snapshot(name, "s"), Err(code), "{name}");
        assert_eq!(client.lookup(name, "", 0), Ok(*vid), "still the working VDI");
        let header = client.inode(*vid).expect("its inode");
        assert_eq!(header.snap_ctime, 0, "{name} is no snapshot");
        assert!(client.grefs(*vid, 8).expect("counts").iter().all(|pair| *pair == (0, 0)), "{name}");
        assert!(
            cluster.holders(Oid::inode(VdiId::new(vid.get() + 1))).is_empty(),
            "{name}: no child is left"
        );
    }
    // Writable through every node, in a block that is there and in a new one.
    for (vdi, (name, vid)) in open.iter_mut().zip(&found) {
        for node in 0..5 {
            let mut client = cluster.nodes[node].client();
            let byte = node as u8 + 10;
            let oid = Oid::data(*vid, 0);
            wait("the announcement to be taken back", || {
                client.write_obj(oid, 0, &[byte; 4096]).expect("an answer") != ResultCode::READONLY
            });
            let (response, data) = client.read_obj(oid, 0, 4096).expect("read");
            assert!(response.result.is_ok() && data == [byte; 4096], "{name} at node {node}");
        }
        if !cluster.homes(Oid::inode(*vid), 2).contains(&4) {
            vdi.write(&mut client, BLOCK, &[2; 4096]).expect("a new block");
        }
    }
    cluster.assert_replicas_equal(2);
    // With room it is taken.
    drop(file);
    fs::remove_file(&filler).expect("remove");
    for (name, vid) in &found {
        assert_eq!(client.snapshot(name, "s"), Ok(VdiId::new(vid.get() + 1)), "{name}");
        assert_eq!(client.lookup(name, "s", 0), Ok(*vid), "{name}");
    }
    cluster.nodes[4].disks.clear();
}

/// A disk that turns bad under load: it leaves the node, the node stays in the same epoch, and what was on the disk comes
/// back from the others.
fn lose_under_load(cluster: &mut Cluster, spoil: impl FnOnce(&Path)) {
    let mut client = cluster.client();
    let vid = client.create_vdi("load", 32 * BLOCK).expect("create");
    let regions = Region::divide(&mut client, vid, 4).expect("regions");
    let ports = cluster.nodes.iter().map(|n| n.port).collect();
    let load = Load::start(regions, ports, 11);
    wait("the load to begin", || load.operations() > 400);
    let bad = cluster.nodes[1].disks[1].clone();
    let mut files = fs::read_dir(&bad).expect("a disk").filter_map(Result::ok);
    assert!(files.any(|file| file.path().is_file()), "something is lost");
    let (before, epoch) = (disks(cluster, 1), cluster.epoch(0));
    spoil(&bad);
    wait("the disk to be given up", || disks(cluster, 1).len() == before.len() - 1);
    let at = load.operations();
    wait("more work", || load.operations() > at + 300);
    let mut regions = load.stop();
    cluster.nodes[1].disks.pop();
    assert!(cluster.nodes[1].is_running());
    cluster.wait_recovered();
    assert_eq!(cluster.epoch(0), epoch, "the node stayed");
    regions.iter_mut().for_each(|r| r.settle(&mut cluster.client()));
    let summary = Summary::of(&regions);
    assert!(summary.violations.is_empty() && summary.errors.is_empty(), "{summary:#?}");
    for node in 0..3 {
        let mut client = cluster.nodes[node].client();
        let lost: Vec<String> = regions.iter().flat_map(|r| r.verify(&mut client)).collect();
        assert!(lost.is_empty(), "lost, asked at node {node}: {lost:#?}");
    }
    if cluster.strips().is_empty() {
        cluster.assert_replicas_equal(2);
    } else {
        cluster.assert_strips_agree(2, 1);
    }
    // Space and its accounting follow the disk that is left.
    let now = disks(cluster, 1);
    assert!(now[0].used >= before[0].used, "the other disk has everything");
    let shown = cluster.dog_at(1, &["node", "md", "info"], &[]).ok();
    assert!(!shown.contains(&bad.display().to_string()), "{shown}");
}

#[test]
fn a_disk_that_becomes_read_only_is_replaced_by_the_others() {
    if in_own_mounts("sick_disks::a_disk_that_becomes_read_only_is_replaced_by_the_others") {
        return;
    }
    let mut cluster = Builder::new(3).disks(2).copies(2).start();
    lose_under_load(&mut cluster, |disk| {
        let text = disk.display().to_string();
        mount(&["--bind", &text], disk);
        mount(&["-o", "remount,bind,ro"], disk);
    });
}

/// Strips are computed from those of others that are being written to.
#[test]
fn a_disk_of_strips_that_becomes_read_only_is_replaced_by_the_others() {
    if in_own_mounts("sick_disks::a_disk_of_strips_that_becomes_read_only_is_replaced_by_the_others") {
        return;
    }
    let mut cluster = Builder::new(3).disks(2).erasure(2, 1).start();
    lose_under_load(&mut cluster, |disk| {
        let text = disk.display().to_string();
        mount(&["--bind", &text], disk);
        mount(&["-o", "remount,bind,ro"], disk);
    });
}

#[test]
fn a_disk_that_is_unmounted_is_given_up() {
    if in_own_mounts("sick_disks::a_disk_that_is_unmounted_is_given_up") {
        return;
    }
    let mut cluster = Builder::new(3).disks(2).copies(2).disk_size(1 << 30).start();
    assert_eq!(cluster.stop(1), Some(0));
    cluster.wipe(1);
    let disk = cluster.nodes[1].disks[1].clone();
    mount(&["-t", "tmpfs", "-o", "size=256m", "tmpfs"], &disk);
    cluster.nodes[1].disks.iter().for_each(|disk| set_size(disk, 1 << 30));
    cluster.start(1);
    cluster.wait_gathered();
    lose_under_load(&mut cluster, |disk| {
        assert!(run("umount", "mount", &["-l", &disk.display().to_string()]));
    });
}

/// An ext4 that aborts: writes fail with EIO and EROFS, reads go on. Needs root and a loop device.
#[test]
fn a_disk_whose_file_system_fails_is_replaced_by_the_others() {
    if in_own_mounts("sick_disks::a_disk_whose_file_system_fails_is_replaced_by_the_others") {
        return;
    }
    let mut cluster = Builder::new(3).disks(2).copies(2).disk_size(1 << 30).start();
    let image = cluster.dir().join("image");
    fs::File::create(&image).and_then(|f| f.set_len(256 << 20)).expect("an image");
    let image = image.display().to_string();
    assert!(run("mkfs.ext4", "e2fsprogs", &["-q", &image]));
    assert_eq!(cluster.stop(1), Some(0));
    cluster.wipe(1);
    let disk = cluster.nodes[1].disks[1].clone();
    let at = disk.display().to_string();
    if !run("mount", "mount", &["-o", "loop", &image, &at]) {
        eprintln!("not tested: loop devices are not to be had here");
        return;
    }
    fs::remove_dir(disk.join("lost+found")).expect("rmdir");
    cluster.nodes[1].disks.iter().for_each(|disk| set_size(disk, 1 << 30));
    cluster.start(1);
    cluster.wait_gathered();
    lose_under_load(&mut cluster, |disk| mount(&["-o", "remount,abort"], disk));
    cluster.nodes[1].disks.push(disk.clone());
    assert_eq!(cluster.stop(1), Some(0));
    assert!(run("umount", "mount", &[&at]), "nothing of the node holds the disk");
}

/// W-17: one file that cannot be read is one missing replica: the disk and the node stay, clients are served by the others,
/// and the next write or check puts it right.
#[test]
fn an_unreadable_file_is_one_missing_object() {
    let mut cluster = Builder::new(3).disks(2).copies(3).start();
    let vid = cluster.client().create_vdi("one", 8 * BLOCK).expect("create");
    for block in 0..8 {
        assert_eq!(create_whole(&mut cluster, vid, block), ResultCode::SUCCESS);
    }
    let mut vdi = Vdi::open(&mut cluster.client(), vid).expect("open");
    for block in 0..8 {
        vdi.set_owner(&mut cluster.client(), block, vid).expect("map");
    }
    for round in 0..2 {
        let oid = Oid::data(vid, round);
        let path = cluster.object_path(1, oid).expect("a replica");
        fs::remove_file(&path).expect("remove");
        // A name that cannot be opened.
        std::os::unix::fs::symlink(&path, &path).expect("a link to itself");
        let mut client = cluster.nodes[1].client();
        for block in 0..8 {
            let (response, data) = client.read_obj(Oid::data(vid, block), 0, BLOCK as usize).expect("read");
            assert_eq!(response.result, ResultCode::SUCCESS, "block {block}");
            assert!(data == whole(block, 1), "block {block}");
        }
        assert_eq!(disks(&cluster, 1).len(), 2, "the disk stays");
        if round == 0 {
            let data = whole(round, 1)[..4096].to_vec();
            assert_eq!(client.write_obj(oid, 0, &data).expect("write"), ResultCode::SUCCESS);
        } else {
            let text = cluster.dog(&["vdi", "check", "one"]).ok();
            assert_eq!(text, format!("fixed missing {oid}\nfinish check&repair one\n"));
        }
        assert!(path.is_file(), "round {round}: it is a file again");
    }
    assert_eq!(cluster.epoch(0), Some(1));
    cluster.assert_replicas_equal(3);
}

/// The same for a strip.
#[test]
fn an_unreadable_strip_is_one_missing_strip() {
    let mut cluster = Builder::new(3).disks(2).erasure(2, 1).start();
    let vid = cluster.client().create_vdi("one", 4 * BLOCK).expect("create");
    let mut vdi = Vdi::open(&mut cluster.client(), vid).expect("open");
    for block in 0..4 {
        assert_eq!(create_whole(&mut cluster, vid, block), ResultCode::SUCCESS);
        vdi.set_owner(&mut cluster.client(), block, vid).expect("map");
    }
    for round in 0..6 {
        let oid = Oid::data(vid, round % 3);
        let strips = cluster.strips().remove(&oid).expect("strips");
        let (_, path) = strips.iter().find(|((node, _), _)| *node == 1).expect("one of each node");
        fs::remove_file(path).expect("remove");
        std::os::unix::fs::symlink(path, path).expect("a link to itself");
        let mut client = cluster.nodes[round as usize % 3].client();
        for block in 0..4 {
            let (response, data) = client.read_obj(Oid::data(vid, block), 0, BLOCK as usize).expect("read");
            assert_eq!(response.result, ResultCode::SUCCESS, "block {block}");
            assert!(data == whole(block, 1), "block {block}");
        }
        if round < 3 {
            let data = whole(round % 3, 1)[777..5000].to_vec();
            assert_eq!(client.write_obj(oid, 777, &data).expect("write"), ResultCode::SUCCESS);
        } else {
            let text = cluster.dog(&["vdi", "check", "one"]).ok();
            assert!(text.starts_with(&format!("fixed missing {oid}, copy index ")), "{text}");
        }
        assert!(path.is_file(), "round {round}: it is a file again");
        cluster.assert_strips_agree(2, 1);
    }
    assert_eq!((cluster.epoch(0), disks(&cluster, 1).len()), (Some(1), 2), "the disk stays");
}

/// Spec 06, 3.7: a node that cannot note in its metadata directory what it is about to write leaves; the others, which were
/// told so, stay and serve.
#[test]
fn a_node_whose_metadata_directory_fails_leaves_alone() {
    if in_own_mounts("sick_disks::a_node_whose_metadata_directory_fails_leaves_alone") {
        return;
    }
    for coded in [false, true] {
        let builder = Builder::new(4).disks(1);
        let mut cluster = if coded { builder.erasure(2, 1).start() } else { builder.copies(3).start() };
        let mut client = cluster.client();
        let vid = client.create_vdi("load", 32 * BLOCK).expect("create");
        // Nothing is open there yet.
        assert_eq!(cluster.stop(1), Some(0));
        cluster.start(1);
        cluster.wait_gathered();
        let at = cluster.nodes[1].dir.clone();
        mount(&["--bind", &at.display().to_string()], &at);
        mount(&["-o", "remount,bind,ro"], &at);
        let regions = Region::divide(&mut client, vid, 4).expect("regions");
        let others = [0, 2, 3];
        let load = Load::start(regions, others.map(|i| cluster.nodes[i].port).to_vec(), 5);
        wait("writes", || load.operations() > 300);
        let mut regions = load.stop();
        wait("three members", || others.iter().all(|i| cluster.info(*i).is_some_and(|c| c.nodes.len() == 3)));
        assert!(others.iter().all(|i| cluster.nodes[*i].is_running()));
        wait("recovery", || others.iter().all(|i| cluster.recovery(*i).is_some_and(|s| s.in_recovery == 0)));
        regions.iter_mut().for_each(|r| r.settle(&mut cluster.nodes[0].client()));
        let summary = Summary::of(&regions);
        assert!(summary.violations.is_empty() && summary.errors.is_empty(), "{summary:#?}");
        for node in others {
            let mut client = cluster.nodes[node].client();
            let lost: Vec<String> = regions.iter().flat_map(|r| r.verify(&mut client)).collect();
            assert!(lost.is_empty(), "lost, asked at node {node}: {lost:#?}");
        }
        assert!(run("umount", "mount", &["-l", &at.display().to_string()]));
    }
}
