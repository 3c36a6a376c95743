//! One daemon of a test cluster: its directory, its arguments, its process.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::binaries;
use crate::client::Client;
use crate::wait::{DEADLINE, wait_for};

/// What a program printed and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Exit status; -1 if it died by a signal.
    pub code: i32,
}

impl Output {
    /// From a finished process. Bytes that are not UTF-8 are replaced.
    pub fn of(output: std::process::Output) -> Output {
        Output {
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            code: output.status.code().unwrap_or(-1),
        }
    }

    /// Panics unless the program ended with 0; gives its standard output.
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "stdout:\n{}stderr:\n{}", self.stdout, self.stderr);
        self.stdout
    }
}

/// A daemon.
pub struct Node {
    /// Its number in the cluster.
    pub index: usize,
    /// Address.
    pub address: String,
    /// Words before its command: it runs on another host.
    pub(crate) inside: Vec<String>,
    /// TCP port.
    pub port: u16,
    /// Failure domain.
    pub zone: u32,
    /// Metadata directory.
    pub dir: PathBuf,
    /// Object directories besides `dir/obj`.
    pub disks: Vec<PathBuf>,
    /// Whether it stores nothing.
    pub gateway: bool,
    pub(crate) args: Vec<String>,
    pub(crate) child: Option<Child>,
    pub(crate) exit: Option<ExitStatus>,
}

impl Node {
    /// Starts the process and does not wait for anything.
    pub(crate) fn spawn(&mut self) {
        assert!(self.child.is_none(), "node {} runs already", self.index);
        let stderr = File::options()
            .create(true)
            .append(true)
            .open(self.stderr_path())
            .unwrap_or_else(|e| panic!("{}: {e}", self.stderr_path().display()));
        let program = binaries::sheep().display().to_string();
        let words: Vec<&String> = self.inside.iter().chain([&program]).collect();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]);
        command
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(stderr.try_clone().expect("a second descriptor"));
        command.stderr(stderr).env("RUST_BACKTRACE", "1");
        let child = command.spawn().unwrap_or_else(|e| panic!("sheep: {e}"));
        self.exit = None;
        self.child = Some(child);
    }

    fn stderr_path(&self) -> PathBuf {
        self.dir.with_extension("stderr")
    }

    /// The Unix socket.
    pub fn sock(&self) -> PathBuf {
        self.dir.join("sock")
    }

    /// Process id; none while it does not run.
    pub fn pid(&self) -> Option<i32> {
        self.child.as_ref().map(|c| c.id() as i32)
    }

    /// Whether the process runs; notices its end.
    pub fn is_running(&mut self) -> bool {
        let Some(child) = &mut self.child else { return false };
        match child.try_wait().expect("a child can be waited for") {
            None => true,
            Some(status) => {
                self.exit = Some(status);
                self.child = None;
                false
            }
        }
    }

    /// How the process ended, once it did.
    pub fn exit_status(&mut self) -> Option<ExitStatus> {
        self.is_running();
        self.exit
    }

    /// Waits until the process ends and gives its status.
    pub fn wait_exit(&mut self, limit: Duration) -> ExitStatus {
        let what = format!("end of node {}", self.index);
        wait_for(&what, limit, || if self.is_running() { None } else { Some(()) });
        self.exit.unwrap_or_else(|| panic!("node {} was never started", self.index))
    }

    /// Arguments of the next start.
    pub fn args_mut(&mut self) -> &mut Vec<String> {
        &mut self.args
    }

    /// Sends a signal to the running process.
    pub fn signal(&self, signal: Signal) {
        let pid = self.pid().unwrap_or_else(|| panic!("node {} does not run", self.index));
        kill(Pid::from_raw(pid), signal).unwrap_or_else(|e| panic!("kill {pid}: {e}"));
    }

    /// Kills at once and reaps.
    pub(crate) fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("a running child can be killed");
            self.exit = Some(child.wait().expect("a killed child ends"));
        }
    }

    /// Waits until the daemon accepts connections; panics if it ends instead.
    pub(crate) fn wait_listening(&mut self) {
        let what = format!("node {} to listen on {}", self.index, self.port);
        wait_for(&what, DEADLINE, || {
            assert!(self.is_running(), "node {} ended: {:?}\n{}", self.index, self.exit, self.tail(60));
            self.connect().ok()
        });
    }

    /// Connects as [`Node::client`], if the daemon listens.
    pub(crate) fn connect(&self) -> std::io::Result<Client> {
        if self.inside.is_empty() { Client::connect(self.port) } else { Client::connect_unix(&self.sock()) }
    }

    /// A new connection over TCP; to a daemon on another host over its Unix socket, which no cut concerns.
    pub fn client(&self) -> Client {
        self.connect().unwrap_or_else(|e| panic!("node {} on {}: {e}", self.index, self.port))
    }

    /// A new connection over the Unix socket.
    pub fn unix_client(&self) -> Client {
        Client::connect_unix(&self.sock()).unwrap_or_else(|e| panic!("{}: {e}", self.sock().display()))
    }

    /// Whole log, and whatever the process printed.
    pub fn log(&self) -> String {
        let read =
            |p: &Path| fs::read(p).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
        read(&self.dir.join("sheep.log")) + &read(&self.stderr_path())
    }

    /// The last lines of the log.
    pub fn tail(&self, lines: usize) -> String {
        let log = self.log();
        let all: Vec<&str> = log.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Whether the daemon panicked at any time.
    pub fn has_panicked(&self) -> bool {
        self.log().contains("panicked at")
    }

    /// A line `Key: value kB` of `/proc/PID/status`, in bytes. 0 while it does not run.
    pub fn memory(&self, key: &str) -> u64 {
        let Some(pid) = self.pid() else { return 0 };
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status
            .lines()
            .filter_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
            .filter_map(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok())
            .next()
            .map_or(0, |kib| kib << 10)
    }

    /// Processor time that the process has used; zero while it does not run.
    pub fn cpu(&self) -> Duration {
        let stat = self.pid().and_then(|pid| fs::read_to_string(format!("/proc/{pid}/stat")).ok());
        let stat = stat.unwrap_or_default();
        // User and system time are words 14 and 15; counted behind the name, which may hold anything.
        let words = stat.rsplit(')').next().unwrap_or_default().split_ascii_whitespace();
        let ticks: u64 = words.skip(11).take(2).filter_map(|w| w.parse::<u64>().ok()).sum();
        // The kernel reports in units of 1/100 s on every Linux architecture (USER_HZ).
        Duration::from_millis(ticks * 10)
    }

    /// Stale files: name and path.
    pub fn stale_files(&self) -> Vec<(String, PathBuf)> {
        let dirs = self.object_dirs().into_iter().map(|d| d.join(".stale"));
        let entries = dirs.filter_map(|d| fs::read_dir(d).ok()).flatten().filter_map(Result::ok);
        entries.filter_map(|e| Some((e.file_name().into_string().ok()?, e.path()))).collect()
    }

    /// Threads of the process.
    pub fn threads(&self) -> u64 {
        self.pid()
            .map_or(0, |pid| fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count) as u64)
    }

    /// Open descriptors of the process.
    pub fn open_files(&self) -> usize {
        self.pid().map_or(0, |pid| fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count))
    }

    /// Directories that hold object files.
    pub fn object_dirs(&self) -> Vec<PathBuf> {
        if self.disks.is_empty() { vec![self.dir.join("obj")] } else { self.disks.clone() }
    }
}
