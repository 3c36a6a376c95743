//! The buffer and its pools: the only unsafe code of this crate.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use bytes::Bytes;
use parking_lot::Mutex;

/// Alignment of every buffer, in bytes.
pub const PAGE: usize = 4096;

/// Capacities of the pooled classes, in bytes, and how many idle buffers each keeps.
const CLASSES: [(usize, usize); 2] = [(64 << 10, 512), (4 << 20, 16)];

static POOLS: [Mutex<Vec<Block>>; 2] = [Mutex::new(Vec::new()), Mutex::new(Vec::new())];

/// An owned, page-aligned, initialised allocation.
struct Block {
    ptr: NonNull<u8>,
    capacity: usize,
}

// SAFETY: a Block is the only owner of its memory and has no interior mutability.
unsafe impl Send for Block {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for Block {}

impl Block {
    fn layout(capacity: usize) -> Layout {
        Layout::from_size_align(capacity, PAGE)
            .expect("capacities are bounded by callers far below isize::MAX")
    }

    fn new(capacity: usize) -> Block {
        let layout = Self::layout(capacity.max(PAGE));
        // SAFETY: the layout has a non-zero size.
        let raw = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(raw) else { handle_alloc_error(layout) };
        Block { ptr, capacity: layout.size() }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with exactly this layout and not freed before.
        unsafe { dealloc(self.ptr.as_ptr(), Self::layout(self.capacity)) }
    }
}

/// A page-aligned byte buffer; see the crate's documentation.
pub struct PageBuf {
    block: Option<Block>,
    len: usize,
}

fn class_of(len: usize) -> Option<usize> {
    // Small requests go to the small class; the large class is not wasted on what fits a few pages.
    CLASSES
        .iter()
        .position(|(size, _)| len <= *size && len * 64 >= *size)
        .or((len <= CLASSES[0].0).then_some(0))
}

impl PageBuf {
    /// A buffer of `len` zeros.
    pub fn zeroed(len: usize) -> PageBuf {
        let mut buf = PageBuf::dirty(len);
        buf.fill(0);
        buf
    }

    /// A buffer of `len` bytes whose contents are arbitrary: for callers that overwrite all of it before anybody else
    /// sees it.
    pub fn dirty(len: usize) -> PageBuf {
        let block = match class_of(len) {
            Some(class) => {
                let pooled = POOLS[class].lock().pop();
                pooled.unwrap_or_else(|| Block::new(CLASSES[class].0))
            }
            None => Block::new(len.next_multiple_of(PAGE)),
        };
        PageBuf { block: Some(block), len }
    }

    /// A buffer holding a copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> PageBuf {
        let mut buf = PageBuf::dirty(bytes.len());
        buf.copy_from_slice(bytes);
        buf
    }

    /// Shortens the buffer.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// As shareable, immutable bytes; the memory returns to its pool when the last slice is dropped.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl Deref for PageBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.block {
            // SAFETY: the block is initialised for its whole capacity, and `len <= capacity` by construction.
            Some(block) => unsafe { std::slice::from_raw_parts(block.ptr.as_ptr(), self.len) },
            None => &[],
        }
    }
}

impl DerefMut for PageBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.block {
            // SAFETY: as in `deref`; `&mut self` makes the access exclusive.
            Some(block) => unsafe { std::slice::from_raw_parts_mut(block.ptr.as_ptr(), self.len) },
            None => &mut [],
        }
    }
}

impl AsRef<[u8]> for PageBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for PageBuf {
    fn drop(&mut self) {
        let Some(block) = self.block.take() else { return };
        if let Some(class) = CLASSES.iter().position(|(size, _)| *size == block.capacity) {
            let mut pool = POOLS[class].lock();
            if pool.len() < CLASSES[class].1 {
                pool.push(block);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_sized_and_writable() {
        for len in [0, 1, 4096, 65_536, 65_537, 100_000, 4 << 20, (4 << 20) + 1] {
            let mut buf = PageBuf::zeroed(len);
            assert_eq!(buf.len(), len);
            assert_eq!(buf.as_ptr() as usize % PAGE, 0);
            buf.fill(7);
            let bytes = buf.freeze();
            assert!(bytes.iter().all(|b| *b == 7));
        }
    }

    #[test]
    fn zeroed_does_not_show_what_a_pooled_buffer_held() {
        let mut buf = PageBuf::dirty(4096);
        buf.fill(0xaa);
        drop(buf);
        assert!(PageBuf::zeroed(4096).iter().all(|b| *b == 0));
    }
}
