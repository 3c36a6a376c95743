//! From an errno to an outcome: is it the object, or the disk? (spec 03, section 10; spec 06, W-17)

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::statvfs::{FsFlags, statvfs};
use sheepdog_proto::Oid;

use crate::disk::Disk;
use crate::error::{Fault, StoreError, duplicate_io, fault_of, strerror};
use crate::store::{Inner, Store};

/// Medium errors on that many objects within [`MEDIUM_WINDOW`] condemn a disk.
const MEDIUM_LIMIT: usize = 4;
const MEDIUM_WINDOW: Duration = Duration::from_secs(60);

/// A disk was taken out of service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskFailure {
    /// The disk.
    pub path: PathBuf,
    /// Whether no disk is left.
    pub last: bool,
}

/// Recent medium errors of a disk, by object.
#[derive(Debug, Default)]
pub(crate) struct MediumErrors(BTreeMap<Oid, Instant>);

impl MediumErrors {
    /// Notes an error; true if there are now too many to blame the objects.
    pub(crate) fn note(&mut self, oid: Oid, at: Instant) -> bool {
        self.0.retain(|_, seen| at.duration_since(*seen) < MEDIUM_WINDOW);
        self.0.insert(oid, at);
        self.0.len() >= MEDIUM_LIMIT
    }
}

impl Inner {
    /// Maps an I/O error on an object of `disk`; takes the disk out of service if the disk is to blame.
    pub(crate) fn fault(self: &Arc<Inner>, disk: &Arc<Disk>, oid: Oid, e: &io::Error) -> StoreError {
        match fault_of(e) {
            Fault::Absent | Fault::Medium | Fault::Object if !disk.path.is_dir() => {
                tracing::error!("{} corrupted", disk.path.display());
                self.disk_failed(disk)
            }
            Fault::Absent => StoreError::NoObject,
            Fault::Full => {
                tracing::error!("diskfull, oid={oid}");
                StoreError::NoSpace
            }
            Fault::Passing => StoreError::Retry(duplicate_io(e)),
            Fault::Disk => {
                tracing::error!("oid={oid}, {}", strerror(e));
                self.disk_failed(disk)
            }
            Fault::Medium if disk.medium_errors.lock().note(oid, Instant::now()) => {
                tracing::error!("oid={oid}, {}: too many on {}", strerror(e), disk.path.display());
                self.disk_failed(disk)
            }
            Fault::Medium | Fault::Object => {
                tracing::error!("oid={oid}, {}", strerror(e));
                StoreError::Io(duplicate_io(e))
            }
        }
    }

    /// Takes a disk out of service and reports it, once.
    pub(crate) fn disk_failed(self: &Arc<Inner>, disk: &Arc<Disk>) -> StoreError {
        if !disk.is_removed()
            && let Some(before) = &self.options.before_disk_loss
        {
            before();
        }
        let first = self.detach(disk.id);
        let last = self.disks().is_empty();
        if first {
            let failure = DiskFailure { path: disk.path.clone(), last };
            tracing::error!("removed disk {}, {} left", disk.path.display(), self.disks().len());
            if let Some(report) = &self.options.on_disk_failure {
                report(failure);
            }
        }
        StoreError::DiskFailed { path: disk.path.clone(), last }
    }
}

impl Store {
    /// Looks whether every disk is still there and writable, and takes those out of service that are not. For disks
    /// that nobody uses at the moment; blocks for as long as the file systems take to answer.
    pub fn check_disks(&self) {
        for disk in self.inner.disks().all() {
            let error = match statvfs(&disk.path) {
                Err(e) => Some(e as i32),
                Ok(fs) if fs.flags().contains(FsFlags::ST_RDONLY) => Some(libc::EROFS),
                Ok(_) if !disk.path.is_dir() => Some(libc::ENOENT),
                // Unmounted: what lies there now is the directory underneath, or something else.
                Ok(_) if !same_device(disk) => Some(libc::ENODEV),
                Ok(_) => None,
            };
            if let Some(errno) = error {
                self.inner.fault(disk, Oid(0), &io::Error::from_raw_os_error(errno));
            }
        }
    }
}

/// Whether the directory is still on the file system on which the disk was opened.
fn same_device(disk: &Disk) -> bool {
    // An error is something else, and will be noticed as such.
    disk.path.metadata().map_or(true, |now| now.dev() == disk.device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bad_object_does_not_condemn_a_disk_but_several_do() {
        let (mut errors, now) = (MediumErrors::default(), Instant::now());
        for _ in 0..100 {
            assert!(!errors.note(Oid(1), now));
        }
        assert!(!errors.note(Oid(2), now) && !errors.note(Oid(3), now));
        let later = now + MEDIUM_WINDOW;
        assert!(!errors.note(Oid(4), later), "the old ones are forgotten");
        assert!(!errors.note(Oid(5), later) && !errors.note(Oid(6), later));
        assert!(errors.note(Oid(7), later));
    }
}
