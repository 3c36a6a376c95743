//! A VDI as a block device (spec 01, section 16; spec 05, section 9).
//!
//! The client owns the block table: [`Volume`] reads the inode once, decides per block whether to write in place, create
//! or copy, and updates the table after the data is safe, so that a crash in between leaks an object but never shows a
//! wrong byte. All methods take `&self`; any number of tasks may call them. Overlapping writes are ordered, creating
//! an object excludes other writes of that block, everything else runs in parallel. When somebody else snapshots the
//! VDI the sheep answers `READONLY`: the volume moves on to the new working VDI and repeats what was refused.

mod error;
pub mod index_tree;
mod map;
mod open;
mod range_lock;
mod read;
mod update;
mod write;
mod zero;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use sheepdog_proto::VdiId;
use sheepdog_proto::inode::InodeHeader;

use crate::service::Service;
pub use crate::vdi::SnapshotRef;
pub use error::VolumeError;
use map::Map;
use range_lock::RangeLocks;
use update::Updates;

/// How to open a volume.
#[derive(Debug, Clone, Copy)]
pub struct OpenOptions {
    /// Refuse every change. Snapshots are always read-only.
    pub read_only: bool,
    /// Take the VDI's lock when opened writable; without effect unless the cluster uses locks.
    pub lock: bool,
    /// Let the sheep buffer writes until [`Volume::flush`], if it can. Without, every write is durable when it
    /// returns.
    pub cache: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions { read_only: false, lock: true, cache: true }
    }
}

/// Part of what was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// That many zeros, never written.
    Hole(usize),
    /// Bytes.
    Data(Bytes),
}

impl Segment {
    /// Bytes of the volume it stands for.
    pub fn len(&self) -> usize {
        match self {
            Segment::Hole(len) => *len,
            Segment::Data(data) => data.len(),
        }
    }

    /// Whether it stands for no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Where a range's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Nowhere: zeros.
    Hole,
    /// In objects of this VDI.
    Own,
    /// In objects shared with an ancestor.
    Inherited,
}

/// An open VDI or snapshot.
pub struct Volume {
    inner: Arc<Inner>,
}

struct Inner {
    service: Arc<dyn Service>,
    name: String,
    read_only: bool,
    block_shift: u8,
    size: AtomicU64,
    /// Id of the working VDI; changes when somebody snapshots it.
    vid: AtomicU32,
    header: RwLock<Arc<InodeHeader>>,
    map: Map,
    locks: RangeLocks,
    updates: Mutex<Updates>,
    /// Held while the table is replaced, one move to a new working VDI at a time, and while a batch of entries is
    /// written: none of them may get lost with a table that is replaced.
    moving: tokio::sync::Mutex<()>,
    /// Writes may be buffered by the sheep: it has not refused a flush yet.
    cache: AtomicBool,
    /// Ids to release on close.
    held: Mutex<Vec<VdiId>>,
}

impl Volume {
    /// Bytes.
    pub fn size(&self) -> u64 {
        self.inner.size()
    }

    /// Bytes of a block, the unit of allocation and sharing.
    pub fn block_size(&self) -> u64 {
        self.inner.block_size()
    }

    /// Whether changes are refused.
    pub fn is_read_only(&self) -> bool {
        self.inner.read_only
    }

    /// The VDI's name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Id of the VDI that is written to now.
    pub fn vid(&self) -> VdiId {
        self.inner.vid()
    }

    /// The inode header as last read.
    pub fn header(&self) -> Arc<InodeHeader> {
        self.inner.header.read().clone()
    }

    /// Reads `len` bytes. Holes need no request; blocks are asked for in parallel. Adjacent holes are merged.
    pub async fn read(&self, offset: u64, len: usize) -> Result<Vec<Segment>, VolumeError> {
        self.inner.read(offset, len).await
    }

    /// As [`Volume::read`], into one buffer.
    pub async fn read_bytes(&self, offset: u64, len: usize) -> Result<Bytes, VolumeError> {
        let mut segments = self.read(offset, len).await?;
        if let [Segment::Data(_)] = segments.as_slice()
            && let Some(Segment::Data(data)) = segments.pop()
        {
            return Ok(data);
        }
        let mut out = sheepdog_buffer::PageBuf::dirty(len);
        let mut at = 0;
        for segment in segments {
            let part = &mut out[at..at + segment.len()];
            match &segment {
                Segment::Hole(_) => part.fill(0),
                Segment::Data(data) => part.copy_from_slice(data),
            }
            at += segment.len();
        }
        Ok(out.freeze())
    }

    /// Writes. With `fua` it is durable when it returns, otherwise after the next [`Volume::flush`].
    ///
    /// Poll it to its end: a write into an existing object that is dropped before may still be executed later, even
    /// after a write that was started behind it. Creations always run to their end.
    pub async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<(), VolumeError> {
        self.inner.write(offset, data, fua).await?;
        self.durable_if(fua).await
    }

    /// A cluster that buffers writes makes none of them durable by itself.
    async fn durable_if(&self, fua: bool) -> Result<(), VolumeError> {
        if fua && self.inner.cache.load(Ordering::Acquire) { self.inner.flush().await } else { Ok(()) }
    }

    /// Gives back whole blocks inside the range, which read as zeros afterwards; the rest of the range is left alone.
    /// The end of the volume counts as the end of a block.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        self.inner.discard(offset, len).await
    }

    /// Makes the range read as zeros. Whole blocks are given back unless `no_hole`, which keeps or makes them allocated.
    pub async fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        no_hole: bool,
        fua: bool,
    ) -> Result<(), VolumeError> {
        self.inner.write_zeroes(offset, len, no_hole, fua).await?;
        self.durable_if(fua).await
    }

    /// Whether [`Volume::write_zeroes`] of the range needs no writing of zeros: every block is covered or a hole.
    pub async fn zeroes_are_fast(&self, offset: u64, len: u64) -> Result<bool, VolumeError> {
        self.inner.zeroes_are_fast(offset, len).await
    }

    /// Makes every write that has returned durable. Free on a write-through sheep.
    pub async fn flush(&self) -> Result<(), VolumeError> {
        self.inner.flush().await
    }

    /// How the range is allocated: lengths and kinds, adjacent equal ones merged.
    pub async fn extents(&self, offset: u64, len: u64) -> Result<Vec<(u64, Extent)>, VolumeError> {
        self.inner.extents(offset, len).await
    }
}

impl Inner {
    fn vid(&self) -> VdiId {
        VdiId::new(self.vid.load(Ordering::Acquire))
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn block_size(&self) -> u64 {
        1 << self.block_shift
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        let size = self.size();
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(()),
            _ => Err(VolumeError::OutOfRange { offset, len, size }),
        }
    }

    fn check_writable(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        if self.read_only {
            return Err(VolumeError::ReadOnly);
        }
        self.check_range(offset, len)
    }

    /// Cuts a checked range at block borders: index, offset in the block, length.
    fn pieces(&self, offset: u64, len: u64) -> impl Iterator<Item = (u32, u64, u64)> + use<> {
        let (shift, block) = (self.block_shift, self.block_size());
        let (mut at, end) = (offset, offset + len);
        std::iter::from_fn(move || {
            let within = at & (block - 1);
            let len = (block - within).min(end - at);
            // Ranges are checked against the size, which open() keeps below 2^32 blocks.
            let piece = (at < end).then_some(((at >> shift) as u32, within, len));
            at += len;
            piece
        })
    }
}
