//! Recovery: every node pulls the objects that it should hold and does not (spec 06, section 10).
//!
//! One task runs rounds one after another; a newer round replaces the running one. [`round`] is a round's life: list,
//! copy, announce. [`pace`] says when it may begin the next object. [`object`] recovers one object: it never takes an older version while a home of a newer epoch is
//! out of reach (A1), and a round is complete only when every object is (A2). Requests that need an object still to be
//! recovered wait in [`Recovery::ready`] and put it first, except writes of part of it ([`early`]).

pub mod altered;
pub mod early;
pub mod lacking;
pub mod object;
pub mod pace;
pub mod pieces;
pub mod round;
pub mod strip;
pub mod tombstones;

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use parking_lot::Mutex;
use sheepdog_proto::admin::{RECOVERY_OBJECTS, RECOVERY_PREPARE, RecoveryState, RecoveryThrottling};
use sheepdog_proto::{Epoch, Oid};
use sheepdog_store::{Replica, Store};
use tokio::sync::{Notify, mpsc, oneshot};

use crate::cluster::state::Round;
use crate::cluster::worker::Worker;
use crate::gateway::object::is_coded;
use crate::order::Order;
use crate::sheep::Sheep;
use crate::view::View;

/// Side file of the metadata directory that remembers the last epoch in which everybody had everything.
const GATHERED_FILE: &str = "gathered_epoch";

/// The round that is running.
pub struct Active {
    /// What it is about.
    pub round: Round,
    /// A newer round began.
    pub replaced: AtomicBool,
    /// Objects still to do.
    pub work: Mutex<Pending>,
    /// Held while an object is recovered: it may be asked for while it is its turn.
    pub alone: Order,
    /// Something was added to the work, or recovery was enabled.
    pub wake: Notify,
    /// All members know of early writes: they may be taken.
    pub early: AtomicBool,
    /// Only what requests ask for is recovered: the rest has no room (`-F`).
    pub held: AtomicBool,
    finished: AtomicU64,
}

/// Objects of a round.
#[derive(Default)]
pub struct Pending {
    /// The list has been made.
    pub listed: bool,
    /// Objects in it, done or not.
    pub total: u64,
    /// Not done, being done included.
    pub todo: HashSet<Oid>,
    /// Not begun, in order.
    pub queue: VecDeque<Oid>,
    /// Wanted by requests.
    pub urgent: VecDeque<Oid>,
    /// Failed in this pass; tried again in the next.
    pub failed: Vec<Oid>,
    /// Not to be had when last tried.
    pub unfound: HashSet<Oid>,
    /// Of these: those of which there are fewer strips, wherever they may be, than their code needs.
    pub fruitless: HashSet<Oid>,
    /// Why, for one of them.
    pub reason: String,
    /// Done although the list is not there yet.
    done_early: HashSet<Oid>,
    waiters: HashMap<Oid, Vec<oneshot::Sender<()>>>,
}

impl Pending {
    /// Whether nothing is left to begin.
    fn is_all_begun(&self) -> bool {
        self.queue.is_empty() && self.urgent.is_empty()
    }
}

impl Active {
    /// Marks an object as done and wakes who waits for it.
    pub fn done(&self, oid: Oid) {
        let mut work = self.work.lock();
        work.unfound.remove(&oid);
        work.fruitless.remove(&oid);
        if work.todo.remove(&oid) {
            self.finished.fetch_add(1, Ordering::Relaxed);
        }
        if !work.listed {
            work.done_early.insert(oid);
        }
        if let Some(waiters) = work.waiters.remove(&oid) {
            waiters.into_iter().for_each(|w| {
                let _ = w.send(());
            });
        }
    }

    /// Notes whether fewer strips of the object are left than its code needs.
    pub fn note_fruitless(&self, oid: Oid, fruitless: bool) {
        let mut work = self.work.lock();
        if fruitless {
            work.fruitless.insert(oid);
        } else {
            work.fruitless.remove(&oid);
        }
    }

