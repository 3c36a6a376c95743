//! Since when this store knows what it had.
//!
//! Recovery may pass over an epoch for an object when a home of that epoch says that it did not have the object then: a
//! write of that epoch would have been acknowledged by all homes, this one included. A store that was empty or lost a
//! disk since cannot say so (spec 06, W-02). This side file of the metadata directory remembers the first epoch for
//! which it can.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;
use sheepdog_proto::Epoch;
use sheepdog_store::replace_file;

const FILE: &str = "complete_since";
/// Not known yet: the store is new.
const UNKNOWN: u32 = u32::MAX;

/// See the module's documentation.
pub struct History {
    dir: PathBuf,
    since: AtomicU32,
    /// The last epoch that this node took part in.
    current: AtomicU32,
    /// How often a disk was lost.
    losses: AtomicU32,
    /// Held while the file is replaced.
    writing: Mutex<()>,
}

impl History {
    /// Reads the side file. A store of the original has none; it is trusted from its beginning if it has epoch logs
    /// (`latest` > 0). `new_disk`: a disk came without anything on it, so only epochs after `latest` count. So do they if
    /// the file says nothing that can be understood.
    pub fn open(dir: &Path, latest: Epoch, new_disk: bool) -> History {
        let stored = match std::fs::read_to_string(dir.join(FILE)) {
            Ok(text) => text.trim().parse().ok(),
            Err(error) if error.kind() == ErrorKind::NotFound => Some(1),
            Err(_) => None,
        };
        let since = match (latest.0, stored) {
            (0, _) => UNKNOWN,
            (_, Some(since)) if !new_disk => since,
            (latest, _) => latest + 1,
        };
        let history = History {
            dir: dir.to_owned(),
            since: AtomicU32::new(UNKNOWN),
            current: AtomicU32::new(latest.0),
            losses: AtomicU32::new(0),
            writing: Mutex::new(()),
        };
        if since != UNKNOWN {
            history.set(since);
        }
        history
    }

    fn set(&self, since: u32) {
        let _one_at_a_time = self.writing.lock();
        self.since.store(since, Ordering::Release);
        if let Err(error) = replace_file(&self.dir, FILE, format!("{since}\n").as_bytes()) {
            tracing::error!("cannot write {}: {error}", self.dir.join(FILE).display());
        }
    }

    /// The node is about to take part in `epoch`, and has not logged it yet: a new store knows what it has from here on.
    pub fn note(&self, epoch: Epoch) {
        self.current.store(epoch.0, Ordering::Release);
        if self.since.load(Ordering::Acquire) == UNKNOWN {
            self.set(epoch.0);
        }
    }

    /// The store begins anew in `epoch` (format).
    pub fn restart(&self, epoch: Epoch) {
        self.set(epoch.0);
    }

    /// How often [`History::lose`] was called in this process.
    pub fn losses(&self) -> u32 {
        self.losses.load(Ordering::Acquire)
    }

    /// Objects are about to be lost (a disk): what is missing from now on proves nothing about the epochs up to now.
    pub fn lose(&self) {
        self.losses.fetch_add(1, Ordering::AcqRel);
        let next = self.current.load(Ordering::Acquire).saturating_add(1);
        if self.since.load(Ordering::Acquire) < next {
            self.set(next);
        }
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

    #[test]
    fn a_file_that_cannot_be_understood_proves_nothing() {
        let dir = tempfile::tempdir().expect("temporary directory");
        for content in ["", "3x\n", "-1", "\0\0\0"] {
            std::fs::write(dir.path().join(FILE), content).expect("write");
            let history = History::open(dir.path(), Epoch(5), false);
            assert!(!history.covers(Epoch(5)) && history.covers(Epoch(6)), "{content:?}");
            assert_eq!(std::fs::read_to_string(dir.path().join(FILE)).expect("read"), "6\n", "replaced");
        }
    }

    #[test]
    fn what_is_lost_in_an_epoch_proves_nothing_up_to_that_epoch() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let history = History::open(dir.path(), Epoch(3), false);
        history.note(Epoch(4));
        history.lose();
        assert!(!history.covers(Epoch(4)) && history.covers(Epoch(5)));
        history.lose();
        assert!(history.covers(Epoch(5)), "a second loss in the same epoch changes nothing");
        assert!(!History::open(dir.path(), Epoch(4), false).covers(Epoch(4)), "remembered");
    }
}
