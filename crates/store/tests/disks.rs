//! Changing the disks of a running store, and the two layouts.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use sheepdog_buffer::PageBuf;
use sheepdog_proto::{Epoch, Oid, ResultCode, VdiId};
use sheepdog_store::{DigestOf, Layout, PlugError, Replica, Store, StoreError, StoreOptions, Unplugged};

const SIZE: u64 = 64 << 10;

fn object(index: u32) -> Replica {
    Replica::whole(Oid::data(VdiId::new(0x20609), index))
}

fn filled(len: usize, byte: u8) -> Bytes {
    let mut buf = PageBuf::zeroed(len);
    buf.fill(byte);
    buf.freeze()
}

struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Dir {
        Dir(tempfile::tempdir().expect("tempdir"))
    }

    fn disk(&self, i: u32) -> PathBuf {
        self.0.path().join(format!("d{i}"))
    }

    fn disks<const N: usize>(&self, which: [u32; N]) -> [PathBuf; N] {
        which.map(|i| self.disk(i))
    }

    fn options(&self) -> StoreOptions {
        let record = Some(self.0.path().join("removed_disks"));
        StoreOptions { removed_disks: record, epoch: Epoch(4), ..StoreOptions::default() }
    }

    fn open<const N: usize>(&self, which: [u32; N]) -> Store {
        let (store, _) = Store::open(&self.disks(which), self.options()).expect("open");
        store.scan();
        store
    }
}

async fn fill(store: &Store, count: u32) {
    for i in 0..count {
        store.create(object(i), SIZE, 0, filled(4096, i as u8 + 1)).await.expect("create");
    }
}

async fn assert_filled(store: &Store, count: u32) {
    for i in 0..count {
        let bytes = store.read(object(i), 0, 4097).await.expect("read");
        assert!(bytes[..4096].iter().all(|b| *b == i as u8 + 1) && bytes[4096] == 0, "object {i}");
    }
}

fn objects_in(dir: &Path) -> usize {
    let entries = fs::read_dir(dir).expect("disk");
    entries.filter(|e| e.as_ref().expect("entry").file_name().len() >= 16).count()
}

