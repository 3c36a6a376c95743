//! The ordered worker: fetches of VDI tables and work parts of cluster operations, one after another.
//!
//! No operation begins between a node's join and the arrival of its table, so that no VDI is looked up or created meanwhile
//! (spec 04, 5.6). The tables of joiners do not wait for an operation that has begun, though: recovery waits for them, and the
//! operation may wait for an object that is to be recovered here.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sheepdog_client::Reply;
use sheepdog_proto::header::{CheckpointRequest, ObjRequest};
use sheepdog_proto::{Epoch, NodeId, Opcode, Request, Response, ResultCode, VdiId, VdiState, Wire};
use tokio::sync::{mpsc, watch};

use super::handle::Command;
use super::state::Tables;
use crate::dispatch;
use crate::sheep::Sheep;
use crate::vdi::locks::Lock;

/// Deadline of one fetch.
const FETCH_DEADLINE: Duration = Duration::from_secs(5);
/// Attempts to fetch a joiner's table.
const MEMBER_ATTEMPTS: usize = 3;
/// Rounds of asking for the lock states of an epoch; members may not have reached it yet.
const LOCK_ATTEMPTS: u32 = 7;
/// First reply buffer, in records.
const FIRST_RECORDS: usize = 512;
/// Largest reply buffer: a record for every possible VDI would be 24 GB; this holds a million.
const MAX_RECORDS: usize = 1 << 20;

/// One piece of work.
pub enum Work {
    /// Fetch the tables of these members, as of the epoch in which this node joined.
    Fetch(Vec<NodeId>, Epoch),
    /// Learn the lock states as of an epoch and report to the cluster task.
    CollectLocks(Epoch),
    /// Run the work part of an operation and report to the cluster task, unless the mutex was lost more often than this.
    Operation(u64, Request, Bytes),
}

/// The queue's entrance.
#[derive(Clone)]
pub struct Worker {
    queue: mpsc::UnboundedSender<Work>,
    /// Fetches of the members' tables to be done: more than one if this node joined again in between.
    joins: watch::Sender<usize>,
    /// Nodes that joined and whose tables are to be fetched.
    joiners: mpsc::UnboundedSender<NodeId>,
    /// How many they are.
    waiting: watch::Sender<usize>,
    /// How often the mutex was lost with the session.
    losses: watch::Sender<u64>,
}

impl Worker {
    /// The worker and its queues' other ends, for [`run`].
    pub fn new() -> (Worker, Queues) {
        let (queue, work) = mpsc::unbounded_channel();
        let (joiners, joined) = mpsc::unbounded_channel();
        let [joins, waiting] = [0, 0].map(watch::Sender::new);
        let worker = Worker { queue, joins, joiners, waiting, losses: watch::Sender::new(0) };
        (worker, Queues { work, joined })
    }

    /// Queues work. At most one operation and one fetch per membership event are ever queued.
    pub fn push(&self, work: Work) {
        let _ = self.queue.send(work);
    }

    /// Fetches VDI tables; those of the members after [`Worker::joined`].
    pub fn fetch(&self, tables: Tables) {
        match tables {
            Tables::OfMembers(nodes, joined) => self.push(Work::Fetch(nodes, joined)),
            Tables::OfJoiner(node) => {
                self.waiting.send_modify(|n| *n += 1);
                let _ = self.joiners.send(node);
            }
        }
    }

    /// This node has joined and is about to queue a fetch of the members' tables: until that is done, and no later one is
    /// to be, requests that need them wait.
    pub fn joined(&self, sheep: &Sheep) {
        self.joins.send_modify(|n| {
            *n += 1;
            sheep.tables.send_replace(false);
            sheep.vdis.expect_records();
        });
    }

    fn tables_fetched(&self, sheep: &Sheep) {
        // At once with the counting: this node may be joining again.
        self.joins.send_modify(|n| {
            *n -= 1;
            if *n == 0 {
                sheep.vdis.records_arrived();
                sheep.tables.send_replace(true);
            }
        });
    }

    /// Ends operations whose mutex is lost: others may change the same VDIs from now on. An operation that went on would
    /// also wait for ever, for tables whose fetch stands behind it in the queue.
    pub fn abandon(&self) {
        self.losses.send_modify(|n| *n += 1);
    }

    /// Queues an operation under the mutex that this node has now.
    pub fn operate(&self, request: Request, payload: Bytes) {
        self.push(Work::Operation(*self.losses.borrow(), request, payload));
    }

    /// Waits until every fetch asked for so far has been done.
    pub async fn fetched(&self) {
        // The senders live in self.
        let _ = self.joins.subscribe().wait_for(|n| *n == 0).await;
        self.joiners_fetched().await;
    }

    async fn joiners_fetched(&self) {
        let _ = self.waiting.subscribe().wait_for(|n| *n == 0).await;
    }
}

/// The other ends of a worker's queues.
pub struct Queues {
    work: mpsc::UnboundedReceiver<Work>,
    joined: mpsc::UnboundedReceiver<NodeId>,
}

