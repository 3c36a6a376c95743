//! The same over each cluster driver: what `dog` shows and does, restarts in any order, and how a daemon that cannot
//! be a member ends. What only one driver has is in [`crate::zookeeper`] and [`crate::hosts`].

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use sheepdog_proto::{ClusterFlags, Opcode, Request};
use sheepdog_testkit::wait::DEADLINE;
use sheepdog_testkit::{Builder, Client, Cluster, Ports, Vdi, binaries, in_own_network, wait, wait_for};

const TIMEOUT: u64 = 2000;
const WEIGHT: u16 = 100;
const WAITING: &str = "Cluster status: Waiting for other nodes to join cluster\n";
const RUNNING: &str = "Cluster status: running, auto-recovery enabled\n";

#[test]
fn dog_and_restarts_over_the_local_driver() {
    dog_and_restarts(Builder::new(3).local());
}

#[test]
fn dog_and_restarts_over_zookeeper() {
    dog_and_restarts(Builder::new(3).zookeeper(TIMEOUT));
}

#[test]
fn dog_and_restarts_over_corosync() {
    if !in_own_network("drivers::dog_and_restarts_over_corosync") {
        dog_and_restarts(Builder::new(3).corosync());
    }
}

#[test]
fn a_node_is_lost_and_regained_over_zookeeper() {
    lost_and_regained(Builder::new(3).zookeeper(TIMEOUT));
}

#[test]
fn a_node_is_lost_and_regained_over_corosync() {
    if !in_own_network("drivers::a_node_is_lost_and_regained_over_corosync") {
        lost_and_regained(Builder::new(3).corosync());
    }
}

#[test]
fn the_address_of_a_member_is_refused_by_the_local_driver() {
    let cluster = Builder::new(2).copies(2).local().start();
    let pid = cluster.nodes[1].pid().expect("it runs");
    address_is_refused(cluster, |who| format!("{who} is already a member of the cluster (pid {pid})"));
}

#[test]
fn the_address_of_a_member_is_refused_over_zookeeper() {
    let cluster = Builder::new(2).copies(2).zookeeper(TIMEOUT).start();
    address_is_refused(cluster, |_| "Previous zookeeper session exist, shoot myself.".to_owned());
}

#[test]
fn the_address_of_a_member_is_refused_over_corosync() {
    if in_own_network("drivers::the_address_of_a_member_is_refused_over_corosync") {
        return;
    }
    let cluster = Builder::new(2).copies(2).corosync().start();
    let pid = cluster.nodes[1].pid().expect("it runs");
    address_is_refused(cluster, |who| {
        format!("{who} is already a member of the cluster (corosync node 1, pid {pid})")
    });
}

#[test]
fn a_store_of_another_cluster_id_is_refused_over_zookeeper_and_serves_under_its_own() {
    let mut cluster = Builder::new(2).copies(2).zookeeper(TIMEOUT).start();
    let own = cluster.driver.replace("/test,", "/other,");
    assert_ne!(own, cluster.driver);
    let port = cluster.spare_port(0);
    let store = cluster.dir().join("other");
    let start = |driver: &str| Daemon::start(&["-c", driver, "-p", &port.to_string()], &store);

    let mut daemon = start(&own);
    wait("the other cluster's node", || daemon.dog(port, &["cluster", "info"]).contains("formatted"));
    daemon.dog(port, &["cluster", "format", "-c", "1"]);
    wait("the other cluster serves", || daemon.dog(port, &["cluster", "info"]).starts_with(RUNNING));
    daemon.dog(port, &["cluster", "shutdown"]);
    assert_eq!(daemon.wait_exit(), Some(0));

    let mut daemon = start(&cluster.driver);
    assert_eq!(daemon.wait_exit(), Some(1));
    let log = std::fs::read_to_string(store.join("sheep.log")).expect("a log");
    let lines = log.lines().filter(|l| l.contains("joining node ctime doesn't match: ")).count();
    assert_eq!(lines, 1, "{log}");
    wait("only the two to remain", || cluster.members(0).len() == 2);
    cluster.wait_epoch(1);

    let mut daemon = start(&own);
    wait("the other cluster serves again", || daemon.dog(port, &["cluster", "info"]).starts_with(RUNNING));
    assert_eq!(daemon.dog(port, &["node", "list", "-r"]).lines().count(), 1);
}