#[tokio::test]
async fn a_plugged_disk_gets_its_share_and_an_unplugged_one_gives_everything_away() {
    let dir = Dir::new();
    let store = dir.open([0]);
    fill(&store, 60).await;
    store.stash(object(59), Epoch(3)).await.expect("stash");
    let log = store.plug(&dir.disk(1)).expect("plug");
    assert!(log.contains("vdisk nr") && log.ends_with("total disk 2"), "{log}");
    assert_filled(&store, 59).await;
    let report = store.settle().await;
    assert!(report.moved > 10 && report.failed == 0, "{report:?}");
    assert_eq!(objects_in(&dir.disk(1)) + objects_in(&dir.disk(0)), 59);
    assert_filled(&store, 59).await;
    let info = store.md_info();
    assert_eq!(info.len(), 2);
    assert!(info.iter().all(|d| d.used > 0));

    assert_eq!(store.unplug(&dir.disk(0)), Ok(Unplugged::Leaving));
    assert_eq!((store.md_info().len(), store.disk_paths()), (1, vec![dir.disk(1)]));
    assert!(store.draining().is_some_and(|n| n > 10));
    assert!(store.release_drained(&[]).await.is_empty(), "not yet");
    assert_filled(&store, 59).await;
    let report = store.settle().await;
    assert_eq!(report.failed, 0);
    let released = store.release_drained(&report.stuck).await;
    assert_eq!(released.iter().map(|r| (r.path.clone(), r.lost)).collect::<Vec<_>>(), [(dir.disk(0), 0)]);
    assert_eq!((store.draining(), objects_in(&dir.disk(0)), objects_in(&dir.disk(1))), (None, 0, 59));
    assert_eq!(objects_in(&dir.disk(0).join(".stale")), 0);
    assert_filled(&store, 59).await;
    assert_eq!(store.read_stale(object(59), Epoch(3), 0, 1).await.expect("stale")[..], [60]);
    assert_eq!(store.unplug(&dir.disk(1)), Ok(Unplugged::Last));
    assert_filled(&store, 59).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_while_disks_come_and_go_are_never_lost() {
    let dir = Dir::new();
    let store = dir.open([0, 1]);
    let count = 24;
    fill(&store, count).await;
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..count)
        .map(|i| {
            let (store, stop) = (store.clone(), stop.clone());
            tokio::spawn(async move {
                let mut round = 0u32;
                while !stop.load(Ordering::Relaxed) {
                    round += 1;
                    let (at, byte) = (u64::from(round % 16) * 4096, (round % 251) as u8);
                    // The gateway would try again, too.
                    while let Err(e) = store.write(object(i), SIZE, at, filled(4096, byte)).await {
                        assert_eq!(e.result(), ResultCode::NETWORK_ERROR, "{e}");
                    }
                    let read = loop {
                        match store.read(object(i), at, 4096).await {
                            Ok(read) => break read,
                            Err(e) => assert_eq!(e.result(), ResultCode::NETWORK_ERROR, "{e}"),
                        }
                    };
                    assert!(read.iter().all(|b| *b == byte), "object {i}, round {round}");
                    assert!(store.exists(object(i)));
                    if round.is_multiple_of(7) {
                        while let Err(e) = store.create(object(i), SIZE, at, filled(4096, byte)).await {
                            assert_eq!(e.result(), ResultCode::NETWORK_ERROR, "{e}");
                        }
                    }
                }
                round
            })
        })
        .collect();
    for round in 0..12 {
        let (coming, going) = ((round + 2) % 3, round % 3);
        store.plug(&dir.disk(coming)).expect("plug");
        store.settle().await;
        store.unplug(&dir.disk(going)).expect("unplug");
        while store.draining().is_some() {
            let report = store.settle().await;
            assert_eq!(report.failed, 0);
            store.release_drained(&report.stuck).await;
        }
        assert_eq!(objects_in(&dir.disk(going)), 0, "round {round}");
    }
    stop.store(true, Ordering::Relaxed);
    let mut last = Vec::new();
    for writer in writers {
        last.push(writer.await.expect("writer"));
    }
    drop(store);
    let again = dir.open([0, 1]);
    assert_eq!(again.working().len(), count as usize);
    for (i, round) in last.into_iter().enumerate() {
        let at = u64::from(round % 16) * 4096;
        let bytes = again.read(object(i as u32), at, 4096).await.expect("read");
        assert!(bytes.iter().all(|b| *b == (round % 251) as u8), "object {i}");
    }
}

#[tokio::test]
async fn a_disk_that_was_being_drained_is_current_if_listed_and_old_later() {
    let dir = Dir::new();
    let store = dir.open([0, 1]);
    fill(&store, 40).await;
    store.unplug(&dir.disk(1)).expect("unplug");
    drop(store);
    // Stopped before anything was moved, and started with the same command line.
    let store = dir.open([0, 1]);
    assert!(!store.lacks_disk());
    assert_filled(&store, 40).await;
    store.unplug(&dir.disk(1)).expect("unplug");
    drop(store);
    // Started without it: what it held is missing, and old when it comes back.
    let store = dir.open([0]);
    assert!(store.lacks_disk());
    let there = store.working().len();
    assert!(there > 5 && there < 35, "{there}");
    drop(store);
    let store = dir.open([0, 1]);
    assert!(!store.lacks_disk());
    assert_eq!(store.working().len(), there);
    assert_eq!(objects_in(&dir.disk(1)), 0);
    assert_eq!(objects_in(&dir.disk(1).join(".stale")), 40 - there);
}

#[tokio::test]
async fn a_plugged_disk_that_is_not_listed_at_the_next_start_is_missed() {
    let dir = Dir::new();
    let store = dir.open([0]);
    store.plug(&dir.disk(1)).expect("plug");
    drop(store);
    assert!(!dir.open([0, 1]).lacks_disk());
    let store = dir.open([0]);
    assert!(!store.lacks_disk(), "the command line knew it meanwhile");
    store.plug(&dir.disk(1)).expect("plug");
    drop(store);
    assert!(dir.open([0]).lacks_disk());
}

