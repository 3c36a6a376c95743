//! The tree store (spec 03, sections 2, 5 and 14).

use std::fs;

use sheepdog_proto::{Flags, Opcode, Request, ResultCode};
use sheepdog_testkit::{Builder, Cluster, Vdi};

const BLOCK: u64 = 4 << 20;

fn fill(cluster: &mut Cluster) -> Vdi {
    let mut client = cluster.client();
    let vid = client.create_vdi("tree", 4 * BLOCK).expect("create");
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    for block in 0..4 {
        vdi.write(&mut client, block * BLOCK, &[block as u8 + 1; 8192]).expect("write");
    }
    vdi
}

fn assert_filled(cluster: &mut Cluster, vdi: &Vdi) {
    for node in cluster.running() {
        for block in 0..4 {
            let bytes = vdi.read(&mut cluster.nodes[node].client(), block * BLOCK, 8192).expect("read");
            assert!(bytes.iter().all(|b| *b == block as u8 + 1), "block {block} at node {node}");
        }
    }
}

/// Directories, relative to the disk, that hold objects of a node.
fn directories(cluster: &Cluster, node: usize) -> Vec<String> {
    let disk = cluster.nodes[node].object_dirs()[0].clone();
    let files = cluster.objects_of(node).into_values();
    let mut dirs: Vec<String> = files
        .map(|f| f.parent().expect("parent").strip_prefix(&disk).expect("below").display().to_string())
        .collect();
    dirs.sort();
    dirs.dedup();
    dirs
}

#[test]
fn a_tree_store_survives_restarts_accepts_flat_objects_and_is_learned_by_a_joiner() {
    let mut cluster = Builder::new(3).copies(2).unformatted().start();
    assert_eq!(cluster.stop(2), Some(0));
    cluster.wait_members(2);
    let out = cluster.dog(&["cluster", "format", "-b", "tree", "-c", "2"]).ok();
    assert_eq!(out, "using backend tree store\n");
    cluster.wait_running();
    let vdi = fill(&mut cluster);
    let low = format!("{:02x}", vdi.vid().get() & 0xff);
    for node in 0..2 {
        assert_eq!(directories(&cluster, node), [low.clone(), "meta".into()], "node {node}");
        assert_eq!(&fs::read(cluster.nodes[node].dir.join("config")).expect("config")[11..16], b"tree\0");
    }
    let (_, data) = cluster.client().must(Request::new(Opcode::GET_STORE_LIST).length(512), &[]);
    assert_eq!(data, b"tree plain \0");

    cluster.kill9_all();
    let (oid, path) = cluster.objects_of(0).into_iter().find(|(o, _)| !o.is_inode()).expect("a data object");
    fs::rename(&path, cluster.nodes[0].dir.join("obj").join(oid.to_string())).expect("flat");
    cluster.start(0);
    cluster.start(1);
    cluster.wait_recovered();
    assert!(path.is_file(), "moved into its directory");
    assert_filled(&mut cluster, &vdi);
    cluster.assert_replicas_equal(2);

    // A node that was never formatted learns the driver.
    cluster.start(2);
    cluster.wait_members(3);
    cluster.wait_recovered();
    assert_filled(&mut cluster, &vdi);
    cluster.assert_replicas_equal(2);
    assert!(
        directories(&cluster, 2).iter().all(|d| *d == low || d == "meta"),
        "{:?}",
        directories(&cluster, 2)
    );
    assert!(cluster.nodes[2].dir.join("obj/ff").is_dir());

    // Formatting again with the other driver.
    cluster.dog(&["cluster", "format", "-f", "-b", "plain", "-c", "2"]).ok();
    cluster.wait_running();
    fill(&mut cluster);
    assert_eq!(directories(&cluster, 0), [""]);
    assert!(!cluster.nodes[0].dir.join("obj/meta").exists());
}

#[test]
fn a_node_may_choose_a_driver_of_its_own() {
    let mut cluster = Builder::new(2).copies(2).unformatted().start();
    cluster.kill9(1);
    let dir = cluster.nodes[1].dir.clone();
    fs::write(dir.join("node_config"), b"tree\0SHELL=/bin/").expect("node_config");
    cluster.start(1);
    cluster.wait_members(2);
    cluster.dog(&["cluster", "format", "-c", "2"]).ok();
    cluster.wait_running();
    let vdi = fill(&mut cluster);
    assert_eq!(directories(&cluster, 0), [""]);
    assert_eq!(directories(&cluster, 1).len(), 2);
    assert_eq!(&fs::read(dir.join("config")).expect("config")[11..17], b"plain\0");
    cluster.kill9_all();
    cluster.start(0);
    cluster.start(1);
    cluster.wait_recovered();
    assert_filled(&mut cluster, &vdi);
    cluster.assert_replicas_equal(2);

    cluster.kill9(1);
    fs::write(dir.join("node_config"), b"nosuch").expect("node_config");
    cluster.spawn(1);
    assert_eq!(cluster.nodes[1].wait_exit(std::time::Duration::from_secs(30)).code(), Some(1));
    assert!(cluster.nodes[1].log().contains("backend store 'nosuch' is not supported"));
    let name = b"nosuch\0";
    let request = Request::new(Opcode::MAKE_FS).flag(Flags::WRITE).length(name.len());
    assert_eq!(cluster.client().must(request, name).0.result, ResultCode::NO_STORE);
}
