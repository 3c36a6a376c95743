//! Writing into existing files: the committer of a disk, and the batch that it and the workers perform.
//!
//! A batch is everything queued, at most 64 requests or 8 MiB: no timer, the flush in progress is the delay. All writes
//! of a batch are performed first; then the files whose metadata matter are synced one by one, or, if there is none, the
//! device is flushed once; only then is anything acknowledged. The scheduler guarantees that no two jobs overlap.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use nix::fcntl::{FallocateFlags, fallocate};
use sheepdog_buffer::{PAGE, PageBuf, zeros};

use crate::Result;
use crate::disk::Disk;
use crate::error::StoreError;
use crate::name::Replica;
use crate::object::OpenObject;
use crate::queue::{Job, Task, Write};
use crate::sched::Claim;
use crate::store::{FILL_UNIT, Inner};
use crate::sys::rw;
use crate::sys::uring::{BatchWrite, DEPTH, Ring};
use crate::trim::{BLOCK, trim_zeros};

/// Most payload of a batch, in bytes.
pub(crate) const BATCH_BYTES: usize = 8 << 20;

/// The committer thread of a disk.
pub(crate) fn run(disk: Arc<Disk>) {
    let mut ring = Ring::new();
    let more = |batch: &[Job], next: &Job| {
        batch.len() < DEPTH && batch.iter().map(Job::len).sum::<usize>() + next.len() <= BATCH_BYTES
    };
    while let Some(jobs) = disk.small.take(more) {
        write_batch(&disk, &mut ring, jobs);
    }
}

/// Performs write jobs together and completes them.
pub(crate) fn write_batch(disk: &Arc<Disk>, ring: &mut Option<Ring>, jobs: Vec<Job>) {
    let nr = jobs.len();
    let mut slots: Vec<Slot> = jobs.into_iter().filter_map(|job| Slot::new(disk, job, nr)).collect();
    perform(&mut slots, ring);
    make_durable(disk, &mut slots);
    for slot in slots {
        slot.complete(disk);
    }
}

/// Performs one write without making it durable, for [`crate::SyncMode::NoSync`].
pub(crate) fn write_now(inner: &Arc<Inner>, disk: &Arc<Disk>, write: &Write) -> Result<()> {
    let fault = |e: &io::Error| inner.fault(disk, write.replica.oid, e);
    let plan = Plan::new(inner, disk, write, 1).map_err(|e| e.into_error(fault))?;
    plan.write().map_err(|e| fault(&e))?;
    plan.account(inner, disk, write.replica);
    Ok(())
}

/// Why a write could not be prepared.
enum Unready {
    Io(io::Error),
    Hook(io::Error),
}

impl From<io::Error> for Unready {
    fn from(e: io::Error) -> Self {
        Unready::Io(e)
    }
}

impl Unready {
    fn into_error(self, fault: impl FnOnce(&io::Error) -> StoreError) -> StoreError {
        match self {
            Unready::Io(e) => fault(&e),
            Unready::Hook(e) => StoreError::Io(e),
        }
    }
}

/// How a write is performed.
struct Plan {
    object: Arc<OpenObject>,
    /// What to write, one after the other, from `at`.
    parts: Vec<Bytes>,
    at: u64,
    /// Bytes written.
    len: u64,
    /// Through the `O_DIRECT` descriptor.
    direct: bool,
    /// A device flush is enough to make it durable.
    shared: bool,
}

impl Plan {
    fn new(inner: &Inner, disk: &Disk, write: &Write, batch: usize) -> std::result::Result<Plan, Unready> {
        let replica = write.replica;
        let object = inner.files.open(replica, disk.id, || disk.file(replica).into())?;
        if let Some(hook) = &inner.options.write_hook {
            hook.before_write(replica, false, write.offset, &write.data).map_err(Unready::Hook)?;
        }
        let sparse = replica.oid.is_sparse();
        let keep = if sparse { trim_zeros(write.offset, &write.data) } else { 0..write.data.len() };
        let bytes = write.offset + keep.start as u64..write.offset + keep.end as u64;
        let punched = keep.len() < write.data.len();
        if punched {
            punch_ends(&object, write, &bytes)?;
        }
        let mut plan = Plan {
            object,
            parts: vec![write.data.slice(keep)],
            at: bytes.start,
            len: bytes.end - bytes.start,
            direct: false,
            shared: false,
        };
        if inner.durable() {
            plan.look_up(disk, bytes, write.rounded && !sparse, punched)?;
        }
        plan.choose_path(inner, disk, batch);
        Ok(plan)
    }

