//! `dog upgrade ...` (spec 07, 16.2): converts files of old releases. No daemon is contacted; all messages go to stderr.

pub mod config;
pub mod epoch;
pub mod inode;
pub mod object_location;

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::context::Context;
use crate::exit::{Outcome, SYSTEM, Stop, fail};
use crate::out::errno_text;

fn path(word: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(word))
}

/// The second operand.
fn destination(context: &Context) -> Result<&Path, Stop> {
    context.arg(1).map(path).ok_or_else(|| fail(Stop::Usage, "please specify destination file path"))
}

/// Reads the file of the first operand.
fn read_source(context: &Context, what: &str) -> Result<Vec<u8>, Stop> {
    let source = path(context.name()?);
    std::fs::read(source).map_err(|e| fail(SYSTEM, format_args!("failed to open {what}: {}", errno_text(&e))))
}

/// Writes a converted file; one that exists is overwritten in place.
fn write_destination(path: &Path, bytes: &[u8]) -> Outcome {
    let write = || -> io::Result<()> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path);
        file?.write_all(bytes)
    };
    write().map_err(|e| fail(SYSTEM, format_args!("failed to write {}: {}", path.display(), errno_text(&e))))
}
