//! Several real processes on one queue file.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);

/// One `cluster-member` process. Killed when dropped.
struct Member {
    child: Child,
    input: ChildStdin,
    log: Vec<String>,
}

/// A queue file and the processes using it.
struct Cluster {
    dir: tempfile::TempDir,
    members: HashMap<u16, Member>,
    lines: Receiver<(u16, u32, String)>,
    sender: Sender<(u16, u32, String)>,
    may_fail: bool,
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
    fn new() -> Cluster {
        let (sender, lines) = channel();
        Cluster {
            dir: tempfile::tempdir().expect("directory"),
            members: HashMap::new(),
            lines,
            sender,
            may_fail: false,
        }
    }

    fn of(ports: &[u16]) -> Cluster {
        let mut cluster = Cluster::new();
        for port in ports {
            cluster.start(*port);
            cluster.send(*port, "join");
            for other in ports.iter().take_while(|p| *p <= port) {
                cluster.wait(*other, &format!("accept 127.0.0.1:{port} "));
            }
        }
        cluster
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("queue")
    }

    /// Starts a process, which gets the address of `port`; the old one of that port, if any, is forgotten unreaped.
    fn start(&mut self, port: u16) {
        let mut child = spawn(&self.path(), port);
        let pid = child.id();
        let output = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let input = child.stdin.take().expect("stdin is piped");
        let sender = self.sender.clone();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let _ = sender.send((port, pid, line));
            }
        });
        self.members.insert(port, Member { child, input, log: Vec::new() });
    }

    fn send(&mut self, port: u16, command: &str) {
        let member = self.members.get_mut(&port).expect("a started member");
        writeln!(member.input, "{command}").expect("the member lives");
    }

    /// SIGKILL without reaping: the process stays a zombie.
    fn kill(&mut self, port: u16) -> Child {
        let mut member = self.members.remove(&port).expect("a started member");
        member.child.kill().expect("kill");
        member.child
    }

    /// The next line of any process, in its log.
    fn next(&mut self) -> (u16, String) {
        loop {
            let (port, pid, line) = self.lines.recv_timeout(PATIENCE).unwrap_or_else(|_| {
                let logs: Vec<_> = self.members.iter().map(|(p, m)| (p, m.log.join("\n"))).collect();
                panic!("nothing happens any more; logs: {logs:#?}")
            });
            assert!(self.may_fail || !line.starts_with("failed"), "{port}: {line}");
            if let Some(member) = self.members.get_mut(&port).filter(|m| m.child.id() == pid) {
                member.log.push(line.clone());
                return (port, line);
            }
        }
    }

    fn log(&self, port: u16) -> &[String] {
        &self.members[&port].log
    }

    /// Waits for a line that starts with `start` in the log of `port`, which may have come before.
    fn wait(&mut self, port: u16, start: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(line) = self.log(port).iter().find(|l| l.starts_with(start)) {
                return line.clone();
            }
            assert!(Instant::now() < deadline, "{port} never said {start}: {:#?}", self.log(port));
            self.next();
        }
    }

    /// What everybody sees alike: everything but questions and answers to requests.
    fn history(&self, port: u16) -> Vec<&str> {
        let common = ["accept ", "leave ", "notify ", "update "];
        let lines = self.log(port).iter().map(String::as_str);
        lines.filter(|l| common.iter().any(|c| l.starts_with(c))).collect()
    }
}

