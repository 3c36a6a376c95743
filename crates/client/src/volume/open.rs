//! Opening, closing, and moving on to the new working VDI after a snapshot.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use sheepdog_proto::inode::{INODE_HEADER_LEN, InodeHeader, STORE_POLICY_BTREE};
use sheepdog_proto::{MAX_BLOCK_SHIFT, MAX_DATA_OBJS, MIN_BLOCK_SHIFT, ResultCode, VdiId, Wire};

use super::error::During;
use super::map::Map;
use super::range_lock::RangeLocks;
use super::update::Updates;
use super::{Inner, OpenOptions, SnapshotRef, Volume, VolumeError};
use crate::service::{ClientError, Service};
use crate::vdi;

/// How often one operation follows the VDI to a new working VDI, or waits for it to appear, before it fails.
pub(super) const MAX_MOVES: u32 = 40;
/// Longest pause between two looks for the new working VDI.
const MOVE_PAUSE: Duration = Duration::from_secs(1);
/// How often a sheep that has just joined is asked for a lock, and the pause between.
const MAX_LOCK_ATTEMPTS: u32 = 300;
const LOCK_PAUSE: Duration = Duration::from_millis(100);
/// Most generations of snapshots between what was known and the new working VDI.
const MAX_ANCESTORS: usize = 64;

/// Why the sheep refused an operation that can be repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stale {
    /// The VDI has become a snapshot.
    ReadOnly,
    /// The inode was changed through another sheep.
    Invalidated,
}

impl Stale {
    pub(super) fn of(code: ResultCode) -> Option<Stale> {
        match code {
            ResultCode::READONLY => Some(Stale::ReadOnly),
            ResultCode::INODE_INVALIDATED => Some(Stale::Invalidated),
            _ => None,
        }
    }
}

fn check_header(header: &InodeHeader) -> Result<(), VolumeError> {
    if !(MIN_BLOCK_SHIFT..=MAX_BLOCK_SHIFT).contains(&header.block_size_shift) {
        return Err(VolumeError::Inode("block size out of range"));
    }
    let blocks = header.vdi_size.div_ceil(header.block_size());
    let limit = if header.store_policy == STORE_POLICY_BTREE { 1 << 32 } else { MAX_DATA_OBJS as u64 };
    if blocks > limit {
        return Err(VolumeError::Inode("more blocks than the table has"));
    }
    Ok(())
}

fn lookup_error(name: &str, error: ClientError) -> VolumeError {
    match error.code() {
        Some(ResultCode::NO_VDI | ResultCode::NO_TAG) => VolumeError::NotFound(name.to_owned()),
        Some(ResultCode::VDI_LOCKED) => VolumeError::Locked(name.to_owned()),
        _ => VolumeError::from_client("lookup", error),
    }
}

/// Finds the VDI, with its lock if that is wanted and there is one. Whether it was locked.
async fn find(
    service: &dyn Service,
    name: &str,
    snapshot: Option<&SnapshotRef>,
    lock: bool,
) -> Result<(VdiId, bool), ClientError> {
    if !lock {
        return Ok((vdi::lookup(service, name, snapshot).await?.vid, false));
    }
    let mut attempt = 0;
    loop {
        let error = match vdi::lock(service, name, STORE_POLICY_BTREE).await {
            Ok(info) => return Ok((info.vid, true)),
            Err(error) => error,
        };
        attempt += 1;
        match error.code() {
            // The sheep has just joined and does not know all locks yet.
            Some(ResultCode::COLLECTING_CINFO) if attempt < MAX_LOCK_ATTEMPTS => {
                tokio::time::sleep(LOCK_PAUSE).await;
            }
            // Sheep before 2.1 lock no hypervolumes.
            Some(ResultCode::INVALID_PARMS) => {
                let info = vdi::lookup(service, name, None).await?;
                let header = vdi::read_header(service, info.vid).await?;
                return if header.store_policy == STORE_POLICY_BTREE {
                    Ok((info.vid, false))
                } else {
                    Err(error)
                };
            }
            _ => return Err(error),
        }
    }
}

