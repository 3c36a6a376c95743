//! Removing objects, and keeping their old states (spec 03, sections 8 and 12; spec 06, 10.2).
//!
//! Renames, links and unlinks note their directory; [`Store::sync_dirs`] makes them durable and must come before a
//! completion is reported to anybody.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use sheepdog_proto::{Epoch, Oid};

use crate::Result;
use crate::disk::{Disk, allocated, delete_content};
use crate::error::StoreError;
use crate::index::DiskId;
use crate::layout::Layout;
use crate::name::{Replica, StaleName, is_temporary};
use crate::sched::Claim;
use crate::store::{Inner, Store};

impl Store {
    /// Removes the working file, wherever it is.
    pub async fn remove(&self, replica: Replica) -> Result<()> {
        self.exec(Claim::whole(replica), None, move |inner, home| {
            if let Some(hook) = &inner.options.write_hook {
                hook.before_remove(replica).map_err(StoreError::Io)?;
            }
            let mut removed = false;
            for disk in holders(inner, home, replica) {
                match fs::remove_file(disk.file(replica)) {
                    Ok(()) => removed = true,
                    Err(e) if e.kind() == io::ErrorKind::NotFound && disk.path.is_dir() => {}
                    Err(e) => return Err(inner.fault(&disk, replica.oid, &e)),
                }
                gone(inner, &disk, replica);
            }
            if removed { Ok(()) } else { Err(StoreError::NoObject) }
        })
        .await
    }

    /// Moves the working file to `.stale`, as the state at the end of `epoch`.
    pub async fn stash(&self, replica: Replica, epoch: Epoch) -> Result<()> {
        let name = StaleName { replica, epoch };
        self.exec(Claim::whole(replica), None, move |inner, home| {
            let mut moved = false;
            // The first holder has the current content: it is moved last, over the others'.
            for disk in holders(inner, home, replica).into_iter().rev() {
                moved |= stash_file(inner, &disk, name)?;
            }
            if moved { Ok(()) } else { Err(StoreError::NoObject) }
        })
        .await
    }

    /// Moves every working file to `.stale` (a node that was out of the cluster) and removes left-over temporaries.
    /// Returns how many objects were moved.
    pub async fn stash_all(&self, epoch: Epoch) -> Result<usize> {
        self.drain().await;
        let mut moved = 0;
        for replica in self.working() {
            match self.stash(replica, epoch).await {
                Ok(()) => moved += 1,
                Err(StoreError::NoObject) => {}
                Err(e) => return Err(e),
            }
        }
        self.exec_all(|inner, disk| remove_temporaries(disk).map_err(|e| inner.fault(disk, Oid(0), &e)))
            .await?;
        Ok(moved)
    }

    /// The epoch whose stale file tells what this node had at the end of `epoch`: the earliest one from then on. A file that
    /// was moved away late (a crash between the epoch and the move) has a later suffix than it should.
    pub fn stale_at(&self, replica: Replica, epoch: Epoch) -> Option<Epoch> {
        self.inner.index.stale_at(replica, epoch)
    }

