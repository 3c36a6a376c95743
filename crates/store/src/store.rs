//! The store: its disks, its scheduler, and the operations that requests ask for.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};

use bytes::Bytes;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use parking_lot::{Mutex, RwLock};
use sheepdog_proto::{Epoch, Oid};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::Result;
use crate::disk::Disk;
use crate::diskset::DiskSet;
use crate::error::StoreError;
use crate::failure::DiskFailure;
use crate::fdcache::FdCache;
use crate::index::{DiskId, Index};
use crate::layout::Layout;
use crate::name::{Replica, StaleName};
use crate::queue::{Create, Done, Exec, How, Job, Task, Write};
use crate::removed::Memory;
use crate::sched::{Claim, Sched};
use crate::trim::BLOCK;
use crate::worker::SMALL;

/// Unit of zero-filling around the first write into a hole, in bytes.
pub(crate) const FILL_UNIT: u64 = 64 << 10;
/// Largest write done in the caller's thread under [`SyncMode::NoSync`], in bytes.
const INLINE_WRITE: usize = 128 << 10;
/// Bound of all queued writes, in units of 4 KiB of payload plus one per job: 256 MiB.
const QUEUE_UNITS: usize = 1 << 16;
/// Largest object file accepted, in bytes.
const MAX_FILE: u64 = 4 << 30;

/// When a change is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SyncMode {
    /// Once it survives a power cut.
    #[default]
    Durable,
    /// Once it is in the page cache (`-n`).
    NoSync,
}

/// Called before an object changes, on the thread that changes it: the place of a write-ahead journal.
pub trait WriteHook: Send + Sync {
    /// Before `data` is stored at `offset`. An error fails the request.
    fn before_write(&self, replica: Replica, create: bool, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Before the object is removed.
    fn before_remove(&self, replica: Replica) -> io::Result<()>;
}

/// How to run a store. The default is durable, plain layout.
#[derive(Clone, Default)]
pub struct StoreOptions {
    /// When a change is acknowledged.
    pub sync: SyncMode,
    /// `-D`: never keep written data in the page cache.
    pub direct_io: bool,
    /// Directories of live objects.
    pub layout: Layout,
    /// Bytes of each disk that creates leave free, twice that for recovery; default 0.5 % of the disk, at most 64 MiB.
    pub reserve: Option<u64>,
    /// Most object files kept open; default 2000, less if the process may not open enough.
    pub open_objects: Option<usize>,
    /// See [`WriteHook`].
    pub write_hook: Option<Arc<dyn WriteHook>>,
    /// Called before a failed disk is taken out of service, while its objects still count as present; on any thread, perhaps
    /// more than once.
    pub before_disk_loss: Option<Arc<dyn Fn() + Send + Sync>>,
    /// Called once for each disk taken out of service after errors, on any thread; must not block.
    pub on_disk_failure: Option<Arc<dyn Fn(DiskFailure) + Send + Sync>>,
    /// File that records the disks removed while others served on, e.g. `META/removed_disks`. A recorded disk that is
    /// listed again holds old data: its objects are moved to `.stale`. `None`: nothing is recorded.
    pub removed_disks: Option<PathBuf>,
    /// Existing directories, absolute and without links, that plugging a disk must not empty: those of the daemon.
    pub protected: Vec<PathBuf>,
    /// Suffix of objects moved to `.stale` for that reason: the latest epoch.
    pub epoch: Epoch,
}

impl std::fmt::Debug for StoreOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoreOptions")
            .field("sync", &self.sync)
            .field("direct_io", &self.direct_io)
            .field("layout", &self.layout)
            .finish_non_exhaustive()
    }
}

/// What all handles and threads share.
pub(crate) struct Inner {
    pub(crate) options: StoreOptions,
    set: RwLock<Arc<DiskSet>>,
    pub(crate) index: Index,
    pub(crate) files: FdCache,
    /// Of the disks, and of those to be plugged.
    pub(crate) layout: Mutex<Layout>,
    /// Number of the next disk to be plugged.
    pub(crate) next_disk: AtomicU16,
    /// Held by who plugs, unplugs or releases disks.
    pub(crate) changing: Mutex<()>,
    /// Held by who writes [`StoreOptions::removed_disks`].
    pub(crate) recording: Mutex<()>,
    sched: Mutex<Sched<Job>>,
    budget: Arc<Semaphore>,
    pub(crate) read_budget: Arc<Semaphore>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.set.get_mut().all().for_each(|d| d.stop());
    }
}