impl Volume {
    /// Opens the current VDI of `name`, or a snapshot of it, which is read-only. A writable volume takes the VDI's
    /// lock; [`Volume::close`] gives it back. Poll it to its end, or a lock may stay behind.
    pub async fn open(
        service: Arc<dyn Service>,
        name: &str,
        snapshot: Option<SnapshotRef>,
        options: OpenOptions,
    ) -> Result<Volume, VolumeError> {
        let read_only = options.read_only || snapshot.is_some();
        let locks = options.lock && !read_only;
        let (vid, locked) = find(&*service, name, snapshot.as_ref(), locks)
            .await
            .map_err(|error| lookup_error(name, error))?;
        let held = if locked { vec![vid] } else { Vec::new() };
        match Self::read_in(service.clone(), name, vid, read_only, options.cache, held.clone()).await {
            Ok(volume) => Ok(volume),
            Err(error) => {
                for vid in held {
                    let _ = vdi::release(&*service, name, vid).await; // the first error is the one to report
                }
                Err(error)
            }
        }
    }

    async fn read_in(
        service: Arc<dyn Service>,
        name: &str,
        vid: VdiId,
        read_only: bool,
        cache: bool,
        held: Vec<VdiId>,
    ) -> Result<Volume, VolumeError> {
        let inode = vdi::read_inode(&*service, vid).await.during("read of the inode")?;
        let header = decode(&inode, vid)?;
        let inner = Inner {
            service,
            name: name.to_owned(),
            read_only,
            block_shift: header.block_size_shift,
            size: AtomicU64::new(header.vdi_size),
            vid: AtomicU32::new(vid.get()),
            map: Map::new(&header, &inode),
            header: RwLock::new(Arc::new(header)),
            locks: RangeLocks::default(),
            updates: Mutex::new(Updates::default()),
            moving: tokio::sync::Mutex::new(()),
            cache: AtomicBool::new(cache),
            held: Mutex::new(held),
        };
        Ok(Volume { inner: Arc::new(inner) })
    }

    /// Flushes and gives the lock back. After a snapshot by somebody else the lock may be with the old or with the new
    /// working VDI (spec 01, 7.5): both are released. The volume must not be used afterwards.
    pub async fn close(&self) -> Result<(), VolumeError> {
        let flushed = if self.is_read_only() { Ok(()) } else { self.flush().await };
        let held = std::mem::take(&mut *self.inner.held.lock());
        let mut released = Ok(());
        for vid in held {
            released = released
                .and(vdi::release(&*self.inner.service, &self.inner.name, vid).await.during("release"));
        }
        flushed.and(released)
    }

    /// Reads the header again and takes over a size that grew; a read-only volume also takes over the table. Returns
    /// the size in bytes.
    pub async fn reload(&self) -> Result<u64, VolumeError> {
        let inner = &self.inner;
        let _alone = inner.moving.lock().await;
        if inner.read_only {
            inner.reload_all(inner.vid()).await?;
        } else {
            let vid = inner.vid();
            let header = vdi::read_header(&*inner.service, vid).await.during("read of the inode header")?;
            inner.adopt(header)?;
        }
        Ok(inner.size())
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let held = std::mem::take(&mut *self.inner.held.lock());
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if !held.is_empty() {
            let inner = self.inner.clone();
            runtime.spawn(async move {
                for vid in held {
                    if let Err(error) = vdi::release(&*inner.service, &inner.name, vid).await {
                        tracing::warn!(vdi = inner.name, %error, "cannot release the lock");
                    }
                }
            });
        }
    }
}

fn decode(inode: &[u8], vid: VdiId) -> Result<InodeHeader, VolumeError> {
    let header = InodeHeader::decode(&inode[..INODE_HEADER_LEN.min(inode.len())])
        .map_err(|_| VolumeError::Inode("truncated"))?;
    check_header(&header)?;
    if header.vdi_id != vid {
        return Err(VolumeError::Inode("it names another VDI"));
    }
    Ok(header)
}

