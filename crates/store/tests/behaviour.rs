//! What the store promises: results, atomicity, crash left-overs, faults of objects and of disks.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use sheepdog_buffer::PageBuf;
use sheepdog_proto::{Epoch, Oid, ResultCode, VdiId};
use sheepdog_store::{
    DigestOf, DiskFailure, Layout, Replica, Store, StoreError, StoreOptions, SyncMode, WriteHook,
};

const SIZE: u64 = 1 << 20;

fn data_object(index: u32) -> Replica {
    Replica::whole(Oid::data(VdiId::new(0x20609), index))
}

fn filled(len: usize, byte: u8) -> Bytes {
    let mut buf = PageBuf::zeroed(len);
    buf.fill(byte);
    buf.freeze()
}

fn open(disks: &[PathBuf], options: StoreOptions) -> Store {
    let (store, _) = Store::open(disks, options).expect("open");
    store.scan();
    store
}

struct Dir {
    root: tempfile::TempDir,
}

impl Dir {
    fn new() -> Dir {
        Dir { root: tempfile::tempdir().expect("tempdir") }
    }
    fn disk(&self, i: u32) -> PathBuf {
        self.root.path().join(format!("d{i}"))
    }
    fn open(&self) -> Store {
        open(&[self.disk(0)], StoreOptions::default())
    }
}

async fn content(store: &Store, replica: Replica) -> Vec<u8> {
    store.read(replica, 0, SIZE as usize).await.expect("read").to_vec()
}

#[tokio::test]
async fn absent_objects_give_no_obj_and_ranges_past_the_end_are_refused() {
    let dir = Dir::new();
    let store = dir.open();
    let r = data_object(1);
    let absent = [
        store.write(r, SIZE, 0, filled(4096, 1)).await.expect_err("write"),
        store.read(r, 0, 4096).await.expect_err("read"),
        store.remove(r).await.expect_err("remove"),
        store.stash(r, Epoch(1)).await.expect_err("stash"),
        store.hash(r, SIZE, None, DigestOf::All).await.expect_err("hash"),
        store.hash(r, SIZE, Some(Epoch(0)), DigestOf::All).await.expect_err("hash of epoch 0"),
        store.read_stale(r, Epoch(0), 0, 10).await.expect_err("stale read"),
    ];
    assert!(absent.iter().all(|e| e.result() == ResultCode::NO_OBJ), "{absent:?}");
    assert!(!store.exists(r) && !store.link_stale(r, Epoch(1)).await.expect("link"));
    store.create(r, SIZE, 0, filled(4096, 1)).await.expect("create");
    for (offset, len) in [(SIZE, 1), (SIZE - 4095, 4096), (u64::MAX, 2), (u64::MAX - 1, 4096)] {
        for result in [
            store.write(r, SIZE, offset, filled(len, 1)).await,
            store.create(r, SIZE, offset, filled(len, 1)).await,
        ] {
            assert_eq!(result.expect_err("past the end").result(), ResultCode::INVALID_PARMS);
        }
    }
    assert_eq!(std::fs::metadata(dir.disk(0).join(r.to_string())).expect("stat").len(), SIZE);
}

#[tokio::test]
async fn files_have_their_full_size_and_are_sparse_or_not_by_kind() {
    let dir = Dir::new();
    let store = dir.open();
    let (data, inode) = (data_object(1), Replica::whole(Oid::inode(VdiId::new(7))));
    store.create(data, SIZE, 8192, filled(100, 1)).await.expect("create");
    store.create(inode, SIZE + 568, 0, filled(4096, 1)).await.expect("create");
    let stat = |r: Replica| std::fs::metadata(dir.disk(0).join(r.to_string())).expect("stat");
    assert_eq!((stat(data).len(), stat(inode).len()), (SIZE, SIZE + 568));
    assert!(stat(data).blocks() * 512 >= SIZE, "preallocated");
    assert_eq!(stat(inode).blocks() * 512, 4096);
    // A whole inode full of data, then rewritten with mostly zeros: the zeros are holes again.
    store.write(inode, SIZE + 568, 0, filled(SIZE as usize + 568, 3)).await.expect("fill");
    assert!(stat(inode).blocks() * 512 > SIZE);
    let mut mostly_zero = PageBuf::zeroed(SIZE as usize + 568);
    mostly_zero[5000] = 1;
    store.write(inode, SIZE + 568, 0, mostly_zero.freeze()).await.expect("clear");
    assert_eq!(stat(inode).blocks() * 512, 4096);
    assert_eq!(stat(inode).len(), SIZE + 568);
    let bytes = store.read(inode, 0, SIZE as usize + 568).await.expect("read");
    assert_eq!(bytes.iter().position(|b| *b != 0), Some(5000));
    let used: u64 = [data, inode].map(|r| stat(r).blocks() * 512).iter().sum();
    assert_eq!(store.space().used, used);
    assert_eq!(store.md_info()[0].used, used);
}

