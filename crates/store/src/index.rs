//! The in-memory mirror of the file names of all disks (spec 03, sections 15 and 17).
//!
//! Filled by the scan, kept up to date by every create, rename, link and unlink. It answers the object list and says on
//! which disk a file really is, so that an absent object costs no search and a misplaced one is found.

use std::collections::{BTreeMap, HashMap};

use parking_lot::RwLock;
use sheepdog_proto::{Epoch, Oid};

use crate::name::{Replica, StaleName};

/// Number of a disk within this process; never reused.
pub(crate) type DiskId = u16;

/// Unit of allocation counts, in bytes.
const SECTOR: u64 = 512;

fn sectors(bytes: u64) -> u32 {
    u32::try_from(bytes / SECTOR).unwrap_or(u32::MAX)
}

#[derive(Debug, Clone, Copy)]
struct Located {
    strip: Option<u8>,
    /// `Some` for a file in `.stale`.
    epoch: Option<Epoch>,
    disk: DiskId,
    /// Allocated sectors of a working file, as last accounted.
    sectors: u32,
}

impl Located {
    fn is(&self, strip: Option<u8>, epoch: Option<Epoch>, disk: DiskId) -> bool {
        self.strip == strip && self.epoch == epoch && self.disk == disk
    }
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<Oid, Vec<Located>>,
    /// Sectors accounted to the working files of each disk.
    used: HashMap<DiskId, u64>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Index {
    state: RwLock<State>,
}

impl Index {
    /// Adds a working file with the bytes allocated to it, or accounts these anew. With `first`, it is preferred to other
    /// copies of the same replica.
    pub(crate) fn add(&self, replica: Replica, disk: DiskId, first: bool, allocated: u64) {
        let sectors = sectors(allocated);
        let located = Located { strip: replica.strip, epoch: None, disk, sectors };
        self.state.write().insert(replica.oid, located, first);
    }

    /// Accounts what is allocated to a working file now, if it is known.
    pub(crate) fn account(&self, replica: Replica, disk: DiskId, allocated: u64) {
        let mut state = self.state.write();
        let State { files, used } = &mut *state;
        let entry = files.get_mut(&replica.oid).map(Vec::as_mut_slice).unwrap_or_default();
        if let Some(located) = entry.iter_mut().find(|l| l.is(replica.strip, None, disk)) {
            let used = used.entry(disk).or_default();
            let old = std::mem::replace(&mut located.sectors, sectors(allocated));
            *used = *used - u64::from(old) + u64::from(located.sectors);
        }
    }

    /// Bytes allocated to the working files of a disk.
    pub(crate) fn used(&self, disk: DiskId) -> u64 {
        self.state.read().used.get(&disk).map_or(0, |sectors| sectors * SECTOR)
    }

    /// Adds a stale file.
    pub(crate) fn add_stale(&self, name: StaleName, disk: DiskId) {
        let located = Located { strip: name.replica.strip, epoch: Some(name.epoch), disk, sectors: 0 };
        self.state.write().insert(name.replica.oid, located, false);
    }

    /// Forgets a working file.
    pub(crate) fn remove(&self, replica: Replica, disk: DiskId) {
        self.state.write().remove(replica.oid, |l| l.is(replica.strip, None, disk));
    }

    /// Forgets a stale file.
    pub(crate) fn remove_stale(&self, name: StaleName, disk: DiskId) {
        self.state.write().remove(name.replica.oid, |l| l.is(name.replica.strip, Some(name.epoch), disk));
    }

    /// Forgets everything on a disk.
    pub(crate) fn remove_disk(&self, disk: DiskId) {
        let mut state = self.state.write();
        state.used.remove(&disk);
        state.files.retain(|_, entry| {
            entry.retain(|l| l.disk != disk);
            !entry.is_empty()
        });
    }

    /// Forgets everything.
    pub(crate) fn clear(&self) {
        *self.state.write() = State::default();
    }

    /// Disks that hold a working file of the replica, the preferred one first.
    pub(crate) fn working_on(&self, replica: Replica) -> Vec<DiskId> {
        let files = &self.state.read().files;
        let entry = files.get(&replica.oid).map(Vec::as_slice).unwrap_or_default();
        entry.iter().filter(|l| l.strip == replica.strip && l.epoch.is_none()).map(|l| l.disk).collect()
    }

    /// The preferred disk of the replica's working file.
    pub(crate) fn find(&self, replica: Replica) -> Option<DiskId> {
        let files = &self.state.read().files;
        let entry = files.get(&replica.oid)?;
        entry.iter().find(|l| l.strip == replica.strip && l.epoch.is_none()).map(|l| l.disk)
    }

