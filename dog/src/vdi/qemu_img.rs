//! qcow2 through `qemu-img`, which reads and writes the image over NBD from a server inside this process.
//!
//! Nothing is stored in between, holes stay holes on both sides, and qemu-img works on several parts at a time. Images
//! that refer to other files are refused: what they name would be read with this user's rights.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use serde_json::Value;
use sheepdog_nbd::{ListenAddr, Listener, VdiExportsOptions};

use crate::args::Snapshot;
use crate::context::Context;
use crate::exit::{BAD_ARGUMENT, FAILURE, Outcome, SYSTEM, Stop, fail};
use crate::out::{self, errno_text};

/// Requests that qemu-img has in flight.
const PARALLEL: &str = "8";

fn start_failure(e: &io::Error) -> Stop {
    match e.kind() {
        io::ErrorKind::NotFound => {
            fail(SYSTEM, "qemu-img is not installed: it is needed for qcow2 (package qemu-utils)")
        }
        _ => fail(SYSTEM, format_args!("Failed to start qemu-img: {}", errno_text(e))),
    }
}

/// A path as qemu-img understands it: one with a colon would be taken for a protocol.
fn plain(path: &Path) -> OsString {
    let mut word = OsString::from("file:");
    word.push(path);
    word
}

/// The size of the image in a qcow2 file; failures are reported.
pub fn virtual_size(path: &Path) -> Result<u64, Stop> {
    let mut command = Command::new("qemu-img");
    command.args(["info", "--output=json", "-f", "qcow2"]).arg(plain(path)).stdin(Stdio::null());
    let output = command.stderr(Stdio::inherit()).output().map_err(|e| start_failure(&e))?;
    if !output.status.success() {
        return Err(fail(FAILURE, "qemu-img cannot read the image"));
    }
    let info: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    size_of(&info).map_err(|why| fail(FAILURE, why))
}

fn size_of(info: &Value) -> Result<u64, &'static str> {
    if !info["backing-filename"].is_null() {
        return Err("the image has a backing file: make a complete one with qemu-img convert first");
    }
    if !info["format-specific"]["data"]["data-file"].is_null() {
        return Err(
            "the image keeps its data in another file: make a complete one with qemu-img convert first",
        );
    }
    info["virtual-size"].as_u64().ok_or("qemu-img does not tell the size of the image")
}

/// Copies a qcow2 file into an image that is all zeros.
pub async fn import(context: &Context, name: &[u8], file: &Path) -> Outcome {
    let file = plain(file);
    with_export(context, name, None, |uri| {
        let mut words =
            ["convert", "-n", "-W", "--target-is-zero", "-f", "qcow2", "-O", "raw", "-m", PARALLEL]
                .map(OsString::from)
                .to_vec();
        words.extend([file, uri]);
        words
    })
    .await
}

/// Copies an image or snapshot into a new qcow2 file.
pub async fn export(context: &Context, name: &[u8], snapshot: Option<&Snapshot>, file: &Path) -> Outcome {
    let file = plain(file);
    with_export(context, name, snapshot, |uri| {
        let mut words =
            ["convert", "-W", "-f", "raw", "-O", "qcow2", "-m", PARALLEL].map(OsString::from).to_vec();
        words.extend([uri, file]);
        words
    })
    .await
}

/// Runs qemu-img while the image can be reached under the URI that `words` is given.
async fn with_export(
    context: &Context,
    name: &[u8],
    snapshot: Option<&Snapshot>,
    words: impl FnOnce(OsString) -> Vec<OsString>,
) -> Outcome {
    let utf8 = |bytes: &[u8]| {
        let text = String::from_utf8(bytes.to_vec());
        text.map_err(|_| fail(BAD_ARGUMENT, "qcow2 works only with names that are UTF-8"))
    };
    let vdi = utf8(name)?;
    let export = match snapshot {
        None => vdi.clone(),
        Some(Snapshot::Id(id)) => format!("{vdi}:{id}"),
        Some(Snapshot::Tag(tag)) => format!("{vdi}@{}", utf8(tag)?),
    };
    let failed = |e: io::Error| fail(SYSTEM, format_args!("Failed to serve the image: {}", errno_text(&e)));
    let directory = tempfile::tempdir().map_err(failed)?;
    let path = directory.path().join("nbd");
    let address = ListenAddr::Unix(path.clone());
    let listener = Listener::bind(&address).await.map_err(failed)?;
    let options =
        VdiExportsOptions { default_export: Some(export), read_only: snapshot.is_some(), only: vec![vdi] };
    let server = crate::nbd::server(context, options);
    let serving = tokio::spawn({
        let server = server.clone();
        async move { server.serve(listener).await }
    });
    let mut uri = OsString::from("nbd+unix:///?socket=");
    uri.push(std::ffi::OsStr::from_bytes(&percent_encoded(path.as_os_str().as_bytes())));
    let status = run(words(uri)).await;
    server.shutdown().await;
    serving.abort();
    match status {
        Err(e) => Err(start_failure(&e)),
        Ok(status) if status.success() => Ok(()),
        Ok(_) => Err(fail(FAILURE, "qemu-img failed")),
    }
}

/// Runs qemu-img without stopping the server; dropping the future kills it.
async fn run(words: Vec<OsString>) -> io::Result<ExitStatus> {
    let mut command = Command::new("qemu-img");
    let (first, rest) = words.split_at(1);
    command.args(first).args(out::is_terminal().then_some("-p")).args(rest).stdin(Stdio::null());
    let child = command.spawn()?;
    let mut guard = Kill(Some(nix::unistd::Pid::from_raw(child.id() as i32)));
    let waited = tokio::task::spawn_blocking(move || {
        let mut child = child;
        child.wait()
    });
    let status = waited.await.map_err(io::Error::other)?;
    guard.0 = None;
    status
}

/// Ends a process unless it was disarmed.
struct Kill(Option<nix::unistd::Pid>);

impl Drop for Kill {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM); // it may have ended
        }
    }
}

fn percent_encoded(bytes: &[u8]) -> Vec<u8> {
    let encode = |byte: &u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'.' | b'_' => vec![*byte],
        other => format!("%{other:02x}").into_bytes(),
    };
    bytes.iter().flat_map(encode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn images_that_refer_to_other_files_are_refused() {
        assert_eq!(size_of(&json!({ "virtual-size": 5 })), Ok(5));
        assert!(size_of(&json!({ "virtual-size": 5, "backing-filename": "/etc/passwd" })).is_err());
        let data = json!({ "virtual-size": 5, "format-specific": { "data": { "data-file": "/dev/sda" } } });
        assert!(size_of(&data).is_err());
        assert!(size_of(&Value::Null).is_err());
    }

    #[test]
    fn paths_survive_a_uri() {
        assert_eq!(percent_encoded(b"/tmp/a b&c"), b"/tmp/a%20b%26c");
    }
}
