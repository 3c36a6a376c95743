//! The daemon's log: a `tracing` subscriber that writes what the original's log looks like (spec 04, 18).
//!
//! `tracing` has five levels, the log eight: [`emerg!`](crate::emerg), [`alert!`](crate::alert), [`crit!`](crate::crit)
//! and [`notice!`](crate::notice) set the missing ones. The level can change while the daemon runs. [`flush`] before
//! every exit: lines are written by a thread of their own.

use std::io;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::SystemTime;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

use super::log_writer::{LogFile, MAX_FILE, Sink, Syslog, Writer};
use super::options::{LogDestination, Options};

pub use super::log_format::{Format, Record, Severity};

/// Logs at level emerg: the daemon ends.
#[macro_export]
macro_rules! emerg {
    ($($arg:tt)+) => { ::tracing::error!(severity = "emerg", $($arg)+) };
}

/// Logs at level alert: an operator has to act now.
#[macro_export]
macro_rules! alert {
    ($($arg:tt)+) => { ::tracing::error!(severity = "alert", $($arg)+) };
}

/// Logs at level crit: data or service is at risk.
#[macro_export]
macro_rules! crit {
    ($($arg:tt)+) => { ::tracing::error!(severity = "crit", $($arg)+) };
}

/// Logs at level notice: rare and worth knowing.
#[macro_export]
macro_rules! notice {
    ($($arg:tt)+) => { ::tracing::info!(severity = "notice", $($arg)+) };
}

static LEVEL: AtomicU8 = AtomicU8::new(Severity::Info as u8);
static WRITER: OnceLock<Writer> = OnceLock::new();

/// Opens the destination and makes it the log of the process. Starts a thread, so call it after daemonising.
pub fn start(options: &Options) -> io::Result<()> {
    let (sink, with_time) = match options.log.destination {
        LogDestination::File => {
            (Sink::File(LogFile::open(&options.log_dir().join("sheep.log"), MAX_FILE)?), true)
        }
        LogDestination::Stdout => (Sink::Stderr, true),
        LogDestination::Syslog => (Sink::Syslog(Syslog::new(Path::new("/dev/log"))), false),
    };
    let writer = Writer::start(sink)?;
    let layer =
        LogLayer { writer: writer.clone(), format: options.log.format, port: options.port, with_time };
    LEVEL.store(options.log.level as u8, Ordering::Relaxed);
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(layer))
        .map_err(io::Error::other)?;
    WRITER.set(writer).map_err(|_| io::Error::other("the log is already open"))?;
    for notice in &options.notices {
        notice!("{notice}");
    }
    Ok(())
}

/// The present level (GET_LOGLEVEL).
pub fn level() -> Severity {
    Severity::from_number(LEVEL.load(Ordering::Relaxed).into()).unwrap_or(Severity::Info)
}

/// Changes the level at once (SET_LOGLEVEL).
pub fn set_level(level: Severity) {
    LEVEL.store(level as u8, Ordering::Relaxed);
    tracing::callsite::rebuild_interest_cache();
}

/// Starts a new log file (SIGHUP). Other destinations have nothing to rotate.
pub fn rotate() {
    if let Some(writer) = WRITER.get() {
        writer.rotate();
    }
}

/// Returns when all lines logged so far are written, or after five seconds.
pub fn flush() {
    if let Some(writer) = WRITER.get() {
        writer.flush();
    }
}

/// Makes a panic anywhere in the process a line `PANIC: ...` of level emerg, written before the hook returns.
pub fn log_panics() {
    std::panic::set_hook(Box::new(|info| {
        let payload = info.payload();
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("unknown");
        match info.location() {
            Some(at) => emerg!("PANIC: {text} at {at}"),
            None => emerg!("PANIC: {text}"),
        }
        flush();
    }));
}

/// A line in the configured format for errors before the log is open, newline included; goes to standard error.
pub fn early_line(options: &Options, severity: Severity, text: &str) -> String {
    let time = SystemTime::now();
    let record = Record { time, severity, thread: "main", place: module_path!(), line: line!(), text };
    record.render(options.log.format, options.port, true) + "\n"
}

struct LogLayer {
    writer: Writer,
    format: Format,
    port: u16,
    with_time: bool,
}

/// The least severe level an event of this `tracing` level can turn out to have must not filter it: the most severe
/// one decides, the exact level is checked when the fields are known.
fn most_severe(level: Level) -> Severity {
    match level {
        Level::ERROR => Severity::Emerg,
        Level::WARN => Severity::Warning,
        Level::INFO => Severity::Notice,
        Level::DEBUG | Level::TRACE => Severity::Debug,
    }
}

fn severity_of(level: Level, word: Option<&str>) -> Severity {
    word.and_then(Severity::from_name).unwrap_or(match level {
        Level::ERROR => Severity::Err,
        Level::WARN => Severity::Warning,
        Level::INFO => Severity::Info,
        Level::DEBUG | Level::TRACE => Severity::Debug,
    })
}

impl<S: Subscriber> Layer<S> for LogLayer {
    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        *metadata.level() != Level::TRACE && most_severe(*metadata.level()) <= level()
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(match level() {
            Severity::Emerg | Severity::Alert | Severity::Crit | Severity::Err => LevelFilter::ERROR,
            Severity::Warning => LevelFilter::WARN,
            Severity::Notice | Severity::Info => LevelFilter::INFO,
            Severity::Debug => LevelFilter::DEBUG,
        })
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        let mut fields = Fields::default();
        event.record(&mut fields);
        let severity = severity_of(*metadata.level(), fields.severity.as_deref());
        if severity > level() {
            return;
        }
        let thread = std::thread::current();
        let record = Record {
            time: SystemTime::now(),
            severity,
            thread: thread.name().unwrap_or("unnamed"),
            place: metadata.module_path().unwrap_or(metadata.target()),
            line: metadata.line().unwrap_or(0),
            text: &fields.into_text(),
        };
        self.writer.line(severity, record.render(self.format, self.port, self.with_time));
    }
}

/// The text of an event: its message, then other fields as `name=value`.
#[derive(Default)]
struct Fields {
    message: String,
    others: String,
    severity: Option<String>,
}

impl Fields {
    fn into_text(self) -> String {
        if self.message.is_empty() {
            self.others.trim_start().to_owned()
        } else {
            self.message + &self.others
        }
    }

    fn add(&mut self, field: &Field, value: std::fmt::Arguments<'_>) {
        if field.name() == "message" {
            self.message = value.to_string();
        } else {
            self.others += &format!(" {}={value}", field.name());
        }
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "severity" {
            self.severity = Some(value.to_owned());
        } else {
            self.add(field, format_args!("{value}"));
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.add(field, format_args!("{value:?}"));
    }
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
