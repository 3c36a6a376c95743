//! What the VDIs of a cluster must contain: a model in memory that follows every operation.

use std::collections::BTreeMap;

use sheepdog_proto::VdiId;
use sheepdog_testkit::load::SLOT;

/// Bytes of a block.
pub const BLOCK: u64 = 1 << 20;
/// Slots of a block.
pub const PER_BLOCK: u64 = BLOCK / SLOT as u64;

/// Contents of one VDI: the version that each slot was last written with, 0 = never.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The VDI.
    pub vid: VdiId,
    /// Number by which it is, or will be, a snapshot.
    pub snap_id: u32,
    /// Version of each slot.
    pub slots: Vec<u32>,
}

impl Image {
    /// Zeros.
    pub fn empty(vid: VdiId, snap_id: u32, blocks: u64) -> Image {
        Image { vid, snap_id, slots: vec![0; (blocks * PER_BLOCK) as usize] }
    }

    /// Size in blocks.
    pub fn blocks(&self) -> u64 {
        self.slots.len() as u64 / PER_BLOCK
    }

    /// The same contents under another vid.
    pub fn derive(&self, vid: VdiId, snap_id: u32) -> Image {
        Image { vid, snap_id, slots: self.slots.clone() }
    }
}

/// A snapshot.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Its tag; empty for the ones that live rollbacks make.
    pub tag: String,
    /// Its contents.
    pub image: Image,
}

/// All VDIs of one name.
#[derive(Debug, Clone, Default)]
pub struct Chain {
    /// The working VDI, unless it was deleted.
    pub working: Option<Image>,
    /// Snapshots, oldest first.
    pub snapshots: Vec<Snapshot>,
}

impl Chain {
    /// Number of the next VDI of this name (spec 05, 4 step 7).
    pub fn next_snap_id(&self) -> u32 {
        let newest = |s: &Snapshot| s.image.vid;
        self.snapshots.iter().max_by_key(|s| newest(s)).map_or(1, |s| s.image.snap_id + 1)
    }
}

/// Everything, by name.
#[derive(Debug, Default)]
pub struct Model {
    /// Chains with at least one member.
    pub chains: BTreeMap<String, Chain>,
}

impl Model {
    /// Forgets names without members.
    pub fn prune(&mut self) {
        self.chains.retain(|_, c| c.working.is_some() || !c.snapshots.is_empty());
    }

    /// Names whose working VDI exists.
    pub fn working_names(&self) -> Vec<String> {
        self.chains.iter().filter(|(_, c)| c.working.is_some()).map(|(n, _)| n.clone()).collect()
    }

    /// Name and number in its chain of every snapshot.
    pub fn snapshots(&self) -> Vec<(String, usize)> {
        let of = |(name, chain): (&String, &Chain)| {
            (0..chain.snapshots.len()).map(|i| (name.clone(), i)).collect::<Vec<_>>()
        };
        self.chains.iter().flat_map(of).collect()
    }

    /// Every VDI: name, tag, snapshot id (0 = the working VDI) and contents.
    pub fn images(&self) -> Vec<(&str, &str, u32, &Image)> {
        let mut all = Vec::new();
        for (name, chain) in &self.chains {
            if let Some(image) = &chain.working {
                all.push((name.as_str(), "", 0, image));
            }
            for s in &chain.snapshots {
                all.push((name.as_str(), s.tag.as_str(), s.image.snap_id, &s.image));
            }
        }
        all
    }
}