fn spawn(path: &Path, port: u16) -> Child {
    Command::new(env!("CARGO_BIN_EXE_cluster-member"))
        .arg(format!("local:{}", path.display()))
        .args(["127.0.0.1", &port.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("cluster-member starts")
}

#[test]
fn joins_are_answered_once_and_accepted_in_the_same_order_everywhere() {
    let mut cluster = Cluster::new();
    for port in [7003, 7001, 7002, 7004] {
        cluster.start(port);
    }
    // All at once: the order is the file's, whatever it is.
    for port in [7003, 7001, 7002, 7004] {
        cluster.send(port, "join");
    }
    for port in [7001, 7002, 7003, 7004] {
        cluster.wait(port, &format!("accept 127.0.0.1:{port} "));
    }
    cluster.send(7001, "notify end");
    for port in [7001, 7002, 7003, 7004] {
        cluster.wait(port, "notify 127.0.0.1:7001 end");
    }
    let mut histories: Vec<Vec<&str>> = [7001, 7002, 7003, 7004].map(|p| cluster.history(p)).into();
    histories.sort_by_key(|h| std::cmp::Reverse(h.len()));
    let longest = &histories[0];
    assert_eq!(longest.len(), 5, "{longest:#?}");
    assert!(
        longest[3]
            .ends_with("members=127.0.0.1:7001,127.0.0.1:7002,127.0.0.1:7003,127.0.0.1:7004 version=10")
    );
    for (missed, history) in histories.iter().enumerate() {
        assert_eq!(history[..], longest[missed..], "a joiner sees everything from its own accept on");
    }
    // The first member answers itself with nobody else; the joiners with others present are not asked.
    let asked_self = |p: u16| cluster.log(p).iter().any(|l| l.starts_with(&format!("join 127.0.0.1:{p} ")));
    assert_eq!([7001, 7002, 7003, 7004].into_iter().filter(|p| asked_self(*p)).count(), 1);
}

#[test]
fn messages_of_all_senders_have_one_order_over_more_than_a_ring() {
    const EACH: usize = 400;
    let ports = [7001, 7002, 7003];
    let mut cluster = Cluster::of(&ports);
    for i in 0..EACH {
        for port in ports {
            cluster.send(port, &format!("notify {i}"));
        }
    }
    let count = |c: &Cluster, p| c.log(p).iter().filter(|l| l.starts_with("notify ")).count();
    while ports.iter().any(|p| count(&cluster, *p) < EACH * 3) {
        cluster.next();
    }
    let notifies =
        |p| -> Vec<&str> { cluster.history(p).into_iter().filter(|l| l.starts_with("notify")).collect() };
    assert_eq!(notifies(7001), notifies(7002));
    assert_eq!(notifies(7001), notifies(7003));
    for port in ports {
        let prefix = format!("notify 127.0.0.1:{port} ");
        let own: Vec<usize> =
            notifies(7001).iter().filter_map(|l| l.strip_prefix(&prefix)?.parse::<usize>().ok()).collect();
        assert_eq!(own, (0..EACH).collect::<Vec<_>>(), "messages of one sender keep their order");
    }
}

#[test]
fn one_block_at_a_time_and_only_after_the_message_before() {
    const EACH: usize = 10;
    let ports = [7001, 7002, 7003];
    let mut cluster = Cluster::of(&ports);
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
        for port in ports {
            loop {
                let probed = format!("notify 127.0.0.1:{probe} probe-{round}");
                if cluster.log(port).contains(&probed) {
                    break;
                }
                let (port, line) = cluster.next();
                assert_ne!(line, "granted", "{port} was granted while {holder} has the block");
            }
        }
        cluster.send(holder, &format!("unblock done-{round}"));
    }
    for port in ports {
        cluster.wait(port, "notify 127.0.0.1:7001 probe-27");
        assert_eq!(cluster.log(port).iter().filter(|l| *l == "granted").count(), EACH);
    }
}

#[test]
fn a_newcomer_waits_for_the_block_that_was_granted_before_it_joined() {
    let mut cluster = Cluster::of(&[7001]);
    cluster.send(7001, "block");
    cluster.wait(7001, "granted");
    cluster.start(7002);
    cluster.send(7002, "join");
    cluster.wait(7002, "accept 127.0.0.1:7002 ");
    cluster.send(7002, "block");
    cluster.send(7002, "notify asked");
    cluster.wait(7001, "notify 127.0.0.1:7002 asked");
    cluster.send(7001, "notify seen");
    cluster.wait(7002, "notify 127.0.0.1:7001 seen");
    assert!(!cluster.log(7002).iter().any(|l| l == "granted"), "two blocks at a time");
    cluster.send(7001, "unblock over");
    cluster.wait(7002, "granted");
    assert!(cluster.log(7002).iter().any(|l| l == "notify 127.0.0.1:7001 over"));
}

#[test]
fn killed_members_are_noticed_though_nobody_reaps_them() {
    let mut cluster = Cluster::of(&[7001, 7002, 7003]);
    let begin = Instant::now();
    let mut zombie = cluster.kill(7002);
    for port in [7001, 7003] {
        assert_eq!(
            cluster.wait(port, "leave 127.0.0.1:7002 "),
            "leave 127.0.0.1:7002 members=127.0.0.1:7001,127.0.0.1:7003"
        );
    }
    println!("leave seen {:?} after SIGKILL", begin.elapsed());
    cluster.send(7003, "hint");
    assert_eq!(cluster.wait(7003, "hint"), "hint 127.0.0.1:7001,127.0.0.1:7003");
    zombie.wait().expect("wait");
    for port in [7001, 7003] {
        cluster.send(port, "notify end");
        cluster.wait(7001, &format!("notify 127.0.0.1:{port} end"));
        assert_eq!(cluster.log(port).iter().filter(|l| l.starts_with("leave")).count(), 1);
    }
}

#[test]
fn the_blocks_of_a_dead_member_do_not_stall_the_others() {
    let mut cluster = Cluster::of(&[7001, 7002, 7003]);
    for _ in 0..3 {
        cluster.send(7001, "block");
    }
    cluster.wait(7001, "granted");
    cluster.send(7001, "notify queued");
    cluster.wait(7002, "notify 127.0.0.1:7001 queued");
    cluster.send(7002, "block");
    cluster.send(7003, "block");
    let mut dead = cluster.kill(7001);
    let first = loop {
        let (port, line) = cluster.next();
        if line == "granted" {
            break port;
        }
    };
    cluster.wait(first, "leave 127.0.0.1:7001 ");
    // Sheep of the original look at the void mark alone, and would wait for ever for the second and third.
    let file = std::fs::File::open(cluster.path()).expect("queue file");
    let mut voided = 0;
    for slot in 1..=5 {
        let mut head = [0; 112];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut head, 8 + slot * 221_304).expect("event head");
        let pid = u32::from_le_bytes(head[88..92].try_into().expect("four bytes"));
        let removed = head[97] == 1;
        assert_eq!(removed, pid == dead.id(), "slot {slot}");
        voided += u32::from(removed);
    }
    assert_eq!(voided, 3);
    cluster.send(first, "unblock done");
    cluster.wait(7002 + 7003 - first, "granted");
    dead.wait().expect("wait");
}

