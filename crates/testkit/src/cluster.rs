//! A cluster of real daemons: building, starting, stopping, waiting, asking.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::signal::Signal;
use sheepdog_proto::admin::RecoveryState;
use sheepdog_proto::cluster::CLUSTER_INFO_LEN;
use sheepdog_proto::header::ClusterRequest;
use sheepdog_proto::{
    ClusterFlags, ClusterInfo, ClusterStatus, CopyPolicy, Flags, Opcode, Request, ResultCode, Wire,
};
use tempfile::TempDir;

use crate::binaries;
use crate::client::Client;
use crate::corosync::Corosync;
use crate::disk::set_size;
use crate::hosts::{Hosts, Nic};
use crate::node::{Node, Output};
use crate::ports::Ports;
use crate::private_disk::PrivateDisk;
use crate::wait::{DEADLINE, wait, wait_for};
use crate::zookeeper::ZooKeeper;

/// Session timeout in milliseconds for tests that do not ask for ZooKeeper by themselves. A daemon gives up a server that
/// is silent for so long when it starts, and on a busy machine the server is; a death is noticed when it has passed.
const SESSION: u64 = 6000;

/// How a cluster is made. [`Builder::start`] starts it.
pub struct Builder {
    nodes: usize,
    gateways: Vec<usize>,
    zones: Option<Vec<u32>>,
    ports: Option<Vec<u16>>,
    disks: usize,
    disk_size: Option<u64>,
    private_disk: bool,
    args: Vec<String>,
    node_args: Vec<(usize, String)>,
    format: Option<ClusterRequest>,
    store: String,
    driver: TestDriver,
    servers: usize,
    hosts: bool,
}

/// How the nodes of a test find each other.
#[derive(Clone, Copy)]
enum TestDriver {
    Local,
    /// Over a server of the cluster's own, with this session timeout in milliseconds.
    ZooKeeper(u64),
    /// Over a corosync of the cluster's own, in the test's network namespace or on each host.
    Corosync,
}

impl TestDriver {
    /// What `SHEEPDOG_TEST_DRIVER` asks for.
    fn from_env() -> TestDriver {
        match std::env::var("SHEEPDOG_TEST_DRIVER").as_deref() {
            Err(_) | Ok("local") => TestDriver::Local,
            Ok("zookeeper") => TestDriver::ZooKeeper(SESSION),
            Ok("corosync") => TestDriver::Corosync,
            Ok(other) => {
                panic!("SHEEPDOG_TEST_DRIVER={other}: the tests can use local, zookeeper and corosync")
            }
        }
    }
}

impl TestDriver {
    fn start(self, root: &Path, hosts: Option<&Hosts>, servers: usize) -> Engine {
        match self {
            TestDriver::Local => {
                let option = format!("local:{}", root.join("shm").display());
                Engine { option, zookeeper: None, corosync: None }
            }
            TestDriver::ZooKeeper(timeout) => {
                let address = if hosts.is_some() { "10.9.0.254" } else { "127.0.0.1" };
                let server = ZooKeeper::start_on(address, servers);
                let option = format!("zookeeper:{}/test,timeout={timeout}", server.hosts());
                Engine { option, zookeeper: Some(server), corosync: None }
            }
            TestDriver::Corosync => {
                let corosync = Some(hosts.map_or_else(Corosync::single, Hosts::corosync));
                Engine { option: "corosync".to_owned(), zookeeper: None, corosync }
            }
        }
    }
}

/// What daemons find each other by, for those who start them by themselves.
pub struct Engine {
    /// What follows `-c`.
    pub option: String,
    zookeeper: Option<ZooKeeper>,
    corosync: Option<Corosync>,
}

impl Engine {
    /// What `SHEEPDOG_TEST_DRIVER` asks for; the local driver's file is in `root`.
    pub fn from_env(root: &Path) -> Engine {
        TestDriver::from_env().start(root, None, 1)
    }
}

impl Builder {
    /// `nodes` daemons, each its own zone, automatic weights, formatted with 3 copies.
    pub fn new(nodes: usize) -> Builder {
        let format = ClusterRequest {
            copies: 3,
            flags: ClusterFlags::AUTO_VNODES,
            block_size_shift: 22,
            ..ClusterRequest::zeroed()
        };
        Builder {
            nodes,
            gateways: Vec::new(),
            zones: None,
            ports: None,
            disks: 0,
            disk_size: None,
            private_disk: false,
            args: Vec::new(),
            node_args: Vec::new(),
            format: Some(format),
            store: "plain".into(),
            driver: TestDriver::from_env(),
            servers: 1,
            hosts: false,
        }
    }

