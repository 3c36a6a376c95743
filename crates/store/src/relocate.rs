//! Moving misplaced files to their own disk (spec 03, section 15).
//!
//! After a disk was plugged, unplugged, dropped or mounted elsewhere, the ring sends objects to other disks than they
//! lie on. The index finds them where they are. The source is unlinked only when the target is complete and durable,
//! nothing else touches the object meanwhile, and nothing changes the target before the unlink is durable: should a
//! power cut bring the source back, it equals the target.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use sheepdog_buffer::{PageBuf, is_zero};
use sheepdog_proto::Oid;

use crate::Result;
use crate::create::{extend, reserve_of, temporary_path};
use crate::disk::{Disk, allocated, sync_dir};
use crate::error::StoreError;
use crate::index::DiskId;
use crate::name::{Replica, StaleName};
use crate::read::read_zero_filled;
use crate::sched::Claim;
use crate::store::{Inner, Store};
use crate::trim::BLOCK;

/// Outcome of [`Store::settle`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SettleReport {
    /// Files moved to their own disk.
    pub moved: usize,
    /// Files left where they are because of an error; they are served from there.
    pub failed: usize,
    /// Those among them that cannot be read.
    pub stuck: Vec<Stuck>,
}

/// A file that cannot be moved because it cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stuck {
    pub(crate) disk: DiskId,
    /// The replica.
    pub replica: Replica,
    /// Its name, if the file is a stale one.
    pub stale: Option<StaleName>,
}

/// What became of one file.
enum Outcome {
    Moved,
    /// It is not there any more, or at home.
    Nothing,
    Unreadable(StoreError),
}

impl Store {
    /// Moves every misplaced working and stale file to its own disk, one after the other.
    pub async fn settle(&self) -> SettleReport {
        let mut report = SettleReport::default();
        // Creates that were sent to their disks before the ring changed.
        self.drain().await;
        let set = self.inner.disks();
        let away = |oid: Oid, id: u16| set.home(oid).is_some_and(|h| h.id != id);
        let working = self.inner.index.all_working();
        let stale = self.inner.index.all_stale();
        let working = working.into_iter().filter(|(r, id)| away(r.oid, *id)).map(|(r, id)| (r, None, id));
        let stale = stale
            .into_iter()
            .filter(|(n, id)| away(n.replica.oid, *id))
            .map(|(n, id)| (n.replica, Some(n), id));
        for (replica, name, id) in working.chain(stale) {
            let outcome = self
                .exec(Claim::whole(replica), Some(id), move |inner, from| {
                    relocate(inner, from, replica, name)
                })
                .await;
            let error = match outcome {
                Ok(Outcome::Moved) => {
                    report.moved += 1;
                    continue;
                }
                Ok(Outcome::Nothing) => continue,
                Ok(Outcome::Unreadable(e)) => {
                    report.stuck.push(Stuck { disk: id, replica, stale: name });
                    e
                }
                Err(e) => e,
            };
            tracing::error!("cannot move {replica} to its own disk: {error}");
            report.failed += 1;
        }
        report
    }
}

/// Moves one file.
fn relocate(
    inner: &Arc<Inner>,
    from: &Arc<Disk>,
    replica: Replica,
    stale: Option<StaleName>,
) -> Result<Outcome> {
    let to = inner.disks().home(replica.oid).cloned().ok_or(StoreError::NoObject)?;
    let holders = match stale {
        None => inner.index.working_on(replica),
        Some(name) => inner.index.stale_on(name),
    };
    if to.id == from.id || !holders.contains(&from.id) {
        return Ok(Outcome::Nothing);
    }
    let source = match stale {
        None => from.file(replica),
        Some(name) => from.stale_file(name),
    };
    // Only the preferred copy is current; any other one is dropped in its favour.
    if holders.first() == Some(&from.id) {
        match copy_home(inner, &to, replica, stale, &source) {
            Ok(()) => {}
            Err(CopyError::Target(e)) => return Err(inner.fault(&to, replica.oid, &e)),
            Err(CopyError::Source(e)) => {
                // Old states are purged at any time.
                if let Some(name) =
                    stale.filter(|_| e.kind() == io::ErrorKind::NotFound && from.path.is_dir())
                {
                    inner.index.remove_stale(name, from.id);
                    return Ok(Outcome::Nothing);
                }
                return match inner.fault(from, replica.oid, &e) {
                    e @ (StoreError::Io(_) | StoreError::NoObject) => Ok(Outcome::Unreadable(e)),
                    e => Err(e),
                };
            }
        }
    }
    inner.files.forget(replica);
    unlink(inner, from, replica, stale, &source).map_err(|e| inner.fault(from, replica.oid, &e))?;
    inner.files.forget(replica);
    Ok(Outcome::Moved)
}