#[test]
fn a_restart_under_the_same_address_is_a_new_member() {
    let mut cluster = Cluster::of(&[7001, 7002]);
    let mut zombie = cluster.kill(7002);
    cluster.start(7002);
    cluster.send(7002, "join");
    cluster.wait(7002, "accept 127.0.0.1:7002 ");
    cluster.send(7002, "notify end");
    cluster.wait(7001, "notify 127.0.0.1:7002 end");
    zombie.wait().expect("wait");
    let history = cluster.history(7001);
    let second = "accept 127.0.0.1:7002 members=127.0.0.1:7001,127.0.0.1:7002 version=10";
    assert_eq!(
        history[1..],
        [second, "leave 127.0.0.1:7002 members=127.0.0.1:7001", second, "notify 127.0.0.1:7002 end"]
    );
}

#[test]
fn a_second_process_with_a_live_members_address_is_refused_and_harms_nobody() {
    let mut cluster = Cluster::of(&[7001, 7002]);
    let pid = cluster.members[&7002].child.id();
    let mut original = cluster.members.remove(&7002).expect("member");
    cluster.start(7002);
    cluster.send(7002, "join");
    assert_eq!(
        cluster.wait(7002, "error join"),
        format!("error join: IPv4 ip:127.0.0.1 port:7002 is already a member of the cluster (pid {pid})")
    );
    cluster.kill(7002).wait().expect("wait");
    writeln!(original.input, "notify alive").expect("the member lives");
    cluster.wait(7001, "notify 127.0.0.1:7002 alive");
    assert_eq!(cluster.history(7001).len(), 3, "{:#?}", cluster.history(7001));
    original.child.kill().expect("kill");
    original.child.wait().expect("wait");
}

