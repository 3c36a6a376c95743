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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KB4: u64 = BLOCK;

    #[test]
    fn only_whole_written_blocks_of_ordinary_extents_are_mapped() {
        let extents = [
            Extent::new(0, 2 * KB4, 0),
            Extent::new(2 * KB4, KB4, EXTENT_UNWRITTEN),
            Extent::new(3 * KB4, KB4 / 2, 0),
            Extent::new(5 * KB4, KB4, 0x0004), // delayed allocation
            Extent::new(6 * KB4, KB4, 0x0002), // unknown
            Extent::new(7 * KB4, KB4, EXTENT_MERGED),
            Extent::new(8 * KB4, 100 * KB4, EXTENT_LAST), // allocated past the end of the file
        ];
        let map = BlockMap::from_extents(9 * KB4 + 10, &extents);
        assert_eq!(map.mapped_blocks(), [0, 1, 7, 8, 9]);
        assert!(map.is_mapped(8 * KB4..9 * KB4 + 10), "the partial last block");
        assert!(!map.is_mapped(8 * KB4..9 * KB4 + 11), "a write that makes the file longer");
        assert!(!map.is_mapped(KB4..2 * KB4 + 1) && !map.is_mapped(3 * KB4..3 * KB4 + 1));
        // Zero-filling may cover the unwritten block and the hole, nothing else.
        assert_eq!(map.round_out(3 * KB4..4 * KB4, 16 * KB4), 2 * KB4..5 * KB4);
    }

    #[test]
    fn a_started_write_is_not_overwritten_with_zeros_and_a_failed_one_not_believed() {
        let mut map = BlockMap::from_extents(16 * KB4, &[]);
        assert_eq!(map.round_out(4 * KB4..5 * KB4, 16 * KB4), 0..16 * KB4);
        map.begin_write(8 * KB4..9 * KB4);
        assert_eq!(map.round_out(4 * KB4..5 * KB4, 16 * KB4), 0..8 * KB4);
        assert!(!map.is_mapped(8 * KB4..9 * KB4));
        map.commit(8 * KB4..9 * KB4);
        assert!(map.is_mapped(8 * KB4..9 * KB4));
        map.begin_punch(8 * KB4..8 * KB4 + 1);
        assert!(!map.is_mapped(8 * KB4..9 * KB4));
    }

    proptest! {
        /// Against a plain model: per block, whether it is surely mapped and whether it surely reads as zero.
        #[test]
        fn follows_a_model(ops in proptest::collection::vec((0u8..4, 0u64..60, 1u64..20, 0u64..4096), 1..40)) {
            let size = 64 * KB4;
            let mut map = BlockMap::from_extents(size, &[]);
            let (mut mapped, mut zero) = (vec![false; 64], vec![true; 64]);
            for (op, first, blocks, shift) in ops {
                let start = first * KB4 + shift;
                let end = (start + blocks * KB4).min(size);
                let touched = (start / KB4) as usize..end.div_ceil(KB4) as usize;
                match op {
                    0 | 1 => {
                        map.begin_write(start..end);
                        zero[touched.clone()].fill(false);
                        if op == 1 {
                            map.commit(start..end);
                            mapped[touched].fill(true);
                        }
                    }
                    2 => {
                        map.begin_punch(start..end);
                        mapped[touched.clone()].fill(false);
                        zero[touched].fill(false);
                    }
                    _ => {
                        prop_assert_eq!(map.is_mapped(start..end), mapped[touched.clone()].iter().all(|b| *b));
                        let inner = touched.start as u64 * KB4..touched.end as u64 * KB4;
                        let outer = map.round_out(inner.clone(), 16 * KB4);
                        prop_assert!(outer.start <= inner.start && outer.end >= inner.end && outer.end <= size);
                        for b in (outer.start / KB4..inner.start / KB4).chain(inner.end / KB4..outer.end / KB4) {
                            prop_assert!(zero[b as usize], "block {} would be overwritten", b);
                        }
                    }
                }
            }
        }
    }
}
