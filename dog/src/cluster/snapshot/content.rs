//! The content-addressed files of a snapshot directory (spec 07, 15.1 to 15.3).
//!
//! A file is named by the SHA-1 of its bytes. Files are written under a temporary name of their own and renamed, so
//! that neither a crash nor another thread ever sees a short file under a valid name; reading verifies the hash.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use sha1::{Digest, Sha1};
use sheepdog_proto::{Oid, Wire};
use thiserror::Error;

use super::object_len;
use crate::inode::InodeHeader;
use crate::out::{self, errno_text};

/// Bytes of a slice of an object.
const SLICE_LEN: usize = 128 << 10;
/// Bytes of a hash.
const HASH_LEN: usize = 20;

/// SHA-1 of a content file.
pub type Hash = [u8; HASH_LEN];

/// What goes wrong with a directory.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// A path is taken by something else.
    #[error("Path is not a directory: {0}")]
    NotADirectory(String),
    /// The directory could not be prepared.
    #[error("Fail to create directory: {}", errno_text(.0))]
    Create(io::Error),
    /// A file could not be read or written.
    #[error("{what}: {}", errno_text(.why))]
    File {
        /// Its path, or what was done.
        what: String,
        /// Why it failed.
        why: io::Error,
    },
    /// A file's content is not what its name says.
    #[error("failed, {0} != {1}")]
    Corrupt(String, String),
    /// A file is too short or too long.
    #[error("{0} is damaged")]
    Damaged(&'static str),
    /// The snapshot log begins with something else.
    #[error("magic number mismatch")]
    Magic,
    /// Wrong index or tag.
    #[error("Snapshot index or tag does not exist.")]
    Unknown,
}

impl SnapshotError {
    /// A file that could not be read or written.
    pub fn file(path: &Path, why: io::Error) -> SnapshotError {
        SnapshotError::File { what: path.display().to_string(), why }
    }

    /// Prints it.
    pub fn report(&self) {
        out::log(self);
        match self {
            SnapshotError::NotADirectory(_) => {
                out::log("Fail to create directory: File exists");
                out::log("Fail to init farm.");
            }
            SnapshotError::Create(_) => out::log("Fail to init farm."),
            _ => {}
        }
    }
}

sheepdog_proto::wire! {
    /// One object of a snapshot.
    TrunkEntry [32] {
        /// The object.
        0 => oid: Oid,
        /// Copies of its VDI.
        8 => copies: u8,
        /// Policy byte.
        9 => copy_policy: u8,
        /// Block size.
        10 => block_size_shift: u8,
        /// The list of its slices.
        12 => slices: [u8; 20],
    }
}

fn hex(hash: &Hash) -> String {
    hash.iter().map(|b| format!("{b:02x}")).collect()
}

/// A snapshot directory. Threads may use it at the same time.
#[derive(Debug, Clone)]
pub struct Content {
    root: PathBuf,
}

impl Content {
    /// Opens a directory, creating what is missing.
    pub fn open(path: &[u8]) -> Result<Content, SnapshotError> {
        let root = PathBuf::from(OsStr::from_bytes(path));
        make_dir(&root)?;
        let objects = root.join("objects");
        make_dir(&objects)?;
        (0..=255u8).try_for_each(|first| make_dir(&objects.join(format!("{first:02x}"))))?;
        let content = Content { root };
        let log = content.log_path();
        fs::OpenOptions::new().append(true).create(true).open(&log).map_err(SnapshotError::Create)?;
        Ok(content)
    }

    /// The snapshot log.
    pub fn log_path(&self) -> PathBuf {
        self.root.join("user_snap")
    }

    fn path_of(&self, hash: &Hash) -> PathBuf {
        let name = hex(hash);
        self.root.join("objects").join(&name[..2]).join(&name[2..])
    }

