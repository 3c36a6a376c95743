//! Giving blocks back and writing zeros.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::TryStreamExt;
use sheepdog_proto::header::ObjRequest;
use sheepdog_proto::{Oid, Opcode, Request, ResultCode, VdiId};

use super::error::During;
use super::map::Map;
use super::open::Stale;
use super::write::Piece;
use super::{Inner, VolumeError};
use crate::vdi;

/// Blocks given back under one set of locks.
const BATCH: usize = 512;
/// Blocks filled with zeros at once.
const FILL_PARALLEL: usize = 8;
/// Most zeros of one write.
const ZERO_CHUNK: u64 = 4 << 20;
/// Payload that makes a block of zeros: a create needs one, and a sector suits every store.
const SECTOR: usize = 512;
/// Byte offset of `snap_ctime` in the inode.
const SNAP_CTIME_OFFSET: u32 = 520;

impl Inner {
    /// Whether a piece covers everything its block has inside of the volume.
    fn covers(&self, idx: u32, within: u64, len: u64) -> bool {
        let start = u64::from(idx) << self.block_shift;
        within == 0 && (len == self.block_size() || start + len == self.size())
    }

    pub(super) async fn discard(self: &Arc<Self>, offset: u64, len: u64) -> Result<(), VolumeError> {
        self.check_writable(offset, len)?;
        self.give_back(offset, len).await
    }

    pub(super) async fn write_zeroes(
        self: &Arc<Self>,
        offset: u64,
        len: u64,
        no_hole: bool,
        fua: bool,
    ) -> Result<(), VolumeError> {
        self.check_writable(offset, len)?;
        if !no_hole {
            self.give_back(offset, len).await?;
        }
        let parts = self.pieces(offset, len).map(Ok);
        futures_util::stream::iter(parts)
            .try_for_each_concurrent(FILL_PARALLEL, |(idx, within, len)| async move {
                match (self.covers(idx, within, len), no_hole) {
                    (true, true) => self.fill(idx, fua).await,
                    (true, false) => Ok(()), // given back
                    (false, false) if self.entry(idx).await? == 0 => Ok(()),
                    (false, _) => self.zero_part(idx, within, len, fua).await,
                }
            })
            .await
    }

    pub(super) async fn zeroes_are_fast(&self, offset: u64, len: u64) -> Result<bool, VolumeError> {
        self.check_range(offset, len)?;
        let end = offset + len;
        let last = end.saturating_sub(1) & !(self.block_size() - 1);
        let last = self.pieces(last.max(offset), end - last.max(offset)).next();
        let ends = [self.pieces(offset, len).next(), last];
        for (idx, within, len) in ends.into_iter().flatten() {
            if !self.covers(idx, within, len) && self.entry(idx).await? != 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Makes a block allocated and all zeros.
    async fn fill(self: &Arc<Self>, idx: u32, fua: bool) -> Result<(), VolumeError> {
        let data = sheepdog_buffer::zeros(SECTOR);
        self.write_pieces(vec![Piece { idx, range: 0..SECTOR as u64, data, replace: true }], fua).await
    }

    async fn zero_part(
        self: &Arc<Self>,
        idx: u32,
        within: u64,
        len: u64,
        fua: bool,
    ) -> Result<(), VolumeError> {
        let start = (u64::from(idx) << self.block_shift) + within;
        let mut done = 0;
        while done < len {
            let chunk = (len - done).min(ZERO_CHUNK);
            self.write(start + done, sheepdog_buffer::zeros(chunk as usize), fua).await?;
            done += chunk;
        }
        Ok(())
    }

    /// Clears the entries of covered, allocated blocks; the sheep drops the objects (spec 01, 12.5).
    async fn give_back(self: &Arc<Self>, offset: u64, len: u64) -> Result<(), VolumeError> {
        let mut batch = Vec::new();
        for (idx, within, len) in self.pieces(offset, len) {
            if self.covers(idx, within, len) && self.entry(idx).await? != 0 {
                batch.push(idx);
                if batch.len() == BATCH {
                    self.clear_blocks(std::mem::take(&mut batch)).await?;
                }
            }
        }
        if batch.is_empty() { Ok(()) } else { self.clear_blocks(batch).await }
    }

    async fn clear_blocks(self: &Arc<Self>, blocks: Vec<u32>) -> Result<(), VolumeError> {
        let inner = self.clone();
        let task = tokio::spawn(async move {
            let mut guards = Vec::with_capacity(blocks.len());
            for idx in &blocks {
                guards.push(inner.locks.acquire(*idx, 0..inner.block_size()).await);
            }
            if !inner.service.discards() {
                inner.ensure_working().await?;
            }
            let vid = inner.vid();
            let mut entries = Vec::new();
            let mut own = Vec::new();
            for idx in blocks {
                let owner = inner.entry(idx).await?;
                if owner != 0 {
                    entries.push((idx, 0));
                }
                if owner == vid.get() {
                    own.push(Oid::data(VdiId::new(owner), idx));
                }
            }
            inner.update_table(entries).await?;
            // A snapshot taken meanwhile may name them.
            if matches!(inner.map, Map::Tree(_)) && inner.vid() == vid {
                // Nobody counts references in hypervolumes: the objects are removed here.
                inner.remove_objects(own).await?;
            }
            Ok(())
        });
        task.await.unwrap_or_else(|error| {
            Err(VolumeError::Connection { what: "discard", cause: format!("the task ended: {error}") })
        })
    }

    /// Clearing entries of a VDI that has become a snapshot is allowed where there is no discard, and would destroy the
    /// snapshot: look first. What remains is a snapshot taken between this look and the update.
    async fn ensure_working(&self) -> Result<(), VolumeError> {
        let mut attempt = 0;
        loop {
            let vid = self.vid();
            let snap_ctime = vdi::read_object(&*self.service, Oid::inode(vid), SNAP_CTIME_OFFSET, 8)
                .await
                .during("read of the inode header")?;
            if snap_ctime.iter().all(|byte| *byte == 0) {
                return Ok(());
            }
            self.catch_up(Stale::ReadOnly, vid, attempt).await?;
            attempt += 1;
        }
    }

    async fn remove_objects(&self, oids: Vec<Oid>) -> Result<(), VolumeError> {
        for oid in oids {
            let request =
                Request::new(Opcode::REMOVE_OBJ).with_obj(ObjRequest { oid, ..ObjRequest::zeroed() });
            let reply = self.service.call(request, Bytes::new()).await.during("removal")?;
            match reply.response.result {
                ResultCode::SUCCESS | ResultCode::NO_OBJ => {}
                code => return Err(VolumeError::Refused { what: "removal", code }),
            }
        }
        Ok(())
    }
}
