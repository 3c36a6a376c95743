use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt;
use proptest::prelude::*;
use sheepdog_proto::btree::{BtreeNode, InnerEntry, LeafEntry};
use sheepdog_proto::header::ObjRequest;
use sheepdog_proto::inode::{GREF_OFFSET, STORE_POLICY_BTREE, is_table_update};
use sheepdog_proto::{Flags, Oid, Opcode, Request, ResultCode, VdiId};

use super::*;
use crate::fake::{FakeSheep, service, stored_table};
use crate::frame::Stream;
use crate::reconnect::{Reconnect, ReconnectOptions};
use crate::service::CallFuture;
use crate::vdi::{self, NewVdi};

const BLOCK: u64 = 1 << 20;

async fn volume_of(sheep: &Arc<FakeSheep>, size: u64) -> Volume {
    vdi::create(&**sheep, "v", &NewVdi { size, ..NewVdi::default() }).await.unwrap();
    open(sheep).await
}

async fn open(sheep: &Arc<FakeSheep>) -> Volume {
    Volume::open(service(sheep), "v", None, OpenOptions::default()).await.unwrap()
}

async fn open_snapshot(sheep: &Arc<FakeSheep>, tag: &str) -> Volume {
    let snapshot = Some(SnapshotRef::Tag(tag.into()));
    Volume::open(service(sheep), "v", snapshot, OpenOptions::default()).await.unwrap()
}

fn filled(byte: u8, len: usize) -> Bytes {
    vec![byte; len].into()
}

fn ops(log: &[Request]) -> Vec<Opcode> {
    log.iter().map(|request| request.opcode).collect()
}

#[tokio::test]
async fn holes_are_read_without_a_request() {
    let sheep = Arc::new(FakeSheep::new());
    let volume = volume_of(&sheep, 10 * BLOCK).await;
    sheep.take_log();
    assert_eq!(volume.read(5, 3 * BLOCK as usize).await.unwrap(), [Segment::Hole(3 * BLOCK as usize)]);
    assert_eq!(volume.read(7, 0).await.unwrap(), []);
    assert!(sheep.take_log().is_empty());
}

#[tokio::test]
async fn a_first_write_creates_the_object_then_updates_the_table() {
    let sheep = Arc::new(FakeSheep::new());
    let volume = volume_of(&sheep, 10 * BLOCK).await;
    sheep.take_log();
    volume.write(BLOCK + 512, filled(7, 512), false).await.unwrap();
    let log = sheep.take_log();
    assert_eq!(ops(&log), [Opcode::CREATE_AND_WRITE_OBJ, Opcode::WRITE_OBJ]);
    assert_eq!((log[0].obj().oid, log[0].obj().offset), (Oid::data(volume.vid(), 1), 512));
    assert_eq!((log[1].obj().oid, log[1].obj().offset), (Oid::inode(volume.vid()), 4668));
    volume.write(BLOCK, filled(8, 512), false).await.unwrap();
    let log = sheep.take_log();
    assert_eq!(ops(&log), [Opcode::WRITE_OBJ]);
    let data = volume.read_bytes(BLOCK, 2048).await.unwrap();
    assert_eq!(data, [vec![8; 512], vec![7; 512], vec![0; 1024]].concat());
}

#[tokio::test]
async fn the_blocks_created_by_one_write_share_one_table_update() {
    let sheep = Arc::new(FakeSheep::new());
    let volume = volume_of(&sheep, 10 * BLOCK).await;
    volume.write(4 * BLOCK, filled(1, 10), false).await.unwrap();
    sheep.take_log();
    volume.write(BLOCK - 4, filled(9, 5 * BLOCK as usize), false).await.unwrap();
    let log = sheep.take_log();
    let updates: Vec<_> = log.iter().filter(|r| r.obj().oid.is_inode()).collect();
    let ranges: Vec<_> = updates.iter().map(|r| (r.obj().offset, r.data_length)).collect();
    // Block 4 existed: its entry is not rewritten.
    assert_eq!(ranges, [(4664, 16), (4684, 4)]);
    assert_eq!(
        volume.read_bytes(BLOCK - 4, 5 * BLOCK as usize).await.unwrap(),
        filled(9, 5 * BLOCK as usize)
    );
}

