//! Numbers, sizes, ids and dates as text (spec 07, section 5).

use crate::sys::{LocalTime, local_time};

/// Parses a size: what C's `strtod` accepts, at most one suffix, nothing else (spec 07, 5.1). Infinite, negative and
/// not-a-number values are refused.
pub fn parse_size(text: &[u8]) -> Option<u64> {
    let (value, used) = parse_double(text);
    let factor = match &text[used..] {
        [] | [b'b' | b'B'] => 0,
        [b'k' | b'K'] => 1,
        [b'm' | b'M'] => 2,
        [b'g' | b'G'] => 3,
        [b't' | b'T'] => 4,
        [b'p' | b'P'] => 5,
        _ => return None,
    };
    let bytes = value * 1024f64.powi(factor);
    (bytes.is_finite() && bytes >= 0.0).then_some(bytes as u64)
}

/// `strtod` in the C locale: the value of the longest valid prefix and its length; `(0, 0)` if there is none.
fn parse_double(text: &[u8]) -> (f64, usize) {
    let start = text.iter().position(|b| !is_space(*b)).unwrap_or(text.len());
    let (negative, digits) = match text.get(start) {
        Some(b'-') => (true, start + 1),
        Some(b'+') => (false, start + 1),
        _ => (false, start),
    };
    let rest = &text[digits..];
    let (value, used) = if starts_with(rest, b"infinity") {
        (f64::INFINITY, 8)
    } else if starts_with(rest, b"inf") {
        (f64::INFINITY, 3)
    } else if starts_with(rest, b"nan") {
        (f64::NAN, 3)
    } else if let Some(hex) = hexadecimal(rest) {
        hex
    } else {
        decimal(rest)
    };
    match used {
        0 => (0.0, 0),
        _ => (if negative { -value } else { value }, digits + used),
    }
}

fn starts_with(text: &[u8], word: &[u8]) -> bool {
    text.len() >= word.len() && text[..word.len()].eq_ignore_ascii_case(word)
}

fn is_space(byte: u8) -> bool {
    byte == b' ' || (0x09..=0x0d).contains(&byte)
}

fn digits(text: &[u8]) -> usize {
    text.iter().take_while(|b| b.is_ascii_digit()).count()
}

/// Length of an exponent (`e`, sign, digits) at the start of `text`, 0 if there is none.
fn exponent(text: &[u8], letter: u8) -> usize {
    if !text.first().is_some_and(|b| b.eq_ignore_ascii_case(&letter)) {
        return 0;
    }
    let sign = usize::from(matches!(text.get(1), Some(b'+' | b'-')));
    match digits(&text[1 + sign..]) {
        0 => 0,
        n => 1 + sign + n,
    }
}

fn decimal(text: &[u8]) -> (f64, usize) {
    let whole = digits(text);
    let mut used = whole;
    let mut fraction = 0;
    if text.get(whole) == Some(&b'.') {
        fraction = digits(&text[whole + 1..]);
        used += 1 + fraction;
    }
    if whole + fraction == 0 {
        return (0.0, 0);
    }
    used += exponent(&text[used..], b'e');
    let number = std::str::from_utf8(&text[..used]).ok().and_then(|t| t.parse().ok());
    (number.unwrap_or(f64::NAN), used)
}

fn hexadecimal(text: &[u8]) -> Option<(f64, usize)> {
    if !starts_with(text, b"0x") {
        return None;
    }
    let mut value = 0f64;
    let mut scale = 1f64;
    let mut seen = 0;
    let mut used = 2;
    let mut point = false;
    while let Some(byte) = text.get(used) {
        if *byte == b'.' && !point {
            point = true;
        } else if let Some(digit) = (*byte as char).to_digit(16) {
            seen += 1;
            value = value * 16.0 + f64::from(digit);
            if point {
                scale *= 16.0;
            }
        } else {
            break;
        }
        used += 1;
    }
    if seen == 0 {
        return Some((0.0, 1)); // only the "0" is a number
    }
    let power = exponent(&text[used..], b'p');
    if power > 0 {
        let digits = std::str::from_utf8(&text[used + 1..used + power]).unwrap_or("0");
        value *= 2f64.powi(digits.parse().unwrap_or(i32::MAX));
    }
    Some((value / scale, used + power))
}

/// C's `strtol` in the given base (10 or 16): value, saturated, and the number of bytes used; 0 bytes if there is no
/// number.
pub fn parse_long(text: &[u8], base: u32) -> (i64, usize) {
    let start = text.iter().position(|b| !is_space(*b)).unwrap_or(text.len());
    let (negative, mut at) = match text.get(start) {
        Some(b'-') => (true, start + 1),
        Some(b'+') => (false, start + 1),
        _ => (false, start),
    };
    if base == 16 && starts_with(&text[at..], b"0x") && text.get(at + 2).is_some_and(u8::is_ascii_hexdigit) {
        at += 2;
    }
    let first = at;
    let mut value = 0i128;
    while let Some(digit) = text.get(at).and_then(|b| (*b as char).to_digit(base)) {
        value = (value * i128::from(base) + i128::from(digit)).min(1 << 65);
        at += 1;
    }
    if at == first {
        return (0, 0);
    }
    let value = if negative { -value } else { value };
    (value.clamp(i64::MIN.into(), i64::MAX.into()) as i64, at)
}

