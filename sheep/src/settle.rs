//! Making the replicas of an object equal after an epoch in which a write of it was not done (spec 06, 15.1 A3, 14.2 P4).
//!
//! *Replicated objects.* A node with an unsettled object tells its first home, which leads: one home after the other
//! takes the unsettled regions over from it. A home that does so keeps new writes out for that moment and waits until
//! those that it has are done everywhere, so that nothing acknowledged is overwritten. When all are equal, all homes
//! serve reads of the object again. The first home's state wins: an acknowledged write is on all homes, so it has it.
//!
//! *Coded objects.* The homes of the epoch of the write decide whether it stands: it does if all of them that are here
//! have it, or if one knows that it was done; else it is undone where it is, before anybody reads or rebuilds a strip.
//! The first of these homes asks and tells. What a write replaced and what was decided is kept on disk, so this is so after a
//! loss of all nodes, too. Where a node has no such log (an earlier version wrote there), the first home makes parity fit
//! the data strips as they are.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::stream::{self, FuturesUnordered, StreamExt};
use sheepdog_erasure::STRIPE;
use sheepdog_placement::{Ring, Weights};
use sheepdog_proto::header::{ObjRequest, OrderRequest, order};
use sheepdog_proto::{Epoch, Flags, NodeId, Oid, Opcode, Request, ResultCode, Wire};
use sheepdog_store::{DigestOf, Replica, StoreError};

use crate::cluster::ops::epoch_log;
use crate::faults::unnoted;
use crate::gateway::coded::{assemble, code_of, encode};
use crate::gateway::grants::first_home;
use crate::gateway::numbers::Outcome;
use crate::gateway::object::is_coded;
use crate::gateway::sequencer::member_at;
use crate::intents::{Fate, WriteId, ranges};
use crate::peers::Lane;
use crate::sheep::Sheep;

/// Objects settled at a time.
const WIDTH: usize = 8;
/// First and last pause between attempts.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// Deadline of settling one object at its leader.
const SETTLE_DEADLINE: Duration = Duration::from_secs(30);
/// Deadline of taking regions over.
const PULL_DEADLINE: Duration = Duration::from_secs(15);
/// Deadline of small questions.
const ASK_DEADLINE: Duration = Duration::from_secs(5);
/// How long it waits to be decided about a write of which nobody knows whether it was acknowledged when a member does not
/// answer that may be its gateway.
const KNOW_WAIT: Duration = Duration::from_secs(20);
/// Bytes read at once when regions are taken over.
const STEP: u64 = 1 << 20;
/// Bytes of each strip looked at together when parity is mended; whole units for every code.
const STRIP_STEP: u64 = 256 << 10;

/// Settles what is unsettled here, until all is or the epoch ends.
pub fn start(sheep: &Arc<Sheep>, epoch: Epoch) {
    if sheep.intents.all_settled() {
        return;
    }
    let sheep = sheep.clone();
    tokio::spawn(async move {
        let oids = sheep.intents.unsettled();
        tracing::info!("making {} objects equal that were being written, epoch {epoch}", oids.len());
        stream::iter(oids).for_each_concurrent(WIDTH, |oid| until_settled(&sheep, oid, epoch)).await;
    });
}

async fn until_settled(sheep: &Arc<Sheep>, oid: Oid, epoch: Epoch) {
    let Some(_mine) = sheep.intents.take_on(oid, epoch) else { return };
    sheep.tables_arrived().await;
    let mut pause = PAUSE.0;
    while sheep.views.epoch() == epoch && sheep.intents.is_unsettled(oid) {
        match settle(sheep, oid, epoch).await {
            Ok(()) => return sheep.intents.settled(oid),
            Err(code) => tracing::debug!("{oid} is not settled yet: {code}"),
        }
        let view = sheep.views.load();
        if view.epoch == epoch {
            let _ = tokio::time::timeout(pause, sheep.views.changed_from(&view)).await;
        }
        pause = (pause * 2).min(PAUSE.1);
    }
}

