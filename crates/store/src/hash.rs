//! SHA-1 of an object's file (spec 03, section 13).

use std::fs::File;
use std::io;
use std::path::Path;

use sha1::{Digest, Sha1};
use sheepdog_buffer::PageBuf;
use sheepdog_proto::Epoch;

use crate::Result;
use crate::error::StoreError;
use crate::name::{Replica, StaleName};
use crate::read::read_zero_filled;
use crate::store::Store;

/// Digest of a snapshot's data object, kept by the original.
const HASH_XATTR: &str = "user.obj.sha1";
/// Bytes read at a time.
const CHUNK: usize = 1 << 20;

impl Store {
    /// SHA-1 of the first `size` bytes (the store size; a short file counts as padded with zeros) of the working file,
    /// or, if there is none, of the stale file for epoch `stale` ([`Store::stale_at`]). With `cache` (data objects of snapshots, which never
    /// change) a digest kept in the file's attributes is taken as it is, and stored there after computing it.
    pub async fn hash(
        &self,
        replica: Replica,
        size: u64,
        stale: Option<Epoch>,
        cache: bool,
    ) -> Result<[u8; 20]> {
        let of_working = self
            .on_working(replica, move |inner, disk| {
                digest(&disk.file(replica), size, cache).map_err(|e| inner.fault(disk, replica.oid, &e))
            })
            .await;
        let (Err(StoreError::NoObject), Some(epoch)) = (&of_working, stale) else { return of_working };
        let epoch = self.stale_at(replica, epoch).ok_or(StoreError::NoObject)?;
        let name = StaleName { replica, epoch };
        self.on_stale(name, move |disk| digest(&disk.stale_file(name), size, cache)).await
    }
}

fn digest(path: &Path, size: u64, cache: bool) -> io::Result<[u8; 20]> {
    let file = File::open(path)?;
    if cache
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
    if cache {
        // Only an optimisation for the next time.
        let _ = xattr::set(path, HASH_XATTR, &digest);
    }
    Ok(digest)
}
