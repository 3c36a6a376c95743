//! The disk ring: which disk of a node holds an object (spec 02, 10.1 to 10.3).
//!
//! Private to a node, yet exact too: the original and this implementation are started on the same directories in turn.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use sheepdog_proto::hash::{fnv1a64, hash_oid, sd_hash};
use sheepdog_proto::{NodeId, Oid};

use crate::Error;
use crate::points::Points;

/// Most disks of a node, given by the answer to MD_INFO.
pub const MAX_DISKS: usize = 64;

/// Bytes of a disk per ring point.
const POINT_SPACE: u64 = 16 << 20;

/// Bytes of a disk per ring point in a cluster of disk vnodes.
const DISK_MODE_POINT_SPACE: u64 = 4 << 30;

/// A disk directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The path as typed, without trailing slashes ([`disk_path`]): its spelling decides the ring points.
    pub path: PathBuf,
    /// Bytes that were free when the directory was first used (`user.md.size`).
    pub size: u64,
}

/// A disk path as it enters the ring: as typed, trailing slashes removed. A path of nothing else stays `/`.
pub fn disk_path(typed: &Path) -> &Path {
    let bytes = typed.as_os_str().as_bytes();
    let end = bytes.iter().rposition(|&b| b != b'/').map_or(bytes.len().min(1), |last| last + 1);
    Path::new(std::ffi::OsStr::from_bytes(&bytes[..end]))
}

/// The ring hash of a disk path, which is also the disk's id in records of disk vnodes.
pub fn disk_hash(path: &Path) -> u64 {
    sd_hash(path.as_os_str().as_bytes())
}

/// The disks of a node and the ring they form. Immutable; build again when a disk comes or goes.
#[derive(Debug, Clone)]
pub struct DiskRing {
    disks: Box<[Disk]>,
    points: Points<u8>,
}

impl DiskRing {
    /// The ring of `disks`, in any order. Of equal paths the first counts.
    pub fn new(disks: impl Into<Vec<Disk>>) -> Result<Self, Error> {
        Self::build(disks.into(), POINT_SPACE, disk_hash)
    }

    /// The ring of the disks of `node` in a cluster of disk vnodes.
    pub fn of_disk_mode(disks: impl Into<Vec<Disk>>, node: &NodeId) -> Result<Self, Error> {
        let node = node.ring_seed().to_le_bytes();
        Self::build(disks.into(), DISK_MODE_POINT_SPACE, |path| fnv1a64(&node, disk_hash(path)))
    }

    fn build(mut disks: Vec<Disk>, point_space: u64, seed: impl Fn(&Path) -> u64) -> Result<Self, Error> {
        // By bytes: the order of `Path` goes by component and would put `/a/b` before `/a-b`.
        disks.sort_by(|a, b| a.path.as_os_str().as_bytes().cmp(b.path.as_os_str().as_bytes()));
        disks.dedup_by(|a, b| a.path.as_os_str() == b.path.as_os_str());
        if disks.len() > MAX_DISKS {
            return Err(Error::TooManyDisks(disks.len()));
        }
        let chains = disks.iter().map(|disk| (seed(&disk.path), disk.size.div_ceil(point_space)));
        let points = Points::from_chains((0..).zip(chains).map(|(i, (seed, count))| (i, seed, count)))?;
        Ok(Self { disks: disks.into(), points })
    }

    /// The disks in the order of their path bytes.
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// Index of the disk that an object belongs to, for all its strips; none without a disk.
    #[inline]
    pub fn disk_of(&self, oid: Oid) -> Option<usize> {
        self.points.first(hash_oid(oid)).map(usize::from)
    }

    /// The ring points, (hash, disk index), in ascending order.
    pub fn points(&self) -> impl ExactSizeIterator<Item = (u64, u8)> + '_ {
        self.points.iter()
    }

    /// Number of points left out because another point had the same hash.
    pub fn collisions(&self) -> usize {
        self.points.collisions()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(path: &str, size: u64) -> Disk {
        Disk { path: path.into(), size }
    }

    #[test]
    fn trailing_slashes_go_and_everything_else_stays() {
        for (typed, path) in [
            ("/d0///", "/d0"),
            ("/a//b/", "/a//b"),
            ("rel/./x", "rel/./x"),
            ("/", "/"),
            ("//", "/"),
            ("", ""),
        ] {
            assert_eq!(disk_path(Path::new(typed)).as_os_str(), path, "{typed}");
        }
    }

    #[test]
    fn disks_are_ordered_by_path_bytes_and_counted_once() {
        let list = [disk("/a/b", 1), disk("/a-b", 2), disk("/B", 3), disk("/a/b", 4), disk("/a//b", 5)];
        let ring = DiskRing::new(list).expect("few disks");
        let sizes: Vec<u64> = ring.disks().iter().map(|d| d.size).collect();
        assert_eq!(sizes, [3, 2, 5, 1], "another spelling is another disk");
    }

    #[test]
    fn a_point_for_each_started_16_mib() {
        let points = |size| DiskRing::new([disk("/d", size)]).expect("one disk").points().len();
        assert_eq!([0, 1, 16 << 20, (16 << 20) + 1].map(points), [0, 1, 1, 2]);
        assert_eq!(points(64_403_329_024), 3839);
    }

    #[test]
    fn damaged_sizes_and_too_many_disks_are_refused() {
        let huge = DiskRing::new([disk("/d", u64::MAX)]).map(|r| r.points().len());
        assert_eq!(huge, Err(Error::TooManyPoints(1 << 40)));
        let many: Vec<Disk> = (0..65).map(|i| disk(&format!("/d{i}"), 1)).collect();
        assert_eq!(DiskRing::new(many).map(|r| r.points().len()), Err(Error::TooManyDisks(65)));
        assert_eq!(DiskRing::new([]).expect("no disks").disk_of(Oid(1)), None);
    }
}
