//! Arguments that are lists: `size=64M,dir=/x,skip` (spec 04, 16.1; spec 03, 20 and 22.1; spec 08, 1.1).
//!
//! Words are separated by commas, empty ones ignored; each must begin with a known key.

use std::net::SocketAddr;
use std::path::PathBuf;

use sheepdog_proto::DEFAULT_PORT;

use super::help;
use super::log_format::{Format, Severity};
use super::options::{LogDestination, LogOptions, Refusal, absolute, integer, ranged, refuse, resolve};

const MIB: u64 = 1 << 20;

/// `-j`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JournalOptions {
    /// Bytes of both journal files together.
    pub size: u64,
    /// Where they are, if not in the metadata directory.
    pub dir: Option<PathBuf>,
    /// Do not replay what an earlier run left.
    pub skip: bool,
}

/// `--cache`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheOptions {
    /// Size in bytes, whole MiB.
    pub size: u64,
    /// Where the cache is, if not in the metadata directory.
    pub dir: Option<PathBuf>,
    /// O_DIRECT on cache files.
    pub direct_io: bool,
}

/// `-r`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpOptions {
    /// FastCGI address.
    pub host: String,
    /// FastCGI port.
    pub port: u16,
    /// Copy buffer of one request in bytes, a multiple of 4 MiB.
    pub buffer: u64,
    /// Personalities in the order to try.
    pub personalities: Vec<String>,
}

/// `-R`: at most `max` objects in `interval_ms` milliseconds, both positive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecoveryThrottle {
    /// Objects.
    pub max: u32,
    /// Milliseconds.
    pub interval_ms: u64,
}

/// One entry of `-w`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkQueue {
    /// Its name.
    pub name: &'static str,
    /// Threads asked for.
    pub threads: u32,
}

const WORK_QUEUES: [&str; 10] =
    ["net", "gway", "io", "peer", "reclaim", "gway_fwd", "remove", "remove_peer", "recovery", "async"];

fn words(list: &str) -> impl Iterator<Item = &str> {
    list.split(',').filter(|word| !word.is_empty())
}

fn unknown<T>(word: &str) -> Result<T, Refusal> {
    refuse(format!("invalid option {word}"))
}

/// Bytes of a number with an optional suffix b k m g t p: powers of 1024, fractions allowed.
pub(super) fn size(text: &str) -> Option<u64> {
    let suffix = text.chars().last()?.to_ascii_lowercase();
    let (digits, shift) = match "bkmgtp".find(suffix) {
        Some(power) => (&text[..text.len() - 1], 10 * power as u32),
        None => (text, 0),
    };
    if let Ok(whole) = digits.parse::<u64>() {
        return whole.checked_mul(1 << shift);
    }
    if !digits.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return None;
    }
    let bytes = digits.parse::<f64>().ok()? * (1u64 << shift) as f64;
    (bytes < u64::MAX as f64).then_some(bytes as u64)
}

/// `-j size=N[,dir=D][,skip]`.
pub(super) fn journal(list: &str) -> Result<JournalOptions, Refusal> {
    let (mut bytes, mut dir, mut skip) = (None, None, false);
    for word in words(list) {
        if let Some(text) = word.strip_prefix("size=") {
            match size(text) {
                Some(n) if n >= 64 * MIB => bytes = Some(n),
                _ => return refuse(format!("invalid size {text}, must be bigger than 64(M)")),
            }
        } else if let Some(path) = word.strip_prefix("dir=") {
            let path = absolute(path)?;
            if !path.is_dir() {
                return refuse(format!("journal dir: {} is not a directory", path.display()));
            }
            dir = Some(path);
        } else if word == "skip" {
            skip = true;
        } else {
            return unknown(word);
        }
    }
    match bytes {
        Some(size) => Ok(JournalOptions { size, dir, skip }),
        None => refuse("you must specify size for journal"),
    }
}

/// `--cache size=N[,dir=D][,directio]`.
pub(super) fn cache(list: &str) -> Result<CacheOptions, Refusal> {
    const MAX: u64 = 4_194_304 << 30;
    let (mut bytes, mut dir, mut direct_io) = (None, None, false);
    for word in words(list) {
        if let Some(text) = word.strip_prefix("size=") {
            match size(text) {
                Some(n) if (10 * MIB..=MAX).contains(&n) => bytes = Some(n / MIB * MIB),
                _ => {
                    return refuse(format!(
                        "Invalid cache option '{text}': size must be between between 10M and 4194304G"
                    ));
                }
            }
        } else if let Some(path) = word.strip_prefix("dir=") {
            dir = Some(absolute(path)?);
        } else if word == "directio" {
            direct_io = true;
        } else {
            return unknown(word);
        }
    }
    match bytes {
        Some(size) => Ok(CacheOptions { size, dir, direct_io }),
        None => refuse("object cache size is not set"),
    }
}

/// `-r [host=H][,port=P][,buffer=S][,PERSONALITY...]`.
pub(super) fn http(list: &str) -> Result<HttpOptions, Refusal> {
    let mut options =
        HttpOptions { host: "localhost".to_owned(), port: 8000, buffer: 32 * MIB, personalities: Vec::new() };
    for word in words(list) {
        if let Some(host) = word.strip_prefix("host=") {
            options.host = host.to_owned();
        } else if let Some(text) = word.strip_prefix("port=") {
            match integer(text, 1, u16::MAX.into()) {
                Some(port) => options.port = port as u16,
                None => return refuse(format!("Invalid port number '{text}'")),
            }
        } else if let Some(text) = word.strip_prefix("buffer=") {
            match size(text) {
                Some(n) if (4 * MIB..=1024 * MIB).contains(&n) => {
                    options.buffer = n.next_multiple_of(4 * MIB)
                }
                _ => {
                    return refuse(format!(
                        "Invalid buffer option '{text}': size must be between 4M and 1024M"
                    ));
                }
            }
        } else {
            let name = word.split(':').next().unwrap_or(word);
            if !matches!(name, "swift" | "s3") {
                return refuse(format!("'{word}' is not a valid driver name"));
            }
            if options.personalities.iter().any(|p| p == name) {
                return refuse(format!("{name} driver is already enabled"));
            }
            options.personalities.push(name.to_owned());
        }
    }
    if options.personalities.is_empty() {
        options.personalities.push("swift".to_owned());
    }
    Ok(options)
}