#[tokio::test]
async fn concurrent_first_writes_of_one_block_create_it_once() {
    let sheep = Arc::new(FakeSheep::new());
    let volume = volume_of(&sheep, 4 * BLOCK).await;
    sheep.delay_up_to(5, 3);
    sheep.take_log();
    let writes = (0..16u8).map(|i| volume.write(u64::from(i) * 512, filled(i + 1, 512), false));
    for result in futures_util::future::join_all(writes).await {
        result.unwrap();
    }
    let creates = ops(&sheep.take_log()).into_iter().filter(|op| *op == Opcode::CREATE_AND_WRITE_OBJ).count();
    assert_eq!(creates, 1);
    let want: Vec<u8> = (0..16u8).flat_map(|i| vec![i + 1; 512]).collect();
    assert_eq!(volume.read_bytes(0, 16 * 512).await.unwrap(), want);
}

#[tokio::test]
async fn a_creation_whose_caller_gave_up_still_reaches_the_table() {
    let sheep = Arc::new(FakeSheep::new());
    let volume = volume_of(&sheep, 4 * BLOCK).await;
    sheep.delay_up_to(9, 5);
    let mut write = Box::pin(volume.write(0, filled(1, 512), false));
    assert!(write.as_mut().now_or_never().is_none());
    drop(write);
    volume.write(512, filled(2, 512), false).await.unwrap();
    assert_eq!(volume.read_bytes(0, 1024).await.unwrap(), [vec![1; 512], vec![2; 512]].concat());
}

#[tokio::test]
async fn a_snapshot_by_somebody_else_is_followed_and_keeps_its_content() {
    let sheep = Arc::new(FakeSheep::new());
    let volume = volume_of(&sheep, 4 * BLOCK).await;
    volume.write(0, filled(1, 4096), false).await.unwrap();
    volume.write(BLOCK, filled(1, BLOCK as usize), false).await.unwrap();
    let old = volume.vid();
    let new = vdi::snapshot(&*sheep, "v", "s1").await.unwrap();
    sheep.take_log();
    volume.write(512, filled(2, 512), false).await.unwrap();
    let log = sheep.take_log();
    assert_eq!(
        ops(&log),
        [
            Opcode::WRITE_OBJ, // READONLY
            Opcode::GET_VDI_INFO,
            Opcode::READ_OBJ,
            Opcode::CREATE_AND_WRITE_OBJ,
            Opcode::WRITE_OBJ,
        ]
    );
    let create = log[3].obj();
    assert!(log[3].flags.contains(Flags::COW));
    assert_eq!((create.oid, create.cow_oid), (Oid::data(new, 0), Oid::data(old, 0)));
    assert_eq!(volume.vid(), new);
    assert_eq!(
        volume.extents(0, 3 * BLOCK).await.unwrap(),
        [(BLOCK, Extent::Own), (BLOCK, Extent::Inherited), (BLOCK, Extent::Hole)]
    );
    // A whole block needs no copy.
    volume.write(BLOCK, filled(3, BLOCK as usize), false).await.unwrap();
    assert!(sheep.take_log().iter().all(|r| !r.flags.contains(Flags::COW)));
    assert_eq!(volume.read_bytes(0, 1024).await.unwrap(), [vec![1; 512], vec![2; 512]].concat());
    let snapshot = open_snapshot(&sheep, "s1").await;
    assert_eq!(snapshot.read_bytes(0, 1024).await.unwrap(), filled(1, 1024));
    assert_eq!(snapshot.read_bytes(BLOCK, 512).await.unwrap(), filled(1, 512));
    assert_eq!(snapshot.write(0, filled(0, 1), false).await, Err(VolumeError::ReadOnly));
}

/// Takes a snapshot just before the first request that `select` picks.
struct SnapshotBefore {
    sheep: Arc<FakeSheep>,
    armed: AtomicBool,
    select: fn(&Request) -> bool,
}

impl Service for SnapshotBefore {
    fn call(&self, request: Request, payload: Bytes) -> CallFuture<'_> {
        Box::pin(async move {
            if (self.select)(&request) && self.armed.swap(false, Ordering::Relaxed) {
                vdi::snapshot(&*self.sheep, "v", "mid").await?;
            }
            self.sheep.call(request, payload).await
        })
    }

    fn discards(&self) -> bool {
        self.sheep.discards()
    }
}

fn is_update(request: &Request) -> bool {
    let body = request.obj();
    request.opcode == Opcode::WRITE_OBJ
        && body.oid.is_inode()
        && is_table_update(body.offset.into(), request.data_length.into())
}