    /// Node `index` stores nothing (`-g`).
    pub fn gateway(mut self, index: usize) -> Builder {
        self.gateways.push(index);
        self
    }

    /// Zone of each node.
    pub fn zones(mut self, zones: &[u32]) -> Builder {
        self.zones = Some(zones.to_vec());
        self
    }

    /// Fixed ports, for captures; only inside [`crate::in_own_network`].
    pub fn ports(mut self, ports: &[u16]) -> Builder {
        self.ports = Some(ports.to_vec());
        self
    }

    /// Object directories per node besides the metadata directory.
    pub fn disks(mut self, disks: usize) -> Builder {
        self.disks = disks;
        self
    }

    /// Bytes of space that each of these directories counts for; default: what is free.
    pub fn disk_size(mut self, bytes: u64) -> Builder {
        self.disk_size = Some(bytes);
        self
    }

    /// On a file system that nobody else fills, so that REWEIGHT finds nothing to announce. Only inside
    /// [`crate::in_own_mounts`] or [`crate::in_own_network`].
    pub fn private_disk(mut self) -> Builder {
        self.private_disk = true;
        self
    }

    /// A further argument of every sheep. `{i}` stands for the node's number, `{dir}` for the cluster's directory.
    pub fn arg(mut self, arg: &str) -> Builder {
        self.args.push(arg.into());
        self
    }

    /// A further argument of one sheep, with the same placeholders.
    pub fn node_arg(mut self, index: usize, arg: &str) -> Builder {
        self.node_args.push((index, arg.into()));
        self
    }

    /// Default copies.
    pub fn copies(mut self, copies: u8) -> Builder {
        self.edit_format(|f| f.copies = copies);
        self
    }

    /// Default redundancy by erasure code.
    pub fn erasure(mut self, data: u8, parity: u8) -> Builder {
        let policy = CopyPolicy::erasure(data, parity).expect("a valid policy");
        self.edit_format(|f| (f.copies, f.copy_policy) = (policy.strips(), policy.to_byte()));
        self
    }

    /// Cluster flags, instead of automatic weights alone.
    pub fn flags(mut self, flags: ClusterFlags) -> Builder {
        self.edit_format(|f| f.flags = flags);
        self
    }

    /// log2 of the default block size.
    pub fn block_size_shift(mut self, shift: u8) -> Builder {
        self.edit_format(|f| f.block_size_shift = shift);
        self
    }

    /// Use the local driver, whatever `SHEEPDOG_TEST_DRIVER` says.
    pub fn local(mut self) -> Builder {
        self.driver = TestDriver::Local;
        self
    }

    /// Use a ZooKeeper server of the cluster's own, whatever `SHEEPDOG_TEST_DRIVER` says; the session timeout in
    /// milliseconds.
    pub fn zookeeper(mut self, timeout: u64) -> Builder {
        self.driver = TestDriver::ZooKeeper(timeout);
        self
    }

    /// As many ZooKeeper servers, 1 or 3.
    pub fn servers(mut self, count: usize) -> Builder {
        self.servers = count;
        self
    }

    /// Use a corosync of the cluster's own, whatever `SHEEPDOG_TEST_DRIVER` says; inside [`crate::in_own_network`].
    pub fn corosync(mut self) -> Builder {
        self.driver = TestDriver::Corosync;
        self
    }

    /// Each node runs on a host of its own and has an I/O interface; inside [`crate::in_own_network`], over ZooKeeper
    /// (the server is beside the test, not on a host) or corosync.
    pub fn on_hosts(mut self) -> Builder {
        self.hosts = true;
        self
    }

    /// Formats with this store driver; default `plain`.
    pub fn store(mut self, name: &str) -> Builder {
        self.store = name.into();
        self
    }

    /// Do not format.
    pub fn unformatted(mut self) -> Builder {
        self.format = None;
        self
    }

    fn edit_format(&mut self, edit: impl FnOnce(&mut ClusterRequest)) {
        edit(self.format.as_mut().expect("format options come before unformatted()"));
    }

