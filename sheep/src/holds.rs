//! Replicas that must not change for a moment, because they are being replaced by a copy of another node's.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use sheepdog_proto::Oid;
use tokio::sync::watch;

#[derive(Default)]
struct Shared {
    count: AtomicUsize,
    held: Mutex<HashMap<Oid, watch::Receiver<()>>>,
}

/// The objects held on this node.
#[derive(Clone, Default)]
pub struct Holds {
    shared: Arc<Shared>,
}

/// Keeps writers of one object out until dropped.
pub struct Held {
    shared: Arc<Shared>,
    oid: Oid,
    _release: watch::Sender<()>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.shared.held.lock().remove(&self.oid);
        self.shared.count.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Holds {
    /// Holds an object, after whoever holds it now.
    pub async fn hold(&self, oid: Oid) -> Held {
        loop {
            let other = {
                let mut held = self.shared.held.lock();
                match held.get(&oid) {
                    Some(other) => other.clone(),
                    None => {
                        let (release, receiver) = watch::channel(());
                        held.insert(oid, receiver);
                        self.shared.count.fetch_add(1, Ordering::AcqRel);
                        return Held { shared: self.shared.clone(), oid, _release: release };
                    }
                }
            };
            ended(other).await;
        }
    }

    /// Whether this object is held.
    pub fn is_held(&self, oid: Oid) -> bool {
        !self.is_free() && self.shared.held.lock().contains_key(&oid)
    }

    /// Whether nothing is held.
    pub fn is_free(&self) -> bool {
        self.shared.count.load(Ordering::Acquire) == 0
    }

    /// Waits until nobody holds the object.
    pub async fn released(&self, oid: Oid) {
        while self.shared.count.load(Ordering::Acquire) > 0 {
            let other = self.shared.held.lock().get(&oid).cloned();
            match other {
                Some(other) => ended(other).await,
                None => return,
            }
        }
    }
}

/// A hold ends when its sender is gone.
async fn ended(mut hold: watch::Receiver<()>) {
    while hold.changed().await.is_ok() {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_held_object_waits_and_others_do_not() {
        let holds = Holds::default();
        let held = holds.hold(Oid(1)).await;
        holds.released(Oid(2)).await;
        let waiting = tokio::spawn({
            let holds = holds.clone();
            async move { holds.released(Oid(1)).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(held);
        waiting.await.expect("released");
        drop(holds.hold(Oid(1)).await);
    }
}
