//! Cluster-wide mutexes of the local driver: `flock` on one file per number, in a directory beside the queue file (spec
//! 04, 11.7). The kernel takes a dead holder's locks away. The original's locks, process-shared mutexes in a fixed
//! directory that each starting sheep empties, exclude nobody reliably and are not shared.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::{DriverError, Lock};

/// Between two attempts to get a lock that somebody has.
const RETRY: Duration = Duration::from_millis(20);

/// The locks of the sheep that share a queue file.
pub struct Locks {
    dir: PathBuf,
}

impl Locks {
    /// Those of this queue file.
    pub fn new(queue: &Path) -> Locks {
        let mut dir = queue.as_os_str().to_owned();
        dir.push(".locks");
        Locks { dir: dir.into() }
    }

    /// Waits for a lock. Waiters are not in order.
    pub async fn lock(&self, id: u64) -> Result<Lock, DriverError> {
        let path = self.dir.join(format!("{id:016x}"));
        loop {
            let got = self.try_lock(&path);
            let got =
                got.map_err(|source| DriverError::Io { what: "cannot lock", path: path.clone(), source });
            if let Some(file) = got? {
                let alive = Arc::new(());
                return Ok(Lock::new(&alive.clone(), None, move |done| {
                    // Unlinked while it is locked, so that the directory does not grow.
                    let _ = std::fs::remove_file(&path);
                    drop((file, alive));
                    let _ = done.send(());
                }));
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// The locked file, unless somebody else has it.
    fn try_lock(&self, path: &Path) -> std::io::Result<Option<Flock<File>>> {
        match DirBuilder::new().mode(0o770).create(&self.dir) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o660).open(path)?;
        let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => file,
            Err((_, Errno::EAGAIN | Errno::EINTR)) => return Ok(None),
            Err((_, e)) => return Err(e.into()),
        };
        // The holder before may have unlinked it after it was opened here.
        let (ours, found) = (file.metadata()?, std::fs::metadata(path));
        Ok(found.is_ok_and(|found| (found.dev(), found.ino()) == (ours.dev(), ours.ino())).then_some(file))
    }
}