#[tokio::test]
async fn entries_refused_because_of_a_snapshot_go_into_the_new_working_vdi() {
    let sheep = Arc::new(FakeSheep::new());
    let old = volume_of(&sheep, 4 * BLOCK).await.vid();
    let service =
        Arc::new(SnapshotBefore { sheep: sheep.clone(), armed: AtomicBool::new(true), select: is_update });
    let volume = Volume::open(service, "v", None, OpenOptions::default()).await.unwrap();
    volume.write(0, filled(5, 512), false).await.unwrap();
    assert_ne!(volume.vid(), old);
    assert_eq!(stored_table(&sheep, volume.vid(), 1).await, [old.get()]);
    assert_eq!(stored_table(&sheep, old, 1).await, [0]);
    volume.write(512, filled(6, 512), false).await.unwrap();
    let again = open(&sheep).await;
    assert_eq!(again.read_bytes(0, 1024).await.unwrap(), [vec![5; 512], vec![6; 512]].concat());
    assert_eq!(sheep.data_objects(), [Oid::data(volume.vid(), 0)], "the first object was given back");
    assert_eq!(open_snapshot(&sheep, "mid").await.read(0, 512).await.unwrap(), [Segment::Hole(512)]);
}

#[tokio::test]
async fn a_discard_after_an_unnoticed_snapshot_spares_the_snapshot() {
    let sheep = Arc::new(FakeSheep::new());
    let volume = volume_of(&sheep, 4 * BLOCK).await;
    volume.write(0, filled(1, BLOCK as usize), false).await.unwrap();
    vdi::snapshot(&*sheep, "v", "s").await.unwrap();
    volume.discard(0, BLOCK).await.unwrap();
    assert_eq!(volume.read(0, 512).await.unwrap(), [Segment::Hole(512)]);
    assert_eq!(open_snapshot(&sheep, "s").await.read_bytes(0, 512).await.unwrap(), filled(1, 512));
}

#[tokio::test]
async fn a_snapshot_taken_during_a_discard_keeps_its_blocks() {
    let sheep = Arc::new(FakeSheep::new().with_discards());
    let old = volume_of(&sheep, 4 * BLOCK).await.vid();
    let select = |request: &Request| request.opcode == Opcode::DISCARD_OBJ;
    let service = Arc::new(SnapshotBefore { sheep: sheep.clone(), armed: AtomicBool::new(true), select });
    let volume = Volume::open(service, "v", None, OpenOptions::default()).await.unwrap();
    volume.write(0, filled(1, 2 * BLOCK as usize), false).await.unwrap();
    sheep.take_log();
    volume.discard(0, 2 * BLOCK).await.unwrap();
    let discards = sheep.take_log().into_iter().filter(select).map(|r| (r.obj().oid, r.data_length));
    let first = |vid| (Oid::data(vid, 0), 8);
    assert_eq!(discards.collect::<Vec<_>>(), [first(old), first(volume.vid())], "both blocks at once");
    assert_eq!(volume.read(0, 512).await.unwrap(), [Segment::Hole(512)]);
    assert_eq!(stored_table(&sheep, volume.vid(), 2).await, [0, 0]);
    let snapshot = open_snapshot(&sheep, "mid").await;
    assert_eq!(snapshot.read_bytes(0, 2 * BLOCK as usize).await.unwrap(), filled(1, 2 * BLOCK as usize));
}

#[tokio::test]
async fn discard_gives_back_whole_blocks_and_leaves_the_rest() {
    let sheep = Arc::new(FakeSheep::new());
    let size = 3 * BLOCK + 5000;
    let volume = volume_of(&sheep, size).await;
    volume.write(0, filled(1, size as usize), false).await.unwrap();
    volume.discard(BLOCK - 1, 2 * BLOCK).await.unwrap();
    assert_eq!(
        volume.extents(0, size).await.unwrap(),
        [(BLOCK, Extent::Own), (BLOCK, Extent::Hole), (BLOCK + 5000, Extent::Own)]
    );
    assert_eq!(sheep.data_objects().len(), 3);
    volume.discard(2 * BLOCK, size - 2 * BLOCK).await.unwrap();
    assert_eq!(sheep.data_objects(), [Oid::data(volume.vid(), 0)], "the cut last block counts as whole");
    assert_eq!(volume.read_bytes(0, BLOCK as usize).await.unwrap(), filled(1, BLOCK as usize));
}

