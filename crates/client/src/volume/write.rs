//! Writing: in place, or by creating or copying an object and then updating the table (spec 01, 16.4).

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use futures_util::StreamExt;
use sheepdog_proto::header::ObjRequest;
use sheepdog_proto::{Flags, Oid, Opcode, Request, ResultCode, VdiId};

use super::error::During;
use super::open::Stale;
use super::read::PARALLEL;
use super::{Inner, VolumeError};

/// What to do to one block.
#[derive(Debug, Clone)]
pub(super) struct Piece {
    pub(super) idx: u32,
    /// Bytes of the block that are written.
    pub(super) range: Range<u64>,
    pub(super) data: Bytes,
    /// Replace the whole block by zeros with `data` at its start, whatever it held.
    pub(super) replace: bool,
}

/// How [`Inner::write_in_place`] ended.
enum InPlace {
    Done,
    NotOwned,
    Stale(Stale, VdiId),
}

/// Why an attempt ended.
enum Stop {
    /// Repeat with what the volume knows now.
    Again(Option<Stale>, VdiId),
    Failed(VolumeError),
}

impl From<VolumeError> for Stop {
    fn from(error: VolumeError) -> Stop {
        Stop::Failed(error)
    }
}

impl Inner {
    pub(super) async fn write(
        self: &Arc<Self>,
        offset: u64,
        data: Bytes,
        fua: bool,
    ) -> Result<(), VolumeError> {
        self.check_writable(offset, data.len() as u64)?;
        let mut pieces = self.pieces(offset, data.len() as u64);
        let Some((idx, within, len)) = pieces.next() else { return Ok(()) };
        drop(pieces);
        if len == data.len() as u64 && self.map.known(idx) == Some(self.vid().get()) {
            match self.write_in_place(idx, within, &data, fua).await? {
                InPlace::Done => return Ok(()),
                InPlace::Stale(stale, vid) => self.catch_up(stale, vid, 0).await?,
                InPlace::NotOwned => {}
            }
        }
        let mut rest = data;
        let pieces = self
            .pieces(offset, rest.len() as u64)
            .map(|(idx, within, len)| {
                let data = rest.split_to(len as usize);
                Piece { idx, range: within..within + len, data, replace: false }
            })
            .collect();
        self.write_pieces(pieces, fua).await
    }

    /// The short way: one request into an object that exists and is ours.
    async fn write_in_place(
        &self,
        idx: u32,
        within: u64,
        data: &Bytes,
        fua: bool,
    ) -> Result<InPlace, VolumeError> {
        let _guard = self.locks.acquire(idx, within..within + data.len() as u64).await;
        let vid = self.vid();
        if self.map.known(idx) != Some(vid.get()) {
            return Ok(InPlace::NotOwned);
        }
        let code = self.write_object(Oid::data(vid, idx), within, data.clone(), fua).await?;
        match Stale::of(code) {
            None if code.is_ok() => Ok(InPlace::Done),
            None => Err(VolumeError::Refused { what: "write", code }),
            Some(stale) => Ok(InPlace::Stale(stale, vid)),
        }
    }

    /// Writes pieces of ascending blocks, to the end even if the caller gives up: an object must not be created
    /// after its block's lock is gone.
    pub(super) async fn write_pieces(
        self: &Arc<Self>,
        pieces: Vec<Piece>,
        fua: bool,
    ) -> Result<(), VolumeError> {
        let inner = self.clone();
        let task = tokio::spawn(async move {
            let mut attempt = 0;
            loop {
                match inner.try_pieces(&pieces, fua).await {
                    Ok(()) => return Ok(()),
                    Err(Stop::Failed(error)) => return Err(error),
                    Err(Stop::Again(Some(stale), vid)) => inner.catch_up(stale, vid, attempt).await?,
                    // The table changed before the locks were held; nothing was sent.
                    Err(Stop::Again(None, _)) => continue,
                }
                attempt += 1;
            }
        });
        task.await.unwrap_or_else(|error| {
            Err(VolumeError::Connection { what: "write", cause: format!("the task ended: {error}") })
        })
    }

