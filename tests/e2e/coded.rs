//! Erasure-coded objects across losses: strips of different states never meet (spec 06, T4, T5; W-01, W-19).

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use sheepdog_proto::{Oid, ResultCode, VdiId};
use sheepdog_testkit::{Builder, Cluster, Vdi};

const BLOCKS: u32 = 8;

/// Blocks of a coded VDI, written in part at odd places so that stripes are read, changed and encoded again.
fn write(cluster: &mut Cluster, vid: VdiId, version: u8) {
    let mut client = cluster.client();
    for block in 0..BLOCKS {
        let oid = Oid::data(vid, block);
        let data = vec![version ^ block as u8; 70_000];
        let code = match version {
            1 => client.create_obj(oid, None, 777, &data),
            _ => client.write_obj(oid, 777, &data),
        };
        assert_eq!(code.expect("an answer"), ResultCode::SUCCESS, "block {block}");
    }
    if version == 1 {
        // So that a check finds them.
        let mut vdi = Vdi::open(&mut client, vid).expect("open");
        for block in 0..BLOCKS {
            vdi.set_owner(&mut client, block, vid).expect("map");
        }
    }
}

fn assert_version(cluster: &mut Cluster, vid: VdiId, version: u8) {
    for node in cluster.running() {
        let mut client = cluster.nodes[node].client();
        for block in 0..BLOCKS {
            let (response, data) = client.read_obj(Oid::data(vid, block), 0, 71_000).expect("read");
            assert_eq!(response.result, ResultCode::SUCCESS, "block {block} at node {node}");
            let zeros = data[..777].iter().chain(&data[70_777..]).all(|b| *b == 0);
            let right = data[777..70_777].iter().all(|b| *b == version ^ block as u8);
            assert!(zeros && right, "block {block} at node {node}");
        }
    }
}

fn check(cluster: &mut Cluster) {
    let text = cluster.dog(&["vdi", "check", "coded"]).ok();
    assert_eq!(text.trim(), "finish check&repair coded");
}

/// T4, W-01: writes with fewer nodes than strips; the node returns; then any other node fails.
#[test]
fn strips_of_before_an_absence_are_never_used_after_it() {
    for disabled in [false, true] {
        let mut cluster = Builder::new(3).erasure(2, 1).start();
        let vid = cluster.client().create_vdi("coded", u64::from(BLOCKS) << 22).expect("create");
        write(&mut cluster, vid, 1);
        let mut version = 1;
        for away in 0..3 {
            if disabled {
                cluster.dog(&["cluster", "recover", "disable"]).ok();
            }
            cluster.kill9(away);
            cluster.wait_running();
            version += 1;
            write(&mut cluster, vid, version);
            assert_version(&mut cluster, vid, version);
            cluster.start(away);
            cluster.wait_members(3);
            if disabled {
                cluster.dog(&["cluster", "recover", "enable"]).ok();
            }
            cluster.wait_gathered();
            cluster.assert_strips_agree(2, 1);
            check(&mut cluster);
            // Any p failures.
            for lost in 0..3 {
                cluster.kill9(lost);
                cluster.wait_running();
                assert_version(&mut cluster, vid, version);
                cluster.start(lost);
                cluster.wait_gathered();
            }
            cluster.assert_strips_agree(2, 1);
        }
    }
}

/// The same with two parity strips and two failures, and more nodes than strips, so that strips change their homes.
#[test]
fn strips_move_with_their_homes() {
    let mut cluster = Builder::new(7).erasure(4, 2).start();
    let vid = cluster.client().create_vdi("coded", u64::from(BLOCKS) << 22).expect("create");
    write(&mut cluster, vid, 1);
    let mut version = 1;
    for (a, b) in [(0, 4), (6, 1)] {
        cluster.kill9(a);
        cluster.wait_gathered();
        version += 1;
        write(&mut cluster, vid, version);
        cluster.kill9(b);
        cluster.wait_gathered();
        version += 1;
        write(&mut cluster, vid, version);
        assert_version(&mut cluster, vid, version);
        cluster.start(a);
        cluster.wait_members(6);
        cluster.start(b);
        cluster.wait_gathered();
        cluster.assert_strips_agree(4, 2);
        assert_version(&mut cluster, vid, version);
    }
    check(&mut cluster);
}