#[tokio::test]
async fn a_short_file_reads_as_zeros_and_not_as_somebody_elses_memory() {
    let dir = Dir::new();
    let store = dir.open();
    let r = data_object(3);
    std::fs::write(dir.disk(0).join(r.to_string()), b"short").expect("write");
    store.scan();
    // Leave something in the buffer pool.
    drop(filled(65_536, 0xaa));
    let bytes = store.read(r, 0, 65_536).await.expect("read");
    assert!(bytes.starts_with(b"short") && bytes[5..].iter().all(|b| *b == 0));
    assert!(store.read(r, 1 << 30, 10).await.expect("read").iter().all(|b| *b == 0));
    // A write past the end makes the file longer, durably also in the block map's eyes.
    store.write(r, SIZE, 8192, filled(4096, 9)).await.expect("write");
    let bytes = content(&store, r).await;
    assert!(bytes[5..8192].iter().all(|b| *b == 0) && bytes[8192..12_288].iter().all(|b| *b == 9));
}

#[tokio::test]
async fn a_create_replaces_and_a_create_if_absent_does_not() {
    let dir = Dir::new();
    let store = dir.open();
    let r = data_object(1);
    store.create(r, SIZE, 0, filled(SIZE as usize, 1)).await.expect("create");
    store.write(r, SIZE, 0, filled(4096, 5)).await.expect("write");
    assert!(!store.create_if_absent(r, SIZE, 0, filled(4096, 2)).await.expect("create"));
    assert_eq!(content(&store, r).await[..4097], [&[5; 4096][..], &[1]].concat());
    store.create(r, SIZE, 4096, filled(4096, 3)).await.expect("create");
    let bytes = content(&store, r).await;
    assert!(bytes[..4096].iter().chain(&bytes[8192..]).all(|b| *b == 0), "not covered means zero");
    assert!(bytes[4096..8192].iter().all(|b| *b == 3));
    store.remove(r).await.expect("remove");
    assert!(store.create_if_absent(r, SIZE, 0, filled(4096, 2)).await.expect("create"));
    assert_eq!(std::fs::read_dir(dir.disk(0)).expect("dir").count(), 2, "the object and .stale");
}

#[tokio::test]
async fn a_left_over_temporary_neither_blocks_a_create_nor_survives_a_scan() {
    let dir = Dir::new();
    let store = dir.open();
    let r = data_object(1);
    let names = [format!("{r}.tmp"), format!("{r}.12-1.tmp"), format!("{}_3.tmp", data_object(2))];
    for name in &names {
        std::fs::write(dir.disk(0).join(name), b"half").expect("write");
    }
    std::fs::write(dir.disk(0).join(".stale").join("note.tmp"), b"x").expect("write");
    store.create(r, SIZE, 0, filled(4096, 1)).await.expect("create");
    assert_eq!(content(&store, r).await[0], 1);
    let report = store.scan();
    assert_eq!((report.temporaries, report.working), (3, 1));
    assert!(names.iter().all(|n| !dir.disk(0).join(n).exists()));
}

