//! The workers of a disk: large writes, creates, and everything structural.
//!
//! They keep 4 MiB writes and unlinks out of the committer's way. Small creates that are queued together are performed
//! together, so that they share the directory's sync.

use std::sync::Arc;

use crate::commit::{self, BATCH_BYTES};
use crate::create;
use crate::disk::Disk;
use crate::queue::{Job, Task};

/// Worker threads of a disk.
pub(crate) const WORKERS: usize = 2;
/// Writes of fewer bytes go to the committer.
pub(crate) const SMALL: usize = 256 << 10;
/// Most creates performed together.
const CREATES: usize = 32;

fn is_small_create(job: &Job) -> bool {
    matches!(&job.task, Task::Create(c) if c.data.len() < SMALL)
}

/// A worker thread.
pub(crate) fn run(disk: Arc<Disk>) {
    let more = |batch: &[Job], next: &Job| {
        let bytes = batch.iter().map(Job::len).sum::<usize>() + next.len();
        batch.len() < CREATES && bytes <= BATCH_BYTES && batch.iter().chain([next]).all(is_small_create)
    };
    while let Some(mut jobs) = disk.large.take(more) {
        if matches!(jobs.first(), Some(Job { task: Task::Create(_), .. })) {
            create::create_batch(&disk, jobs);
        } else if let Some(job) = jobs.pop() {
            perform(&disk, job);
        }
    }
}

fn perform(disk: &Arc<Disk>, job: Job) {
    match job.task {
        Task::Write(_) => commit::write_batch(disk, &mut None, vec![job]),
        Task::Create(_) => create::create_batch(disk, vec![job]),
        Task::Exec(exec) => {
            let removed = disk.is_removed().then(|| job.store.disk_failed(disk));
            (exec.run)(&job.store, removed.map_or(Ok(disk), Err));
            job.store.finish(&job.claim);
        }
    }
}
