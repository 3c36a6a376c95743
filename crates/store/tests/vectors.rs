//! The store against bytes, names and choices of the original (`tests/vectors/store.json`).

use std::path::Path;

use serde_json::Value;
use sheepdog_proto::config::{EpochLog, StoreConfig};
use sheepdog_proto::{Epoch, Oid};
use sheepdog_store::{DiskRing, Layout, MetaDir, MetaError, Replica, StaleName, trim_zeros};

fn vectors(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/vectors").join(name);
    serde_json::from_slice(&std::fs::read(path).expect("vectors")).expect("json")
}

fn list<'a>(value: &'a Value, key: &str) -> &'a Vec<Value> {
    value[key].as_array().unwrap_or_else(|| panic!("{key}"))
}

fn bytes(value: &Value) -> Vec<u8> {
    let text = value.as_str().expect("hex");
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).expect("hex")).collect()
}

fn oid(value: &Value) -> Oid {
    Oid(u64::from_str_radix(value.as_str().expect("oid"), 16).expect("hex"))
}

fn meta() -> (tempfile::TempDir, MetaDir) {
    let dir = tempfile::tempdir().expect("tempdir");
    let meta = MetaDir::open(&dir.path().join("store")).expect("open");
    (dir, meta)
}

#[test]
fn config_files_of_version_6_are_read_and_written_back_unchanged() {
    for case in list(&vectors("store.json"), "config") {
        let (_dir, meta) = meta();
        let content = bytes(&case["hex"]);
        std::fs::write(meta.path().join("config"), &content).expect("write");
        let decoded = &case["decoded"];
        if decoded["version"] != 6 {
            let error = meta.read_config().expect_err("another version");
            assert!(matches!(error, MetaError::Version(v) if decoded["version"] == v));
            continue;
        }
        let config = meta.read_config().expect("read");
        assert_eq!(format!("{:016x}", config.ctime), decoded["ctime"].as_str().expect("ctime"));
        assert_eq!(config.space, decoded["space"].as_u64().expect("space"));
        assert_eq!(u64::from(config.shutdown), decoded["shutdown"].as_u64().expect("shutdown"));
        meta.write_config(&config).expect("write");
        assert_eq!(std::fs::read(meta.path().join("config")).expect("read"), content);
        assert!(!meta.path().join("config.tmp").exists());
    }
}

#[test]
fn odd_config_files_are_taken_as_the_original_takes_them() {
    let (_dir, meta) = meta();
    let path = meta.path().join("config");
    let fresh = meta.read_config().expect("absent");
    assert_eq!((fresh.version, fresh.ctime), (6, 0));
    std::fs::write(&path, b"").expect("write");
    assert_eq!(meta.read_config().expect("empty"), fresh);
    let whole = StoreConfig { ctime: 1, ..fresh }.to_bytes();
    std::fs::write(&path, &whole[..20]).expect("write");
    let error = meta.read_config().expect_err("truncated").to_string();
    assert_eq!(error, "This sheep version is not compatible with the existing data layout, 0");
    std::fs::write(&path, [&whole[..], &[9; 60]].concat()).expect("write");
    assert_eq!(meta.read_config().expect("long").ctime, 1);
    std::fs::write(meta.path().join("config.tmp"), b"left over").expect("write");
    meta.read_config().expect("read");
    assert!(!meta.path().join("config.tmp").exists());
    let mut disk_mode = whole;
    disk_mode[8] |= 2;
    std::fs::write(&path, disk_mode).expect("write");
    assert!(matches!(meta.read_config(), Err(MetaError::DiskMode)));
}

#[test]
fn epoch_files_are_read_and_written_back_unchanged() {
    for case in list(&vectors("store.json"), "epoch") {
        let (_dir, meta) = meta();
        let content = bytes(&case["hex"]);
        let Some(nodes) = case["decoded"]["nodes"].as_array() else { continue };
        let path = meta.path().join("epoch/00000004");
        std::fs::write(&path, &content).expect("write");
        assert_eq!(meta.latest_epoch().expect("latest"), Epoch(4));
        let log = meta.read_epoch(Epoch(4)).expect("read");
        assert_eq!(log.nodes.len(), nodes.len());
        assert_eq!(log.time, case["decoded"]["time"].as_i64().expect("time"));
        meta.write_epoch(Epoch(5), &log).expect("write");
        assert_eq!(std::fs::read(meta.path().join("epoch/00000005")).expect("read"), content);
    }
}