    /// Decides what makes the write durable, and rounds out a first touch.
    fn look_up(&mut self, disk: &Disk, bytes: Range<u64>, fill: bool, punched: bool) -> io::Result<()> {
        if !disk.abilities.shared_flush {
            return Ok(());
        }
        let mut slot = self.object.map.lock();
        self.object.seed_map(&mut slot)?;
        let Some(map) = slot.as_mut() else { return Ok(()) };
        let mapped = map.is_mapped(bytes.clone());
        self.shared = mapped && !punched;
        if !mapped && fill && bytes.start.is_multiple_of(BLOCK) && bytes.end.is_multiple_of(BLOCK) {
            let outer = map.round_out(bytes.clone(), FILL_UNIT);
            self.at = outer.start;
            self.len = outer.end - outer.start;
            let head = zero_pages((bytes.start - outer.start) as usize);
            let tail = zero_pages((outer.end - bytes.end) as usize);
            self.parts.insert(0, head);
            self.parts.push(tail);
        }
        map.begin_write(self.at..self.at + self.len);
        Ok(())
    }

    /// `O_DIRECT` where possible, unless the object is being read and the batch is small.
    fn choose_path(&mut self, inner: &Inner, disk: &Disk, batch: usize) {
        self.parts.retain(|p| !p.is_empty());
        let wanted = if inner.durable() {
            inner.options.direct_io || batch > 2 || !self.object.read_recently()
        } else {
            inner.options.direct_io
        };
        let aligned = self.at.is_multiple_of(BLOCK) && self.len.is_multiple_of(BLOCK);
        if !wanted || !aligned || self.len == 0 || !disk.abilities.direct || self.object.direct().is_none() {
            return;
        }
        for part in &mut self.parts {
            if !(part.as_ptr() as usize).is_multiple_of(PAGE) {
                *part = PageBuf::copy_of(part).freeze();
            }
        }
        self.direct = true;
    }

    fn file(&self) -> &File {
        match self.object.direct() {
            Some(direct) if self.direct => direct,
            _ => &self.object.file,
        }
    }

    fn write(&self) -> io::Result<()> {
        if self.parts.is_empty() { Ok(()) } else { rw::write_all(self.file(), &self.parts, self.at) }
    }

    /// Accounts what is allocated to the file now, where the write may have changed it.
    fn account(&self, inner: &Inner, disk: &Disk, replica: Replica) {
        let preallocated = !inner.durable() && !replica.oid.is_sparse();
        if !self.shared && !preallocated {
            let bytes = self.object.file.metadata().map_or(0, |m| m.blocks() * 512);
            inner.index.account(replica, disk.id, bytes);
        }
    }
}

/// Up to 64 KiB of page-aligned zeros.
fn zero_pages(len: usize) -> Bytes {
    static ZEROS: LazyLock<Bytes> = LazyLock::new(|| PageBuf::zeroed(FILL_UNIT as usize).freeze());
    ZEROS.slice(..len)
}

/// Punches out the trimmed ends of a write to a sparse file.
fn punch_ends(object: &OpenObject, write: &Write, kept: &Range<u64>) -> io::Result<()> {
    let end = write.offset + write.data.len() as u64;
    // The partial last block of the file is freed too.
    let to = if end == write.size { end.next_multiple_of(BLOCK) } else { end };
    punch(object, write.offset..kept.start)?;
    if kept.end < end {
        punch(object, kept.end..to)?;
    }
    Ok(())
}

fn punch(object: &OpenObject, range: Range<u64>) -> io::Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    if let Some(map) = object.map.lock().as_mut() {
        map.begin_punch(range.clone());
    }
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match fallocate(&object.file, flags, range.start as i64, (range.end - range.start) as i64) {
        Ok(()) => Ok(()),
        Err(nix::errno::Errno::EOPNOTSUPP | nix::errno::Errno::ENOSYS) => write_zeros(object, range),
        Err(e) => Err(e.into()),
    }
}

/// Where holes cannot be punched: zeros, but not past the end of the file.
fn write_zeros(object: &OpenObject, range: Range<u64>) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let end = range.end.min(object.file.metadata()?.len());
    let mut at = range.start;
    while at < end {
        let len = (end - at).min(FILL_UNIT);
        object.file.write_all_at(&zeros(len as usize), at)?;
        at += len;
    }
    Ok(())
}

/// A write of a batch on its way.
struct Slot {
    store: Arc<Inner>,
    claim: Claim,
    write: Write,
    plan: std::result::Result<Plan, Unready>,
    outcome: io::Result<()>,
}

impl Slot {
    fn new(disk: &Arc<Disk>, job: Job, batch: usize) -> Option<Slot> {
        let Task::Write(write) = job.task else { return None };
        let plan = match disk.is_removed() {
            true => Err(Unready::Io(io::Error::from_raw_os_error(libc::ENODEV))),
            false => Plan::new(&job.store, disk, &write, batch),
        };
        Some(Slot { store: job.store, claim: job.claim, write, plan, outcome: Ok(()) })
    }