#[test]
fn leaving_makes_a_gateway_that_still_receives_and_whose_end_is_silent() {
    let mut cluster = Cluster::of(&[7001, 7002]);
    cluster.send(7002, "leave");
    cluster.send(7002, "leave");
    for port in [7001, 7002] {
        assert_eq!(cluster.wait(port, "leave"), "leave 127.0.0.1:7002 members=127.0.0.1:7001");
    }
    cluster.send(7001, "notify still");
    cluster.wait(7002, "notify 127.0.0.1:7001 still");
    cluster.send(7002, "notify here");
    cluster.wait(7001, "notify 127.0.0.1:7002 here");
    cluster.send(7002, "block");
    cluster.wait(7002, "granted");
    cluster.send(7002, "unblock served");
    cluster.wait(7001, "notify 127.0.0.1:7002 served");
    cluster.kill(7002).wait().expect("wait");
    // Its address is free once its end was noticed, which the join itself does.
    cluster.start(7002);
    cluster.send(7002, "join");
    cluster.wait(7002, "accept 127.0.0.1:7002 ");
    cluster.send(7002, "notify end");
    cluster.wait(7001, "notify 127.0.0.1:7002 end");
    assert_eq!(cluster.log(7001).iter().filter(|l| l.starts_with("leave")).count(), 1);
}

#[test]
fn updates_reach_everybody_and_stay() {
    let mut cluster = Cluster::of(&[7001, 7002]);
    cluster.send(7002, "update 64");
    for port in [7001, 7002] {
        assert_eq!(cluster.wait(port, "update"), "update 127.0.0.1:7002 vnodes=64 listed=64");
    }
}

#[test]
fn a_file_whose_processes_are_all_dead_starts_afresh() {
    let mut cluster = Cluster::of(&[7001, 7002]);
    cluster.send(7001, "notify old");
    cluster.wait(7002, "notify 127.0.0.1:7001 old");
    let zombies = [cluster.kill(7001), cluster.kill(7002)];
    cluster.start(7003);
    cluster.send(7003, "hint");
    assert_eq!(cluster.wait(7003, "hint"), "hint ");
    cluster.send(7003, "join");
    assert_eq!(cluster.wait(7003, "accept"), "accept 127.0.0.1:7003 members=127.0.0.1:7003 version=10");
    let bytes = std::os::unix::fs::FileExt::read_exact_at;
    let mut pos = [0; 4];
    let file = std::fs::File::open(cluster.path()).expect("queue file");
    bytes(&file, &mut pos, 110_652_008).expect("position");
    assert_eq!(i32::from_le_bytes(pos), 1, "the ring starts again");
    assert_eq!(file.metadata().expect("stat").len(), 221_304_016);
    for mut zombie in zombies {
        zombie.wait().expect("wait");
    }
}

#[test]
fn a_joiner_whose_judges_died_judges_itself() {
    let mut cluster = Cluster::of(&[7001]);
    cluster.send(7001, "decline");
    cluster.wait(7001, "declining");
    cluster.start(7002);
    cluster.send(7002, "join");
    cluster.wait(7001, "join 127.0.0.1:7002 ");
    cluster.kill(7001).wait().expect("wait");
    cluster.wait(7002, "accept 127.0.0.1:7002 ");
    assert_eq!(cluster.wait(7002, "leave"), "leave 127.0.0.1:7001 members=127.0.0.1:7002");
}

#[test]
fn calls_out_of_place_are_errors() {
    let mut cluster = Cluster::of(&[7001]);
    cluster.start(7002);
    for (port, command, error) in [
        (7002, "notify x", "error notify: not a member of the cluster"),
        (7002, "block", "error block: not a member of the cluster"),
        (7002, "update 3", "error update: not a member of the cluster"),
        (7001, "join", "error join: already joined"),
        (7001, "unblock x", "error unblock: the cluster is not blocked by this node"),
    ] {
        cluster.send(port, command);
        cluster.wait(port, error);
    }
    let long = "x".repeat((128 << 10) + 1);
    cluster.send(7001, &format!("notify {long}"));
    cluster.wait(7001, "error notify: cluster message of 131073 bytes, at most 131072");
    cluster.send(7001, &format!("notify {}", &long[1..]));
    cluster.wait(7001, "notify 127.0.0.1:7001 xxx");
}

#[test]
fn garbage_written_under_a_running_member_ends_its_driver_with_a_reason() {
    let mut cluster = Cluster::of(&[7001]);
    cluster.may_fail = true;
    let file = std::fs::OpenOptions::new().write(true).open(cluster.path()).expect("queue file");
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xff; 4], 110_652_008).expect("garbage");
    let line = cluster.wait(7001, "failed");
    assert!(line.contains("not a usable event queue: queue position -1"), "{line}");
}