#[tokio::test]
async fn plugging_empties_the_directory_but_keeps_its_recorded_size() {
    let dir = Dir::new();
    let store = dir.open([0]);
    let new = dir.disk(1);
    fs::create_dir_all(new.join("sub/dir")).expect("mkdir");
    fs::write(new.join("sub/dir/file"), "x").expect("write");
    fs::write(new.join(object(7).to_string()), "old").expect("write");
    xattr::set(&new, "user.md.size", &(160u64 << 20).to_le_bytes()).expect("xattr");
    let log = store.plug(&new).expect("plug");
    assert_eq!(log, format!("{}, vdisk nr 10, total disk 2", new.display()));
    let left: Vec<_> = fs::read_dir(&new).expect("dir").map(|e| e.expect("entry").file_name()).collect();
    assert_eq!(left, [".stale"]);
    assert!(!store.exists(object(7)));
    // A formerly removed disk is a new one after a plug.
    assert!(store.remove_disk(&new));
    store.plug(&new).expect("plug again");
    fill(&store, 200).await;
    let there = objects_in(&new);
    drop(store);
    let store = dir.open([0, 1]);
    assert_eq!((store.working().len(), objects_in(&new)), (200, there));
}

#[tokio::test]
async fn what_must_not_be_plugged_or_unplugged_is_refused_and_left_alone() {
    let dir = Dir::new();
    let meta = dir.0.path().canonicalize().expect("real").join("meta");
    fs::create_dir_all(meta.join("epoch")).expect("mkdir");
    fs::write(meta.join("config"), "").expect("config");
    let protected = vec![meta.clone(), meta.join("epoch")];
    let options = StoreOptions { protected, ..dir.options() };
    let (store, _) = Store::open(&dir.disks([0, 1]), options).expect("open");
    fill(&store, 20).await;
    let refused = |path: &Path| store.plug(path).expect_err("refused");
    assert_eq!(refused(&dir.disk(0)), PlugError::Duplicate(dir.disk(0)));
    assert_eq!(
        refused(&dir.disk(0).join("")).to_string(),
        format!("duplicate path {}", dir.disk(0).display())
    );
    assert_eq!(refused(&meta), PlugError::MetaStore(meta.clone()));
    assert!(matches!(refused(&meta.join("epoch")), PlugError::Overlap(..)));
    assert!(matches!(refused(dir.0.path()), PlugError::Overlap(..)));
    assert!(matches!(refused(&dir.disk(0).join("below")), PlugError::Overlap(..)));
    let link = dir.0.path().join("link");
    std::os::unix::fs::symlink(dir.disk(0), &link).expect("link");
    assert!(matches!(refused(&link), PlugError::Overlap(..)), "another name of a disk");
    assert!(matches!(refused(&dir.0.path().join("./d0")), PlugError::Overlap(..)));
    assert!(matches!(refused(Path::new("relative")), PlugError::Invalid(_)));
    assert!(matches!(refused(Path::new("/a\nb")), PlugError::Invalid(_)));
    let deep = refused(&dir.0.path().join("no/such"));
    assert!(deep.to_string().starts_with("can't mkdir for "), "{deep}");
    let nothing = store.unplug(&dir.disk(9)).expect_err("no disk");
    assert!(nothing.to_string().starts_with("invalid path "), "{nothing}");
    store.unplug(&dir.disk(1)).expect("unplug");
    assert_eq!(refused(&dir.disk(1)), PlugError::Duplicate(dir.disk(1)), "it still has objects");
    assert!(store.unplug(&dir.disk(1)).is_err());
    assert_filled(&store, 20).await;
    assert!(meta.join("epoch").is_dir());
}

