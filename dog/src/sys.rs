//! The few system calls without a safe interface: local time and the terminal's width.

use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

/// A moment in the machine's local time.
#[derive(Debug, Clone, Copy)]
pub struct LocalTime {
    /// Year.
    pub year: i32,
    /// Month, 0..=11.
    pub month: usize,
    /// Day of the month, 1..=31.
    pub day: i32,
    /// Day of the week, Sunday = 0.
    pub weekday: usize,
    /// Hour.
    pub hour: i32,
    /// Minute.
    pub minute: i32,
    /// Second.
    pub second: i32,
}

/// Converts seconds since 1970 by the machine's time zone (`TZ`). Times out of range give 1970.
pub fn local_time(seconds: u64) -> LocalTime {
    let time = seconds as libc::time_t;
    let mut tm = MaybeUninit::<libc::tm>::zeroed();
    // SAFETY: both pointers are valid for the call; an all-zero `tm` is a valid value, so it may be read even when
    // the conversion fails and leaves it untouched.
    let tm = unsafe {
        libc::localtime_r(&time, tm.as_mut_ptr());
        tm.assume_init()
    };
    LocalTime {
        year: tm.tm_year + 1900,
        month: tm.tm_mon.clamp(0, 11) as usize,
        day: tm.tm_mday,
        weekday: tm.tm_wday.clamp(0, 6) as usize,
        hour: tm.tm_hour,
        minute: tm.tm_min,
        second: tm.tm_sec,
    }
}

/// Columns of the terminal on stdout; `None` if it is not a terminal.
pub fn terminal_width() -> Option<usize> {
    terminal_size().map(|(columns, _)| columns)
}

/// Columns and lines of the terminal on stdout; `None` if it is not a terminal.
pub fn terminal_size() -> Option<(usize, usize)> {
    let mut size = MaybeUninit::<libc::winsize>::zeroed();
    // SAFETY: TIOCGWINSZ writes one `winsize` to the pointer, which is valid; all-zero is a valid value.
    let (status, size) = unsafe {
        let status = libc::ioctl(std::io::stdout().as_raw_fd(), libc::TIOCGWINSZ, size.as_mut_ptr());
        (status, size.assume_init())
    };
    (status == 0).then_some((size.ws_col.into(), size.ws_row.into()))
}