    /// Whether a request waits for the object.
    pub fn is_waited_for(&self, oid: Oid) -> bool {
        self.work.lock().waiters.contains_key(&oid)
    }

    /// Whether a newer round began.
    pub fn is_replaced(&self) -> bool {
        self.replaced.load(Ordering::Acquire)
    }

    fn replace(&self) {
        self.replaced.store(true, Ordering::Release);
        self.work.lock().waiters.clear();
        self.wake.notify_waiters();
        self.wake.notify_one();
    }
}

/// See the module's documentation.
pub struct Recovery {
    rounds: mpsc::UnboundedSender<Round>,
    current: Mutex<Option<Arc<Active>>>,
    /// Begun and not launched yet.
    begun: Mutex<Option<Round>>,
    gathered: AtomicU32,
    throttling: Mutex<RecoveryThrottling>,
    /// Strips here that must not be joined to those of others.
    pub lacking: lacking::Lacking,
    /// VDIs whose copies were altered lately.
    pub altered: altered::Altered,
    gathered_path: PathBuf,
}

impl Recovery {
    /// The recovery of a node with this metadata directory, and the rounds for [`run`].
    pub fn new(base: &Path, throttling: RecoveryThrottling) -> (Recovery, mpsc::UnboundedReceiver<Round>) {
        let (rounds, receiver) = mpsc::unbounded_channel();
        let gathered_path = base.join(GATHERED_FILE);
        let stored = std::fs::read_to_string(&gathered_path).ok();
        let gathered = stored.and_then(|s| s.trim().parse().ok()).unwrap_or(1);
        let recovery = Recovery {
            rounds,
            current: Mutex::new(None),
            begun: Mutex::new(None),
            gathered: AtomicU32::new(gathered),
            throttling: Mutex::new(throttling),
            lacking: lacking::Lacking::default(),
            altered: altered::Altered::open(base),
            gathered_path,
        };
        (recovery, receiver)
    }

    /// Begins a round, which replaces the running one: requests wait for absent objects from here on. A round that owed
    /// the cluster an announcement hands the duty on, one that was to search everywhere (`-W`) the task. It runs after [`Recovery::launch`].
    pub fn begin(&self, mut round: Round) {
        let mut current = self.current.lock();
        if let Some(previous) = current.take() {
            round.announce |= previous.round.announce;
            round.wildcard |= previous.round.wildcard;
            previous.replace();
        }
        *current = Some(Arc::new(Active {
            round: round.clone(),
            replaced: AtomicBool::new(false),
            work: Mutex::default(),
            alone: Order::default(),
            wake: Notify::new(),
            early: AtomicBool::new(false),
            held: AtomicBool::new(false),
            finished: AtomicU64::new(0),
        }));
        *self.begun.lock() = Some(round);
    }

    /// Runs the round that was begun, now that its view is published and tables are being fetched.
    pub fn launch(&self) {
        if let Some(round) = self.begun.lock().take() {
            let _ = self.rounds.send(round);
        }
    }

    /// Drops the running round (MAKE_FS).
    pub fn stop(&self) {
        if let Some(active) = self.current.lock().take() {
            active.replace();
        }
    }

    /// Whether no round is running.
    pub fn is_idle(&self) -> bool {
        self.current.lock().is_none()
    }

    /// Last epoch in which every member had every object.
    pub fn last_gathered(&self) -> Epoch {
        Epoch(self.gathered.load(Ordering::Acquire))
    }