    /// Starts the daemons, waits until all see each other, formats, and waits until all serve.
    pub fn start(self) -> Cluster {
        let root =
            tempfile::Builder::new().prefix("sheepdog-test-").tempdir().expect("a temporary directory");
        let disk = self.private_disk.then(|| PrivateDisk::mount(root.path()));
        // Two behind the nodes' for `spare_port`, one for the I/O address of the last node.
        let reserved = self.ports.is_none().then(|| Ports::reserve_many(self.nodes + 3));
        let hosts = self.hosts.then(|| Hosts::new(self.nodes));
        let Engine { option: driver, zookeeper, corosync } =
            self.driver.start(root.path(), hosts.as_ref(), self.servers);
        let mut nodes = Vec::new();
        for index in 0..self.nodes {
            let port = match (&reserved, &self.ports) {
                (Some(block), _) => block.get(index),
                (None, Some(fixed)) => fixed[index],
                (None, None) => unreachable!("ports are reserved or given"),
            };
            nodes.push(self.node(root.path(), &driver, index, port, hosts.as_ref()));
        }
        let mut cluster = Cluster {
            nodes,
            driver,
            _disk: disk,
            root: Some(root),
            reserved,
            zookeeper,
            corosync,
            hosts,
            keep: false,
        };
        for i in 0..self.nodes {
            cluster.start(i);
        }
        cluster.wait_members(self.nodes);
        if let Some(format) = self.format {
            cluster.format(format, &self.store);
            cluster.wait_running();
        }
        cluster
    }

    fn node(&self, root: &Path, driver: &str, index: usize, port: u16, hosts: Option<&Hosts>) -> Node {
        let dir = root.join(format!("n{index}"));
        let zone = self.zones.as_ref().map_or(index as u32, |z| z[index]);
        let gateway = self.gateways.contains(&index);
        let disks: Vec<PathBuf> = (0..self.disks).map(|d| root.join(format!("n{index}-d{d}"))).collect();
        for disk in &disks {
            std::fs::create_dir_all(disk).unwrap_or_else(|e| panic!("{}: {e}", disk.display()));
            if let Some(bytes) = self.disk_size {
                set_size(disk, bytes);
            }
        }
        let address = hosts.map_or_else(|| "127.0.0.1".to_owned(), |h| h.address(index, Nic::Cluster));
        let inside = hosts.map_or_else(Vec::new, |h| h.inside(index));
        let mut args: Vec<String> =
            ["-f", "-b", &address, "-y", &address].iter().map(|s| s.to_string()).collect();
        if let Some(hosts) = hosts {
            args.push("-i".into());
            args.push(format!("host={},port={}", hosts.address(index, Nic::Io), port + 1));
        }
        args.push("-c".into());
        args.push(driver.to_owned());
        args.extend(["-p".into(), port.to_string(), "-z".into(), zone.to_string()]);
        if gateway {
            args.push("-g".into());
        }
        let own = self.node_args.iter().filter(|(i, _)| *i == index).map(|(_, a)| a);
        for arg in self.args.iter().chain(own) {
            args.push(arg.replace("{i}", &index.to_string()).replace("{dir}", &root.display().to_string()));
        }
        let paths: Vec<String> =
            std::iter::once(&dir).chain(&disks).map(|p| p.display().to_string()).collect();
        args.push(paths.join(","));
        Node { index, address, inside, port, zone, dir, disks, gateway, args, child: None, exit: None }
    }
}

/// A running cluster. Dropping it kills its processes and removes its directory.
pub struct Cluster {
    /// The daemons.
    pub nodes: Vec<Node>,
    /// What the daemons have behind `-c`.
    pub driver: String,
    /// Lies over `root`, therefore goes first.
    _disk: Option<PrivateDisk>,
    root: Option<TempDir>,
    reserved: Option<Ports>,
    /// The server of a cluster over ZooKeeper.
    pub zookeeper: Option<ZooKeeper>,
    /// The daemons of a cluster over corosync.
    pub corosync: Option<Corosync>,
    /// The hosts of [`Builder::on_hosts`].
    pub hosts: Option<Hosts>,
    keep: bool,
}

impl Cluster {
    /// [`Builder::new`]`(nodes).start()`.
    pub fn new(nodes: usize) -> Cluster {
        Builder::new(nodes).start()
    }

    /// The directory that holds everything.
    pub fn dir(&self) -> &Path {
        self.root.as_ref().expect("the directory lives as long as the cluster").path()
    }

    /// A port of the cluster's block that no node uses, counted from 0.
    pub fn spare_port(&self, index: usize) -> u16 {
        let ports = self.reserved.as_ref().expect("spare ports exist unless ports were given");
        ports.get(ports.count() - 1 - index)
    }

    /// Starts a node and waits until it listens; it may not be a member yet.
    pub fn start(&mut self, index: usize) {
        self.nodes[index].spawn();
        self.nodes[index].wait_listening();
    }

    /// Starts a node whose process is expected to end by itself.
    pub fn spawn(&mut self, index: usize) {
        self.nodes[index].spawn();
    }

