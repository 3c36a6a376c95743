//! One disk: an object directory with its threads' queues and counters (spec 03, sections 6 and 15).

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use nix::sys::statvfs::statvfs;
use parking_lot::Mutex;

use crate::error::strerror;
use crate::failure::MediumErrors;
use crate::index::DiskId;
use crate::layout::{Layout, STALE_DIR};
use crate::name::{Replica, StaleName};
use crate::probe::{self, Abilities};
use crate::queue::{Job, Queue};
use crate::read::ReadJob;
use crate::{commit, read, worker};

/// Bytes of a disk at first use; fixes its weight for ever.
const SIZE_XATTR: &str = "user.md.size";

/// See the module.
pub(crate) struct Disk {
    pub(crate) id: DiskId,
    /// As typed, without trailing slashes.
    pub(crate) path: PathBuf,
    /// `user.md.size`, in bytes.
    pub(crate) size: u64,
    /// Device of the directory when it was opened.
    pub(crate) device: u64,
    /// Whether the layout is [`Layout::Tree`]; a format may change it.
    tree: AtomicBool,
    pub(crate) abilities: Abilities,
    /// A clean file: its `fdatasync` is a device flush.
    pub(crate) flush: File,
    /// Writes below 256 KiB, for the committer.
    pub(crate) small: Queue<Job>,
    /// Everything else that changes files, for the workers.
    pub(crate) large: Queue<Job>,
    pub(crate) reads: Queue<ReadJob>,
    pub(crate) medium_errors: Mutex<MediumErrors>,
    /// Directories with renames, links and unlinks not yet synced.
    pub(crate) dirty_dirs: Mutex<BTreeSet<PathBuf>>,
    /// Taken out of service: nothing may be acknowledged from here any more.
    pub(crate) removed: AtomicBool,
}

impl Disk {
    /// Prepares a directory: creates it, checks xattrs, with `empty` deletes everything in it, fixes its size. Errors are
    /// the log line to write.
    pub(crate) fn open(id: DiskId, path: &Path, layout: Layout, empty: bool) -> Result<Disk, String> {
        let shown = path.display();
        make_dir(path).map_err(|e| format!("can't mkdir for {shown}, {}", strerror(&e)))?;
        if let Err(e) = xattr::get(path, "user.dummy")
            && e.raw_os_error() == Some(libc::ENOTSUP)
        {
            return Err(format!("multi-disk support need xattr feature for path: {shown}"));
        }
        let prepared = || -> io::Result<(u64, File, u64)> {
            if empty {
                delete_content(path)?;
            }
            make_dirs(path, layout)?;
            if empty {
                sync_dir(path)?;
            }
            Ok((disk_size(path)?, probe::flush_file(path)?, fs::metadata(path)?.dev()))
        };
        let (size, flush, device) = prepared().map_err(|e| format!("{shown} is broken: {}", strerror(&e)))?;
        if size == 0 {
            return Err(format!("{shown} is broken: no space"));
        }
        Ok(Disk {
            id,
            path: path.to_owned(),
            size,
            device,
            tree: AtomicBool::new(layout == Layout::Tree),
            abilities: probe::abilities(path, &flush),
            flush,
            small: Queue::new(),
            large: Queue::new(),
            reads: Queue::new(),
            medium_errors: Mutex::default(),
            dirty_dirs: Mutex::default(),
            removed: AtomicBool::new(false),
        })
    }

    /// Starts the disk's threads; they end when the queues are closed and empty.
    pub(crate) fn start(self: &Arc<Disk>) -> io::Result<()> {
        let spawn = |name: &str, run: fn(Arc<Disk>)| {
            let disk = self.clone();
            std::thread::Builder::new().name(name.into()).spawn(move || run(disk)).map(drop)
        };
        spawn("disk-commit", commit::run)?;
        for _ in 0..worker::WORKERS {
            spawn("disk-work", worker::run)?;
        }
        for _ in 0..read::READERS {
            spawn("disk-read", read::run)?;
        }
        Ok(())
    }