async fn settle(sheep: &Arc<Sheep>, oid: Oid, epoch: Epoch) -> Result<(), ResultCode> {
    let view = member_at(sheep, epoch).await?;
    if is_coded(oid, &sheep.redundancy(oid.vid(), &view)) {
        for (written, ids) in sheep.intents.open_writes(oid) {
            settle_strips(sheep, oid, written, &ids, epoch).await?;
        }
        return if sheep.intents.is_remembered(oid) {
            settle_parity(sheep, oid, epoch).await
        } else {
            Ok(())
        };
    }
    let leader = first_home(&view, oid).ok_or(ResultCode::WAIT_FOR_JOIN)?;
    let regions = sheep.intents.regions(oid);
    if leader == sheep.me {
        return lead(sheep, oid, regions, sheep.me, epoch).await;
    }
    let body = OrderRequest { oid, what: order::SETTLE, regions, ..OrderRequest::zeroed() };
    let me = Bytes::from(sheep.me.encode());
    match ask(sheep, leader, body, me, epoch, SETTLE_DEADLINE).await {
        // A node of the original cannot lead: this home follows it alone.
        Err(ResultCode::INVALID_PARMS) => pull(sheep, oid, regions, leader, epoch).await,
        other => other,
    }
}

async fn ask(
    sheep: &Arc<Sheep>,
    node: NodeId,
    body: OrderRequest,
    payload: Bytes,
    epoch: Epoch,
    deadline: Duration,
) -> Result<(), ResultCode> {
    let request = Request::new(Opcode::ORDER_PEER).flag(Flags::WRITE).epoch(epoch).with_order(body);
    let reply = sheep.peers.call_on(Lane::Control, &node, request, payload, deadline).await;
    reply.map_err(|_| ResultCode::NETWORK_ERROR)?.response.result.ok()
}

/// What a node of the original answers that cannot do its part: then it goes without.
fn or_without(answer: Result<(), ResultCode>) -> Result<(), ResultCode> {
    if answer == Err(ResultCode::INVALID_PARMS) { Ok(()) } else { answer }
}

/// Has a home take `regions` over from `source`, or, with none, tells it that all are equal.
async fn ask_to_pull(
    sheep: &Arc<Sheep>,
    home: NodeId,
    oid: Oid,
    regions: u64,
    source: NodeId,
    epoch: Epoch,
) -> Result<(), ResultCode> {
    let body = OrderRequest { oid, what: order::PULL, regions, ..OrderRequest::zeroed() };
    let deadline = if regions == 0 { ASK_DEADLINE } else { PULL_DEADLINE };
    or_without(ask(sheep, home, body, Bytes::from(source.encode()), epoch, deadline).await)
}

/// All homes are equal: they, this node last, serve the object again.
async fn release(
    sheep: &Arc<Sheep>,
    oid: Oid,
    homes: &[NodeId],
    source: NodeId,
    epoch: Epoch,
) -> Result<(), ResultCode> {
    for home in homes.iter().filter(|h| **h != sheep.me) {
        ask_to_pull(sheep, *home, oid, 0, source, epoch).await?;
    }
    equal(sheep, oid)
}

/// All homes are equal: this one serves the object again.
fn equal(sheep: &Arc<Sheep>, oid: Oid) -> Result<(), ResultCode> {
    if sheep.intents.equal_elsewhere(oid) { Ok(()) } else { Err(ResultCode::AGAIN) }
}

/// Waits until this node's replica of `oid` is recovered, if it is to be.
async fn recovered(sheep: &Arc<Sheep>, oid: Oid, epoch: Epoch) -> Result<(), ResultCode> {
    loop {
        let view = member_at(sheep, epoch).await?;
        if sheep.recovery.ready(sheep, oid, &view).await {
            return Ok(());
        }
    }
}

/// As [`lead`], for another node; if it fails, this node goes on trying: it has made the object unsettled at its homes,
/// and the other one may have been told by then that it is settled.
pub async fn lead_for(
    sheep: &Arc<Sheep>,
    oid: Oid,
    regions: u64,
    reporter: NodeId,
    epoch: Epoch,
) -> Result<(), ResultCode> {
    let result = lead(sheep, oid, regions, reporter, epoch).await;
    if result.is_err() {
        let sheep = sheep.clone();
        tokio::spawn(async move { until_settled(&sheep, oid, epoch).await });
    }
    result
}