#[tokio::test]
async fn zeroes_make_holes_or_allocated_zeros_as_asked() {
    let sheep = Arc::new(FakeSheep::new());
    let volume = volume_of(&sheep, 4 * BLOCK).await;
    volume.write(0, filled(1, 2 * BLOCK as usize), false).await.unwrap();
    assert!(!volume.zeroes_are_fast(512, BLOCK).await.unwrap());
    assert!(volume.zeroes_are_fast(0, 2 * BLOCK).await.unwrap());
    assert!(volume.zeroes_are_fast(2 * BLOCK + 5, 100).await.unwrap());
    volume.write_zeroes(BLOCK / 2, BLOCK + BLOCK / 2 + 512, false, false).await.unwrap();
    assert_eq!(
        volume.extents(0, 3 * BLOCK).await.unwrap(),
        [(BLOCK, Extent::Own), (2 * BLOCK, Extent::Hole)]
    );
    volume.write_zeroes(0, 3 * BLOCK + 512, true, false).await.unwrap();
    assert_eq!(volume.extents(0, 4 * BLOCK).await.unwrap(), [(4 * BLOCK, Extent::Own)]);
    let all = volume.read_bytes(0, 4 * BLOCK as usize).await.unwrap();
    assert!(sheepdog_buffer::is_zero(&all));
}

#[tokio::test]
async fn a_write_through_sheep_is_asked_to_flush_once() {
    let sheep = Arc::new(FakeSheep::new());
    let volume = volume_of(&sheep, BLOCK).await;
    volume.write(0, filled(1, 512), false).await.unwrap();
    let log = sheep.take_log();
    assert!(log.iter().any(|r| r.opcode == Opcode::CREATE_AND_WRITE_OBJ && r.flags.contains(Flags::CACHE)));
    volume.flush().await.unwrap();
    volume.flush().await.unwrap();
    volume.write(0, filled(1, 512), false).await.unwrap();
    let log = sheep.take_log();
    assert_eq!(ops(&log), [Opcode::FLUSH_VDI, Opcode::WRITE_OBJ]);
    assert!(log[1].flags.contains(Flags::DIRECT));
}

#[tokio::test]
async fn a_buffering_sheep_is_flushed_every_time_and_after_fua_writes() {
    let sheep = Arc::new(FakeSheep::new().with_write_back());
    let volume = volume_of(&sheep, BLOCK).await;
    volume.write(0, filled(1, 512), false).await.unwrap();
    volume.flush().await.unwrap();
    sheep.take_log();
    volume.flush().await.unwrap();
    volume.write(0, filled(1, 512), true).await.unwrap();
    volume.write(0, filled(1, 512), false).await.unwrap();
    let log = sheep.take_log();
    let flush = Opcode::FLUSH_VDI;
    assert_eq!(ops(&log), [flush, Opcode::WRITE_OBJ, flush, Opcode::WRITE_OBJ]);
    assert!(log[1].flags.contains(Flags::DIRECT) && log[3].flags.contains(Flags::CACHE));
}

