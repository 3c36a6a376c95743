//! Command-line words and option values (spec 07, 1.1 and 5.4).
//!
//! Names are bytes, not text. Inside the option parser a word is a string with one character per byte (0..=255), so
//! that nothing is lost and complaints quote single bytes as the C library does; [`to_bytes`] gives the bytes back.

use std::ffi::OsString;
use std::net::{IpAddr, ToSocketAddrs};
use std::os::unix::ffi::OsStringExt;

use sheepdog_proto::redundancy::parse_copies;
use sheepdog_proto::{CopyPolicy, Oid};

use crate::exit::{BAD_ARGUMENT, FAILURE, Stop, fail};
use crate::numbers::{parse_hex, parse_long, parse_size, parse_whole};
use crate::out::{self, text};

/// A word with one character per byte.
pub fn to_text(word: OsString) -> String {
    word.into_vec().into_iter().map(char::from).collect()
}

/// The bytes of such a word.
pub fn to_bytes(word: &str) -> Vec<u8> {
    word.chars().map(|c| c as u8).collect()
}

/// Which snapshot is meant: `-s` and `-F`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Snapshot {
    /// By id.
    Id(u32),
    /// By tag, at most 255 bytes.
    Tag(Vec<u8>),
}

impl Snapshot {
    /// An integer is an id, anything else a tag.
    pub fn parse(value: &[u8]) -> Snapshot {
        match (value, parse_whole(value)) {
            (b"", _) => Snapshot::Id(0),
            (_, Some(id)) => Snapshot::Id(id as u32),
            (_, None) => Snapshot::Tag(value[..value.len().min(255)].to_vec()),
        }
    }

    /// The id, 0 for a tag.
    pub fn id(&self) -> u32 {
        if let Snapshot::Id(id) = self { *id } else { 0 }
    }

    /// The tag, empty for an id.
    pub fn tag(&self) -> &[u8] {
        if let Snapshot::Tag(tag) = self { tag } else { b"" }
    }
}

/// Version of files that `dog upgrade` reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OldVersion {
    /// Release 0.7.
    V07,
    /// Release 0.8.
    V08,
}

/// Format of a file that an image comes from or goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageFormat {
    /// The bytes of the image.
    Raw,
    /// QEMU's format.
    Qcow2,
}

/// Option values of all commands; each command accepts some of them.
#[derive(Debug, Clone)]
pub struct Options {
    /// `-a`.
    pub address: IpAddr,
    /// `-p`.
    pub port: u16,
    /// `-r`.
    pub raw: bool,
    /// `-v`.
    pub verbose: bool,
    /// `-T`.
    pub time: bool,
    /// `-f`.
    pub force: bool,
    /// `vdi -P`.
    pub prealloc: bool,
    /// `vdi -n`.
    pub no_share: bool,
    /// `vdi -i`; -1 counts as absent.
    pub index: Option<u64>,
    /// `vdi -s`.
    pub snapshot: Option<Snapshot>,
    /// `vdi -F`.
    pub from: Option<Snapshot>,
    /// `vdi -x`.
    pub exclusive: bool,
    /// `vdi -d`.
    pub delete: bool,
    /// `vdi -w`.
    pub writeback: bool,
    /// `-c`.
    pub copies: Option<(u8, CopyPolicy)>,
    /// `vdi -y`.
    pub hyper: bool,
    /// `vdi -o`; 0 counts as absent.
    pub oid: Option<Oid>,
    /// `vdi -e`.
    pub exist: bool,
    /// `-z`.
    pub shift: Option<u8>,
    /// `vdi -R`.
    pub reduce: bool,
    /// `vdi -B`: non-zero entries cleared at once.
    pub batch: usize,
    /// `vdi -I`: seconds between batches.
    pub interval: u64,
    /// `vdi -m`.
    pub max_reclaim: Option<u64>,
    /// `node -A`.
    pub all: bool,
    /// `node -P`.
    pub progress: bool,
    /// `node -w`.
    pub watch: bool,
    /// `node -l`.
    pub local: bool,
    /// `cluster -b`.
    pub store: Option<Vec<u8>>,
    /// `cluster -l`.
    pub lock: bool,
    /// `cluster -m`.
    pub multithread: bool,
    /// `cluster -R`.
    pub recycle: bool,
    /// `cluster -t`.
    pub strict: bool,
    /// `cluster -V`.
    pub fixed_vnodes: bool,
    /// `cluster -F`.
    pub avoid_diskfull: bool,
    /// `cluster -d`.
    pub diff: bool,
    /// `upgrade -o`.
    pub old_version: Option<OldVersion>,
    /// `benchmark -w`.
    pub workqueue: Option<Vec<u8>>,
    /// `benchmark -t`.
    pub total: Option<u64>,
    /// `benchmark -n`.
    pub threads: Option<u64>,
    /// `--json`.
    pub json: bool,
    /// `vdi import -O`, `vdi export -O`.
    pub format: Option<ImageFormat>,
    /// `top -o`.
    pub once: bool,
    /// `top -i`: time between two frames.
    pub period: std::time::Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            address: std::net::Ipv4Addr::LOCALHOST.into(),
            port: sheepdog_proto::DEFAULT_PORT,
            raw: false,
            verbose: false,
            time: false,
            force: false,
            prealloc: false,
            no_share: false,
            index: None,
            snapshot: None,
            from: None,
            exclusive: false,
            delete: false,
            writeback: false,
            copies: None,
            hyper: false,
            oid: None,
            exist: false,
            shift: None,
            reduce: false,
            batch: 128,
            interval: 0,
            max_reclaim: None,
            all: false,
            progress: false,
            watch: false,
            local: false,
            store: None,
            lock: false,
            multithread: false,
            recycle: false,
            strict: false,
            fixed_vnodes: false,
            avoid_diskfull: false,
            diff: false,
            old_version: None,
            workqueue: None,
            total: None,
            threads: None,
            json: false,
            format: None,
            once: false,
            period: std::time::Duration::from_secs(1),
        }
    }
}

