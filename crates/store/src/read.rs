//! Reading objects: inline what is in the page cache, the rest on a few threads per disk.
//!
//! Bytes past the end of a short file read as zero (spec 06, W-28).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use sheepdog_buffer::{PAGE, PageBuf};
use sheepdog_proto::Epoch;
use tokio::sync::oneshot;

use crate::Result;
use crate::disk::Disk;
use crate::error::StoreError;
use crate::name::{Replica, StaleName};
use crate::object::OpenObject;
use crate::store::{Inner, Store};
use crate::sys::rw;
use crate::trim::BLOCK;

/// Reading threads of a disk.
pub(crate) const READERS: usize = 4;
/// Largest read tried in the caller's thread, in bytes.
const INLINE_READ: usize = 128 << 10;
/// Reads of at least so many bytes ask the kernel to fetch all of them at once.
const READ_AHEAD: usize = 512 << 10;
/// Longest read, in bytes: the largest block.
const MAX_READ: usize = 2 << 30;

/// Work of a reading thread.
pub(crate) type ReadJob = Box<dyn FnOnce() + Send>;

/// A reading thread.
pub(crate) fn run(disk: Arc<Disk>) {
    while let Some(jobs) = disk.reads.take(|_, _| false) {
        for job in jobs {
            job();
        }
    }
}

/// Fills `buf` from `offset`; what is past the end of the file is zero.
pub(crate) fn read_zero_filled(file: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => {
                buf[done..].fill(0);
                break;
            }
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

impl Store {
    /// Reads in this thread if the object is open and the whole range in the page cache: microseconds, never disk I/O.
    /// `None`: use [`Store::read`]. At most 128 KiB.
    pub fn try_read_cached(&self, replica: Replica, offset: u64, len: usize) -> Option<Result<Bytes>> {
        if len == 0 || len > INLINE_READ || offset > i64::MAX as u64 - len as u64 {
            return None;
        }
        let object = self.inner.files.get(replica)?;
        let mut buf = PageBuf::dirty(len);
        if !matches!(rw::read_cached(&object.file, &mut buf, offset), Ok(n) if n == len) {
            return None;
        }
        object.touch_read();
        Some(Ok(buf.freeze()))
    }

    /// Reads exactly `len` bytes; past the end of the file they are zero.
    pub async fn read(&self, replica: Replica, offset: u64, len: usize) -> Result<Bytes> {
        check_read(offset, len)?;
        self.on_working(replica, move |inner, disk| {
            read_working(inner, disk, replica, offset, len, fill_cached)
        })
        .await
    }

    /// As [`Store::read`], for what is not going to be read again soon: what is not in the page cache does not get there,
    /// which is twice as fast for a whole object and leaves the cache to clients.
    pub async fn read_once(&self, replica: Replica, offset: u64, len: usize) -> Result<Bytes> {
        check_read(offset, len)?;
        if len < INLINE_READ || !offset.is_multiple_of(BLOCK) || !(len as u64).is_multiple_of(BLOCK) {
            return self.read(replica, offset, len).await;
        }
        self.on_working(replica, move |inner, disk| {
            read_working(inner, disk, replica, offset, len, fill_past_cache)
        })
        .await
    }

    /// Runs something with a working file on a reading thread of its disk; again if the file was moved meanwhile.
    pub(crate) async fn on_working<T: Send + 'static>(
        &self,
        replica: Replica,
        run: impl Fn(&Arc<Inner>, &Arc<Disk>) -> Result<T> + Clone + Send + 'static,
    ) -> Result<T> {
        loop {
            let disk = self.inner.locate(replica)?;
            let result = self.on_reader(disk.clone(), run.clone()).await;
            let missed = matches!(result, Err(StoreError::NoObject | StoreError::DiskFailed { .. }));
            // A disk that failed has lost the file; one that was let go has given it to another.
            if !missed || disk.is_removed() || self.inner.locate(replica)?.id == disk.id {
                return result;
            }
        }
    }

    /// Reads from the object as it was at the end of `epoch`, see [`Store::stale_at`].
    pub async fn read_stale(&self, replica: Replica, epoch: Epoch, offset: u64, len: usize) -> Result<Bytes> {
        check_read(offset, len)?;
        let name = StaleName { replica, epoch: self.stale_at(replica, epoch).ok_or(StoreError::NoObject)? };
        self.on_stale(name, move |disk| {
            let file = File::open(disk.stale_file(name))?;
            let mut buf = PageBuf::dirty(len);
            read_zero_filled(&file, &mut buf, offset)?;
            Ok(buf.freeze())
        })
        .await
    }

    /// Runs something with a stale file on a reading thread of its disk; again if the file was moved meanwhile.
    pub(crate) async fn on_stale<T: Send + 'static>(
        &self,
        name: StaleName,
        run: impl Fn(&Disk) -> io::Result<T> + Clone + Send + 'static,
    ) -> Result<T> {
        let mut seen = None;
        loop {
            let id = self.inner.index.find_stale(name).ok_or(StoreError::NoObject)?;
            let disk = self.inner.disks().by_id(id).cloned().ok_or(StoreError::NoObject)?;
            let run = run.clone();
            let result = self
                .on_reader(disk, move |inner, disk| {
                    run(disk).map_err(|e| inner.fault(disk, name.replica.oid, &e))
                })
                .await;
            if !matches!(result, Err(StoreError::NoObject)) || seen.replace(id) == Some(id) {
                return result;
            }
        }
    }

    /// Runs something on a reading thread of a disk.
    pub(crate) async fn on_reader<T: Send + 'static>(
        &self,
        disk: Arc<Disk>,
        run: impl FnOnce(&Arc<Inner>, &Arc<Disk>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let permit = self.inner.read_budget.clone().acquire_owned().await;
        let permit = permit.map_err(|_| StoreError::Closed)?;
        let (tx, rx) = oneshot::channel();
        let inner = self.inner.clone();
        let reads = disk.clone();
        let job: ReadJob = Box::new(move || {
            let result = match disk.is_removed() {
                true => Err(inner.disk_failed(&disk)),
                false => run(&inner, &disk),
            };
            drop(tx.send(result));
            drop(permit);
        });
        if reads.reads.push(job).is_err() {
            return Err(self.inner.disk_failed(&reads));
        }
        rx.await.unwrap_or(Err(StoreError::Closed))
    }
}

