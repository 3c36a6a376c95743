//! What wakes a driver thread: SIGUSR1 from other processes, an eventfd from this one, the clock.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Blocks SIGUSR1, which local sheep send each other, in the calling thread and those it starts later: call it first
/// thing in `main`. Without it the signal kills the process. Harmless with other drivers, where it stays pending.
pub fn block_event_signal() -> std::io::Result<()> {
    Ok(event_signal().thread_block()?)
}

/// Whether the calling thread has it blocked.
pub fn event_signal_blocked() -> bool {
    SigSet::thread_get_mask().is_ok_and(|mask| mask.contains(Signal::SIGUSR1))
}

fn event_signal() -> SigSet {
    SigSet::from(Signal::SIGUSR1)
}

/// The eventfd that wakes the thread.
pub fn waker() -> std::io::Result<EventFd> {
    Ok(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?)
}

/// Wakes the thread. A full counter wakes it as well, so errors do not matter.
pub fn wake(waker: &EventFd) {
    let _ = waker.write(1);
}

/// The sleeping place of a driver thread.
pub struct Sleeper {
    signals: SignalFd,
}

impl Sleeper {
    /// Opens the signal descriptor.
    pub fn new() -> std::io::Result<Sleeper> {
        Ok(Sleeper {
            signals: SignalFd::with_flags(&event_signal(), SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?,
        })
    }

    /// Returns on a signal, a wake-up, or at `deadline`, whichever comes first, with all wake-ups taken.
    pub fn sleep_until(&self, deadline: Instant, waker: &EventFd) -> std::io::Result<()> {
        // One more millisecond than the rounded down rest, so that the deadline has passed on return.
        let rest = deadline.saturating_duration_since(Instant::now());
        let millis = if rest.is_zero() { 0 } else { rest.min(Duration::from_secs(1)).as_millis() as u16 + 1 };
        let mut fds = [
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(waker.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::from(millis)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        while self.signals.read_signal()?.is_some() {}
        let _ = waker.read();
        Ok(())
    }
}
