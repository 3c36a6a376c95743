//! The VDI state table: what is known of every vid without reading its inode (spec 05, sections 2 and 15).
//!
//! Changed only by the cluster task (in event order, so equal on all nodes) and by the start-up scan; read by every
//! request. Records merge monotonically: `snapshot` and `deleted` go from no to yes only (mandated deviation 9); an announced
//! snapshot that nobody made is the exception (`vdi/unfinished.rs`). A node that joins applies what it was told since then on top
//! of the tables that it gets.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Instant;

use parking_lot::{Mutex, RwLock};
use sheepdog_proto::inode::InodeHeader;
use sheepdog_proto::vdi_state::{self, VdiState};
use sheepdog_proto::{
    CopyPolicy, DEFAULT_BLOCK_SHIFT, Epoch, MAX_BLOCK_SHIFT, MAX_COPIES, MIN_BLOCK_SHIFT, NR_VDIS, NodeId,
    ResultCode, VDI_BITMAP_LEN, VdiId,
};

use super::locks::{Lock, TYPE_NORMAL};

/// One VDI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Copies, or data plus parity strips.
    pub nr_copies: u8,
    /// Policy byte.
    pub copy_policy: u8,
    /// log2 of the block size.
    pub block_size_shift: u8,
    /// Its data objects are read-only.
    pub snapshot: bool,
    /// When this node was told that it became one.
    pub snapshot_since: Option<Instant>,
    /// It was deleted.
    pub deleted: bool,
    /// What it was derived from.
    pub parent: VdiId,
    /// Who holds it.
    pub lock: Lock,
}

/// How the objects of a VDI are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Redundancy {
    /// Copies, or data plus parity strips.
    pub copies: u8,
    /// Replication or erasure code.
    pub policy: CopyPolicy,
    /// log2 of the block size.
    pub block_size_shift: u8,
    /// Whether writes of data objects are refused.
    pub snapshot: bool,
    /// Whether the table knows the VDI; if not, the cluster's defaults were filled in.
    pub known: bool,
}

/// 2^24 bits.
struct Bitmap(Box<[u8]>);

impl Bitmap {
    fn new() -> Bitmap {
        Bitmap(vec![0; VDI_BITMAP_LEN].into())
    }

    fn get(&self, vid: usize) -> bool {
        self.0[vid / 8] & (1 << (vid % 8)) != 0
    }

    fn set(&mut self, vid: usize, value: bool) {
        if value {
            self.0[vid / 8] |= 1 << (vid % 8);
        } else {
            self.0[vid / 8] &= !(1 << (vid % 8));
        }
    }

    /// First zero bit at or above `from`, or 2^24.
    fn next_zero(&self, from: usize) -> usize {
        let mut vid = from;
        while vid < NR_VDIS {
            if vid.is_multiple_of(8) && self.0[vid / 8] == 0xff {
                vid += 8;
            } else if self.get(vid) {
                vid += 1;
            } else {
                break;
            }
        }
        vid
    }

    fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().enumerate().filter(|(_, byte)| **byte != 0).flat_map(|(i, byte)| {
            (0..8).filter(move |bit| byte & (1 << bit) != 0).map(move |bit| i * 8 + bit)
        })
    }
}

/// A working VDI that was announced as a snapshot, before that is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unfinished {
    /// By whom.
    pub by: NodeId,
    /// Which announcement.
    pub which: u64,
    /// The VDI that is to go on.
    pub child: VdiId,
}

struct Tables {
    in_use: Bitmap,
    deleted: Bitmap,
    entries: BTreeMap<VdiId, Entry>,
    /// Where locks went that a snapshot took along, from the vid that was locked.
    moved_locks: BTreeMap<VdiId, VdiId>,
    /// Working VDIs that were announced as snapshots, until the snapshot is made.
    unfinished: BTreeMap<VdiId, Unfinished>,
    announcements: u64,
    /// What was told since this node joined, until the tables of the members have arrived.
    told: Option<Vec<Change>>,
}