/// Works the queues off, for ever.
pub async fn run(sheep: Arc<Sheep>, worker: Worker, queues: Queues) {
    let Queues { work: mut queue, mut joined } = queues;
    tokio::spawn({
        let (sheep, worker) = (sheep.clone(), worker.clone());
        async move {
            while let Some(node) = joined.recv().await {
                fetch_of_joiner(&sheep, node).await;
                worker.waiting.send_modify(|n| *n -= 1);
            }
        }
    });
    while let Some(work) = queue.recv().await {
        match work {
            Work::Fetch(nodes, joined) => {
                for node in nodes {
                    fetch_of_member(&sheep, &worker, node, joined).await;
                }
                worker.tables_fetched(&sheep);
            }
            Work::CollectLocks(epoch) => {
                collect_locks(&sheep, epoch).await;
                sheep.cluster.send(Command::LocksCollected);
            }
            Work::Operation(losses, request, payload) => {
                let mut lost = worker.losses.subscribe();
                // In a task of its own: should it panic, the cluster must not stay blocked.
                let mut work = tokio::spawn({
                    let (sheep, worker) = (sheep.clone(), worker.clone());
                    async move {
                        worker.joiners_fetched().await;
                        operation(&sheep, request, payload).await
                    }
                });
                let lost = async {
                    // The sender lives in `worker`.
                    let _ = lost.wait_for(|n| *n != losses).await;
                };
                let done = tokio::select! {
                    biased;
                    () = lost => {
                        tracing::warn!("{} is abandoned: the session was lost", request.opcode);
                        work.abort();
                        work.await
                    }
                    done = &mut work => done,
                };
                let failed = |_| Reply::empty(Response::to(&request, ResultCode::SYSTEM_ERROR));
                let reply = done.unwrap_or_else(failed);
                sheep.cluster.send(Command::WorkDone(reply));
            }
        }
    }
}

async fn operation(sheep: &Arc<Sheep>, request: Request, payload: Bytes) -> Reply {
    match dispatch::work_part(request.opcode) {
        Some(work) => work(sheep, request, payload).await,
        None => Reply::empty(Response::to(&request, ResultCode::SYSTEM_ERROR)),
    }
}

/// Adds what another node knows of VDIs.
fn learn(sheep: &Sheep, records: &[VdiState], joiner: bool) {
    records.iter().for_each(|r| sheep.vdis.add_record(r, joiner));
    let epoch = sheep.views.epoch();
    tokio::task::block_in_place(|| records.iter().for_each(|r| sheep.recovery.altered.learn(r, epoch)));
}

/// What a member takes from a joiner adds to what it knows, and may be missing.
async fn fetch_of_joiner(sheep: &Arc<Sheep>, node: NodeId) {
    for attempt in 1.. {
        match fetch_once(sheep, node, Epoch(0)).await {
            Ok(records) => return learn(sheep, &records, true),
            Err(error) if attempt >= MEMBER_ATTEMPTS || !sheep.views.load().is_member(&node) => {
                return tracing::error!("failed to get vdi bitmap from {node}: {error}");
            }
            Err(_) => pause(attempt).await,
        }
    }
}

/// Learns what `node`, a member when this node joined, knows of VDIs. This node sees the events since its join; those before it
/// are in the table of a member that has come as far in the order of events. One that has not does not answer, and is asked
/// again as long as it is a member: a VDI whose NEW_VDI neither arrives as an event nor as an in-use bit would make this node
/// end the probing of its name earlier than others do, for good.
///
/// Nobody waits for ever. A member's answer depends on how far its cluster task is and on nothing else: not on whether it has
/// the tables of others itself, so that two nodes that collect tables answer each other. The cluster task never waits for
/// tables: it queues fetches here, and a write gets its pass, for whose end the task waits, after the tables have come
/// (`peer.rs`). A member that comes no further ends as a member, or this node does.
///
/// A member that joined again later, or has not all tables yet, answers with what it has: whatever was said before this node
/// joined is known to those that have been members since, which are asked, too. If there are none, what nobody knows is no VDI.
async fn fetch_of_member(sheep: &Arc<Sheep>, worker: &Worker, node: NodeId, joined: Epoch) {
    for attempt in 1.. {
        match fetch_once(sheep, node, joined).await {
            Ok(records) => return learn(sheep, &records, false),
            Err(error) if !sheep.views.load().is_member(&node) => {
                return tracing::error!("failed to get vdi bitmap from {node}: {error}");
            }
            // It joined again meanwhile: what it needs is fetched next, from those who are members now.
            Err(_) if *worker.joins.borrow() > 1 => return,
            Err(error) => {
                tracing::debug!("{node}: no VDI table as of epoch {joined}: {error}");
                pause(attempt).await;
            }
        }
    }
}

async fn pause(attempt: usize) {
    tokio::time::sleep(Duration::from_millis(50 << attempt.min(6))).await;
}