#[tokio::test]
async fn foreign_names_are_ignored_and_reported_and_one_bad_file_hurts_only_itself() {
    let dir = Dir::new();
    let store = dir.open();
    let (good, directory, loop_link) = (data_object(1), data_object(2), data_object(3));
    store.create(good, SIZE, 0, filled(4096, 1)).await.expect("create");
    let path = |name: &str| dir.disk(0).join(name);
    for name in ["backup", "ba", "0002060900000004x", "00020609000000FF", "lost+found"] {
        std::fs::write(path(name), b"").expect("write");
    }
    for name in ["01", &directory.to_string()] {
        std::fs::create_dir(path(name)).expect("mkdir");
    }
    std::os::unix::fs::symlink(path(&loop_link.to_string()), path(&loop_link.to_string())).expect("symlink");
    let inode = Oid::inode(VdiId::new(9));
    std::fs::write(path(&inode.to_string()), b"x").expect("a truncated inode");
    let report = store.scan();
    assert_eq!((report.working, report.foreign.len()), (2, 8), "{:?}", report.foreign);
    assert_eq!(report.inodes.len(), 1);
    assert_eq!(store.list(), [good.oid, inode]);
    for bad in [directory, loop_link] {
        for _ in 0..10 {
            let error = store.read(bad, 0, 4096).await.expect_err("not a file");
            assert_eq!(error.result(), ResultCode::EIO, "{error}");
        }
        store.create(bad, SIZE, 0, filled(10, 1)).await.err();
    }
    assert_eq!(content(&store, good).await[0], 1);
    assert_eq!(store.disk_paths(), [dir.disk(0)], "the disk stays");
}

#[tokio::test]
async fn a_vanished_disk_is_reported_once_and_the_other_one_goes_on() {
    let dir = Dir::new();
    let failures: Arc<Mutex<Vec<DiskFailure>>> = Arc::default();
    let sink = failures.clone();
    let record = dir.root.path().join("removed");
    let options = StoreOptions {
        on_disk_failure: Some(Arc::new(move |f| sink.lock().expect("lock").push(f))),
        removed_disks: Some(record.clone()),
        epoch: Epoch(4),
        ..StoreOptions::default()
    };
    let disks = [dir.disk(0), dir.disk(1)];
    let store = open(&disks, options.clone());
    let all: Vec<Replica> = (0..60).map(data_object).collect();
    for r in &all {
        store.create(*r, 65_536, 0, filled(4096, 1)).await.expect("create");
    }
    let on = |i: u32, r: &Replica| dir.disk(i).join(r.to_string()).exists();
    let (gone, kept): (Vec<&Replica>, Vec<&Replica>) = all.iter().partition(|r| on(1, r));
    assert!(!gone.is_empty() && !kept.is_empty());
    std::fs::rename(dir.disk(1), dir.root.path().join("away")).expect("rename");
    let mut codes = Vec::new();
    for r in &gone {
        codes.push(store.create(**r, 65_536, 0, filled(4096, 2)).await.map_err(|e| e.result()));
    }
    assert_eq!(codes[0], Err(ResultCode::NETWORK_ERROR), "the requester shall try again");
    assert!(codes[1..].iter().all(Result::is_ok), "and then finds the other disk");
    assert_eq!(*failures.lock().expect("lock"), [DiskFailure { path: dir.disk(1), last: false }]);
    for r in &kept {
        assert_eq!(store.read(**r, 0, 1).await.expect("read")[..], [1]);
    }
    drop(store);

    // The disk comes back with its old files: they must not be served as current.
    std::fs::rename(dir.root.path().join("away"), dir.disk(1)).expect("rename");
    let (store, log) = Store::open(&disks, options).expect("open");
    store.scan();
    assert!(log.iter().any(|l| l.contains("was removed before")), "{log:?}");
    for r in &gone[1..] {
        assert_eq!(store.read(**r, 0, 1).await.expect("read")[..], [2]);
        assert_eq!(store.stale_epochs(**r), [Epoch(4)]);
    }
    assert_eq!(std::fs::read_to_string(record).expect("record"), "");
}

#[tokio::test]
async fn the_last_disk_gone_means_eio() {
    let dir = Dir::new();
    let store = dir.open();
    store.create(data_object(1), SIZE, 0, filled(10, 1)).await.expect("create");
    assert!(store.remove_disk(&dir.disk(0)) && !store.remove_disk(&dir.disk(0)));
    let r = data_object(1);
    for error in [
        store.read(r, 0, 1).await.expect_err("no disk"),
        store.create(r, SIZE, 0, filled(1, 1)).await.expect_err("no disk"),
        store.write(r, SIZE, 0, filled(1, 1)).await.expect_err("no disk"),
        store.remove(r).await.expect_err("no disk"),
    ] {
        assert_eq!(error.result(), ResultCode::EIO, "{error}");
    }
    assert!(store.list().is_empty() && store.try_read_cached(r, 0, 1).is_none());
}

