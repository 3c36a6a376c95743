//! Numbers of this gateway's writes, and telling homes which of them are done (spec 06, 15.1 A3).
//!
//! Every write carries a number. Homes remember it until they are told that the write is done: on all homes, or undone
//! on all. What is not done when an epoch ends may be on some homes only ([`crate::settle`]).

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use parking_lot::Mutex;
use sheepdog_proto::header::{OrderRequest, order};
use sheepdog_proto::{Epoch, Flags, NodeId, Opcode, Request, Response, ResultCode};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::intents::WriteId;
use crate::peers::Lane;
use crate::sheep::Sheep;
use crate::view::View;

/// Between a write's end and telling homes of it; others that end meanwhile are told along with it.
const TELL_AFTER: Duration = Duration::from_millis(30);
/// A write that ended without a known outcome counts as done when its epoch is over, this has passed, and no member has
/// anything of it that is not settled.
const FORGET_AFTER: Duration = Duration::from_secs(60);
/// What could not be told is tried again after this.
const AGAIN_AFTER: Duration = Duration::from_secs(5);
/// So long others wait until a home is told that did not answer before.
const TELL_LIMIT: Duration = Duration::from_millis(500);
/// Deadline of telling one home.
const DEADLINE: Duration = Duration::from_secs(5);

#[derive(Default)]
struct State {
    last: u32,
    outstanding: BTreeSet<u32>,
    abandoned: Vec<(Instant, Epoch, u32)>,
    /// Of outstanding writes: the epoch in which all homes had it.
    succeeded: HashMap<u32, Epoch>,
    /// Of outstanding writes: attempts up to this epoch count as failed.
    barred: HashMap<u32, Epoch>,
    /// Homes that do not know of everything that is done, with a mark of their latest write.
    untold: HashMap<NodeId, u64>,
    /// The last mark given.
    marks: u64,
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

/// What the homes of a write may take for granted about an attempt at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Outcome {
    /// It was not written through this gateway.
    Unknown = 0,
    /// All homes had it; it may be acknowledged.
    Acknowledged = 1,
    /// It is not acknowledged for what was written in that epoch, and will not be.
    Failed = 2,
}

impl Outcome {
    /// From a byte of an answer.
    pub fn of(byte: u8) -> Outcome {
        match byte {
            1 => Outcome::Acknowledged,
            2 => Outcome::Failed,
            _ => Outcome::Unknown,
        }
    }
}

/// The number of a write in progress. Dropped without [`Number::done`], the outcome is unknown.
pub struct Number {
    writer: u32,
    seq: AtomicU32,
    sheep: Arc<Sheep>,
    /// The epoch of the last attempt; 0 = there was none.
    sent: AtomicU32,
    over: bool,
}

impl Number {
    /// What homes know the write by.
    pub fn id(&self) -> WriteId {
        WriteId { writer: self.writer, seq: self.seq.load(Ordering::Acquire) }
    }

    /// As [`Number::id`]; from here on some homes may have it, as of `epoch`.
    pub fn send(&self, epoch: Epoch) -> WriteId {
        self.sent.store(epoch.0, Ordering::Release);
        self.id()
    }

    /// The epoch of the last attempt: homes may have what it wrote. `None` = none has anything.
    pub fn sent_in(&self) -> Option<Epoch> {
        let epoch = Epoch(self.sent.load(Ordering::Acquire));
        (epoch != Epoch(0)).then_some(epoch)
    }

    /// What was sent is taken back on all homes: the next attempt is another write to them, under another number. They
    /// remember for a while that this one was undone.
    pub fn renew(&self) {
        let numbers = &self.sheep.gateway.numbers;
        let mut state = numbers.state.lock();
        state.end(self.seq.load(Ordering::Acquire));
        self.seq.store(state.next(), Ordering::Release);
        self.sent.store(0, Ordering::Release);
        numbers.ended.notify_one();
    }

    /// An attempt in `epoch` succeeded. `false` = its homes were told before that it will not: it is undone where it is.
    #[must_use]
    pub fn succeed(&self, epoch: Epoch) -> bool {
        self.sheep.gateway.numbers.state.lock().succeed(self.id().seq, epoch)
    }

    /// All homes have the write, or none has it.
    pub fn done(mut self) {
        self.over = true;
        let numbers = &self.sheep.gateway.numbers;
        numbers.state.lock().end(self.id().seq);
        numbers.ended.notify_one();
    }
}

impl Drop for Number {
    fn drop(&mut self) {
        if !self.over {
            let mut state = self.sheep.gateway.numbers.state.lock();
            state.abandoned.push((Instant::now(), self.sheep.views.epoch(), self.id().seq));
        }
    }
}

impl State {
    fn succeed(&mut self, seq: u32, epoch: Epoch) -> bool {
        if self.barred.get(&seq).is_some_and(|barred| !barred.is_before(epoch)) {
            return false;
        }
        self.succeeded.insert(seq, epoch);
        true
    }