#[tokio::test]
async fn the_lock_is_taken_once_and_released_on_close_and_on_drop() {
    let sheep = Arc::new(FakeSheep::new().with_locks());
    let volume = volume_of(&sheep, BLOCK).await;
    let second = Volume::open(service(&sheep), "v", None, OpenOptions::default()).await;
    assert_eq!(second.err(), Some(VolumeError::Locked("v".into())));
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    Volume::open(service(&sheep), "v", None, options).await.unwrap();
    volume.write(0, filled(1, 1), false).await.unwrap();
    vdi::snapshot(&*sheep, "v", "s").await.unwrap();
    volume.write(0, filled(1, 1), false).await.unwrap();
    let new = volume.vid();
    sheep.take_log();
    volume.close().await.unwrap();
    let released: Vec<_> = sheep.take_log().iter().map(|r| r.vdi().base_vdi_id).collect();
    assert!(released.contains(&new) && released.len() == 3, "flush, old and new vid: {released:?}");
    assert_eq!(sheep.locked(), 0);
    drop(open(&sheep).await);
    while sheep.locked() > 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn errors_name_their_cause() {
    let sheep = Arc::new(FakeSheep::new());
    let volume = volume_of(&sheep, 2 * BLOCK).await;
    let options = OpenOptions::default();
    let none = Volume::open(service(&sheep), "nope", None, options).await.err();
    assert_eq!(none, Some(VolumeError::NotFound("nope".into())));
    let tag = Some(SnapshotRef::Tag("nope".into()));
    assert!(matches!(
        Volume::open(service(&sheep), "v", tag, options).await.err(),
        Some(VolumeError::NotFound(_))
    ));
    assert!(matches!(volume.read(BLOCK, 2 * BLOCK as usize).await, Err(VolumeError::OutOfRange { .. })));
    assert!(matches!(volume.discard(u64::MAX, 2).await, Err(VolumeError::OutOfRange { .. })));
    sheep.set_fault(|r| (r.opcode == Opcode::CREATE_AND_WRITE_OBJ).then_some(ResultCode::NO_SPACE));
    let error = volume.write(0, filled(1, 3 << 19), false).await.unwrap_err();
    assert_eq!(error.code(), Some(ResultCode::NO_SPACE));
    sheep.clear_fault();
    assert_eq!(volume.read(0, 10).await.unwrap(), [Segment::Hole(10)]);
}

#[tokio::test]
async fn an_invalidated_inode_is_read_again_in_full() {
    let sheep = Arc::new(FakeSheep::new());
    let volume = volume_of(&sheep, 2 * BLOCK).await;
    volume.write(0, filled(4, 512), false).await.unwrap();
    let once = AtomicBool::new(true);
    sheep.set_fault(move |r| {
        (r.obj().oid.is_data() && once.swap(false, Ordering::Relaxed))
            .then_some(ResultCode::INODE_INVALIDATED)
    });
    sheep.take_log();
    assert_eq!(volume.read_bytes(0, 512).await.unwrap(), filled(4, 512));
    assert!(sheep.take_log().iter().any(|r| r.data_length as usize == GREF_OFFSET));
}

#[tokio::test]
async fn a_grown_volume_is_seen_by_reload() {
    let sheep = Arc::new(FakeSheep::new());
    let volume = volume_of(&sheep, BLOCK).await;
    let size = Bytes::copy_from_slice(&(3 * BLOCK).to_le_bytes());
    vdi::write_object(&*sheep, Oid::inode(volume.vid()), 536, size).await.unwrap();
    assert!(volume.write(2 * BLOCK, filled(1, 512), false).await.is_err());
    assert_eq!(volume.reload().await.unwrap(), 3 * BLOCK);
    volume.write(2 * BLOCK, filled(1, 512), false).await.unwrap();
    assert_eq!(volume.read_bytes(2 * BLOCK, 512).await.unwrap(), filled(1, 512));
}

#[tokio::test]
async fn a_hypervolume_keeps_its_blocks_across_reopening_and_frees_discarded_ones() {
    let sheep = Arc::new(FakeSheep::new());
    let new =
        NewVdi { size: 1 << 50, store_policy: STORE_POLICY_BTREE, block_size_shift: 22, ..NewVdi::default() };
    vdi::create(&*sheep, "v", &new).await.unwrap();
    let volume = open(&sheep).await;
    let places = [0u64, 1 << 49, 3 << 30, (1 << 50) - 4096];
    for (i, at) in places.iter().enumerate() {
        volume.write(*at, filled(i as u8 + 1, 4096), false).await.unwrap();
    }
    let volume = open(&sheep).await;
    for (i, at) in places.iter().enumerate() {
        assert_eq!(volume.read_bytes(*at, 4096).await.unwrap(), filled(i as u8 + 1, 4096));
    }
    volume.discard(1 << 49, 4 << 20).await.unwrap();
    assert_eq!(sheep.data_objects().len(), 3);
    let volume = open(&sheep).await;
    assert_eq!(volume.read(1 << 49, 512).await.unwrap(), [Segment::Hole(512)]);
}

#[tokio::test]
async fn a_hypervolume_whose_root_overflows_gets_leaves() {
    const FULL: u32 = sheepdog_proto::btree::MAX_LEAF_ENTRIES as u32;
    let sheep = Arc::new(FakeSheep::new());
    let new =
        NewVdi { size: 1 << 50, store_policy: STORE_POLICY_BTREE, block_size_shift: 22, ..NewVdi::default() };
    let vid = vdi::create(&*sheep, "v", &new).await.unwrap();
    // A root leaf that holds every second block.
    let entries = (0..FULL).map(|i| LeafEntry { idx: 2 * i, vdi_id: vid.get() });
    let root = BtreeNode::Leaf(entries.collect()).encode();
    let header = vdi::read_header(&*sheep, vid).await.unwrap();
    let inode = [&header.to_bytes()[..], &root].concat();
    vdi::write_object(&*sheep, Oid::inode(vid), 0, inode.into()).await.unwrap();

    let volume = open(&sheep).await;
    let block = volume.block_size();
    let places = [7u64, 2 * u64::from(FULL) + 5, u64::from(FULL) * 3];
    for (i, idx) in places.iter().enumerate() {
        volume.write(idx * block + 9, filled(i as u8 + 1, 512), false).await.unwrap();
    }
    let volume = open(&sheep).await;
    assert_eq!(volume.header().btree_counter, 2);
    for (i, idx) in places.iter().enumerate() {
        assert_eq!(volume.read_bytes(idx * block + 9, 512).await.unwrap(), filled(i as u8 + 1, 512));
    }
    let extents = volume.extents(6 * block, 4 * block).await.unwrap();
    assert_eq!(extents, [(3 * block, Extent::Own), (block, Extent::Hole)]);
    let last = 2 * (u64::from(FULL) - 1);
    assert_eq!(volume.extents(last * block, block).await.unwrap(), [(block, Extent::Own)]);
}

/// A hypervolume whose index has a leaf for each of `largest`, that is its largest index. All blocks are holes.
async fn hypervolume_of_leaves(sheep: &FakeSheep, size: u64, largest: &[u32]) -> VdiId {
    let new = NewVdi { size, store_policy: STORE_POLICY_BTREE, block_size_shift: 20, ..NewVdi::default() };
    let vid = vdi::create(sheep, "v", &new).await.unwrap();
    let mut root = Vec::new();
    for (number, idx) in (0..).zip(largest) {
        let oid = Oid::btree(vid, number);
        let leaf = BtreeNode::Leaf(vec![LeafEntry { idx: *idx, vdi_id: 0 }]).encode();
        let request = Request::new(Opcode::CREATE_AND_WRITE_OBJ)
            .flag(Flags::WRITE)
            .with_obj(ObjRequest { oid, ..ObjRequest::zeroed() });
        sheep.call(request, leaf.into()).await.unwrap().success().unwrap();
        root.push(InnerEntry { idx: *idx, oid });
    }
    let header = vdi::read_header(sheep, vid).await.unwrap();
    let header = InodeHeader { btree_counter: largest.len() as u32, ..header };
    let inode = [&header.to_bytes()[..], &BtreeNode::Inner(root).encode()].concat();
    vdi::write_object(sheep, Oid::inode(vid), 0, inode.into()).await.unwrap();
    vid
}

/// Before it reads the index node `at`, a snapshot is taken and another task of the volume finds out.
struct MovesBeforeRead {
    sheep: Arc<FakeSheep>,
    at: Oid,
    other: std::sync::OnceLock<std::sync::Weak<Inner>>,
}

impl Service for MovesBeforeRead {
    fn call(&self, request: Request, payload: Bytes) -> CallFuture<'_> {
        Box::pin(async move {
            if request.opcode == Opcode::READ_OBJ && request.obj().oid == self.at {
                vdi::snapshot(&*self.sheep, "v", "mid").await?;
                let other = self.other.get().and_then(std::sync::Weak::upgrade).unwrap();
                let seen = other.vid();
                tokio::spawn(async move { other.move_on(seen).await });
                for _ in 0..100 {
                    tokio::task::yield_now().await;
                }
            }
            self.sheep.call(request, payload).await
        })
    }
}