#[test]
fn disks_that_cannot_be_used_are_named_and_left_out() {
    let dir = Dir::new();
    std::fs::write(dir.disk(1), b"a file").expect("write");
    let mut slash = dir.disk(0).into_os_string();
    slash.push("//");
    let disks = [dir.disk(0), slash.into(), dir.disk(1), "relative".into(), dir.root.path().join("a/b")];
    let (store, log) = Store::open(&disks, StoreOptions::default()).expect("one is good");
    let shown = |p: &Path| p.display().to_string();
    assert!(
        log[0].starts_with(&format!("{}, vdisk nr ", shown(&dir.disk(0))))
            && log[0].ends_with(", total disk 1")
    );
    assert_eq!(log[1], format!("duplicate path {}", shown(&dir.disk(0))));
    assert_eq!(log[2], format!("can't mkdir for {}, File exists", shown(&dir.disk(1))));
    assert!(log[3].contains("not absolute"));
    assert!(log[4].starts_with("can't mkdir for ") && log[4].ends_with(", No such file or directory"));
    assert_eq!(store.disk_paths(), [dir.disk(0)]);
    let error = Store::open(&disks[2..], StoreOptions::default()).err().expect("none is good");
    assert!(error.to_string().ends_with("There isn't any available disk!"));
    let size = xattr::get(dir.disk(0), "user.md.size").expect("get").expect("set");
    assert_eq!(size, store.disk_sizes_sum().to_le_bytes());
    let mode = std::fs::metadata(dir.disk(0)).expect("stat").permissions().mode();
    assert_eq!(mode & 0o007, 0);
}

#[tokio::test]
async fn old_states_are_kept_linked_and_purged_by_epoch() {
    let dir = Dir::new();
    let store = dir.open();
    let (a, strip) = (data_object(1), Replica::strip(Oid::data(VdiId::new(5), 0), 2));
    for epoch in [3, 5] {
        store.create(a, SIZE, 0, filled(4096, epoch as u8)).await.expect("create");
        store.stash(a, Epoch(epoch)).await.expect("stash");
    }
    store.create(strip, SIZE, 0, filled(4096, 1)).await.expect("create");
    std::fs::write(dir.disk(0).join(format!("{a}.99-9.tmp")), b"half").expect("write");
    assert_eq!(store.stash_all(Epoch(6)).await.expect("stash"), 1);
    assert_eq!(std::fs::read_dir(dir.disk(0)).expect("dir").count(), 1, "only .stale");
    assert!(dir.disk(0).join(".stale").join(format!("{strip}.6")).exists());
    assert!(store.working().is_empty());
    assert_eq!(store.list(), [strip.oid, a.oid]);
    assert_eq!(store.stale_epochs(a), [Epoch(3), Epoch(5)]);
    let of_4 = store.read_stale(a, Epoch(4), 0, 1).await.expect("read");
    assert_eq!(of_4[..], [5], "what it had at the end of 4 was moved away after 5");
    let of_6 = store.read_stale(a, Epoch(6), 0, 1).await;
    assert!(matches!(of_6, Err(StoreError::NoObject)), "an older state will not do: {of_6:?}");
    assert_eq!(store.read_stale(a, Epoch(3), 0, 1).await.expect("read")[..], [3]);
    assert!(store.link_stale(a, Epoch(5)).await.expect("link"));
    assert!(store.link_stale(a, Epoch(3)).await.expect("exists already"));
    assert_eq!(content(&store, a).await[0], 5);
    let of_working = store.hash(a, SIZE, Some(Epoch(3)), DigestOf::All).await.expect("hash");
    store.remove(a).await.expect("remove");
    assert_ne!(store.hash(a, SIZE, Some(Epoch(3)), DigestOf::All).await.expect("stale"), of_working);
    assert_eq!(store.hash(a, SIZE, Some(Epoch(5)), DigestOf::All).await.expect("stale"), of_working);
    assert_eq!(store.purge_stale(Epoch(5)).await.expect("purge"), 2);
    assert_eq!(store.list(), [strip.oid]);
    store.sync_dirs().await.expect("sync");
    let store = dir.open();
    assert_eq!(store.stale_epochs(strip), [Epoch(6)]);
    store.format(Layout::Plain).await.expect("format");
    assert!(store.list().is_empty() && store.space().used == 0);
    assert_eq!(std::fs::read_dir(dir.disk(0)).expect("dir").count(), 1);
    store.create(a, SIZE, 0, filled(4096, 1)).await.expect("usable");
}