/// What every node is told of VDIs.
#[derive(Debug, Clone, Copy)]
enum Change {
    /// By whom; the VDI that becomes a snapshot, the new one, and whether its in-use bit is set at once.
    Announced(NodeId, VdiId, VdiId, Redundancy, bool),
    Finished(NodeId),
    InUse(VdiId),
    Deleted(VdiId),
    /// Copies and log2 of the block size.
    Altered(VdiId, u8, u8),
    Recycled(VdiId),
    Cleared,
}

/// See the module's documentation.
pub struct VdiTable {
    tables: RwLock<Tables>,
    /// Copies of the table for nodes that join (spec 05, section 18), by epoch.
    checkpoints: Mutex<BTreeMap<Epoch, Vec<VdiState>>>,
    /// This node is still learning lock states.
    collecting: AtomicBool,
    max_shift: AtomicU8,
}

/// Checkpoints kept at most; older ones are of joiners that never came back for them.
const MAX_CHECKPOINTS: usize = 8;

/// Where a name's VDIs are and which id a new one takes (spec 05, section 2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeRange {
    /// Vids to look at, in the order to look at them.
    pub candidates: Vec<VdiId>,
    /// The free id, if there is one.
    pub free: Option<VdiId>,
}

impl Default for VdiTable {
    fn default() -> Self {
        VdiTable {
            tables: RwLock::new(Tables {
                in_use: Bitmap::new(),
                deleted: Bitmap::new(),
                entries: BTreeMap::new(),
                moved_locks: BTreeMap::new(),
                unfinished: BTreeMap::new(),
                announcements: 0,
                told: None,
            }),
            checkpoints: Mutex::default(),
            collecting: AtomicBool::new(false),
            max_shift: AtomicU8::new(DEFAULT_BLOCK_SHIFT),
        }
    }
}

impl VdiTable {
    /// Forgets everything (MAKE_FS).
    pub fn clear(&self) {
        self.change(Change::Cleared);
        self.checkpoints.lock().clear();
    }

    /// This node has joined, and the tables of the members are on their way. A member may tell its table before it applies
    /// what is told next: that is older than what this node has heard by the time it arrives.
    pub fn expect_records(&self) {
        self.tables.write().told = Some(Vec::new());
    }

    /// The tables of the members have arrived: what was told meanwhile counts, and comes on top.
    pub fn records_arrived(&self) {
        let mut t = self.tables.write();
        for change in t.told.take().unwrap_or_default() {
            t.apply(change);
        }
    }

    fn change(&self, change: Change) {
        let mut t = self.tables.write();
        if let Some(told) = &mut t.told {
            told.push(change);
        }
        t.apply(change);
    }

    fn note_shift(&self, shift: u8) {
        self.max_shift.fetch_max(shift.min(MAX_BLOCK_SHIFT), Ordering::Relaxed);
    }

    /// Adds what an inode on this node's disks says.
    pub fn add_inode(&self, header: &InodeHeader, vid: VdiId) {
        let valid = is_valid(header.nr_copies, header.copy_policy, header.block_size_shift);
        let mut t = self.tables.write();
        t.in_use.set(vid.get() as usize, true);
        if !valid {
            tracing::error!(
                "the inode of {vid:?} is unusable: {} copies, policy {:#x}, block size 2^{}",
                header.nr_copies,
                header.copy_policy,
                header.block_size_shift
            );
            return;
        }
        self.note_shift(header.block_size_shift);
        if header.is_deleted() {
            t.deleted.set(vid.get() as usize, true);
        }
        t.merge(
            vid,
            Entry {
                nr_copies: header.nr_copies,
                copy_policy: header.copy_policy,
                block_size_shift: header.block_size_shift,
                snapshot: header.is_snapshot(),
                snapshot_since: None,
                deleted: header.is_deleted(),
                parent: header.parent_vdi_id,
                lock: Lock::Unlocked,
            },
            Merge::Known,
        );
    }

