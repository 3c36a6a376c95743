//! Levels and line formats of the log (spec 04, 18.1 and 18.2). Pure.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use super::localtime::LocalTime;

/// Log levels with their syslog numbers; smaller is more severe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Severity {
    /// The daemon ends.
    Emerg = 0,
    /// An operator has to act now.
    Alert = 1,
    /// Data or service is at risk.
    Crit = 2,
    /// Something failed.
    Err = 3,
    /// Something is odd.
    Warning = 4,
    /// Rare and worth knowing.
    Notice = 5,
    /// Normal operation.
    Info = 6,
    /// For developers.
    Debug = 7,
}

const ALL: [(Severity, &str, &str); 8] = [
    (Severity::Emerg, "emerg", "EMERG"),
    (Severity::Alert, "alert", "ALERT"),
    (Severity::Crit, "crit", "CRIT"),
    (Severity::Err, "err", "ERROR"),
    (Severity::Warning, "warning", "WARN"),
    (Severity::Notice, "notice", "NOTICE"),
    (Severity::Info, "info", "INFO"),
    (Severity::Debug, "debug", "DEBUG"),
];

impl Severity {
    /// From the name or number of `level=`.
    pub fn from_name(name: &str) -> Option<Severity> {
        let by_name = ALL.iter().find(|row| row.1 == name).map(|row| row.0);
        by_name.or_else(|| name.parse().ok().and_then(Severity::from_number))
    }

    /// From the number on the wire (SET_LOGLEVEL).
    pub fn from_number(number: i32) -> Option<Severity> {
        ALL.iter().map(|row| row.0).find(|s| *s as i32 == number)
    }

    /// The word in log lines.
    pub fn word(self) -> &'static str {
        ALL[self as usize].2
    }
}

/// Format of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Time, level, thread, place, text.
    Server,
    /// The text alone.
    Text,
    /// One JSON object.
    Json,
}

impl Format {
    /// From the name of `format=`; [`Format::Text`] is called `default`, though it is not the default.
    pub fn from_name(name: &str) -> Option<Format> {
        Some(match name {
            "server" => Format::Server,
            "default" => Format::Text,
            "json" => Format::Json,
            _ => return None,
        })
    }
}

/// Longest text of a line in bytes; the rest is cut off.
pub const MAX_TEXT: usize = 1023;

/// One event to be logged.
#[derive(Debug, Clone)]
pub struct Record<'a> {
    /// When.
    pub time: SystemTime,
    /// How severe.
    pub severity: Severity,
    /// Name of the thread.
    pub thread: &'a str,
    /// Module.
    pub place: &'a str,
    /// Line in its file.
    pub line: u32,
    /// What happened.
    pub text: &'a str,
}

impl Record<'_> {
    /// The line, without its end. `with_time` is false for syslog, which stamps lines itself.
    pub fn render(&self, format: Format, port: u16, with_time: bool) -> String {
        let text = cut(self.text);
        match format {
            Format::Text => single_line(text),
            Format::Server => self.server(text, with_time),
            Format::Json => self.json(text, port),
        }
    }

    fn server(&self, text: &str, with_time: bool) -> String {
        let mut out = String::with_capacity(text.len() + 80);
        if with_time {
            let t = LocalTime::at(self.time);
            let (month, day) = (t.month_name(), t.day);
            // Writing to a string cannot fail.
            let _ = write!(out, "{month} {day:02} {:02}:{:02}:{:02} ", t.hour, t.minute, t.second);
        }
        let (word, thread, place, line) = (self.severity.word(), self.thread, self.place, self.line);
        let _ = write!(out, "{word:>6} [{thread}] {place}({line}) ");
        out + &single_line(text)
    }

    fn json(&self, text: &str, port: u16) -> String {
        let since = self.time.duration_since(UNIX_EPOCH).unwrap_or_default();
        format!(
            "{{ \"user_info\": {{\"program_name\": \"sheep\", \"port\": {port}}},\"body\": {{\"second\": {}, \
             \"usecond\": {}, \"worker_name\": \"{}\", \"worker_idx\": 0, \"func\": \"{}\", \"line\": {}, \
             \"msg\": \"{}\"}} }}",
            since.as_secs(),
            since.subsec_micros(),
            json_escape(self.thread),
            json_escape(self.place),
            self.line,
            json_escape(text),
        )
    }
}