    /// Stores bytes; what is there already is kept.
    pub fn put(&self, bytes: &[u8]) -> Result<Hash, SnapshotError> {
        let hash: Hash = Sha1::digest(bytes).into();
        let path = self.path_of(&hash);
        if fs::metadata(&path).is_ok_and(|meta| meta.len() == bytes.len() as u64) {
            return Ok(hash);
        }
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_extension(format!("tmp{}-{number}", std::process::id()));
        let write = || -> io::Result<()> {
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o666)
                .open(&temporary)?;
            file.write_all(bytes)?;
            fs::rename(&temporary, &path)
        };
        write().map_err(|e| SnapshotError::file(&path, e))?;
        Ok(hash)
    }

    /// Reads a content file and verifies it.
    pub fn get(&self, hash: &Hash) -> Result<Vec<u8>, SnapshotError> {
        let path = self.path_of(hash);
        let bytes = fs::read(&path).map_err(|e| SnapshotError::file(&path, e))?;
        let found: Hash = Sha1::digest(&bytes).into();
        if found != *hash {
            return Err(SnapshotError::Corrupt(hex(hash), hex(&found)));
        }
        Ok(bytes)
    }

    /// Stores an object in slices; the hash is that of their list.
    pub fn put_object(&self, bytes: &[u8]) -> Result<Hash, SnapshotError> {
        let mut list = Vec::with_capacity(bytes.len().div_ceil(SLICE_LEN) * HASH_LEN);
        for slice in bytes.chunks(SLICE_LEN) {
            list.extend(self.put(slice)?);
        }
        self.put(&list)
    }

    fn slices(&self, entry: &TrunkEntry) -> Result<Vec<Hash>, SnapshotError> {
        let list = self.get(&entry.slices)?;
        let expected = object_len(entry.oid, entry.block_size_shift).div_ceil(SLICE_LEN);
        if list.len() != expected * HASH_LEN {
            return Err(SnapshotError::Damaged("the list of an object's slices"));
        }
        Ok(list.chunks_exact(HASH_LEN).map(Hash::get).collect())
    }

    /// Puts an object together.
    pub fn object(&self, entry: &TrunkEntry) -> Result<Vec<u8>, SnapshotError> {
        let length = object_len(entry.oid, entry.block_size_shift);
        let mut bytes = Vec::with_capacity(length);
        for slice in self.slices(entry)? {
            bytes.extend(self.get(&slice)?);
        }
        if bytes.len() != length {
            return Err(SnapshotError::Damaged("an object's slices"));
        }
        Ok(bytes)
    }

    /// The header of an inode object.
    pub fn inode_header(&self, entry: &TrunkEntry) -> Result<InodeHeader, SnapshotError> {
        let damaged = SnapshotError::Damaged("an inode's first slice");
        let first = self.slices(entry)?.first().map(|slice| self.get(slice)).transpose()?;
        first.and_then(|bytes| InodeHeader::decode(&bytes).ok()).ok_or(damaged)
    }

    /// Stores the list of a snapshot's objects.
    pub fn put_trunk(&self, entries: &[TrunkEntry]) -> Result<Hash, SnapshotError> {
        self.put(&entries.iter().flat_map(|entry| entry.to_bytes()).collect::<Vec<u8>>())
    }

    /// The objects of a snapshot.
    pub fn trunk(&self, hash: &Hash) -> Result<Vec<TrunkEntry>, SnapshotError> {
        let bytes = self.get(hash)?;
        if bytes.len() % TrunkEntry::LEN != 0 {
            return Err(SnapshotError::Damaged("the list of objects"));
        }
        Ok(bytes.chunks_exact(TrunkEntry::LEN).map(TrunkEntry::get).collect())
    }
}

fn make_dir(path: &Path) -> Result<(), SnapshotError> {
    match fs::DirBuilder::new().mode(0o755).create(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            Err(SnapshotError::NotADirectory(path.display().to_string()))
        }
        other => other.map_err(SnapshotError::Create),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_may_store_the_same_bytes_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let content = Content::open(dir.path().as_os_str().as_bytes()).unwrap();
        let object: Vec<u8> = (0..1u32 << 18).flat_map(|i| i.to_le_bytes()).collect();
        let hashes: Vec<Hash> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..8).map(|_| scope.spawn(|| content.put_object(&object).unwrap())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(hashes.iter().all(|hash| *hash == hashes[0]));
        let entry =
            TrunkEntry { oid: Oid(5), block_size_shift: 20, slices: hashes[0], ..TrunkEntry::zeroed() };
        assert_eq!(content.object(&entry).unwrap(), object);
        let files =
            (0..=255u8).flat_map(|first| fs::read_dir(content.root.join(format!("objects/{first:02x}"))));
        let names: Vec<_> = files.flatten().map(|entry| entry.unwrap().file_name()).collect();
        assert!(names.iter().all(|name| name.len() == 38), "a temporary file is left: {names:?}");
    }

    #[test]
    fn objects_come_back_and_damage_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let content = Content::open(dir.path().as_os_str().as_bytes()).unwrap();
        let object: Vec<u8> = (0..1u32 << 18).flat_map(|i| i.to_le_bytes()).collect();
        let slices = content.put_object(&object).unwrap();
        let entry = TrunkEntry { oid: Oid(5), block_size_shift: 20, slices, ..TrunkEntry::zeroed() };
        assert_eq!(content.object(&entry).unwrap(), object);
        let trunk = content.put_trunk(&[entry]).unwrap();
        assert_eq!(content.trunk(&trunk).unwrap(), [entry]);
        let first = content.slices(&entry).unwrap()[0];
        fs::write(content.path_of(&first), b"short").unwrap();
        assert!(matches!(content.object(&entry), Err(SnapshotError::Corrupt(..))));
        content.put_object(&object).unwrap();
        assert_eq!(content.object(&entry).unwrap(), object, "saving again heals a short file");
    }
}
