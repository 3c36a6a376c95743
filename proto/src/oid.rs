//! Object ids and VDI ids (spec 01, section 10).
//!
//! ```text
//! 63    62       61    60     59      56 55           32 31                    0
//! inode vmstate  attr  btree  ledger  0   vid (24 bits)  index / attr id / node
//! ```

use std::fmt;

use crate::inode::INODE_LEN;
use crate::{Wire, attr};

/// A VDI id: 1..=0xffffff names a VDI, 0 means "none".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct VdiId(u32);

impl VdiId {
    /// "No VDI".
    pub const NONE: VdiId = VdiId(0);

    /// Keeps the 24 bits that an id has.
    pub fn new(raw: u32) -> VdiId {
        VdiId(raw & 0xff_ffff)
    }

    /// The number.
    pub fn get(self) -> u32 {
        self.0
    }

    /// Whether this is 0.
    pub fn is_none(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Debug for VdiId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:06x}", self.0)
    }
}

/// Lower-case hexadecimal without padding, as tools print vids.
impl fmt::Display for VdiId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

impl Wire for VdiId {
    const SIZE: usize = 4;
    const NAME: &'static str = "vid";
    fn get(bytes: &[u8]) -> Self {
        VdiId::new(u32::get(bytes))
    }
    fn put(&self, out: &mut [u8]) {
        self.0.put(out);
    }
}

/// A 64-bit object id. Displays as the 16 lower-case hex digits that also name its file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Oid(pub u64);

/// What an object is, by the highest set bit of 63..59.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectKind {
    /// The inode of a VDI (bit 63).
    Inode,
    /// Saved VM memory (bit 62).
    VmState,
    /// A key/value attribute (bit 61).
    Attr,
    /// An index node of a hypervolume (bit 60).
    Btree,
    /// The reference ledger of a data object (bit 59).
    Ledger,
    /// A block of a VDI.
    Data,
}

const INODE: u64 = 1 << 63;
const VMSTATE: u64 = 1 << 62;
const ATTR: u64 = 1 << 61;
const BTREE: u64 = 1 << 60;
const LEDGER: u64 = 1 << 59;

impl Oid {
    fn build(bits: u64, vid: VdiId, low: u32) -> Oid {
        Oid(bits | u64::from(vid.get()) << 32 | u64::from(low))
    }

    /// The inode object of a VDI.
    pub fn inode(vid: VdiId) -> Oid {
        Oid::build(INODE, vid, 0)
    }

    /// Block `index` of a VDI.
    pub fn data(vid: VdiId, index: u32) -> Oid {
        Oid::build(0, vid, index)
    }

    /// Block `index` of saved VM memory.
    pub fn vmstate(vid: VdiId, index: u32) -> Oid {
        Oid::build(VMSTATE, vid, index)
    }

    /// An attribute; `name_hash` is [`crate::hash::name_hash`] of the VDI's name, not its vid.
    pub fn attr(name_hash: u32, attr_id: u32) -> Oid {
        Oid::build(ATTR, VdiId::new(name_hash), attr_id)
    }

    /// Index node `number` of a hypervolume.
    pub fn btree(vid: VdiId, number: u32) -> Oid {
        Oid::build(BTREE, vid, number)
    }

    /// The reference ledger of a data object.
    pub fn ledger_of(data: Oid) -> Oid {
        Oid(data.0 | LEDGER)
    }

    /// The data object that a ledger counts.
    pub fn data_of_ledger(self) -> Oid {
        Oid(self.0 & !LEDGER)
    }

    /// The VDI that the object belongs to (for attributes: the hash of its name).
    pub fn vid(self) -> VdiId {
        VdiId::new((self.0 >> 32) as u32)
    }

    /// The low 32 bits: block index, attribute id or index node number.
    pub fn index(self) -> u32 {
        self.0 as u32
    }

    /// Classifies; tests are made in the order of the bits (spec 03, section 7).
    pub fn kind(self) -> ObjectKind {
        match self.0 {
            o if o & INODE != 0 => ObjectKind::Inode,
            o if o & VMSTATE != 0 => ObjectKind::VmState,
            o if o & ATTR != 0 => ObjectKind::Attr,
            o if o & BTREE != 0 => ObjectKind::Btree,
            o if o & LEDGER != 0 => ObjectKind::Ledger,
            _ => ObjectKind::Data,
        }
    }

    /// Whether this is a block of a VDI.
    pub fn is_data(self) -> bool {
        self.kind() == ObjectKind::Data
    }

    /// Whether this is an inode.
    pub fn is_inode(self) -> bool {
        self.kind() == ObjectKind::Inode
    }

    /// Bytes of a replica of this object in a VDI with the given block size.
    pub fn size(self, block_size_shift: u8) -> u64 {
        match self.kind() {
            ObjectKind::Inode => INODE_LEN as u64,
            ObjectKind::VmState | ObjectKind::Data => 1 << block_size_shift.min(crate::MAX_BLOCK_SHIFT),
            ObjectKind::Attr => attr::ATTR_LEN as u64,
            ObjectKind::Btree | ObjectKind::Ledger => 4 << 20,
        }
    }

    /// Whether replicas are kept sparse (inodes and ledgers).
    pub fn is_sparse(self) -> bool {
        matches!(self.kind(), ObjectKind::Inode | ObjectKind::Ledger)
    }

    /// Whether the object is erasure-coded when its VDI is; inodes, index nodes and ledgers are always replicated.
    pub fn follows_policy(self) -> bool {
        matches!(self.kind(), ObjectKind::Data | ObjectKind::VmState | ObjectKind::Attr)
    }
}

impl fmt::Debug for Oid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Display for Oid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl Wire for Oid {
    const SIZE: usize = 8;
    const NAME: &'static str = "oid";
    fn get(bytes: &[u8]) -> Self {
        Oid(u64::get(bytes))
    }
    fn put(&self, out: &mut [u8]) {
        self.0.put(out);
    }
}
