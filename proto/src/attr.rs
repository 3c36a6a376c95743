//! VDI attributes: key/value records, one object each (spec 01, section 14; spec 05, section 14).

use crate::Wire;
use crate::hash::{FNV_INIT, fnv1a64};

/// Bytes of an attribute record.
pub const ATTR_LEN: usize = 66_320;
/// Most bytes of a value.
pub const MAX_ATTR_VALUE: usize = 65_536;
/// Offset of the value.
pub const ATTR_VALUE_OFFSET: usize = AttrHeader::LEN;

wire! {
    /// The record up to its value.
    AttrHeader [784] {
        /// VDI name.
        0 => name: [u8; 256],
        /// Snapshot tag.
        256 => tag: [u8; 256],
        /// The VDI's create time, set by the server.
        512 => ctime: u64,
        /// Snapshot id.
        520 => snap_id: u32,
        /// Bytes of the value.
        524 => value_len: u32,
        /// Key.
        528 => key: [u8; 256],
    }
}

const _: () = assert!(AttrHeader::LEN + MAX_ATTR_VALUE == ATTR_LEN);

impl AttrHeader {
    /// Id where the attribute is looked for first: FNV-1a over name, tag, snapshot id and key with their padding.
    pub fn id(&self) -> u32 {
        let mut hash = fnv1a64(&self.name, FNV_INIT);
        hash = fnv1a64(&self.tag, hash);
        hash = fnv1a64(&self.snap_id.to_le_bytes(), hash);
        fnv1a64(&self.key, hash) as u32
    }

    /// Whether two records are about the same attribute.
    pub fn same_key(&self, other: &AttrHeader) -> bool {
        use crate::cstr;
        cstr(&self.name) == cstr(&other.name)
            && cstr(&self.tag) == cstr(&other.tag)
            && self.snap_id == other.snap_id
            && cstr(&self.key) == cstr(&other.key)
    }

    /// Header of a whole record.
    pub fn of_record(record: &[u8]) -> Result<AttrHeader, crate::DecodeError> {
        AttrHeader::decode(record)
    }
}