#[tokio::test]
async fn there_are_at_most_64_disks() {
    let dir = Dir::new();
    let all: Vec<PathBuf> = (0..63).map(|i| dir.disk(i)).collect();
    let (store, _) = Store::open(&all, dir.options()).expect("open");
    store.plug(&dir.disk(63)).expect("the 64th");
    assert_eq!(store.plug(&dir.disk(64)), Err(PlugError::TooMany(dir.disk(64))));
    assert_eq!(store.md_info().len(), 64);
}

#[tokio::test]
async fn an_unreadable_file_stays_behind_and_is_counted_as_lost() {
    let dir = Dir::new();
    let store = dir.open([0, 1]);
    fill(&store, 40).await;
    let victim = (0..40).map(object).find(|r| dir.disk(1).join(r.to_string()).exists()).expect("one there");
    drop(store);
    let path = dir.disk(1).join(victim.to_string());
    let store = dir.open([0, 1]);
    fs::remove_file(&path).expect("remove");
    fs::create_dir(&path).expect("something that cannot be read");
    store.unplug(&dir.disk(1)).expect("unplug");
    let report = store.settle().await;
    assert_eq!((report.failed, report.stuck.len(), report.stuck[0].replica), (1, 1, victim));
    assert!(store.release_drained(&[]).await.is_empty());
    let released = store.release_drained(&report.stuck).await;
    assert_eq!((released[0].lost, store.draining()), (1, None));
    assert!(path.is_dir() && !store.exists(victim));
    assert!(matches!(store.read(victim, 0, 1).await, Err(StoreError::NoObject)));
    assert_eq!(store.working().len(), 39);
}

#[tokio::test]
async fn old_states_that_are_purged_meanwhile_are_not_counted_as_lost() {
    let dir = Dir::new();
    let store = dir.open([0, 1]);
    fill(&store, 40).await;
    for i in 0..40 {
        store.stash(object(i), Epoch(3)).await.expect("stash");
    }
    store.unplug(&dir.disk(0)).expect("unplug");
    // As if the purge had come that far and no further.
    for entry in fs::read_dir(dir.disk(0).join(".stale")).expect("old states") {
        fs::remove_file(entry.expect("entry").path()).expect("removed");
    }
    let report = store.settle().await;
    assert_eq!((report.failed, report.stuck.len()), (0, 0));
    let released = store.release_drained(&report.stuck).await;
    assert_eq!((released.len(), released[0].lost), (1, 0));
}

#[tokio::test]
async fn without_room_elsewhere_an_unplugged_disk_stays_in_use() {
    let dir = Dir::new();
    drop(dir.open([0, 1]));
    let (store, _) =
        Store::open(&dir.disks([0, 1]), StoreOptions { reserve: Some(0), ..dir.options() }).expect("open");
    store.scan();
    fill(&store, 40).await;
    drop(store);
    let options = StoreOptions { reserve: Some(u64::MAX), ..dir.options() };
    let (store, _) = Store::open(&dir.disks([0, 1]), options).expect("open");
    store.scan();
    store.unplug(&dir.disk(1)).expect("unplug");
    let report = store.settle().await;
    assert!(report.failed > 0 && report.stuck.is_empty(), "{report:?}");
    assert!(store.release_drained(&report.stuck).await.is_empty());
    assert_filled(&store, 40).await;
    store.write(object(3), SIZE, 0, filled(4096, 4)).await.expect("write");
    let all = objects_in(&dir.disk(0)) + objects_in(&dir.disk(1));
    assert_eq!(all, 40, "neither lost nor left half copied");
}

#[tokio::test]
async fn an_older_copy_on_another_disk_never_takes_the_place_of_the_current_one() {
    let dir = Dir::new();
    let store = dir.open([0, 1]);
    fill(&store, 40).await;
    let r = (0..40).map(object).find(|r| dir.disk(1).join(r.to_string()).exists()).expect("one there");
    drop(store);
    fs::write(dir.disk(0).join(r.to_string()), vec![9; SIZE as usize]).expect("an old copy");
    let store = dir.open([0, 1]);
    store.unplug(&dir.disk(1)).expect("unplug");
    let report = store.settle().await;
    assert_eq!(report.failed, 0);
    assert_eq!(store.release_drained(&report.stuck).await.len(), 1);
    assert_filled(&store, 40).await;
    drop(store);
    assert_filled(&dir.open([0]), 40).await;
}