    /// Every member has recovered `epoch`: stale copies are no longer needed, unless erasure-coded VDIs lack zones.
    pub async fn gathered(&self, sheep: &Arc<Sheep>, epoch: Epoch) {
        self.gathered.store(epoch.0, Ordering::Release);
        if let Err(error) = std::fs::write(&self.gathered_path, format!("{epoch}\n")) {
            tracing::warn!("cannot write {}: {error}", self.gathered_path.display());
        }
        let Some(store) = &sheep.store else { return };
        sheep.intents.gathered(epoch);
        tokio::task::block_in_place(|| self.altered.gathered(epoch));
        self.lacking.forget(epoch);
        tokio::task::block_in_place(|| sheep.early.gathered(epoch));
        if sheep.views.load().ring.nr_zones() >= sheep.vdis.max_data_strips() {
            let (store, below) = (store.clone(), Epoch(epoch.0.saturating_sub(1)));
            tokio::spawn(async move {
                if let Err(error) = store.purge_stale(below).await {
                    tracing::error!("cannot remove stale objects: {error}");
                }
            });
        }
    }

    /// The answer of STAT_RECOVERY.
    pub fn state(&self) -> RecoveryState {
        let Some(active) = self.current.lock().clone() else { return RecoveryState::zeroed() };
        let work = active.work.lock();
        RecoveryState {
            in_recovery: 1,
            nr_unfound: u16::try_from(work.unfound.len()).unwrap_or(u16::MAX),
            state: if work.listed { RECOVERY_OBJECTS } else { RECOVERY_PREPARE },
            nr_finished: active.finished.load(Ordering::Relaxed),
            nr_total: work.total,
        }
    }

    /// The limits.
    pub fn throttling(&self) -> RecoveryThrottling {
        *self.throttling.lock()
    }

    /// Sets the limits; throttling is on if both numbers are above 0.
    pub fn set_throttling(&self, mut limits: RecoveryThrottling) {
        limits.throttling = (limits.max_exec_count > 0 && limits.queue_work_interval > 0).into();
        *self.throttling.lock() = limits;
        if let Some(active) = self.current.lock().as_ref() {
            active.wake.notify_one();
        }
    }

    /// Whether the running round has found fewer strips of `oid` than its code needs, and knows that there are no others.
    pub fn is_fruitless(&self, oid: Oid) -> bool {
        self.current.lock().as_ref().is_some_and(|active| active.work.lock().fruitless.contains(&oid))
    }

    /// Whether a request may use this node's replica of `oid` now. Waits while the object is still to be recovered
    /// here, after putting it first; `false` = something changed, look again.
    pub async fn ready(&self, sheep: &Arc<Sheep>, oid: Oid, view: &View) -> bool {
        let Some(active) = self.current.lock().clone() else { return true };
        let Some(store) = &sheep.store else { return true };
        match sheep.my_replica(oid, view) {
            Some((replica, size))
                if !store.exists(replica)
                    || is_damaged(store, replica, size)
                    || sheep.early.has_of(oid, view.epoch) => {}
            _ => return true,
        }
        let done = {
            let mut work = active.work.lock();
            let needed = if work.listed { work.todo.contains(&oid) } else { !work.done_early.contains(&oid) };
            if !needed {
                return true;
            }
            if active.is_replaced() {
                return false;
            }
            if !work.urgent.contains(&oid) {
                work.urgent.push_back(oid);
            }
            let (sender, done) = oneshot::channel();
            work.waiters.entry(oid).or_default().push(sender);
            done
        };
        active.wake.notify_one();
        // An error means that the round was replaced.
        let _ = done.await;
        false
    }

    /// The running round, if this node's replica of an object is not there and may be when it was recovered.
    fn awaits(&self, sheep: &Sheep, oid: Oid, view: &View) -> Option<Arc<Active>> {
        let active = self.current.lock().clone()?;
        let (replica, _) = sheep.my_replica(oid, view)?;
        let absent = !sheep.store.as_ref()?.exists(replica) || sheep.early.has_of(oid, view.epoch);
        let awaited = absent && {
            let work = active.work.lock();
            !work.listed || work.todo.contains(&oid)
        };
        awaited.then_some(active)
    }

    /// Whether this node's replica of an object is not there, and may be when it was recovered.
    pub fn is_missing(&self, sheep: &Sheep, oid: Oid, view: &View) -> bool {
        self.awaits(sheep, oid, view).is_some()
    }

