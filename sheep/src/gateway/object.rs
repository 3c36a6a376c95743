//! One object operation, brought to all replicas: ordering, and the one loop that tries again (spec 06, 3.6).
//!
//! Results that a retry can cure never reach the caller: the loop waits, with back-off and woken by every change of
//! the view, until the cluster can do it. It gives up only when this node ends.

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sheepdog_proto::{ClusterFlags, ClusterStatus, Epoch, Oid, Opcode, ResultCode};
use tokio::sync::Mutex;

use super::coded::{Attempt, code_of};
use super::grants::Route;
use super::numbers::Number;
use super::op::{Op, Scratch, code_for, request_for};
use super::replicas::{self, Failure};
use super::{Gateway, sequencer};
use crate::intents::WriteId;
use crate::order::{PendingTurn, Turn};
use crate::peer::check_range;
use crate::sheep::Sheep;
use crate::vdi::table::Redundancy;
use crate::view::View;

/// First and last pause between attempts.
pub(super) const BACKOFF: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(200));

/// A node that is behind others is told of their epoch within this time.
const EPOCH_WAIT: Duration = Duration::from_secs(1);

/// Whether the object is cut into strips.
pub fn is_coded(oid: Oid, redundancy: &Redundancy) -> bool {
    redundancy.policy.is_erasure() && oid.follows_policy()
}

/// What stops a request before any replica is asked (spec 06, 3.5).
pub fn refusal(view: &View, copies: u8, write: bool) -> Option<ResultCode> {
    match view.status {
        ClusterStatus::Killed => return Some(ResultCode::KILLED),
        ClusterStatus::Shutdown => return Some(ResultCode::SHUTDOWN),
        ClusterStatus::Ok | ClusterStatus::Wait => {}
    }
    if view.status == ClusterStatus::Ok && view.ring.nr_zones() == 0 {
        return Some(ResultCode::HALT);
    }
    let strict = view.flags.contains(ClusterFlags::STRICT);
    (write && strict && view.ring.nr_zones() < usize::from(copies)).then_some(ResultCode::HALT)
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
        if let Some(code) = refusal(&view, redundancy.copies, write) {
            return Err(code);
        }
        let failure = match attempt(view.clone(), redundancy).await {
            Ok(value) => return Ok(value),
            Err(failure) => failure,
        };
        if !failure.code.is_retriable() {
            return Err(failure.code);
        }
        if !complained {
            tracing::warn!("{oid}: {}, trying again", failure.code);
            complained = true;
        }
        let change = sheep.views.changed_from(&view);
        if failure.code == ResultCode::OLD_NODE_VER && view.epoch.is_before(failure.peer_epoch) {
            // With a limit: MAKE_FS sets epochs back, and the peer may not have heard of it yet.
            let _ = tokio::time::timeout(EPOCH_WAIT, change).await;
            continue;
        }
        let _ = tokio::time::timeout(pause, change).await;
        pause = (pause * 2).min(BACKOFF.1);
    }
}

/// How an operation goes in one epoch, kept from attempt to attempt.
struct Way {
    epoch: Epoch,
    route: Route,
    scratch: Scratch,
}

/// An operation is over; the caller still holds its turn. A write that failed for good is taken back where it is.
pub(super) async fn conclude(
    sheep: &Arc<Sheep>,
    oid: Oid,
    op: &Op,
    number: Option<Number>,
    error: Option<&ResultCode>,
) {
    let Some(number) = number else { return };
    if matches!(error, Some(&(ResultCode::KILLED | ResultCode::SHUTDOWN))) {
        return; // the end of the epoch settles it
    }
    if error.is_none() || take_back(sheep, oid, op, &number).await {
        number.done();
    }
}

/// Whether an attempt in epoch `sent` may be taken back by its gateway. Not in another one: there homes know nothing of it,
/// would agree to everything, and be told that it is done while some have it.
fn may_take_back(sent: Epoch, now: Epoch, status: ClusterStatus) -> bool {
    sent == now && status != ClusterStatus::Killed
}

/// Takes an attempt at a write that failed back where it is. The caller still holds its turn, and keeps it until that is
/// done: undone later, it would undo newer writes of the same bytes. `false` = it stays in doubt, and the end of the epoch
/// settles it.
pub(super) async fn take_back(sheep: &Arc<Sheep>, oid: Oid, op: &Op, number: &Number) -> bool {
    let Some(epoch) = number.sent_in() else { return true };
    let mut pause = BACKOFF.0;
    let mut complained = false;
    loop {
        let view = sheep.views.load();
        if !may_take_back(epoch, view.epoch, view.status) {
            return false;
        }
        let kept = sheep.redundancy(oid.vid(), &view);
        let Err(failure) = op.undo(sheep, &view, oid, kept, number.id()).await else { return true };
        if !complained {
            tracing::warn!("{oid}: a failed write is not undone everywhere: {}", failure.code);
            complained = true;
        }
        if !is_coded(oid, &kept) && !failure.code.is_retriable() {
            return false;
        }
        let _ = tokio::time::timeout(pause, sheep.views.changed_from(&view)).await;
        pause = (pause * 2).min(BACKOFF.1);
    }
}

