//! `dog node format` (spec 07, 13.9): decides the store of a node before its first start. No daemon is contacted.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use sheepdog_proto::fixed_str;

use crate::context::Context;
use crate::exit::{Outcome, SYSTEM, Stop, fail};
use crate::out::errno_text;

/// Bytes of the file: the store's name, padded with zeros.
const STORE_NAME_LEN: usize = 16;

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let directory = context.name()?;
    let Some(store) = context.arg(1) else {
        return Err(fail(Stop::Usage, "specify store format"));
    };
    if !matches!(store, b"plain" | b"tree") {
        return Err(fail(SYSTEM, "expected store format: plain, tree"));
    }
    let path = Path::new(OsStr::from_bytes(directory)).join("node_config");
    let shown = path.display();
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    file.and_then(|mut file| file.write_all(&fixed_str::<STORE_NAME_LEN>(store))).map_err(|e| {
        if e.kind() == io::ErrorKind::AlreadyExists {
            return fail(SYSTEM, format_args!("config file already exists: {shown}"));
        }
        fail(SYSTEM, format_args!("failed to create a config file ({shown}): {}", errno_text(&e)))
    })
}