#[tokio::test]
async fn entries_of_an_index_that_is_replaced_meanwhile_are_not_lost() {
    let sheep = Arc::new(FakeSheep::new());
    let old = hypervolume_of_leaves(&sheep, 1 << 30, &[0, 9]).await;
    let at = Oid::btree(old, 1);
    let service = Arc::new(MovesBeforeRead { sheep: sheep.clone(), at, other: std::sync::OnceLock::new() });
    let volume = Volume::open(service.clone(), "v", None, OpenOptions::default()).await.unwrap();
    service.other.set(Arc::downgrade(&volume.inner)).unwrap();
    // Block 0 is set in the first leaf, then the second one must be read.
    volume.inner.update_table(vec![(0, old.get()), (8, old.get())]).await.unwrap();
    assert_ne!(volume.vid(), old);
    for volume in [volume, open(&sheep).await] {
        assert_eq!(volume.inner.entry(0).await.unwrap(), old.get());
        assert_eq!(volume.inner.entry(8).await.unwrap(), old.get());
    }
    assert_eq!(open_snapshot(&sheep, "mid").await.inner.entry(0).await.unwrap(), 0);
}

#[tokio::test]
async fn listing_shows_working_vdis_and_snapshots() {
    let sheep = Arc::new(FakeSheep::new());
    let volume = volume_of(&sheep, BLOCK).await;
    vdi::snapshot(&*sheep, "v", "s").await.unwrap();
    let list = vdi::list(&*sheep).await.unwrap();
    let seen: Vec<_> =
        list.iter().map(|(vid, header)| (*vid, header.as_ref().unwrap().is_snapshot())).collect();
    assert_eq!(seen, [(volume.vid(), true), (VdiId::new(volume.vid().get() + 1), false)]);
    let found = vdi::lookup(&*sheep, "v", Some(&SnapshotRef::Id(1))).await.unwrap();
    assert_eq!(found.vid, volume.vid());
    assert!(vdi::lookup(&*sheep, "", None).await.is_err());
}

