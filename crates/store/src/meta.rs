//! The metadata directory: lock, `config`, epoch logs, `node_config` (spec 03, sections 2 to 5).
//!
//! Every file is replaced as a whole: temporary file, synchronous write, rename, sync of the directory, so a crash leaves
//! the old content or the new one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, fcntl};
use parking_lot::Mutex;
use sheepdog_proto::config::{EpochLog, STORE_VERSION, StoreConfig};
use sheepdog_proto::{Epoch, cstr};

use crate::disk::{make_dir, sync_dir};
use crate::error::strerror;

/// Cluster flag of stores with disk vnodes, whose node records have another length.
const FLAG_DISK_MODE: u16 = 0x02;

/// Side file that exists while the store is being formatted.
const FORMATTING: &str = "formatting";

/// Why the metadata directory cannot be used. Displays as the log line.
#[derive(Debug, thiserror::Error)]
pub enum MetaError {
    /// The directory does not exist and cannot be made.
    #[error("cannot create the directory {} ({reason})", path.display())]
    Create {
        /// The directory.
        path: PathBuf,
        /// The system's text.
        reason: String,
    },
    /// Another daemon runs on it. Two lines.
    #[error("another sheep daemon is using {0}\nlocking directory: {0} failed", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The lock failed for another reason.
    #[error("unable to get base dir lock ({0})")]
    Lock(String),
    /// `config` was written by another release.
    #[error("This sheep version is not compatible with the existing data layout, {0}")]
    Version(u16),
    /// An older or newer store that cannot be taken over; the text says why.
    #[error("{0}")]
    Upgrade(String),
    /// The store was formatted with disk vnodes.
    #[error("this store was made by a sheep built with disk vnodes, whose format is not supported")]
    DiskMode,
    /// An epoch log is damaged.
    #[error("invalid epoch {0} log")]
    InvalidEpoch(Epoch),
    /// No log of that epoch here.
    #[error("no log of epoch {0}")]
    NoEpoch(Epoch),
    /// Anything else.
    #[error("{}: {source}", path.display())]
    Io {
        /// What was accessed.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
}

type Result<T> = std::result::Result<T, MetaError>;

fn at(path: &Path) -> impl FnOnce(io::Error) -> MetaError {
    let path = path.to_owned();
    move |source| MetaError::Io { path, source }
}

/// The locked metadata directory of a running daemon.
#[derive(Debug)]
pub struct MetaDir {
    path: PathBuf,
    /// Keeps the lock: it vanishes when *any* descriptor of the file is closed, so this is the only one.
    _lock: File,
    /// Held while a file is replaced: its temporary name is always the same.
    replacing: Mutex<()>,
}

impl MetaDir {
    /// Creates the directory if needed (one level), locks it for the life of the value, and makes `obj` and `epoch`.
    pub fn open(path: &Path) -> Result<MetaDir> {
        let create = |e: io::Error| MetaError::Create { path: path.to_owned(), reason: strerror(&e) };
        make_dir(path).map_err(create)?;
        let path = fs::canonicalize(path).map_err(create)?;
        let _lock = lock(&path)?;
        for dir in ["obj", "epoch"] {
            make_dir(&path.join(dir)).map_err(at(&path.join(dir)))?;
        }
        Ok(MetaDir { path, _lock, replacing: Mutex::new(()) })
    }

    /// The directory, absolute and without symbolic links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The disk of a store with a single directory.
    pub fn default_disk(&self) -> PathBuf {
        self.path.join("obj")
    }

    /// Whether a directory is somebody's metadata directory, which must not become a disk.
    pub fn is_meta_dir(path: &Path) -> bool {
        File::open(path.join("config")).is_ok() && File::open(path.join("epoch")).is_ok()
    }

    /// Reads `config`. Absent or empty: all zero, but of this version.
    pub fn read_config(&self) -> Result<StoreConfig> {
        let temporary = self.path.join("config.tmp");
        match fs::remove_file(&temporary) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(at(&temporary)(e)),
            _ => {}
        }
        let path = self.path.join("config");
        let mut bytes = [0; StoreConfig::LEN];
        let len = match File::open(&path).and_then(|mut f| read_up_to(&mut f, &mut bytes)) {
            Ok(len) => len,
            Err(e) if e.kind() == io::ErrorKind::NotFound => 0,
            Err(e) => return Err(at(&path)(e)),
        };
        let mut config = StoreConfig::from_bytes(&bytes);
        if len == 0 {
            config.version = STORE_VERSION;
        }
        if config.version != STORE_VERSION {
            return Err(MetaError::Version(config.version));
        }
        if u16::from_le_bytes([bytes[8], bytes[9]]) & FLAG_DISK_MODE != 0 {
            return Err(MetaError::DiskMode);
        }
        Ok(config)
    }

    /// Replaces `config`.
    pub fn write_config(&self, config: &StoreConfig) -> Result<()> {
        let _one_at_a_time = self.replacing.lock();
        self.replace(&self.path, "config", &config.to_bytes())
    }

    fn epoch_dir(&self) -> PathBuf {
        self.path.join("epoch")
    }

    fn epoch_name(epoch: Epoch) -> String {
        format!("{:08}", epoch.0)
    }

    /// The greatest epoch with a log here; 0 if there is none.
    pub fn latest_epoch(&self) -> Result<Epoch> {
        let dir = self.epoch_dir();
        let mut latest = 0;
        for entry in fs::read_dir(&dir).map_err(at(&dir))? {
            let name = entry.map_err(at(&dir))?.file_name();
            let name = name.to_str().unwrap_or_default();
            if name.len() == 8 && name.bytes().all(|b| b.is_ascii_digit()) {
                latest = latest.max(name.parse().unwrap_or(0));
            }
        }
        Ok(Epoch(latest))
    }