    /// Whether a write of part of an object need not wait until the object is recovered here: it is listed, not done, this
    /// node was its home from the beginning of the epoch, all members know what an early write is, and it is clear who the homes
    /// of late were.
    pub fn takes_early(&self, sheep: &Sheep, oid: Oid, view: &View) -> bool {
        if !oid.is_data() || is_coded(oid, &sheep.redundancy(oid.vid(), view)) || self.altered.has(oid.vid())
        {
            return false;
        }
        self.awaits(sheep, oid, view).is_some_and(|active| {
            let round = &active.round;
            let whole_epoch = round.epoch == view.epoch && round.tgt_epoch.is_before(round.epoch);
            let recovers = !round.wildcard && !active.held.load(Ordering::Acquire) && !active.is_replaced();
            whole_epoch && recovers && active.early.load(Ordering::Acquire) && active.work.lock().listed
        })
    }

    /// Recovers an object now, if it is to be.
    pub fn hurry(&self, oid: Oid) {
        let Some(active) = self.current.lock().clone() else { return };
        let mut work = active.work.lock();
        if work.todo.contains(&oid) && !work.urgent.contains(&oid) {
            work.urgent.push_back(oid);
            active.wake.notify_one();
        }
    }

    /// Recovers an object before those that nobody has asked for.
    pub fn put_first(&self, oid: Oid) {
        if let Some(active) = self.current.lock().as_ref() {
            active.work.lock().queue.push_front(oid);
            active.wake.notify_one();
        }
    }
}

/// Whether a replica of a data object, which is created at its full length, was cut off by the file system.
pub fn is_damaged(store: &Store, replica: Replica, size: u64) -> bool {
    replica.oid.is_data() && store.is_cut_off(replica, Epoch(0), size)
}

/// Moves working files that are not at home here to the stale area, with this suffix. `known_only`: leave objects of
/// VDIs whose redundancy is not known yet.
pub async fn stash_strangers(
    sheep: &Arc<Sheep>,
    view: &View,
    suffix: Epoch,
    known_only: bool,
) -> sheepdog_store::Result<()> {
    let Some(store) = &sheep.store else { return Ok(()) };
    for replica in store.working() {
        let redundancy = sheep.redundancy(replica.oid.vid(), view);
        if known_only && !redundancy.known {
            continue;
        }
        let position = view.my_position(replica.oid, redundancy.copies);
        let at_home = match replica.strip {
            None => position.is_some(),
            Some(strip) => position == Some(usize::from(strip)),
        };
        if !at_home {
            store.stash(replica, suffix).await?;
        }
    }
    Ok(())
}

/// Runs rounds for ever.
pub async fn run(sheep: Arc<Sheep>, worker: Worker, mut rounds: mpsc::UnboundedReceiver<Round>) {
    while let Some(mut round) = rounds.recv().await {
        while let Ok(newer) = rounds.try_recv() {
            round = newer;
        }
        let Some(active) = sheep.recovery.current.lock().clone() else { continue };
        if active.round.epoch != round.epoch || active.is_replaced() {
            continue;
        }
        tracing::info!("recovering epoch {}", round.epoch);
        if round.wildcard {
            tracing::info!("starting wild card recovery, objects will be searched from all nodes");
        }
        let complete = round::run(&sheep, &worker, &active).await;
        if !complete {
            continue;
        }
        let mut current = sheep.recovery.current.lock();
        if current.as_ref().is_some_and(|c| Arc::ptr_eq(c, &active)) {
            *current = None;
            sheep.recovery.altered.complete();
        }
        drop(current);
        active.replace(); // nobody waits for this round any more
        if round.announce {
            let (sheep, epoch) = (sheep.clone(), round.epoch);
            tokio::spawn(async move { round::announce(&sheep, epoch).await });
        }
    }
}