/// `-R max=N,interval=MS`; `None` unless both are positive.
pub(super) fn recovery(list: &str) -> Result<Option<RecoveryThrottle>, Refusal> {
    let (mut max, mut interval_ms) = (0, 0);
    for word in words(list) {
        if let Some(text) = word.strip_prefix("max=") {
            max = ranged("recovery max", text, 0, u32::MAX.into())? as u32;
        } else if let Some(text) = word.strip_prefix("interval=") {
            interval_ms = ranged("recovery interval", text, 0, u64::MAX)?;
        } else {
            return unknown(word);
        }
    }
    Ok((max > 0 && interval_ms > 0).then_some(RecoveryThrottle { max, interval_ms }))
}

/// `-w QUEUE=N,...`.
pub(super) fn wq_threads(list: &str) -> Result<Vec<WorkQueue>, Refusal> {
    let mut queues = Vec::new();
    for word in words(list) {
        if word.starts_with("size=") || word.starts_with("dir=") || word == "directio" {
            return refuse("-w sets work queue threads since 1.0; use --cache size=... for the object cache");
        }
        let known =
            word.split_once('=').and_then(|(key, n)| Some((WORK_QUEUES.into_iter().find(|q| *q == key)?, n)));
        let Some((name, text)) = known else { return unknown(word) };
        let threads = ranged("number of threads", text, 1, u32::MAX.into())? as u32;
        queues.push(WorkQueue { name, threads });
    }
    Ok(queues)
}

/// `-i host=ADDR[,port=N]`.
pub(super) fn io_addr(list: &str) -> Result<SocketAddr, Refusal> {
    let (mut host, mut port) = (None, DEFAULT_PORT);
    for word in words(list) {
        if let Some(text) = word.strip_prefix("host=") {
            host = Some(text);
        } else if let Some(text) = word.strip_prefix("port=") {
            match integer(text, 1, u16::MAX.into()) {
                Some(n) => port = n as u16,
                None => return refuse(format!("Bad port '{text}'")),
            }
        } else {
            return unknown(word);
        }
    }
    match host.and_then(resolve) {
        Some(ip) => Ok(SocketAddr::new(ip, port)),
        None => refuse(format!("Bad addr: '{}'", host.unwrap_or("(null)"))),
    }
}

/// The words of `-l`, checked only when all options are known.
#[derive(Debug, Default)]
pub(super) struct LogWords {
    pub level: Option<String>,
    pub dir: Option<String>,
    pub format: Option<String>,
    pub destination: Option<String>,
}

impl LogWords {
    /// `-l [level=L][,dir=D][,format=F][,dst=X]`, or a bare number as releases up to 0.7 had it.
    pub(super) fn add(&mut self, list: &str) -> Result<(), Refusal> {
        if integer(list, 0, 7).is_some() {
            self.level = Some(list.to_owned());
            return Ok(());
        }
        for word in words(list) {
            let slot = match word.split_once('=').map_or("", |(key, _)| key) {
                "level" => &mut self.level,
                "dir" => &mut self.dir,
                "format" => &mut self.format,
                "dst" => &mut self.destination,
                _ => return unknown(word),
            };
            *slot = word.split_once('=').map(|(_, value)| value.to_owned());
        }
        Ok(())
    }

    pub(super) fn check(&self) -> Result<LogOptions, Refusal> {
        let destination = match self.destination.as_deref() {
            None | Some("default") => LogDestination::File,
            Some("stdout") => LogDestination::Stdout,
            Some("syslog") => LogDestination::Syslog,
            Some(other) => return refuse(format!("invalid type of log destination: {other}")),
        };
        let dir = match (&self.dir, &self.destination) {
            (Some(dir), Some(dst)) if destination != LogDestination::File => {
                return refuse(format!("logdir ({dir}) is specified but logging destination is {dst}"));
            }
            (Some(dir), _) => Some(log_dir(dir)?),
            (None, _) => None,
        };
        let format = match self.format.as_deref() {
            None => Format::Server,
            Some(name) => match Format::from_name(name) {
                Some(format) => format,
                None => {
                    let text = "valid options are:\n\tdefault\n\tserver\n\tjson";
                    return refuse(format!("invalid log format: {name}\n{text}"));
                }
            },
        };
        let level = match self.level.as_deref() {
            None => Severity::Info,
            Some(name) => match Severity::from_name(name) {
                Some(level) => level,
                None => {
                    let stderr = format!("Invalid log level '{name}'\n");
                    return Err(Refusal { stdout: help::levels(), stderr });
                }
            },
        };
        Ok(LogOptions { level, dir, format, destination })
    }
}

fn log_dir(dir: &str) -> Result<PathBuf, Refusal> {
    match std::fs::metadata(dir) {
        Ok(meta) if meta.is_dir() => absolute(dir),
        Ok(_) => refuse(format!("log dir: {dir} is not a directory")),
        Err(e) => refuse(nix::errno::Errno::from_raw(e.raw_os_error().unwrap_or(0)).desc()),
    }
}