#[tokio::test]
async fn a_disk_whose_directory_became_something_else_has_failed() {
    let dir = Dir::new();
    let store = dir.open([0, 1]);
    fill(&store, 40).await;
    fs::rename(dir.disk(1), dir.0.path().join("away")).expect("rename");
    fs::write(dir.disk(1), "").expect("a file");
    let mut failed = 0;
    for i in 0..40 {
        failed += u32::from(matches!(
            store.hash(object(i), SIZE, None, DigestOf::All).await,
            Err(StoreError::DiskFailed { .. })
        ));
    }
    assert_eq!((failed, store.disk_paths()), (1, vec![dir.disk(0)]));
}

#[tokio::test]
async fn a_format_chooses_the_layout_and_flat_objects_of_a_tree_are_moved_into_it() {
    let dir = Dir::new();
    let store = dir.open([0]);
    fill(&store, 3).await;
    store.format(Layout::Tree).await.expect("format");
    assert_eq!((store.layout(), store.working().len()), (Layout::Tree, 0));
    fill(&store, 3).await;
    // Directories of a layout that is gone owe no sync to anybody.
    store.remove(object(0)).await.expect("remove");
    store.format(Layout::Plain).await.expect("format");
    store.sync_dirs().await.expect("sync");
    store.format(Layout::Tree).await.expect("format");
    fill(&store, 3).await;
    let inode = Replica::whole(Oid::inode(VdiId::new(0x20609)));
    store.create(inode, SIZE, 0, filled(4096, 1)).await.expect("create");
    let (disk, name) = (dir.disk(0), object(1).to_string());
    assert!(disk.join("09").join(&name).is_file() && disk.join("meta").join(inode.to_string()).is_file());
    drop(store);
    fs::rename(disk.join("09").join(&name), disk.join(&name)).expect("flat");
    fs::write(disk.join(object(2).to_string()), "flat, but there is one in its place").expect("write");
    fs::write(disk.join("007c2b2500000000.tmp"), "").expect("write");
    let tree = StoreOptions { layout: Layout::Tree, ..dir.options() };
    let (store, _) = Store::open(&dir.disks([0]), tree.clone()).expect("open");
    let report = store.scan();
    assert_eq!((report.adopted, report.working, report.temporaries), (1, 4, 1));
    assert_eq!(report.foreign, [disk.join(object(2).to_string())]);
    assert_filled(&store, 3).await;
    assert!(disk.join("09").join(&name).is_file() && !disk.join(&name).exists());

    // A plugged disk has the same layout; the objects move there.
    store.plug(&dir.disk(1)).expect("plug");
    store.unplug(&disk).expect("unplug");
    let report = store.settle().await;
    assert_eq!((report.moved, store.release_drained(&report.stuck).await.len()), (4, 1));
    assert!(dir.disk(1).join("09").join(&name).is_file());
    store.set_layout(Layout::Plain).await.expect("plain");
    assert!(dir.disk(1).join(&name).is_file());
    assert_filled(&store, 3).await;
}

#[tokio::test]
async fn flat_objects_of_a_returning_removed_tree_disk_are_old_too() {
    let dir = Dir::new();
    let tree = StoreOptions { layout: Layout::Tree, ..dir.options() };
    let (store, _) = Store::open(&dir.disks([0, 1]), tree.clone()).expect("open");
    assert!(store.remove_disk(&dir.disk(1)));
    drop(store);
    fs::write(dir.disk(1).join(object(1).to_string()), "old").expect("write");
    let (store, _) = Store::open(&dir.disks([0, 1]), tree).expect("open");
    store.scan();
    assert!(!store.exists(object(1)));
    assert!(dir.disk(1).join(".stale").join(format!("{}.4", object(1))).is_file());
}
