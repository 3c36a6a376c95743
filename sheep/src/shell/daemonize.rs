//! Going to the background (spec 04, 17.2). The starting process waits until the daemon reports that it listens and
//! its cluster driver runs, and ends with status 0; or it prints the daemon's error and ends with status 1. The
//! original reported success much earlier, before most things that can fail.
//!
//! Forking copies only the calling thread, so everything that starts threads comes afterwards.

use std::fs::{File, OpenOptions};
use std::io::{self, PipeReader, PipeWriter, Read, Write};

use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, dup2_stderr, dup2_stdin, dup2_stdout, setsid};

/// Which process returned from [`daemonize`].
pub enum Side {
    /// The starting one: print the text to standard error and end with the status.
    Starter {
        /// Exit status.
        code: i32,
        /// The daemon's error, if any.
        stderr: String,
    },
    /// The daemon: go on and report.
    Daemon(Readiness),
}

/// The report owed to the starting process. Dropping it means that the daemon ended without a word.
#[derive(Debug)]
pub struct Readiness(Option<PipeWriter>);

const READY: u8 = 1;
const FAILED: u8 = 2;

impl Readiness {
    /// In the foreground nobody waits; errors go to standard error.
    pub fn foreground() -> Readiness {
        Readiness(None)
    }

    /// The daemon listens and its driver runs.
    pub fn ready(self) {
        if let Some(mut pipe) = self.0 {
            // A starter that was killed needs no report.
            let _ = pipe.write_all(&[READY]);
        }
    }

    /// The daemon ends with status 1 because of `text`, lines with their ends.
    pub fn failed(self, text: &str) {
        let _ = match self.0 {
            Some(mut pipe) => pipe.write_all(&[&[FAILED], text.as_bytes()].concat()),
            None => io::stderr().write_all(text.as_bytes()),
        };
    }
}

/// Splits off the daemon: own session, no terminal, directory `/`, standard streams at `/dev/null`.
pub fn daemonize() -> io::Result<Side> {
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads != 1 {
        return Err(io::Error::other(format!("cannot go to the background with {threads} threads")));
    }
    let (report, pipe) = io::pipe()?;
    match fork()? {
        ForkResult::Parent { child } => {
            drop(pipe);
            let side = await_report(report);
            // The middle process ended at once; its status says nothing.
            let _ = waitpid(child, None);
            Ok(side)
        }
        ForkResult::Child => {
            drop(report);
            Ok(Side::Daemon(detach(pipe)))
        }
    }
}

/// In the first child; returns in the second.
fn detach(pipe: PipeWriter) -> Readiness {
    let second = setsid().map_err(io::Error::from).and_then(|_| fork());
    match second {
        Ok(ForkResult::Child) => {}
        Ok(ForkResult::Parent { .. }) => std::process::exit(0),
        Err(e) => give_up(pipe, "cannot start a session", &e),
    }
    match leave_terminal() {
        Ok(()) => Readiness(Some(pipe)),
        Err(e) => give_up(pipe, "cannot detach from the terminal", &e),
    }
}

fn give_up(pipe: PipeWriter, what: &str, error: &io::Error) -> ! {
    Readiness(Some(pipe)).failed(&format!("{what}: {error}\n"));
    std::process::exit(1)
}

fn leave_terminal() -> io::Result<()> {
    std::env::set_current_dir("/")?;
    let null: File = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    Ok(())
}

fn await_report(mut pipe: PipeReader) -> Side {
    // An error text of any sane length; more is not read.
    const MAX_TEXT: u64 = 64 << 10;
    let mut first = [0];
    let status = pipe.read_exact(&mut first).map(|()| first[0]);
    if matches!(status, Ok(READY)) {
        return Side::Starter { code: 0, stderr: String::new() };
    }
    let mut text = Vec::new();
    let complete = matches!(status, Ok(FAILED)) && pipe.take(MAX_TEXT).read_to_end(&mut text).is_ok();
    let stderr = match complete {
        true => String::from_utf8_lossy(&text).into_owned(),
        false => "sheep: the daemon ended before it was ready, its log may say why\n".to_owned(),
    };
    Side::Starter { code: 1, stderr }
}

fn fork() -> io::Result<ForkResult> {
    // SAFETY: `daemonize` checked that this is the only thread, so the child is a full copy in which every lock is
    // free and every library is in a consistent state; the second fork happens in a child that started no thread.
    Ok(unsafe { nix::unistd::fork() }?)
}