/// The first home: has all homes take `regions` over from here, or from `reporter` if there is nothing here.
async fn lead(
    sheep: &Arc<Sheep>,
    oid: Oid,
    regions: u64,
    reporter: NodeId,
    epoch: Epoch,
) -> Result<(), ResultCode> {
    let _alone = sheep.intents.leading.turn(oid, 0..1, true).await;
    let view = member_at(sheep, epoch).await?;
    let kept = sheep.redundancy(oid.vid(), &view);
    if first_home(&view, oid) != Some(sheep.me) || is_coded(oid, &kept) {
        return Err(ResultCode::INVALID_PARMS);
    }
    recovered(sheep, oid, epoch).await?;
    let store = sheep.store.as_ref().ok_or(ResultCode::NO_OBJ)?;
    let here = store.exists(Sheep::replica(oid));
    let source = if here { sheep.me } else { reporter };
    let regions = regions | sheep.intents.regions(oid);
    let homes: Vec<NodeId> = view.ring.nodes_of(oid, kept.copies.into()).map(|n| n.nid).collect();
    if here || reporter != sheep.me {
        // This node serves no reads of it either until all are equal.
        sheep.intents.unsettle(oid, regions);
        for home in homes.iter().filter(|h| **h != source) {
            if *home == sheep.me {
                pull(sheep, oid, regions, source, epoch).await?;
                continue;
            }
            ask_to_pull(sheep, *home, oid, regions, source, epoch).await?;
        }
    }
    release(sheep, oid, &homes, source, epoch).await
}

/// A home: takes `regions` over from `source`. No regions: all homes are equal.
pub async fn follow(
    sheep: &Arc<Sheep>,
    oid: Oid,
    regions: u64,
    source: NodeId,
    epoch: Epoch,
) -> Result<(), ResultCode> {
    member_at(sheep, epoch).await?;
    if regions == 0 {
        return equal(sheep, oid);
    }
    sheep.intents.unsettle(oid, regions);
    pull(sheep, oid, regions, source, epoch).await
}

async fn pull(
    sheep: &Arc<Sheep>,
    oid: Oid,
    regions: u64,
    source: NodeId,
    epoch: Epoch,
) -> Result<(), ResultCode> {
    let Some(store) = sheep.store.as_ref() else { return Ok(()) };
    recovered(sheep, oid, epoch).await?;
    let view = member_at(sheep, epoch).await?;
    if !view.is_member(&source) || source == sheep.me || !sheep.is_home(oid, &view) {
        return Ok(());
    }
    // Writes that come from now on wait; those that are here are done, so the source has them, before it is read.
    let _held = sheep.holds.hold(oid).await;
    sheep.gate.drain().await;
    if !sheep.intents.becomes_quiet(oid).await {
        return Err(ResultCode::AGAIN);
    }
    let _pass = sheep.gate.enter(epoch).ok_or(ResultCode::OLD_NODE_VER)?;
    let (replica, size) = (Sheep::replica(oid), sheep.size_of(oid, &view));
    if !store.exists(replica) {
        let whole = match read(sheep, source, oid, 0..size, epoch).await {
            Err(ResultCode::NO_OBJ) => return Ok(()),
            other => other?,
        };
        return store.create_if_absent(replica, size, 0, whole).await.map(drop).map_err(|e| fault(sheep, &e));
    }
    if regions == u64::MAX && same(sheep, source, replica, size, epoch).await {
        return Ok(());
    }
    let steps = ranges(size, regions).into_iter().flat_map(|range| {
        let end = range.end;
        range.step_by(STEP as usize).map(move |start| start..(start + STEP).min(end))
    });
    for range in steps {
        let theirs = match read(sheep, source, oid, range.clone(), epoch).await {
            Err(ResultCode::NO_OBJ) => return Ok(()),
            other => other?,
        };
        let mine = store.read(replica, range.start, theirs.len()).await.map_err(|e| fault(sheep, &e))?;
        if mine != theirs {
            tracing::info!("{oid}: {} bytes at {} as {source} has them", theirs.len(), range.start);
            store.write(replica, size, range.start, theirs).await.map_err(|e| fault(sheep, &e))?;
        }
    }
    Ok(())
}

fn fault(sheep: &Arc<Sheep>, error: &StoreError) -> ResultCode {
    crate::faults::peer_result(sheep, error)
}

async fn read(
    sheep: &Arc<Sheep>,
    source: NodeId,
    oid: Oid,
    range: std::ops::Range<u64>,
    epoch: Epoch,
) -> Result<Bytes, ResultCode> {
    let len = (range.end - range.start) as usize;
    let body = ObjRequest { oid, offset: range.start as u32, ..ObjRequest::zeroed() };
    let request =
        Request::new(Opcode::READ_PEER).flag(Flags::RECOVERY).epoch(epoch).length(len).with_obj(body);
    let reply = sheep.peers.call(&source, request, Bytes::new(), PULL_DEADLINE).await;
    let reply = reply.map_err(|_| ResultCode::NETWORK_ERROR)?;
    reply.response.result.ok()?;
    if reply.data.len() == len { Ok(reply.data) } else { Err(ResultCode::NETWORK_ERROR) }
}