    /// SIGTERM; waits for the end and gives the exit status.
    pub fn stop(&mut self, index: usize) -> Option<i32> {
        self.nodes[index].signal(Signal::SIGTERM);
        self.nodes[index].wait_exit(DEADLINE).code()
    }

    /// SIGKILL; the process is reaped on return.
    pub fn kill9(&mut self, index: usize) {
        self.nodes[index].kill9();
    }

    /// SIGKILL for every running node, all before any is reaped.
    pub fn kill9_all(&mut self) {
        for node in self.nodes.iter_mut().filter(|n| n.child.is_some()) {
            node.signal(Signal::SIGKILL);
        }
        self.nodes.iter_mut().for_each(Node::kill9);
    }

    /// Starts a stopped or killed node again.
    pub fn restart(&mut self, index: usize) {
        self.nodes[index].kill9();
        self.start(index);
    }

    /// Freezes a node.
    pub fn sigstop(&mut self, index: usize) {
        self.nodes[index].signal(Signal::SIGSTOP);
    }

    /// Lets a frozen node go on.
    pub fn sigcont(&mut self, index: usize) {
        self.nodes[index].signal(Signal::SIGCONT);
    }

    /// Numbers of the running nodes.
    pub fn running(&mut self) -> Vec<usize> {
        (0..self.nodes.len()).filter(|i| self.nodes[*i].is_running()).collect()
    }

    /// A connection to the first running node.
    pub fn client(&mut self) -> Client {
        let first = *self.running().first().expect("a node runs");
        self.nodes[first].client()
    }

