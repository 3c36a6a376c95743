//! A batch of writes through io_uring: submit all, wait for all.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use bytes::Bytes;
use io_uring::{IoUring, opcode, types};

use super::rw;

/// Most writes of one batch.
pub(crate) const DEPTH: usize = 64;

/// One write of a batch.
pub(crate) struct BatchWrite<'a> {
    pub(crate) file: &'a File,
    pub(crate) parts: &'a [Bytes],
    pub(crate) offset: u64,
}

/// A ring used by one thread.
pub(crate) struct Ring {
    ring: IoUring,
}

impl Ring {
    /// A working ring, or `None` where the kernel or a sandbox refuses it.
    pub(crate) fn new() -> Option<Ring> {
        // Deferred work wakes the thread once per batch instead of once per completion.
        let mut ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(DEPTH as u32)
            .or_else(|_| IoUring::new(DEPTH as u32))
            .ok()?;
        let mut probe = io_uring::Probe::new();
        ring.submitter().register_probe(&mut probe).ok()?;
        if !probe.is_supported(opcode::Writev::CODE) {
            return None;
        }
        // SAFETY: a no-op refers to no memory.
        unsafe { ring.submission().push(&opcode::Nop::new().build()).ok()? };
        ring.submit_and_wait(1).ok()?;
        ring.completion().next()?;
        Some(Ring { ring })
    }

    /// Performs all writes (at most [`DEPTH`]) and returns the result of each. An outer error means that the ring is
    /// unusable and the outcome of the writes unknown.
    pub(crate) fn write_batch(&mut self, writes: &[BatchWrite<'_>]) -> io::Result<Vec<io::Result<()>>> {
        assert!(writes.len() <= DEPTH, "batches are bounded by the committer");
        let iovs: Vec<Vec<libc::iovec>> = writes.iter().map(|w| rw::iovecs(w.parts)).collect();
        for (i, (write, iov)) in writes.iter().zip(&iovs).enumerate() {
            let entry =
                opcode::Writev::new(types::Fd(write.file.as_raw_fd()), iov.as_ptr(), iov.len() as u32)
                    .offset(write.offset)
                    .build()
                    .user_data(i as u64);
            // SAFETY: the file, the iovecs and what they point to outlive this call, which returns only after every
            // completion arrived, or leaks them (below).
            if unsafe { self.ring.submission().push(&entry) }.is_err() {
                return Err(self.abandon(writes, iovs));
            }
        }
        let mut outcome: Vec<Option<i32>> = vec![None; writes.len()];
        let mut missing = writes.len();
        while missing > 0 {
            match self.ring.submit_and_wait(missing) {
                Ok(_) => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
                Err(_) => return Err(self.abandon(writes, iovs)),
            }
            for entry in self.ring.completion() {
                if let Some(slot) = outcome.get_mut(entry.user_data() as usize)
                    && slot.replace(entry.result()).is_none()
                {
                    missing -= 1;
                }
            }
        }
        Ok(writes.iter().zip(outcome).map(|(w, r)| settle(w, r.unwrap_or(-libc::EIO))).collect())
    }

    /// The kernel may still read from the buffers: give them up for ever rather than have it write other data.
    fn abandon(&self, writes: &[BatchWrite<'_>], iovs: Vec<Vec<libc::iovec>>) -> io::Error {
        for write in writes {
            write.parts.iter().cloned().for_each(std::mem::forget);
        }
        std::mem::forget(iovs);
        io::Error::other("io_uring failed")
    }
}

/// Finishes a write from the kernel's result: short writes go on where they stopped.
fn settle(write: &BatchWrite<'_>, result: i32) -> io::Result<()> {
    let total: usize = write.parts.iter().map(Bytes::len).sum();
    match result {
        e if -e == libc::EAGAIN || -e == libc::EINTR => rw::write_all(write.file, write.parts, write.offset),
        e if e < 0 => Err(io::Error::from_raw_os_error(-e)),
        n if n as usize == total => Ok(()),
        n => rw::finish(write.file, write.parts, write.offset, n as usize),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_writes_everything_and_reports_each_failure() {
        let Some(mut ring) = Ring::new() else { return }; // forbidden here: the store does without
        let dir = tempfile::tempdir().expect("tempdir");
        let file = File::create_new(dir.path().join("file")).expect("create");
        let read_only = File::open(dir.path().join("file")).expect("open");
        let parts: Vec<Vec<Bytes>> =
            (0..DEPTH as u8).map(|i| vec![Bytes::from(vec![i; 100]), Bytes::from(vec![i + 1; 50])]).collect();
        let mut writes: Vec<BatchWrite<'_>> = parts
            .iter()
            .enumerate()
            .map(|(i, parts)| BatchWrite { file: &file, parts, offset: i as u64 * 150 })
            .collect();
        writes[7].file = &read_only;
        let results = ring.write_batch(&writes).expect("ring");
        let failed: Vec<usize> = (0..DEPTH).filter(|i| results[*i].is_err()).collect();
        assert_eq!(failed, [7]);
        let content = std::fs::read(dir.path().join("file")).expect("read");
        for (i, chunk) in content.chunks(150).enumerate().filter(|(i, _)| *i != 7) {
            assert_eq!(chunk, [&[i as u8; 100][..], &[i as u8 + 1; 50]].concat());
        }
        // The ring is still good.
        assert!(ring.write_batch(&writes[..2]).expect("ring").iter().all(Result::is_ok));
    }
}
