//! The thread that writes log lines (spec 04, 18.3). The queue to it is bounded: a caller never waits for a slow disk,
//! lines that do not fit are counted and the count is logged. Whoever ends the process flushes first.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, SystemTime};

use super::localtime::LocalTime;
use super::log_format::Severity;

/// Most lines waiting to be written, about 10 MB at their longest.
const QUEUE: usize = 8192;
/// Size at which `sheep.log` is rotated.
pub const MAX_FILE: u64 = 500 << 20;
/// Longest wait for a flush: a hung log disk must not keep the process from ending.
const FLUSH_PATIENCE: Duration = Duration::from_secs(5);

/// Where lines end up.
pub enum Sink {
    /// A file that is rotated.
    File(LogFile),
    /// Standard error, coloured on a terminal.
    Stderr,
    /// The system log.
    Syslog(Syslog),
}

enum Message {
    Line(Severity, String),
    Rotate,
    Flush(SyncSender<()>),
}

/// The way to the writer thread.
#[derive(Clone)]
pub struct Writer {
    queue: SyncSender<Message>,
    lost: Arc<AtomicU64>,
}

impl Writer {
    /// Starts the thread, which ends with the last clone of the writer.
    pub fn start(sink: Sink) -> io::Result<Writer> {
        let (queue, messages) = sync_channel(QUEUE);
        let lost = Arc::new(AtomicU64::new(0));
        let counter = lost.clone();
        std::thread::Builder::new().name("log".to_owned()).spawn(move || run(sink, &messages, &counter))?;
        Ok(Writer { queue, lost })
    }

    /// Queues a line, without its end.
    pub fn line(&self, severity: Severity, line: String) {
        if let Err(TrySendError::Full(_)) = self.queue.try_send(Message::Line(severity, line)) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Starts a new file, if there is one.
    pub fn rotate(&self) {
        let _ = self.queue.send(Message::Rotate);
    }

    /// Returns when everything queued before is written, or after five seconds.
    pub fn flush(&self) {
        let (done, wait) = sync_channel(1);
        let mut message = Message::Flush(done);
        let deadline = std::time::Instant::now() + FLUSH_PATIENCE;
        while let Err(TrySendError::Full(back)) = self.queue.try_send(message) {
            if std::time::Instant::now() > deadline {
                return;
            }
            message = back;
            std::thread::sleep(Duration::from_millis(1));
        }
        let _ = wait.recv_timeout(FLUSH_PATIENCE);
    }
}

fn run(mut sink: Sink, messages: &Receiver<Message>, lost: &AtomicU64) {
    // One write call for all that is waiting, in batches that keep the file near its limit.
    const BATCH: usize = 64 << 10;
    let mut batch = Vec::new();
    while let Ok(first) = messages.recv() {
        let mut next = Some(first);
        while let Some(message) = next {
            match message {
                Message::Line(severity, line) => sink.add(&mut batch, severity, &line),
                Message::Rotate => {
                    sink.write_out(&mut batch);
                    sink.rotate();
                }
                Message::Flush(done) => {
                    sink.write_out(&mut batch);
                    let _ = done.send(());
                }
            }
            if batch.len() >= BATCH {
                sink.write_out(&mut batch);
            }
            next = messages.try_recv().ok();
        }
        let missed = lost.swap(0, Ordering::Relaxed);
        if missed > 0 {
            sink.add(&mut batch, Severity::Warning, &format!("{missed} log lines lost: the log is too slow"));
        }
        sink.write_out(&mut batch);
    }
}

impl Sink {
    fn add(&mut self, batch: &mut Vec<u8>, severity: Severity, line: &str) {
        match self {
            Sink::Syslog(syslog) => syslog.send(severity, line),
            Sink::Stderr if io::stderr().is_terminal() => {
                let colour = match severity {
                    Severity::Emerg | Severity::Alert | Severity::Crit | Severity::Err => "\x1b[31m",
                    Severity::Warning => "\x1b[33m",
                    Severity::Notice => "\x1b[36m",
                    Severity::Info | Severity::Debug => "\x1b[0m",
                };
                batch.extend_from_slice(format!("{colour}{line}\x1b[0m\n").as_bytes());
            }
            Sink::Stderr | Sink::File(_) => {
                batch.extend_from_slice(line.as_bytes());
                batch.push(b'\n');
            }
        }
    }

    /// Errors have nowhere to be reported; the next batch tries again.
    fn write_out(&mut self, batch: &mut Vec<u8>) {
        match self {
            Sink::File(file) => file.write(batch),
            Sink::Stderr => drop(io::stderr().lock().write_all(batch)),
            Sink::Syslog(_) => {}
        }
        batch.clear();
    }

    fn rotate(&mut self) {
        if let Sink::File(file) = self {
            file.rotate();
        }
    }
}

/// `sheep.log` and its predecessors.
pub struct LogFile {
    path: PathBuf,
    file: File,
    len: u64,
    max: u64,
}

impl LogFile {
    /// Opens for appending; created 0644. Rotated when longer than `max` bytes.
    pub fn open(path: &Path, max: u64) -> io::Result<LogFile> {
        let file = OpenOptions::new().append(true).create(true).mode(0o644).open(path)?;
        let len = file.metadata()?.len();
        Ok(LogFile { path: path.to_owned(), file, len, max })
    }

    fn write(&mut self, batch: &[u8]) {
        if batch.is_empty() {
            return;
        }
        if self.file.write_all(batch).is_ok() {
            self.len += batch.len() as u64;
        }
        if self.len >= self.max {
            self.rotate();
        }
    }

