//! The command line (spec 04, 16). [`parse`] decides everything that can be decided without starting: it returns either
//! valid [`Options`] or what to print and the exit status. Options are acted upon in the order given, as the original
//! does, so the first error wins and `--help` works behind a valid option.
//!
//! Options of features that this version lacks are validated like the others and then refused by name.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sheepdog_cluster::{DEFAULT_DRIVER, DriverError, select};
use sheepdog_getopt::{Error as GetoptError, Item, Parser};
use sheepdog_proto::DEFAULT_PORT;

use super::help::{self, CACHE, LOCK_GRACE, NBD, OPTIONS};
use super::log_format::{Format, Severity};
use super::suboptions::{self, CacheOptions, HttpOptions, JournalOptions, RecoveryThrottle, WorkQueue};

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Parsed {
    /// Run the daemon.
    Run(Box<Options>),
    /// Print and end.
    Exit {
        /// Exit status.
        code: i32,
        /// For standard output.
        stdout: String,
        /// For standard error.
        stderr: String,
    },
}

/// A valid configuration. All paths are absolute, since the daemon changes its directory.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// `-b`: listen on this address only.
    pub bind: Option<IpAddr>,
    /// `-c`: cluster driver and its option, as given.
    pub cluster: String,
    /// `-D`: O_DIRECT for aligned I/O on data objects.
    pub direct_io: bool,
    /// `-f`, or a log on standard output.
    pub foreground: bool,
    /// `-g`: store nothing.
    pub gateway: bool,
    /// `-i`: address of the separate I/O network.
    pub io_addr: Option<SocketAddr>,
    /// `-j`.
    pub journal: Option<JournalOptions>,
    /// `-l` and its older spellings.
    pub log: LogOptions,
    /// `-n`: objects are not written synchronously.
    pub nosync: bool,
    /// `-p`.
    pub port: u16,
    /// `-P`.
    pub pidfile: Option<PathBuf>,
    /// `-r`.
    pub http: Option<HttpOptions>,
    /// `-R`; present only if effective.
    pub recovery: Option<RecoveryThrottle>,
    /// `-u`: convert an older store.
    pub upgrade: bool,
    /// `-V`: fixed weight. `None` = derived from space, or 0 on a gateway.
    pub vnodes: Option<u16>,
    /// `-w`: accepted for compatibility, without effect.
    pub wq_threads: Vec<WorkQueue>,
    /// `-W`: search all nodes for every object in the first recovery.
    pub wildcard_recovery: bool,
    /// `-x`: accepted for compatibility, without effect.
    pub max_dynamic_threads: Option<u32>,
    /// `-y`: address advertised to others.
    pub my_addr: Option<IpAddr>,
    /// `-z`: failure domain. `None` = derived from the address.
    pub zone: Option<u32>,
    /// `--lock-grace`: how long a node may be gone before VDIs locked through it are released.
    pub lock_grace: Option<Duration>,
    /// `--nbd`: where to serve volumes over NBD.
    pub nbd: Vec<NbdAddr>,
    /// `--cache`.
    pub cache: Option<CacheOptions>,
    /// The metadata directory.
    pub base: PathBuf,
    /// The object directories; empty = `obj` in `base`.
    pub disks: Vec<PathBuf>,
    /// What the operator should read in the log about the options given.
    pub notices: Vec<String>,
}

impl Options {
    /// The weight to announce: 0 on a gateway, the fixed one, or the default.
    pub fn weight(&self) -> u16 {
        if self.gateway { 0 } else { self.vnodes.unwrap_or(DEFAULT_VNODES) }
    }

    /// The directory of `sheep.log`.
    pub fn log_dir(&self) -> &Path {
        self.log.dir.as_deref().unwrap_or(&self.base)
    }
}

/// Weight of a node without `-V` before weights are derived from space.
pub const DEFAULT_VNODES: u16 = 128;