    /// Makes the stale file for `epoch` ([`Store::stale_at`]) the working file by a hard link. False if there is no such stale file; an existing
    /// working file is left alone and counts as done.
    pub async fn link_stale(&self, replica: Replica, epoch: Epoch) -> Result<bool> {
        while let Some(epoch) = self.stale_at(replica, epoch) {
            let name = StaleName { replica, epoch };
            let Some(id) = self.inner.index.find_stale(name) else { continue };
            // It may be moved to its own disk meanwhile.
            if self.link_on(name, id).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// False if the disk does not have the stale file any more.
    async fn link_on(&self, name: StaleName, id: DiskId) -> Result<bool> {
        let replica = name.replica;
        self.exec(Claim::whole(replica), Some(id), move |inner, disk| {
            if inner.locate(replica)?.file(replica).is_file() {
                return Ok(true);
            }
            match fs::hard_link(disk.stale_file(name), disk.file(replica)) {
                Ok(()) => {
                    inner.index.add(replica, disk.id, true, allocated(&disk.file(replica)));
                    disk.mark_dirty(disk.dir(replica));
                    Ok(true)
                }
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(true),
                Err(e) if e.kind() == io::ErrorKind::NotFound && disk.path.is_dir() => {
                    inner.index.remove_stale(name, disk.id);
                    Ok(false)
                }
                Err(e) => Err(inner.fault(disk, replica.oid, &e)),
            }
        })
        .await
    }

    /// Epochs of which a stale file of the replica is kept, ascending.
    pub fn stale_epochs(&self, replica: Replica) -> Vec<Epoch> {
        self.inner.index.stale_epochs(replica)
    }

    /// Overwrites part of the stale file of `epoch`, durably.
    pub async fn write_stale(&self, replica: Replica, epoch: Epoch, offset: u64, data: Bytes) -> Result<()> {
        self.on_stale(StaleName { replica, epoch }, move |disk| {
            let file =
                fs::OpenOptions::new().write(true).open(disk.stale_file(StaleName { replica, epoch }))?;
            file.write_all_at(&data, offset)?;
            file.sync_data()
        })
        .await
    }

    /// Deletes the stale files of all epochs up to and including `up_to`; returns how many.
    pub async fn purge_stale(&self, up_to: Epoch) -> Result<usize> {
        let counts = self
            .exec_all(move |inner, disk| {
                let all = inner.index.all_stale().into_iter();
                let old = all.filter(|(name, id)| *id == disk.id && !up_to.is_before(name.epoch));
                let mut count = 0;
                for (name, _) in old {
                    match fs::remove_file(disk.stale_file(name)) {
                        Ok(()) => count += 1,
                        Err(e) if e.kind() == io::ErrorKind::NotFound && disk.path.is_dir() => {}
                        Err(e) => return Err(inner.fault(disk, name.replica.oid, &e)),
                    }
                    inner.index.remove_stale(name, disk.id);
                    disk.mark_dirty(disk.stale_dir());
                }
                Ok(count)
            })
            .await?;
        Ok(counts.into_iter().sum())
    }

    /// Makes all renames, links and unlinks so far durable.
    pub async fn sync_dirs(&self) -> Result<()> {
        self.exec_all(|inner, disk| disk.sync_dirty().map_err(|e| inner.fault(disk, Oid(0), &e)))
            .await
            .map(drop)
    }

    /// Deletes everything on every disk and begins anew with a layout (MAKE_FS; spec 03, section 18).
    pub async fn format(&self, layout: Layout) -> Result<()> {
        self.drain().await;
        *self.inner.layout.lock() = layout;
        let result = self
            .exec_all(move |inner, disk| {
                let purged = purge(disk, layout);
                inner.files.forget_disk(disk.id);
                inner.index.remove_disk(disk.id);
                purged.map_err(|e| inner.fault(disk, Oid(0), &e))
            })
            .await;
        result?;
        self.inner.index.clear();
        Ok(())
    }
}

/// Disks with a working file of the replica, as far as known, the preferred one first; at least its home.
fn holders(inner: &Inner, home: &Arc<Disk>, replica: Replica) -> Vec<Arc<Disk>> {
    let set = inner.disks();
    let known = inner.index.working_on(replica);
    let mut disks: Vec<_> = known.into_iter().filter_map(|id| set.by_id(id).cloned()).collect();
    if disks.is_empty() {
        disks.push(home.clone());
    }
    disks
}

/// A working file went away.
fn gone(inner: &Inner, disk: &Disk, replica: Replica) {
    inner.files.forget(replica);
    inner.index.remove(replica, disk.id);
    disk.mark_dirty(disk.dir(replica));
}

fn stash_file(inner: &Arc<Inner>, disk: &Arc<Disk>, name: StaleName) -> Result<bool> {
    let replica = name.replica;
    match fs::rename(disk.file(replica), disk.stale_file(name)) {
        Ok(()) => {
            inner.index.add_stale(name, disk.id);
            gone(inner, disk, replica);
            disk.mark_dirty(disk.stale_dir());
            // A hard link to that very stale file: rename then does nothing, and the working name stays.
            let _ = fs::remove_file(disk.file(replica));
            Ok(true)
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound && disk.path.is_dir() => {
            inner.index.remove(replica, disk.id);
            Ok(false)
        }
        Err(e) => Err(inner.fault(disk, replica.oid, &e)),
    }
}

/// Removes what unfinished creates and moves left in the working directories.
pub(crate) fn remove_temporaries(disk: &Disk) -> io::Result<usize> {
    let mut count = 0;
    for dir in disk.layout().sub_dirs() {
        for entry in fs::read_dir(disk.path.join(dir))? {
            let entry = entry?;
            if entry.file_name().to_str().is_some_and(is_temporary) && entry.file_type()?.is_file() {
                fs::remove_file(entry.path())?;
                count += 1;
            }
        }
    }
    Ok(count)
}

/// Deletes the content of a disk and makes its empty directories again.
fn purge(disk: &Disk, layout: Layout) -> io::Result<()> {
    delete_content(&disk.path)?;
    disk.set_layout(layout)?;
    disk.sync_dirty()
}