    /// Lets the threads finish what is queued and end.
    pub(crate) fn stop(&self) {
        self.small.close();
        self.large.close();
        self.reads.close();
    }

    /// Where its files are.
    pub(crate) fn layout(&self) -> Layout {
        if self.tree.load(Relaxed) { Layout::Tree } else { Layout::Plain }
    }

    /// Makes the directories of a layout, which holds from then on.
    pub(crate) fn set_layout(&self, layout: Layout) -> io::Result<()> {
        make_dirs(&self.path, layout)?;
        self.tree.store(layout == Layout::Tree, Relaxed);
        self.mark_dirty(self.path.clone());
        Ok(())
    }

    /// Path of a working file.
    pub(crate) fn file(&self, replica: Replica) -> PathBuf {
        self.layout().path(&self.path, replica)
    }

    /// Path of a stale file.
    pub(crate) fn stale_file(&self, name: StaleName) -> PathBuf {
        self.layout().stale_path(&self.path, name)
    }

    /// Directory of a working file.
    pub(crate) fn dir(&self, replica: Replica) -> PathBuf {
        self.layout().dir(&self.path, replica.oid)
    }

    /// Directory of stale files.
    pub(crate) fn stale_dir(&self) -> PathBuf {
        self.path.join(STALE_DIR)
    }

    /// Notes that a directory must be synced before the next completion report.
    pub(crate) fn mark_dirty(&self, dir: PathBuf) {
        self.dirty_dirs.lock().insert(dir);
    }

    /// Syncs the directories noted; those that fail stay noted.
    pub(crate) fn sync_dirty(&self) -> io::Result<()> {
        let dirs = std::mem::take(&mut *self.dirty_dirs.lock());
        let mut result = Ok(());
        for dir in dirs {
            match sync_dir(&dir) {
                Ok(()) => {}
                // A format with another layout deleted it; a disk that is gone as a whole is another matter.
                Err(e) if e.kind() == io::ErrorKind::NotFound && self.path.is_dir() => {}
                Err(e) => {
                    self.mark_dirty(dir);
                    result = Err(e);
                }
            }
        }
        result
    }

    /// Bytes free for us now.
    pub(crate) fn free(&self) -> io::Result<u64> {
        free_bytes(&self.path)
    }

    /// Whether the disk is out of service.
    pub(crate) fn is_removed(&self) -> bool {
        self.removed.load(Relaxed)
    }
}

/// Creates one directory level, mode 0770 less the umask; an existing directory is fine.
pub(crate) fn make_dir(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o770).create(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        other => other,
    }
}

/// Makes the directories below a disk.
fn make_dirs(disk: &Path, layout: Layout) -> io::Result<()> {
    make_dir(&disk.join(STALE_DIR))?;
    layout.sub_dirs().iter().try_for_each(|dir| make_dir(&disk.join(dir)))
}

/// Deletes everything in a directory.
pub(crate) fn delete_content(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => fs::remove_dir_all(entry.path())?,
            false => fs::remove_file(entry.path())?,
        }
    }
    Ok(())
}

/// Makes the names in a directory durable.
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Bytes allocated to a file; 0 if it is absent.
pub(crate) fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::symlink_metadata(path).map_or(0, |m| m.blocks() * 512)
}

fn free_bytes(path: &Path) -> io::Result<u64> {
    let vfs = statvfs(path)?;
    // The types differ between targets.
    #[allow(clippy::unnecessary_cast)]
    Ok(vfs.fragment_size() as u64 * vfs.blocks_available() as u64)
}

/// The recorded size, or the free bytes now, which get recorded.
fn disk_size(path: &Path) -> io::Result<u64> {
    if let Some(value) = xattr::get(path, SIZE_XATTR)?
        && let Ok(bytes) = <[u8; 8]>::try_from(value.as_slice())
    {
        return Ok(u64::from_le_bytes(bytes));
    }
    let size = free_bytes(path)?;
    if size > 0 {
        xattr::set(path, SIZE_XATTR, &size.to_le_bytes())?;
    }
    Ok(size)
}
