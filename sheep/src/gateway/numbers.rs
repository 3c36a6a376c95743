//! Numbers of this gateway's writes, and telling homes which of them are done (spec 06, 15.1 A3).
//!
//! Every write carries a number. Homes remember it until they are told that the write is done: on all homes, or undone
//! on all. What is not done when an epoch ends may be on some homes only ([`crate::settle`]).

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use sheepdog_proto::header::{OrderRequest, order};
use sheepdog_proto::{Epoch, Flags, NodeId, Opcode, Request, ResultCode};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::intents::WriteId;
use crate::peers::Lane;
use crate::sheep::Sheep;
use crate::view::View;

/// Between a write's end and telling homes of it; others that end meanwhile are told along with it.
const TELL_AFTER: Duration = Duration::from_millis(30);
/// A write that ended without a known outcome counts as done when its epoch is over and this has passed: by then it was
/// settled.
const FORGET_AFTER: Duration = Duration::from_secs(60);
/// What could not be told is tried again after this.
const AGAIN_AFTER: Duration = Duration::from_secs(5);
/// Deadline of telling one home.
const DEADLINE: Duration = Duration::from_secs(5);

#[derive(Default)]
struct State {
    last: u32,
    outstanding: BTreeSet<u32>,
    abandoned: Vec<(Instant, Epoch, u32)>,
    /// Homes written to since they were told last.
    untold: HashSet<NodeId>,
    /// Nodes of the original, which need not know.
    deaf: HashSet<NodeId>,
}

/// See the module's documentation.
pub struct Numbers {
    /// This process.
    writer: u32,
    state: Mutex<State>,
    ended: Notify,
}

impl Default for Numbers {
    fn default() -> Numbers {
        // 0 is what the original sends.
        Numbers { writer: rand::random_range(1..=u32::MAX), state: Mutex::default(), ended: Notify::new() }
    }
}

/// The number of a write in progress. Dropped without [`Number::done`], the outcome is unknown.
pub struct Number {
    id: WriteId,
    sheep: Arc<Sheep>,
    sent: AtomicBool,
    over: bool,
}

impl Number {
    /// What homes know the write by; from here on some may have it.
    pub fn send(&self) -> WriteId {
        self.sent.store(true, Ordering::Release);
        self.id
    }

    /// Whether a home may have it.
    pub fn is_sent(&self) -> bool {
        self.sent.load(Ordering::Acquire)
    }

    /// All homes have the write, or none has it.
    pub fn done(mut self) {
        self.over = true;
        let numbers = &self.sheep.gateway.numbers;
        numbers.state.lock().outstanding.remove(&self.id.seq);
        numbers.ended.notify_one();
    }
}

impl Drop for Number {
    fn drop(&mut self) {
        if !self.over {
            let mut state = self.sheep.gateway.numbers.state.lock();
            state.abandoned.push((Instant::now(), self.sheep.views.epoch(), self.id.seq));
        }
    }
}

impl Numbers {
    /// Begins a write.
    pub fn begin(&self, sheep: &Arc<Sheep>) -> Number {
        let mut state = self.state.lock();
        state.last = state.last.wrapping_add(1);
        if state.last == 0 {
            state.last = 1; // 0 is what the original sends
        }
        let seq = state.last;
        state.outstanding.insert(seq);
        Number {
            id: WriteId { writer: self.writer, seq },
            sheep: sheep.clone(),
            sent: AtomicBool::new(false),
            over: false,
        }
    }

    /// `node` gets a write.
    pub fn touch(&self, node: NodeId) {
        let mut state = self.state.lock();
        if !state.deaf.contains(&node) {
            state.untold.insert(node);
        }
    }

    /// What homes are to be told: the highest number given out and those up to it that are not done.
    fn news(&self, view: &View) -> (u32, Vec<u32>, HashSet<NodeId>) {
        let mut state = self.state.lock();
        let now = Instant::now();
        let State { abandoned, outstanding, untold, deaf, .. } = &mut *state;
        let before = abandoned.len();
        abandoned.retain(|(at, epoch, seq)| {
            let keep = now.duration_since(*at) < FORGET_AFTER || *epoch == view.epoch;
            if !keep {
                outstanding.remove(seq);
            }
            keep
        });
        if abandoned.len() < before {
            untold.extend(view.members().iter().map(|n| n.nid).filter(|node| !deaf.contains(node)));
        }
        // Homes that were written to are told until nothing is open: what is now will end without touching them again.
        let homes = if state.outstanding.is_empty() {
            std::mem::take(&mut state.untold)
        } else {
            state.untold.clone()
        };
        (state.last, state.outstanding.iter().copied().collect(), homes)
    }
}

/// Tells homes what is done, for ever.
pub async fn run(sheep: Arc<Sheep>) {
    loop {
        if tokio::time::timeout(AGAIN_AFTER, sheep.gateway.numbers.ended.notified()).await.is_ok() {
            tokio::time::sleep(TELL_AFTER).await;
        }
        tell(&sheep);
    }
}

fn tell(sheep: &Arc<Sheep>) {
    let numbers = &sheep.gateway.numbers;
    let view = sheep.views.load();
    let (last, open, nodes) = numbers.news(&view);
    if last == 0 {
        return; // nothing was ever written here
    }
    sheep.intents.done(numbers.writer, last, &open);
    let mut payload = numbers.writer.to_le_bytes().to_vec();
    payload.extend(open.iter().flat_map(|seq| seq.to_le_bytes()));
    let payload = Bytes::from(payload);
    let body = OrderRequest { what: order::DONE, serial: last, ..OrderRequest::zeroed() };
    let request = Request::new(Opcode::ORDER_PEER).flag(Flags::WRITE).with_order(body);
    for node in nodes.into_iter().filter(|n| *n != sheep.me) {
        let (sheep, payload) = (sheep.clone(), payload.clone());
        tokio::spawn(async move {
            let answer = sheep.peers.call_on(Lane::Control, &node, request, payload, DEADLINE).await;
            let numbers = &sheep.gateway.numbers;
            match answer.map(|reply| reply.response.result) {
                Ok(ResultCode::INVALID_PARMS) => {
                    numbers.state.lock().deaf.insert(node);
                }
                Ok(_) => {}
                // It is told with the next ones.
                Err(_) if sheep.views.load().is_member(&node) => numbers.touch(node),
                Err(_) => {}
            }
        });
    }
}