impl Gateway {
    /// Brings an operation to all replicas.
    async fn run(&self, sheep: &Arc<Sheep>, oid: Oid, op: Op) -> Result<Bytes, ResultCode> {
        let view = sheep.views.load();
        check_range(op.offset(), op.len() as u64, sheep.size_of(oid, &view))?;
        let redundancy = sheep.redundancy(oid.vid(), &view);
        if is_coded(oid, &redundancy) {
            code_of(redundancy.policy)?;
        }
        let number = op.is_write().then(|| self.numbers.begin(sheep));
        {
            let _turn = self.order.turn(oid, op.range(is_coded(oid, &redundancy)), op.is_write()).await;
            let result = self.in_turn(sheep, oid, &op, false, number.as_ref()).await;
            if result != Err(ResultCode::STALE_OBJ) {
                conclude(sheep, oid, &op, number, result.as_ref().err()).await;
                return result;
            }
            if let Some(number) = &number {
                op.begin_anew(sheep, oid, number).await;
            }
        }
        // A home lacks its replica: give it one while nobody writes, then write.
        let _turn = self.order.turn(oid, 0..u64::MAX, true).await;
        tracing::warn!("{oid}: not all homes have it, repairing");
        let mut result = self.in_turn(sheep, oid, &op, true, number.as_ref()).await;
        if result == Err(ResultCode::STALE_OBJ) {
            result = Err(ResultCode::NO_OBJ);
        }
        conclude(sheep, oid, &op, number, result.as_ref().err()).await;
        result
    }

    async fn in_turn(
        &self,
        sheep: &Arc<Sheep>,
        oid: Oid,
        op: &Op,
        heal: bool,
        number: Option<&Number>,
    ) -> Result<Bytes, ResultCode> {
        // One attempt after the other; the lock only lends the state to each.
        let way: &Mutex<Option<Way>> = &Mutex::new(None);
        retry(sheep, oid, op.is_write(), |view, kept| async move {
            let mut way = way.lock().await;
            let way = match way.take().filter(|w| w.epoch == view.epoch) {
                Some(known) => way.insert(known),
                None => {
                    let route = self.grants.route(sheep, &view, oid, op.is_write()).await?;
                    way.insert(Way {
                        epoch: view.epoch,
                        route,
                        scratch: Scratch { heal, ..Scratch::default() },
                    })
                }
            };
            if let Route::Through(first, _) = way.route
                && first != sheep.me
                && let Some(data) = sequencer::send(sheep, first, &view, oid, op).await?
            {
                return Ok(data);
            }
            op.attempt(sheep, &view, oid, kept, &mut way.scratch, number).await
        })
        .await
    }

    /// Reads `len` bytes at `offset`; bytes past the object's end are zeros.
    pub async fn read_object(
        &self,
        sheep: &Arc<Sheep>,
        oid: Oid,
        offset: u64,
        len: usize,
    ) -> Result<Bytes, ResultCode> {
        self.run(sheep, oid, Op::Read { offset, len }).await
    }

    /// Overwrites a range of an existing object on all replicas.
    pub async fn write_object(
        &self,
        sheep: &Arc<Sheep>,
        oid: Oid,
        offset: u64,
        data: Bytes,
    ) -> Result<(), ResultCode> {
        self.run(sheep, oid, Op::Write { offset, data }).await.map(drop)
    }

    /// Rebuilds the strips of a coded object that are missing, and `suspect` if all others fit without it.
    pub async fn repair_strips(&self, sheep: &Arc<Sheep>, oid: Oid, suspect: u8) -> Result<(), ResultCode> {
        self.run(sheep, oid, Op::Repair { suspect }).await.map(drop)
    }

    /// Creates or replaces an object on all replicas: zeros but for `data` at `offset`.
    pub async fn create_object(
        &self,
        sheep: &Arc<Sheep>,
        oid: Oid,
        offset: u64,
        data: Bytes,
    ) -> Result<(), ResultCode> {
        self.run(sheep, oid, Op::Create { offset, data }).await.map(drop)
    }

    /// Writes a part of an object, `new` of `data`, or creates it of all of `data` if no home has it. Of several gateways that do
    /// so at once one creates, and the others write.
    pub async fn add_to_object(
        &self,
        sheep: &Arc<Sheep>,
        oid: Oid,
        offset: u64,
        data: Bytes,
        new: Range<usize>,
    ) -> Result<(), ResultCode> {
        self.run(sheep, oid, Op::Add { offset, data, new }).await.map(drop)
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
        if let Some(code) = code_for(sheep, oid)? {
            return retry(sheep, oid, false, |view, _| async move {
                Attempt { sheep, view: &view, oid, code, id: WriteId::default() }.remove().await
            })
            .await;
        }
        retry(sheep, oid, false, |view, kept| async move {
            let request = request_for(Opcode::REMOVE_PEER, oid, 0, &view, kept.copies, self.numbers.none());
            replicas::fan_out(sheep, &view, request, Bytes::new(), kept.copies).await
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_is_taken_back_in_its_own_epoch_only() {
        assert!(may_take_back(Epoch(4), Epoch(4), ClusterStatus::Ok));
        assert!(!may_take_back(Epoch(4), Epoch(5), ClusterStatus::Ok));
        assert!(!may_take_back(Epoch(4), Epoch(4), ClusterStatus::Killed));
    }
}