    /// The plan, unless the write failed already.
    fn live(&self) -> Option<&Plan> {
        self.plan.as_ref().ok().filter(|_| self.outcome.is_ok())
    }

    fn complete(self, disk: &Arc<Disk>) {
        let Slot { store, claim, write, plan, outcome } = self;
        let fault = |e: &io::Error| store.fault(disk, write.replica.oid, e);
        let mut result = match plan {
            Err(unready) => Err(unready.into_error(fault)),
            Ok(plan) => {
                plan.account(&store, disk, write.replica);
                outcome.map_err(|e| fault(&e))
            }
        };
        if result.is_ok() && disk.is_removed() {
            // The disk went out of service meanwhile: nobody will read what was written.
            result = Err(store.disk_failed(disk));
        }
        (write.done)(result);
        store.finish(&claim);
    }
}

/// Performs all writes of a batch; several direct ones at the same time.
fn perform(slots: &mut [Slot], ring: &mut Option<Ring>) {
    let direct: Vec<usize> =
        (0..slots.len()).filter(|i| slots[*i].live().is_some_and(|p| p.direct)).collect();
    let done = if direct.len() > 1 { perform_direct(slots, &direct, ring) } else { false };
    for slot in slots.iter_mut() {
        let Some(plan) = slot.live() else { continue };
        if plan.direct && done {
            continue;
        }
        let mut outcome = plan.write();
        if outcome.is_ok() && plan.shared && !plan.direct {
            outcome = rw::start_write_back(&plan.object.file, plan.at, plan.len);
        }
        slot.outcome = outcome;
    }
    for slot in slots.iter_mut() {
        if let Some(plan) = slot.live()
            && plan.shared
            && !plan.direct
        {
            slot.outcome = rw::wait_write_back(&plan.object.file, plan.at, plan.len);
        }
    }
}

/// Through the ring; false if there is none. A ring that fails takes the batch with it and is given up.
fn perform_direct(slots: &mut [Slot], which: &[usize], ring: &mut Option<Ring>) -> bool {
    let Some(working) = ring.as_mut() else { return false };
    let writes: Vec<BatchWrite<'_>> = which
        .iter()
        .filter_map(|i| slots[*i].live())
        .map(|p| BatchWrite { file: p.file(), parts: &p.parts, offset: p.at })
        .collect();
    let outcome = working.write_batch(&writes);
    drop(writes);
    match outcome {
        Ok(results) => {
            for (i, result) in which.iter().zip(results) {
                slots[*i].outcome = result;
            }
        }
        Err(e) => {
            tracing::error!("io_uring failed, going on without: {e}");
            *ring = None;
            for i in which {
                slots[*i].outcome = Err(io::Error::from_raw_os_error(libc::EAGAIN));
            }
        }
    }
    true
}

/// Syncs the files that need it, else flushes the device once, and records what is mapped now.
fn make_durable(disk: &Arc<Disk>, slots: &mut [Slot]) {
    if !slots.first().is_some_and(|s| s.store.durable()) {
        return;
    }
    let mut synced: Vec<(Arc<OpenObject>, io::Result<()>)> = Vec::new();
    for slot in slots.iter() {
        let Some(plan) = slot.live() else { continue };
        if !plan.shared && !synced.iter().any(|(o, _)| Arc::ptr_eq(o, &plan.object)) {
            synced.push((plan.object.clone(), plan.object.file.sync_data()));
        }
    }
    let flushed = match synced.iter().any(|(_, r)| r.is_ok()) {
        true => Ok(()),
        false if slots.iter().any(|s| s.live().is_some_and(|p| p.shared)) => disk.flush.sync_data(),
        false => Ok(()),
    };
    for slot in slots.iter_mut() {
        let Some(plan) = slot.live() else { continue };
        let result = match synced.iter().find(|(o, _)| !plan.shared && Arc::ptr_eq(o, &plan.object)) {
            Some((_, result)) => result,
            None => &flushed,
        };
        let outcome = result.as_ref().map(drop).map_err(crate::error::duplicate_io);
        let mut slot_map = plan.object.map.lock();
        match (&outcome, slot_map.as_mut()) {
            (Ok(()), Some(map)) if !plan.shared => map.commit(plan.at..plan.at + plan.len),
            // What the kernel could not write back it may have dropped: know nothing any more.
            (Err(_), _) => *slot_map = None,
            _ => {}
        }
        drop(slot_map);
        slot.outcome = outcome;
    }
}