#[tokio::test]
async fn a_volume_survives_connections_that_break_again_and_again() {
    let sheep = Arc::new(FakeSheep::new());
    vdi::create(&*sheep, "v", &NewVdi { size: 4 * BLOCK, ..NewVdi::default() }).await.unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap().into();
    let connections = Arc::new(AtomicU32::new(0));
    let (server, count) = (sheep.clone(), connections.clone());
    let accepting = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            count.fetch_add(1, Ordering::Relaxed);
            let answers = 10 + 7 * count.load(Ordering::Relaxed) as usize % 23;
            let _ = crate::fake::serve(server.clone(), Stream::Tcp(stream), answers).await;
        }
    });
    let options = ReconnectOptions { backoff: std::time::Duration::from_millis(1), give_up_after: None };
    let service = Arc::new(Reconnect::new(addr, options));
    let volume = Volume::open(service, "v", None, OpenOptions::default()).await.unwrap();
    let writes = (0..512u64).map(|i| volume.write(i * 8192, filled(i as u8, 8192), false));
    for result in futures_util::future::join_all(writes).await {
        result.unwrap();
    }
    let data = volume.read_bytes(0, 4 * BLOCK as usize).await.unwrap();
    assert!(data.chunks(8192).enumerate().all(|(i, chunk)| chunk.iter().all(|b| *b == i as u8)));
    assert!(connections.load(Ordering::Relaxed) > 10);
    accepting.abort();
}

#[tokio::test]
async fn a_lock_is_waited_for_while_the_sheep_collects_lock_state() {
    let sheep = Arc::new(FakeSheep::new().with_locks());
    volume_of(&sheep, BLOCK).await.close().await.unwrap();
    let left = AtomicU32::new(2);
    sheep.set_fault(move |r| {
        let busy = r.opcode == Opcode::LOCK_VDI
            && left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok();
        busy.then_some(ResultCode::COLLECTING_CINFO)
    });
    open(&sheep).await;
}

/// What happens between two checks.
#[derive(Debug, Clone)]
enum Step {
    /// Task, unit of the task, fill byte, units.
    Writes(Vec<(usize, u64, u8, u64)>),
    Snapshot,
    Discard(u64, u64),
    Zeroes(u64, u64, bool),
}

const TASKS: usize = 4;
const SIZE: u64 = 3 * BLOCK + 64 * 1024;
const UNIT: u64 = 32 * 1024;

fn steps() -> impl Strategy<Value = Vec<(Step, bool)>> {
    let write = (0..TASKS, 0..SIZE / UNIT, 1u8.., 1u64..40);
    let step = prop_oneof![
        4 => proptest::collection::vec(write, 1..12).prop_map(Step::Writes),
        1 => Just(Step::Snapshot),
        1 => (0..SIZE, 0..SIZE).prop_map(|(a, b)| Step::Discard(a.min(b), a.abs_diff(b))),
        1 => (0..SIZE, 0..SIZE, any::<bool>()).prop_map(|(a, b, h)| Step::Zeroes(a.min(b), a.abs_diff(b), h)),
    ];
    proptest::collection::vec((step, any::<bool>()), 1..12)
}

/// The parts of a unit-aligned write that belong to one task: every unit is shared by all, in slices.
fn slices(task: usize, unit: u64, units: u64) -> impl Iterator<Item = (u64, u64)> {
    let slice = UNIT / TASKS as u64;
    (unit..(unit + units).min(SIZE / UNIT)).map(move |u| (u * UNIT + task as u64 * slice, slice))
}

async fn run_writes(volume: &Volume, writes: &[(usize, u64, u8, u64)], model: &mut [u8]) {
    let per_task = (0..TASKS).map(|task| async move {
        for (_, unit, byte, units) in writes.iter().filter(|w| w.0 == task) {
            let parts = slices(task, *unit, *units)
                .map(|(at, len)| volume.write(at, filled(*byte, len as usize), false));
            for result in futures_util::future::join_all(parts).await {
                result.unwrap();
            }
        }
    });
    futures_util::future::join_all(per_task).await;
    for (task, unit, byte, units) in writes {
        for (at, len) in slices(*task, *unit, *units) {
            model[at as usize..(at + len) as usize].fill(*byte);
        }
    }
}

