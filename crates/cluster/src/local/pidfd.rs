//! A descriptor that tells when a process ended: one system call where `/proc` takes several, and no doubt about
//! recycled pids.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

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

    /// Of the process that connected this Unix socket; `None` if it is gone or the kernel (before 6.5) cannot tell.
    pub fn of_peer(socket: BorrowedFd<'_>) -> Option<PidFd> {
        let mut fd: libc::c_int = -1;
        let mut len = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: the socket is open for the call; the value is an int, and `len` says so.
        let code = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERPIDFD,
                (&raw mut fd).cast(),
                &raw mut len,
            )
        };
        if code != 0 || fd < 0 {
            return None;
        }
        // SAFETY: the kernel has just given this descriptor to us; it is closed on exec by itself.
        Some(PidFd(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// To wait for the end of the process: it is readable then. Inside a runtime only.
    pub fn watch(self) -> io::Result<AsyncFd<PidFd>> {
        // SAFETY: the descriptor is this value's own, always the same, and open until it is dropped.
        let watched = unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) };
        watched.map_err(|error| error.into_parts().1)
    }

    /// Whether the process has ended, reaped or not.
    pub fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }
}

/// Readable once the process has ended.
impl AsRawFd for PidFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
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
