//! One object operation, brought to all replicas: ordering, and the one loop that tries again (spec 06, 3.6).
//!
//! Results that a retry can cure never reach the caller: the loop waits, with back-off and woken by every change of
//! the view, until the cluster can do it. It gives up only when this node ends.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sheepdog_erasure::Code;
use sheepdog_proto::header::ObjRequest;
use sheepdog_proto::{ClusterFlags, ClusterStatus, Epoch, Flags, Oid, Opcode, Request, ResultCode};

use super::Gateway;
use super::coded::code_of;
use super::replicas::{self, Failure};
use crate::order::{PendingTurn, Turn};
use crate::peer::check_range;
use crate::sheep::Sheep;
use crate::vdi::table::Redundancy;
use crate::view::View;

/// First and last pause between attempts.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(200));

/// Whether the object is cut into strips.
pub fn is_coded(oid: Oid, redundancy: &Redundancy) -> bool {
    redundancy.policy.is_erasure() && oid.follows_policy()
}

/// What stops a request before any replica is asked (spec 06, 3.5).
fn refusal(view: &View, redundancy: &Redundancy, write: bool) -> Option<ResultCode> {
    match view.status {
        ClusterStatus::Killed => return Some(ResultCode::KILLED),
        ClusterStatus::Shutdown => return Some(ResultCode::SHUTDOWN),
        ClusterStatus::Ok | ClusterStatus::Wait => {}
    }
    if view.status == ClusterStatus::Ok && view.ring.nr_zones() == 0 {
        return Some(ResultCode::HALT);
    }
    let strict = view.flags.contains(ClusterFlags::STRICT);
    (write && strict && view.ring.nr_zones() < usize::from(redundancy.copies)).then_some(ResultCode::HALT)
}

/// Runs `attempt` until it succeeds or fails for good.
pub(super) async fn retry<T, F, Fut>(
    sheep: &Arc<Sheep>,
    oid: Oid,
    write: bool,
    mut attempt: F,
) -> Result<T, ResultCode>
where
    F: FnMut(Arc<View>, Redundancy) -> Fut,
    Fut: Future<Output = Result<T, Failure>>,
{
    let mut pause = BACKOFF.0;
    let mut complained = false;
    loop {
        let view = sheep.views.load();
        let redundancy = sheep.redundancy(oid.vid(), &view);
        if let Some(code) = refusal(&view, &redundancy, write) {
            return Err(code);
        }
        let failure = match attempt(view.clone(), redundancy).await {
            Ok(value) => return Ok(value),
            Err(failure) => failure,
        };
        if failure.code == ResultCode::EIO && view.my_position(oid, redundancy.copies).is_some() {
            sheep.cluster.leave();
        } else if !failure.code.is_retriable() {
            return Err(failure.code);
        }
        if !complained {
            tracing::warn!("{oid}: {}, trying again", failure.code);
            complained = true;
        }
        let change = sheep.views.changed_from(&view);
        if failure.code == ResultCode::OLD_NODE_VER && view.epoch.is_before(failure.peer_epoch) {
            change.await;
            continue;
        }
        let _ = tokio::time::timeout(pause, change).await;
        pause = (pause * 2).min(BACKOFF.1);
    }
}

fn request_for(opcode: Opcode, oid: Oid, offset: u64, epoch: Epoch, copies: u8) -> Request {
    let body = ObjRequest { oid, offset: offset as u32, copies, ..ObjRequest::zeroed() };
    let request = Request::new(opcode).epoch(epoch).with_obj(body);
    if opcode == Opcode::READ_PEER || opcode == Opcode::REMOVE_PEER {
        request
    } else {
        request.flag(Flags::WRITE)
    }
}

impl Gateway {
    fn size_of(&self, sheep: &Arc<Sheep>, oid: Oid) -> u64 {
        sheep.size_of(oid, &sheep.views.load())
    }

    /// The erasure code of an object, if it is coded.
    fn code_for(&self, sheep: &Arc<Sheep>, oid: Oid) -> Result<Option<Code>, ResultCode> {
        let redundancy = sheep.redundancy(oid.vid(), &sheep.views.load());
        is_coded(oid, &redundancy).then(|| code_of(redundancy.policy)).transpose()
    }

    /// Reads `len` bytes at `offset`; bytes past the object's end are zeros.
    pub async fn read_object(
        &self,
        sheep: &Arc<Sheep>,
        oid: Oid,
        offset: u64,
        len: usize,
    ) -> Result<Bytes, ResultCode> {
        check_range(0, len as u64, self.size_of(sheep, oid))?;
        if let Some(code) = self.code_for(sheep, oid)? {
            return self.read_coded(sheep, oid, code, offset, len).await;
        }
        let _turn = self.order.turn(oid, offset..offset + len as u64, false).await;
        retry(sheep, oid, false, |view, kept| async move {
            let request = request_for(Opcode::READ_PEER, oid, offset, view.epoch, kept.copies).length(len);
            replicas::read(sheep, &view, request, kept.copies).await
        })
        .await
    }