/// An integer that is the whole text, as `strtol` reads it.
pub fn parse_whole(text: &[u8]) -> Option<i64> {
    let (value, used) = parse_long(text, 10);
    (used == text.len() && used > 0).then_some(value)
}

/// `strtoull` in base 16 of a prefix; `None` if nothing was parsed.
pub fn parse_hex(text: &[u8]) -> Option<u64> {
    let start = text.iter().position(|b| !is_space(*b)).unwrap_or(text.len());
    let mut rest = &text[start..];
    if starts_with(rest, b"0x") && rest.get(2).is_some_and(u8::is_ascii_hexdigit) {
        rest = &rest[2..];
    }
    let digits: Vec<u32> = rest.iter().map_while(|b| (*b as char).to_digit(16)).collect();
    if digits.is_empty() {
        return None;
    }
    Some(digits.iter().fold(0u128, |v, d| (v * 16 + u128::from(*d)).min(u64::MAX.into())) as u64)
}

/// A size for people: one decimal below 10, none from there on (spec 07, 5.2).
pub fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["MB", "GB", "TB", "PB", "EB", "ZB", "YB"];
    let mut value = bytes as f64 / (1u64 << 20) as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value >= 10.0 { format!("{value:.0} {}", UNITS[unit]) } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// `used` of `total` in percent, truncated; 0 of nothing.
pub fn percent(used: u64, total: u64) -> u64 {
    if total == 0 { 0 } else { (used as f64 / total as f64 * 100.0) as u64 }
}

/// Seconds since 1970 of a creation time (seconds << 32 | nanoseconds).
pub fn seconds(time: u64) -> u64 {
    time >> 32
}

/// `YYYY-MM-DD`.
pub fn day(seconds: u64) -> String {
    let LocalTime { year, month, day, .. } = local_time(seconds);
    format!("{year:04}-{:02}-{day:02}", month + 1)
}

/// `HH:MM:SS`.
pub fn clock(seconds: u64) -> String {
    let LocalTime { hour, minute, second, .. } = local_time(seconds);
    format!("{hour:02}:{minute:02}:{second:02}")
}

/// `YYYY-MM-DD HH:MM`.
pub fn day_and_minute(seconds: u64) -> String {
    format!("{} {}", day(seconds), &clock(seconds)[..5])
}

/// The three-letter name of a month, 0..=11.
pub fn month_name(month: usize) -> &'static str {
    const NAMES: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    NAMES[month.min(11)]
}

/// The text of C's `ctime`, without its newline: `Tue Jan  2 09:55:14 2024`.
pub fn ctime(seconds: u64) -> String {
    const DAYS: [&str; 7] = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"];
    let t = local_time(seconds);
    format!("{} {} {:2} {} {}", DAYS[t.weekday], month_name(t.month), t.day, clock(seconds), t.year)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_strtod_reads_them() {
        let cases: &[(&str, u64)] = &[
            ("1", 1),
            ("1B", 1),
            ("1.9B", 1),
            ("1k", 1024),
            ("1.5K", 1536),
            (".5K", 512),
            ("0.1G", 107_374_182),
            ("9.95G", 10_683_731_148),
            ("2.3g", 2_469_606_195),
            ("1e3", 1000),
            ("1e3K", 1_024_000),
            ("0x10", 16),
            ("0x10M", 16_777_216),
            ("+5M", 5_242_880),
            (" 7M", 7_340_032),
            ("", 0),
            ("M", 0),
            ("K", 0),
            ("1023.9M", 1_073_636_966),
        ];
        for (text, bytes) in cases {
            assert_eq!(parse_size(text.as_bytes()), Some(*bytes), "{text}");
        }
        for bad in ["10MB", "abc", "1 M", "inf", "nan", "-5", "1e400", "10X", "1.5.5"] {
            assert_eq!(parse_size(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn sizes_are_printed_with_the_rounding_of_printf() {
        let cases: &[(u64, &str)] = &[
            (0, "0.0 MB"),
            (52_428, "0.0 MB"),
            (1_572_864, "1.5 MB"),
            (107_374_182, "102 MB"),
            (1_048_051_712, "1000 MB"),
            (1_073_636_966, "1024 MB"),
            (1_073_741_824, "1.0 GB"),
            (10_683_731_148, "9.9 GB"),
            (10_694_468_567, "10.0 GB"),
            (11_274_289_152, "10 GB"),
            (12_348_030_976, "12 GB"),
            (107_266_808_217, "100 GB"),
            (1_098_437_885_952, "1023 GB"),
            (1 << 54, "16 PB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(human_size(*bytes), *text);
        }
    }

    #[test]
    fn integers_are_read_as_strtol_reads_them() {
        assert_eq!(parse_whole(b"4294967297"), Some(4_294_967_297));
        assert_eq!(parse_whole(b"-1"), Some(-1));
        assert_eq!(parse_whole(b"1x"), None);
        assert_eq!(parse_long(b"99999999999999999999", 10).0, i64::MAX);
        assert_eq!(parse_long(b"0x1f", 16), (31, 4));
        assert_eq!(parse_hex(b"0017fc9900000000"), Some(0x17_fc99_0000_0000));
        assert_eq!(parse_hex(b"zz"), None);
    }
}
