//! Changing the disks of this node while it runs: MD_PLUG_DISKS, MD_UNPLUG_DISKS (spec 02, 10.5; spec 03, section 15).
//!
//! The ring of disks changes at once, and the answer says so. Moving the objects takes longer: one task at a time tidies
//! up behind the changes, and an unplugged disk is let go only when the others have what it held. Its progress shows as
//! recovery.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use sheepdog_proto::admin::{RECOVERY_OBJECTS, RecoveryState};
use sheepdog_proto::{ResultCode, cstr};
use sheepdog_store::{PlugError, Released, Store, Unplugged};

use crate::cluster::handle::Command;
use crate::sheep::Sheep;

/// How often disks are looked at that nobody may be using.
const WATCH: Duration = Duration::from_secs(5);
/// Pause before files that could not be moved are tried again, first and longest.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// See the module's documentation.
#[derive(Default)]
pub struct Disks {
    /// Held by the task that tidies up.
    tidying: tokio::sync::Mutex<()>,
    /// Most files seen on unplugged disks since there were none.
    most: AtomicU64,
}

impl Disks {
    /// How far the moving off unplugged disks is; `None` if there is none.
    pub fn draining(&self, sheep: &Sheep) -> Option<RecoveryState> {
        let Some(left) = sheep.store.as_ref().and_then(Store::draining) else {
            self.most.store(0, Relaxed);
            return None;
        };
        let left = left as u64;
        let total = self.most.fetch_max(left, Relaxed).max(left);
        let finished = total - left;
        Some(RecoveryState {
            in_recovery: 1,
            state: RECOVERY_OBJECTS,
            nr_finished: finished,
            nr_total: total,
            ..RecoveryState::zeroed()
        })
    }
}

/// The comma-separated paths before the NUL.
fn paths(payload: &[u8]) -> Vec<PathBuf> {
    let names = cstr(payload).split(|b| *b == b',').filter(|name| !name.is_empty());
    names.map(|name| PathBuf::from(OsStr::from_bytes(name))).collect()
}

/// Changes the disks one by one on a thread that may block. Those that fail are logged.
async fn change<T: Send + 'static>(
    sheep: &Sheep,
    payload: &[u8],
    one: impl Fn(&Store, &PathBuf) -> Result<T, PlugError> + Send + 'static,
) -> Vec<T> {
    let Some(store) = sheep.store.clone() else {
        tracing::error!("a gateway has no disks");
        return Vec::new();
    };
    let paths = paths(payload);
    let work = tokio::task::spawn_blocking(move || {
        let outcomes = paths.iter().map(|path| one(&store, path));
        let done = outcomes.filter_map(|outcome| outcome.inspect_err(|e| tracing::error!("{e}")).ok());
        done.collect()
    });
    work.await.unwrap_or_else(|error| {
        tracing::error!("changing the disks failed: {error}");
        Vec::new()
    })
}

/// MD_PLUG_DISKS: success if at least one disk was added.
pub async fn plug(sheep: &Arc<Sheep>, payload: &[u8]) -> ResultCode {
    let lines = change(sheep, payload, |store, path| store.plug(path)).await;
    if lines.is_empty() {
        return ResultCode::UNKNOWN;
    }
    lines.iter().for_each(|line| tracing::info!("{line}"));
    sheep.cluster.send(Command::Rebuild);
    tokio::spawn(tidy(sheep.clone()));
    ResultCode::SUCCESS
}

/// MD_UNPLUG_DISKS: success if at least one disk was taken out. Without any disk the node leaves the cluster and ends.
pub async fn unplug(sheep: &Arc<Sheep>, payload: &[u8]) -> ResultCode {
    let outcomes = change(sheep, payload, |store, path| {
        let outcome = store.unplug(path)?;
        tracing::info!("unplugging {}", path.display());
        Ok(outcome)
    })
    .await;
    if outcomes.is_empty() {
        return ResultCode::UNKNOWN;
    }
    if outcomes.contains(&Unplugged::Last) {
        tracing::error!("no disks plugged, going down");
        sheep.cluster.leave();
        sheep.cluster.kill();
    } else {
        tokio::spawn(tidy(sheep.clone()));
    }
    ResultCode::SUCCESS
}

/// Notices disks that vanish or become read-only while nobody uses them, for ever.
pub async fn watch(sheep: Arc<Sheep>) {
    let Some(store) = sheep.store.clone() else { return };
    loop {
        tokio::time::sleep(WATCH).await;
        let store = store.clone();
        if let Err(error) = tokio::task::spawn_blocking(move || store.check_disks()).await {
            tracing::error!("looking at the disks failed: {error}");
        }
    }
}

/// Moves objects to the disks that they belong to, until all unplugged disks are let go.
async fn tidy(sheep: Arc<Sheep>) {
    let Some(store) = &sheep.store else { return };
    let _turn = sheep.disks.tidying.lock().await;
    let mut pause = PAUSE.0;
    loop {
        let report = store.settle().await;
        if report.moved + report.failed > 0 {
            tracing::info!("{} objects moved to their disks, {} not", report.moved, report.failed);
        }
        for disk in store.release_drained(&report.stuck).await {
            released(&sheep, &disk);
        }
        if store.draining().is_none() {
            return;
        }
        if report.failed > 0 {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        } else {
            // Something was stashed or linked meanwhile.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

fn released(sheep: &Sheep, disk: &Released) {
    if disk.lost == 0 {
        tracing::info!("unplugged {}: all its objects are on the other disks", disk.path.display());
        return;
    }
    tracing::error!("unplugged {}: {} files on it could not be read", disk.path.display(), disk.lost);
    sheep.cluster.send(Command::Rebuild);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_end_at_the_nul_and_empty_ones_do_not_count() {
        assert_eq!(paths(b"/a,/b/\0,/c"), [PathBuf::from("/a"), PathBuf::from("/b/")]);
        assert_eq!(paths(b",/a,,"), [PathBuf::from("/a")]);
        assert!(paths(b"").is_empty() && paths(b"\0").is_empty());
    }
}
