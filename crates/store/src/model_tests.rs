//! Random histories against a model, and the block maps against what the file system itself says.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};
use proptest::prelude::*;
use sheepdog_buffer::PageBuf;
use sheepdog_proto::{Epoch, Oid, VdiId};

use crate::blockmap::BlockMap;
use crate::object::OpenObject;
use crate::trim::BLOCK;
use crate::{Replica, Store, StoreError, StoreOptions, SyncMode};

/// Whether all of a block lies in what the file system calls data; written without FIEMAP on purpose. Unwritten
/// extents count as holes once nothing is dirty.
fn is_data(file: &File, block: u64) -> bool {
    let start = (block * BLOCK) as i64;
    let len = file.metadata().expect("stat").len() as i64;
    let end = (start + BLOCK as i64).min(len);
    lseek(file, start, Whence::SeekData) == Ok(start)
        && lseek(file, start, Whence::SeekHole).is_ok_and(|hole| hole >= end)
}

fn assert_map_is_honest(file: &File, map: &BlockMap) {
    for block in map.mapped_blocks() {
        assert!(is_data(file, block), "block {block} is not mapped");
    }
}

#[derive(Debug, Clone)]
enum FileOp {
    Write(u64, u64),
    Allocate(u64, u64),
    Punch(u64, u64),
    Sync,
}

fn file_op() -> impl Strategy<Value = FileOp> {
    let range = || (0u64..200_000, 1u64..40_000);
    prop_oneof![
        3 => range().prop_map(|(o, l)| FileOp::Write(o, l)),
        1 => range().prop_map(|(o, l)| FileOp::Allocate(o, l)),
        1 => range().prop_map(|(o, l)| FileOp::Punch(o, l)),
        1 => Just(FileOp::Sync),
    ]
}

fn apply(file: &File, op: &FileOp) -> io::Result<()> {
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match *op {
        FileOp::Write(o, l) => file.write_all_at(&vec![7; l as usize], o),
        FileOp::Allocate(o, l) => {
            fallocate(file, FallocateFlags::empty(), o as i64, l as i64).map_err(Into::into)
        }
        FileOp::Punch(o, l) => fallocate(file, punch, o as i64, l as i64).map_err(Into::into),
        FileOp::Sync => file.sync_all(),
    }
}

/// Histories depend on timing too: a seed in a file would not repeat a failure.
fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) }
}

proptest! {
    #![proptest_config(config(60))]
    #[test]
    fn a_seeded_map_never_claims_a_block_that_is_not_mapped(ops in proptest::collection::vec(file_op(), 1..25)) {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("file");
        let file = File::create_new(&path).expect("create");
        for op in &ops {
            apply(&file, op).expect("apply");
        }
        let object = OpenObject::open(&path).expect("open");
        let mut map = None;
        if object.seed_map(&mut map).is_ok() {
            assert_map_is_honest(&object.file, &map.expect("seeded"));
        }
    }
}

/// Object files of the test are this long: not a multiple of a block, several fill units.
const SIZE: u64 = 5 * 65_536 + 568;

#[derive(Debug, Clone)]
struct Piece {
    offset: u64,
    len: u64,
    fill: u8,
    aligned: bool,
}

impl Piece {
    fn data(&self) -> Bytes {
        let mut buf = PageBuf::zeroed(self.len as usize);
        buf.fill(self.fill);
        // Every third one is zero at its start, for trimming.
        if self.fill.is_multiple_of(3) {
            let half = buf.len() / 2;
            buf[..half].fill(0);
        }
        buf.freeze()
    }
}

fn piece() -> impl Strategy<Value = Piece> {
    (0..SIZE, 1u64..150_000, 0u8..10, any::<bool>()).prop_map(|(offset, len, fill, aligned)| {
        let unit = if aligned { BLOCK } else { 1 };
        let offset = offset / unit * unit;
        let len = len.next_multiple_of(unit).min((SIZE - offset) / unit * unit);
        let (offset, len) = if len == 0 { (0, BLOCK) } else { (offset, len) };
        Piece { offset, len, fill, aligned }
    })
}

#[derive(Debug, Clone)]
enum Op {
    Create(usize, Piece),
    CreateIfAbsent(usize, Piece),
    /// Submitted together; must take effect in this order.
    Writes(Vec<(usize, Piece)>),
    Read(usize, u64, u64),
    Remove(usize),
    Stash(usize),
    Link(usize),
    Reopen,
}