fn check_read(offset: u64, len: usize) -> Result<()> {
    if len <= MAX_READ && offset <= i64::MAX as u64 - MAX_READ as u64 {
        return Ok(());
    }
    Err(StoreError::InvalidRange { offset, len: len as u64, size: MAX_READ as u64 })
}

/// Fills a buffer from an offset of an open object.
type Fill = fn(&OpenObject, &mut [u8], u64) -> io::Result<()>;

fn read_working(
    inner: &Arc<Inner>,
    disk: &Arc<Disk>,
    replica: Replica,
    offset: u64,
    len: usize,
    fill: Fill,
) -> Result<Bytes> {
    let attempt = || -> io::Result<Bytes> {
        let object = inner.files.open(replica, disk.id, || disk.file(replica).into())?;
        let mut buf = PageBuf::dirty(len);
        fill(&object, &mut buf, offset)?;
        Ok(buf.freeze())
    };
    attempt().map_err(|e| inner.fault(disk, replica.oid, &e))
}

fn fill_cached(object: &OpenObject, buf: &mut [u8], offset: u64) -> io::Result<()> {
    if buf.len() >= READ_AHEAD && !object.was_read() {
        // Only a hint.
        let (at, len) = (offset as i64, buf.len() as i64);
        let _ = posix_fadvise(&object.file, at, len, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
    }
    read_zero_filled(&object.file, buf, offset)?;
    object.touch_read();
    Ok(())
}

fn fill_past_cache(object: &OpenObject, buf: &mut [u8], offset: u64) -> io::Result<()> {
    let cached = rw::read_cached(&object.file, &mut buf[..PAGE], offset).is_ok();
    // A direct read that fails or ends early is left to the page cache's path, which reports what is really wrong.
    let done = match object.direct() {
        Some(direct) if !cached => direct.read_at(buf, offset).unwrap_or(0),
        _ => 0,
    };
    read_zero_filled(&object.file, &mut buf[done..], offset + done as u64)
}
