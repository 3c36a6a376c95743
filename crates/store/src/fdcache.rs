//! Open object files, least recently used out first.
//!
//! There is at most one [`OpenObject`] per replica that writers use, because it carries the block map: an entry is
//! evicted only while nobody holds it, and an entry is inserted only if no rename or unlink happened since its file was
//! opened (the shard's generation tells). Whatever renames, replaces or unlinks a file must call
//! [`FdCache::forget`] *after* doing so.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::index::DiskId;
use crate::name::Replica;
use crate::object::OpenObject;

const SHARDS: usize = 16;

struct Entry {
    object: Arc<OpenObject>,
    disk: DiskId,
    used: u64,
}

#[derive(Default)]
struct Shard {
    entries: HashMap<Replica, Entry>,
    /// Counts calls of `forget`.
    generation: u64,
    clock: u64,
}

/// See the module.
pub(crate) struct FdCache {
    shards: [Mutex<Shard>; SHARDS],
    per_shard: usize,
}

impl FdCache {
    /// A cache of about `capacity` objects.
    pub(crate) fn new(capacity: usize) -> FdCache {
        FdCache { shards: Default::default(), per_shard: (capacity / SHARDS).max(1) }
    }

    fn shard(&self, replica: Replica) -> &Mutex<Shard> {
        let mixed = replica.oid.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 60;
        &self.shards[mixed as usize % SHARDS]
    }

    /// The object if it is open and still has a name.
    pub(crate) fn get(&self, replica: Replica) -> Option<Arc<OpenObject>> {
        let object = {
            let mut shard = self.shard(replica).lock();
            shard.clock += 1;
            let clock = shard.clock;
            let entry = shard.entries.get_mut(&replica)?;
            entry.used = clock;
            entry.object.clone()
        };
        if object.is_unlinked() {
            self.forget_only(replica, &object);
            return None;
        }
        Some(object)
    }

    /// The object, opened from `path` on `disk` if it is not open.
    pub(crate) fn open(
        &self,
        replica: Replica,
        disk: DiskId,
        path: impl Fn() -> Box<Path>,
    ) -> io::Result<Arc<OpenObject>> {
        loop {
            self.forget_elsewhere(replica, disk);
            if let Some(object) = self.get(replica) {
                return Ok(object);
            }
            let generation = self.shard(replica).lock().generation;
            let object = Arc::new(OpenObject::open(&path())?);
            let mut shard = self.shard(replica).lock();
            if shard.generation != generation || shard.entries.contains_key(&replica) {
                continue;
            }
            let evicted = shard.make_room(self.per_shard);
            shard.clock += 1;
            let used = shard.clock;
            shard.entries.insert(replica, Entry { object: object.clone(), disk, used });
            drop(shard);
            drop(evicted); // closing may be slow: not under the lock
            return Ok(object);
        }
    }

    /// Drops the object; needed after every rename, replacement and unlink of its file.
    pub(crate) fn forget(&self, replica: Replica) {
        let mut shard = self.shard(replica).lock();
        shard.generation += 1;
        let entry = shard.entries.remove(&replica);
        drop(shard);
        drop(entry);
    }

    /// Drops this very object, but not another that took its place meanwhile.
    fn forget_only(&self, replica: Replica, object: &Arc<OpenObject>) {
        let mut shard = self.shard(replica).lock();
        if shard.entries.get(&replica).is_some_and(|e| Arc::ptr_eq(&e.object, object)) {
            shard.generation += 1;
            shard.entries.remove(&replica);
        }
    }

    /// Drops the object if it lies on another disk than this one, which then is out of service or has given it away: its
    /// errors must not be blamed on this disk, nor writes go there.
    fn forget_elsewhere(&self, replica: Replica, disk: DiskId) {
        let mut shard = self.shard(replica).lock();
        if shard.entries.get(&replica).is_some_and(|e| e.disk != disk) {
            shard.generation += 1;
            shard.entries.remove(&replica);
        }
    }

    /// Drops the objects of one disk.
    pub(crate) fn forget_disk(&self, disk: DiskId) {
        for shard in &self.shards {
            let mut shard = shard.lock();
            shard.generation += 1;
            shard.entries.retain(|_, e| e.disk != disk);
        }
    }
}

impl Shard {
    /// Takes out the least recently used entry that nobody holds, if the shard is full.
    fn make_room(&mut self, capacity: usize) -> Option<Entry> {
        if self.entries.len() < capacity {
            return None;
        }
        let idle = self.entries.iter().filter(|(_, e)| Arc::strong_count(&e.object) == 1);
        let oldest = idle.min_by_key(|(_, e)| e.used).map(|(replica, _)| *replica)?;
        self.entries.remove(&oldest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sheepdog_proto::Oid;

    fn opener(dir: &Path, replica: Replica) -> impl Fn() -> Box<Path> {
        let path = dir.join(replica.to_string());
        move || path.clone().into()
    }

    #[test]
    fn a_file_of_a_lost_disk_is_not_taken_for_that_of_another() {
        let dir = tempfile::tempdir().expect("tempdir");
        let cache = FdCache::new(64);
        let replica = Replica::whole(Oid(1));
        let (lost, left) = (dir.path().join("lost"), dir.path().join("left"));
        for disk in [&lost, &left] {
            std::fs::create_dir(disk).expect("mkdir");
        }
        std::fs::write(lost.join(replica.to_string()), b"old").expect("write");
        cache.open(replica, 1, opener(&lost, replica)).expect("open");
        let absent = cache.open(replica, 2, opener(&left, replica)).map(drop).expect_err("not there");
        assert_eq!(absent.kind(), io::ErrorKind::NotFound);
        std::fs::write(left.join(replica.to_string()), b"newer").expect("write");
        let object = cache.open(replica, 2, opener(&left, replica)).expect("open");
        assert_eq!(object.file.metadata().expect("stat").len(), 5);
    }

    #[test]
    fn a_replaced_file_is_opened_anew_after_forget_and_a_deleted_one_without() {
        let dir = tempfile::tempdir().expect("tempdir");
        let cache = FdCache::new(64);
        let replica = Replica::whole(Oid(1));
        let path = dir.path().join(replica.to_string());
        std::fs::write(&path, b"old").expect("write");
        let old = cache.open(replica, 0, opener(dir.path(), replica)).expect("open");
        let again = cache.open(replica, 0, opener(dir.path(), replica)).expect("open");
        assert!(Arc::ptr_eq(&old, &again));
        cache.forget(replica);
        let new = cache.open(replica, 0, opener(dir.path(), replica)).expect("open");
        assert!(!Arc::ptr_eq(&old, &new));
        std::fs::remove_file(&path).expect("remove");
        let error = cache.open(replica, 0, opener(dir.path(), replica)).err().expect("gone");
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn an_object_in_use_is_never_evicted() {
        let dir = tempfile::tempdir().expect("tempdir");
        let cache = FdCache::new(SHARDS);
        let all: Vec<_> = (0..200).map(|i| Replica::whole(Oid(i << 32))).collect();
        for replica in &all {
            std::fs::write(dir.path().join(replica.to_string()), b"x").expect("write");
        }
        let held = cache.open(all[0], 0, opener(dir.path(), all[0])).expect("open");
        for replica in &all[1..] {
            cache.open(*replica, 0, opener(dir.path(), *replica)).expect("open");
        }
        assert!(Arc::ptr_eq(&held, &cache.get(all[0]).expect("still there")));
        let open: usize = cache.shards.iter().map(|s| s.lock().entries.len()).sum();
        assert!(open <= SHARDS + 1, "{open} open");
    }
}
