//! Debian's ZooKeeper server, one or an ensemble, for tests: own ports, own data, ended with the value.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::Ports;

const JAR: &str = "/usr/share/java/zookeeper.jar";
/// Milliseconds of the servers' clock: sessions last 2 to 20 ticks unless the limits below say otherwise.
const TICK: u64 = 100;
const START: Duration = Duration::from_secs(60);

/// Running servers. Dropping it kills them and removes their data.
pub struct ZooKeeper {
    servers: Vec<Server>,
    _dir: TempDir,
    _ports: Ports,
}

struct Server {
    config: PathBuf,
    log: PathBuf,
    address: String,
    port: u16,
    child: Option<Child>,
}

impl ZooKeeper {
    /// Starts `count` servers, 1 or 3 to 5, and waits until they serve.
    pub fn start(count: usize) -> ZooKeeper {
        ZooKeeper::start_on("127.0.0.1", count)
    }

    /// One server whose znode `parent` has had so many children that the next one in its sequence gets the number `next`.
    pub fn start_late(parent: &str, next: i32) -> ZooKeeper {
        let mut zookeeper = ZooKeeper::prepare("127.0.0.1", 1);
        let data = zookeeper.servers[0].config.with_file_name("s0").join("version-2");
        std::fs::create_dir_all(&data).unwrap_or_else(|e| panic!("{}: {e}", data.display()));
        std::fs::write(data.join("log.1"), transactions(parent, next)).expect("a log");
        zookeeper.start_all();
        zookeeper
    }

    /// As [`ZooKeeper::start`], for clients of this address of the machine.
    pub fn start_on(address: &str, count: usize) -> ZooKeeper {
        let mut zookeeper = ZooKeeper::prepare(address, count);
        zookeeper.start_all();
        zookeeper
    }

    fn prepare(address: &str, count: usize) -> ZooKeeper {
        assert!(Path::new(JAR).exists(), "{JAR} is missing: install Debian's package zookeeper");
        assert!(count * 3 <= Ports::MAX, "a block of ports is enough for {} servers", Ports::MAX / 3);
        let ports = Ports::reserve();
        let dir = tempfile::Builder::new().prefix("sheepdog-zk-").tempdir().expect("a temporary directory");
        let mut members = String::new();
        for i in (0..count).filter(|_| count > 1) {
            let (peer, vote) = (ports.get(count + 2 * i), ports.get(count + 2 * i + 1));
            members += &format!("server.{}=127.0.0.1:{peer}:{vote}\n", i + 1);
        }
        let servers = (0..count).map(|i| server(dir.path(), i, address, ports.get(i), &members)).collect();
        ZooKeeper { servers, _dir: dir, _ports: ports }
    }

    /// `HOST:PORT[,HOST:PORT...]` for clients.
    pub fn hosts(&self) -> String {
        self.servers.iter().map(|s| format!("{}:{}", s.address, s.port)).collect::<Vec<_>>().join(",")
    }

    /// Starts the servers that do not run and waits until all serve.
    pub fn start_all(&mut self) {
        self.servers.iter_mut().for_each(Server::start);
        self.servers.iter_mut().for_each(Server::wait);
    }

    /// SIGKILL for all.
    pub fn kill_all(&mut self) {
        self.servers.iter_mut().for_each(Server::kill);
    }

    /// SIGKILL for one server.
    pub fn kill(&mut self, index: usize) {
        self.servers[index].kill();
    }

    /// Freezes or continues all servers.
    pub fn signal_all(&self, signal: Signal) {
        for child in self.servers.iter().filter_map(|s| s.child.as_ref()) {
            let pid = nix::unistd::Pid::from_raw(child.id() as i32);
            nix::sys::signal::kill(pid, signal).unwrap_or_else(|e| panic!("signal {signal}: {e}"));
        }
    }

    /// How many nodes of living sessions there are, as the first server knows.
    pub fn ephemerals(&self) -> Option<u64> {
        let text = self.servers[0].ask("mntr")?;
        let line = text.lines().find_map(|l| l.strip_prefix("zk_ephemerals_count"))?;
        line.trim().parse().ok()
    }

    /// The number of the server that leads, in an ensemble.
    pub fn leader(&self) -> usize {
        let leads = |s: &Server| s.ask("srvr").is_some_and(|text| text.contains("Mode: leader"));
        self.servers.iter().position(leads).expect("an ensemble that serves has a leader")
    }
}

impl Drop for ZooKeeper {
    fn drop(&mut self) {
        self.kill_all();
    }
}