    /// Renames the file after the minute and opens a new one. If that fails the old file is written on.
    fn rotate(&mut self) {
        let target = self.rotated_name(LocalTime::at(SystemTime::now()));
        let rotated = std::fs::rename(&self.path, &target).and_then(|()| LogFile::open(&self.path, self.max));
        match rotated {
            Ok(new) => *self = new,
            Err(e) => {
                let _ =
                    writeln!(self.file, "cannot rotate {} to {}: {e}", self.path.display(), target.display());
                self.len = 0;
            }
        }
    }

    /// The name with the time appended; a second rotation in one minute gets a number, so that it overwrites nothing.
    fn rotated_name(&self, t: LocalTime) -> PathBuf {
        let stamp = format!(".{}-{:02}-{:02}-{:02}-{:02}", t.year, t.month, t.day, t.hour, t.minute);
        let name = |suffix: &str| {
            let mut name = self.path.clone().into_os_string();
            name.push(&stamp);
            name.push(suffix);
            PathBuf::from(name)
        };
        (1..1000).map(|n| format!(".{n}")).fold(name(""), |free, suffix| {
            if std::fs::exists(&free).unwrap_or(false) { name(&suffix) } else { free }
        })
    }
}

/// A sender of the local system log, facility daemon, ident `sheep`.
pub struct Syslog {
    socket: PathBuf,
    connection: Option<UnixDatagram>,
}

impl Syslog {
    /// A sender to the given socket, usually `/dev/log`; connected when needed, again after every failure.
    pub fn new(socket: &Path) -> Syslog {
        Syslog { socket: socket.to_owned(), connection: None }
    }

    fn send(&mut self, severity: Severity, line: &str) {
        const DAEMON: u8 = 3 << 3;
        let t = LocalTime::at(SystemTime::now());
        let priority = DAEMON | severity as u8;
        let (month, day, pid) = (t.month_name(), t.day, std::process::id());
        let stamp = format!("{month} {day:>2} {:02}:{:02}:{:02}", t.hour, t.minute, t.second);
        let datagram = format!("<{priority}>{stamp} sheep[{pid}]: {line}");
        for _ in 0..2 {
            if self.connection.is_none() {
                self.connection = self.connect().ok();
            }
            match self.connection.as_ref().map(|c| c.send(datagram.as_bytes())) {
                Some(Ok(_)) => return,
                _ => self.connection = None,
            }
        }
    }

    fn connect(&self) -> io::Result<UnixDatagram> {
        let connection = UnixDatagram::unbound()?;
        connection.connect(&self.socket)?;
        connection.set_write_timeout(Some(Duration::from_secs(1)))?;
        Ok(connection)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(path: &Path) -> String {
        std::fs::read_to_string(path).expect("a log file")
    }

    #[test]
    fn everything_queued_before_a_flush_is_written() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("sheep.log");
        let writer = Writer::start(Sink::File(LogFile::open(&path, MAX_FILE).expect("open"))).expect("start");
        for i in 0..5000 {
            writer.line(Severity::Info, format!("line {i}"));
        }
        writer.flush();
        let text = read(&path);
        assert_eq!(text.lines().count(), 5000);
        assert_eq!(text.lines().last(), Some("line 4999"));
    }

    #[test]
    fn rotation_keeps_every_line_and_every_file() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("sheep.log");
        let writer = Writer::start(Sink::File(LogFile::open(&path, MAX_FILE).expect("open"))).expect("start");
        for i in 0..3 {
            writer.line(Severity::Info, format!("line {i}"));
            writer.rotate();
        }
        writer.line(Severity::Info, "line 3".to_owned());
        writer.flush();
        assert_eq!(read(&path), "line 3\n");
        let files: Vec<_> = std::fs::read_dir(dir.path()).expect("directory").flatten().collect();
        assert_eq!(files.len(), 4);
        let mut all: Vec<_> = files.iter().map(|f| read(&f.path())).collect();
        all.sort();
        assert_eq!(all.concat(), "line 0\nline 1\nline 2\nline 3\n");
    }

    #[test]
    fn a_file_that_reached_its_limit_is_rotated() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("sheep.log");
        std::fs::write(&path, "old\n").expect("write");
        let mut file = LogFile::open(&path, 10).expect("open");
        file.write(b"12345\n");
        assert_eq!(read(&path), "");
        file.write(b"new\n");
        assert_eq!(read(&path), "new\n");
        let old = std::fs::read_dir(dir.path())
            .expect("directory")
            .flatten()
            .find(|f| f.file_name() != "sheep.log");
        let old = old.expect("a rotated file");
        assert_eq!(read(&old.path()), "old\n12345\n");
        let name = old.file_name().into_string().expect("UTF-8");
        let shape: String = name.chars().map(|c| if c.is_ascii_digit() { '9' } else { c }).collect();
        assert_eq!(shape, "sheep.log.9999-99-99-99-99");
    }

    #[test]
    fn the_system_log_gets_facility_ident_and_pid_and_may_restart() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("log");
        let mut syslog = Syslog::new(&path);
        syslog.send(Severity::Info, "nobody listens");
        for text in ["first", "second"] {
            let _ = std::fs::remove_file(&path);
            let server = UnixDatagram::bind(&path).expect("bind");
            server.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
            syslog.send(Severity::Err, text);
            let mut buf = [0; 256];
            let len = server.recv(&mut buf).expect("a datagram");
            let got = std::str::from_utf8(&buf[..len]).expect("UTF-8");
            assert!(got.starts_with("<27>"), "{got}");
            assert!(got.ends_with(&format!(" sheep[{}]: {text}", std::process::id())), "{got}");
        }
    }
}
