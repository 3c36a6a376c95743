//! Locks of a VDI: pure transitions, executed on every node in event order (spec 05, sections 16 and 17).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sheepdog_proto::header::VdiRequest;
use sheepdog_proto::vdi_state::{self, VdiState};
use sheepdog_proto::{Flags, MAX_COPIES, NodeId, Opcode, Request, ResultCode, Wire};

use crate::sheep::Sheep;

/// `type` of LOCK_VDI and RELEASE_VDI: one owner.
pub const TYPE_NORMAL: u32 = 0;
/// `type` of LOCK_VDI and RELEASE_VDI: iSCSI multipath.
pub const TYPE_SHARED: u32 = 1;

/// State of a participant in a shared lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Participation {
    /// Its clients changed the table last.
    Modified,
    /// Its cached inode is current.
    Shared,
    /// It must read the inode again.
    Invalidated,
}

/// Who holds a VDI.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Lock {
    /// Nobody.
    #[default]
    Unlocked,
    /// One node.
    Locked(NodeId),
    /// Up to 31 nodes, in the order they came.
    Shared(Vec<(NodeId, Participation)>),
}

impl Lock {
    /// LOCK_VDI of `lock_type` by `node`.
    pub fn acquire(&mut self, node: NodeId, lock_type: u32) -> ResultCode {
        match (&mut *self, lock_type) {
            (Lock::Unlocked, TYPE_NORMAL) => *self = Lock::Locked(node),
            (Lock::Unlocked, TYPE_SHARED) => *self = Lock::Shared(vec![(node, Participation::Modified)]),
            (Lock::Shared(list), TYPE_SHARED)
                if list.len() < MAX_COPIES && list.iter().all(|(n, _)| *n != node) =>
            {
                let modified = list.iter().any(|(_, p)| *p == Participation::Modified);
                let state = if modified { Participation::Invalidated } else { Participation::Shared };
                list.push((node, state));
            }
            _ => return ResultCode::VDI_LOCKED,
        }
        ResultCode::SUCCESS
    }

    /// RELEASE_VDI of `lock_type` by `node`; never fails.
    pub fn release(&mut self, node: NodeId, lock_type: u32) {
        match (&*self, lock_type) {
            (Lock::Locked(_), TYPE_NORMAL) => *self = Lock::Unlocked,
            (Lock::Shared(_), TYPE_SHARED) => self.drop_participant(node),
            _ => {}
        }
    }

    /// Releases a normal lock if it is that of `owner`.
    pub fn release_of(&mut self, owner: NodeId) {
        if *self == Lock::Locked(owner) {
            *self = Lock::Unlocked;
        }
    }

    /// The VDI became a snapshot and its name goes on as `next`: whoever had it alone still has. Those that share a VDI
    /// lock the new one themselves (spec 01, 17.2). `true` = the lock moved.
    pub fn carry_over(&mut self, next: &mut Lock) -> bool {
        if let (Lock::Locked(owner), Lock::Unlocked) = (&*self, &*next) {
            *next = Lock::Locked(*owner);
            *self = Lock::Unlocked;
            return true;
        }
        false
    }

    /// `node` left the cluster: it no longer takes part; a normal lock stays.
    pub fn drop_participant(&mut self, node: NodeId) {
        if let Lock::Shared(list) = self {
            list.retain(|(n, _)| *n != node);
            if list.is_empty() {
                *self = Lock::Unlocked;
            }
        }
    }

    /// INODE_COHERENCE by `node`.
    pub fn cohere(&mut self, node: NodeId, validate: bool) -> ResultCode {
        let Lock::Shared(list) = self else { return ResultCode::NO_VDI };
        let takes_part = list.iter().any(|(n, _)| *n == node);
        for (n, state) in list.iter_mut() {
            *state = match (validate, *n == node, *state) {
                (true, false, Participation::Invalidated) => Participation::Invalidated,
                (true, _, _) => Participation::Shared,
                (false, true, _) => Participation::Modified,
                (false, false, _) => Participation::Invalidated,
            };
        }
        if takes_part || validate { ResultCode::SUCCESS } else { ResultCode::NO_VDI }
    }

    /// Whether several nodes may hold it at once.
    pub fn is_shared(&self) -> bool {
        matches!(self, Lock::Shared(_))
    }

    /// Who shares the VDI.
    pub fn participants(&self) -> Vec<NodeId> {
        match self {
            Lock::Shared(list) => list.iter().map(|(node, _)| *node).collect(),
            _ => Vec::new(),
        }
    }

    /// The state of `node` in a shared lock.
    pub fn participation(&self, node: NodeId) -> Option<Participation> {
        match self {
            Lock::Shared(list) => list.iter().find(|(n, _)| *n == node).map(|(_, p)| *p),
            _ => None,
        }
    }

    /// Fills the lock fields of a record.
    pub fn write_to(&self, record: &mut VdiState) {
        match self {
            Lock::Unlocked => record.lock_state = vdi_state::UNLOCKED,
            Lock::Locked(owner) => {
                record.lock_state = vdi_state::LOCKED;
                record.lock_owner = *owner;
            }
            Lock::Shared(list) => {
                record.lock_state = vdi_state::SHARED;
                record.nr_participants = list.len() as u32;
                for (i, (node, state)) in list.iter().take(MAX_COPIES).enumerate() {
                    record.participants[i] = *node;
                    record.participants_state[i] = match state {
                        Participation::Modified => vdi_state::PART_MODIFIED,
                        Participation::Shared => vdi_state::PART_SHARED,
                        Participation::Invalidated => vdi_state::PART_INVALIDATED,
                    };
                }
            }
        }
    }

