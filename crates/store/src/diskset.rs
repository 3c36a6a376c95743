//! The disks of a running store and their ring. A set is never changed: whoever changes the disks publishes another one.

use std::sync::Arc;

use sheepdog_proto::Oid;

use crate::disk::Disk;
use crate::index::DiskId;
use crate::ring::DiskRing;

/// See the module.
#[derive(Default)]
pub(crate) struct DiskSet {
    /// In service, in path order.
    pub(crate) disks: Vec<Arc<Disk>>,
    /// Unplugged, but still with objects that have to be moved: off the ring, used like any other for what lies there.
    pub(crate) leaving: Vec<Arc<Disk>>,
    ring: DiskRing,
}

impl DiskSet {
    pub(crate) fn new(mut disks: Vec<Arc<Disk>>, leaving: Vec<Arc<Disk>>) -> DiskSet {
        disks.sort_by(|a, b| a.path.cmp(&b.path));
        let ring = DiskRing::new(disks.iter().map(|d| (d.path.as_os_str().as_encoded_bytes(), d.size)));
        DiskSet { disks, leaving, ring }
    }

    /// Whether no disk is in service.
    pub(crate) fn is_empty(&self) -> bool {
        self.disks.is_empty()
    }

    /// Number of disks in service.
    pub(crate) fn len(&self) -> usize {
        self.disks.len()
    }

    /// The disks in service and those that are leaving.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Disk>> {
        self.disks.iter().chain(&self.leaving)
    }

    pub(crate) fn by_id(&self, id: DiskId) -> Option<&Arc<Disk>> {
        self.all().find(|d| d.id == id)
    }

    /// The disk that an object belongs to.
    pub(crate) fn home(&self, oid: Oid) -> Option<&Arc<Disk>> {
        self.ring.disk_of(oid).and_then(|i| self.disks.get(i))
    }

    /// The set after a disk was added to those in service.
    pub(crate) fn with(&self, disk: Arc<Disk>) -> DiskSet {
        let disks = self.disks.iter().cloned().chain([disk]).collect();
        DiskSet::new(disks, self.leaving.clone())
    }

    /// The set after a disk went off the ring but not yet out of use.
    pub(crate) fn with_leaving(&self, id: DiskId) -> DiskSet {
        let (going, staying): (Vec<_>, Vec<_>) = self.disks.iter().cloned().partition(|d| d.id == id);
        DiskSet::new(staying, self.leaving.iter().cloned().chain(going).collect())
    }

    /// The set after a disk went away altogether.
    pub(crate) fn without(&self, id: DiskId) -> DiskSet {
        let others = |disks: &[Arc<Disk>]| disks.iter().filter(|d| d.id != id).cloned().collect();
        DiskSet::new(others(&self.disks), others(&self.leaving))
    }
}
