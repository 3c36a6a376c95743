//! A store written by the original: every object is found, read and hashed as its manifest says, also after a restore
//! under other paths, which puts some objects on the wrong disk.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use sha1::{Digest, Sha1};
use sheepdog_proto::{Epoch, Oid};
use sheepdog_store::{DigestOf, MetaDir, Replica, Store, StoreOptions};

fn vector(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/vectors").join(name)
}

fn restore() -> (tempfile::TempDir, Value) {
    let dir = tempfile::tempdir().expect("tempdir");
    let status = Command::new("tar")
        .args(["--xattrs", "--xattrs-include=user.*", "--no-same-owner", "-xzf"])
        .arg(vector("store-fixture.tar.gz"))
        .arg("-C")
        .arg(dir.path())
        .status()
        .expect("tar");
    assert!(status.success());
    let manifest = std::fs::read(vector("store-fixture.json")).expect("manifest");
    (dir, serde_json::from_slice(&manifest).expect("json"))
}

/// Object files of a node: name to size and digest.
fn objects(node: &Value) -> BTreeMap<Replica, (u64, String)> {
    let files = node["files"].as_array().expect("files").iter().filter(|f| f["type"] == "file");
    let object = |file: &Value| {
        let name = file["path"].as_str()?.rsplit('/').next()?;
        let entry = (file["size"].as_u64()?, file["sha1"].as_str()?.to_owned());
        Some((Replica::parse(name)?, entry))
    };
    files.filter_map(object).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn node<'a>(manifest: &'a Value, name: &str) -> &'a Value {
    let nodes = manifest["nodes"].as_array().expect("nodes");
    nodes.iter().find(|n| n["dir"] == name).expect("node")
}

async fn assert_content(store: &Store, expected: &BTreeMap<Replica, (u64, String)>) {
    assert_eq!(store.working(), expected.keys().copied().collect::<Vec<_>>());
    for (replica, (size, sha1)) in expected {
        let bytes = store.read(*replica, 0, *size as usize).await.expect("read");
        assert_eq!(&hex(&Sha1::digest(&bytes)), sha1, "{replica}");
        for of in [DigestOf::All, DigestOf::Frozen, DigestOf::Frozen] {
            assert_eq!(&hex(&store.hash(*replica, *size, None, of).await.expect("hash")), sha1);
        }
    }
}

#[tokio::test]
async fn single_directory_stores_are_read_completely() {
    let (dir, manifest) = restore();
    for name in ["n0", "n1"] {
        let meta = MetaDir::open(&dir.path().join(name)).expect("meta");
        let config = meta.read_config().expect("config");
        assert_eq!(format!("{:016x}", config.ctime), manifest["ctime"].as_str().expect("ctime"));
        assert_eq!(meta.latest_epoch().expect("latest"), Epoch(3));
        assert_eq!(meta.read_epoch(Epoch(3)).expect("epoch").nodes.len(), 3);
        let (store, log) = Store::open(&[meta.default_disk()], StoreOptions::default()).expect("open");
        assert!(log[0].ends_with("total disk 1"), "{log:?}");
        assert_eq!(store.disk_sizes_sum(), config.space);
        let report = store.scan();
        let expected = objects(node(&manifest, name));
        assert_eq!(report.working, expected.len());
        assert!(report.misplaced.is_empty() && report.foreign.is_empty() && report.unreadable.is_empty());
        let inodes: Vec<Oid> = expected.keys().map(|r| r.oid).filter(|o| o.is_inode()).collect();
        assert_eq!(report.inodes.iter().map(|(o, _)| *o).collect::<Vec<_>>(), inodes);
        for (oid, header) in &report.inodes {
            assert_eq!(header.vdi_id, oid.vid());
        }
        assert_content(&store, &expected).await;
    }
}

#[tokio::test]
async fn a_two_disk_store_restored_elsewhere_is_read_and_put_in_order() {
    let (dir, manifest) = restore();
    let disks = [dir.path().join("n2/d0"), dir.path().join("n2/d1")];
    let (store, _) = Store::open(&disks, StoreOptions::default()).expect("open");
    let misplaced = store.scan().misplaced.len();
    let expected = objects(node(&manifest, "n2"));
    assert_content(&store, &expected).await;
    let used = store.space().used;
    let report = store.settle().await;
    assert_eq!((report.moved, report.failed), (misplaced, 0));
    assert_content(&store, &expected).await;
    store.sync_dirs().await.expect("sync");
    // Moving keeps holes, or there would be 12 MiB per inode.
    assert!(store.space().used <= used + (2 << 20), "{used} became {}", store.space().used);

    let (store, _) = Store::open(&disks, StoreOptions::default()).expect("open again");
    assert!(store.scan().misplaced.is_empty());
    assert_content(&store, &expected).await;
}

#[tokio::test]
async fn an_object_of_a_lost_disk_is_absent_and_the_others_are_served() {
    let (dir, manifest) = restore();
    let (store, _) = Store::open(&[dir.path().join("n2/d0")], StoreOptions::default()).expect("open");
    store.scan();
    for (replica, (size, _)) in objects(node(&manifest, "n2")) {
        let there = dir.path().join("n2/d0").join(replica.to_string()).exists();
        assert_eq!(store.exists(replica), there);
        assert_eq!(store.read(replica, 0, size as usize).await.is_ok(), there);
    }
}
