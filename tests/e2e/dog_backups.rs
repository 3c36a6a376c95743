//! Cluster snapshots and restores that go wrong leave everything as it was; saving again stores what changed.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use sheepdog_proto::{Oid, VdiId};
use sheepdog_testkit::{Builder, Cluster, binaries};

const BLOCK: usize = 4 << 20;

/// Bytes of which no two slices of a cluster snapshot are equal.
fn data(seed: u32, length: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..length).map(|_| next()).collect()
}

/// Standard output of a `dog` that must succeed, as bytes.
fn bytes_of(cluster: &Cluster, args: &[&str]) -> Vec<u8> {
    let port = cluster.nodes[0].port.to_string();
    let output = Command::new(binaries::dog()).args(args).args(["-p", &port]).output().expect("dog");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// All that VDIs show: the listing, and the contents of the named ones.
fn state(cluster: &mut Cluster, names: &[&str]) -> (String, Vec<Vec<u8>>) {
    let contents = names.iter().map(|name| bytes_of(cluster, &["vdi", "read", name])).collect();
    (cluster.dog(&["vdi", "list", "-r"]).ok(), contents)
}

/// Three nodes with `alpha`, two blocks, in snapshot `first`.
fn cluster_with_snapshot() -> Cluster {
    let mut cluster = Builder::new(3).copies(2).start();
    cluster.dog(&["vdi", "create", "alpha", "16M"]).ok();
    cluster.dog_in(&["vdi", "write", "alpha", "0", "8M"], &data(1, 2 * BLOCK)).ok();
    cluster.dog(&["vdi", "snapshot", "alpha", "-s", "first"]).ok();
    cluster
}

fn directory(cluster: &Cluster) -> String {
    cluster.dir().join("saved").display().to_string()
}

/// Content files of a directory of cluster snapshots: hash and path, with what tells whether they were written anew.
fn contents(directory: &str) -> BTreeMap<String, (PathBuf, u64, i64)> {
    let mut files = BTreeMap::new();
    for first in fs::read_dir(Path::new(directory).join("objects")).expect("a directory").flatten() {
        for file in fs::read_dir(first.path()).expect("a directory").flatten() {
            let hash =
                [first.file_name(), file.file_name()].map(|name| name.into_string().expect("hex")).concat();
            let meta = file.metadata().expect("a file");
            files.insert(hash, (file.path(), meta.ino(), meta.ctime_nsec()));
        }
    }
    files
}

/// Loads a cluster snapshot that must be good; it asks before it formats.
fn load(cluster: &mut Cluster, tag: &str, directory: &str) {
    cluster.dog_in(&["cluster", "snapshot", "load", tag, directory], b"yes\n").ok();
}

fn vdi_id(cluster: &mut Cluster, name: &str) -> VdiId {
    cluster.client().lookup(name, "", 0).expect("the VDI")
}

#[test]
fn loading_a_damaged_cluster_snapshot_names_the_file_and_changes_nothing() {
    let mut cluster = cluster_with_snapshot();
    let directory = directory(&cluster);
    cluster.dog(&["cluster", "snapshot", "save", "monday", &directory]).ok();
    cluster.dog_in(&["vdi", "write", "alpha", "0", "4M"], &data(2, BLOCK)).ok();
    cluster.dog(&["vdi", "create", "beta", "4M"]).ok();
    let before = state(&mut cluster, &["alpha", "beta"]);

    // The smallest file is the list of all objects or of an object's slices, the largest are slices.
    let mut files: Vec<(u64, String, PathBuf)> = Vec::new();
    for (hash, (path, ..)) in contents(&directory) {
        files.push((fs::metadata(&path).expect("a file").len(), hash, path));
    }
    files.sort();
    assert!(files.len() > 64, "two blocks of 32 slices: {}", files.len());
    let picked = [0, 1, 2, files.len() / 2, files.len() - 1].map(|i| files[i].clone());
    for (length, hash, path) in picked {
        let good = fs::read(&path).expect("a content file");
        let mut bad = good.clone();
        bad[length as usize / 2] ^= 1;
        fs::write(&path, &bad).expect("a content file");
        let load = cluster.dog_in(&["cluster", "snapshot", "load", "monday", &directory], b"yes\n");
        assert_eq!(load.code, 2, "{load:?}");
        assert!(load.stderr.contains(&format!("failed, {hash} != ")), "{hash}: {}", load.stderr);
        assert!(load.stderr.ends_with("Fail to load snapshot\n"), "{}", load.stderr);
        fs::write(&path, &good).expect("a content file");
    }
    let (_, hash, path) = &files[files.len() - 1];
    let aside = path.with_extension("aside");
    fs::rename(path, &aside).expect("a content file");
    let refused = cluster.dog_in(&["cluster", "snapshot", "load", "monday", &directory], b"yes\n");
    assert!(refused.code == 2 && refused.stderr.contains(&hash[2..]), "a missing file: {refused:?}");
    fs::rename(&aside, path).expect("a content file");
    assert!(before == state(&mut cluster, &["alpha", "beta"]), "the cluster is as it was");

    load(&mut cluster, "monday", &directory);
    assert!(bytes_of(&cluster, &["vdi", "read", "alpha", "0", "8M"]) == data(1, 2 * BLOCK));
    assert_eq!(cluster.dog(&["vdi", "list", "-r", "beta"]).ok(), "", "the snapshot has no beta");
}

#[test]
fn a_cluster_snapshot_that_misses_an_object_is_not_listed() {
    let mut cluster = cluster_with_snapshot();
    let directory = directory(&cluster);
    cluster.dog(&["cluster", "snapshot", "save", "good", &directory]).ok();
    let list = cluster.dog(&["cluster", "snapshot", "list", &directory]).ok();
    let snapshot = cluster.client().lookup("alpha", "first", 0).expect("the snapshot");
    let lost = Oid::data(snapshot, 1);
    let holders = cluster.holders(lost);
    assert_eq!(holders.len(), 2);
    for node in holders {
        fs::remove_file(cluster.object_path(node, lost).expect("it holds one")).expect("an object");
    }
    for options in [&[][..], &["-m"]] {
        let args = [&["cluster", "snapshot", "save", "bad", &directory], options].concat();
        let save = cluster.dog(&args);
        assert_eq!(save.code, 2, "{save:?}");
        for line in [
            format!("Failed to read object {lost} "),
            format!("Fail to save object, oid {lost}\n"),
            format!("Fail to save snapshot to path: {directory}.\n"),
        ] {
            assert!(save.stderr.contains(&line), "{line}: {save:?}");
        }
        assert_eq!(cluster.dog(&["cluster", "snapshot", "list", &directory]).ok(), list, "{options:?}");
    }
    assert_ne!(cluster.dog(&["cluster", "snapshot", "load", "bad", &directory]).code, 0);
    // What was saved before is complete and brings the lost block back.
    load(&mut cluster, "good", &directory);
    assert!(bytes_of(&cluster, &["vdi", "read", "alpha", "0", "8M"]) == data(1, 2 * BLOCK));
}

#[test]
fn saving_again_stores_only_what_changed() {
    let mut cluster = cluster_with_snapshot();
    let directory = directory(&cluster);
    cluster.dog(&["cluster", "snapshot", "save", "monday", &directory]).ok();
    let monday = contents(&directory);
    cluster.dog_in(&["vdi", "write", "alpha", "4M", "4M"], &data(3, BLOCK)).ok();
    cluster.dog(&["vdi", "snapshot", "alpha", "-s", "second"]).ok();
    cluster.dog(&["cluster", "snapshot", "save", "tuesday", &directory]).ok();
    let tuesday = contents(&directory);
    let kept = monday.iter().all(|(hash, file)| tuesday.get(hash) == Some(file));
    assert!(kept, "a file was written again");
    // 32 slices and their list; one or two slices and their list for each of the two inodes; the list of objects.
    let new = tuesday.len() - monday.len();
    assert!((34..=40).contains(&new), "{new} new files");
    load(&mut cluster, "tuesday", &directory);
    let expected = [&data(1, 2 * BLOCK)[..BLOCK], &data(3, BLOCK)].concat();
    assert!(bytes_of(&cluster, &["vdi", "read", "alpha", "0", "8M"]) == expected);
}

#[test]
fn saving_uses_several_threads_if_asked() {
    let mut cluster = Builder::new(1).copies(1).start();
    cluster.dog(&["vdi", "create", "alpha", "64M"]).ok();
    cluster.dog_in(&["vdi", "write", "alpha"], &data(4, 16 * BLOCK)).ok();
    cluster.dog(&["vdi", "snapshot", "alpha", "-s", "first"]).ok();
    let port = cluster.nodes[0].port.to_string();
    let most_threads = |options: &[&str], directory: &str| {
        let directory = cluster.dir().join(directory);
        let mut dog = Command::new(binaries::dog())
            .args(["cluster", "snapshot", "save", "monday", "-p", &port])
            .args(options)
            .arg(&directory)
            .stdout(Stdio::null())
            .spawn()
            .expect("dog");
        let tasks = format!("/proc/{}/task", dog.id());
        let deadline = Instant::now() + Duration::from_secs(120);
        let mut most = 0;
        // Idle threads stay for seconds: a look every millisecond sees them all.
        let status = loop {
            most = most.max(fs::read_dir(&tasks).map_or(0, Iterator::count));
            if let Some(status) = dog.try_wait().expect("it is our child") {
                break status;
            }
            assert!(Instant::now() < deadline, "still saving");
            std::thread::sleep(Duration::from_millis(1));
        };
        assert!(status.success());
        (most, contents(&directory.display().to_string()).into_keys().collect::<Vec<_>>())
    };
    let (one, plain) = most_threads(&[], "plain");
    let (many, threaded) = most_threads(&["-m"], "threaded");
    assert!(one <= 2 && many > 4, "{one} threads, with -m {many}");
    assert_eq!(plain, threaded, "the same files");
}

#[test]
fn a_restore_that_fails_keeps_the_vdi() {
    let mut cluster = cluster_with_snapshot();
    cluster.dog_in(&["vdi", "write", "alpha", "1M", "5M"], &data(5, 5 << 20)).ok();
    cluster.dog(&["vdi", "snapshot", "alpha", "-s", "second"]).ok();
    let stream = bytes_of(&cluster, &["vdi", "backup", "alpha", "-F", "first", "-s", "second"]);
    let restored = bytes_of(&cluster, &["vdi", "read", "alpha"]);
    cluster.dog_in(&["vdi", "write", "alpha", "3M", "2M"], &data(6, 2 << 20)).ok();
    let before = state(&mut cluster, &["alpha"]);
    let id = vdi_id(&mut cluster, "alpha");

    let changed = |at: usize, bytes: &[u8]| {
        let mut bad = stream.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        bad
    };
    let cut = |length: usize| stream[..length].to_vec();
    let second_record = 8 + 16 + (3 << 20);
    assert_eq!(stream[second_record..second_record + 4], [1, 0, 0, 0], "the record of block 1");
    let broken = [
        ("empty", cut(0), "failed to read backup header"),
        ("cut in the header", cut(5), "failed to read backup header"),
        ("cut before the first record", cut(8), "failed to read backup data"),
        ("cut in a record's head", cut(20), "failed to read backup data"),
        ("cut in a record's data", cut(100_000), "failed to read backup data"),
        ("cut between two records", cut(second_record), "failed to read backup data"),
        ("without the end", cut(stream.len() - 16), "failed to read backup data"),
        ("cut in the end", cut(stream.len() - 1), "failed to read backup data"),
        ("another version", changed(0, &[9]), "The backup file is corrupted"),
        ("another magic number", changed(4, &[0]), "The backup file is corrupted"),
        (
            "a block beyond all",
            changed(second_record, &[0xff, 0xff, 0xff, 0x7f]),
            "The backup file is corrupted",
        ),
        ("data beyond a block", changed(second_record + 4, &[0, 0, 64, 0]), "The backup file is corrupted"),
        ("a length beyond a block", changed(8 + 8, &[0xff; 4]), "The backup file is corrupted"),
    ];
    for (what, bytes, message) in broken {
        let restore = cluster.dog_in(&["vdi", "restore", "alpha", "-s", "first"], &bytes);
        assert!(restore.code != 0 && restore.stderr.contains(message), "{what}: {restore:?}");
        assert!(before == state(&mut cluster, &["alpha"]), "{what}: alpha changed");
        assert_eq!(vdi_id(&mut cluster, "alpha"), id, "{what}: another working VDI");
    }
    cluster.dog_in(&["vdi", "restore", "alpha", "-s", "first"], &stream).ok();
    let list = cluster.dog(&["vdi", "list", "-r"]).ok();
    let newest = list.lines().filter(|line| line.starts_with('s')).count();
    let newest = bytes_of(&cluster, &["vdi", "read", "alpha", "-s", &newest.to_string()]);
    assert!(newest == restored, "{list}");
}