    fn outcome(&mut self, seq: u32, epoch: Epoch) -> Outcome {
        if !self.outstanding.contains(&seq) {
            return Outcome::Acknowledged; // it is over, and nothing of it was left behind
        }
        if self.succeeded.get(&seq) == Some(&epoch) {
            return Outcome::Acknowledged;
        }
        let barred = self.barred.entry(seq).or_default();
        *barred = epoch.max(*barred);
        Outcome::Failed
    }

    /// Begins a write.
    fn next(&mut self) -> u32 {
        self.last = self.last.wrapping_add(1).max(1); // 0 is what the original sends
        self.outstanding.insert(self.last);
        self.last
    }

    fn touch(&mut self, node: NodeId) {
        if !self.deaf.contains(&node) {
            self.marks += 1;
            self.untold.insert(node, self.marks);
        }
    }

    /// A home was told everything that was to be told when its latest write had this mark.
    fn told(&mut self, node: NodeId, mark: u64) {
        if self.untold.get(&node) == Some(&mark) {
            self.untold.remove(&node);
        }
    }

    /// Writes that were abandoned long ago, in an epoch that is over.
    fn forgettable(&self, now: Instant, epoch: Epoch) -> Vec<u32> {
        let old =
            |(at, of, _): &&(Instant, Epoch, u32)| now.duration_since(*at) >= FORGET_AFTER && *of != epoch;
        self.abandoned.iter().filter(old).map(|(.., seq)| *seq).collect()
    }

    fn end(&mut self, seq: u32) {
        self.outstanding.remove(&seq);
        self.succeeded.remove(&seq);
        self.barred.remove(&seq);
    }
}

impl Numbers {
    /// What became of the attempts at these writes in `epoch`.
    pub fn outcomes(&self, ids: &[WriteId], epoch: Epoch) -> Vec<Outcome> {
        let mut state = self.state.lock();
        let of = |id: &WriteId| match id.writer == self.writer {
            true => state.outcome(id.seq, epoch),
            false => Outcome::Unknown,
        };
        ids.iter().map(of).collect()
    }

    /// What homes know this gateway by, of an operation that needs no number.
    pub fn none(&self) -> WriteId {
        WriteId { writer: self.writer, seq: 0 }
    }

    /// Begins a write.
    pub fn begin(&self, sheep: &Arc<Sheep>) -> Number {
        let seq = AtomicU32::new(self.state.lock().next());
        Number { writer: self.writer, seq, sheep: sheep.clone(), sent: AtomicU32::new(0), over: false }
    }

    /// `node` gets a write.
    pub fn touch(&self, node: NodeId) {
        self.state.lock().touch(node);
    }

    /// Writes that were abandoned long ago, in an epoch that is over.
    fn forgettable(&self, view: &View) -> Vec<u32> {
        self.state.lock().forgettable(Instant::now(), view.epoch)
    }

    fn forget(&self, view: &View, seqs: &[u32]) {
        let mut state = self.state.lock();
        state.abandoned.retain(|(.., seq)| !seqs.contains(seq));
        seqs.iter().for_each(|seq| state.end(*seq));
        view.members().iter().for_each(|node| state.touch(node.nid));
    }

    /// What homes are to be told: the highest number given out, those up to it that are not done, and the homes.
    fn news(&self) -> (u32, Vec<u32>, Vec<(NodeId, u64)>) {
        let state = self.state.lock();
        let homes = state.untold.iter().map(|(node, mark)| (*node, *mark)).collect();
        (state.last, state.outstanding.iter().copied().collect(), homes)
    }
}

/// Whether a member says that it has nothing of this gateway that is not settled. One of the original never has.
fn nothing_undecided(response: &Response) -> bool {
    match response.result {
        ResultCode::INVALID_PARMS => true,
        code => code.is_ok() && response.order().verdict == 0,
    }
}

/// Ends what was abandoned long ago, if all members say that nothing of this gateway is undecided there.
async fn forget(sheep: &Arc<Sheep>) {
    let numbers = &sheep.gateway.numbers;
    let view = sheep.views.load();
    let old = numbers.forgettable(&view);
    if old.is_empty() || sheep.intents.has_open_of_before(numbers.writer, view.epoch) {
        return;
    }
    let (last, open, _) = numbers.news();
    let (request, payload) = message(numbers.writer, last, &open);
    let others = view.others(sheep.me);
    let answers = others.map(|node| {
        let payload = payload.clone();
        async move { sheep.peers.call_on(Lane::Control, &node, request, payload, DEADLINE).await }
    });
    let answers = join_all(answers).await;
    let settled =
        answers.into_iter().all(|answer| answer.is_ok_and(|reply| nothing_undecided(&reply.response)));
    if settled && sheep.views.epoch() == view.epoch {
        numbers.forget(&view, &old);
    }
}

/// Tells homes what is done, for ever.
pub async fn run(sheep: Arc<Sheep>) {
    let mut forgotten = Instant::now();
    loop {
        if tokio::time::timeout(AGAIN_AFTER, sheep.gateway.numbers.ended.notified()).await.is_ok() {
            tokio::time::sleep(TELL_AFTER).await;
        }
        if forgotten.elapsed() >= AGAIN_AFTER {
            forgotten = Instant::now();
            let sheep = sheep.clone();
            tokio::spawn(async move { forget(&sheep).await });
        }
        drop(tell(&sheep));
    }
}