impl Inner {
    pub(crate) fn new(options: StoreOptions, disks: Vec<Arc<Disk>>) -> Inner {
        let files = FdCache::new(options.open_objects.unwrap_or(2000).min(open_file_budget()));
        Inner {
            layout: Mutex::new(options.layout),
            next_disk: AtomicU16::new(disks.iter().map(|d| d.id + 1).max().unwrap_or(0)),
            changing: Mutex::new(()),
            recording: Mutex::new(()),
            options,
            set: RwLock::new(Arc::new(DiskSet::new(disks, Vec::new()))),
            index: Index::default(),
            files,
            sched: Mutex::new(Sched::new()),
            budget: Arc::new(Semaphore::new(QUEUE_UNITS)),
            read_budget: Arc::new(Semaphore::new(1024)),
        }
    }

    pub(crate) fn durable(&self) -> bool {
        self.options.sync == SyncMode::Durable
    }

    pub(crate) fn disks(&self) -> Arc<DiskSet> {
        self.set.read().clone()
    }

    /// The disk that has a working file of the replica, else the one that should.
    pub(crate) fn locate(&self, replica: Replica) -> Result<Arc<Disk>> {
        let set = self.disks();
        let found = self.index.find(replica).and_then(|id| set.by_id(id)).or_else(|| set.home(replica.oid));
        found.cloned().ok_or_else(no_disks)
    }

    /// Publishes another set of disks, if `change` gives one.
    pub(crate) fn change_set<T>(&self, change: impl FnOnce(&DiskSet) -> (T, Option<DiskSet>)) -> T {
        let mut set = self.set.write();
        let (value, changed) = change(&set);
        if let Some(changed) = changed {
            *set = Arc::new(changed);
        }
        value
    }

    /// Takes a disk out of the set; false if it was not in it.
    pub(crate) fn detach(&self, id: DiskId) -> bool {
        let gone = self.change_set(|set| {
            let gone = set.by_id(id).cloned();
            let left = gone.as_ref().map(|_| set.without(id));
            (gone, left)
        });
        let Some(disk) = gone else { return false };
        disk.removed.store(true, Relaxed);
        disk.stop();
        if !self.disks().is_empty()
            && let Err(e) = self.remember(&disk.path, Some(Memory::Removed))
        {
            tracing::error!("{e}");
        }
        self.index.remove_disk(id);
        self.files.forget_disk(id);
        true
    }

    /// Accepts work; it runs once nothing earlier overlaps it.
    pub(crate) fn submit(self: &Arc<Inner>, claim: Claim, task: Task, permit: Option<OwnedSemaphorePermit>) {
        let job = Job { store: self.clone(), claim, task, _permit: permit };
        let ready = self.sched.lock().submit(job);
        if let Some(job) = ready {
            self.dispatch(job);
        }
    }

    /// Hands a job that may run to the threads of its disk.
    fn dispatch(self: &Arc<Inner>, job: Job) {
        let disk = match &job.task {
            Task::Write(w) => self.locate(w.replica),
            Task::Create(c) => self.disks().home(c.replica.oid).cloned().ok_or_else(no_disks),
            Task::Exec(Exec { disk: Some(id), .. }) => self.disks().by_id(*id).cloned().ok_or_else(no_disks),
            Task::Exec(Exec { disk: None, .. }) => match job.claim.replica {
                Some(replica) => self.locate(replica),
                None => Err(no_disks()),
            },
        };
        let refused = match disk {
            Ok(disk) => {
                let small = matches!(&job.task, Task::Write(w) if w.data.len() < SMALL);
                let queue = if small { &disk.small } else { &disk.large };
                // Closed: the disk went out of service just now.
                queue.push(job).map_err(|job| (job, disk.path.clone()))
            }
            Err(_) => Err((job, PathBuf::new())),
        };
        if let Err((job, path)) = refused {
            let last = self.disks().is_empty();
            self.refuse(job, StoreError::DiskFailed { path, last });
        }
    }

    /// Ends a job that cannot run.
    fn refuse(self: &Arc<Inner>, job: Job, e: StoreError) {
        match job.task {
            Task::Write(w) => (w.done)(Err(e)),
            Task::Create(c) => (c.done)(Err(e)),
            Task::Exec(x) => (x.run)(self, Err(e)),
        }
        self.finish(&job.claim);
    }