#[tokio::test]
async fn a_full_reserve_refuses_creates_but_not_writes() {
    let dir = Dir::new();
    let r = data_object(1);
    dir.open().create(r, SIZE, 0, filled(4096, 1)).await.expect("create");
    let store = open(&[dir.disk(0)], StoreOptions { reserve: Some(u64::MAX), ..StoreOptions::default() });
    let error = store.create(data_object(2), SIZE, 0, filled(4096, 1)).await.expect_err("reserved");
    assert_eq!(error.result(), ResultCode::NO_SPACE);
    store.write(r, SIZE, 0, filled(4096, 2)).await.expect("write");
    store.remove(r).await.expect("remove");
}

#[tokio::test]
async fn many_writers_are_all_stored_and_a_drain_sees_them_through() {
    let dir = Dir::new();
    for sync in [SyncMode::Durable, SyncMode::NoSync] {
        let store = open(&[dir.disk(0)], StoreOptions { sync, ..StoreOptions::default() });
        let r = data_object(1);
        store.create(r, SIZE, 0, filled(1, 1)).await.expect("create");
        let results: Arc<Mutex<Vec<bool>>> = Arc::default();
        for i in 0..256 {
            let results = results.clone();
            let done =
                Box::new(move |r: Result<(), StoreError>| results.lock().expect("lock").push(r.is_ok()));
            store.write_with(r, SIZE, i * 4096, filled(4096, i as u8), done);
        }
        // Larger than the rest and overlapping it: last in order, on another thread.
        let big = Box::new(|r: Result<(), StoreError>| r.expect("big write"));
        store.write_with(r, SIZE, 0, filled(300 << 10, 0xee), big);
        store.drain().await;
        assert_eq!(*results.lock().expect("lock"), [true; 256]);
        let bytes = content(&store, r).await;
        for (i, block) in bytes.chunks(4096).enumerate() {
            let wanted = if i < 75 { 0xee } else { i as u8 };
            assert!(block.iter().all(|b| *b == wanted), "block {i}");
        }
        let cached = store.try_read_cached(r, 0, 4096).map(|r| r.expect("read"));
        assert!(cached.is_none_or(|b| b.iter().all(|b| *b == 0xee)));
        store.flush().await.expect("flush");
    }
}

#[tokio::test]
async fn a_file_removed_or_replaced_by_hand_is_noticed() {
    let dir = Dir::new();
    let store = dir.open();
    let r = data_object(1);
    store.create(r, SIZE, 0, filled(4096, 1)).await.expect("create");
    assert_eq!(content(&store, r).await[0], 1);
    let path = dir.disk(0).join(r.to_string());
    std::fs::write(dir.root.path().join("new"), vec![7; SIZE as usize]).expect("write");
    std::fs::rename(dir.root.path().join("new"), &path).expect("rename");
    assert_eq!(content(&store, r).await[0], 7);
    std::fs::remove_file(&path).expect("remove");
    assert!(store.try_read_cached(r, 0, 4096).is_none());
    assert!(matches!(store.write(r, SIZE, 0, filled(4096, 2)).await, Err(StoreError::NoObject)));
}

struct Recorder(Mutex<Vec<String>>);

impl WriteHook for Recorder {
    fn before_write(&self, r: Replica, create: bool, offset: u64, data: &[u8]) -> std::io::Result<()> {
        if data[0] == 13 {
            return Err(std::io::Error::other("refused"));
        }
        self.0.lock().expect("lock").push(format!("{r} {create} {offset} {}", data.len()));
        Ok(())
    }
    fn before_remove(&self, r: Replica) -> std::io::Result<()> {
        self.0.lock().expect("lock").push(format!("{r} remove"));
        Ok(())
    }
}

#[tokio::test]
async fn the_hook_sees_every_change_before_it_happens_in_the_tree_layout() {
    let dir = Dir::new();
    let hook = Arc::new(Recorder(Mutex::default()));
    let options =
        StoreOptions { write_hook: Some(hook.clone()), layout: Layout::Tree, ..StoreOptions::default() };
    let store = open(&[dir.disk(0)], options.clone());
    let r = data_object(1);
    store.create(r, SIZE, 0, filled(10, 1)).await.expect("create");
    store.write(r, SIZE, 5, filled(20, 1)).await.expect("write");
    assert!(store.write(r, SIZE, 5, filled(20, 13)).await.is_err());
    assert!(dir.disk(0).join("09").join(r.to_string()).is_file());
    let again = open(&[dir.disk(0)], options);
    assert_eq!(again.working(), [r]);
    store.remove(r).await.expect("remove");
    let seen = hook.0.lock().expect("lock").clone();
    assert_eq!(seen, [format!("{r} true 0 10"), format!("{r} false 5 20"), format!("{r} remove")]);
}