/// Stands for `--json`, which has no letter.
pub const JSON: char = '\u{1}';

/// Takes one option of a command group into account.
pub type Apply = fn(&mut Options, char, &[u8]) -> Result<(), Stop>;

/// The options that every group has (`-h` is handled by the caller).
pub fn apply_common(options: &mut Options, letter: char, value: &[u8]) -> Result<(), Stop> {
    match letter {
        'a' => options.address = resolve(value)?,
        'p' => options.port = parse_port(value)?,
        'r' => options.raw = true,
        'v' => options.verbose = true,
        'T' => options.time = true,
        'f' => options.force = true,
        JSON => options.json = true,
        _ => {}
    }
    Ok(())
}

/// Options of `dog vdi`.
pub fn apply_vdi(options: &mut Options, letter: char, value: &[u8]) -> Result<(), Stop> {
    match letter {
        'P' => options.prealloc = true,
        'n' => options.no_share = true,
        'i' => options.index = parse_index(value)?,
        's' => {
            let snapshot = Snapshot::parse(value);
            if snapshot == Snapshot::Id(0) {
                return Err(fail(FAILURE, "The snapshot id must be larger than zero"));
            }
            options.snapshot = Some(snapshot);
        }
        'F' => options.from = Some(Snapshot::parse(value)).filter(|s| *s != Snapshot::Id(0)),
        'x' => options.exclusive = true,
        'd' => options.delete = true,
        'w' => options.writeback = true,
        'c' => options.copies = Some(parse_redundancy(value)?),
        'y' | 'z' => {
            if letter == 'y' {
                options.hyper = true;
            } else {
                options.shift = Some(parse_shift(parse_long(value, 10).0 & 0xff)?);
            }
            if options.hyper && options.shift.is_some() {
                return Err(fail(FAILURE, "Don't specify both -y and -z options, please"));
            }
        }
        'o' => {
            let oid = parse_hex(value).ok_or_else(|| fail(FAILURE, "object id must be a hex integer"))?;
            options.oid = (oid != 0).then_some(Oid(oid));
        }
        'e' => options.exist = true,
        'R' => options.reduce = true,
        'B' => options.batch = parse_positive("number of batched reclamation", value)? as usize,
        'I' => options.interval = parse_positive("interval of batched reclamation", value)?,
        'm' => options.max_reclaim = Some(parse_positive("maximum number of reclamation", value)?),
        'O' => options.format = Some(parse_format(value)?),
        _ => {}
    }
    Ok(())
}

/// Options of `dog node`.
pub fn apply_node(options: &mut Options, letter: char, _value: &[u8]) -> Result<(), Stop> {
    match letter {
        'A' => options.all = true,
        'P' => options.progress = true,
        'w' => options.watch = true,
        'l' => options.local = true,
        _ => {}
    }
    Ok(())
}

/// Options of `dog cluster`.
pub fn apply_cluster(options: &mut Options, letter: char, value: &[u8]) -> Result<(), Stop> {
    match letter {
        'b' => options.store = Some(value[..value.len().min(15)].to_vec()),
        'c' => options.copies = Some(parse_redundancy(value)?),
        'z' => options.shift = Some(parse_shift(parse_long(value, 10).0)?),
        'F' => options.avoid_diskfull = true,
        'l' => options.lock = true,
        'm' => options.multithread = true,
        'R' => options.recycle = true,
        't' => options.strict = true,
        'V' => options.fixed_vnodes = true,
        'd' => options.diff = true,
        _ => {}
    }
    Ok(())
}

/// Options of `dog upgrade`.
pub fn apply_upgrade(options: &mut Options, letter: char, value: &[u8]) -> Result<(), Stop> {
    if letter == 'o' {
        options.old_version = Some(match value {
            b"v0.7" => OldVersion::V07,
            b"v0.8" => OldVersion::V08,
            other => {
                out::log(format_args!("unknown original version: {}", text(other)));
                return Err(fail(FAILURE, "valid versions are v0.7 or v0.8"));
            }
        });
    }
    Ok(())
}