    /// Adds a record fetched from another node. `from_joiner`: it must not override what is known here.
    pub fn add_record(&self, record: &VdiState, from_joiner: bool) {
        if record.vid.is_none() || !is_valid(record.nr_copies, record.copy_policy, record.block_size_shift) {
            tracing::error!("unusable record of {:?} from another node", record.vid);
            return;
        }
        self.note_shift(record.block_size_shift);
        let mut t = self.tables.write();
        let bit = record.vid.get() as usize;
        // Where a name's vids end is decided by these bits: all nodes need the same ones.
        if record.announced_only == 0 {
            t.in_use.set(bit, true);
        }
        if record.deleted != 0 {
            t.deleted.set(bit, true);
        }
        let entry = Entry {
            nr_copies: record.nr_copies,
            copy_policy: record.copy_policy,
            block_size_shift: record.block_size_shift,
            snapshot: record.snapshot != 0,
            snapshot_since: None,
            deleted: record.deleted != 0,
            parent: record.parent_vid,
            lock: Lock::Unlocked,
        };
        t.merge(record.vid, entry, if from_joiner { Merge::Known } else { Merge::Theirs });
    }

    /// NOTIFY_VDI_ADD by `node`: `old` becomes a snapshot, `new` is registered (spec 05, section 15).
    pub fn announce(&self, node: NodeId, old: VdiId, new: VdiId, redundancy: Redundancy, set_bitmap: bool) {
        self.note_shift(redundancy.block_size_shift);
        self.change(Change::Announced(node, old, new, redundancy, set_bitmap));
    }

    /// What `node` announced as snapshots is made (NEW_VDI).
    pub fn finish(&self, node: NodeId) {
        self.change(Change::Finished(node));
    }

    /// Working VDIs that `node` announced as snapshots and did not make snapshots of.
    pub fn unfinished_of(&self, node: NodeId) -> Vec<(VdiId, Unfinished)> {
        let t = self.tables.read();
        t.unfinished.iter().filter(|(_, made)| made.by == node).map(|(vid, made)| (*vid, *made)).collect()
    }

    /// An announced snapshot was not finished. Whether its inode says that it is a snapshot all the same decides; an
    /// announcement that came since counts by itself. `false` = that happened.
    pub fn settle_unfinished(&self, vid: VdiId, which: u64, is_snapshot: bool) -> bool {
        let mut guard = self.tables.write();
        let t = &mut *guard;
        if t.unfinished.get(&vid).is_none_or(|now| now.which != which) {
            return false;
        }
        t.unfinished.remove(&vid);
        if let Some(entry) = t.entries.get_mut(&vid) {
            entry.snapshot = is_snapshot;
        }
        true
    }

    /// Whether the in-use bit is set.
    pub fn is_in_use(&self, vid: VdiId) -> bool {
        self.tables.read().in_use.get(vid.get() as usize)
    }

    /// Sets the in-use bit (NEW_VDI).
    pub fn set_in_use(&self, vid: VdiId) {
        self.change(Change::InUse(vid));
    }

    /// Sets the deleted bit and flag (DEL_VDI).
    pub fn set_deleted(&self, vid: VdiId) {
        self.change(Change::Deleted(vid));
    }

    /// ALTER_VDI_COPY.
    pub fn alter_copies(&self, vid: VdiId, copies: u8, block_size_shift: u8) {
        self.change(Change::Altered(vid, copies, block_size_shift));
    }

    /// Forgets a vid for good (-R).
    pub fn recycle(&self, vid: VdiId) {
        self.change(Change::Recycled(vid));
    }

    /// The family of `vid` (everything connected by parents) if every member is deleted (spec 05, section 12).
    pub fn dead_family(&self, vid: VdiId) -> Option<Vec<VdiId>> {
        let t = self.tables.read();
        let mut root = vid;
        let mut seen = BTreeSet::new();
        while let Some(entry) = t.entries.get(&root) {
            if !seen.insert(root) || entry.parent.is_none() || !t.entries.contains_key(&entry.parent) {
                break;
            }
            root = entry.parent;
        }
        let mut family = vec![root];
        let mut at = 0;
        while at < family.len() {
            let parent = family[at];
            let children = t.entries.iter().filter(|(v, e)| e.parent == parent && !family.contains(v));
            let children: Vec<VdiId> = children.map(|(v, _)| *v).collect();
            family.extend(children);
            at += 1;
        }
        family.iter().all(|v| t.entries.get(v).is_some_and(|e| e.deleted)).then_some(family)
    }