/// Whether the whole object is the same here and there. In doubt it is not.
async fn same(sheep: &Arc<Sheep>, source: NodeId, replica: Replica, size: u64, epoch: Epoch) -> bool {
    let Some(store) = sheep.store.as_ref() else { return false };
    let body = ObjRequest { oid: replica.oid, ..ObjRequest::zeroed() };
    let request = Request::new(Opcode::GET_HASH).epoch(epoch).with_obj(body);
    let theirs = sheep.peers.call(&source, request, Bytes::new(), PULL_DEADLINE);
    let (theirs, mine) = tokio::join!(theirs, store.hash(replica, size, None, DigestOf::All));
    matches!((theirs, mine), (Ok(t), Ok(m)) if t.response.result.is_ok() && t.response.hash().digest == m)
}

/// The list of writes in a payload.
pub fn decode_ids(payload: &[u8]) -> Vec<WriteId> {
    let pairs = payload.chunks_exact(8);
    pairs.map(|p| WriteId { writer: u32::get(p), seq: u32::get(&p[4..]) }).collect()
}

/// Such a list.
pub fn encode_ids(ids: &[WriteId]) -> Vec<u8> {
    ids.iter().flat_map(|id| [id.writer.to_le_bytes(), id.seq.to_le_bytes()].concat()).collect()
}

/// The first present home of the epoch of these writes decides about them.
async fn settle_strips(
    sheep: &Arc<Sheep>,
    oid: Oid,
    written: Epoch,
    ids: &[WriteId],
    epoch: Epoch,
) -> Result<(), ResultCode> {
    let (homes, _) = old_homes(sheep, oid, written).await?;
    let leader = *homes.first().ok_or(ResultCode::WAIT_FOR_JOIN)?;
    if leader == sheep.me {
        return judge(sheep, oid, written, ids, epoch).await;
    }
    let body = OrderRequest { oid, what: order::SETTLE, serial: written.0, ..OrderRequest::zeroed() };
    match ask(sheep, leader, body, encode_ids(ids).into(), epoch, SETTLE_DEADLINE).await {
        Err(ResultCode::INVALID_PARMS) => judge(sheep, oid, written, ids, epoch).await,
        other => other,
    }
}

/// The homes of strips at epoch `written` that are members now, and whether those are all.
async fn old_homes(sheep: &Arc<Sheep>, oid: Oid, written: Epoch) -> Result<(Vec<NodeId>, bool), ResultCode> {
    let view = sheep.views.load();
    let log = epoch_log(sheep, written).await.ok_or(ResultCode::AGAIN)?;
    let ring = Ring::new(log.nodes, Weights::of_cluster(view.flags)).map_err(|_| ResultCode::AGAIN)?;
    let copies = sheep.redundancy(oid.vid(), &view).copies;
    let (here, away): (Vec<NodeId>, Vec<NodeId>) =
        ring.nodes_of(oid, copies.into()).map(|n| n.nid).partition(|n| view.is_member(n));
    Ok((here, away.is_empty()))
}