impl Inner {
    /// Takes over a header just read of the VDI in use. Volumes never shrink while open.
    fn adopt(&self, header: InodeHeader) -> Result<(), VolumeError> {
        check_header(&header)?;
        if header.block_size_shift != self.block_shift {
            return Err(VolumeError::Inode("the block size changed"));
        }
        self.map.grow(&header);
        self.size.fetch_max(header.vdi_size, Ordering::AcqRel);
        *self.header.write() = Arc::new(header);
        Ok(())
    }

    async fn reload_all(&self, vid: VdiId) -> Result<(), VolumeError> {
        let inode = vdi::read_inode(&*self.service, vid).await.during("read of the inode")?;
        let header = decode(&inode, vid)?;
        self.map.replace(&header, &inode);
        self.adopt(header)
    }

    /// Reacts to a refusal while `vid` was in use; the `attempt`-th time for one operation.
    pub(super) async fn catch_up(&self, why: Stale, vid: VdiId, attempt: u32) -> Result<(), VolumeError> {
        if attempt >= MAX_MOVES {
            let code = match why {
                Stale::ReadOnly => ResultCode::READONLY,
                Stale::Invalidated => ResultCode::INODE_INVALIDATED,
            };
            return Err(VolumeError::Refused { what: "write", code });
        }
        let current = match why {
            Stale::ReadOnly => self.move_on(vid).await?,
            Stale::Invalidated => {
                let _alone = self.moving.lock().await;
                self.reload_all(self.vid()).await?;
                attempt < 3
            }
        };
        if !current {
            let pause = Duration::from_millis(10 << attempt.min(7));
            tokio::time::sleep(pause.min(MOVE_PAUSE)).await;
        }
        Ok(())
    }

    /// Moves from `seen`, which has become a snapshot, to the working VDI of the name. `false` = there is none yet.
    pub(super) async fn move_on(&self, seen: VdiId) -> Result<bool, VolumeError> {
        let _alone = self.moving.lock().await;
        if self.vid() != seen {
            return Ok(true); // somebody else did it
        }
        let vid = match vdi::lookup(&*self.service, &self.name, None).await {
            Ok(info) => info.vid,
            Err(error) => return Err(lookup_error(&self.name, error)),
        };
        if vid == seen {
            return Ok(false);
        }
        let header = match vdi::read_header(&*self.service, vid).await {
            Ok(header) if header.vdi_id == vid && !header.is_snapshot() => header,
            Ok(_) => return Ok(false),
            Err(error) if error.code() == Some(ResultCode::NO_OBJ) => return Ok(false),
            Err(error) => return Err(VolumeError::from_client("read of the inode header", error)),
        };
        if matches!(self.map, Map::Tree(_)) {
            // Its index has nodes of its own.
            self.reload_all(vid).await?;
        } else if self.descends_from(&header, seen).await {
            // The new working VDI starts as a copy: what is known of the table stays right.
            self.adopt(header)?;
        } else {
            tracing::warn!(vdi = self.name, %seen, new = %vid, "the volume was rolled back while open");
            self.reload_all(vid).await?;
        }
        tracing::info!(vdi = self.name, snapshot = %seen, new = %vid, "a snapshot was taken");
        let mut held = self.held.lock();
        if !held.is_empty() {
            held.push(vid);
        }
        drop(held);
        self.vid.store(vid.get(), Ordering::Release);
        Ok(true)
    }

    async fn descends_from(&self, header: &InodeHeader, ancestor: VdiId) -> bool {
        let mut parent = header.parent_vdi_id;
        for _ in 0..MAX_ANCESTORS {
            if parent == ancestor || parent.is_none() {
                return parent == ancestor;
            }
            match vdi::read_header(&*self.service, parent).await {
                Ok(header) => parent = header.parent_vdi_id,
                Err(_) => return false,
            }
        }
        false
    }
}