    /// Reads the log of an epoch.
    pub fn read_epoch(&self, epoch: Epoch) -> Result<EpochLog> {
        let path = self.epoch_dir().join(Self::epoch_name(epoch));
        match fs::read(&path) {
            Ok(bytes) => EpochLog::decode(&bytes).map_err(|_| MetaError::InvalidEpoch(epoch)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(MetaError::NoEpoch(epoch)),
            Err(e) => Err(at(&path)(e)),
        }
    }

    /// Writes or replaces the log of an epoch. The time is the log's: a log fetched from another node keeps its own.
    pub fn write_epoch(&self, epoch: Epoch, log: &EpochLog) -> Result<()> {
        let _one_at_a_time = self.replacing.lock();
        self.replace(&self.epoch_dir(), &Self::epoch_name(epoch), &log.encode())
    }

    /// Writes a log that another node had, unless this node has one of its own meanwhile.
    pub fn keep_epoch(&self, epoch: Epoch, log: &EpochLog) -> Result<()> {
        let _one_at_a_time = self.replacing.lock();
        let (dir, name) = (self.epoch_dir(), Self::epoch_name(epoch));
        if dir.join(&name).exists() { Ok(()) } else { self.replace(&dir, &name, &log.encode()) }
    }

    /// Removes the logs of epochs 1 to `latest` (format).
    pub fn remove_epochs(&self, latest: Epoch) -> Result<()> {
        let dir = self.epoch_dir();
        for entry in fs::read_dir(&dir).map_err(at(&dir))? {
            let entry = entry.map_err(at(&dir))?;
            let name = entry.file_name();
            let name = name.to_str().unwrap_or_default();
            let is_log = name.len() == 8 && name.bytes().all(|b| b.is_ascii_digit());
            if is_log && name.parse().is_ok_and(|n: u32| (1..=latest.0).contains(&n)) {
                fs::remove_file(entry.path()).map_err(at(&entry.path()))?;
            }
        }
        sync_dir(&dir).map_err(at(&dir))
    }

    /// The store driver that `dog node format` chose for this node, and a warning to log. The original wrote `META`
    /// plus `node_config` without a slash; such a file is obeyed if the proper one is absent.
    pub fn node_config(&self) -> Result<(Option<String>, Option<String>)> {
        let proper = self.path.join("node_config");
        let mut sibling = self.path.clone().into_os_string();
        sibling.push("node_config");
        let sibling = PathBuf::from(sibling);
        let read = |path: &Path| match fs::read(path) {
            Ok(bytes) => Ok(Some(String::from_utf8_lossy(cstr(&bytes[..bytes.len().min(16)])).into_owned())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(at(path)(e)),
        };
        let (ours, theirs) = (read(&proper)?, read(&sibling)?);
        let warning = theirs.as_ref().map(|_| {
            let verb = if ours.is_some() { "ignored" } else { "obeyed" };
            format!("{} is misplaced ({verb}); it belongs to {}", sibling.display(), proper.display())
        });
        Ok((ours.or(theirs), warning))
    }

    /// Replaces a file; under the lock.
    fn replace(&self, dir: &Path, name: &str, content: &[u8]) -> Result<()> {
        replace_file(dir, name, content).map_err(at(&dir.join(name)))
    }

    /// From here to [`MetaDir::end_format`] the objects may belong to the old cluster or the new one, or be gone: a start
    /// in between ends the format by making the store empty and this node a member of no cluster.
    pub fn begin_format(&self) -> Result<()> {
        let _one_at_a_time = self.replacing.lock();
        self.replace(&self.path, FORMATTING, b"")
    }

    /// See [`MetaDir::begin_format`].
    pub fn end_format(&self) -> Result<()> {
        let path = self.path.join(FORMATTING);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(at(&path)(e)),
            _ => sync_dir(&self.path).map_err(at(&self.path)),
        }
    }

    /// Whether a format was begun and not ended.
    pub fn is_formatting(&self) -> bool {
        self.path.join(FORMATTING).exists()
    }
}

/// Replaces a file by way of `<name>.tmp`, durably: a crash leaves the old content or the new one. One caller at a time.
pub fn replace_file(dir: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    let (path, temporary) = (dir.join(name), dir.join(format!("{name}.tmp")));
    match fs::remove_file(&temporary) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o660)
        .custom_flags(libc::O_SYNC)
        .open(&temporary)?;
    file.write_all(content)?;
    fs::rename(&temporary, &path)?;
    sync_dir(dir)
}

fn read_up_to(file: &mut File, buf: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read(&mut buf[done..])? {
            0 => break,
            n => done += n,
        }
    }
    Ok(done)
}

/// Takes the POSIX record lock that also excludes the original.
fn lock(dir: &Path) -> Result<File> {
    let failed = |e: io::Error| MetaError::Lock(strerror(&e));
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o660)
        .open(dir.join("lock"))
        .map_err(failed)?;
    let range = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 1,
        l_pid: 0,
    };
    match fcntl(&file, FcntlArg::F_SETLK(&range)) {
        Ok(_) => Ok(file),
        Err(nix::errno::Errno::EACCES | nix::errno::Errno::EAGAIN) => {
            Err(MetaError::InUse { path: dir.to_owned() })
        }
        Err(e) => Err(failed(e.into())),
    }
}