/// Decides about writes of strips and tells their homes.
pub async fn judge(
    sheep: &Arc<Sheep>,
    oid: Oid,
    written: Epoch,
    ids: &[WriteId],
    epoch: Epoch,
) -> Result<(), ResultCode> {
    let _alone = sheep.intents.leading.turn(oid, 0..1, true).await;
    let view = member_at(sheep, epoch).await?;
    let code = code_of(sheep.redundancy(oid.vid(), &view).policy)?;
    let (homes, all_here) = old_homes(sheep, oid, written).await?;
    let mut fates: HashMap<WriteId, Vec<Fate>> = HashMap::new();
    for home in &homes {
        let answers = if *home == sheep.me {
            ids.iter().map(|id| sheep.intents.fate(oid, *id, written)).collect()
        } else {
            recall(sheep, *home, oid, written, ids, epoch).await?
        };
        for (id, fate) in ids.iter().zip(answers) {
            fates.entry(*id).or_default().push(fate);
        }
    }
    // By what is to be done: with those that are kept, kept loosely, undone.
    let mut verdicts: [(Fate, Vec<WriteId>); 3] =
        [Fate::Kept, Fate::Loose, Fate::Undone].map(|f| (f, Vec::new()));
    let mut give = |id: WriteId, fate: Fate| {
        verdicts.iter_mut().filter(|(f, _)| *f == fate).for_each(|(_, ids)| ids.push(id));
    };
    let mut open = Vec::new();
    for id in ids {
        match verdict(fates.get(id).map_or(&[][..], |f| f)) {
            Some(fate) => give(*id, fate),
            None if all_here => give(*id, Fate::Kept),
            None => open.push(*id),
        }
    }
    // What all have that are left: a home that is away may lack it. Its gateway knows.
    let (outcomes, all_answered) = match open.is_empty() {
        true => (Vec::new(), true),
        false => outcomes(sheep, &open, written, epoch).await,
    };
    let mut undecided = false;
    for (id, outcome) in open.iter().zip(outcomes) {
        let having = fates.get(id).into_iter().flatten().filter(|f| **f == Fate::Applied).count();
        match outcome {
            Outcome::Acknowledged => give(*id, Fate::Kept),
            Outcome::Failed => give(*id, Fate::Undone),
            // Those that are here can serve nobody: nothing is gained before others return, and these may have it or not.
            Outcome::Unknown if having < code.data_strips() => undecided = true,
            Outcome::Unknown if all_answered || !sheep.intents.may_wait(oid, written, KNOW_WAIT) => {
                give(*id, Fate::Loose);
            }
            Outcome::Unknown => undecided = true,
        }
    }
    let [kept, loose, undone] = verdicts.each_ref().map(|(_, ids)| ids.len());
    // Again and again if it waits for homes that are away.
    if kept + loose + undone > 0 {
        tracing::info!(
            "{oid}: of the writes of epoch {written} {kept} stand, {loose} as all have them that are left, {undone} are undone"
        );
    }
    for (fate, ids) in verdicts.iter().filter(|(_, ids)| !ids.is_empty()) {
        decide_at(sheep, oid, &homes, *fate, ids, written, epoch).await?;
    }
    if undecided { Err(ResultCode::AGAIN) } else { Ok(()) }
}

/// What became of writes at their gateways, whichever members those are, and whether all members were heard that had to be.
async fn outcomes(sheep: &Arc<Sheep>, ids: &[WriteId], written: Epoch, epoch: Epoch) -> (Vec<Outcome>, bool) {
    let mut out = sheep.gateway.numbers.outcomes(ids, written);
    let view = sheep.views.load();
    let body = OrderRequest { what: order::OUTCOME, serial: written.0, ..OrderRequest::zeroed() };
    let others = view.others(sheep.me);
    let mut answers: FuturesUnordered<_> =
        others.map(|node| ask_about(sheep, node, body, ids, epoch)).collect();
    let mut all_answered = true;
    while out.contains(&Outcome::Unknown)
        && let Some(answer) = answers.next().await
    {
        all_answered &= answer.is_ok();
        // A node of the original is no gateway of such a write.
        for (known, byte) in out.iter_mut().zip(answer.ok().flatten().unwrap_or_default()) {
            if *known == Outcome::Unknown {
                *known = Outcome::of(byte);
            }
        }
    }
    (out, all_answered)
}

/// Asks about writes: a byte for each, `None` from a node of the original.
async fn ask_about(
    sheep: &Arc<Sheep>,
    node: NodeId,
    body: OrderRequest,
    ids: &[WriteId],
    epoch: Epoch,
) -> Result<Option<Bytes>, ResultCode> {
    // The answer takes the place of the question in the payload.
    let request = Request::new(Opcode::ORDER_PEER)
        .flag(Flags::WRITE.with(Flags::PIGGYBACK))
        .epoch(epoch)
        .with_order(body);
    let reply =
        sheep.peers.call_on(Lane::Control, &node, request, encode_ids(ids).into(), ASK_DEADLINE).await;
    let reply = reply.map_err(|_| ResultCode::NETWORK_ERROR)?;
    match reply.response.result {
        ResultCode::SUCCESS if reply.data.len() == ids.len() => Ok(Some(reply.data)),
        ResultCode::SUCCESS => Err(ResultCode::NETWORK_ERROR),
        ResultCode::INVALID_PARMS => Ok(None),
        code => Err(code),
    }
}