/// Other codes and block sizes: as many nodes may be lost as there are parity strips, written to without them or not.
#[test]
fn every_code_survives_the_loss_of_its_parity_in_nodes() {
    for (data, parity, shift) in [(2, 2, 22), (4, 3, 20), (8, 2, 23)] {
        let nodes = usize::from(data + parity);
        let mut cluster = Builder::new(nodes).erasure(data, parity).block_size_shift(shift).start();
        let vid = cluster.client().create_vdi("coded", u64::from(BLOCKS) << shift).expect("create");
        write(&mut cluster, vid, 1);
        for (version, first) in [(1, 0), (2, nodes - usize::from(parity))] {
            let away = first..first + usize::from(parity);
            away.clone().for_each(|node| cluster.kill9(node));
            cluster.wait_running();
            assert_version(&mut cluster, vid, version);
            write(&mut cluster, vid, version + 1);
            assert_version(&mut cluster, vid, version + 1);
            away.for_each(|node| cluster.start(node));
            cluster.wait_members(nodes);
            cluster.wait_gathered();
            cluster.assert_strips_agree(data, parity);
            assert_version(&mut cluster, vid, version + 1);
        }
        check(&mut cluster);
    }
}

/// T5, W-19: a strip file vanishes on a node that lives.
#[test]
fn a_missing_strip_is_decoded_and_rebuilt() {
    let mut cluster = Builder::new(3).erasure(2, 1).start();
    let vid = cluster.client().create_vdi("coded", u64::from(BLOCKS) << 22).expect("create");
    write(&mut cluster, vid, 1);
    for round in 0..3u8 {
        for (oid, files) in cluster.strips() {
            let index = (u32::from(round) + oid.index()) as usize % 3;
            let (_, path) = files.iter().find(|((_, i), _)| *i == index).expect("three strips");
            fs::remove_file(path).expect("remove");
        }
        assert_version(&mut cluster, vid, round + 1);
        write(&mut cluster, vid, round + 2);
        assert_version(&mut cluster, vid, round + 2);
        cluster.assert_strips_agree(2, 1);
    }
    check(&mut cluster);
}

/// Strips that a file system cut off are computed from the others, those of a node that was away and those of one that was
/// not.
#[test]
fn cut_off_strips_are_computed_from_the_others() {
    for whole in [false, true] {
        let mut cluster = Builder::new(3).erasure(2, 1).start();
        let vid = cluster.client().create_vdi("coded", u64::from(BLOCKS) << 22).expect("create");
        write(&mut cluster, vid, 1);
        if whole {
            cluster.kill9_all();
        } else {
            cluster.kill9(1);
            cluster.wait_gathered();
        }
        for block in 0..BLOCKS {
            let name = Oid::data(vid, block).to_string();
            let dirs = cluster.nodes[1].object_dirs();
            let mut strips = dirs.iter().flat_map(|d| (0..3).map(|i| d.join(format!("{name}_{i}"))));
            let strip = strips.find(|path| path.is_file()).expect("a strip");
            fs::File::options().write(true).open(strip).expect("open").set_len(4096).expect("cut off");
        }
        for node in 0..3 {
            if cluster.nodes[node].pid().is_none() {
                cluster.spawn(node);
            }
        }
        cluster.wait_members(3);
        cluster.wait_recovered();
        cluster.assert_strips_agree(2, 1);
        assert_version(&mut cluster, vid, 1);
        cluster.kill9(0);
        cluster.wait_running();
        assert_version(&mut cluster, vid, 1);
    }
}

/// `-W`: strips are found although placement sends them elsewhere.
#[test]
fn wild_card_recovery_finds_strips_on_any_node() {
    let mut cluster = Builder::new(4).erasure(2, 1).start();
    let vid = cluster.client().create_vdi("coded", u64::from(BLOCKS) << 22).expect("create");
    write(&mut cluster, vid, 1);
    cluster.dog(&["cluster", "shutdown"]).ok();
    for node in &mut cluster.nodes {
        node.wait_exit(Duration::from_secs(30));
    }
    // As if the rule had changed: every strip goes to the next node.
    let strips = |cluster: &Cluster, node: usize| -> Vec<PathBuf> {
        let dirs = cluster.nodes[node].object_dirs();
        let entries = dirs.iter().flat_map(|d| fs::read_dir(d).expect("objects"));
        let paths = entries.map(|e| e.expect("entry").path()).filter(|p| p.is_file());
        paths.filter(|p| p.file_name().is_some_and(|n| n.len() > 17)).collect()
    };
    let all: Vec<Vec<PathBuf>> = (0..4).map(|node| strips(&cluster, node)).collect();
    assert_eq!(all.iter().map(Vec::len).sum::<usize>(), BLOCKS as usize * 3);
    for (node, paths) in all.into_iter().enumerate() {
        for path in paths {
            let to = cluster.nodes[(node + 1) % 4].object_dirs()[0].join(path.file_name().expect("a name"));
            fs::rename(path, to).expect("rename");
        }
    }
    for node in 0..4 {
        cluster.nodes[node].args_mut().push("-W".into());
        cluster.start(node);
    }
    cluster.wait_recovered();
    cluster.assert_strips_agree(2, 1);
    assert_version(&mut cluster, vid, 1);
}
