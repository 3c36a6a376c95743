//! Ordering of requests to one object: overlapping ranges run one after another, everything else at once.
//!
//! A gateway takes a [`Turn`] for the byte range of each request (reads shared, writes exclusive) before it touches
//! any replica, so that overlapping writes reach all replicas in one order (spec 06, 3.10 and W-07). Turns are granted
//! in the order they were asked for among conflicting requests.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use sheepdog_proto::Oid;
use tokio::sync::oneshot;

/// Independent tables, so that requests to different objects rarely meet.
const SHARDS: usize = 64;

struct Entry {
    ticket: u64,
    range: Range<u64>,
    exclusive: bool,
    /// Waiting requests are told here; `None` = running.
    start: Option<oneshot::Sender<()>>,
}

impl Entry {
    fn conflicts(&self, other: &Entry) -> bool {
        (self.exclusive || other.exclusive)
            && self.range.start < other.range.end
            && other.range.start < self.range.end
    }
}

#[derive(Default)]
struct Shard {
    next_ticket: u64,
    queues: HashMap<Oid, VecDeque<Entry>>,
}

/// The order of all requests that one gateway has in progress.
pub struct Order {
    shards: Arc<[Mutex<Shard>; SHARDS]>,
}

impl Default for Order {
    fn default() -> Self {
        Order { shards: Arc::new(std::array::from_fn(|_| Mutex::default())) }
    }
}

/// The right to touch a range of an object; given back when dropped.
pub struct Turn {
    shards: Arc<[Mutex<Shard>; SHARDS]>,
    oid: Oid,
    ticket: u64,
}

/// A place in the order that may not have come up yet.
pub struct PendingTurn {
    turn: Turn,
    wait: Option<oneshot::Receiver<()>>,
}

impl PendingTurn {
    /// Waits until it is this request's turn.
    pub async fn ready(self) -> Turn {
        if let Some(wait) = self.wait {
            let _ = wait.await;
        }
        self.turn
    }
}

fn shard_of(oid: Oid) -> usize {
    (oid.0 ^ (oid.0 >> 32)) as usize % SHARDS
}

impl Order {
    /// Waits for the turn of `range` (bytes) of `oid`. Empty ranges conflict with nothing.
    pub async fn turn(&self, oid: Oid, range: Range<u64>, exclusive: bool) -> Turn {
        let (turn, wait) = self.enqueue(oid, range, exclusive);
        if let Some(wait) = wait {
            // The sender is dropped without a message only together with the whole table.
            let _ = wait.await;
        }
        turn
    }

    /// Takes a place in the order without waiting for it.
    pub fn reserve(&self, oid: Oid, range: Range<u64>, exclusive: bool) -> PendingTurn {
        let (turn, wait) = self.enqueue(oid, range, exclusive);
        PendingTurn { turn, wait }
    }

    /// The turn if nothing conflicts right now.
    pub fn try_turn(&self, oid: Oid, range: Range<u64>, exclusive: bool) -> Option<Turn> {
        let probe = Entry { ticket: 0, range: range.clone(), exclusive, start: None };
        let shard = self.shards[shard_of(oid)].lock();
        if shard.queues.get(&oid).is_some_and(|queue| queue.iter().any(|e| e.conflicts(&probe))) {
            return None;
        }
        drop(shard);
        match self.enqueue(oid, range, exclusive) {
            (turn, None) => Some(turn),
            (_, Some(_)) => None, // somebody came between; the turn is given back by its drop
        }
    }

    fn enqueue(&self, oid: Oid, range: Range<u64>, exclusive: bool) -> (Turn, Option<oneshot::Receiver<()>>) {
        let mut guard = self.shards[shard_of(oid)].lock();
        let shard = &mut *guard;
        shard.next_ticket += 1;
        let ticket = shard.next_ticket;
        let mut entry = Entry { ticket, range, exclusive, start: None };
        let queue = shard.queues.entry(oid).or_default();
        let mut wait = None;
        if queue.iter().any(|e| e.conflicts(&entry)) {
            let (start, started) = oneshot::channel();
            entry.start = Some(start);
            wait = Some(started);
        }
        queue.push_back(entry);
        (Turn { shards: self.shards.clone(), oid, ticket }, wait)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut guard = self.shards[shard_of(self.oid)].lock();
        let shard = &mut *guard;
        let Some(queue) = shard.queues.get_mut(&self.oid) else { return };
        queue.retain(|e| e.ticket != self.ticket);
        if queue.is_empty() {
            shard.queues.remove(&self.oid);
            return;
        }
        for i in 0..queue.len() {
            let free = !queue.range(..i).any(|earlier| earlier.conflicts(&queue[i]));
            if free && let Some(start) = queue[i].start.take() {
                let _ = start.send(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn overlapping_writes_wait_and_others_do_not() {
        let order = Order::default();
        let oid = Oid(7);
        let first = order.turn(oid, 0..10, true).await;
        let _disjoint = order.turn(oid, 10..20, true).await;
        let _other_object = order.turn(Oid(8), 0..10, true).await;
        assert!(order.try_turn(oid, 5..6, false).is_none());
        let (second, wait) = order.enqueue(oid, 5..15, true);
        assert!(wait.is_some());
        drop(first);
        let mut wait = wait.expect("queued");
        assert!(wait.try_recv().is_err(), "10..20 is still held");
        drop(_disjoint);
        wait.await.expect("started");
        drop(second);
        assert!(order.try_turn(oid, 0..100, true).is_some());
    }

    #[tokio::test]
    async fn reads_share_and_a_waiting_write_keeps_its_place() {
        let order = Order::default();
        let oid = Oid(1);
        let a = order.turn(oid, 0..10, false).await;
        let b = order.turn(oid, 0..10, false).await;
        let (w, wait) = order.enqueue(oid, 0..10, true);
        let (_r, read_wait) = order.enqueue(oid, 0..10, false);
        assert!(read_wait.is_some(), "a later read waits behind the write");
        drop((a, b));
        wait.expect("queued").await.expect("write starts");
        drop(w);
        read_wait.expect("queued").await.expect("read starts");
    }
}