/// Tells homes of strips what was decided about writes.
async fn decide_at(
    sheep: &Arc<Sheep>,
    oid: Oid,
    homes: &[NodeId],
    fate: Fate,
    ids: &[WriteId],
    written: Epoch,
    epoch: Epoch,
) -> Result<(), ResultCode> {
    for home in homes {
        if *home == sheep.me {
            decide(sheep, oid, fate, ids, written, epoch).await?;
            continue;
        }
        let body = OrderRequest {
            oid,
            what: order::DECIDE,
            kind: (fate != Fate::Undone).into(),
            length: (fate == Fate::Loose).into(),
            serial: written.0,
            ..OrderRequest::zeroed()
        };
        or_without(ask(sheep, *home, body, encode_ids(ids).into(), epoch, PULL_DEADLINE).await)?;
    }
    Ok(())
}

/// A gateway takes a write of strips in `epoch` back that failed for good.
pub async fn undo_strips(
    sheep: &Arc<Sheep>,
    oid: Oid,
    homes: &[NodeId],
    id: WriteId,
    epoch: Epoch,
) -> Result<(), ResultCode> {
    decide_at(sheep, oid, homes, Fate::Undone, &[id], epoch, epoch).await
}

/// Parity of an object that was being written when all nodes were lost.
async fn settle_parity(sheep: &Arc<Sheep>, oid: Oid, epoch: Epoch) -> Result<(), ResultCode> {
    let view = member_at(sheep, epoch).await?;
    let leader = first_home(&view, oid).ok_or(ResultCode::WAIT_FOR_JOIN)?;
    if leader == sheep.me {
        return mend_parity(sheep, oid, epoch).await;
    }
    let body = OrderRequest { oid, what: order::SETTLE, ..OrderRequest::zeroed() };
    or_without(ask(sheep, leader, body, Bytes::new(), epoch, SETTLE_DEADLINE).await)
}

/// The first home: computes parity from the data strips and replaces what does not fit. All strips that have a home must be
/// there; what is being written at this moment is left alone, as it is written on all strips.
pub async fn mend_parity(sheep: &Arc<Sheep>, oid: Oid, epoch: Epoch) -> Result<(), ResultCode> {
    let _alone = sheep.intents.leading.turn(oid, 0..1, true).await;
    let view = member_at(sheep, epoch).await?;
    let code = code_of(sheep.redundancy(oid.vid(), &view).policy)?;
    let homes: Vec<NodeId> = view.ring.nodes_of(oid, code.strips()).map(|n| n.nid).collect();
    let (_, size) = sheep.named_replica(oid, 0, &view);
    let unit = STRIPE / code.data_strips();
    if homes.len() > code.data_strips() && !sheep.intents.is_mended(oid, epoch) {
        for offset in (0..size).step_by(STRIP_STEP as usize) {
            let len = (size - offset).min(STRIP_STEP) as usize;
            let read =
                |(index, home): (usize, &NodeId)| read_strip(sheep, *home, oid, index, offset, len, epoch);
            let strips: Result<Vec<Bytes>, ResultCode> =
                join_all(homes.iter().enumerate().map(read)).await.into_iter().collect();
            let strips = match strips {
                // Not all strips are there: recovery computes those that are not.
                Err(ResultCode::NO_OBJ | ResultCode::INVALID_PARMS) => break,
                other => other?,
            };
            let data = strips[..code.data_strips()].iter().cloned().enumerate().collect();
            let object = assemble(code, data, len * code.data_strips()).map_err(|f| f.code)?;
            let fitting = encode(code, &object, homes.len()).map_err(|f| f.code)?;
            for index in code.data_strips()..homes.len() {
                for range in differences(&strips[index], &fitting[index], unit) {
                    tracing::info!("{oid}: strip {index} is made to fit at {}", offset + range.start as u64);
                    let at = offset + range.start as u64;
                    write_strip(sheep, homes[index], oid, index, at, fitting[index].slice(range), epoch)
                        .await?;
                }
            }
        }
    }
    sheep.intents.mended(oid, epoch);
    release(sheep, oid, &homes, sheep.me, epoch).await
}

/// Where two strips differ, in whole units.
fn differences(a: &[u8], b: &[u8], unit: usize) -> Vec<std::ops::Range<usize>> {
    let mut out: Vec<std::ops::Range<usize>> = Vec::new();
    for (i, (x, y)) in a.chunks(unit).zip(b.chunks(unit)).enumerate() {
        let range = i * unit..i * unit + x.len();
        match out.last_mut() {
            _ if x == y => {}
            Some(last) if last.end == range.start => last.end = range.end,
            _ => out.push(range),
        }
    }
    out
}