    /// The lock that a record describes; nonsense counts as unlocked.
    pub fn from_record(record: &VdiState) -> Lock {
        match record.lock_state {
            vdi_state::LOCKED => Lock::Locked(record.lock_owner),
            vdi_state::SHARED => {
                let count = (record.nr_participants as usize).min(MAX_COPIES);
                let state = |s: u32| match s {
                    vdi_state::PART_MODIFIED => Participation::Modified,
                    vdi_state::PART_SHARED => Participation::Shared,
                    _ => Participation::Invalidated,
                };
                let list = (0..count).map(|i| (record.participants[i], state(record.participants_state[i])));
                Lock::Shared(list.collect())
            }
            _ => Lock::Unlocked,
        }
    }
}

/// Releases what was locked through `node` if it is still gone after the grace (spec 05, section 16). All nodes with the
/// option do; the request names the owner, so that nobody loses a lock taken meanwhile.
pub async fn release_of_lost(sheep: Arc<Sheep>, node: NodeId, grace: Duration) {
    tokio::time::sleep(grace).await;
    for vid in sheep.vdis.locked_by(node) {
        if sheep.views.load().is_member(&node) {
            return tracing::info!("{node} is back within the grace and keeps its locks");
        }
        let body = VdiRequest { base_vdi_id: vid, lock_type: TYPE_NORMAL, ..VdiRequest::zeroed() };
        let owner = Bytes::from(node.encode());
        let request = Request::new(Opcode::RELEASE_VDI).flag(Flags::WRITE).length(owner.len()).with_vdi(body);
        match sheep.cluster.submit_internal(request, owner).await.response.result {
            ResultCode::SUCCESS => {
                tracing::warn!("released the lock of {vid:?}: {node} is gone for {} s", grace.as_secs());
            }
            code => tracing::error!("cannot release the lock of {vid:?}: {code}"),
        }
    }
}

const _: () = assert!(VdiState::LEN == 1428 && <NodeId as Wire>::SIZE == 40);

#[cfg(test)]
mod tests {
    use super::Participation::*;
    use super::*;

    fn node(port: u16) -> NodeId {
        NodeId::new([127, 0, 0, 1].into(), port)
    }

    #[test]
    fn a_normal_lock_has_one_owner_and_anybody_releases_it() {
        let mut lock = Lock::default();
        assert_eq!(lock.acquire(node(1), TYPE_NORMAL), ResultCode::SUCCESS);
        for (n, t) in [(1, TYPE_NORMAL), (2, TYPE_NORMAL), (2, TYPE_SHARED), (2, 7)] {
            assert_eq!(lock.acquire(node(n), t), ResultCode::VDI_LOCKED);
        }
        lock.release(node(2), TYPE_SHARED);
        lock.drop_participant(node(1));
        assert_eq!(lock, Lock::Locked(node(1)), "a normal lock outlives its node");
        lock.release(node(2), TYPE_NORMAL);
        assert_eq!(lock, Lock::Unlocked);
    }

    #[test]
    fn shared_locks_follow_the_coherence_protocol() {
        let mut lock = Lock::default();
        assert_eq!(lock.cohere(node(1), true), ResultCode::NO_VDI);
        lock.acquire(node(1), TYPE_SHARED);
        lock.acquire(node(2), TYPE_SHARED);
        assert_eq!(lock, Lock::Shared(vec![(node(1), Modified), (node(2), Invalidated)]));
        lock.cohere(node(2), true);
        assert_eq!(lock, Lock::Shared(vec![(node(1), Shared), (node(2), Shared)]));
        lock.cohere(node(2), false);
        assert_eq!(lock, Lock::Shared(vec![(node(1), Invalidated), (node(2), Modified)]));
        assert_eq!(lock.cohere(node(3), false), ResultCode::NO_VDI);
        assert_eq!(lock.participation(node(2)), Some(Invalidated));
        lock.release(node(1), TYPE_SHARED);
        lock.release(node(2), TYPE_SHARED);
        assert_eq!(lock, Lock::Unlocked);
    }

    #[test]
    fn a_normal_lock_goes_with_the_working_vdi_and_a_shared_one_stays() {
        let (mut old, mut new) = (Lock::Locked(node(1)), Lock::Unlocked);
        old.carry_over(&mut new);
        assert_eq!((&old, &new), (&Lock::Unlocked, &Lock::Locked(node(1))));
        let taken = Lock::Locked(node(2));
        let mut other = taken.clone();
        new.carry_over(&mut other);
        assert_eq!((new, other), (Lock::Locked(node(1)), taken), "what is locked stays so");
        let (mut shared, mut next) = (Lock::Shared(vec![(node(1), Modified)]), Lock::Unlocked);
        shared.carry_over(&mut next);
        assert_eq!(next, Lock::Unlocked);
    }

    #[test]
    fn records_carry_locks() {
        let mut lock = Lock::default();
        for port in 1..=3 {
            lock.acquire(node(port), TYPE_SHARED);
        }
        let mut record = VdiState::zeroed();
        lock.write_to(&mut record);
        assert_eq!(Lock::from_record(&record), lock);
    }
}
