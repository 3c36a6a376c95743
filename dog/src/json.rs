//! `--json`: one document instead of a listing (our addition).
//!
//! Field names are interface and never change their meaning; new ones may appear. Sizes are bytes, times seconds since
//! 1970, VDI and object ids hexadecimal text as everywhere else, nodes `id` as in `dog node list` and `address`
//! HOST:PORT. Names that are not UTF-8 have their bad bytes replaced. A command that fails prints no document.

use serde_json::{Map, Value, json};
use sheepdog_proto::redundancy::format_copies;
use sheepdog_proto::{NodeRecord, VdiId};

use crate::inode::{Inode, InodeHeader};
use crate::numbers::seconds;
use crate::out::{self, text};

/// Prints the document, in one line.
pub fn print(document: &Value) {
    out::write(format!("{document}\n").as_bytes());
}

/// What every listing of VDIs says about one.
pub fn vdi(inode: &Inode) -> Map<String, Value> {
    let header = &inode.header;
    let mut fields = header_fields(header);
    fields.insert("snapshot_id".into(), inode.shown_id().into());
    fields
}

fn header_fields(header: &InodeHeader) -> Map<String, Value> {
    let parent = (!header.parent_vdi_id.is_none()).then(|| vid(header.parent_vdi_id));
    let fields = json!({
        "name": text(header.name()),
        "tag": text(header.tag()),
        "vdi_id": vid(header.vdi_id),
        "parent_vdi_id": parent,
        "snapshot": header.is_snapshot(),
        "size": header.vdi_size,
        "created": seconds(header.create_time),
        "copies": format_copies(header.nr_copies, header.copy_policy),
        "block_size": header.block_size(),
    });
    match fields {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

/// A VDI id.
pub fn vid(vid: VdiId) -> String {
    vid.to_string()
}

/// What every listing of nodes says about one.
pub fn node(id: usize, node: &NodeRecord) -> Map<String, Value> {
    let mut fields = Map::new();
    fields.insert("id".into(), id.into());
    fields.insert("address".into(), node.nid.host_port().into());
    fields
}

/// Adds the fields of `more`, an object.
pub fn with(mut fields: Map<String, Value>, more: Value) -> Value {
    if let Value::Object(more) = more {
        fields.extend(more);
    }
    Value::Object(fields)
}

/// A used share of a space.
pub fn space(size: u64, free: u64) -> Value {
    json!({ "size": size, "used": size.saturating_sub(free), "available": free })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inode::BlockMap;
    use sheepdog_proto::fixed_str;

    #[test]
    fn vdis_have_the_documented_fields() {
        let header = InodeHeader {
            name: fixed_str(b"caf\xe9"),
            tag: fixed_str(b"t"),
            vdi_id: VdiId::new(0x7c2b25),
            vdi_size: 1 << 30,
            create_time: 1_700_000_000 << 32,
            nr_copies: 6,
            copy_policy: 0x22,
            block_size_shift: 22,
            snap_id: 1,
            ..InodeHeader::zeroed()
        };
        let document = with(vdi(&Inode { header, map: BlockMap::empty() }), json!({ "used": 0 }));
        let expected = json!({
            "name": "caf\u{fffd}", "tag": "t", "vdi_id": "7c2b25", "parent_vdi_id": null, "snapshot": false,
            "snapshot_id": 0, "size": 1u64 << 30, "created": 1_700_000_000, "copies": "4:2",
            "block_size": 4 << 20, "used": 0,
        });
        assert_eq!(document, expected);
    }
}
