//! Dropping a reference in the ledgers of all homes (spec 05, section 10 and 29 rule 7).
//!
//! DECREF_PEER counts, it is not idempotent: a home that applied it must never get it again, and a home that recovers
//! the ledger from one that did must not get it at all. So the counting request is sent once, to homes whose ledgers are
//! there and equal in this very epoch; if it reached some and not others, the rest is not counted again but given the
//! state of one that did. What stays in doubt is a leak, never a loss.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use sheepdog_client::Reply;
use sheepdog_proto::header::{ObjRequest, RefRequest};
use sheepdog_proto::ledger::{LEDGER_LEN, Ledger};
use sheepdog_proto::{Flags, NodeId, ObjectKind, Opcode, Request, ResultCode};
use tokio::time::Instant;

use super::Gateway;
use super::object::retry;
use super::replicas::{Failure, call, deciding, homes, on_all};
use crate::sheep::Sheep;
use crate::view::View;

/// How long ledgers may differ before they are made equal: longer than a drop of another gateway is on its way.
const DISAGREEMENT: Duration = Duration::from_secs(12);

/// Bytes of a ledger that are compared before each drop: a thousand generations.
const COMPARED: usize = 4096;

/// How far one drop got.
#[derive(Default)]
struct Progress {
    /// Homes that counted it.
    applied: Vec<NodeId>,
    /// Homes whose answer was lost.
    doubtful: bool,
    /// Since when the homes' ledgers differ.
    disagree_since: Option<Instant>,
}

/// A home and its ledger; `None` = it has none.
type State = (NodeId, Option<Ledger>);

impl Gateway {
    /// Drops a reference in the ledgers of all homes; the object goes with the last one.
    pub async fn decref_object(&self, sheep: &Arc<Sheep>, drop: RefRequest) -> Result<(), ResultCode> {
        let oid = drop.oid;
        if !Ledger::is_valid_generation(drop.generation) || oid.kind() != ObjectKind::Ledger {
            return Err(ResultCode::INVALID_PARMS);
        }
        let _turn = self.order.turn(oid, 0..u64::MAX, true).await;
        let progress = Mutex::new(Progress::default());
        let progress = &progress;
        retry(sheep, oid, false, |view, kept| async move {
            let begun = {
                let p = progress.lock();
                p.doubtful || !p.applied.is_empty()
            };
            if begun {
                complete(sheep, &view, drop, kept.copies, progress).await
            } else {
                count(sheep, &view, drop, kept.copies, progress).await
            }
        })
        .await
    }
}

/// The first `len` bytes of the ledgers of all homes, recovered if they were not there yet.
async fn states(
    sheep: &Arc<Sheep>,
    view: &View,
    drop: RefRequest,
    copies: u8,
    len: usize,
) -> Result<Vec<State>, Failure> {
    let body = ObjRequest { oid: drop.oid, copies, ..ObjRequest::zeroed() };
    let request = Request::new(Opcode::READ_PEER).epoch(view.epoch).with_obj(body).length(len);
    let nodes = homes(sheep, view, &request, copies)?;
    let results = on_all(sheep, &nodes, request, &Bytes::new()).await;
    let ledger = |result: Result<Reply, Failure>| match result {
        Ok(reply) => Ok(Some(Ledger::decode(&reply.data))),
        Err(failure) if failure.code == ResultCode::NO_OBJ => Ok(None),
        Err(failure) => Err(failure),
    };
    nodes.into_iter().zip(results).map(|(node, result)| Ok((node, ledger(result)?))).collect()
}

/// Sends the drop to all homes, if they agree.
async fn count(
    sheep: &Arc<Sheep>,
    view: &View,
    drop: RefRequest,
    copies: u8,
    progress: &Mutex<Progress>,
) -> Result<(), Failure> {
    let states = states(sheep, view, drop, copies, COMPARED).await?;
    if states.iter().any(|(_, ledger)| *ledger != states[0].1) {
        tracing::debug!("{} (drop of {}, {}): {states:?}", drop.oid, drop.generation, drop.count);
        return disagree(sheep, view, drop, copies, progress).await;
    }
    let request = Request::new(Opcode::DECREF_PEER).flag(Flags::FWD).epoch(view.epoch).with_reference(drop);
    let nodes: Vec<NodeId> = states.into_iter().map(|(node, _)| node).collect();
    let results = on_all(sheep, &nodes, request, &Bytes::new()).await;
    let mut failures = Vec::new();
    let mut progress = progress.lock();
    for (node, result) in nodes.into_iter().zip(results) {
        match result {
            Ok(_) => progress.applied.push(node),
            Err(failure) => {
                progress.doubtful |= failure.code == ResultCode::NETWORK_ERROR;
                failures.push(failure);
            }
        }
    }
    deciding(&failures).map_or(Ok(()), Err)
}

