//! Several real processes and Debian's ZooKeeper server.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sheepdog_testkit::ZooKeeper;

const PATIENCE: Duration = Duration::from_secs(60);
/// Session timeout of most tests, in milliseconds: long enough for a loaded machine.
const TIMEOUT: u64 = 4000;

/// One `cluster-member` process. Killed when dropped.
struct Member {
    child: Child,
    input: ChildStdin,
    log: Vec<(Instant, String)>,
}

/// Processes that use one cluster id.
struct Cluster {
    spec: String,
    members: HashMap<u16, Member>,
    lines: Receiver<(u16, u32, Instant, String)>,
    sender: Sender<(u16, u32, Instant, String)>,
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
    fn new(zookeeper: &ZooKeeper, id: &str, timeout: u64) -> Cluster {
        let (sender, lines) = channel();
        let spec = format!("zookeeper:{}/{id},timeout={timeout}", zookeeper.hosts());
        Cluster { spec, members: HashMap::new(), lines, sender }
    }

    fn of(zookeeper: &ZooKeeper, timeout: u64, ports: &[u16]) -> Cluster {
        let mut cluster = Cluster::new(zookeeper, "test", timeout);
        for port in ports {
            cluster.join(*port);
            for other in ports.iter().take_while(|p| *p <= port) {
                cluster.wait(*other, &format!("accept 127.0.0.1:{port} "));
            }
        }
        cluster
    }

    /// Starts a process, which gets the address of `port`; an old one of that port is forgotten.
    fn join(&mut self, port: u16) {
        let mut child = Command::new(env!("CARGO_BIN_EXE_cluster-member"))
            .args([&self.spec, "127.0.0.1", &port.to_string()])
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
        self.send(port, "join");
    }

    fn send(&mut self, port: u16, command: &str) {
        let member = self.members.get_mut(&port).expect("a started member");
        writeln!(member.input, "{command}").expect("the member lives");
    }

    fn signal(&self, port: u16, signal: Signal) {
        kill(Pid::from_raw(self.members[&port].child.id() as i32), signal).expect("the process exists");
    }

    /// SIGKILL.
    fn kill(&mut self, port: u16) {
        let mut member = self.members.remove(&port).expect("a started member");
        member.child.kill().expect("kill");
        member.child.wait().expect("wait");
    }

    /// Takes the next line of any process into its log.
    fn next(&mut self) -> (u16, String) {
        loop {
            let (port, pid, at, line) = self.lines.recv_timeout(PATIENCE).unwrap_or_else(|_| {
                let logs: Vec<_> = self.members.keys().map(|p| (p, self.log(*p))).collect();
                panic!("nothing happens any more; logs: {logs:#?}")
            });
            assert!(!line.starts_with("failed"), "{port}: {line}");
            if let Some(member) = self.members.get_mut(&port).filter(|m| m.child.id() == pid) {
                member.log.push((at, line.clone()));
                return (port, line);
            }
        }
    }

    fn log(&self, port: u16) -> Vec<&str> {
        self.members[&port].log.iter().map(|(_, l)| l.as_str()).collect()
    }

    fn count(&self, port: u16, start: &str) -> usize {
        self.log(port).iter().filter(|l| l.starts_with(start)).count()
    }

