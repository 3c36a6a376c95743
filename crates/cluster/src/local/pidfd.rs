//! A descriptor that tells when a process ended: one system call where `/proc` takes several, and no doubt about
//! recycled pids.

use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// A process that may have ended.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Of the process that has this pid now; `None` if there is none or the kernel (before 5.3) has no such thing.
    pub fn open(pid: i32) -> Option<PidFd> {
        // SAFETY: pidfd_open takes two integers and touches no memory.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = RawFd::try_from(fd).ok().filter(|fd| *fd >= 0)?;
        // SAFETY: the kernel has just given this descriptor to us; it is closed on exec by itself.
        Some(PidFd(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Whether the process has ended, reaped or not.
    pub fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_shows_before_the_process_is_reaped() {
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .expect("cat starts");
        let fd = PidFd::open(child.id() as i32).expect("a process");
        assert!(!fd.has_ended());
        child.kill().expect("kill");
        while !fd.has_ended() {
            std::thread::yield_now();
        }
        child.wait().expect("wait");
        assert!(fd.has_ended());
    }
}