/// The records of a node that has reached `epoch`.
async fn fetch_once(sheep: &Arc<Sheep>, node: NodeId, epoch: Epoch) -> Result<Vec<VdiState>, String> {
    let mut capacity = FIRST_RECORDS;
    loop {
        let body = ObjRequest { tgt_epoch: epoch, ..Default::default() };
        let request = Request::new(Opcode::GET_VDI_COPIES).length(capacity * VdiState::LEN).with_obj(body);
        let reply = sheep.peers.call(&node, request, Bytes::new(), FETCH_DEADLINE).await;
        let reply = reply.map_err(|e| e.to_string())?;
        match reply.response.result {
            ResultCode::SUCCESS => {
                return Ok(reply.data.chunks_exact(VdiState::LEN).map(VdiState::get).collect());
            }
            ResultCode::BUFFER_SMALL if capacity < MAX_RECORDS => capacity *= 2,
            code => return Err(code.to_string()),
        }
    }
}

/// Asks the members for the lock state of every VDI. Until all are learned this node admits no lock: one that nobody has told
/// yet may be held.
async fn collect_locks(sheep: &Arc<Sheep>, epoch: Epoch) {
    let view = sheep.views.load();
    let others: Vec<NodeId> = view.others(sheep.me).collect();
    let mut now = None;
    for vid in sheep.vdis.vids() {
        let told = match &now {
            None => lock_state(sheep, &others, epoch, vid).await,
            Some(_) => Told::Forgotten,
        };
        let record = match told {
            Told::Record(record) => Some(*record),
            Told::Unknown => None,
            Told::Forgotten => {
                if now.is_none() {
                    now = Some(present_states(sheep, &others).await);
                }
                now.as_ref().and_then(|all| all.get(&vid)).copied()
            }
        };
        if let Some(record) = record {
            sheep.vdis.with_lock(vid, |lock| *lock = Lock::from_record(&record));
        }
    }
    for node in others {
        let body = CheckpointRequest { get: 0, tgt_epoch: epoch, vid: VdiId::NONE };
        let request = Request::new(Opcode::VDI_STATE_CHECKPOINT_CTL).with_checkpoint(body);
        if let Err(error) = sheep.peers.call(&node, request, Bytes::new(), FETCH_DEADLINE).await {
            tracing::debug!("{node}: checkpoint not freed: {error}");
        }
    }
}

/// What is known of a VDI's lock at an epoch.
enum Told {
    Record(Box<VdiState>),
    /// No member knows the VDI.
    Unknown,
    /// Members have given the state of that epoch up: they keep a few.
    Forgotten,
}

async fn lock_state(sheep: &Arc<Sheep>, nodes: &[NodeId], epoch: Epoch, vid: VdiId) -> Told {
    let body = CheckpointRequest { get: 1, tgt_epoch: epoch, vid };
    let request = Request::new(Opcode::VDI_STATE_CHECKPOINT_CTL).length(VdiState::LEN).with_checkpoint(body);
    for attempt in 0.. {
        let (mut again, mut silent) = (false, false);
        for node in members_of(sheep, nodes) {
            let Ok(reply) = sheep.peers.call(&node, request, Bytes::new(), FETCH_DEADLINE).await else {
                silent = true;
                continue;
            };
            match reply.response.result {
                ResultCode::SUCCESS => {
                    if let Ok(record) = VdiState::decode(&reply.data) {
                        return Told::Record(Box::new(record));
                    }
                    tracing::error!("{node}: {} bytes are no lock state", reply.data.len());
                }
                ResultCode::NO_CHECKPOINT_ENTRY => {}
                _ => again = true,
            }
        }
        match (again, silent) {
            (false, false) => return Told::Unknown,
            (true, _) if attempt >= LOCK_ATTEMPTS => return Told::Forgotten,
            // Whoever does not answer is about to leave.
            _ => tokio::time::sleep(Duration::from_millis(50 << attempt.min(5))).await,
        }
    }
    unreachable!("the loop has no end")
}

/// The states as they are now, of the first member that tells them. What has changed since the epoch is in this node's own
/// list of changes, too, which ends with the same state when it is played on top.
async fn present_states(sheep: &Arc<Sheep>, nodes: &[NodeId]) -> HashMap<VdiId, VdiState> {
    loop {
        let members = members_of(sheep, nodes);
        for node in &members {
            match fetch_once(sheep, *node, Epoch(0)).await {
                Ok(records) => return records.into_iter().map(|record| (record.vid, record)).collect(),
                Err(error) => tracing::warn!("failed to get lock states from {node}: {error}"),
            }
        }
        if members.is_empty() {
            return HashMap::new();
        }
        tokio::time::sleep(FETCH_DEADLINE / 10).await;
    }
}

/// Those of the nodes that are members still.
fn members_of(sheep: &Sheep, nodes: &[NodeId]) -> Vec<NodeId> {
    let view = sheep.views.load();
    nodes.iter().copied().filter(|node| view.is_member(node)).collect()
}