/// It waits for the end of its predecessor's session, which is far away.
#[test]
fn a_daemon_that_waits_to_join_ends_when_told() {
    let mut cluster = Builder::new(3).copies(2).zookeeper(60_000).start();
    let port = cluster.nodes[2].port;
    cluster.kill9(2);
    let store = cluster.dir().join("successor");
    let pidfile = cluster.dir().join("pid");
    let (port_text, pidfile_text) = (port.to_string(), pidfile.display().to_string());
    let args = ["-c", &cluster.driver, "-p", &port_text, "--pidfile", &pidfile_text];
    let log = || std::fs::read_to_string(store.join("sheep.log")).unwrap_or_default();
    for by_signal in [true, false] {
        let begin = log().len();
        let mut daemon = Daemon::start(&args, &store);
        wait("it waits", || log()[begin..].contains("is still registered by an earlier session"));
        if by_signal {
            daemon.terminate();
        } else {
            let kill = Request::new(Opcode::KILL_NODE);
            assert!(Client::connect(port).expect("it listens").must(kill, &[]).0.result.is_ok());
        }
        assert_eq!(daemon.wait_exit(), Some(0), "{}", log());
        assert!(!pidfile.exists());
        let errors = log().lines().filter(|l| l.contains("ERROR") && !l.contains("nofile")).count();
        assert_eq!(errors, 0, "{}", log());
    }
    assert_eq!(cluster.members(0).len(), 3, "the dead node's session is not over");
}

#[test]
fn a_driver_that_cannot_be_used_is_one_line_on_stderr_and_in_the_log_and_status_1() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(file("garbage"), b"no queue").expect("a file");
    let ports = Ports::reserve();
    let (closed, silent) = (ports.get(1), ports.get(2));
    // Connections are made, and nothing ever answers.
    let _listener = TcpListener::bind(("127.0.0.1", silent)).expect("a free port");
    let unreachable = |host: &str| format!("failed to connect to zk server {host} after 10 retries");
    let bad = |driver: &str, reason: &str| format!("invalid option of cluster driver '{driver}': {reason}");
    let table = [
        ("zookeeper".to_owned(), "You must specify zookeeper servers.".to_owned()),
        (format!("zookeeper:127.0.0.1:{closed}/x,timeout=1000"), unreachable(&format!("127.0.0.1:{closed}"))),
        (format!("zookeeper:127.0.0.1:{silent}/x,timeout=1000"), unreachable(&format!("127.0.0.1:{silent}"))),
        (
            "zookeeper:no-such-host.invalid:2181,timeout=1000".to_owned(),
            unreachable("no-such-host.invalid:2181"),
        ),
        ("zookeeper:127.0.0.1:2181,timeout=abc".to_owned(), "Invalid parameter for timeout".to_owned()),
        ("zookeeper:127.0.0.1:99999".to_owned(), bad("zookeeper", "'127.0.0.1:99999' has no usable port")),
        ("local:".to_owned(), bad("local", "the path of the queue file is empty")),
        (
            format!("local:{}", file("no/such")),
            format!("cannot open {}: No such file or directory (os error 2)", file("no/such")),
        ),
        (format!("local:{}", file("")), format!("cannot open {}: Is a directory (os error 21)", file(""))),
        (
            format!("local:{}", file("garbage")),
            format!(
                "{}: not a usable event queue: length 8 instead of 221304016 (remove the file if no sheep uses it)",
                file("garbage")
            ),
        ),
    ];
    for (number, (driver, line)) in table.iter().enumerate() {
        // In the foreground, and as a daemon whose parent tells.
        for words in [&["-f"][..], &[]] {
            let store = dir.path().join(format!("store-{number}-{}", words.len()));
            cannot_start(driver, words, ports.get(0), &store, line);
        }
    }
}