async fn read_strip(
    sheep: &Arc<Sheep>,
    home: NodeId,
    oid: Oid,
    index: usize,
    offset: u64,
    len: usize,
    epoch: Epoch,
) -> Result<Bytes, ResultCode> {
    let replica = Replica { oid, strip: Some(index as u8) };
    if home == sheep.me {
        return strip_as_it_is(sheep, replica, offset, len).await;
    }
    let body = OrderRequest {
        oid,
        what: order::READ_STRIP,
        kind: index as u8,
        offset: offset as u32,
        length: len as u32,
        ..OrderRequest::zeroed()
    };
    let request = Request::new(Opcode::ORDER_PEER).epoch(epoch).length(len).with_order(body);
    let reply = sheep.peers.call_on(Lane::Control, &home, request, Bytes::new(), PULL_DEADLINE).await;
    let reply = reply.map_err(|_| ResultCode::NETWORK_ERROR)?;
    reply.response.result.ok()?;
    if reply.data.len() == len { Ok(reply.data) } else { Err(ResultCode::NETWORK_ERROR) }
}

/// A strip of this node, settled or not.
pub async fn strip_as_it_is(
    sheep: &Arc<Sheep>,
    replica: Replica,
    offset: u64,
    len: usize,
) -> Result<Bytes, ResultCode> {
    if !sheep.intents.open_writes(replica.oid).is_empty() {
        return Err(ResultCode::AGAIN); // what is open is decided first
    }
    let store = sheep.store.as_ref().ok_or(ResultCode::NO_OBJ)?;
    let (_, size) = sheep.named_replica(replica.oid, replica.strip.unwrap_or(0), &sheep.views.load());
    crate::peer::check_range(offset, len as u64, size)?;
    if store.is_cut_off(replica, Epoch(0), size) {
        return Err(ResultCode::NO_OBJ); // recovery computes it
    }
    store.read(replica, offset, len).await.map_err(|e| fault(sheep, &e))
}

async fn write_strip(
    sheep: &Arc<Sheep>,
    home: NodeId,
    oid: Oid,
    index: usize,
    offset: u64,
    data: Bytes,
    epoch: Epoch,
) -> Result<(), ResultCode> {
    let replica = Replica { oid, strip: Some(index as u8) };
    if home == sheep.me {
        return mend_strip(sheep, replica, offset, data, epoch).await;
    }
    let body = OrderRequest {
        oid,
        what: order::WRITE_STRIP,
        kind: index as u8,
        offset: offset as u32,
        ..OrderRequest::zeroed()
    };
    ask(sheep, home, body, data, epoch, PULL_DEADLINE).await
}

/// A home: overwrites part of a strip, unless the object is being written.
pub async fn mend_strip(
    sheep: &Arc<Sheep>,
    replica: Replica,
    offset: u64,
    data: Bytes,
    epoch: Epoch,
) -> Result<(), ResultCode> {
    let view = member_at(sheep, epoch).await?;
    let store = sheep.store.as_ref().ok_or(ResultCode::NO_OBJ)?;
    let (_, size) = sheep.named_replica(replica.oid, replica.strip.unwrap_or(0), &view);
    crate::peer::check_range(offset, data.len() as u64, size)?;
    let _held = sheep.holds.hold(replica.oid).await;
    sheep.gate.drain().await;
    if sheep.intents.is_busy(replica.oid) {
        return Ok(());
    }
    let _pass = sheep.gate.enter(epoch).ok_or(ResultCode::OLD_NODE_VER)?;
    store.write(replica, size, offset, data).await.map_err(|e| fault(sheep, &e))
}

async fn recall(
    sheep: &Arc<Sheep>,
    home: NodeId,
    oid: Oid,
    written: Epoch,
    ids: &[WriteId],
    epoch: Epoch,
) -> Result<Vec<Fate>, ResultCode> {
    let body = OrderRequest { oid, what: order::RECALL, serial: written.0, ..OrderRequest::zeroed() };
    Ok(match ask_about(sheep, home, body, ids, epoch).await? {
        Some(bytes) => bytes.iter().map(|byte| Fate::of(*byte)).collect(),
        // A node of the original remembers nothing.
        None => vec![Fate::Unknown; ids.len()],
    })
}

