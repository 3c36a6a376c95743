//! `dog vdi ...` (spec 07, sections 8 to 12).

pub mod alter_copy;
pub mod attr;
pub mod backup;
pub mod check;
pub mod clone;
pub mod create;
pub mod delete;
pub mod du;
pub mod dump_inode;
pub mod export;
pub mod graph;
pub mod import;
mod import_source;
pub mod list;
pub mod lock;
pub mod object;
mod qemu_img;
pub mod read;
pub mod resize;
pub mod restore;
pub mod rollback;
pub mod snapshot;
mod stream;
pub mod track;
pub mod tree;
pub mod write;

use std::ops::Range;

use crate::args::size_operand;
use crate::context::Context;
use crate::exit::Stop;
use crate::inode::{Inode, InodeHeader};
use crate::out::text;

/// The bytes of a VDI that the operands `[offset [length]]` mean, before they are cut to its size.
fn range_operands(context: &Context) -> Result<Range<u64>, Stop> {
    let operand = |index| context.arg(index).map(size_operand).transpose();
    let offset = operand(1)?.unwrap_or(0);
    let length = operand(2)?.unwrap_or(u64::MAX);
    Ok(offset..offset.saturating_add(length))
}

/// One part of a byte range that lies within a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    /// Block.
    index: u64,
    /// First byte in the block.
    offset: u64,
    /// Bytes.
    length: usize,
}

/// Cuts a range of bytes at block boundaries.
fn pieces(range: Range<u64>, block_size: u64) -> impl Iterator<Item = Piece> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let offset = at % block_size;
        let length = (block_size - offset).min(range.end - at);
        let piece = Piece { index: at / block_size, offset, length: length as usize };
        at += length;
        Some(piece)
    })
}

/// Bytes of blocks in flight of one command, at most; a single block may exceed it.
const MAX_IN_FLIGHT: u64 = 64 << 20;

/// How many blocks of the given size to work on at the same time, `most` if they are small.
fn ahead(most: usize, block_size: u64) -> usize {
    ((MAX_IN_FLIGHT / block_size) as usize).clamp(1, most)
}

/// The type column of listings: snapshot, clone that was never snapshotted, or `other`.
fn kind(header: &InodeHeader, other: char) -> char {
    if header.is_snapshot() {
        's'
    } else if header.snap_id == 1 && !header.parent_vdi_id.is_none() {
        'c'
    } else {
        other
    }
}

/// `printf`'s `%-*s`, counting bytes.
pub fn pad_right(bytes: &[u8], width: usize) -> Vec<u8> {
    let mut field = bytes.to_vec();
    field.resize(bytes.len().max(width), b' ');
    field
}

/// `printf`'s `%*s`, counting bytes.
fn pad_left(bytes: &[u8], width: usize) -> Vec<u8> {
    let mut field = vec![b' '; width.saturating_sub(bytes.len())];
    field.extend_from_slice(bytes);
    field
}

/// The VDI's name as text for a message.
fn name_text(inode: &Inode) -> String {
    text(inode.header.name()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_at_block_boundaries() {
        let cut: Vec<Piece> = pieces(5..25, 10).collect();
        let piece = |index, offset, length| Piece { index, offset, length };
        assert_eq!(cut, [piece(0, 5, 5), piece(1, 0, 10), piece(2, 0, 5)]);
        assert_eq!(pieces(7..7, 10).count(), 0);
    }
}