#[test]
fn damaged_epoch_files_are_refused_and_foreign_ones_ignored() {
    let (_dir, meta) = meta();
    let file = |name: &str| meta.path().join("epoch").join(name);
    assert_eq!(meta.latest_epoch().expect("latest"), Epoch(0));
    assert!(matches!(meta.read_epoch(Epoch(1)), Err(MetaError::NoEpoch(Epoch(1)))));
    for len in [4, 100] {
        std::fs::write(file("00000002"), vec![0; len]).expect("write");
        assert_eq!(meta.read_epoch(Epoch(2)).expect_err("damaged").to_string(), "invalid epoch 2 log");
    }
    for name in ["00000009.tmp", "README", "9", "0000000x", "00000008.2026-01-01_000000"] {
        std::fs::write(file(name), b"").expect("write");
    }
    assert_eq!(meta.latest_epoch().expect("latest"), Epoch(2));
    let log = EpochLog { nodes: Vec::new(), time: 77 };
    for epoch in [1, 2, 3, 7] {
        meta.write_epoch(Epoch(epoch), &log).expect("write");
    }
    meta.remove_epochs(Epoch(3)).expect("remove");
    assert_eq!(meta.latest_epoch().expect("latest"), Epoch(7));
    assert!(!file("00000001").exists() && file("README").exists());
}

#[test]
fn node_config_is_cut_at_its_nul_and_found_in_both_places() {
    let (_dir, meta) = meta();
    assert_eq!(meta.node_config().expect("absent"), (None, None));
    let sibling = format!("{}node_config", meta.path().display());
    std::fs::write(&sibling, b"tree\0SHELL=/bin/").expect("write");
    let (name, warning) = meta.node_config().expect("sibling");
    assert_eq!(name.as_deref(), Some("tree"));
    assert!(warning.expect("warning").contains("obeyed"));
    std::fs::write(meta.path().join("node_config"), b"plain\0\0\0\0\0\0\0\0\0\0\0").expect("write");
    let (name, warning) = meta.node_config().expect("both");
    assert_eq!(name.as_deref(), Some("plain"));
    assert!(warning.expect("warning").contains("ignored"));
}

#[test]
fn a_metadata_directory_that_cannot_be_made_is_named() {
    let dir = tempfile::tempdir().expect("tempdir");
    let file = dir.path().join("file");
    std::fs::write(&file, b"").expect("write");
    let error = MetaDir::open(&file).expect_err("a file").to_string();
    assert_eq!(error, format!("cannot create the directory {} (File exists)", file.display()));
    let deep = dir.path().join("a/b");
    let error = MetaDir::open(&deep).expect_err("no parent").to_string();
    assert_eq!(error, format!("cannot create the directory {} (No such file or directory)", deep.display()));
}

#[test]
fn names_follow_both_layouts() {
    let vectors = vectors("store.json");
    for case in list(&vectors, "names") {
        let replica = Replica::whole(oid(&case["oid"]));
        for (layout, key) in [(Layout::Plain, "plain"), (Layout::Tree, "tree")] {
            let path = layout.path(Path::new("/d"), replica);
            assert_eq!(path, Path::new("/d").join(case[key].as_str().expect("path")));
            let name = path.file_name().and_then(|n| n.to_str()).expect("name");
            assert_eq!(Replica::parse(name), Some(replica));
        }
    }
    for case in list(&vectors, "stale_names") {
        let strip = case["ec_index"].as_u64().map(|i| i as u8);
        let epoch = Epoch(case["epoch"].as_u64().expect("epoch") as u32);
        let name = StaleName { replica: Replica { oid: oid(&case["oid"]), strip }, epoch };
        let path = Layout::Tree.stale_path(Path::new("/d"), name);
        assert_eq!(path, Path::new("/d").join(case["name"].as_str().expect("name")));
        assert_eq!(StaleName::parse(&name.to_string()), Some(name));
    }
}