/// `-l`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogOptions {
    /// Least severe level that is logged.
    pub level: Severity,
    /// Directory of the log file, if not the metadata directory.
    pub dir: Option<PathBuf>,
    /// Format of a line.
    pub format: Format,
    /// Where lines go.
    pub destination: LogDestination,
}

/// Where log lines go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogDestination {
    /// `sheep.log`.
    File,
    /// Standard error, in spite of its name on the command line.
    Stdout,
    /// The system log.
    Syslog,
}

/// A listening address of the NBD server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NbdAddr {
    /// `unix:PATH`.
    Unix(PathBuf),
    /// `tcp:HOST:PORT`; the host without brackets.
    Tcp(String, u16),
}

/// Why there is nothing to run: texts for both streams, status 1.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub stdout: String,
    pub stderr: String,
}

/// A refusal of one line on standard error.
pub(super) fn refuse<T>(line: impl std::fmt::Display) -> Result<T, Refusal> {
    Err(Refusal { stdout: String::new(), stderr: format!("{line}\n") })
}

/// Parses a command line, the program's name included.
pub fn parse(argv: impl IntoIterator<Item = String>) -> Parsed {
    let mut argv = argv.into_iter();
    let program = argv.next().unwrap_or_else(|| "sheep".to_owned());
    let mut given = Given::default();
    for item in Parser::new(OPTIONS, argv) {
        let step = match item {
            Ok(Item::Option('h', _)) => return exit(0, help::usage()),
            Ok(Item::Option('v', _)) => return exit(0, help::version()),
            Ok(Item::Option(letter, value)) => given.option(letter, value.as_deref().unwrap_or_default()),
            Ok(Item::Word(word)) => {
                given.path.get_or_insert(word);
                Ok(())
            }
            Err(e) => Err(getopt_refusal(&program, &e)),
        };
        if let Err(refusal) = step {
            return refusal.into();
        }
    }
    match given.finish() {
        Ok(options) => Parsed::Run(Box::new(options)),
        Err(refusal) => refusal.into(),
    }
}

fn exit(code: i32, stdout: String) -> Parsed {
    Parsed::Exit { code, stdout, stderr: String::new() }
}

impl From<Refusal> for Parsed {
    fn from(refusal: Refusal) -> Parsed {
        Parsed::Exit { code: 1, stdout: refusal.stdout, stderr: refusal.stderr }
    }
}

fn getopt_refusal(program: &str, error: &GetoptError) -> Refusal {
    let complaint = format!("{program}: {error}\n");
    match error.missing_argument_of().and_then(help::detail) {
        Some(detail) => Refusal { stdout: detail, stderr: complaint },
        None => Refusal {
            stdout: String::new(),
            stderr: complaint + "Try 'sheep --help' for more information.\n",
        },
    }
}

/// The options so far, each valid by itself.
#[derive(Default)]
struct Given {
    bind: Option<IpAddr>,
    cluster: Option<String>,
    direct_io: bool,
    foreground: bool,
    gateway: bool,
    io_addr: Option<SocketAddr>,
    journal: Option<JournalOptions>,
    log: suboptions::LogWords,
    nosync: bool,
    port: Option<u16>,
    pidfile: Option<PathBuf>,
    http: Option<HttpOptions>,
    recovery: Option<RecoveryThrottle>,
    upgrade: bool,
    vnodes: Option<u16>,
    wq_threads: Vec<WorkQueue>,
    wildcard_recovery: bool,
    max_dynamic_threads: Option<u32>,
    my_addr: Option<IpAddr>,
    zone: Option<u32>,
    lock_grace: Option<Duration>,
    nbd: Vec<NbdAddr>,
    cache: Option<CacheOptions>,
    path: Option<String>,
    notices: Vec<String>,
}

