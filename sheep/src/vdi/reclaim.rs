//! Giving space back: dropped references, ledgers, and the queue that works them off (spec 05, section 10).

use std::sync::Arc;

use futures_util::StreamExt;
use sheepdog_proto::header::RefRequest;
use sheepdog_proto::ledger::{LEDGER_LEN, Ledger};
use sheepdog_proto::{Oid, ResultCode};
use sheepdog_store::{Store, StoreError};
use tokio::sync::{Mutex, mpsc};

use crate::order::{Order, PendingTurn};
use crate::sheep::Sheep;

/// References waiting to be dropped; whoever adds more waits.
const QUEUE: usize = 64 << 10;
/// Drops in progress at once; one whose ledgers disagree waits for seconds.
const WORKERS: usize = 16;

/// Objects of deleted hypervolumes that are removed at once.
const REMOVALS: usize = 16;

/// A reference that a table entry held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reference {
    /// The data object.
    pub data: Oid,
    /// Copies between the creating reference and this one.
    pub generation: u32,
    /// How often it was copied.
    pub count: u32,
}

/// A reference to drop, with its place in the order of requests to the object if dropping it removes the object: a
/// client that discards a block and writes it again must not see the removal overtake the write.
pub struct Pending {
    reference: Reference,
    removal: Option<PendingTurn>,
}

impl Pending {
    /// Takes the place in the order now.
    pub fn new(sheep: &Sheep, reference: Reference) -> Pending {
        let unshared = reference.generation == 0 && reference.count == 0;
        let removal = unshared.then(|| sheep.gateway.removal_turn(reference.data));
        Pending { reference, removal }
    }
}

/// The queue of references to drop.
pub struct Reclaim {
    queue: mpsc::Sender<Pending>,
    /// Updates of this node's ledgers, one at a time for each.
    ledgers: Order,
    /// Held while what deleted hypervolumes left is removed, one after the other.
    removing: Mutex<()>,
}

impl Reclaim {
    /// The queue and its receiving end, for [`run`].
    pub fn new() -> (Reclaim, mpsc::Receiver<Pending>) {
        let (queue, receiver) = mpsc::channel(QUEUE);
        (Reclaim { queue, ledgers: Order::default(), removing: Mutex::default() }, receiver)
    }

    /// Whether no reference waits to be dropped and nothing to be removed.
    pub fn is_idle(&self) -> bool {
        self.queue.capacity() == self.queue.max_capacity() && self.removing.try_lock().is_ok()
    }

    /// Adds a reference; waits while the queue is full.
    pub async fn enqueue(&self, reference: Pending) {
        // The receiver ends only with the process.
        let _ = self.queue.send(reference).await;
    }
}

/// Works the queue off and looks for what dropped references cannot free, for ever.
pub async fn run(sheep: Arc<Sheep>, receiver: mpsc::Receiver<Pending>) {
    tokio::spawn(super::orphans::run(sheep.clone()));
    let receiver = Arc::new(Mutex::new(receiver));
    for _ in 0..WORKERS {
        let (sheep, receiver) = (sheep.clone(), receiver.clone());
        tokio::spawn(async move {
            loop {
                let next = receiver.lock().await.recv().await;
                let Some(reference) = next else { return };
                drop_reference(&sheep, reference).await;
            }
        });
    }
}

/// Drops one reference: removes the object if it was never copied, else tells its ledger. Failures leak and are
/// logged; they never remove what is still referenced.
pub async fn drop_reference(sheep: &Arc<Sheep>, pending: Pending) {
    let reference = pending.reference;
    let ledger = Oid::ledger_of(reference.data);
    let result = if let Some(removal) = pending.removal {
        remove_unshared(sheep, reference.data, ledger, removal).await
    } else {
        let body = RefRequest { oid: ledger, generation: reference.generation, count: reference.count };
        sheep.gateway.decref_object(sheep, body).await
    };
    match result {
        Ok(()) | Err(ResultCode::NO_OBJ) => {}
        Err(code) => tracing::error!("{}: reference was not dropped: {code}", reference.data),
    }
}

/// As [`remove_all`], in the background. What is not removed when this node ends goes with the VDI's family
/// ([`super::orphans`]).
pub fn remove_later(sheep: &Arc<Sheep>, oids: impl Iterator<Item = Oid> + Send + 'static) {
    let sheep = sheep.clone();
    tokio::spawn(async move {
        let _alone = sheep.gateway.reclaim.removing.lock().await;
        remove_all(&sheep, oids).await;
    });
}