    /// When this node was told that `vid` became a snapshot, if it was.
    pub fn snapshot_since(&self, vid: VdiId) -> Option<Instant> {
        self.tables.read().entries.get(&vid).filter(|e| e.snapshot).and_then(|e| e.snapshot_since)
    }

    /// One entry.
    pub fn get(&self, vid: VdiId) -> Option<Entry> {
        self.tables.read().entries.get(&vid).cloned()
    }

    /// Runs `change` on a VDI's lock; `None` if the vid is unknown.
    pub fn with_lock<T>(&self, vid: VdiId, change: impl FnOnce(&mut Lock) -> T) -> Option<T> {
        self.tables.write().entries.get_mut(&vid).map(|e| change(&mut e.lock))
    }

    /// NEW_VDI made `new` the working VDI of a name whose working VDI was its parent here: the lock goes along.
    pub fn carry_lock_over(&self, new: VdiId) {
        let mut t = self.tables.write();
        let Some((parent, mut next)) = t.entries.get(&new).map(|e| (e.parent, e.lock.clone())) else {
            return;
        };
        let Some(old) = t.entries.get_mut(&parent) else { return };
        if old.lock.carry_over(&mut next) {
            t.moved_locks.insert(parent, new);
        }
        if let Some(entry) = t.entries.get_mut(&new) {
            entry.lock = next;
        }
    }

    /// RELEASE_VDI by `node`. A client that has not noticed a snapshot releases the vid that it locked: its lock is where the
    /// snapshot took it.
    pub fn release_lock(&self, vid: VdiId, node: NodeId, lock_type: u32) {
        let vid = if lock_type == TYPE_NORMAL { self.lock_of(vid, node) } else { vid };
        let mut t = self.tables.write();
        if let Some(entry) = t.entries.get_mut(&vid) {
            entry.lock.release(node, lock_type);
        }
        t.moved_locks.retain(|_, to| *to != vid);
    }

    /// The vid whose lock `node` has since it locked `vid`.
    pub fn lock_of(&self, vid: VdiId, node: NodeId) -> VdiId {
        let t = self.tables.read();
        let lock = |vid: &VdiId| t.entries.get(vid).map(|e| &e.lock);
        let mut at = vid;
        while lock(&at) == Some(&Lock::Unlocked)
            && let Some(next) = t.moved_locks.get(&at)
        {
            at = *next; // ends: each leads to a VDI made later
        }
        if lock(&at) == Some(&Lock::Locked(node)) { at } else { vid }
    }

    /// Runs `change` on every lock (a node left).
    pub fn for_each_lock(&self, mut change: impl FnMut(&mut Lock)) {
        self.tables.write().entries.values_mut().for_each(|e| change(&mut e.lock));
    }

    /// VDIs that are locked through `node` alone.
    pub fn locked_by(&self, node: NodeId) -> Vec<VdiId> {
        let t = self.tables.read();
        t.entries.iter().filter(|(_, e)| e.lock == Lock::Locked(node)).map(|(vid, _)| *vid).collect()
    }

    /// Every known vid, ascending.
    pub fn vids(&self) -> Vec<VdiId> {
        self.tables.read().entries.keys().copied().collect()
    }

    /// Every vid that is used or announced, and its parent as far as this table knows.
    pub fn parents(&self) -> BTreeMap<VdiId, VdiId> {
        self.census().into_iter().map(|(vid, (parent, _))| (vid, parent)).collect()
    }