    async fn try_pieces(self: &Arc<Self>, pieces: &[Piece], fua: bool) -> Result<(), Stop> {
        let vid = self.vid();
        let mut guards = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let in_place = !piece.replace && self.entry(piece.idx).await? == vid.get();
            let range = if in_place { piece.range.clone() } else { 0..self.block_size() };
            guards.push((self.locks.acquire(piece.idx, range).await, in_place));
        }
        let mut owners = Vec::with_capacity(pieces.len());
        for (piece, (_, in_place)) in pieces.iter().zip(&guards) {
            let owner = self.entry(piece.idx).await?;
            if *in_place && owner != vid.get() {
                return Err(Stop::Again(None, vid));
            }
            owners.push(owner);
        }
        if self.vid() != vid {
            return Err(Stop::Again(None, vid));
        }
        let work: Vec<_> =
            pieces.iter().zip(owners).map(|(piece, owner)| self.put_piece(piece, vid, owner, fua)).collect();
        let results: Vec<_> = futures_util::stream::iter(work).buffered(PARALLEL).collect().await;

        let mut created = Vec::new();
        let mut stop = None;
        for (piece, result) in pieces.iter().zip(results) {
            match result {
                Ok(true) => created.push((piece.idx, vid.get())),
                Ok(false) => {}
                // A failure is reported even if another piece could be repeated.
                Err(Stop::Failed(error)) => stop = Some(Stop::Failed(error)),
                Err(again) => stop = stop.or(Some(again)),
            }
        }
        if let (Some(Stop::Again(Some(stale), vid)), false) = (&stop, created.is_empty()) {
            // The entries belong into the new working VDI; an old sheep would let them into the snapshot.
            self.catch_up(*stale, *vid, 0).await?;
        }
        // Also after a failure: what was created holds good data, and would leak otherwise.
        self.update_table(created).await?;
        stop.map_or(Ok(()), Err)
    }

    /// Writes one piece under its lock. `true` = the table must be updated.
    async fn put_piece(&self, piece: &Piece, vid: VdiId, owner: u32, fua: bool) -> Result<bool, Stop> {
        let oid = Oid::data(vid, piece.idx);
        let owned = owner == vid.get();
        let code = if owned && !piece.replace {
            self.write_object(oid, piece.range.start, piece.data.clone(), fua).await?
        } else {
            let whole = piece.replace || piece.data.len() as u64 == self.block_size();
            let source = (owner != 0 && !whole).then(|| Oid::data(VdiId::new(owner), piece.idx));
            self.create_object(oid, source, piece.range.start, piece.data.clone(), fua).await?
        };
        match Stale::of(code) {
            Some(stale) => Err(Stop::Again(Some(stale), vid)),
            None if code.is_ok() => Ok(!owned),
            None => Err(VolumeError::Refused { what: "write", code }.into()),
        }
    }

    fn write_flags(&self, fua: bool) -> Flags {
        let buffered = !fua && self.cache.load(Ordering::Acquire);
        Flags::WRITE.with(if buffered { Flags::CACHE } else { Flags::DIRECT })
    }

    async fn write_object(
        &self,
        oid: Oid,
        offset: u64,
        data: Bytes,
        fua: bool,
    ) -> Result<ResultCode, VolumeError> {
        let body = ObjRequest { oid, offset: offset as u32, ..ObjRequest::zeroed() };
        let request =
            Request::new(Opcode::WRITE_OBJ).flag(self.write_flags(fua)).length(data.len()).with_obj(body);
        Ok(self.service.call(request, data).await.during("write")?.response.result)
    }

    async fn create_object(
        &self,
        oid: Oid,
        source: Option<Oid>,
        offset: u64,
        data: Bytes,
        fua: bool,
    ) -> Result<ResultCode, VolumeError> {
        let cow = if source.is_some() { Flags::COW } else { Flags::NONE };
        let cow_oid = source.unwrap_or_default();
        let body = ObjRequest { oid, cow_oid, offset: offset as u32, ..ObjRequest::zeroed() };
        let request = Request::new(Opcode::CREATE_AND_WRITE_OBJ)
            .flag(self.write_flags(fua).with(cow))
            .length(data.len())
            .with_obj(body);
        Ok(self.service.call(request, data).await.during("create")?.response.result)
    }
}
