//! An open object file: its descriptors, its block map, when it was last read.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{LazyLock, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::blockmap::{BlockMap, MAX_MAPPED_FILE};
use crate::sys::{fiemap, rw};

/// How long after a read an object counts as being read.
const READ_RECENTLY: Duration = Duration::from_secs(120);

/// See the module. The two descriptors refer to the same inode for life.
pub(crate) struct OpenObject {
    /// Goes through the page cache.
    pub(crate) file: File,
    /// `O_DIRECT`; opened with the first write that wants it.
    direct: OnceLock<Option<File>>,
    /// Filled by the first durable write on a disk whose flush may be shared.
    pub(crate) map: Mutex<Option<BlockMap>>,
    /// Milliseconds since the process began, plus 1; 0 = never.
    last_read: AtomicU64,
}

fn now() -> u64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed().as_millis() as u64 + 1
}

impl OpenObject {
    /// Opens an existing regular file for reading and writing.
    pub(crate) fn open(path: &Path) -> io::Result<OpenObject> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        Ok(OpenObject { file, direct: OnceLock::new(), map: Mutex::new(None), last_read: AtomicU64::new(0) })
    }

    /// The `O_DIRECT` descriptor, where there can be one.
    pub(crate) fn direct(&self) -> Option<&File> {
        self.direct.get_or_init(|| reopen_direct(&self.file).ok()).as_ref()
    }

    /// Whether the file lost its last name behind the store's back.
    pub(crate) fn is_unlinked(&self) -> bool {
        rw::link_count(&self.file).is_ok_and(|n| n == 0)
    }

    /// Reads the block map from the file system if there is none yet. The file is synced first: extents and size that
    /// the file system only has in memory must not pass for durable.
    pub(crate) fn seed_map(&self, slot: &mut Option<BlockMap>) -> io::Result<()> {
        if slot.is_none() {
            self.file.sync_data()?;
            let extents = fiemap::extents(&self.file)?;
            let size = self.file.metadata()?.len().min(MAX_MAPPED_FILE);
            *slot = Some(BlockMap::from_extents(size, &extents));
        }
        Ok(())
    }

    /// Notes a read.
    pub(crate) fn touch_read(&self) {
        self.last_read.store(now(), Relaxed);
    }

    /// Whether the object was ever read through this handle.
    pub(crate) fn was_read(&self) -> bool {
        self.last_read.load(Relaxed) != 0
    }

    /// Whether its pages are worth keeping in the page cache.
    pub(crate) fn read_recently(&self) -> bool {
        let last = self.last_read.load(Relaxed);
        last != 0 && now() - last < READ_RECENTLY.as_millis() as u64
    }
}

/// A second descriptor of the same inode, with `O_DIRECT`.
pub(crate) fn reopen_direct(file: &File) -> io::Result<File> {
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(own)
}
