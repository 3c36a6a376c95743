//! [`Sheep`]: what all parts of a running daemon share.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use sheepdog_proto::{NodeId, Oid, VdiId};
use sheepdog_store::{MetaDir, Replica, Store};
use tokio::sync::{Notify, watch};

use crate::cluster::ClusterHandle;
use crate::disks::Disks;
use crate::gate::Gate;
use crate::gateway::Gateway;
use crate::gateway::object::is_coded;
use crate::history::History;
use crate::holds::Holds;
use crate::intents::Intents;
use crate::peers::Peers;
use crate::recovery::Recovery;
use crate::recovery::early::EarlyWrites;
use crate::recovery::tombstones::Tombstones;
use crate::stats::Stats;
use crate::vdi::holders::Holders;
use crate::vdi::table::{Redundancy, VdiTable};
use crate::view::{View, Views};

/// A running daemon. Owned by nobody in particular: every task holds an `Arc`.
pub struct Sheep {
    /// This node's identity.
    pub me: NodeId,
    /// The current view of the cluster.
    pub views: Views,
    /// Fences replica writes by epoch.
    pub gate: Gate,
    /// Objects; `None` on a gateway.
    pub store: Option<Store>,
    /// Configuration and epoch logs.
    pub meta: Arc<MetaDir>,
    /// What is known of every VDI.
    pub vdis: VdiTable,
    /// Connections to other sheep.
    pub peers: Peers,
    /// State of object requests in progress here.
    pub gateway: Gateway,
    /// Asks the cluster task for cluster operations.
    pub cluster: ClusterHandle,
    /// The recovery task.
    pub recovery: Recovery,
    /// Objects whose replica here must not change right now.
    pub holds: Holds,
    /// Writes that may be on some homes only.
    pub intents: Intents,
    /// Since when this store knows what it had.
    pub history: Arc<History>,
    /// Writes of parts of objects that are still to be recovered here.
    pub early: EarlyWrites,
    /// Objects removed here.
    pub tombstones: Tombstones,
    /// The changing of this node's disks.
    pub disks: Disks,
    /// Whether the VDI tables of the others have arrived since this node joined.
    pub tables: watch::Sender<bool>,
    /// Clients that hold locks taken through this node.
    pub holders: Holders,
    /// How long a node, or a client that cannot be watched, may be gone before VDIs that it locked are released; `None` = for
    /// ever.
    pub lock_grace: Option<Duration>,
    /// Counters.
    pub stats: Stats,
    /// Requests in progress, and how to learn that there are none.
    pub outstanding: Outstanding,
}

/// Counts client requests in progress; the daemon ends when it is told to and there are none (spec 04, 17.6).
#[derive(Default)]
pub struct Outstanding {
    count: AtomicUsize,
    none: Notify,
}

/// One request in progress.
pub struct InProgress(Arc<Sheep>);

impl Drop for InProgress {
    fn drop(&mut self) {
        if self.0.outstanding.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.outstanding.none.notify_waiters();
        }
    }
}

impl Outstanding {
    /// Waits until no request is in progress.
    pub async fn none(&self) {
        loop {
            let woken = self.none.notified();
            if self.count.load(Ordering::Acquire) == 0 {
                return;
            }
            woken.await;
        }
    }
}

impl Sheep {
    /// Counts a request as in progress until the value is dropped.
    pub fn begin(self: &Arc<Self>) -> InProgress {
        self.outstanding.count.fetch_add(1, Ordering::AcqRel);
        InProgress(self.clone())
    }

    /// Whether the VDI tables of the others have arrived.
    pub fn tables_are_here(&self) -> bool {
        *self.tables.borrow()
    }

    /// Waits until the VDI tables of the others have arrived: before that, copies, sizes and snapshots may be unknown.
    pub async fn tables_arrived(&self) {
        if !self.tables_are_here() {
            // The sender lives in self.
            let _ = self.tables.subscribe().wait_for(|arrived| *arrived).await;
        }
    }

    /// How the objects of a VDI are stored.
    pub fn redundancy(&self, vid: VdiId, view: &View) -> Redundancy {
        self.vdis.redundancy(vid, view)
    }

    /// Copies and block size that placement and the store use for `oid`.
    pub fn copies_of(&self, oid: Oid, view: &View) -> u8 {
        self.redundancy(oid.vid(), view).copies
    }

    /// Bytes of a whole replica of `oid`.
    pub fn size_of(&self, oid: Oid, view: &View) -> u64 {
        oid.size(self.redundancy(oid.vid(), view).block_size_shift)
    }

    /// Whether this node is at home for `oid` in `view`.
    pub fn is_home(&self, oid: Oid, view: &View) -> bool {
        self.store.is_some() && view.my_position(oid, self.copies_of(oid, view)).is_some()
    }

    /// The file that a peer request names, and its size in bytes: the object, or the strip of an erasure-coded one.
    pub fn named_replica(&self, oid: Oid, ec_index: u8, view: &View) -> (Replica, u64) {
        let redundancy = self.redundancy(oid.vid(), view);
        if !is_coded(oid, &redundancy) {
            return (Sheep::replica(oid), oid.size(redundancy.block_size_shift));
        }
        let block = 1u64 << redundancy.block_size_shift.min(sheepdog_proto::MAX_BLOCK_SHIFT);
        let size = block / u64::from(redundancy.policy.data_strips());
        (Replica { oid, strip: Some(ec_index) }, size)
    }

    /// The file that this node should have of `oid`; `None` = it is not at home here.
    pub fn my_replica(&self, oid: Oid, view: &View) -> Option<(Replica, u64)> {
        let position = view.my_position(oid, self.copies_of(oid, view))?;
        Some(self.named_replica(oid, u8::try_from(position).ok()?, view))
    }

    /// The store's name for a replicated object.
    pub fn replica(oid: Oid) -> Replica {
        Replica { oid, strip: None }
    }
}
