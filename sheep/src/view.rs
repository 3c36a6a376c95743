//! The placement snapshot: what every request needs to know about the cluster, immutable and shared.
//!
//! The cluster task publishes a new [`View`] for each event that matters; requests take the current one and keep it
//! for one attempt (spec 06, 3.2). Nothing else of the cluster's state is read outside the cluster task.

use std::sync::Arc;

use arc_swap::ArcSwap;
use sheepdog_placement::{Homes, Ring};
use sheepdog_proto::{ClusterFlags, ClusterInfo, ClusterStatus, Epoch, NodeId, NodeRecord, Oid};
use tokio::sync::watch;

/// One state of the cluster as requests see it.
#[derive(Debug)]
pub struct View {
    /// Version of the member list; 0 = never formatted.
    pub epoch: Epoch,
    /// Whether the cluster serves.
    pub status: ClusterStatus,
    /// Creation time; 0 = not formatted.
    pub ctime: u64,
    /// Cluster flags.
    pub flags: ClusterFlags,
    /// Default copies.
    pub nr_copies: u8,
    /// Default policy byte.
    pub copy_policy: u8,
    /// Default block size.
    pub block_size_shift: u8,
    /// How often copies of a VDI were altered in this epoch: homes changed without a new one.
    pub alters: u32,
    /// Recovery is disabled.
    pub disable_recovery: bool,
    /// This node.
    pub me: NodeId,
    /// Present members with their effective weights, and the ring over them.
    pub ring: Ring,
    /// Whether this node has a member list at all (joined).
    pub joined: bool,
    /// The same as CLUSTER_INFO carries it, with the members at `epoch`.
    pub info: ClusterInfo,
}

impl View {
    /// Present members in node order.
    pub fn members(&self) -> &[NodeRecord] {
        self.ring.nodes()
    }

    /// Present members other than `me`, in node order.
    pub fn others(&self, me: NodeId) -> impl Iterator<Item = NodeId> + Send + '_ {
        self.members().iter().map(|node| node.nid).filter(move |node| *node != me)
    }

    /// The nodes that store `oid` when it has `copies` copies, in ring order; fewer when there are fewer zones.
    pub fn homes(&self, oid: Oid, copies: u8) -> Homes {
        self.ring.homes(oid, usize::from(copies))
    }

    /// This node's position among the homes of `oid`.
    pub fn my_position(&self, oid: Oid, copies: u8) -> Option<usize> {
        let me = self.ring.index_of(&self.me)?;
        self.homes(oid, copies).position(me)
    }

    /// Whether `node` is a present member.
    pub fn is_member(&self, node: &NodeId) -> bool {
        self.members().binary_search_by(|n| n.nid.cmp(node)).is_ok()
    }
}

/// Publishes views.
pub struct Views {
    current: ArcSwap<View>,
    changed: watch::Sender<()>,
}

impl Views {
    /// Starts with `view`.
    pub fn new(view: View) -> Views {
        Views { current: ArcSwap::from_pointee(view), changed: watch::Sender::new(()) }
    }

    /// The current view.
    pub fn load(&self) -> Arc<View> {
        self.current.load_full()
    }

    /// The current epoch.
    pub fn epoch(&self) -> Epoch {
        self.current.load().epoch
    }

    /// Replaces the view and wakes everybody who waits for a change.
    pub fn publish(&self, view: View) {
        self.current.store(Arc::new(view));
        self.changed.send_replace(());
    }

    /// Waits for a view of which `wanted` holds.
    pub async fn until(&self, wanted: impl Fn(&View) -> bool) -> Arc<View> {
        loop {
            let view = self.load();
            if wanted(&view) {
                return view;
            }
            self.changed_from(&view).await;
        }
    }

    /// Waits until the current view is another than `seen`.
    pub async fn changed_from(&self, seen: &Arc<View>) -> Arc<View> {
        let mut changes = self.changed.subscribe();
        loop {
            let now = self.load();
            if !Arc::ptr_eq(&now, seen) {
                return now;
            }
            // The sender lives in self, so this cannot fail while we are borrowed.
            let _ = changes.changed().await;
        }
    }
}
