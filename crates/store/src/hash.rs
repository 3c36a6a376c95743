//! SHA-1 of an object's file (spec 03, section 13).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::unistd::{Whence, lseek};
use sha1::{Digest, Sha1};
use sheepdog_buffer::{PageBuf, is_zero};
use sheepdog_proto::Epoch;

use crate::Result;
use crate::error::StoreError;
use crate::name::{Replica, StaleName};
use crate::read::read_zero_filled;
use crate::store::Store;
use crate::trim::BLOCK;

/// Digest of a snapshot's data object, kept by the original.
const HASH_XATTR: &str = "user.obj.sha1";
/// Bytes read at a time.
const CHUNK: usize = 1 << 20;

/// What is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DigestOf {
    /// SHA-1 of all bytes.
    All,
    /// The same, of something that never changes (data objects of snapshots): a digest kept in the file's attributes is
    /// taken as it is, and stored there after computing it.
    Frozen,
    /// SHA-1 of the 4 KiB blocks that are not zero, each after its number (8 bytes, little endian): files with large holes
    /// cost nothing.
    Blocks,
}

impl Store {
    /// SHA-1 of the first `size` bytes (the store size; a short file counts as padded with zeros) of the working file,
    /// or, if there is none, of the stale file for epoch `stale` ([`Store::stale_at`]).
    pub async fn hash(
        &self,
        replica: Replica,
        size: u64,
        stale: Option<Epoch>,
        of: DigestOf,
    ) -> Result<[u8; 20]> {
        let of_working = self
            .on_working(replica, move |inner, disk| {
                digest(&disk.file(replica), size, of).map_err(|e| inner.fault(disk, replica.oid, &e))
            })
            .await;
        let (Err(StoreError::NoObject), Some(epoch)) = (&of_working, stale) else { return of_working };
        let epoch = self.stale_at(replica, epoch).ok_or(StoreError::NoObject)?;
        let name = StaleName { replica, epoch };
        self.on_stale(name, move |disk| digest(&disk.stale_file(name), size, of)).await
    }
}

fn digest(path: &Path, size: u64, of: DigestOf) -> io::Result<[u8; 20]> {
    // Whatever lies there under an object's name must not block the thread.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    if of == DigestOf::Blocks {
        return of_blocks(&file, size);
    }
    if of == DigestOf::Frozen
        && let Ok(Some(kept)) = xattr::get(path, HASH_XATTR)
        && let Ok(kept) = <[u8; 20]>::try_from(kept.as_slice())
    {
        return Ok(kept);
    }
    let mut sha = Sha1::new();
    let mut buf = PageBuf::dirty(CHUNK);
    let mut offset = 0;
    while offset < size {
        let len = (size - offset).min(CHUNK as u64) as usize;
        read_zero_filled(&file, &mut buf[..len], offset)?;
        sha.update(&buf[..len]);
        offset += len as u64;
    }
    let digest: [u8; 20] = sha.finalize().into();
    if of == DigestOf::Frozen {
        // Only an optimisation for the next time.
        let _ = xattr::set(path, HASH_XATTR, &digest);
    }
    Ok(digest)
}

fn of_blocks(file: &File, size: u64) -> io::Result<[u8; 20]> {
    let mut sha = Sha1::new();
    let mut buf = PageBuf::dirty(CHUNK);
    let mut offset = 0;
    while let Some(start) = next_data(file, offset)?.filter(|start| *start < size) {
        // Whole chunks at fixed places, so that it does not matter where a file system says that data begins.
        offset = start - start % CHUNK as u64;
        let len = (size - offset).min(CHUNK as u64) as usize;
        read_zero_filled(file, &mut buf[..len], offset)?;
        for (i, block) in buf[..len].chunks(BLOCK as usize).enumerate().filter(|(_, block)| !is_zero(block)) {
            sha.update((offset / BLOCK + i as u64).to_le_bytes());
            sha.update(block);
        }
        offset += len as u64;
    }
    Ok(sha.finalize().into())
}

/// Where data begins from `offset` on; `None` = nowhere.
fn next_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    let from = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    match lseek(file.as_fd(), from, Whence::SeekData) {
        Ok(at) => Ok(u64::try_from(at).ok()),
        Err(nix::errno::Errno::ENXIO) => Ok(None),
        // File systems without holes.
        Err(nix::errno::Errno::EINVAL) => Ok(Some(offset)),
        Err(error) => Err(error.into()),
    }
}
