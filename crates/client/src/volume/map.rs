//! The block table in memory: who owns each block.

use parking_lot::{Mutex, RwLock};
use sheepdog_proto::btree::BTREE_NODE_LEN;
use sheepdog_proto::inode::{self, GREF_OFFSET, InodeHeader, STORE_POLICY_BTREE, TABLE_OFFSET};

use super::error::During;
use super::index_tree::{IndexTree, Missing};
use super::{Extent, Inner, VolumeError};
use crate::vdi;

/// Owners of blocks by index; 0 = hole.
pub(super) enum Map {
    /// The table of an ordinary VDI, as long as the VDI has blocks.
    Flat(RwLock<Vec<u32>>),
    /// The index of a hypervolume; its leaves are loaded when needed and kept.
    Tree(Mutex<IndexTree>),
}

fn flat(header: &InodeHeader, inode: &[u8]) -> Vec<u32> {
    let bytes = inode.get(TABLE_OFFSET..GREF_OFFSET).unwrap_or_default();
    let blocks = header.nr_blocks() as usize;
    inode::table(bytes).iter().take(blocks).map(|entry| entry.get()).collect()
}

impl Map {
    /// From the first 4 198 968 bytes of an inode.
    pub(super) fn new(header: &InodeHeader, inode: &[u8]) -> Map {
        if header.store_policy == STORE_POLICY_BTREE {
            let node = inode.get(TABLE_OFFSET..GREF_OFFSET).unwrap_or_default();
            Map::Tree(Mutex::new(IndexTree::new(header.vdi_id, node, header.btree_counter)))
        } else {
            Map::Flat(RwLock::new(flat(header, inode)))
        }
    }

    /// Replaces what is known by an inode just read. Callers hold `moving`.
    pub(super) fn replace(&self, header: &InodeHeader, inode: &[u8]) {
        match (self, Map::new(header, inode)) {
            (Map::Flat(table), Map::Flat(new)) => *table.write() = new.into_inner(),
            (Map::Tree(tree), Map::Tree(new)) => tree.lock().replace(new.into_inner()),
            // The store policy of a VDI never changes.
            (Map::Flat(_), Map::Tree(_)) | (Map::Tree(_), Map::Flat(_)) => {}
        }
    }

    /// Makes room for a volume that grew.
    pub(super) fn grow(&self, header: &InodeHeader) {
        if let Map::Flat(table) = self {
            let mut table = table.write();
            let blocks = header.nr_blocks() as usize;
            if blocks > table.len() {
                table.resize(blocks, 0);
            }
        }
    }

    /// The owner, if that can be told without reading.
    pub(super) fn known(&self, idx: u32) -> Option<u32> {
        match self {
            Map::Flat(table) => Some(table.read().get(idx as usize).copied().unwrap_or(0)),
            Map::Tree(tree) => tree.lock().get(idx).ok(),
        }
    }

    /// Records owners that the sheep has confirmed.
    pub(super) fn set_flat(&self, entries: impl Iterator<Item = (u32, u32)>) {
        if let Map::Flat(table) = self {
            let mut table = table.write();
            for (idx, vid) in entries {
                if let Some(entry) = table.get_mut(idx as usize) {
                    *entry = vid;
                }
            }
        }
    }
}

impl Inner {
    /// The owner of a block; 0 = hole.
    pub(super) async fn entry(&self, idx: u32) -> Result<u32, VolumeError> {
        // Callers loop over up to 2^32 blocks: let others run.
        tokio::task::coop::consume_budget().await;
        match &self.map {
            Map::Flat(_) => Ok(self.map.known(idx).unwrap_or(0)),
            Map::Tree(tree) => loop {
                let missing = tree.lock().get(idx);
                match missing {
                    Ok(vid) => return Ok(vid),
                    Err(Missing(oid)) => self.load_leaf(tree, oid).await?,
                }
            },
        }
    }

    pub(super) async fn load_leaf(
        &self,
        tree: &Mutex<IndexTree>,
        oid: sheepdog_proto::Oid,
    ) -> Result<(), VolumeError> {
        let generation = tree.lock().generation();
        let bytes =
            vdi::read_object(&*self.service, oid, 0, BTREE_NODE_LEN).await.during("read of an index node")?;
        let mut tree = tree.lock();
        // A leaf that was read before the index was is older than it.
        if tree.generation() == generation {
            tree.load(oid, &bytes);
        }
        Ok(())
    }

    pub(super) async fn extents(&self, offset: u64, len: u64) -> Result<Vec<(u64, Extent)>, VolumeError> {
        self.check_range(offset, len)?;
        let vid = self.vid().get();
        let mut out: Vec<(u64, Extent)> = Vec::new();
        for (idx, _, len) in self.pieces(offset, len) {
            let extent = match self.entry(idx).await? {
                0 => Extent::Hole,
                owner if owner == vid => Extent::Own,
                _ => Extent::Inherited,
            };
            match out.last_mut() {
                Some((total, last)) if *last == extent => *total += len,
                _ => out.push((len, extent)),
            }
        }
        Ok(out)
    }
}