/// Tells homes what is done, and waits until they know, though not for one that does not answer.
pub async fn tell_now(sheep: &Arc<Sheep>) {
    let _ = tokio::time::timeout(TELL_LIMIT, join_all(tell(sheep))).await;
}

/// Everything up to `last` is done, except `open`.
fn message(writer: u32, last: u32, open: &[u32]) -> (Request, Bytes) {
    let mut payload = writer.to_le_bytes().to_vec();
    payload.extend(open.iter().flat_map(|seq| seq.to_le_bytes()));
    let body = OrderRequest { what: order::DONE, serial: last, ..OrderRequest::zeroed() };
    (Request::new(Opcode::ORDER_PEER).flag(Flags::WRITE).with_order(body), payload.into())
}

fn tell(sheep: &Arc<Sheep>) -> Vec<JoinHandle<()>> {
    let numbers = &sheep.gateway.numbers;
    let (last, open, nodes) = numbers.news();
    if last == 0 {
        return Vec::new(); // nothing was ever written here
    }
    sheep.intents.done(numbers.writer, last, &open);
    let (request, payload) = message(numbers.writer, last, &open);
    // What is open now will end without touching its homes again: they stay on the list.
    let everything = open.is_empty();
    let calls = nodes.into_iter().filter(|(node, _)| *node != sheep.me).map(|(node, mark)| {
        let (sheep, payload) = (sheep.clone(), payload.clone());
        tokio::spawn(async move {
            let answer = sheep.peers.call_on(Lane::Control, &node, request, payload, DEADLINE).await;
            let left = answer.is_err() && !sheep.views.load().is_member(&node);
            let mut state = sheep.gateway.numbers.state.lock();
            match answer.map(|reply| reply.response.result) {
                Ok(ResultCode::INVALID_PARMS) => {
                    state.deaf.insert(node);
                    state.untold.remove(&node);
                }
                Ok(_) if everything => state.told(node, mark),
                Err(_) if left => state.told(node, mark),
                // It is told with the next ones.
                _ => {}
            }
        })
    });
    calls.collect()
}

#[cfg(test)]
mod tests {
    use sheepdog_proto::header::OrderResponse;

    use super::*;

    #[test]
    fn a_home_written_to_while_it_is_told_is_told_again() {
        let (mut state, node) = (State::default(), NodeId::zeroed());
        state.touch(node);
        let mark = state.untold[&node];
        // The same was told twice; between the two answers it was written to.
        state.told(node, mark);
        assert!(state.untold.is_empty());
        state.touch(node);
        state.told(node, mark);
        assert!(state.untold.contains_key(&node));
        state.deaf.insert(node);
        state.untold.clear();
        state.touch(node);
        assert!(state.untold.is_empty(), "the original need not know");
    }

    #[test]
    fn what_was_reported_as_failed_does_not_succeed_later() {
        let mut state = State { outstanding: [4, 5].into(), ..State::default() };
        assert_eq!(state.outcome(4, Epoch(7)), Outcome::Failed);
        assert!(!state.succeed(4, Epoch(6)) && !state.succeed(4, Epoch(7)));
        assert!(state.succeed(4, Epoch(8)));
        assert_eq!(state.outcome(4, Epoch(8)), Outcome::Acknowledged);
        assert_eq!(
            state.outcome(4, Epoch(7)),
            Outcome::Failed,
            "what was written in the older epoch is not needed"
        );
        assert!(state.succeed(5, Epoch(7)));
        assert_eq!(state.outcome(5, Epoch(7)), Outcome::Acknowledged);
        state.end(5);
        assert_eq!(state.outcome(5, Epoch(7)), Outcome::Acknowledged);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_abandoned_is_forgotten_late_and_when_nobody_is_undecided_about_it() {
        let begun = Instant::now();
        let state = State { abandoned: vec![(begun, Epoch(4), 7)], ..State::default() };
        assert!(state.forgettable(begun + FORGET_AFTER / 2, Epoch(5)).is_empty());
        assert!(state.forgettable(begun + FORGET_AFTER, Epoch(4)).is_empty(), "the epoch goes on");
        assert_eq!(state.forgettable(begun + FORGET_AFTER, Epoch(5)), [7]);

        let answer = |verdict, code| {
            let response = Response::to(&Request::new(Opcode::ORDER_PEER), code);
            response.with_order(OrderResponse { verdict, ..OrderResponse::zeroed() })
        };
        assert!(nothing_undecided(&answer(0, ResultCode::SUCCESS)));
        assert!(!nothing_undecided(&answer(1, ResultCode::SUCCESS)));
        assert!(!nothing_undecided(&answer(0, ResultCode::KILLED)));
        assert!(nothing_undecided(&answer(0, ResultCode::INVALID_PARMS)), "the original remembers nothing");
    }
}