/// Removes objects that nobody names and nobody counts.
pub async fn remove_all(sheep: &Arc<Sheep>, oids: impl Iterator<Item = Oid> + Send) {
    let ctime = sheep.views.load().ctime;
    // A format begins a cluster in which the same names may mean other objects.
    let oids = oids.take_while(|_| sheep.views.load().ctime == ctime);
    futures_util::stream::iter(oids)
        .for_each_concurrent(REMOVALS, |oid| async move {
            match sheep.gateway.remove_object(sheep, oid).await {
                Ok(()) | Err(ResultCode::NO_OBJ) => {}
                Err(code) => tracing::error!("{oid}: was not removed: {code}"),
            }
        })
        .await;
}

/// A reference that was never copied is the only one; a ledger says otherwise, and then nothing is removed.
async fn remove_unshared(
    sheep: &Arc<Sheep>,
    data: Oid,
    ledger: Oid,
    removal: PendingTurn,
) -> Result<(), ResultCode> {
    let turn = removal.ready().await;
    match sheep.gateway.read_object(sheep, ledger, 0, 4).await {
        Err(ResultCode::NO_OBJ) => sheep.gateway.remove_in_turn(sheep, data, turn).await,
        Ok(_) => {
            tracing::error!("{data}: dropped as unshared although it has a ledger; keeping it");
            Ok(())
        }
        Err(code) => Err(code),
    }
}

/// Bytes of a ledger that nearly always are all that is used: a thousand generations.
const LEDGER_HEAD: usize = 4096;
/// What a disk writes whole or not at all.
const SECTOR: usize = 512;

/// The stored ledger as far as this drop needs it: the beginning, unless that cannot say whether references are left.
async fn read_ledger(store: &Store, drop: &RefRequest) -> Result<Option<Ledger>, StoreError> {
    let replica = Sheep::replica(drop.oid);
    let head = match store.read(replica, 0, LEDGER_HEAD).await {
        Ok(bytes) => Ledger::decode(&bytes),
        Err(StoreError::NoObject) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut after = head.clone();
    let inside = (drop.generation as usize + 2) * 4 <= LEDGER_HEAD;
    if inside && after.drop_reference(drop.generation, drop.count) && !after.is_zero() {
        return Ok(Some(head));
    }
    Ok(Some(Ledger::decode(&store.read(replica, 0, LEDGER_LEN).await?)))
}

/// DECREF_PEER on this node's replica of the ledger. `true` = no reference is left and the ledger is gone.
pub async fn drop_in_ledger(
    sheep: &Arc<Sheep>,
    store: &Store,
    drop: &RefRequest,
) -> Result<bool, ResultCode> {
    if !Ledger::is_valid_generation(drop.generation) {
        return Err(ResultCode::INVALID_PARMS);
    }
    let replica = Sheep::replica(drop.oid);
    let fault = |e: StoreError| crate::faults::peer_result(sheep, &e);
    let _one_at_a_time = sheep.gateway.reclaim.ledgers.turn(drop.oid, 0..1, true).await;
    let stored = read_ledger(store, drop).await.map_err(fault)?;
    let existed = stored.is_some();
    let mut ledger = stored.unwrap_or_else(Ledger::absent);
    if !ledger.drop_reference(drop.generation, drop.count) {
        return Err(ResultCode::INVALID_PARMS);
    }
    if ledger.is_zero() {
        if existed {
            sheep.tombstones.add(drop.oid, sheep.views.epoch());
            store.remove(replica).await.map_err(fault)?;
        }
        return Ok(true);
    }
    // Both slots or none: one without the other could free what is still referenced.
    let at = drop.generation as usize * 4;
    if existed && at / SECTOR == (at + 7) / SECTOR {
        let slot = |i: usize| ledger.slots().get(i).copied().unwrap_or(0).to_le_bytes();
        let changed = [slot(at / 4), slot(at / 4 + 1)].concat();
        store.write(replica, LEDGER_LEN as u64, at as u64, changed.into()).await.map_err(fault)?;
    } else {
        store.create(replica, LEDGER_LEN as u64, 0, ledger.encode().into()).await.map_err(fault)?;
    }
    Ok(false)
}
