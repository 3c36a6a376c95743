//! One round: make the list, recover its objects, tell the cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::join_all;
use sheepdog_proto::header::{ObjRequest, OrderRequest, order};
use sheepdog_proto::{
    ClusterFlags, Epoch, Flags, NodeId, NodeRecord, ObjectKind, Oid, Opcode, Request, ResultCode, Wire,
};

use super::object::{Recovered, recover};
use super::pace::{Moment, Pace, Verdict};
use super::{Active, early};
use crate::cluster::worker::Worker;
use crate::peers::Lane;
use crate::sheep::Sheep;
use crate::view::View;

/// Deadline of one object list.
const LIST_DEADLINE: Duration = Duration::from_secs(30);
/// Deadline of the question whether a node has altered copies; above how long it waits for that.
const LEVEL_DEADLINE: Duration = Duration::from_secs(5);
/// First and largest reply buffer of an object list, in bytes.
const LIST_BUFFER: (usize, usize) = (4 << 20, 1 << 30);
/// Pause between passes over objects that could not be recovered, first and longest.
const PASS_PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Objects in flight per disk.
const PER_DISK: usize = 2;
/// So few objects are over before anybody notices: they are not paced.
const FEW: usize = 32;
/// How often a pass looks whether it may begin more, if nothing tells it earlier.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Runs a round to its end. `false` = it was replaced by a newer one.
pub async fn run(sheep: &Arc<Sheep>, worker: &Worker, active: &Arc<Active>) -> bool {
    let Some(store) = sheep.store.clone() else { return !active.is_replaced() };
    worker.fetched().await;
    if !stash(sheep, active).await {
        return false;
    }
    if !level(sheep, active).await {
        return false;
    }
    if !super::lacking::learn(sheep, active).await {
        return false;
    }
    let urgent = tokio::spawn(serve_urgent(sheep.clone(), active.clone()));
    let (listed, known) = tokio::join!(list(sheep, active), early::is_known(sheep, active));
    urgent.abort();
    let Some((oids, fits)) = listed else { return false };
    active.early.store(known, Ordering::Release);
    active.held.store(!fits, Ordering::Release);
    {
        let mut work = active.work.lock();
        work.total = oids.len() as u64;
        work.todo = oids.iter().copied().filter(|oid| !work.done_early.contains(oid)).collect();
        work.queue = oids.into();
        work.listed = true;
    }
    let mut pause = PASS_PAUSE.0;
    loop {
        pass(sheep, active, PER_DISK * store.md_info().len().max(2)).await;
        if active.is_replaced() {
            return false;
        }
        let failed = std::mem::take(&mut active.work.lock().failed);
        if failed.is_empty() {
            break;
        }
        let reason = active.work.lock().reason.clone();
        tracing::warn!(
            "{} objects not recovered yet at epoch {}, among them {reason}",
            failed.len(),
            active.round.epoch
        );
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = active.wake.notified() => {}
        }
        pause = (pause * 2).min(PASS_PAUSE.1);
        active.work.lock().queue.extend(failed);
    }
    while let Err(error) = store.sync_dirs().await {
        tracing::error!("recovery is not complete: {error}");
        tokio::time::sleep(PASS_PAUSE.1).await;
        if active.is_replaced() {
            return false;
        }
    }
    tracing::info!("recovered epoch {}", active.round.epoch);
    !active.is_replaced()
}