#[tokio::test]
async fn a_file_system_without_extent_maps_works_too() {
    let Ok(root) = tempfile::tempdir_in("/dev/shm") else { return };
    let disk = root.path().join("d0");
    // Old kernels have no user attributes there: such a disk is refused.
    let Ok((store, _)) = Store::open(&[disk], StoreOptions::default()) else { return };
    store.scan();
    for r in [data_object(1), Replica::whole(Oid::inode(VdiId::new(1)))] {
        store.create(r, SIZE, 0, filled(4096, 1)).await.expect("create");
        store.write(r, SIZE, 100, filled(8192, 2)).await.expect("write");
        store.write(r, SIZE, 65_536, filled(500_000, 3)).await.expect("write");
        let bytes = content(&store, r).await;
        let wanted = [&[1; 100][..], &[2; 8192], &[0; 65_536 - 8292], &[3; 500_000]].concat();
        assert!(bytes.starts_with(&wanted) && bytes[wanted.len()..].iter().all(|b| *b == 0));
    }
}

/// A linked working file shares its inode with the stale one, so an open handle of it never shows as unlinked.
#[tokio::test]
async fn no_handle_of_a_linked_file_outlives_its_working_name() {
    let dir = Dir::new();
    let store = dir.open();
    let r = data_object(1);
    store.create(r, SIZE, 0, filled(4096, 1)).await.expect("create");
    store.stash(r, Epoch(2)).await.expect("stash");
    let relink = async || {
        assert!(store.link_stale(r, Epoch(2)).await.expect("link"));
        assert_eq!(content(&store, r).await[0], 1);
    };
    relink().await;
    store.create(r, SIZE, 0, filled(4096, 2)).await.expect("create");
    assert_eq!(content(&store, r).await[0], 2);
    store.write(r, SIZE, 0, filled(4096, 3)).await.expect("write");
    assert_eq!(store.read_stale(r, Epoch(2), 0, 1).await.expect("stale")[..], [1]);
    store.remove(r).await.expect("remove");
    relink().await;
    store.remove(r).await.expect("remove");
    assert!(matches!(store.read(r, 0, 1).await, Err(StoreError::NoObject)));
    assert!(store.try_read_cached(r, 0, 1).is_none());
    relink().await;
    // The same inode under both names: the working one must go all the same.
    store.stash(r, Epoch(2)).await.expect("stash");
    assert!(!store.exists(r) && store.working().is_empty());
    assert!(matches!(store.write(r, SIZE, 0, filled(4096, 9)).await, Err(StoreError::NoObject)));
    assert_eq!(store.read_stale(r, Epoch(2), 0, 1).await.expect("stale")[..], [1]);
}

#[tokio::test]
async fn a_digest_of_blocks_tells_contents_apart_and_not_holes_from_zeros() {
    let dir = Dir::new();
    let (store, size) = (dir.open(), 12 << 20);
    // Of inodes only what is not zero is stored.
    let inode = |vid: u32| Replica::whole(Oid::inode(VdiId::new(vid)));
    let digest = |replica| store.hash(replica, size, None, DigestOf::Blocks);
    for vid in 1..=4 {
        store.create(inode(vid), size, 4096, Bytes::from(vec![1; 512])).await.expect("create");
    }
    store.write(inode(2), size, 8 << 20, Bytes::from(vec![0; 8192])).await.expect("zeros");
    store.write(inode(3), size, 8 << 20, Bytes::from(vec![2; 512])).await.expect("write");
    store.write(inode(4), size, (8 << 20) + 4096, Bytes::from(vec![2; 512])).await.expect("write");
    let first = digest(inode(1)).await.expect("digest");
    assert_eq!(digest(inode(2)).await.expect("digest"), first);
    let (third, fourth) = (digest(inode(3)).await.expect("digest"), digest(inode(4)).await.expect("digest"));
    assert!(third != first && fourth != first && third != fourth);
}
