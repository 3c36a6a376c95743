//! Which 4 KiB blocks of an open file are durably mapped, and which are known to read as zero.
//!
//! A write into *mapped* blocks inside the durable file size changes no metadata that data depends on, so one device
//! flush makes it durable. A wrong "mapped" bit loses acknowledged data; a missing one only costs an `fdatasync`. So bits
//! are set only by FIEMAP (written extents without any odd flag) and after a successful `fdatasync`, and cleared before
//! anything that unmaps. *Zero* blocks (holes and unwritten extents after write-back) may be overwritten with zeros to
//! round out a first touch; any write clears that knowledge before it starts.

use std::ops::Range;

use crate::sys::fiemap::{EXTENT_LAST, EXTENT_MERGED, EXTENT_UNWRITTEN, Extent};
use crate::trim::BLOCK;

/// Largest file that gets a map, in bytes; its two bitmaps take 128 KiB.
pub(crate) const MAX_MAPPED_FILE: u64 = 2 << 30;

/// The state of the blocks of one file.
#[derive(Debug, Default, Clone)]
pub(crate) struct BlockMap {
    mapped: Bits,
    zero: Bits,
    /// File size known to be durable, in bytes.
    size: u64,
}

impl BlockMap {
    /// From the extents of a file of `size` bytes, read after write-back.
    pub(crate) fn from_extents(size: u64, extents: &[Extent]) -> BlockMap {
        let mut map = BlockMap { size, ..BlockMap::default() };
        let size = size.min(MAX_MAPPED_FILE);
        map.zero.set(0..size / BLOCK);
        for extent in extents {
            let end = extent.logical.saturating_add(extent.length).min(size.next_multiple_of(BLOCK));
            let known = extent.flags & !(EXTENT_LAST | EXTENT_MERGED);
            if extent.logical >= end || known == EXTENT_UNWRITTEN {
                continue;
            }
            map.zero.clear(touched(extent.logical..end));
            if known == 0 {
                map.mapped.set(inside(extent.logical..end));
            }
        }
        map
    }

    /// Whether a write of these bytes needs nothing but a device flush.
    pub(crate) fn is_mapped(&self, bytes: Range<u64>) -> bool {
        bytes.end <= self.size && self.mapped.all(touched(bytes))
    }

    /// Extends a block-aligned range over adjacent zero blocks, at most to multiples of `unit` bytes and never past
    /// the durable size.
    pub(crate) fn round_out(&self, bytes: Range<u64>, unit: u64) -> Range<u64> {
        let mut blocks = touched(bytes.clone());
        let first = bytes.start / unit * unit / BLOCK;
        let last = bytes.end.next_multiple_of(unit).min(self.size) / BLOCK;
        while blocks.start > first && self.zero.get(blocks.start - 1) {
            blocks.start -= 1;
        }
        while blocks.end < last && self.zero.get(blocks.end) {
            blocks.end += 1;
        }
        blocks.start * BLOCK..blocks.end * BLOCK
    }

    /// A write of these bytes is about to start.
    pub(crate) fn begin_write(&mut self, bytes: Range<u64>) {
        self.zero.clear(touched(bytes));
    }

    /// A write of these bytes was made durable by `fdatasync` of the file. Blocks of the file system must not be
    /// smaller than [`BLOCK`], so every touched block is mapped as a whole.
    pub(crate) fn commit(&mut self, bytes: Range<u64>) {
        self.size = self.size.max(bytes.end);
        // The map may have been read anew while the write was under way, and show the blocks as they were before.
        self.zero.clear(touched(bytes.clone()));
        let end = bytes.end.min(MAX_MAPPED_FILE);
        self.mapped.set(touched(bytes.start.min(end)..end));
    }

    /// These bytes are about to be punched out.
    pub(crate) fn begin_punch(&mut self, bytes: Range<u64>) {
        self.mapped.clear(touched(bytes.clone()));
        self.zero.clear(touched(bytes));
    }

    /// Number of mapped blocks.
    #[cfg(test)]
    pub(crate) fn mapped_blocks(&self) -> Vec<u64> {
        (0..self.mapped.words.len() as u64 * 64).filter(|b| self.mapped.get(*b)).collect()
    }
}

/// Blocks that the bytes touch.
fn touched(bytes: Range<u64>) -> Range<u64> {
    if bytes.is_empty() { 0..0 } else { bytes.start / BLOCK..bytes.end.div_ceil(BLOCK) }
}

/// Blocks that lie wholly inside the bytes.
fn inside(bytes: Range<u64>) -> Range<u64> {
    bytes.start.div_ceil(BLOCK)..bytes.end / BLOCK
}

#[derive(Debug, Default, Clone)]
struct Bits {
    words: Vec<u64>,
}

impl Bits {
    fn get(&self, i: u64) -> bool {
        self.words.get((i / 64) as usize).is_some_and(|w| w >> (i % 64) & 1 == 1)
    }

    fn all(&self, mut range: Range<u64>) -> bool {
        range.all(|i| self.get(i))
    }

    fn set(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let words = range.end.div_ceil(64) as usize;
        if self.words.len() < words {
            self.words.resize(words, 0);
        }
        for i in range {
            self.words[(i / 64) as usize] |= 1 << (i % 64);
        }
    }

    fn clear(&mut self, range: Range<u64>) {
        let end = range.end.min(self.words.len() as u64 * 64);
        for i in range.start..end {
            self.words[(i / 64) as usize] &= !(1 << (i % 64));
        }
    }
}