    /// A job is done: lets those run that waited for it.
    pub(crate) fn finish(self: &Arc<Inner>, claim: &Claim) {
        let ready = self.sched.lock().finish(claim);
        for job in ready {
            self.dispatch(job);
        }
    }

    /// The claim of a write, and whether it covers whole fill units. A write into mapped blocks claims only these.
    fn write_claim(&self, replica: Replica, bytes: Range<u64>) -> (Claim, bool) {
        let mapped = !self.durable()
            || self.files.get(replica).is_some_and(|object| {
                // Never waits: a thread may hold the map while it reads it from the disk.
                let map = object.map.try_lock();
                map.is_some_and(|m| m.as_ref().is_some_and(|m| m.is_mapped(bytes.clone())))
            });
        let unit = if mapped { BLOCK } else { FILL_UNIT };
        let range = bytes.start / unit * unit..bytes.end.next_multiple_of(unit);
        (Claim::range(replica, range), !mapped)
    }

    /// Tries to do a write in this thread, if nothing overlapping is under way.
    fn write_inline(self: &Arc<Inner>, write: Write, mut claim: Claim) -> std::result::Result<(), Write> {
        if !self.sched.lock().try_claim(&mut claim) {
            return Err(write);
        }
        let result =
            self.locate(write.replica).and_then(|disk| crate::commit::write_now(self, &disk, &write));
        (write.done)(result);
        self.finish(&claim);
        Ok(())
    }

    fn submit_write(self: &Arc<Inner>, write: Write, permit: OwnedSemaphorePermit) {
        let mut write = write;
        let bytes = write.offset..write.offset + write.data.len() as u64;
        let (claim, rounded) = self.write_claim(write.replica, bytes);
        write.rounded = rounded;
        if !self.durable() && write.data.len() <= INLINE_WRITE {
            match self.write_inline(write, claim.clone()) {
                Ok(()) => return,
                Err(w) => write = w,
            }
        }
        self.submit(claim, Task::Write(write), Some(permit));
    }
}

/// The error of a store without disks.
pub(crate) fn no_disks() -> StoreError {
    StoreError::DiskFailed { path: PathBuf::new(), last: true }
}

/// Raises the limit of open files as far as allowed; how many objects (two files each) may then be kept open.
fn open_file_budget() -> usize {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 64 };
    let raised = setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok();
    let limit = if raised { hard } else { soft };
    (limit.saturating_sub(256) / 4).clamp(16, 1 << 20) as usize
}

fn units_of(len: usize) -> u32 {
    (1 + len / 4096).min(QUEUE_UNITS / 4) as u32
}

/// Objects in files on the disks of this node. Cheap to clone; dropping the last handle ends the threads once they
/// have finished what they accepted.
#[derive(Clone)]
pub struct Store {
    pub(crate) inner: Arc<Inner>,
    pub(crate) lacking: bool,
}

impl Store {
    /// Writes `data` at `offset` of an existing object whose file is `size` bytes long. Inodes and ledgers are kept
    /// sparse: zero blocks at the ends are punched out. Overlapping writes take effect in the order of these calls.
    pub async fn write(&self, replica: Replica, size: u64, offset: u64, data: Bytes) -> Result<()> {
        check_range(offset, data.len(), size)?;
        let permit = self.permit(data.len()).await?;
        let (tx, rx) = oneshot::channel();
        let done: Done<()> = Box::new(move |r| drop(tx.send(r)));
        self.inner.submit_write(Write { replica, offset, data, size, rounded: false, done }, permit);
        rx.await.unwrap_or(Err(StoreError::Closed))
    }

    /// As [`Store::write`], with a callback instead of a future. The callback runs on a disk's thread (under
    /// [`SyncMode::NoSync`] possibly on this one, before the call returns) and must not block or panic. If the queues
    /// are full it gets [`StoreError::Retry`].
    pub fn write_with(
        &self,
        replica: Replica,
        size: u64,
        offset: u64,
        data: Bytes,
        done: Box<dyn FnOnce(Result<()>) + Send>,
    ) {
        if let Err(e) = check_range(offset, data.len(), size) {
            return done(Err(e));
        }
        match self.inner.budget.clone().try_acquire_many_owned(units_of(data.len())) {
            Ok(permit) => {
                self.inner.submit_write(Write { replica, offset, data, size, rounded: false, done }, permit);
            }
            Err(_) => done(Err(StoreError::Retry(io::Error::from_raw_os_error(libc::EAGAIN)))),
        }
    }

