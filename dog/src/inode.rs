//! Inodes: header and block map, flat or B-tree, read in the pieces that are needed (spec 07, 7.3; spec 01, 12).

use std::ops::Range;

use sheepdog_proto::inode::{INODE_HEADER_LEN, STORE_POLICY_BTREE, TABLE_OFFSET, table, table_offset};
use sheepdog_proto::{Flags, MAX_DATA_OBJS, Oid, VdiId, Wire};

pub use sheepdog_proto::inode::InodeHeader;

use crate::args::Snapshot;
use crate::btree::{self, Tree};
use crate::exit::{FAILURE, Outcome, Stop, fail};
use crate::objects::{Write, find, read, report_read};
use crate::out::text;
use crate::session::{Failed, Session};

/// Bytes read of every inode first: the header and a B-tree's root header.
const HEAD_LEN: usize = INODE_HEADER_LEN + 8;

/// Entries of the map that are read along with the header when all are wanted: most images need no second request.
const FIRST_ENTRIES: usize = 4096;

/// Which blocks are allocated, and by which VDI each was written.
#[derive(Debug, Clone)]
pub enum BlockMap {
    /// Entries from `first` on; blocks outside are holes as far as is known.
    Flat {
        /// Index of the first entry.
        first: u64,
        /// VDI ids, 0 = hole.
        entries: Vec<u32>,
    },
    /// All blocks of a hypervolume.
    Tree(Tree),
}

impl BlockMap {
    /// The VDI that owns a block; 0 for holes.
    pub fn get(&self, index: u64) -> VdiId {
        match self {
            BlockMap::Flat { first, entries } => {
                let entry = index.checked_sub(*first).and_then(|i| entries.get(usize::try_from(i).ok()?));
                VdiId::new(entry.copied().unwrap_or(0))
            }
            BlockMap::Tree(tree) => u32::try_from(index).map_or(VdiId::NONE, |index| tree.get(index)),
        }
    }

    /// Allocated blocks, ascending.
    pub fn allocated(&self) -> Box<dyn Iterator<Item = (u32, VdiId)> + Send + '_> {
        match self {
            BlockMap::Flat { first, entries } => Box::new(
                (*first as u32..)
                    .zip(entries)
                    .filter(|(_, entry)| **entry != 0)
                    .map(|(index, entry)| (index, VdiId::new(*entry))),
            ),
            BlockMap::Tree(tree) => Box::new(tree.allocated()),
        }
    }

    /// No blocks.
    pub fn empty() -> BlockMap {
        BlockMap::Flat { first: 0, entries: Vec::new() }
    }
}

/// An inode as far as it was read.
#[derive(Debug, Clone)]
pub struct Inode {
    /// The header.
    pub header: InodeHeader,
    /// The blocks that were asked for.
    pub map: BlockMap,
}

/// How much of the map to read.
#[derive(Debug, Clone)]
pub enum Part {
    /// Nothing.
    Header,
    /// All blocks below the VDI's size.
    Map,
    /// Blocks of this range of bytes of the VDI, cut to its size (a tree is always read whole).
    Bytes(Range<u64>),
}

impl Inode {
    /// Own id.
    pub fn vid(&self) -> VdiId {
        self.header.vdi_id
    }

    /// Whether the map is a B-tree.
    pub fn is_hyper(&self) -> bool {
        self.header.store_policy == STORE_POLICY_BTREE
    }

    /// The snapshot id that listings show: 0 for the working VDI.
    pub fn shown_id(&self) -> u32 {
        if self.header.is_snapshot() { self.header.snap_id } else { 0 }
    }

    /// The data object behind a block; `None` for holes.
    pub fn block(&self, index: u64) -> Option<Oid> {
        let owner = self.map.get(index);
        (!owner.is_none()).then(|| Oid::data(owner, index as u32))
    }

    /// Reads an inode. Nothing is printed but transport failures.
    pub async fn read(session: &Session, vid: VdiId, part: &Part) -> Result<Inode, ReadError> {
        Inode::read_with(session, vid, part, Flags::DIRECT).await
    }

    async fn read_with(session: &Session, vid: VdiId, part: &Part, flags: Flags) -> Result<Inode, ReadError> {
        let oid = Oid::inode(vid);
        let length = match part {
            Part::Header => INODE_HEADER_LEN,
            Part::Map => INODE_HEADER_LEN + 4 * FIRST_ENTRIES,
            Part::Bytes(_) => HEAD_LEN,
        };
        let head = read(session, oid, 0, length, flags).await.map_err(|e| ReadError::Header(oid, e))?;
        let mut inode = Inode { header: InodeHeader::get(&head), map: BlockMap::empty() };
        inode.read_map(session, part, &head[INODE_HEADER_LEN..]).await?;
        Ok(inode)
    }