    /// The disk of a stale file.
    pub(crate) fn find_stale(&self, name: StaleName) -> Option<DiskId> {
        let files = &self.state.read().files;
        let entry = files.get(&name.replica.oid)?;
        entry.iter().find(|l| l.strip == name.replica.strip && l.epoch == Some(name.epoch)).map(|l| l.disk)
    }

    /// Disks that hold the stale file, the preferred one first.
    pub(crate) fn stale_on(&self, name: StaleName) -> Vec<DiskId> {
        let files = &self.state.read().files;
        let entry = files.get(&name.replica.oid).map(Vec::as_slice).unwrap_or_default();
        let is_it = |l: &&Located| l.strip == name.replica.strip && l.epoch == Some(name.epoch);
        entry.iter().filter(is_it).map(|l| l.disk).collect()
    }

    /// Number of files of both kinds on a disk.
    pub(crate) fn count_on(&self, disk: DiskId) -> usize {
        let files = &self.state.read().files;
        files.values().flatten().filter(|l| l.disk == disk).count()
    }

    /// Whether all files on a disk, given with their epoch if stale, are as asked.
    pub(crate) fn all_on(&self, disk: DiskId, is: impl Fn(Replica, Option<Epoch>) -> bool) -> bool {
        let files = &self.state.read().files;
        files.iter().all(|(oid, entry)| {
            let here = entry.iter().filter(|l| l.disk == disk);
            here.map(|l| (Replica { oid: *oid, strip: l.strip }, l.epoch)).all(|(r, e)| is(r, e))
        })
    }

    /// Epochs of the replica's stale files, ascending.
    pub(crate) fn stale_epochs(&self, replica: Replica) -> Vec<Epoch> {
        let files = &self.state.read().files;
        let entry = files.get(&replica.oid).map(Vec::as_slice).unwrap_or_default();
        let mut epochs: Vec<_> =
            entry.iter().filter(|l| l.strip == replica.strip).filter_map(|l| l.epoch).collect();
        epochs.sort_unstable();
        epochs.dedup();
        epochs
    }

    /// The earliest epoch, `epoch` or later, of which a stale file of the replica is kept.
    pub(crate) fn stale_at(&self, replica: Replica, epoch: Epoch) -> Option<Epoch> {
        let files = &self.state.read().files;
        let entry = files.get(&replica.oid).map(Vec::as_slice).unwrap_or_default();
        let own = entry.iter().filter(|l| l.strip == replica.strip).filter_map(|l| l.epoch);
        own.filter(|e| !e.is_before(epoch)).min()
    }

    /// Every object with a file of any kind, ascending.
    pub(crate) fn oids(&self) -> Vec<Oid> {
        self.state.read().files.keys().copied().collect()
    }

    /// Every working file, by oid, with its disk.
    pub(crate) fn all_working(&self) -> Vec<(Replica, DiskId)> {
        let files = &self.state.read().files;
        let of = |oid: &Oid, l: &Located| (Replica { oid: *oid, strip: l.strip }, l.disk);
        let working = files
            .iter()
            .flat_map(|(oid, entry)| entry.iter().filter(|l| l.epoch.is_none()).map(move |l| of(oid, l)));
        working.collect()
    }

    /// Every stale file, by oid, with its disk.
    pub(crate) fn all_stale(&self) -> Vec<(StaleName, DiskId)> {
        let files = &self.state.read().files;
        let stale = files.iter().flat_map(|(oid, entry)| {
            entry.iter().filter_map(|l| {
                let replica = Replica { oid: *oid, strip: l.strip };
                l.epoch.map(|epoch| (StaleName { replica, epoch }, l.disk))
            })
        });
        stale.collect()
    }
}

impl State {
    fn insert(&mut self, oid: Oid, located: Located, first: bool) {
        self.remove(oid, |l| l.is(located.strip, located.epoch, located.disk));
        *self.used.entry(located.disk).or_default() += u64::from(located.sectors);
        let entry = self.files.entry(oid).or_default();
        let at = if first { 0 } else { entry.len() };
        entry.insert(at, located);
    }

    fn remove(&mut self, oid: Oid, gone: impl Fn(&Located) -> bool) {
        let Some(entry) = self.files.get_mut(&oid) else { return };
        for located in entry.extract_if(.., |l| gone(l)) {
            if let Some(used) = self.used.get_mut(&located.disk) {
                *used -= u64::from(located.sectors);
            }
        }
        if entry.is_empty() {
            self.files.remove(&oid);
        }
    }
}
