//! Space accounting (spec 03, section 16). Counters, not directory walks: used bytes come from the scan and are kept up to
//! date by every change of a file.

use sheepdog_proto::admin::MdInfo;
use sheepdog_proto::fixed_str;

use crate::store::Store;

/// Space of a node, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Space {
    /// Free plus used.
    pub size: u64,
    /// Free on the file systems now.
    pub free: u64,
    /// Allocated to working files.
    pub used: u64,
}

impl Store {
    /// Space of all disks.
    pub fn space(&self) -> Space {
        let mut space = Space::default();
        for disk in &self.inner.disks().disks {
            space.free += disk.free().unwrap_or(0);
            space.used += self.inner.index.used(disk.id);
        }
        space.size = space.free + space.used;
        space
    }

    /// The disks in path order, for MD_INFO.
    pub fn md_info(&self) -> Vec<MdInfo> {
        let set = self.inner.disks();
        let info = set.disks.iter().enumerate().map(|(i, disk)| MdInfo {
            idx: i as i32,
            free: disk.free().unwrap_or(0),
            used: self.inner.index.used(disk.id),
            path: fixed_str(disk.path.as_os_str().as_encoded_bytes()),
        });
        info.collect()
    }

    /// Sum of the sizes of the disks at their first use (`user.md.size`): what a node offers.
    pub fn disk_sizes_sum(&self) -> u64 {
        self.inner.disks().disks.iter().map(|d| d.size).sum()
    }
}
