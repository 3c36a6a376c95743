//! Debian's corosync for tests: in the network namespace of the test or of one of its hosts, ended with the value.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::binaries::system;
use crate::netns::is_own_network;
use crate::wait::{DEADLINE, wait_for};

/// Milliseconds after which a silent node is given up.
pub const TOKEN: u32 = 1000;

/// Running corosync daemons that know each other. Dropping it kills them.
pub struct Corosync {
    nodes: Vec<Node>,
    config: PathBuf,
    dir: TempDir,
}

struct Node {
    /// Words before a command that runs on this node.
    inside: Vec<String>,
    child: Option<Child>,
}

impl Corosync {
    /// One corosync in the network namespace of the test.
    pub fn single() -> Corosync {
        assert!(
            is_own_network(),
            "corosync needs a network namespace of its own: run the test by scripts/in-namespace (see there)"
        );
        Corosync::start(&[("127.0.0.1".into(), Vec::new())])
    }

    /// One corosync on each host: its address, and the words before a command that runs there.
    pub(crate) fn start(hosts: &[(String, Vec<String>)]) -> Corosync {
        let dir = tempfile::Builder::new().prefix("sheepdog-corosync-").tempdir().expect("a directory");
        let config = dir.path().join("corosync.conf");
        let mut text = format!(
            "totem {{\n  version: 2\n  cluster_name: test\n  transport: knet\n  crypto_cipher: none\n  \
             crypto_hash: none\n  token: {TOKEN}\n}}\nlogging {{\n  to_stderr: yes\n}}\nnodelist {{\n"
        );
        for (i, (address, _)) in hosts.iter().enumerate() {
            let id = i + 1;
            text +=
                &format!("  node {{\n    name: n{id}\n    nodeid: {id}\n    ring0_addr: {address}\n  }}\n");
        }
        std::fs::write(&config, text + "}\n").expect("the configuration is written");
        let nodes = hosts.iter().map(|(_, inside)| Node { inside: inside.clone(), child: None }).collect();
        let mut corosync = Corosync { nodes, config, dir };
        for index in 0..hosts.len() {
            corosync.spawn(index);
        }
        corosync.wait_formed();
        corosync
    }

    fn spawn(&mut self, index: usize) {
        let log = self.log_path(index);
        let log = || std::fs::OpenOptions::new().create(true).append(true).open(&log).expect("a log");
        let node = &self.nodes[index];
        let words = [
            &node.inside[..],
            &["setpriv", "--pdeathsig", "KILL"].map(String::from),
            &[system("corosync", "corosync").display().to_string(), "-f".into(), "-c".into()],
            &[self.config.display().to_string()],
        ]
        .concat();
        let child = Command::new(&words[0])
            .args(&words[1..])
            .stdin(Stdio::null())
            .stdout(log())
            .stderr(log())
            .spawn()
            .unwrap_or_else(|e| panic!("{}: {e}", words[0]));
        self.nodes[index].child = Some(child);
    }

    fn log_path(&self, index: usize) -> PathBuf {
        self.dir.path().join(format!("n{index}.log"))
    }

    fn log(&self, index: usize) -> String {
        std::fs::read_to_string(self.log_path(index)).unwrap_or_default()
    }

    /// Waits until every running node serves clients and sees all running ones.
    pub fn wait_formed(&mut self) {
        self.wait_seen(self.nodes.iter().filter(|n| n.child.is_some()).count());
    }

    /// Waits until every running node serves clients and sees nobody else.
    pub fn wait_apart(&mut self) {
        self.wait_seen(1);
    }

    fn wait_seen(&mut self, count: usize) {
        for index in 0..self.nodes.len() {
            if self.nodes[index].child.is_none() {
                continue;
            }
            wait_for(&format!("corosync {} to see {count} nodes", index + 1), DEADLINE, || {
                let ended = self.nodes[index].child.as_mut().and_then(|c| c.try_wait().expect("wait"));
                assert!(ended.is_none(), "corosync ended: {}", self.log(index));
                let tool = system("corosync-cmapctl", "corosync").display().to_string();
                let seen = output(&self.nodes[index].inside, &[&tool, "runtime.members."])?;
                (seen.matches("= joined").count() == count && serves(&self.nodes[index].inside)).then_some(())
            });
        }
    }

    /// SIGKILL for one node's corosync.
    pub fn kill(&mut self, index: usize) {
        if let Some(mut child) = self.nodes[index].child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts a killed one again.
    pub fn restart(&mut self, index: usize) {
        self.kill(index);
        self.spawn(index);
        self.wait_formed();
    }

    /// Directory of its files.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}

/// Whether clients of the process group service are served.
fn serves(inside: &[String]) -> bool {
    output(inside, &[&system("corosync-cpgtool", "corosync").display().to_string()]).is_some()
}

fn output(inside: &[String], words: &[&str]) -> Option<String> {
    let words: Vec<&str> = inside.iter().map(String::as_str).chain(words.iter().copied()).collect();
    let output = Command::new(words[0]).args(&words[1..]).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

impl Drop for Corosync {
    fn drop(&mut self) {
        (0..self.nodes.len()).for_each(|i| self.kill(i));
    }
}
