//! `dog vdi list` (spec 07, 8.1).

use futures_util::StreamExt;
use serde_json::{Value, json};
use sheepdog_proto::redundancy::format_copies;

use crate::context::Context;
use crate::exit::{FAILURE, Outcome};
use crate::inode::{Inode, Part};
use crate::json;
use crate::numbers::{day_and_minute, human_size, seconds};
use crate::out;
use crate::vdi::{kind, pad_left, pad_right};
use crate::walk::walk;

const HEADING: &str =
    "  Name        Id    Size    Used  Shared    Creation time   VDI id  Copies  Tag   Block Size Shift\n";

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let raw = context.options.raw;
    let as_json = context.options.json;
    if !raw && !as_json {
        out::write(HEADING.as_bytes());
    }
    let name = context.arg(0);
    let oid = context.options.oid.filter(|_| name.is_none());
    if oid.is_some_and(|oid| !oid.is_data()) {
        return Err(FAILURE);
    }
    let mut rows = Vec::new();
    let mut inodes = walk(&context.session, Part::Map).await?;
    while let Some(inode) = inodes.next().await {
        let wanted = match (name, oid) {
            (Some(name), _) => inode.header.name() == name,
            (None, Some(oid)) => inode.map.get(oid.index().into()) == oid.vid(),
            (None, None) => true,
        };
        if wanted && as_json {
            rows.push(document(&inode));
        } else if wanted {
            out::write(&if raw { raw_row(&inode) } else { row(&inode) });
        }
    }
    if as_json {
        json::print(&json!({ "vdis": rows }));
    }
    Ok(())
}

fn document(inode: &Inode) -> Value {
    let (own, shared) = usage(inode);
    let clone = kind(&inode.header, ' ') == 'c';
    json::with(json::vdi(inode), json!({ "clone": clone, "used": own, "shared": shared }))
}

/// Bytes in own blocks and in blocks of other VDIs.
pub fn usage(inode: &Inode) -> (u64, u64) {
    let (mut own, mut shared) = (0, 0);
    for (_, owner) in inode.map.allocated() {
        *if owner == inode.vid() { &mut own } else { &mut shared } += 1;
    }
    (own * inode.header.block_size(), shared * inode.header.block_size())
}

fn row(inode: &Inode) -> Vec<u8> {
    let header = &inode.header;
    let (own, shared) = usage(inode);
    let head = format!("{} ", kind(header, ' '));
    let middle = format!(
        " {:5} {:>7} {:>7} {:>7} {}  {:>7x} {:>6} ",
        inode.shown_id(),
        human_size(header.vdi_size),
        human_size(own),
        human_size(shared),
        day_and_minute(seconds(header.create_time)),
        inode.vid().get(),
        format_copies(header.nr_copies, header.copy_policy),
    );
    let end = format!(" {:3}\n", header.block_size_shift);
    let (name, tag) = (pad_right(header.name(), 8), pad_left(header.tag(), 13));
    [head.as_bytes(), &name, middle.as_bytes(), &tag, end.as_bytes()].concat()
}

fn raw_row(inode: &Inode) -> Vec<u8> {
    let header = &inode.header;
    let (own, shared) = usage(inode);
    let mut row = format!("{} ", kind(header, '=')).into_bytes();
    row.extend(escaped(header.name()));
    let middle = format!(
        " {} {} {own} {shared} {} {} {} ",
        inode.shown_id(),
        header.vdi_size,
        seconds(header.create_time),
        inode.vid(),
        format_copies(header.nr_copies, header.copy_policy),
    );
    let end = format!(" {}\n", header.block_size_shift);
    row.extend([middle.as_bytes(), header.tag(), end.as_bytes()].concat());
    row
}

/// A name in a raw listing: a backslash before white space and backslashes.
pub fn escaped(name: &[u8]) -> Vec<u8> {
    let mut field = Vec::new();
    for byte in name {
        if byte.is_ascii_whitespace() || matches!(byte, 0x0b | b'\\') {
            field.push(b'\\');
        }
        field.push(*byte);
    }
    field
}
