//! Zero trimming (spec 03, section 9).

use std::ops::Range;

use sheepdog_buffer::is_zero;

/// Block of trimming and of the block bitmap, in bytes.
pub(crate) const BLOCK: u64 = 4096;

/// The part of `data` (to be stored at `offset`) that remains when zero blocks at both ends are left out. Blocks are
/// aligned to the object, not to the buffer; a part shorter than a block is never left out.
///
/// Trims by slicing: the data never moves.
pub fn trim_zeros(offset: u64, data: &[u8]) -> Range<usize> {
    let block = BLOCK as usize;
    let in_block = |n: usize| ((offset + n as u64) % BLOCK) as usize;
    let (mut start, mut end) = (0, data.len());
    while end - start >= block {
        let head = block - in_block(start);
        if !is_zero(&data[start..start + head]) {
            break;
        }
        start += head;
    }
    while end - start >= block {
        let tail = match in_block(end) {
            0 => block,
            n => n,
        };
        if !is_zero(&data[end - tail..end]) {
            break;
        }
        end -= tail;
    }
    start..end
}