/// The homes' ledgers differ. Another gateway's drop may be on its way; if not, one that ended left them so, and any of
/// them misses drops at most. The one that misses the fewest becomes everybody's.
async fn disagree(
    sheep: &Arc<Sheep>,
    view: &View,
    drop: RefRequest,
    copies: u8,
    progress: &Mutex<Progress>,
) -> Result<(), Failure> {
    let since = *progress.lock().disagree_since.get_or_insert_with(Instant::now);
    if since.elapsed() >= DISAGREEMENT {
        // A drop lowers the slot of its generation and raises the next: of two states the one with the lower first
        // difference has seen more.
        let states = states(sheep, view, drop, copies, LEDGER_LEN).await?;
        let seen = |ledger: &Option<Ledger>| ledger.clone().unwrap_or_else(Ledger::absent);
        let source = states.iter().map(|(_, ledger)| seen(ledger)).min_by(compare);
        tracing::warn!("{}: homes keep different counts, making them equal: {states:?}", drop.oid);
        level(sheep, view, drop, copies, &states, source).await?;
        progress.lock().disagree_since = None;
    }
    Err(Failure::from(ResultCode::NETWORK_ERROR)) // again, with a pause
}

/// Slot by slot; slots that are not stored are zero.
fn compare(a: &Ledger, b: &Ledger) -> std::cmp::Ordering {
    let (a, b) = (a.slots(), b.slots());
    let slot = |slots: &[i32], i: usize| slots.get(i).copied().unwrap_or(0);
    (0..a.len().max(b.len()))
        .map(|i| slot(a, i).cmp(&slot(b, i)))
        .find(|o| o.is_ne())
        .unwrap_or(std::cmp::Ordering::Equal)
}

/// Some homes may have counted: the others get the state of one that did.
async fn complete(
    sheep: &Arc<Sheep>,
    view: &View,
    drop: RefRequest,
    copies: u8,
    progress: &Mutex<Progress>,
) -> Result<(), Failure> {
    let states = states(sheep, view, drop, copies, LEDGER_LEN).await?;
    let applied = progress.lock().applied.clone();
    let Some((_, source)) = states.iter().find(|(node, _)| applied.contains(node)) else {
        tracing::warn!("{}: nobody can tell whether a reference was dropped, leaving it", drop.oid);
        return Ok(());
    };
    level(sheep, view, drop, copies, &states, source.clone()).await?;
    if source.is_none() {
        // The home that was to remove the object may not have got as far.
        match sheep.gateway.remove_object(sheep, drop.oid.data_of_ledger()).await {
            Ok(()) | Err(ResultCode::NO_OBJ) => {}
            Err(code) => return Err(code.into()),
        }
    }
    Ok(())
}

/// Gives `state` to every home that has another one.
async fn level(
    sheep: &Arc<Sheep>,
    view: &View,
    drop: RefRequest,
    copies: u8,
    states: &[State],
    state: Option<Ledger>,
) -> Result<(), Failure> {
    let body = ObjRequest { oid: drop.oid, copies, ..ObjRequest::zeroed() };
    for (node, found) in states.iter().filter(|(_, found)| *found != state) {
        let result = match &state {
            Some(ledger) => {
                let bytes = Bytes::from(ledger.encode());
                let request =
                    Request::new(Opcode::CREATE_AND_WRITE_PEER).flag(Flags::WRITE).epoch(view.epoch);
                call(sheep, *node, request.with_obj(body).length(bytes.len()), bytes).await
            }
            None if found.is_none() => continue,
            None => {
                let request = Request::new(Opcode::REMOVE_PEER).epoch(view.epoch).with_obj(body);
                call(sheep, *node, request, Bytes::new()).await
            }
        };
        match result {
            Ok(_) => {}
            Err(Failure { code: ResultCode::NO_OBJ, .. }) if state.is_none() => {}
            Err(failure) => return Err(failure),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(drops: &[(u32, u32)]) -> Ledger {
        let mut ledger = Ledger::absent();
        for (generation, count) in drops {
            assert!(ledger.drop_reference(*generation, *count));
        }
        ledger
    }

    #[test]
    fn the_state_with_more_drops_comes_first() {
        let orders = [
            (ledger(&[]), ledger(&[(1, 0)])),
            (ledger(&[(2, 0)]), ledger(&[(2, 0), (0, 1)])),
            (ledger(&[(0, 1)]), ledger(&[(0, 1), (1, 2)])),
            (ledger(&[(1, 0)]), ledger(&[(1, 0), (1, 0)])),
        ];
        for (fewer, more) in orders {
            assert_eq!(compare(&more, &fewer), std::cmp::Ordering::Less, "{fewer:?} {more:?}");
        }
    }
}
