//! The clock of leases: it goes on while the machine is suspended, unlike [`std::time::Instant`]. Only what the
//! kernel counts is counted: a virtual machine that its host paused does not know of it.

use std::time::Duration;

/// A time since the machine started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(Duration);

impl Moment {
    /// This moment.
    pub fn now() -> Moment {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the pointer is valid for the call. The clock exists since Linux 2.6.39, nothing else can fail.
        unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut time) };
        Moment(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
    }

    /// So much later.
    pub fn after(self, time: Duration) -> Moment {
        Moment(self.0 + time)
    }

    /// Whole milliseconds since the machine started.
    pub fn as_millis(self) -> u64 {
        self.0.as_millis() as u64
    }
}
