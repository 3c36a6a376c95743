//! Giving space back: dropped references, ledgers, and the queue that works them off (spec 05, section 10).

use std::sync::Arc;

use sheepdog_proto::header::RefRequest;
use sheepdog_proto::ledger::{LEDGER_LEN, Ledger};
use sheepdog_proto::{Oid, ResultCode};
use sheepdog_store::{Store, StoreError};
use tokio::sync::{Mutex, mpsc};

use crate::order::PendingTurn;
use crate::sheep::Sheep;

/// References waiting to be dropped; whoever adds more waits.
const QUEUE: usize = 64 << 10;
/// Drops in progress at once; one whose ledgers disagree waits for seconds.
const WORKERS: usize = 16;

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
    /// Ledger updates of this node, one at a time per node as the original does.
    ledgers: Mutex<()>,
}

impl Reclaim {
    /// The queue and its receiving end, for [`run`].
    pub fn new() -> (Reclaim, mpsc::Receiver<Pending>) {
        let (queue, receiver) = mpsc::channel(QUEUE);
        (Reclaim { queue, ledgers: Mutex::new(()) }, receiver)
    }

    /// Whether no reference waits to be dropped.
    pub fn is_idle(&self) -> bool {
        self.queue.capacity() == self.queue.max_capacity()
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
    let _one_at_a_time = sheep.gateway.reclaim.ledgers.lock().await;
    let (mut ledger, existed) = match store.read(replica, 0, LEDGER_LEN).await {
        Ok(bytes) => (Ledger::decode(&bytes), true),
        Err(StoreError::NoObject) => (Ledger::absent(), false),
        Err(e) => return Err(fault(e)),
    };
    if !ledger.drop_reference(drop.generation, drop.count) {
        return Err(ResultCode::INVALID_PARMS);
    }
    if ledger.is_zero() {
        if existed {
            store.remove(replica).await.map_err(fault)?;
        }
        return Ok(true);
    }
    store.create(replica, LEDGER_LEN as u64, 0, ledger.encode().into()).await.map_err(fault)?;
    Ok(false)
}