/// What is to be done with a write that its homes know this of; `None` = all that were asked have it, or do not know.
/// What was decided once holds. Only then counts what its gateway said, which may be of a later attempt at it.
fn verdict(fates: &[Fate]) -> Option<Fate> {
    let any = |fate| fates.contains(&fate);
    match () {
        () if any(Fate::Kept) => Some(Fate::Kept),
        () if any(Fate::Loose) => Some(Fate::Loose),
        () if any(Fate::Undone) => Some(Fate::Undone),
        () if any(Fate::Done) => Some(Fate::Kept),
        () if any(Fate::Absent) => Some(Fate::Undone),
        () => None,
    }
}

/// A home of strips: does what was decided.
pub async fn decide(
    sheep: &Arc<Sheep>,
    oid: Oid,
    fate: Fate,
    ids: &[WriteId],
    written: Epoch,
    epoch: Epoch,
) -> Result<(), ResultCode> {
    let view = member_at(sheep, epoch).await?;
    let Some(store) = sheep.store.as_ref() else { return Ok(()) };
    let _pass = sheep.gate.enter(epoch).ok_or(ResultCode::OLD_NODE_VER)?;
    for id in sheep.intents.newest_first(oid, ids, written) {
        if fate != Fate::Undone && !sheep.intents.is_torn(oid, id, written) {
            note_decision(sheep, oid, id, written, fate)?;
            continue;
        }
        if fate != Fate::Undone {
            // It stands without this home, which was away by then.
            sheep.recovery.lacking.note(oid, written);
        }
        for (replica, offset, old) in sheep.intents.to_undo(oid, id, written) {
            let (_, size) = sheep.named_replica(oid, replica.strip.unwrap_or(0), &view);
            let undone = match store.write(replica, size, offset, old.clone()).await {
                // Since then it has been moved to the stale area, where recovery may read it.
                Err(StoreError::NoObject) => match store.stale_epochs(replica).last() {
                    Some(stale) => store.write_stale(replica, *stale, offset, old).await,
                    None => Ok(()),
                },
                other => other,
            };
            match undone {
                Ok(()) | Err(StoreError::NoObject) => {}
                // A file that cannot be put right is a missing strip: it is computed from the others.
                Err(StoreError::Io(error)) => {
                    tracing::error!("{replica}: a write cannot be undone, giving it up: {error}");
                    match store.remove(replica).await {
                        Err(StoreError::NoObject) => sheep.recovery.lacking.note(oid, written),
                        removed => removed.map_err(|e| fault(sheep, &e))?,
                    }
                }
                Err(error) => return Err(fault(sheep, &error)),
            }
        }
        note_decision(sheep, oid, id, written, Fate::Undone)?;
    }
    if sheep.intents.open_writes(oid).is_empty() && !sheep.intents.is_remembered(oid) {
        sheep.intents.settled(oid);
    }
    Ok(())
}

/// Keeps what was decided.
fn note_decision(
    sheep: &Arc<Sheep>,
    oid: Oid,
    id: WriteId,
    written: Epoch,
    fate: Fate,
) -> Result<(), ResultCode> {
    tracing::debug!("{oid}: {id:?} of epoch {written}: {fate:?}");
    let noted = tokio::task::block_in_place(|| sheep.intents.decided(oid, id, written, fate));
    noted.map_err(|error| unnoted(sheep, oid, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_of_strips_stands_if_every_home_has_it_or_one_knows_that_it_was_done() {
        use Fate::*;
        assert_eq!(verdict(&[Applied, Applied, Unknown]), None);
        assert_eq!(verdict(&[Absent, Done]), Some(Kept), "acknowledged; one home has forgotten it already");
        assert_eq!(verdict(&[Applied, Kept, Loose]), Some(Kept));
        assert_eq!(verdict(&[Applied, Loose, Absent]), Some(Loose));
        assert_eq!(verdict(&[Applied, Absent]), Some(Undone));
        assert_eq!(
            verdict(&[Applied, Undone, Done]),
            Some(Undone),
            "done is what was written in a later epoch"
        );
    }

    #[test]
    fn strips_are_compared_in_whole_units() {
        assert_eq!(differences(&[0; 16], &[0; 16], 4), []);
        let mut other = [0; 20];
        (other[5], other[8], other[19]) = (1, 1, 1);
        assert_eq!(differences(&[0; 20], &other, 4), [4..12, 16..20]);
    }

    #[test]
    fn lists_of_writes_survive_the_wire() {
        let ids = [WriteId { writer: 1, seq: u32::MAX }, WriteId { writer: 2, seq: 3 }];
        assert_eq!(decode_ids(&encode_ids(&ids)), ids);
    }
}