    /// Every vid whose VDI was deleted.
    pub fn deleted_vids(&self) -> BTreeSet<VdiId> {
        let t = self.tables.read();
        t.entries.iter().filter(|(_, e)| e.deleted).map(|(vid, _)| *vid).collect()
    }

    /// Of every vid that is used or announced, at one moment: its parent, as far as this table knows, and whether its VDI was
    /// deleted.
    pub fn census(&self) -> BTreeMap<VdiId, (VdiId, bool)> {
        let t = self.tables.read();
        let used = t.in_use.iter().map(|v| (VdiId::new(v as u32), (VdiId::NONE, false)));
        let mut all: BTreeMap<VdiId, (VdiId, bool)> = used.collect();
        all.extend(t.entries.iter().map(|(vid, entry)| (*vid, (entry.parent, entry.deleted))));
        all
    }

    /// How the objects of `vid` are stored, with defaults from the cluster for an unknown one.
    pub fn redundancy(&self, vid: VdiId, view: &crate::view::View) -> Redundancy {
        let t = self.tables.read();
        match t.entries.get(&vid) {
            Some(e) => Redundancy {
                copies: e.nr_copies,
                policy: CopyPolicy::from_byte(e.copy_policy).unwrap_or_default(),
                block_size_shift: e.block_size_shift,
                snapshot: e.snapshot,
                known: true,
            },
            None => Redundancy {
                copies: view.nr_copies,
                policy: CopyPolicy::from_byte(view.copy_policy).unwrap_or_default(),
                block_size_shift: view.block_size_shift,
                snapshot: false,
                known: false,
            },
        }
    }

    /// Largest block size of any VDI, as a power of two.
    pub fn max_block_shift(&self) -> u8 {
        self.max_shift.load(Ordering::Relaxed)
    }

    /// The bitmap of READ_VDIS.
    pub fn in_use_bitmap(&self) -> Vec<u8> {
        self.tables.read().in_use.0.to_vec()
    }

    /// The bitmap of READ_DEL_VDIS.
    pub fn deleted_bitmap(&self) -> Vec<u8> {
        self.tables.read().deleted.0.to_vec()
    }

    /// Most data strips of any VDI: stale objects are kept while there are fewer zones (spec 06, 10.8).
    pub fn max_data_strips(&self) -> usize {
        let t = self.tables.read();
        let strips = |e: &Entry| CopyPolicy::from_byte(e.copy_policy).map_or(1, |p| p.data_strips());
        t.entries.values().map(strips).max().unwrap_or(1).into()
    }

    /// The records of GET_VDI_COPIES, ascending.
    pub fn records(&self) -> Vec<VdiState> {
        let t = self.tables.read();
        let record = |(vid, entry): (&VdiId, &Entry)| VdiState {
            announced_only: (!t.in_use.get(vid.get() as usize)).into(),
            ..entry.record(*vid)
        };
        t.entries.iter().map(record).collect()
    }

    /// Keeps a copy of the table for a node that joins at `epoch` + 1.
    pub fn take_checkpoint(&self, epoch: Epoch) {
        let records = self.records();
        let mut checkpoints = self.checkpoints.lock();
        checkpoints.entry(epoch).or_insert(records);
        while checkpoints.len() > MAX_CHECKPOINTS {
            checkpoints.pop_first();
        }
    }

    /// Forgets a checkpoint, if there is one.
    pub fn free_checkpoint(&self, epoch: Epoch) {
        self.checkpoints.lock().remove(&epoch);
    }

    /// A VDI's record in a checkpoint.
    pub fn checkpoint_record(&self, epoch: Epoch, vid: VdiId) -> Result<VdiState, ResultCode> {
        let checkpoints = self.checkpoints.lock();
        let records = checkpoints.get(&epoch).ok_or(ResultCode::AGAIN)?;
        let record = records.iter().find(|r| r.vid == vid).ok_or(ResultCode::NO_CHECKPOINT_ENTRY)?;
        Ok(VdiState { parent_vid: VdiId::NONE, ..*record })
    }