#[test]
fn without_corosync_a_start_is_one_line_on_stderr_and_in_the_log_and_status_1() {
    if in_own_network("drivers::without_corosync_a_start_is_one_line_on_stderr_and_in_the_log_and_status_1") {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let line = "failed to initialize cpg (2) - is corosync running?";
    let port = Ports::reserve().get(0);
    cannot_start("corosync", &["-f"], port, &dir.path().join("foreground"), line);
    cannot_start("corosync", &[], port, &dir.path().join("daemon"), line);
}

/// A start with this driver ends with status 1, and with `line` once on standard error and once in the log.
fn cannot_start(driver: &str, words: &[&str], port: u16, store: &Path, line: &str) {
    let mut child = Command::new(binaries::sheep())
        .args(["-b", "127.0.0.1", "-y", "127.0.0.1", "-c", driver, "-p", &port.to_string()])
        .args(words)
        .arg(store)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("sheep");
    let status = wait_for(&format!("{driver} {words:?} to be refused"), DEADLINE, || {
        child.try_wait().expect("a child can be waited for")
    });
    let output = child.wait_with_output().expect("its output");
    let log = std::fs::read_to_string(store.join("sheep.log")).expect("a log");
    for text in [String::from_utf8_lossy(&output.stderr).as_ref(), &log] {
        let errors: Vec<&str> = text
            .lines()
            .filter(|l| l.contains("ERROR") && !l.contains("nofile"))
            .map(|l| l.split_once(") ").map_or(l, |(_, message)| message))
            .collect();
        assert_eq!(errors, [line, "failed to create sheepdog cluster"], "{driver} {words:?}\n{text}");
    }
    assert_eq!(status.code(), Some(1), "{driver} {words:?}");
}

/// `cluster info`, `node list`, `node kill`, `cluster shutdown`, and starts in any order.
fn dog_and_restarts(builder: Builder) {
    let mut cluster =
        builder.arg("-V").arg(&WEIGHT.to_string()).flags(ClusterFlags::default()).copies(2).start();
    let mut epochs = vec![vec![0, 1, 2]];
    shows(&cluster, &[0, 1, 2], &epochs);

    let killed = cluster.dog_at(0, &["node", "kill", "1"], b"");
    assert_eq!((killed.stdout.as_str(), killed.stderr.as_str(), killed.code), ("", "", 0));
    assert_eq!(cluster.nodes[1].wait_exit(DEADLINE).code(), Some(0));
    cluster.wait_epoch(2);
    epochs.insert(0, vec![0, 2]);
    shows(&cluster, &[0, 2], &epochs);
    let absent = cluster.dog_at(0, &["node", "kill", "2"], b"");
    assert_eq!((absent.stderr.as_str(), absent.code == 0), ("Invalid node id '2'\n", false));

    cluster.start(1);
    cluster.wait_epoch(3);
    epochs.insert(0, vec![0, 1, 2]);
    shows(&cluster, &[0, 1, 2], &epochs);

    for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
        cluster.wait_recovered();
        let down = cluster.dog_at(order[0], &["cluster", "shutdown"], b"");
        assert_eq!((down.stdout.as_str(), down.stderr.as_str(), down.code), ("", "", 0));
        for node in order {
            assert_eq!(cluster.nodes[node].wait_exit(DEADLINE).code(), Some(0), "{order:?}, node {node}");
        }
        for (started, node) in order.into_iter().enumerate() {
            if started > 0 {
                let first = order[0];
                wait("those that are there wait for the others", || {
                    cluster.dog_at(first, &["cluster", "info"], b"").stdout.starts_with(WAITING)
                });
            }
            cluster.start(node);
        }
        cluster.wait_running();
        shows(&cluster, &[0, 1, 2], &epochs);
    }
}

/// Every node in `members` shows them, and the epochs, newest first.
fn shows(cluster: &Cluster, members: &[usize], epochs: &[Vec<usize>]) {
    let place = |node: usize| format!("127.0.0.1:{}", cluster.nodes[node].port);
    let mut list = "  Id   Host:Port         V-Nodes       Zone\n".to_owned();
    for (id, &node) in members.iter().enumerate() {
        list += &format!("{id:4}   {:<20}\t{WEIGHT:2}{:11}\n", place(node), cluster.nodes[node].zone);
    }
    let mut info = format!(
        "{RUNNING}\nCluster created at TIME\n\nEpoch Time           Version [Host:Port:V-Nodes,,,]\n"
    );
    for (age, nodes) in epochs.iter().enumerate() {
        let nodes: Vec<String> = nodes.iter().map(|&n| format!("{}:{WEIGHT}", place(n))).collect();
        info += &format!("TIME {:6} [{}]\n", epochs.len() - age, nodes.join(", "));
    }
    for &node in members {
        let dog = |words: &[&str]| cluster.dog_at(node, words, b"").ok();
        wait_for(&format!("node {node} shows epoch {}", epochs.len()), DEADLINE, || {
            (cluster.epoch(node) == Some(epochs.len() as u32)).then_some(())
        });
        assert_eq!(dog(&["node", "list"]), list, "node {node}");
        assert_eq!(without_times(&dog(&["cluster", "info"])), info, "node {node}");
    }
}