impl Given {
    fn option(&mut self, letter: char, value: &str) -> Result<(), Refusal> {
        match letter {
            'b' => self.bind = Some(value.parse().or_else(|_| refuse(format!("Bad address '{value}'")))?),
            'c' => self.cluster = Some(cluster(value)?),
            'D' => self.direct_io = true,
            'f' => self.foreground = true,
            'g' => self.gateway = true,
            'i' => self.io_addr = Some(suboptions::io_addr(value)?),
            'j' => self.journal = Some(suboptions::journal(value)?),
            'l' => self.log.add(value)?,
            'd' => self.log.level = Some("debug".to_owned()),
            'F' => self.log.format = Some(value.to_owned()),
            'o' => self.log.destination = Some("stdout".to_owned()),
            'n' => self.nosync = true,
            'p' => match integer(value, 1, u16::MAX.into()) {
                Some(port) => self.port = Some(port as u16),
                None => return refuse(format!("Invalid port number '{value}'")),
            },
            'P' => self.pidfile = Some(absolute(value)?),
            'r' => self.http = Some(suboptions::http(value)?),
            'R' => self.recovery = suboptions::recovery(value)?,
            's' => self.notices.push("the option -s (--disk-space) is ignored: space is measured".to_owned()),
            'u' => self.upgrade = true,
            'V' => self.vnodes = Some(ranged("number of vnodes", value, 1, u16::MAX.into())? as u16),
            'w' | 'q' => self.wq_threads = suboptions::wq_threads(value)?,
            'W' => self.wildcard_recovery = true,
            'x' => {
                self.max_dynamic_threads =
                    Some(ranged("number of threads", value, 1, u32::MAX.into())? as u32)
            }
            'y' => match resolve(value) {
                Some(ip) => self.my_addr = Some(ip),
                None => return refuse(format!("Invalid address: '{value}'")),
            },
            'z' => self.zone = Some(ranged("zone id", value, 0, u32::MAX.into())? as u32),
            LOCK_GRACE => {
                let seconds = ranged("lock grace", value, 1, u32::MAX.into())?;
                self.lock_grace = Some(Duration::from_secs(seconds));
            }
            NBD => self.nbd.push(nbd_addr(value)?),
            CACHE => self.cache = Some(suboptions::cache(value)?),
            other => return refuse(format!("sheep: option '{other}' has no handler")),
        }
        if self.gateway && self.vnodes.is_some() {
            return refuse("Options '-g' and '-V' can not be both specified");
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Options, Refusal> {
        let log = self.log.check()?;
        let cluster = self.cluster.take().unwrap_or_else(|| DEFAULT_DRIVER.to_owned());
        // The daemon changes its directory, but all sheep of a machine must mean the same file.
        let cluster = match cluster.strip_prefix("local:").filter(|path| !path.is_empty()) {
            Some(path) => format!("local:{}", absolute(path)?.display()),
            None => cluster,
        };
        self.refuse_missing_features()?;
        let (base, disks) = store_path(self.path.as_deref())?;
        if !self.wq_threads.is_empty() {
            self.notices.push(
                "the option -w (--wq-threads) has no effect: thread pools are sized automatically".into(),
            );
        }
        if self.max_dynamic_threads.is_some() {
            let text =
                "the option -x (--max-dynamic-threads) has no effect: thread pools are sized automatically";
            self.notices.push(text.to_owned());
        }
        Ok(Options {
            bind: self.bind,
            cluster,
            direct_io: self.direct_io,
            foreground: self.foreground || log.destination == LogDestination::Stdout,
            gateway: self.gateway,
            io_addr: self.io_addr,
            journal: self.journal,
            log,
            nosync: self.nosync,
            port: self.port.unwrap_or(DEFAULT_PORT),
            pidfile: self.pidfile,
            http: self.http,
            recovery: self.recovery,
            upgrade: self.upgrade,
            vnodes: self.vnodes,
            wq_threads: self.wq_threads,
            wildcard_recovery: self.wildcard_recovery,
            max_dynamic_threads: self.max_dynamic_threads,
            my_addr: self.my_addr,
            zone: self.zone,
            lock_grace: self.lock_grace,
            nbd: self.nbd,
            cache: self.cache,
            base,
            disks,
            notices: self.notices,
        })
    }

    /// A feature asked for and silently absent would lose data or availability that the operator counts on.
    fn refuse_missing_features(&self) -> Result<(), Refusal> {
        let missing = [
            (self.journal.is_some(), "-j (--journal)", "the journal".to_owned()),
            (self.http.is_some(), "-r (--http)", "the HTTP service".to_owned()),
            (self.cache.is_some(), "--cache", "the object cache".to_owned()),
        ];
        match missing.into_iter().find(|(asked, ..)| *asked) {
            Some((_, option, feature)) => {
                refuse(format!("sheep: option {option}: {feature} is not available in this version"))
            }
            None => Ok(()),
        }
    }
}

fn cluster(value: &str) -> Result<String, Refusal> {
    match select(value) {
        Err(e @ DriverError::UnknownDriver(_)) => {
            Err(Refusal { stdout: format!("\n{}", help::drivers()), stderr: format!("{e}\n") })
        }
        Err(e) => refuse(e),
        Ok(_) => Ok(value.to_owned()),
    }
}

/// A decimal integer within bounds.
pub(super) fn integer(text: &str, min: u64, max: u64) -> Option<u64> {
    text.parse().ok().filter(|n| (min..=max).contains(n))
}

/// The same with the message of the numeric options.
pub(super) fn ranged(what: &str, text: &str, min: u64, max: u64) -> Result<u64, Refusal> {
    match integer(text, min, max) {
        Some(n) => Ok(n),
        None => refuse(format!("Invalid {what} '{text}': must be an integer between {min} and {max}")),
    }
}

/// The first address of an IP literal or host name.
pub(super) fn resolve(host: &str) -> Option<IpAddr> {
    if host.is_empty() {
        return None;
    }
    Some((host, 0).to_socket_addrs().ok()?.next()?.ip())
}

pub(super) fn absolute(path: &str) -> Result<PathBuf, Refusal> {
    match std::path::absolute(path) {
        Ok(path) => Ok(path),
        Err(e) => refuse(format!("invalid path '{path}': {e}")),
    }
}

fn nbd_addr(value: &str) -> Result<NbdAddr, Refusal> {
    if let Some(path) = value.strip_prefix("unix:").filter(|p| !p.is_empty()) {
        return Ok(NbdAddr::Unix(absolute(path)?));
    }
    let tcp = value.strip_prefix("tcp:").and_then(|rest| rest.rsplit_once(':')).and_then(|(host, port)| {
        let port = integer(port, 1, u16::MAX.into())? as u16;
        let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        let ambiguous = bare.is_none() && host.contains(':');
        let host = bare.unwrap_or(host);
        (!host.is_empty() && !ambiguous).then(|| NbdAddr::Tcp(host.to_owned(), port))
    });
    match tcp {
        Some(addr) => Ok(addr),
        None => refuse(format!("Invalid NBD address '{value}': must be unix:PATH or tcp:HOST:PORT")),
    }
}

/// Metadata directory and object directories of `PATH[,DISK...]`.
fn store_path(path: Option<&str>) -> Result<(PathBuf, Vec<PathBuf>), Refusal> {
    let mut parts = path.unwrap_or_default().split(',').filter(|part| !part.is_empty());
    let Some(base) = parts.next() else {
        return refuse("sheep: no store directory given (usage: sheep [OPTION]... PATH[,DISK...])");
    };
    let disks = parts.map(|disk| match disk.trim_end_matches('/') {
        "" => absolute("/"),
        disk => absolute(disk),
    });
    Ok((absolute(base)?, disks.collect::<Result<_, _>>()?))
}

#[cfg(test)]
#[path = "options_tests.rs"]
mod tests;