/// Which disk is to blame.
enum CopyError {
    Source(io::Error),
    Target(io::Error),
}

/// Makes the file of `to` that of `from`, durably, and prefers it from then on.
fn copy_home(
    inner: &Arc<Inner>,
    to: &Arc<Disk>,
    replica: Replica,
    stale: Option<StaleName>,
    source: &Path,
) -> std::result::Result<(), CopyError> {
    use CopyError::{Source, Target};
    let needs = fs::metadata(source).map_err(Source)?.blocks() * 512;
    // Moves leave as much room as recovery does.
    let reserve = reserve_of(inner, to).saturating_mul(2);
    if reserve > 0 && to.free().map_err(Target)? < reserve.saturating_add(needs) {
        return Err(Target(io::Error::from_raw_os_error(libc::ENOSPC)));
    }
    let (target, dir) = match stale {
        None => (to.file(replica), to.dir(replica)),
        Some(name) => (to.stale_file(name), to.stale_dir()),
    };
    let temporary = temporary_path(&to.file(replica));
    let copied = copy(source, &temporary, replica.oid.is_sparse())
        .and_then(|()| fs::rename(&temporary, &target).map_err(Target));
    if let Err(e) = copied {
        let _ = fs::remove_file(&temporary); // the next scan removes it otherwise
        return Err(e);
    }
    sync_dir(&dir).map_err(Target)?;
    match stale {
        None => inner.index.add(replica, to.id, true, allocated(&target)),
        Some(name) => inner.index.add_stale(name, to.id),
    }
    if to.is_removed() {
        // It failed meanwhile: the source is all there is.
        match stale {
            None => inner.index.remove(replica, to.id),
            Some(name) => inner.index.remove_stale(name, to.id),
        }
        return Err(Target(io::Error::from_raw_os_error(libc::EAGAIN)));
    }
    Ok(())
}

/// Removes the source, durably before anybody writes to the target.
fn unlink(
    inner: &Inner,
    from: &Disk,
    replica: Replica,
    stale: Option<StaleName>,
    source: &Path,
) -> io::Result<()> {
    let dir = match stale {
        None => from.dir(replica),
        Some(_) => from.stale_dir(),
    };
    fs::remove_file(source)?;
    match stale {
        None => inner.index.remove(replica, from.id),
        Some(name) => inner.index.remove_stale(name, from.id),
    }
    sync_dir(&dir)
}

/// Copies content and attributes, durably; zero blocks of sparse files stay holes.
fn copy(source: &Path, target: &Path, sparse: bool) -> std::result::Result<(), CopyError> {
    use CopyError::{Source, Target};
    let from = File::open(source).map_err(Source)?;
    let size = from.metadata().map_err(Source)?.len();
    let to = OpenOptions::new().write(true).create_new(true).mode(0o660).open(target).map_err(Target)?;
    extend(&to, size, sparse).map_err(Target)?;
    let mut buf = PageBuf::dirty(1 << 20);
    let mut offset = 0;
    while offset < size {
        let len = (size - offset).min(buf.len() as u64) as usize;
        read_zero_filled(&from, &mut buf[..len], offset).map_err(Source)?;
        let step = if sparse { BLOCK as usize } else { len };
        for (i, block) in buf[..len].chunks(step).enumerate() {
            if !sparse || !is_zero(block) {
                to.write_all_at(block, offset + (i * step) as u64).map_err(Target)?;
            }
        }
        offset += len as u64;
    }
    for name in xattr::list(source).map_err(Source)? {
        if let Some(value) = xattr::get(source, &name).map_err(Source)? {
            // Attributes only save work; what the target refuses is not needed.
            let _ = xattr::set(target, &name, &value);
        }
    }
    to.sync_all().map_err(Target)
}