    /// Whether lock states are still being learned.
    pub fn is_collecting(&self) -> bool {
        self.collecting.load(Ordering::Acquire)
    }

    /// Says whether lock states are still being learned.
    pub fn set_collecting(&self, collecting: bool) {
        self.collecting.store(collecting, Ordering::Release);
    }

    /// Probe range of a name (spec 05, section 2).
    pub fn probe(&self, name_hash: u32) -> ProbeRange {
        let t = self.tables.read();
        let left = (name_hash as usize).max(1);
        let right = t.in_use.next_zero(left);
        let known = |v: &usize| t.in_use.get(*v) || t.deleted.get(*v);
        let vid = |v: usize| VdiId::new(v as u32);
        if right < NR_VDIS {
            let candidates = (left..right).rev().filter(known).map(vid).collect();
            return ProbeRange { candidates, free: Some(vid(right)) };
        }
        let wrapped = t.in_use.next_zero(1);
        let low = (1..wrapped.min(left)).rev();
        let high = (left..NR_VDIS).rev();
        let free = (wrapped < NR_VDIS).then(|| vid(wrapped));
        ProbeRange { candidates: low.chain(high).filter(known).map(vid).collect(), free }
    }

    /// Probe range under -R: every id, highest first; the lowest free id.
    pub fn probe_recycled(&self) -> ProbeRange {
        let t = self.tables.read();
        let mut all: Vec<usize> = t.in_use.iter().chain(t.deleted.iter()).collect();
        all.sort_unstable();
        all.dedup();
        let free = t.in_use.next_zero(1);
        ProbeRange {
            candidates: all.into_iter().rev().map(|v| VdiId::new(v as u32)).collect(),
            free: (free < NR_VDIS).then(|| VdiId::new(free as u32)),
        }
    }
}

/// Whether objects can be placed and sized by these values.
pub fn is_valid(copies: u8, policy: u8, shift: u8) -> bool {
    (1..=MAX_COPIES).contains(&usize::from(copies))
        && CopyPolicy::from_byte(policy).is_ok()
        && (MIN_BLOCK_SHIFT..=MAX_BLOCK_SHIFT).contains(&shift)
}

#[derive(PartialEq)]
enum Merge {
    /// What is known here wins; flags only rise.
    Known,
    /// The other node's copies, policy and block size win; flags only rise.
    Theirs,
}

impl Tables {
    fn apply(&mut self, change: Change) {
        match change {
            Change::Announced(node, old, new, redundancy, set_bitmap) => {
                self.announce(node, old, new, redundancy, set_bitmap);
            }
            Change::Finished(node) => self.unfinished.retain(|_, made| made.by != node),
            Change::InUse(vid) => self.in_use.set(vid.get() as usize, true),
            Change::Deleted(vid) => {
                self.deleted.set(vid.get() as usize, true);
                if let Some(entry) = self.entries.get_mut(&vid) {
                    entry.deleted = true;
                }
            }
            Change::Altered(vid, copies, block_size_shift) => {
                if let Some(entry) = self.entries.get_mut(&vid) {
                    entry.nr_copies = copies;
                    entry.block_size_shift = block_size_shift;
                }
            }
            Change::Recycled(vid) => {
                self.in_use.set(vid.get() as usize, false);
                self.deleted.set(vid.get() as usize, false);
                self.entries.remove(&vid);
                self.moved_locks.retain(|from, to| *from != vid && *to != vid);
                self.unfinished.remove(&vid);
            }
            Change::Cleared => {
                let told = self.told.take();
                *self = Tables { told, ..VdiTable::default().tables.into_inner() };
            }
        }
    }