fn op() -> impl Strategy<Value = Op> {
    let object = || 0usize..4;
    prop_oneof![
        3 => (object(), piece()).prop_map(|(o, p)| Op::Create(o, p)),
        1 => (object(), piece()).prop_map(|(o, p)| Op::CreateIfAbsent(o, p)),
        10 => proptest::collection::vec((object(), piece()), 1..12).prop_map(Op::Writes),
        4 => (object(), 0..SIZE, 1u64..200_000).prop_map(|(o, s, l)| Op::Read(o, s, l)),
        1 => object().prop_map(Op::Remove),
        1 => object().prop_map(Op::Stash),
        1 => object().prop_map(Op::Link),
        1 => Just(Op::Reopen),
    ]
}

/// Two data objects, an inode, and a strip.
fn replica(i: usize) -> Replica {
    let vid = VdiId::new(0x123456);
    match i {
        0 => Replica::whole(Oid::data(vid, 0)),
        1 => Replica::whole(Oid::data(vid, 1)),
        2 => Replica::whole(Oid::inode(vid)),
        _ => Replica::strip(Oid::data(vid, 3), 2),
    }
}

struct World {
    store: Store,
    disks: Vec<PathBuf>,
    options: StoreOptions,
    working: BTreeMap<usize, Vec<u8>>,
    stale: BTreeMap<usize, Vec<u8>>,
    /// Linked objects share their file with the stale one, as in the original.
    linked: BTreeMap<usize, bool>,
}

const EPOCH: Epoch = Epoch(3);

impl World {
    fn new(root: &Path, options: StoreOptions) -> World {
        let disks = vec![root.join("d0"), root.join("d1")];
        let (store, _) = Store::open(&disks, options.clone()).expect("open");
        store.scan();
        let (working, stale, linked) = Default::default();
        World { store, disks, options, working, stale, linked }
    }

    fn put(content: &mut [u8], piece: &Piece) {
        content[piece.offset as usize..(piece.offset + piece.len) as usize].copy_from_slice(&piece.data());
    }

    fn fresh(piece: &Piece) -> Vec<u8> {
        let mut content = vec![0; SIZE as usize];
        Self::put(&mut content, piece);
        content
    }

    async fn step(&mut self, op: Op) {
        match op {
            Op::Create(i, p) => {
                self.store.create(replica(i), SIZE, p.offset, p.data()).await.expect("create");
                self.working.insert(i, Self::fresh(&p));
                self.linked.remove(&i);
            }
            Op::CreateIfAbsent(i, p) => {
                let made = self.store.create_if_absent(replica(i), SIZE, p.offset, p.data()).await;
                assert_eq!(made.expect("create"), !self.working.contains_key(&i));
                self.working.entry(i).or_insert_with(|| Self::fresh(&p));
            }
            Op::Writes(writes) => self.write_together(writes).await,
            Op::Read(i, offset, len) => self.check(i, offset, len as usize).await,
            Op::Remove(i) => {
                let removed = self.store.remove(replica(i)).await;
                self.expect_if_present(i, removed);
                self.working.remove(&i);
                self.linked.remove(&i);
            }
            Op::Stash(i) => {
                let moved = self.store.stash(replica(i), EPOCH).await;
                self.expect_if_present(i, moved);
                if let Some(content) = self.working.remove(&i) {
                    self.stale.insert(i, content);
                }
                self.linked.remove(&i);
            }
            Op::Link(i) => {
                let linked = self.store.link_stale(replica(i), EPOCH).await.expect("link");
                assert_eq!(linked, self.stale.contains_key(&i));
                if linked && !self.working.contains_key(&i) {
                    self.working.insert(i, self.stale[&i].clone());
                    self.linked.insert(i, true);
                }
            }
            Op::Reopen => {
                let (store, _) = Store::open(&self.disks, self.options.clone()).expect("open");
                self.store = store;
                let report = self.store.scan();
                assert_eq!(report.working, self.working.len());
                assert!(report.misplaced.is_empty() && report.foreign.is_empty() && report.temporaries == 0);
            }
        }
    }

