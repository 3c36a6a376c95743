//! The in-memory mirror of the file names of all disks (spec 03, sections 15 and 17).
//!
//! Filled by the scan, kept up to date by every create, rename, link and unlink. It answers the object list and says on
//! which disk a file really is, so that an absent object costs no search and a misplaced one is found.

use std::collections::BTreeMap;

use parking_lot::RwLock;
use sheepdog_proto::{Epoch, Oid};

use crate::name::{Replica, StaleName};

/// Number of a disk within this process; never reused.
pub(crate) type DiskId = u16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Located {
    strip: Option<u8>,
    /// `Some` for a file in `.stale`.
    epoch: Option<Epoch>,
    disk: DiskId,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Index {
    files: RwLock<BTreeMap<Oid, Vec<Located>>>,
}

impl Index {
    /// Adds a working file. With `first`, it is preferred to other copies of the same replica.
    pub(crate) fn add(&self, replica: Replica, disk: DiskId, first: bool) {
        self.insert(replica.oid, Located { strip: replica.strip, epoch: None, disk }, first);
    }

    /// Adds a stale file.
    pub(crate) fn add_stale(&self, name: StaleName, disk: DiskId) {
        let located = Located { strip: name.replica.strip, epoch: Some(name.epoch), disk };
        self.insert(name.replica.oid, located, false);
    }

    fn insert(&self, oid: Oid, located: Located, first: bool) {
        let mut files = self.files.write();
        let entry = files.entry(oid).or_default();
        entry.retain(|l| *l != located);
        let at = if first { 0 } else { entry.len() };
        entry.insert(at, located);
    }

    /// Forgets a working file.
    pub(crate) fn remove(&self, replica: Replica, disk: DiskId) {
        self.retain(replica.oid, |l| *l != Located { strip: replica.strip, epoch: None, disk });
    }

    /// Forgets a stale file.
    pub(crate) fn remove_stale(&self, name: StaleName, disk: DiskId) {
        let gone = Located { strip: name.replica.strip, epoch: Some(name.epoch), disk };
        self.retain(name.replica.oid, |l| *l != gone);
    }

    fn retain(&self, oid: Oid, keep: impl FnMut(&Located) -> bool) {
        let mut files = self.files.write();
        if let Some(entry) = files.get_mut(&oid) {
            entry.retain(keep);
            if entry.is_empty() {
                files.remove(&oid);
            }
        }
    }

    /// Forgets everything on a disk.
    pub(crate) fn remove_disk(&self, disk: DiskId) {
        self.files.write().retain(|_, entry| {
            entry.retain(|l| l.disk != disk);
            !entry.is_empty()
        });
    }

    /// Forgets everything.
    pub(crate) fn clear(&self) {
        self.files.write().clear();
    }

    /// Disks that hold a working file of the replica, the preferred one first.
    pub(crate) fn working_on(&self, replica: Replica) -> Vec<DiskId> {
        let files = self.files.read();
        let entry = files.get(&replica.oid).map(Vec::as_slice).unwrap_or_default();
        entry.iter().filter(|l| l.strip == replica.strip && l.epoch.is_none()).map(|l| l.disk).collect()
    }

    /// The preferred disk of the replica's working file.
    pub(crate) fn find(&self, replica: Replica) -> Option<DiskId> {
        let files = self.files.read();
        let entry = files.get(&replica.oid)?;
        entry.iter().find(|l| l.strip == replica.strip && l.epoch.is_none()).map(|l| l.disk)
    }

    /// The disk of a stale file.
    pub(crate) fn find_stale(&self, name: StaleName) -> Option<DiskId> {
        let files = self.files.read();
        let entry = files.get(&name.replica.oid)?;
        entry.iter().find(|l| l.strip == name.replica.strip && l.epoch == Some(name.epoch)).map(|l| l.disk)
    }

    /// Epochs of the replica's stale files, ascending.
    pub(crate) fn stale_epochs(&self, replica: Replica) -> Vec<Epoch> {
        let files = self.files.read();
        let entry = files.get(&replica.oid).map(Vec::as_slice).unwrap_or_default();
        let mut epochs: Vec<_> =
            entry.iter().filter(|l| l.strip == replica.strip).filter_map(|l| l.epoch).collect();
        epochs.sort_unstable();
        epochs.dedup();
        epochs
    }

    /// Every object with a file of any kind, ascending.
    pub(crate) fn oids(&self) -> Vec<Oid> {
        self.files.read().keys().copied().collect()
    }

    /// Every working file, by oid, with its disk.
    pub(crate) fn all_working(&self) -> Vec<(Replica, DiskId)> {
        let files = self.files.read();
        let of = |oid: &Oid, l: &Located| (Replica { oid: *oid, strip: l.strip }, l.disk);
        let working = files
            .iter()
            .flat_map(|(oid, entry)| entry.iter().filter(|l| l.epoch.is_none()).map(move |l| of(oid, l)));
        working.collect()
    }

    /// Every stale file, by oid, with its disk.
    pub(crate) fn all_stale(&self) -> Vec<(StaleName, DiskId)> {
        let files = self.files.read();
        let stale = files.iter().flat_map(|(oid, entry)| {
            entry.iter().filter_map(|l| {
                let replica = Replica { oid: *oid, strip: l.strip };
                l.epoch.map(|epoch| (StaleName { replica, epoch }, l.disk))
            })
        });
        stale.collect()
    }
}
