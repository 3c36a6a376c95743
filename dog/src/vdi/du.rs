//! `dog vdi du` (our addition): what images cost.
//!
//! "Used" are the blocks that an image owns, "Shared" those of others that it refers to, "On disk" the used ones times
//! their redundancy: what deleting the image and all that refer to it would give back, at most, because blocks of zeros
//! and trimmed ones take less.

use futures_util::StreamExt;
use serde_json::{Value, json};
use sheepdog_proto::CopyPolicy;

use crate::context::Context;
use crate::exit::{FAILURE, Outcome, fail};
use crate::inode::{Inode, InodeHeader, Part};
use crate::numbers::human_size;
use crate::vdi::list::usage;
use crate::vdi::{pad_left, pad_right};
use crate::walk::walk;
use crate::{json, out};

/// Bytes of one image, or of all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Usage {
    size: u64,
    used: u64,
    shared: u64,
    on_disk: u64,
}

impl Usage {
    fn of(inode: &Inode) -> Usage {
        let (used, shared) = usage(inode);
        let header = &inode.header;
        Usage { size: header.vdi_size, used, shared, on_disk: on_disk(header, used) }
    }

    fn add(&mut self, other: Usage) {
        self.size = self.size.saturating_add(other.size);
        self.used = self.used.saturating_add(other.used);
        self.shared = self.shared.saturating_add(other.shared);
        self.on_disk = self.on_disk.saturating_add(other.on_disk);
    }

    fn columns(self) -> [u64; 4] {
        [self.size, self.used, self.shared, self.on_disk]
    }

    fn document(self) -> Value {
        json!({ "size": self.size, "used": self.used, "shared": self.shared, "on_disk": self.on_disk })
    }
}

fn on_disk(header: &InodeHeader, used: u64) -> u64 {
    match CopyPolicy::from_byte(header.copy_policy) {
        Ok(policy) if policy.is_erasure() => {
            used / u64::from(policy.data_strips()) * u64::from(policy.strips())
        }
        _ => used.saturating_mul(header.nr_copies.into()),
    }
}

/// Runs the command: all images, or one with its snapshots.
pub async fn run(context: &Context) -> Outcome {
    let options = &context.options;
    let (mut rows, mut total, mut count) = (Vec::new(), Usage::default(), 0u64);
    if !options.raw && !options.json {
        out!("  Name        Id      Size      Used    Shared   On disk  Tag\n");
    }
    let mut inodes = walk(&context.session, Part::Map).await?;
    while let Some(inode) = inodes.next().await {
        if context.arg(0).is_some_and(|name| inode.header.name() != name) {
            continue;
        }
        let usage = Usage::of(&inode);
        total.add(usage);
        count += 1;
        if options.json {
            rows.push(json::with(json::vdi(&inode), usage.document()));
        } else {
            out::write(&row(&inode, usage, options.raw));
        }
    }
    if let Some(name) = context.arg(0).filter(|_| count == 0) {
        return Err(fail(FAILURE, format_args!("There is no VDI {}", out::text(name))));
    }
    if options.json {
        json::print(&json!({ "vdis": rows, "total": total.document() }));
    } else if options.raw {
        out!("Total {}\n", total.columns().map(|n| n.to_string()).join(" "));
    } else {
        out!("  Total            {}\n", columns(total));
    }
    Ok(())
}

fn columns(usage: Usage) -> String {
    usage.columns().map(|n| format!("{:>9}", human_size(n))).join(" ").trim_end().to_owned()
}

fn row(inode: &Inode, usage: Usage, raw: bool) -> Vec<u8> {
    let header = &inode.header;
    let mark = super::kind(header, if raw { '=' } else { ' ' });
    let (head, middle) = (format!("{mark} "), format!(" {:5} {}  ", inode.shown_id(), columns(usage)));
    if raw {
        let numbers = usage.columns().map(|n| n.to_string()).join(" ");
        let middle = format!(" {} {numbers} ", inode.shown_id());
        let name = super::list::escaped(header.name());
        return [head.as_bytes(), &name, middle.as_bytes(), header.tag(), b"\n"].concat();
    }
    let name = pad_right(header.name(), 10);
    [head.as_bytes(), &name, middle.as_bytes(), &pad_left(header.tag(), 0), b"\n"].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redundancy_counts() {
        let header = |copies, policy| InodeHeader {
            nr_copies: copies,
            copy_policy: policy,
            block_size_shift: 22,
            ..InodeHeader::zeroed()
        };
        assert_eq!(on_disk(&header(3, 0), 8 << 20), 24 << 20);
        assert_eq!(on_disk(&header(6, 0x22), 8 << 20), 12 << 20, "4:2");
    }
}