/// What the epoch change could not judge yet, and what a change of redundancy or disks left behind. `false` = the round
/// was replaced.
async fn stash(sheep: &Arc<Sheep>, active: &Active) -> bool {
    let (view, _pass) = loop {
        let view = sheep.views.load();
        if view.epoch != active.round.epoch || active.is_replaced() {
            return false;
        }
        match sheep.gate.enter(active.round.epoch) {
            Some(pass) => break (view, pass),
            // Closed for a moment, for a change that is no new epoch or for the next one.
            None => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    // Not as the state of the present epoch: its homes go on writing, and what is put away here does not. Unless objects
    // are to be found wherever they are.
    let before = Epoch(active.round.epoch.0.saturating_sub(1));
    let present = !active.round.tgt_epoch.is_before(active.round.epoch) && !active.round.wildcard;
    let suffix = if present { before } else { active.round.tgt_epoch };
    if let Err(error) = super::stash_strangers(sheep, &view, suffix, false).await {
        tracing::error!("cannot move objects to the stale area, leaving: {error}");
        sheep.cluster.leave();
        return false;
    }
    true
}

/// Waits until no member writes any more to the homes of before copies were altered: what is copied from them would lack
/// it. `false` = the round was replaced.
async fn level(sheep: &Arc<Sheep>, active: &Active) -> bool {
    let view = sheep.views.load();
    if view.alters > 0 {
        let others = view.others(sheep.me);
        join_all(others.map(|node| level_at(sheep, active, node, view.alters))).await;
    }
    !active.is_replaced()
}

async fn level_at(sheep: &Arc<Sheep>, active: &Active, node: NodeId, alters: u32) {
    let body = OrderRequest { what: order::LEVEL, serial: alters, ..OrderRequest::zeroed() };
    let request = Request::new(Opcode::ORDER_PEER).epoch(active.round.epoch).with_order(body);
    while !active.is_replaced() {
        let answer = sheep.peers.call_on(Lane::Control, &node, request, Bytes::new(), LEVEL_DEADLINE).await;
        match answer.map(|reply| reply.response.result) {
            // A node of the original does not count.
            Ok(ResultCode::SUCCESS | ResultCode::INVALID_PARMS) => return,
            Ok(code) => tracing::debug!("{node} may still write to the homes of before: {code}"),
            Err(error) => tracing::debug!("{node} may still write to the homes of before: {error}"),
        }
        tokio::time::sleep(PASS_PAUSE.0).await;
    }
}

/// Announces that this node has everything, until the cluster heard it or the epoch moved on.
pub async fn announce(sheep: &Arc<Sheep>, epoch: Epoch) {
    let view = sheep.views.load();
    let Some(me) = view.info.nodes.iter().find(|n| n.nid == sheep.me) else { return };
    let body = ObjRequest { tgt_epoch: epoch, ..ObjRequest::zeroed() };
    let record = Bytes::copy_from_slice(&me.to_bytes());
    let request =
        Request::new(Opcode::COMPLETE_RECOVERY).flag(Flags::WRITE).length(record.len()).with_obj(body);
    while sheep.views.epoch() == epoch {
        let result = sheep.cluster.submit_internal(request, record.clone()).await.response.result;
        if result.is_ok() {
            return;
        }
        tracing::warn!("cannot announce the end of recovery: {result}");
        tokio::time::sleep(PASS_PAUSE.1).await;
    }
}

/// Metadata first: requests of every VDI depend on it. Then what the fewest nodes have: it is the nearest to being lost.
fn priority(oid: Oid, holders: usize) -> (u8, usize, Oid) {
    let class = match oid.kind() {
        ObjectKind::Inode => 0,
        ObjectKind::Btree | ObjectKind::Attr | ObjectKind::Ledger => 1,
        ObjectKind::Data | ObjectKind::VmState => 2,
    };
    (class, holders, oid)
}

/// The objects of all lists, each once, in the order to recover them.
fn in_order(mut listed: Vec<Oid>) -> Vec<Oid> {
    listed.sort_unstable();
    let groups = listed.chunk_by(|a, b| a == b);
    let mut keys: Vec<_> = groups.map(|group| priority(group[0], group.len())).collect();
    keys.sort_unstable();
    keys.into_iter().map(|(_, _, oid)| oid).collect()
}

/// Every object that this node should hold, in the order to recover them, and whether all nodes have room for what they
/// should hold (`-F`). `None` = the round was replaced.
async fn list(sheep: &Arc<Sheep>, active: &Active) -> Option<(Vec<Oid>, bool)> {
    let view = sheep.views.load();
    let mut oids: Vec<Oid> = Vec::new();
    let mut all = view.flags.contains(ClusterFlags::AVOID_DISKFULL).then(BTreeSet::new);
    for node in view.members() {
        if node.nr_vnodes == 0 && node.space == 0 {
            continue;
        }
        let theirs = list_of(sheep, active, node).await?;
        if let Some(all) = &mut all {
            all.extend(theirs.iter().copied().filter(|oid| oid.is_data()));
        }
        oids.extend(theirs.into_iter().filter(|oid| sheep.is_home(*oid, &view)));
    }
    let mut fits = true;
    for node in all.iter().flat_map(|all| too_small(sheep, &view, all)) {
        fits = false;
        tracing::error!("node {node} will cause disk full, stopping whole cluster");
    }
    if !fits {
        tracing::error!("canceling recovery because of disk full");
        tracing::error!("please add a new node ASAP");
    }
    // Nodes that left the ring but still run hold objects, too; their absence shows as unreachable homes later.
    Some((in_order(oids), fits))
}

/// The nodes whose announced space is less than the data objects of which they are homes (spec 06, 10.14).
fn too_small(sheep: &Sheep, view: &View, data: &BTreeSet<Oid>) -> Vec<NodeId> {
    let mut needed: BTreeMap<NodeId, u64> = BTreeMap::new();
    for oid in data {
        let (_, bytes) = sheep.named_replica(*oid, 0, view);
        for home in view.ring.nodes_of(*oid, sheep.copies_of(*oid, view).into()) {
            *needed.entry(home.nid).or_default() += bytes;
        }
    }
    let space = |nid: &NodeId| view.members().iter().find(|n| n.nid == *nid).map_or(0, |n| n.space);
    needed.into_iter().filter(|(nid, bytes)| *bytes > space(nid)).map(|(nid, _)| nid).collect()
}

async fn list_of(sheep: &Arc<Sheep>, active: &Active, node: &NodeRecord) -> Option<Vec<Oid>> {
    if node.nid == sheep.me {
        return sheep.store.as_ref().map(|s| s.list().into_iter().chain(sheep.early.oids()).collect());
    }
    let mut pause = PASS_PAUSE.0;
    loop {
        if active.is_replaced() {
            return None;
        }
        match ask_list(sheep, &node.nid, active.round.epoch).await {
            Ok(list) => return Some(list),
            Err(error) => tracing::warn!("cannot get object list from {}, trying again: {error}", node.nid),
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = active.wake.notified() => {}
        }
        pause = (pause * 2).min(PASS_PAUSE.1);
    }
}

async fn ask_list(sheep: &Arc<Sheep>, node: &NodeId, epoch: Epoch) -> Result<Vec<Oid>, String> {
    let mut capacity = LIST_BUFFER.0;
    loop {
        let request = Request::new(Opcode::GET_OBJ_LIST).epoch(epoch).length(capacity);
        let reply = sheep.peers.call(node, request, Bytes::new(), LIST_DEADLINE).await;
        let reply = reply.map_err(|e| e.to_string())?;
        match reply.response.result {
            ResultCode::SUCCESS => return Ok(reply.data.chunks_exact(8).map(Oid::get).collect()),
            ResultCode::BUFFER_SMALL if capacity < LIST_BUFFER.1 => capacity *= 2,
            code => return Err(code.to_string()),
        }
    }
}

/// Recovers objects that requests wait for, until aborted.
async fn serve_urgent(sheep: Arc<Sheep>, active: Arc<Active>) {
    loop {
        let next = active.work.lock().urgent.pop_front();
        match next {
            Some(oid) => {
                let (sheep, active) = (sheep.clone(), active.clone());
                // In a task of its own: an abort of this loop must not interrupt a copy half way.
                tokio::spawn(async move { one(&sheep, &active, oid).await });
            }
            None => active.wake.notified().await,
        }
        if active.is_replaced() {
            return;
        }
    }
}

/// The next object that a request waits for.
fn next_urgent(active: &Active) -> Option<Oid> {
    active.work.lock().urgent.pop_front()
}

/// The next object of the list, unless recovery is disabled.
fn next(sheep: &Sheep, active: &Active) -> Option<Oid> {
    if sheep.views.load().disable_recovery || active.held.load(Ordering::Acquire) {
        return None;
    }
    let mut work = active.work.lock();
    loop {
        let oid = work.queue.pop_front()?;
        if work.todo.contains(&oid) {
            return Some(oid);
        }
    }
}

/// One pass over the queue with at most `width` objects in flight, and as many that requests wait for. Returns when
/// nothing is left to begin and nothing is in flight; while recovery is disabled it keeps serving what requests ask for.
async fn pass(sheep: &Arc<Sheep>, active: &Arc<Active>, width: usize) {
    let mut flying = tokio::task::JoinSet::new();
    let mut asked = tokio::task::JoinSet::new();
    let mut pace = Pace::default();
    loop {
        // Neither paced nor behind what nobody waits for.
        while asked.len() < width && !active.is_replaced() {
            let Some(oid) = next_urgent(active) else { break };
            let (sheep, active) = (sheep.clone(), active.clone());
            asked.spawn(async move { one(&sheep, &active, oid).await });
        }
        // Recovery may be enabled again without anybody telling this round.
        let mut look_again = Instant::now() + LOOK_AGAIN;
        while !active.is_replaced() {
            let now = Instant::now();
            let many = active.work.lock().todo.len() > FEW;
            let clients = if many { sheep.stats.clients.about(now) } else { None };
            let limits = sheep.recovery.throttling();
            match pace.verdict(&Moment { now, limits, clients, flying: flying.len(), width }) {
                Verdict::Begin => {}
                Verdict::Wait(until) => {
                    look_again = look_again.min(until);
                    break;
                }
                Verdict::Full => break,
            }
            let Some(oid) = next(sheep, active) else { break };
            pace.begun(now);
            let (sheep, active) = (sheep.clone(), active.clone());
            flying.spawn(async move {
                one(&sheep, &active, oid).await;
                now.elapsed()
            });
        }
        if active.is_replaced() {
            flying.detach_all();
            asked.detach_all();
            return;
        }
        if flying.is_empty() && asked.is_empty() && active.work.lock().is_all_begun() {
            return;
        }
        tokio::select! {
            Some(ended) = flying.join_next() => pace.ended(Instant::now(), ended.unwrap_or_default()),
            Some(_) = asked.join_next() => {}
            () = active.wake.notified() => {}
            () = tokio::time::sleep_until(look_again.into()) => {}
        }
    }
}

async fn one(sheep: &Arc<Sheep>, active: &Arc<Active>, oid: Oid) {
    let _alone = active.alone.turn(oid, 0..1, true).await;
    let recovered = recover(sheep, active, oid).await;
    active.note_fruitless(oid, matches!(recovered, Recovered::TooFew(_)));
    let reason = match recovered {
        Recovered::Here => return active.done(oid),
        Recovered::Nowhere => {
            active.done(oid);
            return early::forget(sheep, oid).await;
        }
        // The gate was closed for a moment without a new epoch: the object is still to do.
        Recovered::Replaced if !active.is_replaced() => {
            if !put_off(active, oid, None) {
                active.work.lock().urgent.push_back(oid);
            }
            return;
        }
        Recovered::Replaced => return,
        Recovered::Later(reason) => reason,
        Recovered::TooFew(n) => format!("only {n} strips are left"),
    };
    tracing::debug!("{oid} is not recovered yet: {reason}");
    if !put_off(active, oid, Some(reason)) {
        tokio::time::sleep(PASS_PAUSE.0).await;
        active.work.lock().urgent.push_back(oid);
        active.wake.notify_one();
    }
}

/// Leaves an object to the next pass; `false` if there is no list yet that it could be on. With a reason it is not to be
/// had for now.
fn put_off(active: &Active, oid: Oid, unfound: Option<String>) -> bool {
    let mut work = active.work.lock();
    if let Some(reason) = unfound {
        work.unfound.insert(oid);
        work.reason = format!("{oid}: {reason}");
    }
    if !work.listed {
        return false;
    }
    if !work.todo.contains(&oid) {
        // Nobody lists it: it does not exist, and who waits for it may know.
        drop(work);
        active.done(oid);
    } else if !work.failed.contains(&oid) {
        work.failed.push(oid);
    }
    true
}

#[cfg(test)]
mod tests {
    use sheepdog_proto::VdiId;

    use super::*;

    #[test]
    fn metadata_comes_first_then_what_the_fewest_nodes_have() {
        let vid = VdiId::new(7);
        let (inode, ledger) = (Oid::inode(vid), Oid::ledger_of(Oid::data(vid, 1)));
        let [common, rare, lone] = [1, 2, 3].map(|index| Oid::data(vid, index));
        let lists = vec![common, inode, rare, common, lone, inode, ledger, rare, common, inode];
        assert_eq!(in_order(lists), [inode, ledger, lone, rare, common]);
    }
}