    fn expect_if_present(&self, i: usize, result: crate::Result<()>) {
        match result {
            Ok(()) => assert!(self.working.contains_key(&i)),
            Err(StoreError::NoObject) => assert!(!self.working.contains_key(&i)),
            Err(e) => panic!("{e}"),
        }
    }

    async fn write_together(&mut self, writes: Vec<(usize, Piece)>) {
        let mut pending = Vec::new();
        for (i, piece) in writes {
            let (tx, rx) = tokio::sync::oneshot::channel();
            let done = Box::new(move |r: crate::Result<()>| drop(tx.send(r)));
            let data = if piece.aligned { piece.data() } else { Bytes::from(piece.data().to_vec()) };
            self.store.write_with(replica(i), SIZE, piece.offset, data, done);
            pending.push((i, rx));
            if let Some(content) = self.working.get_mut(&i) {
                Self::put(content, &piece);
                if self.linked.contains_key(&i) {
                    self.stale.insert(i, content.clone());
                }
            }
        }
        for (i, rx) in pending {
            self.expect_if_present(i, rx.await.expect("completed"));
        }
    }

    async fn check(&self, i: usize, offset: u64, len: usize) {
        let read = match self.store.try_read_cached(replica(i), offset, len) {
            Some(read) => read,
            None => self.store.read(replica(i), offset, len).await,
        };
        match (read, self.working.get(&i)) {
            (Ok(bytes), Some(content)) => {
                let mut expected = content.clone();
                expected.resize(expected.len().max(offset as usize + len), 0);
                let expected = &expected[offset as usize..offset as usize + len];
                if let Some(at) = bytes.iter().zip(expected).position(|(a, b)| a != b) {
                    panic!("object {i} differs at {}", offset + at as u64);
                }
                assert_eq!(bytes.len(), len);
            }
            (Err(StoreError::NoObject), None) => {}
            (got, wanted) => panic!("object {i}: {:?}, exists: {}", got.map(|b| b.len()), wanted.is_some()),
        }
    }

    async fn check_all(&self) {
        for i in 0..4 {
            self.check(i, 0, SIZE as usize).await;
            if let Some(content) = self.stale.get(&i) {
                let read = self.store.read_stale(replica(i), EPOCH, 0, SIZE as usize).await.expect("stale");
                assert!(read == content[..], "stale object {i}");
            }
            let Some(object) = self.store.inner.files.get(replica(i)) else { continue };
            if let Some(map) = object.map.lock().as_ref() {
                assert_map_is_honest(&object.file, map);
            }
        }
        let mut listed: Vec<_> =
            self.working.keys().chain(self.stale.keys()).map(|i| replica(*i).oid).collect();
        listed.sort_unstable();
        listed.dedup();
        assert_eq!(self.store.list(), listed);
        let on_disk: u64 = self
            .working
            .keys()
            .map(|i| {
                let disk = self.store.inner.locate(replica(*i)).expect("disk");
                crate::disk::allocated(&disk.file(replica(*i)))
            })
            .sum();
        // Unsynced, the file system takes blocks of its own later.
        let slack = if self.store.inner.durable() { 0 } else { 64 << 10 };
        assert!(self.store.space().used.abs_diff(on_disk) <= slack);
    }
}

fn run(ops: Vec<Op>, options: StoreOptions, root: &Path) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
    runtime.block_on(async {
        let mut world = World::new(root, options);
        for op in ops {
            world.step(op).await;
            world.check_all().await;
        }
        world.step(Op::Reopen).await;
        world.check_all().await;
    });
}

proptest! {
    #![proptest_config(config(40))]
    #[test]
    fn a_durable_store_behaves_like_its_model(ops in proptest::collection::vec(op(), 1..20), few in any::<bool>()) {
        let dir = tempfile::tempdir().expect("tempdir");
        // With one file per shard, handles and their maps are evicted all the time.
        let open_objects = few.then_some(1);
        run(ops, StoreOptions { open_objects, ..StoreOptions::default() }, dir.path());
    }

    #[test]
    fn an_unsynced_store_behaves_like_its_model(ops in proptest::collection::vec(op(), 1..20), direct_io in any::<bool>()) {
        let dir = tempfile::tempdir().expect("tempdir");
        run(ops, StoreOptions { sync: SyncMode::NoSync, direct_io, ..StoreOptions::default() }, dir.path());
    }
}
