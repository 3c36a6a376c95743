//! Jobs, and the queues between the scheduler and a disk's threads.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use tokio::sync::OwnedSemaphorePermit;

use crate::disk::Disk;
use crate::error::StoreError;
use crate::index::DiskId;
use crate::name::Replica;
use crate::sched::{Claim, Claims};
use crate::store::Inner;

/// Called once with the outcome, on the thread that did the work.
pub(crate) type Done<T> = Box<dyn FnOnce(Result<T, StoreError>) + Send>;

/// A write into an existing file.
pub(crate) struct Write {
    pub(crate) replica: Replica,
    pub(crate) offset: u64,
    pub(crate) data: Bytes,
    /// Store size of the file, in bytes.
    pub(crate) size: u64,
    /// Whether the claim covers the 64 KiB units around the range, so that they may be zero-filled.
    pub(crate) rounded: bool,
    pub(crate) done: Done<()>,
}

/// How a new file comes to its name.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// In place of a working file, if there is one.
    Replacing,
    /// Never replacing a working file; the outcome says whether the file was created.
    IfAbsent,
    /// So, too, and written in pieces of [`GENTLE_PIECE`](crate::GENTLE_PIECE).
    Gently,
}

/// A new file, complete before it gets its name.
pub(crate) struct Create {
    pub(crate) replica: Replica,
    pub(crate) offset: u64,
    pub(crate) data: Bytes,
    /// Store size of the file, in bytes.
    pub(crate) size: u64,
    pub(crate) how: How,
    pub(crate) done: Done<bool>,
}

/// Gets an error if the disk is out of service.
pub(crate) type Run = Box<dyn FnOnce(&Arc<Inner>, Result<&Arc<Disk>, StoreError>) + Send>;

/// Something else to be done on a disk's thread.
pub(crate) struct Exec {
    /// Where; `None`: the disk that has the claimed replica, or should have it.
    pub(crate) disk: Option<DiskId>,
    /// What.
    pub(crate) run: Run,
}

pub(crate) enum Task {
    Write(Write),
    Create(Create),
    Exec(Exec),
}

/// A unit of work with its claim. Holds the store, so that what was accepted is finished.
pub(crate) struct Job {
    pub(crate) store: Arc<Inner>,
    pub(crate) claim: Claim,
    pub(crate) task: Task,
    /// The part of the disk queues' bound that the job takes.
    pub(crate) _permit: Option<OwnedSemaphorePermit>,
}

impl Claims for Job {
    fn claim(&self) -> &Claim {
        &self.claim
    }
    fn claim_mut(&mut self) -> &mut Claim {
        &mut self.claim
    }
}

impl Job {
    /// Bytes of payload.
    pub(crate) fn len(&self) -> usize {
        match &self.task {
            Task::Write(w) => w.data.len(),
            Task::Create(c) => c.data.len(),
            Task::Exec(_) => 0,
        }
    }
}

struct State<T> {
    items: VecDeque<T>,
    idle: usize,
    closed: bool,
}

/// A queue of work for some threads. Its length is bounded by the permits that jobs hold.
pub(crate) struct Queue<T> {
    state: Mutex<State<T>>,
    filled: Condvar,
}

impl<T> Queue<T> {
    pub(crate) fn new() -> Queue<T> {
        Queue {
            state: Mutex::new(State { items: VecDeque::new(), idle: 0, closed: false }),
            filled: Condvar::new(),
        }
    }

    /// Adds an item; wakes a thread only if one sleeps. Gives the item back if the queue is closed.
    pub(crate) fn push(&self, item: T) -> Result<(), T> {
        let mut state = self.state.lock();
        if state.closed {
            return Err(item);
        }
        state.items.push_back(item);
        if state.idle > 0 {
            drop(state);
            self.filled.notify_one();
        }
        Ok(())
    }

    /// Blocks until there is something, then takes the first item and every further one that `more` accepts; stops at
    /// the first refused. `None` once the queue is closed and empty.
    pub(crate) fn take(&self, mut more: impl FnMut(&[T], &T) -> bool) -> Option<Vec<T>> {
        let mut state = self.state.lock();
        loop {
            if let Some(first) = state.items.pop_front() {
                let mut batch = vec![first];
                while state.items.front().is_some_and(|next| more(&batch, next)) {
                    batch.extend(state.items.pop_front());
                }
                if !state.items.is_empty() && state.idle > 0 {
                    self.filled.notify_one();
                }
                return Some(batch);
            }
            if state.closed {
                return None;
            }
            state.idle += 1;
            self.filled.wait(&mut state);
            state.idle -= 1;
        }
    }

    /// Lets the threads end once the queue is empty.
    pub(crate) fn close(&self) {
        self.state.lock().closed = true;
        self.filled.notify_all();
    }
}
