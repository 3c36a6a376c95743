//! Reading and flushing.

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use sheepdog_proto::header::ObjRequest;
use sheepdog_proto::{Flags, Oid, Opcode, Request, ResultCode, VdiId};
use std::sync::atomic::Ordering;

use super::error::During;
use super::open::Stale;
use super::{Inner, Segment, VolumeError};

/// Objects of one operation asked for at once.
pub(super) const PARALLEL: usize = 32;
/// How often a block that moved while it was read is looked up again.
const MAX_READ_ATTEMPTS: u32 = 8;

impl Inner {
    pub(super) async fn read(&self, offset: u64, len: usize) -> Result<Vec<Segment>, VolumeError> {
        self.check_range(offset, len as u64)?;
        let mut pieces = self.pieces(offset, len as u64);
        let Some((idx, within, first_len)) = pieces.next() else { return Ok(Vec::new()) };
        if first_len == len as u64 {
            return Ok(vec![self.read_block(idx, within, len).await?]);
        }
        drop(pieces);
        Box::pin(self.read_blocks(offset, len)).await
    }

    async fn read_blocks(&self, offset: u64, len: usize) -> Result<Vec<Segment>, VolumeError> {
        let mut parts = futures_util::stream::iter(self.pieces(offset, len as u64))
            .map(|(idx, within, len)| self.read_block(idx, within, len as usize))
            .buffered(PARALLEL);
        let mut out: Vec<Segment> = Vec::new();
        while let Some(part) = parts.try_next().await? {
            match (out.last_mut(), &part) {
                (Some(Segment::Hole(total)), Segment::Hole(len)) => *total += len,
                _ => out.push(part),
            }
        }
        Ok(out)
    }

    /// Reads within one block. Reads take no locks: a block whose object disappears under the read was discarded or
    /// copied meanwhile, and the table tells where its bytes are now.
    async fn read_block(&self, idx: u32, within: u64, len: usize) -> Result<Segment, VolumeError> {
        let mut attempt = 0;
        loop {
            let owner = match self.map.known(idx) {
                Some(owner) => owner,
                None => self.entry(idx).await?,
            };
            if owner == 0 {
                return Ok(Segment::Hole(len));
            }
            let oid = Oid::data(VdiId::new(owner), idx);
            let body = ObjRequest { oid, offset: within as u32, ..ObjRequest::zeroed() };
            let request = Request::new(Opcode::READ_OBJ).length(len).with_obj(body);
            let reply = self.service.call(request, Bytes::new()).await.during("read")?;
            let code = reply.response.result;
            if code.is_ok() {
                if reply.data.len() != len {
                    return Err(VolumeError::Connection { what: "read", cause: "short answer".into() });
                }
                return Ok(Segment::Data(reply.data));
            }
            attempt += 1;
            if attempt >= MAX_READ_ATTEMPTS || !self.moved(code, idx, owner, attempt).await? {
                return Err(VolumeError::Refused { what: "read", code });
            }
        }
    }

    /// Whether a failed read of a block is worth another attempt.
    async fn moved(&self, code: ResultCode, idx: u32, owner: u32, attempt: u32) -> Result<bool, VolumeError> {
        match (code, Stale::of(code)) {
            (_, Some(stale)) => self.catch_up(stale, self.vid(), attempt).await.map(|()| true),
            (ResultCode::NO_OBJ, None) if self.entry(idx).await? != owner => Ok(true),
            // A reader without the lock has an old table when the writer discards.
            (ResultCode::NO_OBJ, None) if self.read_only => {
                self.catch_up(Stale::Invalidated, self.vid(), attempt).await?;
                Ok(self.entry(idx).await? != owner)
            }
            _ => Ok(false),
        }
    }

    pub(super) async fn flush(&self) -> Result<(), VolumeError> {
        if self.read_only || !self.cache.load(Ordering::Acquire) {
            return Ok(());
        }
        let oid = Oid::inode(self.vid());
        let request = Request::new(Opcode::FLUSH_VDI)
            .flag(Flags::NONE)
            .with_obj(ObjRequest { oid, ..ObjRequest::zeroed() });
        let reply = self.service.call(request, Bytes::new()).await.during("flush")?;
        match reply.response.result {
            ResultCode::SUCCESS => Ok(()),
            // A write-through sheep: what it acknowledged is durable, it need not be asked again.
            ResultCode::INVALID_PARMS => {
                self.cache.store(false, Ordering::Release);
                Ok(())
            }
            code => Err(VolumeError::Refused { what: "flush", code }),
        }
    }
}