async fn run_step(sheep: &Arc<FakeSheep>, volume: &Volume, step: &Step, model: &mut [u8], nr: usize) {
    match step {
        Step::Writes(writes) => run_writes(volume, writes, model).await,
        Step::Snapshot => {
            vdi::snapshot(&**sheep, "v", &format!("s{nr}")).await.unwrap();
        }
        Step::Discard(offset, len) => {
            volume.discard(*offset, *len).await.unwrap();
            for block in 0..SIZE.div_ceil(BLOCK) {
                let (start, end) = (block * BLOCK, ((block + 1) * BLOCK).min(SIZE));
                if *offset <= start && end <= offset + len {
                    model[start as usize..end as usize].fill(0);
                }
            }
        }
        Step::Zeroes(offset, len, no_hole) => {
            volume.write_zeroes(*offset, *len, *no_hole, false).await.unwrap();
            model[*offset as usize..(offset + len) as usize].fill(0);
        }
    }
}

async fn check_nothing_leaked(sheep: &FakeSheep) {
    let mut named = std::collections::BTreeSet::new();
    for vid in vdi::list_ids(sheep).await.unwrap() {
        for (idx, owner) in stored_table(sheep, vid, 8).await.into_iter().enumerate() {
            if owner != 0 {
                named.insert(Oid::data(VdiId::new(owner), idx as u32));
            }
        }
    }
    assert_eq!(sheep.data_objects(), named.into_iter().collect::<Vec<_>>());
}

/// What the steps run on.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Flat,
    Discarding,
    Hyper,
}

async fn run_scenario(kind: Kind, steps: Vec<(Step, bool)>, seed: u64) {
    let sheep = match kind {
        Kind::Discarding => Arc::new(FakeSheep::new().with_discards()),
        Kind::Flat | Kind::Hyper => Arc::new(FakeSheep::new()),
    };
    let volume = if kind == Kind::Hyper {
        hypervolume_of_leaves(&sheep, SIZE, &[0, 2, 3]).await;
        open(&sheep).await
    } else {
        volume_of(&sheep, SIZE).await
    };
    sheep.delay_up_to(6, seed);
    let mut model = vec![0u8; SIZE as usize];
    let mut snapshots = Vec::new();
    for (nr, (step, snapshot_meanwhile)) in steps.iter().enumerate() {
        if let Step::Snapshot = step {
            snapshots.push((format!("s{nr}"), model.clone()));
        }
        let meanwhile = async {
            // Without discards a snapshot may lose what is discarded while it is taken.
            let safe = matches!(step, Step::Writes(_)) || kind != Kind::Flat;
            if *snapshot_meanwhile && safe && !matches!(step, Step::Snapshot) {
                for _ in 0..seed % 40 {
                    tokio::task::yield_now().await;
                }
                vdi::snapshot(&*sheep, "v", &format!("m{nr}")).await.unwrap();
            }
        };
        tokio::join!(run_step(&sheep, &volume, step, &mut model, nr), meanwhile);
        assert!(volume.read_bytes(0, SIZE as usize).await.unwrap() == model, "step {nr}: {step:?}");
    }
    let again = open(&sheep).await;
    assert!(again.read_bytes(0, SIZE as usize).await.unwrap() == model, "after reopening");
    for (tag, content) in snapshots {
        let snapshot = open_snapshot(&sheep, &tag).await;
        assert!(snapshot.read_bytes(0, SIZE as usize).await.unwrap() == content, "snapshot {tag}");
    }
    if kind != Kind::Hyper {
        check_nothing_leaked(&sheep).await;
    }
}

/// Few cases unless PROPTEST_CASES asks for more.
fn cases(few: u32) -> ProptestConfig {
    let asked = std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok());
    ProptestConfig { cases: asked.unwrap_or(few), ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases(96))]
    #[test]
    fn a_volume_behaves_like_memory_and_snapshots_do_not_change(
        kind in proptest::sample::select(&[Kind::Flat, Kind::Discarding, Kind::Hyper][..]),
        steps in steps(),
        seed in 1u64..,
    ) {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap()
            .block_on(run_scenario(kind, steps, seed));
    }
}
