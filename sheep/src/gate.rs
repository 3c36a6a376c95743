//! The epoch gate: no replica write of an old epoch is still running when a new epoch is served.
//!
//! A peer write enters with its epoch and holds its [`Pass`] until it is on disk. Before a new epoch is published the
//! cluster task closes the gate and waits for the passes given out (the "write drain barrier" of spec 06, 3.4);
//! otherwise a late write could land in a replica that another node has already copied.
//!
//! Altering the copies of a VDI changes homes, too, without a new epoch: the gate counts such changes, and a write that
//! was sent before one of them does not get in after it.

use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use sheepdog_cluster::Lease;
use sheepdog_proto::Epoch;
use tokio::sync::oneshot;

struct Token {
    drained: Option<oneshot::Sender<()>>,
    /// The token after this one, if this one is being drained: it ends only after all passes of this one.
    next: Mutex<Option<Arc<Token>>>,
}

impl Token {
    fn new(drained: oneshot::Sender<()>) -> Arc<Token> {
        Arc::new(Token { drained: Some(drained), next: Mutex::new(None) })
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        if let Some(drained) = self.drained.take() {
            let _ = drained.send(());
        }
    }
}

/// Permission to write replicas in one epoch; held until the write is done.
#[derive(Clone)]
pub struct Pass {
    _token: Arc<Token>,
}

struct Open {
    epoch: Epoch,
    alters: u8,
    token: Arc<Token>,
    drained: oneshot::Receiver<()>,
}

/// Why a write does not get in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The gate is closed or open for another epoch, or this node is behind.
    Later,
    /// Copies were altered after the write was sent: it may lack a home.
    Over,
}

/// See the module's documentation.
#[derive(Default)]
pub struct Gate {
    open: Mutex<Option<Open>>,
    lease: OnceLock<Arc<Lease>>,
}

impl Gate {
    /// A pass for a write of `epoch`, or `None` while the gate is closed or open for another epoch.
    pub fn enter(&self, epoch: Epoch) -> Option<Pass> {
        let open = self.open.lock();
        let open = open.as_ref().filter(|o| o.epoch == epoch)?;
        Some(Pass { _token: open.token.clone() })
    }

    /// From now on writes of clients need this lease to be fresh.
    pub fn require(&self, lease: Arc<Lease>) {
        let _ = self.lease.set(lease);
    }

    /// Whether a write may be acknowledged: others have not gone on without this node.
    pub fn is_fresh(&self) -> bool {
        self.lease.get().is_none_or(|lease| lease.is_fresh())
    }

    /// As [`Gate::enter`] for what will be acknowledged, which was sent when copies had been altered `alters` times in the epoch
    /// (`None`: by a node that does not count). Also refused while the lease is not fresh.
    pub fn enter_to_acknowledge(&self, epoch: Epoch, alters: Option<u8>) -> Result<Pass, Refused> {
        if !self.is_fresh() {
            return Err(Refused::Later);
        }
        let open = self.open.lock();
        let open = open.as_ref().filter(|o| o.epoch == epoch).ok_or(Refused::Later)?;
        match alters.map_or(0, |theirs| theirs.wrapping_sub(open.alters) as i8) {
            0 => Ok(Pass { _token: open.token.clone() }),
            1.. => Err(Refused::Later),
            _ => Err(Refused::Over),
        }
    }

    /// Lets nobody in and waits until everybody is out.
    pub async fn close(&self) {
        let Some(open) = self.open.lock().take() else { return };
        drop(open.token);
        let _ = open.drained.await;
    }

    /// Waits until everybody who is in now is out; others may come in meanwhile.
    pub async fn drain(&self) {
        let (sender, drained) = oneshot::channel();
        let old = {
            let mut open = self.open.lock();
            let Some(current) = open.as_mut() else { return };
            let fresh =
                Open { epoch: current.epoch, alters: current.alters, token: Token::new(sender), drained };
            *current.token.next.lock() = Some(fresh.token.clone());
            std::mem::replace(current, fresh)
        };
        drop(old.token);
        let _ = old.drained.await;
    }

    /// Lets writes of `epoch` in, in which copies were altered `alters` times.
    pub fn open(&self, epoch: Epoch, alters: u32) {
        let (sender, drained) = oneshot::channel();
        *self.open.lock() = Some(Open { epoch, alters: alters as u8, token: Token::new(sender), drained });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn closing_waits_for_every_pass_and_refuses_new_ones() {
        let gate = Arc::new(Gate::default());
        assert!(gate.enter(Epoch(1)).is_none(), "closed at first");
        gate.open(Epoch(1), 0);
        assert!(gate.enter(Epoch(2)).is_none(), "another epoch");
        let pass = gate.enter(Epoch(1)).expect("open");
        let closing = tokio::spawn({
            let gate = gate.clone();
            async move { gate.close().await }
        });
        while gate.enter(Epoch(1)).is_some() {
            tokio::task::yield_now().await;
        }
        assert!(!closing.is_finished(), "a pass is out");
        drop(pass);
        closing.await.expect("closed");
        gate.open(Epoch(2), 0);
        let pass = gate.enter(Epoch(2)).expect("open");
        let draining = tokio::spawn({
            let gate = gate.clone();
            async move { gate.drain().await }
        });
        tokio::task::yield_now().await;
        assert!(gate.enter(Epoch(2)).is_some(), "others come in meanwhile");
        assert!(!draining.is_finished());
        drop(pass);
        draining.await.expect("drained");
        let pass = gate.enter(Epoch(2)).expect("open");
        let draining = tokio::spawn({
            let gate = gate.clone();
            async move { gate.drain().await }
        });
        tokio::task::yield_now().await;
        let closing = tokio::spawn({
            let gate = gate.clone();
            async move { gate.close().await }
        });
        tokio::task::yield_now().await;
        assert!(!closing.is_finished(), "a pass from before the drain is out");
        drop(pass);
        draining.await.expect("drained");
        closing.await.expect("closed");
    }

    #[test]
    fn a_write_to_the_homes_of_before_does_not_get_in_after_copies_were_altered() {
        let gate = Gate::default();
        gate.open(Epoch(1), 256 + 3);
        let enter = |alters| gate.enter_to_acknowledge(Epoch(1), alters).map(drop);
        assert_eq!(enter(Some(2)), Err(Refused::Over));
        assert_eq!(enter(Some(3)), Ok(()));
        assert_eq!(enter(Some(4)), Err(Refused::Later), "this node is behind");
        assert_eq!(enter(None), Ok(()), "a node of the original does not count");
        assert_eq!(gate.enter_to_acknowledge(Epoch(2), Some(3)).map(drop), Err(Refused::Later));
    }
}