    /// Creates the object with `data` at `offset` and zeros elsewhere, replacing an existing one atomically.
    pub async fn create(&self, replica: Replica, size: u64, offset: u64, data: Bytes) -> Result<()> {
        self.create_task(replica, size, offset, data, How::Replacing).await.map(drop)
    }

    /// As [`Store::create`], but leaves an existing working file alone and returns false.
    pub async fn create_if_absent(
        &self,
        replica: Replica,
        size: u64,
        offset: u64,
        data: Bytes,
    ) -> Result<bool> {
        self.create_task(replica, size, offset, data, How::IfAbsent).await
    }

    /// As [`Store::create_if_absent`] with all of an object that nobody waits for: in pieces of [`GENTLE_PIECE`](crate::GENTLE_PIECE),
    /// so that the requests of clients that come meanwhile wait for a piece only.
    pub async fn restore_gently(&self, replica: Replica, data: Bytes) -> Result<bool> {
        self.create_task(replica, data.len() as u64, 0, data, How::Gently).await
    }

    async fn create_task(
        &self,
        replica: Replica,
        size: u64,
        offset: u64,
        data: Bytes,
        how: How,
    ) -> Result<bool> {
        check_range(offset, data.len(), size)?;
        let permit = self.permit(data.len()).await?;
        let (tx, rx) = oneshot::channel();
        let done: Done<bool> = Box::new(move |r| drop(tx.send(r)));
        let create = Create { replica, offset, data, size, how, done };
        self.inner.submit(Claim::whole(replica), Task::Create(create), Some(permit));
        rx.await.unwrap_or(Err(StoreError::Closed))
    }

    async fn permit(&self, len: usize) -> Result<OwnedSemaphorePermit> {
        let permit = self.inner.budget.clone().acquire_many_owned(units_of(len)).await;
        permit.map_err(|_| StoreError::Closed)
    }

    /// Runs something on a disk's worker thread under a claim. Without `disk`, on the one that has the replica.
    pub(crate) async fn exec<T: Send + 'static>(
        &self,
        claim: Claim,
        disk: Option<DiskId>,
        run: impl FnOnce(&Arc<Inner>, &Arc<Disk>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let permit = self.permit(0).await?;
        let (tx, rx) = oneshot::channel();
        let run = Box::new(move |inner: &Arc<Inner>, disk: Result<&Arc<Disk>>| {
            drop(tx.send(disk.and_then(|d| run(inner, d))));
        });
        self.inner.submit(claim, Task::Exec(Exec { disk, run }), Some(permit));
        rx.await.unwrap_or(Err(StoreError::Closed))
    }

