//! Moving misplaced files to their own disk (spec 03, section 15).
//!
//! After a disk was added, dropped or mounted elsewhere, the ring sends objects to other disks than they lie on. The
//! index finds them where they are; moving them is tidying up. The source is unlinked only when the target is complete
//! and durable, and nothing else touches the object meanwhile.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use sheepdog_buffer::{PageBuf, is_zero};
use sheepdog_proto::Oid;

use crate::Result;
use crate::create::{extend, temporary_path};
use crate::disk::{Disk, allocated, sync_dir};
use crate::error::StoreError;
use crate::name::{Replica, StaleName};
use crate::read::read_zero_filled;
use crate::sched::Claim;
use crate::store::{Inner, Store};
use crate::trim::BLOCK;

/// Outcome of [`Store::settle`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SettleReport {
    /// Files moved to their own disk.
    pub moved: usize,
    /// Files left where they are because of an error; they are served from there.
    pub failed: usize,
}

impl Store {
    /// Moves every misplaced working and stale file to its own disk, one after the other.
    pub async fn settle(&self) -> SettleReport {
        let mut report = SettleReport::default();
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
            let moved = self
                .exec(Claim::whole(replica), Some(id), move |inner, from| {
                    relocate(inner, from, replica, name)
                })
                .await;
            match moved {
                Ok(true) => report.moved += 1,
                Ok(false) => {}
                Err(e) => {
                    tracing::error!("cannot move {replica} to its own disk: {e}");
                    report.failed += 1;
                }
            }
        }
        report
    }
}

/// Moves one file; false if there is nothing to do any more.
fn relocate(
    inner: &Arc<Inner>,
    from: &Arc<Disk>,
    replica: Replica,
    stale: Option<StaleName>,
) -> Result<bool> {
    let to = inner.disks().home(replica.oid).cloned().ok_or(StoreError::NoObject)?;
    if to.id == from.id {
        return Ok(false);
    }
    let path_in = |disk: &Disk| stale.map_or_else(|| disk.file(replica), |name| disk.stale_file(name));
    let (source, target) = (path_in(from), path_in(&to));
    let sparse = replica.oid.is_sparse();
    if !target.exists() {
        let temporary = temporary_path(&to.file(replica));
        let copied = copy(&source, &temporary, sparse)
            .and_then(|()| fs::rename(&temporary, &target).map_err(CopyError::Target));
        if let Err(e) = copied {
            let _ = fs::remove_file(&temporary); // the next scan removes it otherwise
            return Err(match e {
                CopyError::Source(e) => inner.fault(from, replica.oid, &e),
                CopyError::Target(e) => inner.fault(&to, replica.oid, &e),
            });
        }
    }
    let dir = if stale.is_some() { to.stale_dir() } else { to.dir(replica) };
    sync_dir(&dir).map_err(|e| inner.fault(&to, replica.oid, &e))?;
    match stale {
        None => inner.index.add(replica, to.id, true, allocated(&target)),
        Some(name) => inner.index.add_stale(name, to.id),
    }
    inner.files.forget(replica);
    fs::remove_file(&source).map_err(|e| inner.fault(from, replica.oid, &e))?;
    match stale {
        None => {
            inner.index.remove(replica, from.id);
            from.mark_dirty(from.dir(replica));
        }
        Some(name) => {
            inner.index.remove_stale(name, from.id);
            from.mark_dirty(from.stale_dir());
        }
    }
    inner.files.forget(replica);
    Ok(true)
}

/// Which disk is to blame.
enum CopyError {
    Source(io::Error),
    Target(io::Error),
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