    fn announce(&mut self, node: NodeId, old: VdiId, new: VdiId, redundancy: Redundancy, set_bitmap: bool) {
        self.announcements += 1;
        if let Some(entry) = self.entries.get_mut(&old) {
            // A second announcement of one that is not finished leaves nothing to take back for the first.
            let first = !std::mem::replace(&mut entry.snapshot, true);
            if first {
                entry.snapshot_since = Some(Instant::now());
            }
            if set_bitmap {
                self.unfinished.remove(&old); // somebody found the new one, see `vdi/unfinished.rs`
            } else if first || self.unfinished.contains_key(&old) {
                self.unfinished.insert(old, Unfinished { by: node, which: self.announcements, child: new });
            }
        }
        if new.is_none() {
            return;
        }
        if set_bitmap {
            self.in_use.set(new.get() as usize, true);
        }
        let lock = self.entries.get(&new).map_or(Lock::Unlocked, |e| e.lock.clone());
        self.entries.insert(
            new,
            Entry {
                nr_copies: redundancy.copies,
                copy_policy: redundancy.policy.to_byte(),
                block_size_shift: redundancy.block_size_shift,
                snapshot: false,
                snapshot_since: None,
                deleted: false,
                parent: old,
                lock,
            },
        );
    }

    fn merge(&mut self, vid: VdiId, new: Entry, rule: Merge) {
        let Some(old) = self.entries.get_mut(&vid) else {
            self.entries.insert(vid, new);
            return;
        };
        old.snapshot |= new.snapshot;
        old.deleted |= new.deleted;
        if rule == Merge::Theirs {
            old.nr_copies = new.nr_copies;
            old.copy_policy = new.copy_policy;
            old.block_size_shift = new.block_size_shift;
            if !new.parent.is_none() {
                old.parent = new.parent;
            }
        }
    }
}

