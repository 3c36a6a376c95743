//! Opening a store: its disks one by one, and disks that come back after a removal (spec 03, section 15).

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sheepdog_proto::Epoch;
use sheepdog_proto::admin::MAX_DISKS;

use crate::Result;
use crate::disk::Disk;
use crate::error::StoreError;
use crate::layout::Layout;
use crate::name::{Replica, StaleName};
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
        welcome_back(&disks, &options, &mut log)?;
        for disk in &disks {
            disk.start().map_err(StoreError::Retry)?;
        }
        Ok((Store { inner: Arc::new(Inner::new(options, disks)) }, log))
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
    Disk::open(id as u16, &path, options.layout, true)
}

/// The path as typed less trailing slashes.
fn without_slashes(path: &Path) -> PathBuf {
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

/// Disks removed while others went on hold old data: it must not be served as current.
fn welcome_back(disks: &[Arc<Disk>], options: &StoreOptions, log: &mut Vec<String>) -> Result<()> {
    let Some(record) = &options.removed_disks else { return Ok(()) };
    let text = match fs::read_to_string(record) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(StoreError::Open(format!("cannot read {}: {e}", record.display()))),
    };
    let mut left = Vec::new();
    for line in text.lines() {
        match disks.iter().find(|d| d.path.as_os_str() == line) {
            Some(disk) => {
                let moved = stash_disk(disk, options.layout, options.epoch)
                    .map_err(|e| StoreError::Open(format!("cannot clear {line}: {e}")))?;
                log.push(format!("{line} was removed before: {moved} old objects moved to .stale"));
            }
            None => left.push(line),
        }
    }
    let kept = left.iter().map(|l| format!("{l}\n")).collect::<String>();
    fs::write(record, kept).map_err(|e| StoreError::Open(format!("cannot write {}: {e}", record.display())))
}

/// Moves all working files of a disk to its `.stale`.
fn stash_disk(disk: &Disk, layout: Layout, epoch: Epoch) -> std::io::Result<usize> {
    let mut moved = 0;
    for dir in layout.sub_dirs() {
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

impl Inner {
    /// Records that a disk was taken out while others serve on.
    pub(crate) fn record_removal(&self, path: &Path) {
        let Some(record) = &self.options.removed_disks else { return };
        let attempt = || {
            let mut file = fs::OpenOptions::new().append(true).create(true).open(record)?;
            writeln!(file, "{}", path.display())?;
            file.sync_all()
        };
        if let Err(e) = attempt() {
            tracing::error!("cannot record the removal of {} in {}: {e}", path.display(), record.display());
        }
    }
}
