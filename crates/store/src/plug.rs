//! Changing the disks of a running store (spec 02, 10.5; spec 03, section 15).
//!
//! A plugged disk is emptied, then takes its part of the ring; [`Store::settle`] moves the objects that now belong
//! there. An unplugged disk leaves the ring at once but stays readable until [`Store::settle`] has moved what it holds
//! to the others and [`Store::release_drained`] lets go of it. The last disk is never taken out: the node has to leave.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use sheepdog_proto::admin::MAX_DISKS;
use thiserror::Error;

use crate::disk::{Disk, make_dir};
use crate::index::DiskId;
use crate::meta::MetaDir;
use crate::open::without_slashes;
use crate::relocate::Stuck;
use crate::removed::Memory;
use crate::ring::DiskRing;
use crate::store::{Inner, Store};

/// Why the disks stay as they are. Displays as the line to log.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PlugError {
    /// Not absolute, or with a line break in it.
    #[error("invalid path {}", .0.display())]
    Invalid(PathBuf),
    /// Unplug of something that is no disk.
    #[error("invalid path {}, it is not a disk of this node", .0.display())]
    Unknown(PathBuf),
    /// In service already, or still being drained.
    #[error("duplicate path {}", .0.display())]
    Duplicate(PathBuf),
    /// Somebody's metadata directory.
    #[error("{} is meta-store, abort", .0.display())]
    MetaStore(PathBuf),
    /// Emptying it would delete something in use.
    #[error("invalid path {}: it overlaps with {}", .0.display(), .1.display())]
    Overlap(PathBuf, PathBuf),
    /// No room in MD_INFO.
    #[error("{}: a node has at most {MAX_DISKS} disks", .0.display())]
    TooMany(PathBuf),
    /// Anything else.
    #[error("{0}")]
    Unusable(String),
}

/// What an unplug did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unplugged {
    /// The disk is off the ring and waits for its objects to be moved.
    Leaving,
    /// It is the last disk: nothing was changed.
    Last,
}

/// An unplugged disk that was let go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Released {
    /// The disk.
    pub path: PathBuf,
    /// Files that could not be read and stayed there.
    pub lost: usize,
}

impl Store {
    /// Adds a disk after deleting everything in its directory; its recorded size (`user.md.size`) is kept. Returns the
    /// line to log. Blocks for as long as the deletion takes. Call [`Store::settle`] afterwards.
    pub fn plug(&self, path: &Path) -> Result<String, PlugError> {
        let inner = &self.inner;
        let _changing = inner.changing.lock();
        let path = without_slashes(path);
        self.check_new(&path)?;
        let id = inner.new_disk_id().ok_or_else(|| unusable("too many disks since the start".into()))?;
        let disk = Disk::open(id, &path, self.layout(), true).map_err(unusable)?;
        // What it holds from now on is current, also if the next command line should not name it.
        inner.remember(&path, Some(Memory::Held)).map_err(unusable)?;
        let disk = Arc::new(disk);
        disk.start().map_err(|e| unusable(format!("cannot start the threads of {}: {e}", path.display())))?;
        let points = DiskRing::points_of(disk.size);
        let count = inner.change_set(|set| {
            let set = set.with(disk);
            (set.len(), Some(set))
        });
        Ok(format!("{}, vdisk nr {points}, total disk {count}", path.display()))
    }

    fn check_new(&self, path: &Path) -> Result<(), PlugError> {
        let invalid = || PlugError::Invalid(path.to_owned());
        if !path.is_absolute() || path.as_os_str().as_bytes().contains(&b'\n') {
            return Err(invalid());
        }
        let set = self.inner.disks();
        if set.all().any(|d| d.path.as_os_str() == path.as_os_str()) {
            return Err(PlugError::Duplicate(path.to_owned()));
        }
        if MetaDir::is_meta_dir(path) {
            return Err(PlugError::MetaStore(path.to_owned()));
        }
        if set.all().count() >= MAX_DISKS {
            return Err(PlugError::TooMany(path.to_owned()));
        }
        make_dir(path).map_err(|e| {
            unusable(format!("can't mkdir for {}, {}", path.display(), crate::error::strerror(&e)))
        })?;
        let real = path.canonicalize().map_err(|_| invalid())?;
        let overlaps = |other: &Path| PlugError::Overlap(path.to_owned(), other.to_owned());
        for disk in set.all() {
            let theirs = disk.path.canonicalize().unwrap_or_else(|_| disk.path.clone());
            if theirs.starts_with(&real) || real.starts_with(&theirs) {
                return Err(overlaps(&disk.path));
            }
        }
        match self.inner.options.protected.iter().find(|p| p.starts_with(&real)) {
            Some(protected) => Err(overlaps(protected)),
            None => Ok(()),
        }
    }

