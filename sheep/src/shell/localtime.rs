//! Local wall-clock time for log lines and rotated file names: the one C function the standard library lacks.

use std::time::{SystemTime, UNIX_EPOCH};

/// A moment as a clock on the wall shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalTime {
    /// Full year.
    pub year: i32,
    /// 1 to 12.
    pub month: u32,
    /// 1 to 31.
    pub day: u32,
    /// 0 to 23.
    pub hour: u32,
    /// 0 to 59.
    pub minute: u32,
    /// 0 to 60.
    pub second: u32,
}

impl LocalTime {
    /// In the time zone of the process (`TZ`, `/etc/localtime`).
    pub fn at(time: SystemTime) -> LocalTime {
        let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as libc::time_t);
        // SAFETY: an all-zero `tm` is valid (integers and a nullable pointer); `localtime_r` writes only to the
        // structure it is given, and both references outlive the call. The zone pointer in it is not used.
        let tm = unsafe {
            let mut tm: libc::tm = std::mem::zeroed();
            libc::localtime_r(&seconds, &mut tm);
            tm
        };
        LocalTime {
            year: tm.tm_year + 1900,
            month: tm.tm_mon as u32 + 1,
            day: tm.tm_mday as u32,
            hour: tm.tm_hour as u32,
            minute: tm.tm_min as u32,
            second: tm.tm_sec as u32,
        }
    }

    /// English abbreviation of the month.
    pub fn month_name(&self) -> &'static str {
        const NAMES: [&str; 12] =
            ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
        NAMES.get(self.month as usize - 1).copied().unwrap_or("???")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn midday_of_a_day_is_that_day_in_most_zones() {
        let time = LocalTime::at(UNIX_EPOCH + Duration::from_secs(1_700_049_600));
        assert_eq!((time.year, time.month, time.month_name()), (2023, 11, "Nov"));
        assert!((14..=16).contains(&time.day) && time.second == 0, "{time:?}");
    }
}
