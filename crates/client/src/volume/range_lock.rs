//! Order of writes within a block (spec 01, 16.4).
//!
//! A write to an existing object holds its byte range, so that overlapping writes reach the sheep one after the other;
//! creating, copying or discarding an object holds the whole block. Grants are first come, first served per block:
//! a request waits for every earlier one that it overlaps, granted or not, so nobody starves. Callers that hold
//! several blocks take them in ascending order.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// Independent tables, so that tasks on different blocks rarely meet.
const SHARDS: usize = 16;

/// The locks of one volume; clones share them.
#[derive(Clone, Default)]
pub(crate) struct RangeLocks {
    shards: Arc<[Shard; SHARDS]>,
}

#[derive(Default)]
struct Shard {
    blocks: Mutex<HashMap<u32, Block>>,
}

#[derive(Default)]
struct Block {
    granted: Vec<Range<u64>>,
    waiting: VecDeque<(Range<u64>, oneshot::Sender<RangeGuard>)>,
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Holds a range until dropped.
pub(crate) struct RangeGuard {
    locks: RangeLocks,
    block: u32,
    range: Range<u64>,
    armed: bool,
}

impl RangeLocks {
    fn shard(&self, block: u32) -> &Shard {
        &self.shards[block as usize % SHARDS]
    }

    fn guard(&self, block: u32, range: Range<u64>) -> RangeGuard {
        RangeGuard { locks: self.clone(), block, range, armed: true }
    }

    /// Waits for the bytes `range` of `block`. An empty range excludes nobody.
    pub(crate) async fn acquire(&self, block: u32, range: Range<u64>) -> RangeGuard {
        let receiver = {
            let mut blocks = self.shard(block).blocks.lock();
            let state = blocks.entry(block).or_default();
            let free = !state.granted.iter().any(|held| overlap(held, &range))
                && !state.waiting.iter().any(|(earlier, _)| overlap(earlier, &range));
            if free {
                state.granted.push(range.clone());
                return self.guard(block, range);
            }
            let (sender, receiver) = oneshot::channel();
            state.waiting.push_back((range, sender));
            receiver
        };
        receiver.await.expect("a waiter is only removed by sending it its guard")
    }

    fn release(&self, block: u32, range: &Range<u64>) {
        // Guards whose receiver is gone are dropped after the table is unlocked: dropping releases again.
        let mut orphans = Vec::new();
        let mut blocks = self.shard(block).blocks.lock();
        let Some(state) = blocks.get_mut(&block) else { return };
        if let Some(at) = state.granted.iter().position(|held| held == range) {
            state.granted.swap_remove(at);
        }
        let mut index = 0;
        while let Some((wanted, _)) = state.waiting.get(index) {
            let blocked = state.granted.iter().any(|held| overlap(held, wanted))
                || state.waiting.iter().take(index).any(|(earlier, _)| overlap(earlier, wanted));
            if blocked {
                index += 1;
                continue;
            }
            let Some((wanted, sender)) = state.waiting.remove(index) else { break };
            state.granted.push(wanted.clone());
            if let Err(guard) = sender.send(self.guard(block, wanted)) {
                orphans.push(guard);
            }
        }
        if state.granted.is_empty() && state.waiting.is_empty() {
            blocks.remove(&block);
        }
        drop(blocks);
        drop(orphans);
    }

    #[cfg(test)]
    fn is_idle(&self) -> bool {
        self.shards.iter().all(|shard| shard.blocks.lock().is_empty())
    }
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        if std::mem::take(&mut self.armed) {
            self.locks.release(self.block, &self.range);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn ranges_that_do_not_overlap_are_held_together() {
        let locks = RangeLocks::default();
        let _a = locks.acquire(1, 0..10).await;
        let _b = locks.acquire(1, 10..20).await;
        let _other_block = locks.acquire(2, 0..20).await;
    }

    #[tokio::test]
    async fn an_overlapping_range_waits_and_later_ones_do_not_pass_it() {
        let locks = RangeLocks::default();
        let first = locks.acquire(1, 0..10).await;
        let mut whole = Box::pin(locks.acquire(1, 0..100));
        assert!(whole.as_mut().now_or_never().is_none());
        let mut later = Box::pin(locks.acquire(1, 50..60));
        assert!(later.as_mut().now_or_never().is_none(), "must not pass the waiting whole-block request");
        drop(first);
        let whole = whole.await;
        assert!(later.as_mut().now_or_never().is_none());
        drop(whole);
        drop(later.await);
        assert!(locks.is_idle());
    }

    #[tokio::test]
    async fn a_waiter_that_gives_up_holds_up_nobody() {
        let locks = RangeLocks::default();
        let first = locks.acquire(1, 0..10).await;
        let mut second = Box::pin(locks.acquire(1, 0..10));
        assert!(second.as_mut().now_or_never().is_none());
        let mut third = Box::pin(locks.acquire(1, 0..10));
        assert!(third.as_mut().now_or_never().is_none());
        drop(second);
        drop(first);
        drop(third.await);
        let first = locks.acquire(1, 0..10).await;
        let mut granted_but_never_polled = Box::pin(locks.acquire(1, 0..10));
        assert!(granted_but_never_polled.as_mut().now_or_never().is_none());
        drop(first);
        drop(granted_but_never_polled);
        assert!(locks.is_idle());
    }
}