    /// Takes a disk off the ring. It stays in use for what it holds; its directory is not deleted. Call
    /// [`Store::settle`] and [`Store::release_drained`] until it is gone.
    pub fn unplug(&self, path: &Path) -> Result<Unplugged, PlugError> {
        let inner = &self.inner;
        let _changing = inner.changing.lock();
        let path = without_slashes(path);
        let set = inner.disks();
        let disk = set.disks.iter().find(|d| d.path.as_os_str() == path.as_os_str());
        let id = disk.ok_or_else(|| PlugError::Unknown(path.clone()))?.id;
        if set.len() == 1 {
            return Ok(Unplugged::Last);
        }
        // Before the first object leaves it: after a crash it is current if it is listed, and missing if it is not.
        inner.remember(&path, Some(Memory::Held)).map_err(unusable)?;
        let changed = inner.change_set(|set| {
            // A disk may fail at any time: there must be one left.
            let possible = set.disks.iter().any(|d| d.id == id) && set.len() > 1;
            (possible, possible.then(|| set.with_leaving(id)))
        });
        if changed { Ok(Unplugged::Leaving) } else { Err(PlugError::Unknown(path)) }
    }

    /// Lets go of the unplugged disks that hold nothing any more but the files in `stuck`, which count as lost.
    pub async fn release_drained(&self, stuck: &[Stuck]) -> Vec<Released> {
        // Creates that were sent to a disk before it was unplugged.
        self.drain().await;
        let inner = &self.inner;
        // Somebody changes the disks: another time.
        let Some(_changing) = inner.changing.try_lock() else { return Vec::new() };
        let mut released = Vec::new();
        for disk in inner.disks().leaving.clone() {
            let lost: Vec<&Stuck> = stuck.iter().filter(|s| s.disk == disk.id).collect();
            let is_lost = |replica, epoch| {
                lost.iter().any(|s| s.replica == replica && s.stale.map(|n| n.epoch) == epoch)
            };
            if !inner.index.all_on(disk.id, is_lost) {
                continue;
            }
            if let Err(e) = disk.sync_dirty() {
                tracing::error!("cannot sync {}: {e}", disk.path.display());
                continue;
            }
            if let Some(before) = inner.options.before_disk_loss.as_ref().filter(|_| !lost.is_empty()) {
                before();
            }
            let gone = inner.change_set(|set| {
                // Nothing is created on it any more; only a stale file could have been linked or stashed meanwhile.
                let empty = inner.index.all_on(disk.id, is_lost);
                (empty, empty.then(|| set.without(disk.id)))
            });
            if !gone {
                continue;
            }
            inner.index.remove_disk(disk.id);
            inner.files.forget_disk(disk.id);
            disk.stop();
            if let Err(e) = inner.remember(&disk.path, Some(Memory::Removed)) {
                tracing::error!("{e}");
            }
            released.push(Released { path: disk.path.clone(), lost: lost.len() });
        }
        released
    }

    /// Files still to be moved off unplugged disks; `None` if there is no such disk.
    pub fn draining(&self) -> Option<usize> {
        let set = self.inner.disks();
        if set.leaving.is_empty() {
            return None;
        }
        Some(set.leaving.iter().map(|d| self.inner.index.count_on(d.id)).sum())
    }
}

fn unusable(text: String) -> PlugError {
    PlugError::Unusable(text)
}

impl Inner {
    /// A number for one more disk.
    fn new_disk_id(&self) -> Option<DiskId> {
        self.next_disk.fetch_update(Relaxed, Relaxed, |n| n.checked_add(1)).ok()
    }

    /// Notes something of a disk for the next start.
    pub(crate) fn remember(&self, path: &Path, memory: Option<Memory>) -> Result<(), String> {
        let Some(record) = &self.options.removed_disks else { return Ok(()) };
        let _one_at_a_time = self.recording.lock();
        crate::removed::note(record, path, memory).map_err(|e| {
            format!("cannot note in {} what became of {}: {e}", record.display(), path.display())
        })
    }
}