/// The longest prefix of at most [`MAX_TEXT`] bytes that ends between characters.
fn cut(text: &str) -> &str {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Control characters made visible, so that no text forges a second line.
fn single_line(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() && c != '\t' { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

fn json_escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            c if c.is_control() => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn record(text: &str) -> Record<'_> {
        let time = UNIX_EPOCH + Duration::from_micros(1_700_000_000_340_718);
        Record { time, severity: Severity::Info, thread: "main", place: "md_add_disk", line: 367, text }
    }

    #[test]
    fn the_server_format_is_the_documented_one() {
        let line = record("/tmp/s/0/obj, vdisk nr 3892, total disk 1").render(Format::Server, 7000, false);
        assert_eq!(line, "  INFO [main] md_add_disk(367) /tmp/s/0/obj, vdisk nr 3892, total disk 1");
        let line = record("x").render(Format::Server, 7000, true);
        let (time, rest) = line.split_at(16);
        assert_eq!(rest, "  INFO [main] md_add_disk(367) x");
        let shape: String = time.chars().map(|c| if c.is_ascii_digit() { '9' } else { c }).collect();
        assert_eq!(shape, "Nov 99 99:99:99 ");
        for (severity, start) in
            [(Severity::Err, " ERROR ["), (Severity::Notice, "NOTICE ["), (Severity::Warning, "  WARN [")]
        {
            let line = Record { severity, ..record("x") }.render(Format::Server, 7000, false);
            assert!(line.starts_with(start), "{line}");
        }
    }

    #[test]
    fn the_text_format_has_the_text_alone_on_one_line() {
        assert_eq!(record("a\tb\nINFO c\u{1b}").render(Format::Text, 7000, true), "a\tb\\nINFO c\\u{1b}");
    }

    #[test]
    fn json_is_spaced_as_documented_and_escaped_so_that_any_parser_reads_it() {
        let line = record("...").render(Format::Json, 7461, true);
        assert_eq!(
            line,
            r#"{ "user_info": {"program_name": "sheep", "port": 7461},"body": {"second": 1700000000, "usecond": 340718, "worker_name": "main", "worker_idx": 0, "func": "md_add_disk", "line": 367, "msg": "..."} }"#
        );
        let nasty = "a\"b\\c\nd\te\u{1}f\u{7f}\u{85}ü";
        let line = record(nasty).render(Format::Json, 1, true);
        assert!(!line.contains('\n'));
        let value: serde_json::Value = serde_json::from_str(&line).expect("valid JSON");
        assert_eq!(value["body"]["msg"], nasty);
    }

    #[test]
    fn long_text_is_cut_between_characters() {
        let text = "ä".repeat(600);
        assert_eq!(record(&text).render(Format::Text, 0, false).len(), 1022);
        assert_eq!(record(&"x".repeat(2000)).render(Format::Text, 0, false).len(), 1023);
    }

    #[test]
    fn levels_have_names_and_numbers() {
        for (number, (severity, name, _)) in ALL.into_iter().enumerate() {
            assert_eq!(Severity::from_name(name), Some(severity));
            assert_eq!(Severity::from_name(&number.to_string()), Some(severity));
            assert_eq!(Severity::from_number(number as i32), Some(severity));
        }
        assert_eq!(Severity::from_name("loud"), None);
        assert_eq!(Severity::from_number(8), None);
        assert_eq!(Severity::from_number(-1), None);
    }
}