    /// Overwrites a range of an existing object on all replicas.
    pub async fn write_object(
        &self,
        sheep: &Arc<Sheep>,
        oid: Oid,
        offset: u64,
        data: Bytes,
    ) -> Result<(), ResultCode> {
        check_range(offset, data.len() as u64, self.size_of(sheep, oid))?;
        if let Some(code) = self.code_for(sheep, oid)? {
            return self.write_coded(sheep, oid, code, offset, data).await;
        }
        {
            let _turn = self.order.turn(oid, offset..offset + data.len() as u64, true).await;
            let result = self.write_once(sheep, oid, offset, &data).await;
            if result != Err(ResultCode::STALE_OBJ) {
                return result;
            }
        }
        // A home lacks its replica: give it one while nobody writes, then write.
        let _turn = self.order.turn(oid, 0..u64::MAX, true).await;
        self.heal(sheep, oid).await?;
        let result = self.write_once(sheep, oid, offset, &data).await;
        if result == Err(ResultCode::STALE_OBJ) { Err(ResultCode::NO_OBJ) } else { result }
    }

    /// `STALE_OBJ` = some homes have the object and some do not.
    async fn write_once(
        &self,
        sheep: &Arc<Sheep>,
        oid: Oid,
        offset: u64,
        data: &Bytes,
    ) -> Result<(), ResultCode> {
        retry(sheep, oid, true, |view, kept| async move {
            let request = request_for(Opcode::WRITE_PEER, oid, offset, view.epoch, kept.copies);
            replicas::write(sheep, &view, request, data.clone(), kept.copies).await
        })
        .await
    }

    async fn heal(&self, sheep: &Arc<Sheep>, oid: Oid) -> Result<(), ResultCode> {
        tracing::warn!("{oid}: not all homes have it, repairing");
        let len = self.size_of(sheep, oid) as usize;
        retry(sheep, oid, true, |view, kept| async move {
            let read = request_for(Opcode::READ_PEER, oid, 0, view.epoch, kept.copies).length(len);
            let create = request_for(Opcode::CREATE_AND_WRITE_PEER, oid, 0, view.epoch, kept.copies);
            replicas::heal(sheep, &view, read, create, kept.copies).await
        })
        .await
    }

    /// Creates or replaces an object on all replicas: zeros but for `data` at `offset`.
    pub async fn create_object(
        &self,
        sheep: &Arc<Sheep>,
        oid: Oid,
        offset: u64,
        data: Bytes,
    ) -> Result<(), ResultCode> {
        check_range(offset, data.len() as u64, self.size_of(sheep, oid))?;
        if let Some(code) = self.code_for(sheep, oid)? {
            return self.create_coded(sheep, oid, code, offset, data).await;
        }
        let _turn = self.order.turn(oid, 0..u64::MAX, true).await;
        retry(sheep, oid, true, |view, kept| {
            let data = data.clone();
            async move {
                let request =
                    request_for(Opcode::CREATE_AND_WRITE_PEER, oid, offset, view.epoch, kept.copies);
                replicas::fan_out(sheep, &view, request, data, kept.copies).await
            }
        })
        .await
    }

    /// Removes an object from all replicas; `NO_OBJ` if one of them did not have it.
    pub async fn remove_object(&self, sheep: &Arc<Sheep>, oid: Oid) -> Result<(), ResultCode> {
        let turn = self.order.turn(oid, 0..u64::MAX, true).await;
        self.remove_in_turn(sheep, oid, turn).await
    }

    /// The place of a removal among the requests to `oid`: those that come later wait for it.
    pub fn removal_turn(&self, oid: Oid) -> PendingTurn {
        self.order.reserve(oid, 0..u64::MAX, true)
    }

    /// As [`Gateway::remove_object`], in a turn that the caller took.
    pub async fn remove_in_turn(&self, sheep: &Arc<Sheep>, oid: Oid, _turn: Turn) -> Result<(), ResultCode> {
        if let Some(code) = self.code_for(sheep, oid)? {
            return self.remove_coded(sheep, oid, code).await;
        }
        retry(sheep, oid, false, |view, kept| async move {
            let request = request_for(Opcode::REMOVE_PEER, oid, 0, view.epoch, kept.copies);
            replicas::fan_out(sheep, &view, request, Bytes::new(), kept.copies).await
        })
        .await
    }
}
