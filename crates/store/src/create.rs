//! Creating objects (spec 03, section 8; spec 06, W-08).
//!
//! A file is complete and durable under a temporary name of its own before it gets its real one, so a create never
//! reports success for what somebody else stored, and a crash leaves the old object, the new one, or none. The sync of
//! the directory is shared by the creates of a batch.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bytes::Bytes;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, FallocateFlags, RenameFlags, fallocate, renameat2};
use sheepdog_buffer::{PAGE, is_zero};

use crate::Result;
use crate::disk::{Disk, allocated, sync_dir};
use crate::error::StoreError;
use crate::object::reopen_direct;
use crate::queue::{Create, How, Job, Task};
use crate::sched::Claim;
use crate::store::Inner;
use crate::sys::rw;
use crate::trim::{BLOCK, trim_zeros};
use crate::worker::SMALL;

/// What creates leave free by default: a 200th of the disk, at most this many bytes.
const MAX_RESERVE: u64 = 64 << 20;

/// Bytes of a piece of what is copied gently: the device works on one piece at a time, and a client's request waits for a
/// piece, not for an object (docs/reliability.md compares sizes).
pub const GENTLE_PIECE: usize = 256 << 10;

struct Slot {
    store: Arc<Inner>,
    claim: Claim,
    create: Create,
    /// Whether the file is there under its name now.
    outcome: Result<bool>,
}

/// Performs create jobs and completes them.
pub(crate) fn create_batch(disk: &Arc<Disk>, jobs: Vec<Job>) {
    let mut slots: Vec<Slot> = Vec::new();
    for job in jobs {
        let Task::Create(create) = job.task else { continue };
        let outcome = create_file(&job.store, disk, &create);
        slots.push(Slot { store: job.store, claim: job.claim, create, outcome });
    }
    let mut dirs: BTreeMap<PathBuf, io::Result<()>> = BTreeMap::new();
    for slot in &slots {
        if slot.store.durable() && matches!(slot.outcome, Ok(true)) {
            let dir = disk.dir(slot.create.replica);
            dirs.entry(dir).or_insert_with_key(|dir| sync_dir(dir));
        }
    }
    for mut slot in slots {
        if let (Ok(true), Some(Err(e))) = (&slot.outcome, dirs.get(&disk.dir(slot.create.replica))) {
            slot.outcome = Err(take_back(&slot, disk, e));
        }
        slot.complete(disk);
    }
}

impl Slot {
    fn complete(self, disk: &Arc<Disk>) {
        let Slot { store, claim, create, mut outcome } = self;
        if outcome.is_ok() && disk.is_removed() {
            outcome = Err(store.disk_failed(disk));
        }
        if matches!(outcome, Ok(true)) {
            remove_elsewhere(&store, disk, &create);
        }
        (create.done)(outcome);
        store.finish(&claim);
    }
}

/// The directory could not be synced: the object must not seem to exist.
fn take_back(slot: &Slot, disk: &Arc<Disk>, e: &io::Error) -> StoreError {
    let replica = slot.create.replica;
    if let Err(e) = fs::remove_file(disk.file(replica)) {
        tracing::error!("cannot take back {replica}: {e}");
    }
    slot.store.files.forget(replica);
    slot.store.index.remove(replica, disk.id);
    slot.store.fault(disk, replica.oid, e)
}

/// Copies of the replica on other disks are old now.
fn remove_elsewhere(store: &Arc<Inner>, disk: &Disk, create: &Create) {
    let replica = create.replica;
    for id in store.index.working_on(replica).into_iter().filter(|id| *id != disk.id) {
        if let Some(other) = store.disks().by_id(id) {
            match fs::remove_file(other.file(replica)) {
                // Before anybody writes to the new one: a power cut must not bring back what differs from it.
                Ok(()) if store.durable() => {
                    if let Err(e) = sync_dir(&other.dir(replica)) {
                        tracing::error!("cannot sync {}: {e}", other.path.display());
                    }
                }
                Ok(()) => other.mark_dirty(other.dir(replica)),
                Err(e) => tracing::error!("cannot remove misplaced {}: {e}", other.file(replica).display()),
            }
        }
        store.index.remove(replica, id);
    }
}

/// Bytes that creates leave free on a disk.
pub(crate) fn reserve_of(store: &Inner, disk: &Disk) -> u64 {
    store.options.reserve.unwrap_or((disk.size / 200).min(MAX_RESERVE))
}