    /// Waits for the `n`th line that starts with `start`, which may have come before.
    fn wait_nth(&mut self, port: u16, start: &str, n: usize) -> (Instant, String) {
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

    fn wait(&mut self, port: u16, start: &str) -> String {
        self.wait_nth(port, start, 1).1
    }

    /// All members see everything that was written before: a message of each goes round.
    fn settle(&mut self, word: &str) {
        let ports: Vec<u16> = self.members.keys().copied().collect();
        for from in &ports {
            self.send(*from, &format!("notify {word}"));
            for to in &ports {
                self.wait(*to, &format!("notify 127.0.0.1:{from} {word}"));
            }
        }
    }

    /// What everybody sees alike: everything but questions and answers to requests.
    fn history(&self, port: u16) -> Vec<&str> {
        let common = ["accept ", "leave ", "notify ", "update "];
        self.log(port).into_iter().filter(|l| common.iter().any(|c| l.starts_with(c))).collect()
    }

    /// The histories are suffixes of the longest.
    fn assert_one_history(&self) {
        let mut histories: Vec<_> = self.members.keys().map(|p| self.history(*p)).collect();
        histories.sort_by_key(|h| std::cmp::Reverse(h.len()));
        for history in &histories {
            assert!(histories[0].ends_with(history), "{histories:#?}");
        }
    }
}

#[test]
fn joins_are_answered_once_and_accepted_in_the_same_order_everywhere() {
    let zookeeper = ZooKeeper::start(1);
    let mut cluster = Cluster::new(&zookeeper, "joins", TIMEOUT);
    let ports = [7003, 7001, 7002, 7004];
    // All at once, at an empty ensemble: the order is the queue's, whatever it is.
    for port in ports {
        cluster.join(port);
    }
    for port in ports {
        cluster.wait(port, &format!("accept 127.0.0.1:{port} "));
    }
    cluster.settle("end");
    cluster.assert_one_history();
    let longest = ports.iter().map(|p| cluster.history(*p)).max_by_key(Vec::len).expect("four");
    assert!(
        longest[3]
            .ends_with("members=127.0.0.1:7001,127.0.0.1:7002,127.0.0.1:7003,127.0.0.1:7004 version=10"),
        "{longest:#?}"
    );
    let asked: usize = ports.iter().map(|p| cluster.count(*p, "join ")).sum();
    assert_eq!(asked, 4, "each join is answered by the master alone");
    cluster.join(7005);
    cluster.wait(7005, "accept 127.0.0.1:7005 ");
    cluster.send(7005, "update 64");
    assert_eq!(cluster.wait(7001, "update"), "update 127.0.0.1:7005 vnodes=64 listed=64");
    cluster.send(7005, "hint");
    assert_eq!(cluster.wait(7005, "hint").matches(':').count(), 4, "the members before it joined");
}

#[test]
fn messages_of_all_senders_have_one_order_across_a_checkpoint() {
    const EACH: usize = 400;
    let ports = [7001, 7002, 7003];
    let zookeeper = ZooKeeper::start(1);
    let mut cluster = Cluster::of(&zookeeper, TIMEOUT, &ports);
    for i in 0..EACH {
        for port in ports {
            cluster.send(port, &format!("notify {i}"));
        }
    }
    for port in ports {
        cluster.wait_nth(port, "notify ", EACH * 3);
    }
    cluster.assert_one_history();
    for port in ports {
        let prefix = format!("notify 127.0.0.1:{port} ");
        let own: Vec<usize> =
            cluster.history(7001).iter().filter_map(|l| l.strip_prefix(&prefix)?.parse().ok()).collect();
        assert_eq!(own, (0..EACH).collect::<Vec<_>>(), "messages of one sender keep their order");
    }
}

#[test]
fn one_block_at_a_time_and_only_after_the_message_before() {
    const EACH: usize = 5;
    let ports = [7001, 7002, 7003];
    let zookeeper = ZooKeeper::start(1);
    let mut cluster = Cluster::of(&zookeeper, TIMEOUT, &ports);
    for _ in 0..EACH {
        for port in ports {
            cluster.send(port, "block");
        }
    }
    for round in 0..EACH * ports.len() {
        let holder = loop {
            let (port, line) = cluster.next();
            if line == "granted" {
                break port;
            }
        };
        if let Some(last) = round.checked_sub(1) {
            let end = format!(" done-{last}");
            assert!(
                cluster.log(holder).iter().any(|l| l.ends_with(&end)),
                "granted before {end} was handled"
            );
        }
        // Give a wrong second grant the time to show: a message goes round, and block events do not hold it up.
        let probe = ports[round % 3];
        cluster.send(probe, &format!("notify probe-{round}"));
        let probed = format!("notify 127.0.0.1:{probe} probe-{round}");
        while ports.iter().any(|p| !cluster.log(*p).contains(&probed.as_str())) {
            let (port, line) = cluster.next();
            assert_ne!(line, "granted", "{port} was granted while {holder} has the block");
        }
        cluster.send(holder, &format!("unblock done-{round}"));
    }
    cluster.settle("end");
    for port in ports {
        assert_eq!(cluster.count(port, "granted"), EACH);
    }
    cluster.send(7001, "unblock nothing");
    assert_eq!(cluster.wait(7001, "error"), "error unblock: the cluster is not blocked by this node");
}

#[test]
fn a_newcomer_waits_for_the_block_that_was_granted_before_it_joined() {
    let zookeeper = ZooKeeper::start(1);
    let mut cluster = Cluster::of(&zookeeper, TIMEOUT, &[7001]);
    cluster.send(7001, "block");
    cluster.wait(7001, "granted");
    cluster.join(7002);
    cluster.wait(7002, "accept 127.0.0.1:7002 ");
    cluster.send(7002, "block");
    cluster.settle("asked");
    assert_eq!(cluster.count(7002, "granted"), 0, "two blocks at a time");
    cluster.send(7001, "unblock over");
    cluster.wait(7002, "granted");
    assert!(cluster.log(7002).contains(&"notify 127.0.0.1:7001 over"));
}

#[test]
fn a_killed_master_is_replaced_and_its_block_released() {
    let zookeeper = ZooKeeper::start(1);
    let mut cluster = Cluster::of(&zookeeper, TIMEOUT, &[7001, 7002, 7003]);
    cluster.send(7001, "block");
    cluster.wait(7001, "granted");
    cluster.send(7002, "block");
    let begin = Instant::now();
    cluster.kill(7001);
    for port in [7002, 7003] {
        let (at, line) = cluster.wait_nth(port, "leave 127.0.0.1:7001 ", 1);
        assert_eq!(line, "leave 127.0.0.1:7001 members=127.0.0.1:7002,127.0.0.1:7003");
        println!("{port}: leave seen {:?} after SIGKILL, timeout {TIMEOUT} ms", at - begin);
    }
    cluster.wait(7002, "granted");
    cluster.send(7002, "unblock done");
    // The next number answers joins, also that of the dead master's successor under the same address.
    cluster.join(7001);
    cluster.wait(7001, "accept 127.0.0.1:7001 ");
    cluster.settle("end");
    cluster.assert_one_history();
    assert_eq!(cluster.count(7002, "join 127.0.0.1:7001 "), 1);
    for port in [7002, 7003] {
        assert_eq!(cluster.count(port, "leave "), 1, "duplicates are not delivered");
    }
}

#[test]
fn a_restart_within_the_timeout_waits_and_a_restart_after_leaving_does_not() {
    let zookeeper = ZooKeeper::start(1);
    let mut cluster = Cluster::of(&zookeeper, TIMEOUT, &[7001, 7002]);
    cluster.kill(7002);
    cluster.join(7002);
    cluster.wait(7001, "leave 127.0.0.1:7002 ");
    cluster.wait(7002, "accept 127.0.0.1:7002 ");
    cluster.settle("back");
    cluster.send(7002, "leave");
    cluster.wait_nth(7001, "leave 127.0.0.1:7002 ", 2);
    cluster.wait(7002, "leave 127.0.0.1:7002 ");
    // It goes on receiving until it ends.
    cluster.send(7001, "notify still");
    cluster.wait(7002, "notify 127.0.0.1:7001 still");
    cluster.send(7002, "hint");
    cluster.wait(7002, "hint");
    cluster.kill(7002);
    let begin = Instant::now();
    cluster.join(7002);
    let (at, _) = cluster.wait_nth(7002, "accept 127.0.0.1:7002 ", 1);
    println!("restart after leaving took {:?}", at - begin);
    assert!(at - begin < Duration::from_millis(TIMEOUT / 2), "{:?}", at - begin);
    cluster.settle("end");
    assert_eq!(cluster.count(7001, "leave "), 2);
}

#[test]
fn a_second_process_with_the_address_of_a_living_one_is_refused() {
    let zookeeper = ZooKeeper::start(1);
    let mut cluster = Cluster::of(&zookeeper, 1000, &[7001]);
    let mut other = Cluster::new(&zookeeper, "test", 1000);
    other.join(7001);
    assert_eq!(
        other.wait(7001, "error join"),
        "error join: Previous zookeeper session exist, shoot myself. Please wait for 1 seconds to join me again."
    );
    cluster.settle("unharmed");
}

#[test]
fn a_process_stopped_past_the_timeout_rejoins_and_is_suspended_until_then() {
    let zookeeper = ZooKeeper::start(1);
    let mut cluster = Cluster::of(&zookeeper, TIMEOUT, &[7001, 7002, 7003]);
    cluster.signal(7001, Signal::SIGSTOP);
    cluster.wait(7002, "leave 127.0.0.1:7001 ");
    cluster.wait(7003, "leave 127.0.0.1:7001 ");
    cluster.send(7002, "notify without");
    cluster.wait(7003, "notify 127.0.0.1:7002 without");
    cluster.signal(7001, Signal::SIGCONT);
    cluster.wait(7001, "reconnect");
    for port in [7001, 7002, 7003] {
        cluster.wait_nth(
            port,
            "accept 127.0.0.1:7001 members=127.0.0.1:7001,127.0.0.1:7002,127.0.0.1:7003",
            1,
        );
    }
    cluster.wait_nth(7001, "accept 127.0.0.1:7001 ", 2);
    cluster.settle("end");
    let log = cluster.log(7001);
    let at = |start: &str| log.iter().position(|l| l.starts_with(start));
    assert!(at("suspended true") < at("reconnect"), "{log:#?}");
    assert!(at("suspended true").is_some(), "{log:#?}");
    assert!(!log.iter().any(|l| l.ends_with(" without")), "nothing between the two memberships: {log:#?}");
    assert_eq!(cluster.count(7002, "leave "), 1);
}

#[test]
fn an_unreachable_ensemble_suspends_and_resumes_without_a_leave() {
    let mut zookeeper = ZooKeeper::start(1);
    let mut cluster = Cluster::of(&zookeeper, 2000, &[7001, 7002]);
    let begin = Instant::now();
    zookeeper.kill_all();
    cluster.send(7001, "notify late");
    let (at, _) = cluster.wait_nth(7001, "suspended true", 1);
    println!("suspended {:?} after the servers died, timeout 2000 ms", at - begin);
    assert!(at - begin < Duration::from_millis(2000), "before the session could have expired");
    // Longer than the library keeps a session without servers.
    let back = begin + Duration::from_millis(4000);
    std::thread::sleep(back.saturating_duration_since(Instant::now()));
    zookeeper.start_all();
    for port in [7001, 7002] {
        cluster.wait(port, "suspended false");
        cluster.wait(port, "notify 127.0.0.1:7001 late");
    }
    cluster.settle("end");
    cluster.assert_one_history();
    for port in [7001, 7002] {
        assert_eq!(cluster.count(port, "reconnect") + cluster.count(port, "leave"), 0);
        assert_eq!(cluster.count(port, "notify 127.0.0.1:7001 late"), 1, "written once");
    }
}

#[test]
fn an_ensemble_of_three_survives_its_leader_and_a_complete_restart() {
    let mut zookeeper = ZooKeeper::start(3);
    let mut cluster = Cluster::of(&zookeeper, TIMEOUT, &[7001, 7002, 7003]);
    zookeeper.kill(zookeeper.leader());
    for i in 0..20 {
        for port in [7001, 7002, 7003] {
            cluster.send(port, &format!("notify n{i}"));
        }
    }
    for port in [7001, 7002, 7003] {
        cluster.wait_nth(port, "notify ", 60);
    }
    zookeeper.start_all();
    zookeeper.kill_all();
    cluster.send(7002, "notify gap");
    zookeeper.start_all();
    for port in [7001, 7002, 7003] {
        cluster.wait(port, "notify 127.0.0.1:7002 gap");
    }
    cluster.settle("end");
    cluster.assert_one_history();
    let notifies = |c: &Cluster| c.history(7001).iter().filter(|l| l.starts_with("notify")).count();
    assert_eq!(notifies(&cluster), 64, "every message once");
    assert_eq!(cluster.count(7001, "leave "), 0);
}

#[test]
fn two_clusters_share_an_ensemble_without_seeing_each_other() {
    let zookeeper = ZooKeeper::start(1);
    let mut one = Cluster::new(&zookeeper, "one", TIMEOUT);
    let mut two = Cluster::new(&zookeeper, "deep/two", TIMEOUT);
    one.join(7001);
    two.join(7001);
    for cluster in [&mut one, &mut two] {
        let line = cluster.wait(7001, "accept 127.0.0.1:7001 ");
        assert_eq!(line, "accept 127.0.0.1:7001 members=127.0.0.1:7001 version=10");
    }
    one.send(7001, "notify secret");
    one.wait(7001, "notify 127.0.0.1:7001 secret");
    two.settle("end");
    assert_eq!(two.count(7001, "notify"), 1);
}

#[test]
fn the_last_of_dead_members_answers_a_waiting_join() {
    let zookeeper = ZooKeeper::start(1);
    let mut cluster = Cluster::of(&zookeeper, TIMEOUT, &[7001, 7002, 7003]);
    // The master cannot answer: it is stopped, and dies.
    cluster.signal(7001, Signal::SIGSTOP);
    cluster.join(7004);
    cluster.kill(7003);
    cluster.kill(7001);
    cluster.wait(7002, "accept 127.0.0.1:7004 ");
    cluster.wait(7002, "leave 127.0.0.1:7001 ");
    cluster.wait(7002, "leave 127.0.0.1:7003 ");
    cluster.wait(7004, "accept 127.0.0.1:7004 ");
    cluster.settle("end");
    cluster.assert_one_history();
    assert_eq!(cluster.count(7002, "join 127.0.0.1:7004 "), 1);
}

#[test]
fn an_absent_server_or_an_unusable_option_is_one_clear_line_and_status_1() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = closed.local_addr().expect("an address").port();
    drop(closed);
    let absent = format!("zookeeper:127.0.0.1:{port}/x,timeout=1000");
    let gone = format!("failed to connect to zk server 127.0.0.1:{port} after 10 retries\n");
    for (spec, want) in [
        (absent.as_str(), gone.as_str()),
        ("zookeeper", "You must specify zookeeper servers.\n"),
        ("zookeeper:h:1,timeout=soon", "Invalid parameter for timeout\n"),
    ] {
        let output =
            Command::new(env!("CARGO_BIN_EXE_cluster-member")).args([spec, "127.0.0.1", "7001"]).output();
        let output = output.expect("cluster-member runs");
        assert_eq!(String::from_utf8_lossy(&output.stderr), want);
        assert_eq!(output.status.code(), Some(1));
    }
}