impl Entry {
    fn record(&self, vid: VdiId) -> VdiState {
        let mut record = VdiState {
            vid,
            nr_copies: self.nr_copies,
            snapshot: self.snapshot.into(),
            deleted: self.deleted.into(),
            copy_policy: self.copy_policy,
            block_size_shift: self.block_size_shift,
            parent_vid: self.parent,
            lock_state: vdi_state::UNLOCKED,
            ..VdiState::zeroed()
        };
        self.lock.write_to(&mut record);
        record
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rep(copies: u8) -> Redundancy {
        Redundancy {
            copies,
            policy: CopyPolicy::REPLICATED,
            block_size_shift: 22,
            snapshot: false,
            known: true,
        }
    }

    fn vid(v: u32) -> VdiId {
        VdiId::new(v)
    }

    #[test]
    fn probing_walks_down_and_wraps() {
        let table = VdiTable::default();
        assert_eq!(table.probe(5), ProbeRange { candidates: vec![], free: Some(vid(5)) });
        assert_eq!(table.probe(0).free, Some(vid(1)), "vid 0 is never used");
        for v in [5, 6, 7] {
            table.set_in_use(vid(v));
        }
        let range = table.probe(5);
        assert_eq!(range, ProbeRange { candidates: vec![vid(7), vid(6), vid(5)], free: Some(vid(8)) });
        table.set_in_use(vid(0xff_ffff));
        table.set_in_use(vid(1));
        let range = table.probe(0xff_ffff);
        assert_eq!(range, ProbeRange { candidates: vec![vid(1), vid(0xff_ffff)], free: Some(vid(2)) });
    }

    /// FULL_VDI: no id is left, wherever probing begins; one that is given back is found from everywhere.
    #[test]
    fn probing_a_full_table_finds_no_id() {
        let table = VdiTable::default();
        (1..NR_VDIS as u32).for_each(|v| table.set_in_use(vid(v)));
        for name_hash in [0, 1, 5, 0xff_ffff] {
            let range = table.probe(name_hash);
            assert_eq!((range.free, range.candidates.len()), (None, NR_VDIS - 1), "{name_hash:x}");
        }
        assert_eq!(table.probe_recycled().free, None);
        table.recycle(vid(7));
        for name_hash in [0, 1, 7, 8, 0xff_ffff] {
            assert_eq!(table.probe(name_hash).free, Some(vid(7)), "{name_hash:x}");
        }
        assert_eq!(table.probe_recycled().free, Some(vid(7)));
    }

    #[test]
    fn a_stale_record_never_clears_snapshot_or_deleted() {
        let table = VdiTable::default();
        table.announce(NodeId::zeroed(), VdiId::NONE, vid(5), rep(3), true);
        let stale = table.records()[0];
        table.announce(NodeId::zeroed(), vid(5), vid(6), rep(3), true);
        table.set_deleted(vid(6));
        for from_joiner in [true, false] {
            table.add_record(&stale, from_joiner);
            table.add_record(&VdiState { vid: vid(6), ..stale }, from_joiner);
        }
        assert!(table.get(vid(5)).is_some_and(|e| e.snapshot));
        assert!(table.get(vid(6)).is_some_and(|e| e.deleted));
    }

    #[test]
    fn what_was_told_while_tables_are_on_their_way_counts_more_than_they_do() {
        let (member, joiner) = (VdiTable::default(), VdiTable::default());
        for v in [1, 2, 3, 4] {
            member.announce(NodeId::zeroed(), VdiId::NONE, vid(v), rep(3), true);
        }
        joiner.expect_records();
        let before = member.records();
        for table in [&member, &joiner] {
            table.announce(NodeId::zeroed(), vid(1), vid(5), rep(2), false);
            table.finish(NodeId::zeroed());
            table.set_in_use(vid(5));
            table.set_deleted(vid(2));
            table.alter_copies(vid(3), 1, 22);
            table.recycle(vid(4));
        }
        before.iter().for_each(|record| joiner.add_record(record, false));
        joiner.records_arrived();
        assert_eq!(joiner.records(), member.records());
        assert_eq!(joiner.in_use_bitmap(), member.in_use_bitmap());
        assert_eq!(joiner.deleted_bitmap(), member.deleted_bitmap());
        assert_eq!(joiner.unfinished_of(NodeId::zeroed()), []);
        // A format leaves nothing of what was there before it.
        joiner.expect_records();
        joiner.clear();
        joiner.set_in_use(vid(9));
        before.iter().for_each(|record| joiner.add_record(record, false));
        joiner.records_arrived();
        assert_eq!((joiner.vids(), joiner.probe(1).free), (vec![], Some(vid(1))));
        assert_eq!(joiner.probe(9).free, Some(vid(10)));
    }

    #[test]
    fn announcing_keeps_the_old_vids_policy() {
        let table = VdiTable::default();
        let coded = Redundancy { policy: CopyPolicy::erasure(4, 2).expect("valid"), copies: 6, ..rep(6) };
        table.announce(NodeId::zeroed(), VdiId::NONE, vid(5), coded, true);
        table.announce(NodeId::zeroed(), vid(5), vid(9), rep(3), true);
        assert_eq!(table.get(vid(5)).map(|e| e.copy_policy), Some(0x22));
    }

    #[test]
    fn a_family_is_dead_only_when_all_its_members_are() {
        let table = VdiTable::default();
        table.announce(NodeId::zeroed(), VdiId::NONE, vid(1), rep(3), true);
        table.announce(NodeId::zeroed(), vid(1), vid(2), rep(3), true);
        table.announce(NodeId::zeroed(), vid(1), vid(3), rep(3), true);
        table.set_deleted(vid(1));
        table.set_deleted(vid(2));
        assert_eq!(table.dead_family(vid(2)), None);
        table.set_deleted(vid(3));
        assert_eq!(table.dead_family(vid(2)), Some(vec![vid(1), vid(2), vid(3)]));
    }

    #[test]
    fn a_joiner_is_told_which_vids_are_only_announced() {
        let (table, joiner) = (VdiTable::default(), VdiTable::default());
        for v in [4, 5] {
            table.announce(NodeId::zeroed(), VdiId::NONE, vid(v), rep(3), false);
        }
        table.set_in_use(vid(4));
        table.records().iter().for_each(|record| joiner.add_record(record, false));
        assert_eq!(joiner.vids(), [vid(4), vid(5)]);
        assert_eq!(joiner.probe(4), table.probe(4));
        assert_eq!(joiner.probe(4).free, Some(vid(5)));
    }
}
