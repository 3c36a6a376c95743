//! Several real `cluster-member` processes in one cluster, over any driver, and what every driver has to do with them.
#![allow(dead_code, reason = "each test executable uses its part")]

pub mod contract;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// One process. Killed when dropped.
pub struct Member {
    pub child: Child,
    pub input: ChildStdin,
    log: Vec<(Instant, String)>,
}

/// Processes that know each other by one driver option.
pub struct Cluster {
    spec: String,
    pub members: HashMap<u16, Member>,
    lines: Receiver<(u16, u32, Instant, String)>,
    sender: Sender<(u16, u32, Instant, String)>,
    /// A line `failed ...` does not end the test.
    pub may_fail: bool,
    /// Commands before the program, by port: for processes on other hosts.
    pub inside: HashMap<u16, Vec<String>>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for member in self.members.values_mut() {
            let _ = member.child.kill();
            let _ = member.child.wait();
        }
    }
}

impl Cluster {
    /// Nobody yet; `spec` as after `-c`.
    pub fn new(spec: impl Into<String>) -> Cluster {
        let (sender, lines) = channel();
        let (members, inside) = (HashMap::new(), HashMap::new());
        Cluster { spec: spec.into(), members, lines, sender, may_fail: false, inside }
    }

    /// Joins these one after the other.
    pub fn of(spec: impl Into<String>, ports: &[u16]) -> Cluster {
        let mut cluster = Cluster::new(spec);
        cluster.join_all(ports);
        cluster
    }

    /// Joins these one after the other.
    pub fn join_all(&mut self, ports: &[u16]) {
        for port in ports {
            self.join(*port);
            for other in ports.iter().take_while(|p| *p <= port) {
                self.wait(*other, &format!("accept 127.0.0.1:{port} "));
            }
        }
    }

    /// Starts a process, which gets the address of `port`; the old one of that port, if any, is forgotten unreaped.
    pub fn start(&mut self, port: u16) {
        let program = env!("CARGO_BIN_EXE_cluster-member").to_owned();
        let mut words = self.inside.get(&port).cloned().unwrap_or_default();
        words.extend([program, self.spec.clone(), "127.0.0.1".into(), port.to_string()]);
        let mut child = Command::new(&words[0])
            .args(&words[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("cluster-member starts");
        let pid = child.id();
        let output = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let input = child.stdin.take().expect("stdin is piped");
        let sender = self.sender.clone();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let _ = sender.send((port, pid, Instant::now(), line));
            }
        });
        self.members.insert(port, Member { child, input, log: Vec::new() });
    }

    /// Starts a process and lets it join.
    pub fn join(&mut self, port: u16) {
        self.start(port);
        self.send(port, "join");
    }

    pub fn send(&mut self, port: u16, command: &str) {
        let member = self.members.get_mut(&port).expect("a started member");
        writeln!(member.input, "{command}").expect("the member lives");
    }

    pub fn signal(&self, port: u16, signal: Signal) {
        kill(Pid::from_raw(self.members[&port].child.id() as i32), signal).expect("the process exists");
    }

    /// SIGKILL.
    pub fn kill(&mut self, port: u16) {
        self.kill_unreaped(port).wait().expect("wait");
    }

    /// SIGKILL without reaping: the process stays a zombie.
    pub fn kill_unreaped(&mut self, port: u16) -> Child {
        let mut member = self.members.remove(&port).expect("a started member");
        member.child.kill().expect("kill");
        member.child
    }

    /// Takes the next line of any process into its log.
    pub fn next(&mut self) -> (u16, String) {
        loop {
            let (port, pid, at, line) = self.lines.recv_timeout(PATIENCE).unwrap_or_else(|_| {
                let logs: Vec<_> = self.members.keys().map(|p| (p, self.log(*p))).collect();
                panic!("nothing happens any more; logs: {logs:#?}")
            });
            assert!(self.may_fail || !line.starts_with("failed"), "{port}: {line}");
            if let Some(member) = self.members.get_mut(&port).filter(|m| m.child.id() == pid) {
                member.log.push((at, line.clone()));
                return (port, line);
            }
        }
    }

    /// Takes what has been said.
    pub fn drain(&mut self) {
        while let Ok((port, pid, at, line)) = self.lines.try_recv() {
            if let Some(member) = self.members.get_mut(&port).filter(|m| m.child.id() == pid) {
                member.log.push((at, line));
            }
        }
    }

    pub fn log(&self, port: u16) -> Vec<&str> {
        self.members[&port].log.iter().map(|(_, l)| l.as_str()).collect()
    }

    pub fn count(&self, port: u16, start: &str) -> usize {
        self.log(port).iter().filter(|l| l.starts_with(start)).count()
    }

    /// Waits for the `n`th line that starts with `start`, which may have come before.
    pub fn wait_nth(&mut self, port: u16, start: &str, n: usize) -> (Instant, String) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let log = &self.members[&port].log;
            if let Some(found) = log.iter().filter(|(_, l)| l.starts_with(start)).nth(n - 1) {
                return found.clone();
            }
            assert!(Instant::now() < deadline, "{port} never said {start} #{n}: {:#?}", self.log(port));
            self.next();
        }
    }

    pub fn wait(&mut self, port: u16, start: &str) -> String {
        self.wait_nth(port, start, 1).1
    }

    /// All members see everything that was written before: a message of each goes round.
    pub fn settle(&mut self, word: &str) {
        let ports: Vec<u16> = self.members.keys().copied().collect();
        for from in &ports {
            self.send(*from, &format!("notify {word}"));
            for to in &ports {
                self.wait(*to, &format!("notify 127.0.0.1:{from} {word}"));
            }
        }
    }

    /// What everybody sees alike: everything but questions and answers to requests.
    pub fn history(&self, port: u16) -> Vec<&str> {
        let common = ["accept ", "leave ", "notify ", "update "];
        self.log(port).into_iter().filter(|l| common.iter().any(|c| l.starts_with(c))).collect()
    }

    /// The histories are suffixes of the longest.
    pub fn assert_one_history(&self) {
        let mut histories: Vec<_> = self.members.keys().map(|p| self.history(*p)).collect();
        histories.sort_by_key(|h| std::cmp::Reverse(h.len()));
        for history in &histories {
            assert!(histories[0].ends_with(history), "{histories:#?}");
        }
    }
}