/// Options of `dog benchmark`.
pub fn apply_benchmark(options: &mut Options, letter: char, value: &[u8]) -> Result<(), Stop> {
    let number = || parse_long(value, 10).0.max(0) as u64;
    match letter {
        'w' => options.workqueue = Some(value.to_vec()),
        't' => options.total = Some(number()),
        'n' => options.threads = Some(number()),
        _ => {}
    }
    Ok(())
}

/// Options of `dog top`.
pub fn apply_top(options: &mut Options, letter: char, value: &[u8]) -> Result<(), Stop> {
    match letter {
        'o' => options.once = true,
        'i' => match parse_whole(value) {
            Some(seconds @ 1..=3600) => options.period = std::time::Duration::from_secs(seconds as u64),
            _ => {
                let why = format!("Invalid interval '{}': must be 1 to 3600 seconds", text(value));
                return Err(fail(BAD_ARGUMENT, why));
            }
        },
        _ => {}
    }
    Ok(())
}

/// For groups without options of their own.
pub fn apply_nothing(_options: &mut Options, _letter: char, _value: &[u8]) -> Result<(), Stop> {
    Ok(())
}

/// Resolves a host; the first answer is used.
pub fn resolve(host: &[u8]) -> Result<IpAddr, Stop> {
    let name = std::str::from_utf8(host).ok().filter(|name| !name.is_empty());
    name.and_then(|name| (name, 0).to_socket_addrs().ok()?.next())
        .map(|addr| addr.ip())
        .ok_or_else(|| fail(FAILURE, format_args!("Invalid ip address {}", text(host))))
}

/// A port: decimal digits only, 1..=65535.
pub fn parse_port(value: &[u8]) -> Result<u16, Stop> {
    let digits = value.iter().all(u8::is_ascii_digit);
    let port = std::str::from_utf8(value).ok().filter(|_| digits).and_then(|t| t.parse().ok());
    port.filter(|port| *port != 0)
        .ok_or_else(|| fail(BAD_ARGUMENT, format_args!("Invalid port number '{}'", text(value))))
}

/// A size operand; a bad one is a usage error.
pub fn size_operand(value: &[u8]) -> Result<u64, Stop> {
    parse_size(value).ok_or_else(|| {
        out::log(format_args!("Invalid size '{}'", text(value)));
        fail(
            Stop::Usage,
            "You may use B, K, M, G, T or P suffixes for bytes, kilobytes, megabytes, gigabytes, terabytes and \
             petabytes.",
        )
    })
}

fn parse_format(value: &[u8]) -> Result<ImageFormat, Stop> {
    match value {
        b"raw" => Ok(ImageFormat::Raw),
        b"qcow2" => Ok(ImageFormat::Qcow2),
        other => {
            let why = format!("Invalid image format '{}': must be raw or qcow2", text(other));
            Err(fail(BAD_ARGUMENT, why))
        }
    }
}

fn parse_redundancy(value: &[u8]) -> Result<(u8, CopyPolicy), Stop> {
    std::str::from_utf8(value).ok().and_then(parse_copies).ok_or_else(|| {
        out::log(format_args!("Invalid parameter {}", text(value)));
        out::log("To create replicated vdi, set -c x");
        out::log("  x(1 to 31)   - number of replicated copies");
        out::log("To create erasure coded vdi, set -c x:y");
        out::log("  x(2,4,8,16)  - number of data strips");
        fail(FAILURE, "  y(1 to 15)   - number of parity strips")
    })
}

fn parse_index(value: &[u8]) -> Result<Option<u64>, Stop> {
    let base = if value.starts_with(b"0x") || value.starts_with(b"0X") { 16 } else { 10 };
    match parse_long(value, base) {
        (_, 0) => {
            Err(fail(FAILURE, "The index must be a decimal integer or a hexadecimal integer started with 0x"))
        }
        (-1, _) => Ok(None),
        (index, _) => Ok(Some(index as u64)),
    }
}

fn parse_shift(shift: i64) -> Result<u8, Stop> {
    match shift {
        ..20 => Err(fail(FAILURE, "Object Size is larger than 2^20. Please set shift bit larger than 20")),
        20..=31 => Ok(shift as u8),
        _ => Err(fail(FAILURE, "Object Size is limited to 2^31. Please set shift bit lower than 31")),
    }
}

fn parse_positive(what: &str, value: &[u8]) -> Result<u64, Stop> {
    match parse_whole(value) {
        None => Err(fail(FAILURE, format_args!("The {what} is invalid: {}", text(value)))),
        Some(..=0) => Err(fail(FAILURE, format_args!("The {what} must bepositive integer"))),
        Some(n) => Ok(n as u64),
    }
}