    /// MAKE_FS through the first running node; all nodes that answer have followed.
    pub fn format(&mut self, mut format: ClusterRequest, store: &str) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970");
        format.ctime = now.as_secs() << 32 | u64::from(now.subsec_micros() * 1000);
        let name = [store.as_bytes(), &[0]].concat();
        let request =
            Request::new(Opcode::MAKE_FS).flag(Flags::WRITE).with_cluster(format).length(name.len());
        let (response, _) = self.client().must(request, &name);
        assert_eq!(response.result, ResultCode::SUCCESS, "format");
        let followed = |index| self.info(index).is_none_or(|info| info.header.ctime == format.ctime);
        wait("the new cluster on all nodes", || (0..self.nodes.len()).all(followed));
    }

    /// What a node says about its cluster; none if it does not answer.
    pub fn info(&self, index: usize) -> Option<ClusterInfo> {
        let mut client = self.nodes[index].connect().ok()?;
        client.set_timeout(Duration::from_secs(5)).ok()?;
        let request = Request::new(Opcode::CLUSTER_INFO).length(CLUSTER_INFO_LEN);
        let (response, payload) = client.call(request, &[]).ok()?;
        response.result.ok().ok()?;
        ClusterInfo::decode(&payload).ok()
    }

    /// Epoch of a node as every answer's header states it; none if it does not answer.
    pub fn epoch(&self, index: usize) -> Option<u32> {
        let mut client = self.nodes[index].connect().ok()?;
        client.set_timeout(Duration::from_secs(5)).ok()?;
        let (response, _) = client.call(Request::new(Opcode::GET_CLUSTER_DEFAULT), &[]).ok()?;
        Some(response.epoch.0)
    }

    /// Members that a node sees, by GET_NODE_LIST.
    pub fn members(&self, index: usize) -> Vec<sheepdog_proto::NodeRecord> {
        let Ok(mut client) = self.nodes[index].connect() else { return Vec::new() };
        let request = Request::new(Opcode::GET_NODE_LIST).length(sheepdog_proto::MAX_NODES * 80);
        client.call(request, &[]).map_or(Vec::new(), |(_, list)| sheepdog_proto::node::decode_nodes(&list))
    }

    /// Waits until every running node sees `count` members.
    pub fn wait_members(&mut self, count: usize) {
        let running = self.running();
        wait(&format!("{count} members everywhere"), || {
            running.iter().all(|i| self.members(*i).len() == count)
        });
    }

    fn status(&self, index: usize) -> Option<ClusterStatus> {
        ClusterStatus::from_byte(self.info(index)?.header.status).ok()
    }

    /// Waits until every running node serves, at one epoch whose members are the running nodes.
    pub fn wait_running(&mut self) {
        let running = self.running();
        wait("every running node to serve at one epoch", || {
            let infos: Vec<_> = running.iter().filter_map(|i| self.info(*i)).collect();
            infos.len() == running.len()
                && infos.iter().all(|c| {
                    c.header.status == ClusterStatus::Ok as u8
                        && c.nodes.len() == running.len()
                        && c.header.epoch == infos[0].header.epoch
                })
        });
    }

    /// Waits until a node has a status.
    pub fn wait_status(&mut self, index: usize, status: ClusterStatus) {
        wait(&format!("node {index} in status {status:?}"), || self.status(index) == Some(status));
    }

    /// Waits until every running node is at exactly `epoch`.
    pub fn wait_epoch(&mut self, epoch: u32) {
        let running = self.running();
        wait(&format!("epoch {epoch} everywhere"), || running.iter().all(|i| self.epoch(*i) == Some(epoch)));
    }

    /// What a node says about its recovery; none if it does not answer.
    pub fn recovery(&self, index: usize) -> Option<RecoveryState> {
        let mut client = self.nodes[index].connect().ok()?;
        let request = Request::new(Opcode::STAT_RECOVERY).length(RecoveryState::LEN);
        let (response, payload) = client.call(request, &[]).ok()?;
        response.result.ok().ok()?;
        RecoveryState::decode(&payload).ok()
    }

    fn is_recovering(&self, index: usize) -> bool {
        self.recovery(index).is_none_or(|s| s.in_recovery != 0)
    }

    /// Waits until a running node has logged that everybody has everything at the present epoch.
    pub fn wait_gathered(&mut self) {
        self.wait_recovered();
        let first = *self.running().first().expect("a node runs");
        let epoch = self.epoch(first).expect("it answers");
        let line = format!("all nodes are recovered, epoch {epoch}\n");
        wait(&line, || self.nodes[first].log().contains(&line));
    }

    /// Deletes everything that a stopped node has, as if its machine was replaced.
    pub fn wipe(&mut self, index: usize) {
        let node = &self.nodes[index];
        assert!(node.child.is_none(), "node {index} runs");
        std::fs::remove_dir_all(&node.dir).unwrap_or_else(|e| panic!("{}: {e}", node.dir.display()));
        for disk in &node.disks {
            std::fs::remove_dir_all(disk).unwrap_or_else(|e| panic!("{}: {e}", disk.display()));
            std::fs::create_dir(disk).unwrap_or_else(|e| panic!("{}: {e}", disk.display()));
        }
    }

    /// Waits until all running nodes serve and none recovers, seen twice in a row at the same epoch.
    pub fn wait_recovered(&mut self) {
        self.wait_running();
        let running = self.running();
        let mut before = None;
        wait_for("recovery to end", DEADLINE * 4, || {
            let epochs: Vec<_> = running.iter().map(|i| self.epoch(*i)).collect();
            let idle = epochs.iter().all(|e| e.is_some() && *e == epochs[0])
                && running.iter().all(|i| !self.is_recovering(*i));
            let quiet_twice = idle && before == Some(epochs.clone());
            before = idle.then_some(epochs);
            quiet_twice.then_some(())
        });
    }

    /// Runs `dog` against a node.
    pub fn dog_at(&self, index: usize, args: &[&str], stdin: &[u8]) -> Output {
        let port = self.nodes[index].port.to_string();
        let mut child = Command::new(binaries::dog())
            .args(args)
            .args(["-a", &self.nodes[index].address, "-p", &port])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("dog: {e}"));
        let mut input = child.stdin.take().expect("piped");
        let bytes = stdin.to_vec();
        let feeder = std::thread::spawn(move || drop(input.write_all(&bytes)));
        let output = child.wait_with_output().unwrap_or_else(|e| panic!("dog: {e}"));
        feeder.join().expect("writing to a pipe does not panic");
        Output::of(output)
    }

    /// Runs `dog` against the first running node.
    pub fn dog(&mut self, args: &[&str]) -> Output {
        self.dog_in(args, &[])
    }

    /// Runs `dog` against the first running node with something on its standard input.
    pub fn dog_in(&mut self, args: &[&str], stdin: &[u8]) -> Output {
        let first = *self.running().first().expect("a node runs");
        self.dog_at(first, args, stdin)
    }

    /// Keeps the directory after the test.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    fn report(&self) {
        for node in &self.nodes {
            eprintln!("---- node {} ({}), last lines of its log\n{}", node.index, node.port, node.tail(40));
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.nodes.iter_mut().for_each(Node::kill9);
        let failed = std::thread::panicking();
        let panicked: Vec<usize> = self.nodes.iter().filter(|n| n.has_panicked()).map(|n| n.index).collect();
        if failed || !panicked.is_empty() {
            self.report();
        }
        if (failed || !panicked.is_empty() || self.keep)
            && let Some(root) = self.root.take()
        {
            eprintln!("kept: {}", root.keep().display());
        }
        assert!(failed || panicked.is_empty(), "nodes {panicked:?} panicked");
    }
}