/// Everything but the sync of the directory.
fn create_file(store: &Arc<Inner>, disk: &Arc<Disk>, create: &Create) -> Result<bool> {
    let replica = create.replica;
    if disk.is_removed() {
        return Err(store.disk_failed(disk));
    }
    let if_absent = create.how != How::Replacing;
    if if_absent && store.locate(replica).is_ok_and(|d| d.file(replica).is_file()) {
        return Ok(false);
    }
    let reserve = reserve_of(store, disk);
    // Recovery must leave room for clients.
    let reserve = if if_absent { reserve.saturating_mul(2) } else { reserve };
    let needs = if replica.oid.is_sparse() { create.data.len() as u64 } else { create.size };
    let free = disk.free().map_err(|e| store.fault(disk, replica.oid, &e))?;
    if reserve > 0 && free < reserve.saturating_add(needs) {
        tracing::error!("diskfull, oid={}", replica.oid);
        return Err(StoreError::NoSpace);
    }
    if let Some(hook) = &store.options.write_hook {
        hook.before_write(replica, true, create.offset, &create.data).map_err(StoreError::Io)?;
    }
    let path = disk.file(replica);
    let temporary = temporary_path(&path);
    let made = fill(&temporary, create, store.durable())
        .and_then(|()| publish(&temporary, &path, if_absent))
        .map_err(|e| store.fault(disk, replica.oid, &e));
    if !matches!(made, Ok(true)) {
        let _ = fs::remove_file(&temporary); // never created, or cleaned by the next scan
    }
    let new = made?;
    if new {
        store.files.forget(replica);
        store.index.add(replica, disk.id, true, allocated(&path));
    }
    Ok(new)
}

/// A name of its own, which the original's start and ours clean up.
pub(crate) fn temporary_path(path: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let n = NEXT.fetch_add(1, Relaxed);
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}-{n}.tmp", std::process::id()));
    name.into()
}

/// Makes the temporary file with its full size and content.
fn fill(path: &Path, create: &Create, durable: bool) -> io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o660).open(path)?;
    let (size, data, sparse) = (create.size, &create.data, create.replica.oid.is_sparse());
    let whole = create.offset == 0 && data.len() as u64 == size;
    // A whole object of zeros is a preallocation: written out, its blocks need no first touch later.
    let keep = match whole && !sparse && is_zero(data) {
        true => 0..data.len(),
        false => trim_zeros(create.offset, data),
    };
    let at = create.offset + keep.start as u64;
    if keep.len() as u64 != size {
        extend(&file, size, sparse)?;
    }
    let piece = if create.how == How::Gently { GENTLE_PIECE } else { usize::MAX };
    store_bytes(&file, data.slice(keep), at, durable, piece)?;
    if durable { file.sync_all() } else { Ok(()) }
}

/// Gives a file its full size: sparse, or preallocated where the file system can.
pub(crate) fn extend(file: &File, size: u64, sparse: bool) -> io::Result<()> {
    if !sparse && size > 0 {
        match fallocate(file, FallocateFlags::empty(), 0, size as i64) {
            Ok(()) => return Ok(()),
            Err(Errno::ENOSYS | Errno::EOPNOTSUPP) => {}
            Err(e) => return Err(e.into()),
        }
    }
    file.set_len(size)
}

/// Writes the payload; large aligned ones directly to the device, at most `piece` bytes at once.
fn store_bytes(file: &File, data: Bytes, at: u64, durable: bool, piece: usize) -> io::Result<()> {
    let aligned = at.is_multiple_of(BLOCK)
        && (data.len() as u64).is_multiple_of(BLOCK)
        && (data.as_ptr() as usize).is_multiple_of(PAGE);
    if durable
        && aligned
        && data.len() >= SMALL
        && let Ok(direct) = reopen_direct(file)
        && write_pieces(&direct, &data, at, piece).is_ok()
    {
        return Ok(());
    }
    // Also after a failed direct write: the page cache's path reports what is really wrong.
    file.write_all_at(&data, at)
}

fn write_pieces(file: &File, data: &Bytes, at: u64, piece: usize) -> io::Result<()> {
    let mut done = 0;
    while done < data.len() {
        let end = done.saturating_add(piece).min(data.len());
        rw::write_all(file, &[data.slice(done..end)], at + done as u64)?;
        done = end;
    }
    Ok(())
}

/// Gives the file its name; false if the name is taken and must be left alone.
fn publish(temporary: &Path, path: &Path, if_absent: bool) -> io::Result<bool> {
    if !if_absent {
        return fs::rename(temporary, path).map(|()| true);
    }
    match renameat2(AT_FDCWD, temporary, AT_FDCWD, path, RenameFlags::RENAME_NOREPLACE) {
        Ok(()) => Ok(true),
        Err(Errno::EEXIST) => Ok(false),
        Err(Errno::EINVAL | Errno::ENOSYS) => match fs::hard_link(temporary, path) {
            Ok(()) => fs::remove_file(temporary).map(|()| true),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(e) => Err(e),
        },
        Err(e) => Err(e.into()),
    }
}
