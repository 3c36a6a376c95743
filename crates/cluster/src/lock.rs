//! Cluster-wide mutexes by number, as their holders see them (spec 04, 4.1, 11.7, 12.9, 13.5). Each driver has its own
//! way to agree on who is next; the daemon does not use them yet, they are for the HTTP and NFS services.

use std::sync::{Arc, Weak};

use tokio::sync::oneshot;

use crate::{DriverError, Lease};

/// What a driver does at the end of a lock; it answers when others can have it.
type End = Box<dyn FnOnce(oneshot::Sender<()>) + Send>;

/// A cluster-wide mutex that this process has, given by [`crate::Driver::lock`]. Others get it when it is released or
/// dropped, when the process dies, leaves, or loses its session; what is done under it is protected only as long as
/// [`Lock::is_held`].
pub struct Lock {
    end: Option<End>,
    alive: Weak<()>,
    lease: Option<Arc<Lease>>,
}

impl Lock {
    /// A lock that lasts as long as `alive` and is held under `lease`.
    pub(crate) fn new(
        alive: &Arc<()>,
        lease: Option<Arc<Lease>>,
        end: impl FnOnce(oneshot::Sender<()>) + Send + 'static,
    ) -> Lock {
        Lock { end: Some(Box::new(end)), alive: Arc::downgrade(alive), lease }
    }

    /// Whether nobody else can have it. `false` for good once the session or the membership ended, and as long as the
    /// membership service is silent.
    pub fn is_held(&self) -> bool {
        self.alive.strong_count() > 0 && self.lease.as_ref().is_none_or(|l| l.is_fresh())
    }

    /// Releases it and waits until others can have it. An error says that it had ended before.
    pub async fn release(mut self) -> Result<(), DriverError> {
        let (done, ended) = oneshot::channel();
        if let Some(end) = self.end.take().filter(|_| self.alive.strong_count() > 0) {
            end(done);
        } else {
            drop(done);
        }
        ended.await.map_err(|_| DriverError::LockLost)
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Some(end) = self.end.take() {
            end(oneshot::channel().0);
        }
    }
}

impl std::fmt::Debug for Lock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lock").field("held", &self.is_held()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    use crate::clock::Moment;

    fn lock(alive: &Arc<()>, lease: Option<Arc<Lease>>) -> (Lock, mpsc::Receiver<oneshot::Sender<()>>) {
        let (ended, ends) = mpsc::channel();
        (Lock::new(alive, lease, move |done| drop(ended.send(done))), ends)
    }

    #[test]
    fn a_lock_ends_once_by_release_or_drop() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let alive = Arc::new(());
        let (held, ends) = lock(&alive, None);
        assert!(held.is_held());
        let release = std::thread::spawn(move || runtime.block_on(held.release()));
        let _ = ends.recv().expect("it ends").send(());
        release.join().expect("no panic").expect("released");
        assert!(ends.recv().is_err(), "once");
        let (held, ends) = lock(&alive, None);
        drop(held);
        assert_eq!(ends.iter().count(), 1);
    }

    #[test]
    fn a_lock_is_lost_with_what_it_depends_on_and_doubtful_without_a_fresh_lease() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let (alive, lease) = (Arc::new(()), Arc::new(Lease::new()));
        let (held, ends) = lock(&alive, Some(lease.clone()));
        assert!(!held.is_held());
        lease.extend(Moment::now().after(Duration::from_secs(3600)));
        assert!(held.is_held());
        drop(alive);
        assert!(!held.is_held());
        let lost = runtime.block_on(held.release()).expect_err("lost");
        assert_eq!(lost.to_string(), "the lock was lost");
        assert_eq!(ends.iter().count(), 0, "nothing is left to end");
    }
}