/// Output of `cluster info` with `TIME` for each time.
fn without_times(info: &str) -> String {
    const CREATED: &str = "Cluster created at ";
    const EPOCH: usize = "2024-01-02 09:55:16".len();
    let line = |line: &str| match line.as_bytes().first() {
        _ if line.starts_with(CREATED) => format!("{CREATED}TIME\n"),
        Some(digit) if digit.is_ascii_digit() => format!("TIME{}\n", &line[EPOCH..]),
        _ => format!("{line}\n"),
    };
    info.lines().map(line).collect()
}

/// Data survives the death and return of a node, and is on all homes afterwards.
fn lost_and_regained(builder: Builder) {
    let mut cluster = builder.start();
    let mut client = cluster.client();
    let vid = client.create_vdi("v", 64 << 20).expect("create");
    let data: Vec<u8> = (0..8 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    vdi.write(&mut client, 0, &data).expect("write");
    cluster.kill9(2);
    wait("the death is noticed", || cluster.members(0).len() == 2);
    cluster.restart(2);
    cluster.wait_members(3);
    cluster.wait_epoch(3);
    cluster.wait_recovered();
    for node in 0..3 {
        let mut client = cluster.nodes[node].client();
        let vdi = Vdi::open(&mut client, vid).expect("open");
        assert!(vdi.read(&mut client, 0, data.len()).expect("read") == data, "node {node}");
    }
    assert!(cluster.compare_replicas(3).missing.is_empty());
    // An orderly stop of one of two members leaves the other one alone.
    assert_eq!(cluster.stop(0), Some(0));
    cluster.wait_epoch(4);
    assert_eq!(cluster.stop(1), Some(0));
    wait("the last one goes on", || cluster.epoch(2) == Some(5));
}

/// A second daemon that advertises node 1's address ends with one line and status 1; the members notice nothing.
fn address_is_refused(mut cluster: Cluster, line: impl Fn(&str) -> String) {
    let port = cluster.nodes[1].port;
    let store = cluster.dir().join("second");
    let mut second = Daemon::start(
        &["-c", &cluster.driver, "-b", "127.0.0.2", "-y", "127.0.0.1", "-p", &port.to_string()],
        &store,
    );
    assert_eq!(second.wait_exit(), Some(1));
    let expected = line(&format!("IPv4 ip:127.0.0.1 port:{port}"));
    let log = std::fs::read_to_string(store.join("sheep.log")).expect("a log");
    assert_eq!(log.lines().filter(|l| l.contains(&expected)).count(), 1, "{expected}\n{log}");
    assert_eq!(cluster.members(0).len(), 2);
    cluster.wait_epoch(1);
    cluster.client().create_vdi("unharmed", 4 << 20).expect("create");
}

/// A daemon beside the cluster's own. Killed when dropped.
struct Daemon(Child);

impl Daemon {
    fn start(args: &[&str], store: &Path) -> Daemon {
        let address = if args.contains(&"-b") { &[][..] } else { &["-b", "127.0.0.1", "-y", "127.0.0.1"] };
        let mut command = Command::new(binaries::sheep());
        command.arg("-f").args(address).args(args).arg(store);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Daemon(command.spawn().expect("sheep"))
    }

    /// Standard output of `dog`, empty as long as the daemon does not listen.
    fn dog(&mut self, port: u16, words: &[&str]) -> String {
        assert!(self.0.try_wait().expect("a child can be waited for").is_none(), "the daemon ended");
        if Client::connect(port).is_err() {
            return String::new();
        }
        let output: Output = Command::new(binaries::dog())
            .args(words)
            .args(["-p", &port.to_string()])
            .stdin(Stdio::null())
            .output()
            .expect("dog");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// SIGTERM.
    fn terminate(&self) {
        let pid = nix::unistd::Pid::from_raw(self.0.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it runs");
    }

    fn wait_exit(&mut self) -> Option<i32> {
        wait_for("the end of the daemon", DEADLINE, || self.0.try_wait().expect("a child can be waited for"))
            .code()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