#[test]
fn zero_blocks_are_trimmed_like_the_originals() {
    let vectors = vectors("store.json");
    let cases = list(&vectors, "trim");
    assert_eq!(cases.len(), 29);
    for case in cases {
        let number = |key: &str| case[key].as_u64().unwrap_or_else(|| panic!("{key}"));
        let mut data = vec![0; number("length") as usize];
        for at in list(case, "nonzero_bytes_at") {
            data[at.as_u64().expect("index") as usize] = 1;
        }
        let kept = trim_zeros(number("offset"), &data);
        let got = (number("offset") + kept.start as u64, kept.len() as u64);
        assert_eq!(got, (number("out_offset"), number("out_length")), "{case}");
    }
}

#[test]
fn objects_belong_to_the_originals_disks() {
    let vectors = vectors("store.json");
    let disks = list(&vectors["disks"], "disks");
    let path = |i: usize| disks[i]["path"].as_str().expect("path");
    let ring = DiskRing::new(
        disks.iter().enumerate().map(|(i, d)| (path(i).as_bytes(), d["space"].as_u64().expect("space"))),
    );
    for disk in disks {
        let points = DiskRing::points_of(disk["space"].as_u64().expect("space"));
        assert_eq!(points, disk["nr_vdisks"].as_u64().expect("points"));
    }
    for object in list(&vectors["disks"], "objects") {
        let disk = ring.disk_of(oid(&object["oid"])).expect("disk");
        assert_eq!(path(disk), object["disk"].as_str().expect("disk"), "{object}");
    }
    assert_eq!(DiskRing::default().disk_of(Oid(1)), None);
}

#[test]
fn disk_rings_equal_the_originals_point_by_point() {
    for set in list(&vectors("md.json"), "sets").iter().filter(|s| s["disk_mode"] == false) {
        let mut disks: Vec<(&str, u64)> = list(set, "disks")
            .iter()
            .map(|d| (d["path"].as_str().expect("path"), d["space"].as_u64().expect("space")))
            .collect();
        let listed = disks.clone();
        disks.sort_unstable();
        let ring = DiskRing::new(disks.iter().map(|(p, s)| (p.as_bytes(), *s)));
        let points: u64 = disks.iter().map(|(_, size)| DiskRing::points_of(*size)).sum();
        assert_eq!(points, set["ring_len"].as_u64().expect("length"), "{}", set["name"]);
        for object in list(set, "objects") {
            let wanted = listed[object[1].as_u64().expect("disk") as usize];
            let got = ring.disk_of(oid(&object[0])).map(|i| disks[i]);
            assert_eq!(got, Some(wanted), "{} {object}", set["name"]);
        }
    }
}

/// The lock belongs to the process: another one must try it. This "test" is that other process.
#[test]
#[ignore = "started by the_lock_excludes_another_process"]
fn second_process() {
    let dir = std::env::var("SHEEPDOG_TEST_META").expect("directory");
    let error = MetaDir::open(Path::new(&dir)).expect_err("locked").to_string();
    assert_eq!(error, format!("another sheep daemon is using {dir}\nlocking directory: {dir} failed"));
}

#[test]
fn the_lock_excludes_another_process() {
    let (_dir, meta) = meta();
    let other = std::process::Command::new(std::env::current_exe().expect("test binary"))
        .args(["--exact", "second_process", "--ignored"])
        .env("SHEEPDOG_TEST_META", meta.path())
        .output()
        .expect("run");
    assert!(other.status.success(), "{}", String::from_utf8_lossy(&other.stdout));
}

#[test]
fn a_log_fetched_from_another_node_never_replaces_an_own_one() {
    let dir = tempfile::tempdir().expect("tempdir");
    let meta = MetaDir::open(&dir.path().join("meta")).expect("open");
    let log = |time| EpochLog { nodes: Vec::new(), time };
    meta.keep_epoch(Epoch(3), &log(1)).expect("keep");
    assert_eq!(meta.read_epoch(Epoch(3)).expect("read").time, 1);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| (0..200).for_each(|_| meta.write_epoch(Epoch(3), &log(7)).expect("write")));
            scope.spawn(|| (0..200).for_each(|_| meta.keep_epoch(Epoch(3), &log(2)).expect("keep")));
        }
    });
    meta.keep_epoch(Epoch(3), &log(2)).expect("keep");
    assert_eq!(meta.read_epoch(Epoch(3)).expect("read").time, 7);
}