    /// `start` is the start of the map, as far as it was read.
    async fn read_map(&mut self, session: &Session, part: &Part, start: &[u8]) -> Result<(), ReadError> {
        if matches!(part, Part::Header) {
            return Ok(());
        }
        if self.is_hyper() {
            self.map = BlockMap::Tree(
                btree::load(session, self.header.vdi_id, &start[..HEAD_LEN - INODE_HEADER_LEN]).await?,
            );
            return Ok(());
        }
        let shift = self.header.block_size().trailing_zeros();
        let blocks = self.header.nr_blocks();
        let range = match part {
            Part::Bytes(bytes) if bytes.is_empty() => 0..0,
            Part::Bytes(bytes) => (bytes.start >> shift)..((bytes.end - 1) >> shift) + 1,
            _ => 0..blocks,
        };
        let range = range.start.min(blocks)..range.end.min(blocks);
        if range.is_empty() {
            return Ok(());
        }
        // Only a map that is wanted from its start can use what was read with the header.
        let known = if range.start == 0 { (start.len() / 4).min(range.end as usize) } else { 0 };
        let mut entries: Vec<u32> = table(&start[..4 * known]).iter().map(|e| e.get()).collect();
        let first = range.start + known as u64;
        if first < range.end {
            let oid = Oid::inode(self.header.vdi_id);
            let length = 4 * (range.end - first) as usize;
            let bytes = read(session, oid, table_offset(first as u32), length, Flags::DIRECT)
                .await
                .map_err(|e| ReadError::Map(oid, e))?;
            entries.extend(table(&bytes).iter().map(|e| e.get()));
        }
        self.map = BlockMap::Flat { first: range.start, entries };
        Ok(())
    }
}

/// Which part of an inode could not be read.
#[derive(Debug, Clone, Copy)]
pub enum ReadError {
    /// The header.
    Header(Oid, Failed),
    /// The block map, or an object of it.
    Map(Oid, Failed),
}

impl ReadError {
    /// Prints the object and the reason.
    pub fn report(self) {
        let (ReadError::Header(oid, e) | ReadError::Map(oid, e)) = self;
        report_read(oid, e);
    }
}

/// Finds a VDI by name and reads it; failures are reported.
pub async fn open(
    session: &Session,
    name: &[u8],
    snapshot: Option<&Snapshot>,
    part: Part,
) -> Result<Inode, Stop> {
    let vid = find(session, name, snapshot).await?;
    read_named(session, vid, name, snapshot, part).await
}

/// Reads the inode of a VDI found by name; failures are reported.
pub async fn read_named(
    session: &Session,
    vid: VdiId,
    name: &[u8],
    snapshot: Option<&Snapshot>,
    part: Part,
) -> Result<Inode, Stop> {
    Inode::read(session, vid, &part).await.map_err(|e| {
        e.report();
        let name = text(name);
        match snapshot {
            Some(Snapshot::Id(id)) => fail(FAILURE, format_args!("Failed to read a snapshot {name}:{id}")),
            Some(Snapshot::Tag(tag)) => {
                fail(FAILURE, format_args!("Failed to read a snapshot {name}:{}", text(tag)))
            }
            None => fail(FAILURE, format_args!("Failed to read a vdi {name}")),
        }
    })
}

/// Enters a block that was just created into its inode's map; failures are reported.
pub async fn enter_block(session: &Session, inode: &mut Inode, index: u32, flags: Flags) -> Outcome {
    let (header, vid) = (inode.header, inode.vid());
    if let BlockMap::Tree(tree) = &mut inode.map {
        tree.set(index, vid);
        return btree::store(session, &mut inode.header, tree, flags).await.map_err(|_| FAILURE);
    }
    let entry = enter_flat(&header, index, flags);
    entry.send_or_report(session).await.map_err(|_| FAILURE)
}

/// The write that enters block `index` of a VDI with a flat map.
pub fn enter_flat(header: &InodeHeader, index: u32, flags: Flags) -> Write {
    debug_assert!((index as usize) < MAX_DATA_OBJS);
    let entry = header.vdi_id.get().to_le_bytes().to_vec();
    let mut write = Write::new(header, Oid::inode(header.vdi_id), table_offset(index), entry);
    write.flags = flags;
    write
}

const _: () = assert!(TABLE_OFFSET == INODE_HEADER_LEN);
