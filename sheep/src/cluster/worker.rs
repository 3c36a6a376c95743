//! The ordered worker: fetches of VDI tables and work parts of cluster operations, one after another.
//!
//! They share one queue so that a VDI is never looked up or created between a node's join and the arrival of its table
//! (spec 04, 5.6).

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sheepdog_client::Reply;
use sheepdog_proto::header::CheckpointRequest;
use sheepdog_proto::{Epoch, NodeId, Opcode, Request, Response, ResultCode, VdiId, VdiState, Wire};
use tokio::sync::{mpsc, watch};

use super::handle::Command;
use crate::dispatch;
use crate::sheep::Sheep;
use crate::vdi::locks::Lock;

/// Deadline of one fetch.
const FETCH_DEADLINE: Duration = Duration::from_secs(5);
/// Attempts to fetch a joiner's table; a joiner tries for as long as the other is a member.
const MEMBER_ATTEMPTS: usize = 3;
/// Rounds of asking for the lock states of an epoch; members may not have reached it yet.
const LOCK_ATTEMPTS: u32 = 7;
/// First reply buffer, in records.
const FIRST_RECORDS: usize = 512;
/// Largest reply buffer: a record for every possible VDI would be 24 GB; this holds a million.
const MAX_RECORDS: usize = 1 << 20;

/// One piece of work.
pub enum Work {
    /// Fetch these nodes' tables; they are joiners' if the flag says so.
    Fetch(Vec<NodeId>, bool),
    /// Learn the lock states as of an epoch and report to the cluster task.
    CollectLocks(Epoch),
    /// Run the work part of an operation and report to the cluster task, unless the mutex was lost more often than this.
    Operation(u64, Request, Bytes),
}

/// The queue's entrance.
#[derive(Clone)]
pub struct Worker {
    queue: mpsc::UnboundedSender<Work>,
    fetches: watch::Sender<usize>,
    /// How often the mutex was lost with the session.
    losses: watch::Sender<u64>,
}

impl Worker {
    /// The worker and its queue's other end, for [`run`].
    pub fn new() -> (Worker, mpsc::UnboundedReceiver<Work>) {
        let (queue, receiver) = mpsc::unbounded_channel();
        (Worker { queue, fetches: watch::Sender::new(0), losses: watch::Sender::new(0) }, receiver)
    }

    /// Queues work. At most one operation and one fetch per membership event are ever queued.
    pub fn push(&self, work: Work) {
        if matches!(work, Work::Fetch(..)) {
            self.fetches.send_modify(|n| *n += 1);
        }
        let _ = self.queue.send(work);
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

    /// Waits until every fetch queued so far has been done.
    pub async fn fetched(&self) {
        // The sender lives in self.
        let _ = self.fetches.subscribe().wait_for(|n| *n == 0).await;
    }
}

/// Works the queue off, for ever.
pub async fn run(sheep: Arc<Sheep>, worker: Worker, mut queue: mpsc::UnboundedReceiver<Work>) {
    // What came while an operation ran and does not go beside it.
    let mut behind = VecDeque::new();
    loop {
        let next = match behind.pop_front() {
            Some(work) => Some(work),
            None => queue.recv().await,
        };
        let Some(work) = next else { return };
        match work {
            Work::Fetch(nodes, joiners) => {
                for node in nodes {
                    fetch(&sheep, node, joiners).await;
                }
                if !joiners {
                    sheep.tables.send_replace(true);
                }
                worker.fetches.send_modify(|n| *n -= 1);
            }
            Work::CollectLocks(epoch) => {
                collect_locks(&sheep, epoch).await;
                sheep.cluster.send(Command::LocksCollected);
            }
            Work::Operation(losses, request, payload) => {
                let mut lost = worker.losses.subscribe();
                // In a task of its own: should it panic, the cluster must not stay blocked.
                let mut work = tokio::spawn({
                    let sheep = sheep.clone();
                    async move { operation(&sheep, request, payload).await }
                });
                let lost = async {
                    // The sender lives in `worker`.
                    let _ = lost.wait_for(|n| *n != losses).await;
                };
                tokio::pin!(lost);
                let done = loop {
                    tokio::select! {
                        biased;
                        () = &mut lost => {
                            tracing::warn!("{} is abandoned: the session was lost", request.opcode);
                            work.abort();
                            break work.await;
                        }
                        done = &mut work => break done,
                        Some(next) = queue.recv() => match next {
                            // The operation may wait for an object whose recovery waits for this table.
                            Work::Fetch(nodes, true) if behind.is_empty() => {
                                for node in nodes {
                                    fetch(&sheep, node, true).await;
                                }
                                worker.fetches.send_modify(|n| *n -= 1);
                            }
                            next => behind.push_back(next),
                        },
                    }
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

async fn fetch(sheep: &Arc<Sheep>, node: NodeId, joiner: bool) {
    let mut attempt = 0;
    loop {
        match fetch_once(sheep, node).await {
            Ok(records) => {
                records.iter().for_each(|r| sheep.vdis.add_record(r, joiner));
                let epoch = sheep.views.epoch();
                tokio::task::block_in_place(|| {
                    records.iter().for_each(|r| sheep.recovery.altered.learn(r, epoch));
                });
                return;
            }
            Err(error) => {
                attempt += 1;
                let gone = !sheep.views.load().is_member(&node);
                if gone || (joiner && attempt >= MEMBER_ATTEMPTS) {
                    tracing::error!("failed to get vdi bitmap from {node}: {error}");
                    return;
                }
                tokio::time::sleep(Duration::from_millis(100 << attempt.min(5))).await;
            }
        }
    }
}

async fn fetch_once(sheep: &Arc<Sheep>, node: NodeId) -> Result<Vec<VdiState>, String> {
    let mut capacity = FIRST_RECORDS;
    loop {
        let request = Request::new(Opcode::GET_VDI_COPIES).length(capacity * VdiState::LEN);
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
    let others: Vec<NodeId> = view.members().iter().map(|n| n.nid).filter(|n| *n != sheep.me).collect();
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
            match fetch_once(sheep, *node).await {
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
