//! Since when this store knows what it had.
//!
//! Recovery may pass over an epoch for an object when a home of that epoch says that it did not have the object then: a
//! write of that epoch would have been acknowledged by all homes, this one included. A store that was empty or lost a
//! disk since cannot say so (spec 06, W-02). This side file of the metadata directory remembers the first epoch for
//! which it can.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use sheepdog_proto::Epoch;

const FILE: &str = "complete_since";
/// Not known yet: the store is new.
const UNKNOWN: u32 = u32::MAX;

/// See the module's documentation.
pub struct History {
    path: PathBuf,
    since: AtomicU32,
}

impl History {
    /// Reads the side file. A store of the original has none; it is trusted from its beginning if it has epoch logs
    /// (`latest` > 0). `new_disk`: a disk came without anything on it, so only epochs after `latest` count.
    pub fn open(base: &Path, latest: Epoch, new_disk: bool) -> History {
        let path = base.join(FILE);
        let stored = std::fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
        let since = match (latest.0, new_disk) {
            (0, _) => UNKNOWN,
            (latest, true) => latest + 1,
            (_, false) => stored.unwrap_or(1),
        };
        let history = History { path, since: AtomicU32::new(UNKNOWN) };
        if since != UNKNOWN {
            history.set(since);
        }
        history
    }

    fn set(&self, since: u32) {
        self.since.store(since, Ordering::Release);
        if let Err(error) = std::fs::write(&self.path, format!("{since}\n")) {
            tracing::error!("cannot write {}: {error}", self.path.display());
        }
    }

    /// The node takes part in `epoch`: a new store knows what it has from here on.
    pub fn note(&self, epoch: Epoch) {
        if self.since.load(Ordering::Acquire) == UNKNOWN {
            self.set(epoch.0);
        }
    }

    /// The store begins anew in `epoch` (format, loss of a disk).
    pub fn restart(&self, epoch: Epoch) {
        self.set(epoch.0);
    }

    /// Whether "I did not have it" is true for `epoch`.
    pub fn covers(&self, epoch: Epoch) -> bool {
        epoch.0 >= self.since.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_store_or_disk_knows_nothing_of_the_past() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let fresh = History::open(dir.path(), Epoch(0), true);
        assert!(!fresh.covers(Epoch(7)));
        fresh.note(Epoch(7));
        assert!(fresh.covers(Epoch(7)) && !fresh.covers(Epoch(6)));
        assert!(History::open(dir.path(), Epoch(9), false).covers(Epoch(7)), "remembered");
        assert!(!History::open(dir.path(), Epoch(9), true).covers(Epoch(9)), "a disk was replaced");
        assert!(!History::open(dir.path(), Epoch(9), false).covers(Epoch(9)), "and stays remembered");
    }

    #[test]
    fn a_store_of_the_original_is_trusted() {
        let dir = tempfile::tempdir().expect("temporary directory");
        assert!(History::open(dir.path(), Epoch(3), false).covers(Epoch(1)));
    }
}