fn server(dir: &Path, index: usize, address: &str, port: u16, members: &str) -> Server {
    let data = dir.join(format!("s{index}"));
    std::fs::create_dir_all(&data).unwrap_or_else(|e| panic!("{}: {e}", data.display()));
    let config = dir.join(format!("s{index}.cfg"));
    let text = format!(
        "tickTime={TICK}\ninitLimit=100\nsyncLimit=20\nminSessionTimeout=500\nmaxSessionTimeout=60000\n\
         dataDir={}\nclientPort={port}\nclientPortAddress={address}\nmaxClientCnxns=0\n\
         admin.enableServer=false\n4lw.commands.whitelist=*\n{members}",
        data.display()
    );
    std::fs::write(data.join("myid"), format!("{}\n", index + 1)).expect("myid is written");
    std::fs::write(&config, text).expect("the configuration is written");
    let log = dir.join(format!("s{index}.log"));
    Server { config, log, address: address.to_owned(), port, child: None }
}

/// A server's transaction log: `parent`, level by level, and a child of it that counts as the one before `next`.
fn transactions(parent: &str, next: i32) -> Vec<u8> {
    let text = |out: &mut Vec<u8>, text: &str| {
        out.extend((text.len() as i32).to_be_bytes());
        out.extend(text.as_bytes());
    };
    let levels = parent.match_indices('/').skip(1).map(|(at, _)| &parent[..at]).chain([parent]);
    let child = format!("{parent}/before");
    let mut creates: Vec<(&str, i32)> = levels.map(|path| (path, 1)).collect();
    creates.push((&child, next));
    // Magic, version, database.
    let mut log = [b"ZKLG".as_slice(), &2i32.to_be_bytes(), &0i64.to_be_bytes()].concat();
    for (number, (path, parent_version)) in creates.into_iter().enumerate() {
        // Session, its request, transaction, time, "create".
        let mut txn = [0i64.to_be_bytes().as_slice(), &0i32.to_be_bytes()].concat();
        txn.extend((number as i64 + 1).to_be_bytes());
        txn.extend([0i64.to_be_bytes().as_slice(), &1i32.to_be_bytes()].concat());
        text(&mut txn, path);
        text(&mut txn, "");
        // One entry: all permissions for everybody.
        txn.extend([1i32.to_be_bytes(), 31i32.to_be_bytes()].concat());
        text(&mut txn, "world");
        text(&mut txn, "anyone");
        // Not ephemeral.
        txn.push(0);
        txn.extend(parent_version.to_be_bytes());
        log.extend(i64::from(adler32(&txn)).to_be_bytes());
        log.extend((txn.len() as i32).to_be_bytes());
        log.extend(txn);
        log.push(b'B');
    }
    log
}

fn adler32(bytes: &[u8]) -> u32 {
    let (a, b) = bytes.iter().fold((1, 0), |(a, b), byte| {
        let a = (a + u32::from(*byte)) % 65521;
        (a, (b + a) % 65521)
    });
    b << 16 | a
}

impl Server {
    fn start(&mut self) {
        if self.child.is_some() {
            return;
        }
        let log = || std::fs::OpenOptions::new().create(true).append(true).open(&self.log).expect("a log");
        // A test that is killed takes its servers with it.
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "java"])
            .args(["-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dzookeeper.forceSync=no"])
            .arg("-Dzookeeper.snapshot.trust.empty=true")
            .args(["-cp", JAR, "org.apache.zookeeper.server.quorum.QuorumPeerMain"])
            .arg(&self.config)
            .stdin(Stdio::null())
            .stdout(log())
            .stderr(log());
        let child = command.spawn().unwrap_or_else(|e| panic!("setpriv (of util-linux): {e}"));
        self.child = Some(child);
    }

    /// The answer to a four-letter command.
    fn ask(&self, command: &str) -> Option<String> {
        let mut stream = TcpStream::connect((self.address.as_str(), self.port)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
        stream.write_all(command.as_bytes()).ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        Some(text)
    }

    fn wait(&mut self) {
        let deadline = Instant::now() + START;
        while !self.ask("srvr").is_some_and(|text| text.contains("Mode: ")) {
            let log = || std::fs::read_to_string(&self.log).unwrap_or_default();
            let ended = self.child.as_mut().expect("a started server").try_wait().expect("wait");
            assert!(ended.is_none(), "the ZooKeeper server ended: {}", log());
            assert!(Instant::now() < deadline, "the ZooKeeper server does not serve: {}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
