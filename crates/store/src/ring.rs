//! Which disk an object belongs to (spec 02, section 10.3; spec 03, section 15).

use sheepdog_proto::Oid;
use sheepdog_proto::hash::{hash_oid, next_hash, sd_hash};

/// Bytes of a disk per point on the ring.
const BYTES_PER_POINT: u64 = 16 << 20;

/// The ring of a node's disks. Values are positions in the list the ring was built from.
#[derive(Debug, Clone, Default)]
pub struct DiskRing {
    points: Vec<(u64, u32)>,
}

impl DiskRing {
    /// A ring of disks given as path (exactly as typed, without trailing slashes) and `user.md.size` in bytes.
    pub fn new<'a>(disks: impl IntoIterator<Item = (&'a [u8], u64)>) -> DiskRing {
        let mut points = Vec::new();
        for (i, (path, size)) in disks.into_iter().enumerate() {
            let mut hash = sd_hash(path);
            for _ in 0..Self::points_of(size) {
                hash = next_hash(hash);
                points.push((hash, i as u32));
            }
        }
        points.sort_unstable();
        DiskRing { points }
    }

    /// Number of points of a disk of `size` bytes.
    pub fn points_of(size: u64) -> u64 {
        size.div_ceil(BYTES_PER_POINT)
    }

    /// The disk of an object: the owner of the first point at or after the object's hash. `None` without disks.
    pub fn disk_of(&self, oid: Oid) -> Option<usize> {
        let at = self.points.partition_point(|(hash, _)| *hash < hash_oid(oid));
        self.points.get(at).or(self.points.first()).map(|(_, disk)| *disk as usize)
    }
}
