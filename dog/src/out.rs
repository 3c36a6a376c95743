//! The two output streams (spec 07, section 4).
//!
//! stdout is buffered like the C library does it, because scripts that send both streams into one pipe see the order:
//! in blocks of 4096 bytes unless it is a terminal, flushed at exit. Object data bypasses the buffer. Every message on
//! stderr is one write.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Block in which a pipe or file receives buffered output, bytes.
const BLOCK: usize = 4096;
/// Longest message on stderr, bytes.
const MAX_MESSAGE: usize = 1023;
/// Status after a reader of stdout went away, as a shell reports SIGPIPE.
const BROKEN_PIPE: i32 = 141;

static PENDING: Mutex<Vec<u8>> = Mutex::new(Vec::new());

fn pending() -> MutexGuard<'static, Vec<u8>> {
    PENDING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether stdout is a terminal.
pub fn is_terminal() -> bool {
    io::stdout().is_terminal()
}

/// Writes to descriptor 1, bypassing the buffer.
pub fn direct(mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match nix::unistd::write(io::stdout().as_fd(), bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Writes buffered text; a stdout that cannot be written any more ends the process.
fn direct_or_die(bytes: &[u8]) {
    match direct(bytes) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => std::process::exit(BROKEN_PIPE),
        // As with the C library, text that a full disk cannot take is lost without notice.
        _ => {}
    }
}

/// Appends to stdout.
pub fn write(bytes: &[u8]) {
    let mut pending = pending();
    pending.extend_from_slice(bytes);
    let ready = if is_terminal() { pending.len() } else { pending.len() / BLOCK * BLOCK };
    if ready > 0 {
        direct_or_die(&pending[..ready]);
        pending.drain(..ready);
    }
}

/// Hands everything buffered to the system.
pub fn flush() {
    let mut pending = pending();
    direct_or_die(&pending);
    pending.clear();
}

/// Appends formatted text to stdout.
macro_rules! out {
    ($($arg:tt)*) => { $crate::out::write(format!($($arg)*).as_bytes()) };
}

/// Writes one message to stderr, with a newline.
pub fn log(message: impl Display) {
    let mut line = message.to_string().into_bytes();
    line.truncate(MAX_MESSAGE);
    line.push(b'\n');
    let _ = io::stderr().write_all(&line); // nowhere is left to complain
}

/// The bytes as text for a message.
pub fn text(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

/// The C library's text of an error, without Rust's `(os error N)`.
pub fn errno_text(error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::TimedOut {
        return "Connection timed out".into();
    }
    let text = error.to_string();
    match text.find(" (os error ") {
        Some(end) => text[..end].to_string(),
        None => text,
    }
}