    /// Runs something on a worker thread of every disk at the same time; the first error wins.
    pub(crate) async fn exec_all<T: Send + 'static>(
        &self,
        run: impl Fn(&Arc<Inner>, &Arc<Disk>) -> Result<T> + Clone + Send + 'static,
    ) -> Result<Vec<T>> {
        let mut pending = Vec::new();
        for disk in self.inner.disks().all() {
            let (tx, rx) = oneshot::channel();
            let run = run.clone();
            let run = Box::new(move |inner: &Arc<Inner>, disk: Result<&Arc<Disk>>| {
                drop(tx.send(disk.and_then(|d| run(inner, d))));
            });
            self.inner.submit(Claim::free(), Task::Exec(Exec { disk: Some(disk.id), run }), None);
            pending.push((disk.clone(), rx));
        }
        let mut results = Vec::new();
        for (disk, rx) in pending {
            let result = rx.await.unwrap_or(Err(StoreError::Closed));
            let let_go = !disk.is_removed() && self.inner.disks().by_id(disk.id).is_none();
            // An unplugged disk that was let go meanwhile has nothing more to do.
            if result.is_ok() || !let_go {
                results.push(result);
            }
        }
        results.into_iter().collect()
    }

    /// Returns when every change submitted before has completed: the barrier at an epoch change.
    pub async fn drain(&self) {
        let waiter = self.inner.sched.lock().drain();
        if let Some(waiter) = waiter {
            let _ = waiter.await; // closed means finished too
        }
    }

    /// Writes back everything that [`SyncMode::NoSync`] left in the page cache.
    pub async fn flush(&self) -> Result<()> {
        self.drain().await;
        self.exec_all(|inner, disk| {
            nix::unistd::syncfs(&disk.flush).map_err(|e| inner.fault(disk, Oid(0), &e.into()))
        })
        .await
        .map(drop)
    }

    /// Takes a disk out of service; its directory is left untouched. False if there is no such disk.
    pub fn remove_disk(&self, path: &Path) -> bool {
        let id = self.inner.disks().disks.iter().find(|d| d.path == path).map(|d| d.id);
        id.is_some_and(|id| self.inner.detach(id))
    }

    /// Paths of the disks in service, in order.
    pub fn disk_paths(&self) -> Vec<PathBuf> {
        self.inner.disks().disks.iter().map(|d| d.path.clone()).collect()
    }

    /// When changes are acknowledged.
    pub fn sync_mode(&self) -> SyncMode {
        self.inner.options.sync
    }

    /// Length of the working file in bytes; none if there is none or it cannot be told.
    pub fn file_len(&self, replica: Replica) -> Option<u64> {
        let disk = self.inner.locate(replica).ok()?;
        disk.file(replica).metadata().ok().filter(|m| m.is_file()).map(|m| m.len())
    }

    /// Whether the working file, or if there is none the stale file for `epoch` ([`Store::stale_at`]), is shorter than `size`
    /// bytes. Data objects are created at their full length: such a file was cut off.
    pub fn is_cut_off(&self, replica: Replica, epoch: Epoch, size: u64) -> bool {
        let len = self.file_len(replica).or_else(|| {
            let name = StaleName { replica, epoch: self.stale_at(replica, epoch)? };
            let disk = self.inner.disks().by_id(self.inner.index.find_stale(name)?).cloned()?;
            disk.stale_file(name).metadata().ok().filter(|m| m.is_file()).map(|m| m.len())
        });
        len.is_some_and(|len| len < size)
    }

    /// Whether the working file exists.
    pub fn exists(&self, replica: Replica) -> bool {
        let mut looked_on = None;
        while let Ok(disk) = self.inner.locate(replica) {
            if disk.file(replica).is_file() {
                return true;
            }
            // It may have been moved meanwhile.
            if looked_on.replace(disk.id) == Some(disk.id) {
                return false;
            }
        }
        false
    }

    /// Whether a disk was missing at the start that had current objects: it had been plugged into the running node, or
    /// was still being drained.
    pub fn lacks_disk(&self) -> bool {
        self.lacking
    }

    /// Where the objects are in their disks.
    pub fn layout(&self) -> Layout {
        *self.inner.layout.lock()
    }

    /// All objects with a working or stale file, ascending, once each.
    pub fn list(&self) -> Vec<Oid> {
        self.inner.index.oids()
    }

    /// All working files, ascending.
    pub fn working(&self) -> Vec<Replica> {
        let mut all: Vec<_> = self.inner.index.all_working().into_iter().map(|(r, _)| r).collect();
        all.sort_unstable();
        all.dedup();
        all
    }
}

fn check_range(offset: u64, len: usize, size: u64) -> Result<()> {
    let fits = offset.checked_add(len as u64).is_some_and(|end| end <= size) && size <= MAX_FILE;
    if fits { Ok(()) } else { Err(StoreError::InvalidRange { offset, len: len as u64, size }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sheepdog_buffer::PageBuf;
    use sheepdog_proto::VdiId;

    #[tokio::test]
    async fn a_write_claims_its_fill_units_until_its_blocks_are_known_to_be_mapped() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (store, _) = Store::open(&[dir.path().join("d")], StoreOptions::default()).expect("open");
        let replica = Replica::whole(Oid::data(VdiId::new(1), 0));
        let claim = |bytes: Range<u64>| {
            let (claim, rounded) = store.inner.write_claim(replica, bytes);
            (claim.range, rounded)
        };
        store.create(replica, 1 << 20, 0, Bytes::from_static(b"x")).await.expect("create");
        assert_eq!(claim(69_632..73_728), (65_536..131_072, true), "not open");
        store.write(replica, 1 << 20, 69_632, PageBuf::copy_of(&[1; 4096]).freeze()).await.expect("write");
        let shared = store.inner.locate(replica).expect("disk").abilities;
        if !(shared.shared_flush && shared.direct) {
            assert_eq!(claim(69_632..73_728), (65_536..131_072, true), "never known here");
            return;
        }
        assert_eq!(claim(69_632..73_728), (69_632..73_728, false));
        assert_eq!(claim(69_633..69_634), (69_632..73_728, false), "whole blocks");
        assert_eq!(claim(65_536..131_072), (65_536..131_072, false), "filled with zeros");
        assert_eq!(claim(131_000..131_100), (65_536..196_608, true), "the second unit is not");
    }
}
