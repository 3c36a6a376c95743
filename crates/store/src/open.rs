//! Opening a store: its disks one by one, and disks that come back after a removal (spec 03, section 15).

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sheepdog_proto::Epoch;
use sheepdog_proto::admin::MAX_DISKS;

use crate::Result;
use crate::disk::Disk;
use crate::error::StoreError;
use crate::name::{Replica, StaleName};
use crate::removed::{self, Memory};
use crate::ring::DiskRing;
use crate::store::{Inner, Store, StoreOptions};

impl Store {
    /// Opens the disks (absolute paths, hashed exactly as given less trailing slashes) and starts their threads. A disk
    /// that cannot be used is left out, which the returned log lines tell. Call [`Store::scan`] next.
    pub fn open(disk_paths: &[PathBuf], options: StoreOptions) -> Result<(Store, Vec<String>)> {
        let mut log = Vec::new();
        let mut disks: Vec<Arc<Disk>> = Vec::new();
        for (i, path) in disk_paths.iter().enumerate() {
            match add(&disks, i, path, &options) {
                Ok(disk) => {
                    let points = DiskRing::points_of(disk.size);
                    disks.push(Arc::new(disk));
                    log.push(format!(
                        "{}, vdisk nr {points}, total disk {}",
                        without_slashes(path).display(),
                        disks.len()
                    ));
                }
                Err(line) => log.push(line),
            }
        }
        if disks.is_empty() {
            log.push("There isn't any available disk!".into());
            return Err(StoreError::Open(log.join("\n")));
        }
        let lacking = welcome_back(&disks, &options, &mut log)?;
        for disk in &disks {
            disk.start().map_err(StoreError::Retry)?;
        }
        Ok((Store { inner: Arc::new(Inner::new(options, disks)), lacking }, log))
    }
}

fn add(
    disks: &[Arc<Disk>],
    id: usize,
    path: &Path,
    options: &StoreOptions,
) -> std::result::Result<Disk, String> {
    let path = without_slashes(path);
    if !path.is_absolute() {
        return Err(format!("disk path {} is not absolute", path.display()));
    }
    if disks.iter().any(|d| d.path.as_os_str() == path.as_os_str()) {
        return Err(format!("duplicate path {}", path.display()));
    }
    if disks.len() >= MAX_DISKS {
        return Err(format!("{}: a node has at most {MAX_DISKS} disks", path.display()));
    }
    Disk::open(id as u16, &path, options.layout, false)
}

/// The path as typed less trailing slashes.
pub(crate) fn without_slashes(path: &Path) -> PathBuf {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let mut bytes = path.as_os_str().as_bytes();
    while bytes.len() > 1
        && let Some(shorter) = bytes.strip_suffix(b"/")
    {
        bytes = shorter;
    }
    PathBuf::from(OsStr::from_bytes(bytes))
}

/// Disks removed while others went on hold old data: it must not be served as current. True if a disk with current
/// objects is not listed any more.
fn welcome_back(disks: &[Arc<Disk>], options: &StoreOptions, log: &mut Vec<String>) -> Result<bool> {
    let Some(record) = &options.removed_disks else { return Ok(false) };
    let failed = |what, e| StoreError::Open(format!("cannot {what} {}: {e}", record.display()));
    let before = removed::read(record).map_err(|e| failed("read", e))?;
    let (mut left, mut lacking) = (Vec::new(), false);
    for (path, memory) in before.iter().cloned() {
        let shown = path.display().to_string();
        let disk = disks.iter().find(|d| d.path.as_os_str() == path.as_os_str());
        match (disk, memory) {
            (Some(disk), Memory::Removed) => {
                let moved = stash_disk(disk, options.epoch)
                    .map_err(|e| StoreError::Open(format!("cannot clear {shown}: {e}")))?;
                log.push(format!("{shown} was removed before: {moved} old objects moved to .stale"));
            }
            (Some(_), Memory::Held) => {}
            (None, Memory::Held) => {
                log.push(format!("{shown} has objects of this node but is not listed: they are missing"));
                lacking = true;
                left.push((path, Memory::Removed));
            }
            (None, Memory::Removed) => left.push((path, memory)),
        }
    }
    if left != before {
        removed::write(record, &left).map_err(|e| failed("write", e))?;
    }
    Ok(lacking)
}

/// Moves all working files of a disk to its `.stale`.
fn stash_disk(disk: &Disk, epoch: Epoch) -> std::io::Result<usize> {
    let mut moved = 0;
    // In a tree, too, an object may lie flat.
    let mut dirs = disk.layout().sub_dirs();
    dirs.push(String::new());
    dirs.dedup();
    for dir in dirs {
        for entry in fs::read_dir(disk.path.join(dir))? {
            let entry = entry?;
            let Some(replica) = entry.file_name().to_str().and_then(Replica::parse) else { continue };
            if entry.file_type()?.is_file() {
                fs::rename(entry.path(), disk.stale_file(StaleName { replica, epoch }))?;
                moved += 1;
            }
        }
    }
    disk.mark_dirty(disk.stale_dir());
    disk.mark_dirty(disk.path.clone());
    disk.sync_dirty()?;
    Ok(moved)
}
