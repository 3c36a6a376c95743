//! Several real processes and Debian's ZooKeeper server.

mod common;

use std::process::Command;
use std::time::{Duration, Instant};

use common::{Cluster, contract};
use nix::sys::signal::Signal;
use sheepdog_testkit::ZooKeeper;

/// Session timeout of most tests, in milliseconds: long enough for a loaded machine.
const TIMEOUT: u64 = 4000;

fn spec(zookeeper: &ZooKeeper, id: &str, timeout: u64) -> String {
    format!("zookeeper:{}/{id},timeout={timeout}", zookeeper.hosts())
}

fn cluster_of(zookeeper: &ZooKeeper, timeout: u64, ports: &[u16]) -> Cluster {
    Cluster::of(spec(zookeeper, "test", timeout), ports)
}

#[test]
fn joins_are_answered_once_and_accepted_in_the_same_order_everywhere() {
    let zookeeper = ZooKeeper::start(1);
    let mut cluster = Cluster::new(spec(&zookeeper, "joins", TIMEOUT));
    let asked = contract::joins_have_one_order(&mut cluster);
    assert_eq!(asked, 4, "each join is answered by the master alone");
    cluster.join(7005);
    cluster.wait(7005, "accept 127.0.0.1:7005 ");
    contract::updates_reach_everybody(&mut cluster);
    cluster.send(7005, "hint");
    assert_eq!(cluster.wait(7005, "hint").matches(':').count(), 4, "the members before it joined");
}
#[test]
fn messages_of_all_senders_have_one_order_across_a_checkpoint() {
    let zookeeper = ZooKeeper::start(1);
    let mut cluster = cluster_of(&zookeeper, TIMEOUT, &[7001, 7002, 7003]);
    contract::messages_have_one_order(&mut cluster, 400);
}
/// A client that is no member, and a runtime for it.
struct Raw {
    runtime: tokio::runtime::Runtime,
    client: zookeeper_client::Client,
}

impl Raw {
    /// Sees the znodes of the cluster "test".
    fn connect(zookeeper: &ZooKeeper) -> Raw {
        Raw::below(zookeeper, "/test")
    }

    /// Sees the znodes below `root`.
    fn below(zookeeper: &ZooKeeper, root: &str) -> Raw {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let address = format!("{}{root}", zookeeper.hosts());
        let client = runtime.block_on(zookeeper_client::Client::connect(&address)).expect("a session");
        Raw { runtime, client }
    }

    fn get(&self, path: &str) -> (Vec<u8>, zookeeper_client::Stat) {
        self.runtime.block_on(self.client.get_data(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
    }

    fn names(&self, path: &str) -> Vec<String> {
        let mut names = self.runtime.block_on(self.client.list_children(path)).expect("the node");
        names.sort();
        names
    }

    fn create(&self, path: &str, data: &[u8], mode: zookeeper_client::CreateMode) {
        let options = mode.with_acls(zookeeper_client::Acls::anyone_all());
        let made = self.runtime.block_on(self.client.create(path, data, &options));
        made.unwrap_or_else(|e| panic!("{path}: {e}"));
    }

    fn delete(&self, path: &str) {
        self.runtime.block_on(self.client.delete(path, None)).unwrap_or_else(|e| panic!("{path}: {e}"));
    }
}

/// A JOIN as in the queue.
fn join_entry(port: u16) -> Vec<u8> {
    let mut join = vec![0; 983_256];
    join[..8].copy_from_slice(&77_u64.to_le_bytes());
    join[8] = 1;
    let node = sheepdog_proto::NodeId::new(std::net::Ipv4Addr::LOCALHOST.into(), port);
    let record = sheepdog_proto::NodeRecord { nid: node, ..sheepdog_proto::NodeRecord::zeroed() };
    join[56..136].copy_from_slice(&record.to_bytes());
    join[144..152].copy_from_slice(&491_568_u64.to_le_bytes());
    join[160..168].copy_from_slice(&983_088_u64.to_le_bytes());
    join
}

/// Numbers of the queue's entries.
fn queue_numbers(zookeeper: &ZooKeeper) -> Vec<u64> {
    let names = Raw::connect(zookeeper).names("/queue");
    let mut numbers: Vec<u64> = names.iter().map(|name| name.parse().expect("a number")).collect();
    numbers.sort_unstable();
    numbers
}

#[test]
fn entries_that_all_members_have_passed_long_ago_are_removed_and_joins_go_on() {
    let zookeeper = ZooKeeper::start(1);
    let mut cluster = cluster_of(&zookeeper, TIMEOUT, &[7001, 7002, 7003]);
    assert_eq!(queue_numbers(&zookeeper), [0, 1, 2]);
    // Beyond the third thousand everybody has its checkpoint at the second, and all but the last thousand before that may
    // go.
    contract::messages_have_one_order(&mut cluster, 1100);
    let oldest = || queue_numbers(&zookeeper).into_iter().min().expect("entries");
    sheepdog_testkit::wait("old entries to be removed", || oldest() > 0);
    let numbers = queue_numbers(&zookeeper);
    assert!(oldest() <= 2001, "a thousand entries before the oldest checkpoint stay");
    assert_eq!(numbers.iter().max(), Some(&3302), "nothing new is removed");
    // Who joins now needs nothing of what is gone, and the mutex is where it was.
    cluster.send(7002, "block");
    cluster.wait(7002, "granted");
    cluster.join(7004);
    cluster.wait(7004, "accept 127.0.0.1:7004 ");
    cluster.send(7004, "block");
    cluster.settle("end");
    assert_eq!(cluster.count(7004, "granted"), 0);
    cluster.send(7002, "unblock done");
    cluster.wait(7004, "granted");
    for port in [7001, 7002, 7003, 7004] {
        cluster.wait(port, "notify 127.0.0.1:7002 done");
    }
    cluster.assert_one_history();
}

#[test]
fn one_block_at_a_time_and_only_after_the_message_before() {
    let zookeeper = ZooKeeper::start(1);
    let mut cluster = cluster_of(&zookeeper, TIMEOUT, &[7001, 7002, 7003]);
    contract::one_block_at_a_time(&mut cluster, 5);
}
#[test]
fn a_newcomer_waits_for_the_block_that_was_granted_before_it_joined() {
    let zookeeper = ZooKeeper::start(1);
    let mut cluster = cluster_of(&zookeeper, TIMEOUT, &[7001]);
    contract::a_newcomer_waits_for_the_block(&mut cluster);
}

/// Nobody is left to write that the holder died, and the one that comes back second finds its BLOCK in the queue.
#[test]
fn a_block_of_before_all_died_holds_up_nobody() {
    let zookeeper = ZooKeeper::start(1);
    let mut cluster = cluster_of(&zookeeper, 1000, &[7001, 7002, 7003]);
    cluster.send(7001, "block");
    cluster.wait(7001, "granted");
    cluster.send(7002, "block");
    cluster.settle("asked");
    for port in [7001, 7002, 7003] {
        cluster.signal(port, Signal::SIGSTOP);
    }
    for port in [7001, 7002, 7003] {
        cluster.kill(port);
    }
    cluster.join_all(&[7001, 7002, 7003]);
    contract::one_block_at_a_time(&mut cluster, 2);
}

#[test]
fn calls_out_of_place_are_errors() {
    let zookeeper = ZooKeeper::start(1);
    let mut cluster = cluster_of(&zookeeper, TIMEOUT, &[7001]);
    contract::calls_out_of_place_are_errors(&mut cluster);
}
#[test]
fn a_killed_master_is_replaced_and_its_block_released() {
    let zookeeper = ZooKeeper::start(1);
    let mut cluster = cluster_of(&zookeeper, TIMEOUT, &[7001, 7002, 7003]);
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
fn locks_exclude_and_end_with_their_holder_or_its_session() {
    let zookeeper = ZooKeeper::start(1);
    let mut cluster = cluster_of(&zookeeper, TIMEOUT, &[7001, 7002, 7003]);
    contract::locks_exclude_and_end_with_their_holder(&mut cluster);
    drop(cluster);
    // A holder that is stopped past the timeout learns that it lost the lock.
    let mut cluster = Cluster::of(spec(&zookeeper, "session", TIMEOUT), &[7001, 7002]);
    cluster.send(7001, "lock 7");
    cluster.wait(7001, "locked 7");
    cluster.send(7002, "lock 7");
    cluster.settle("asked");
    assert_eq!(cluster.count(7002, "locked"), 0);
    cluster.signal(7001, Signal::SIGSTOP);
    cluster.wait(7002, "locked 7");
    cluster.signal(7001, Signal::SIGCONT);
    cluster.wait(7001, "reconnect");
    cluster.send(7001, "unlock 7");
    cluster.wait(7001, "error unlock: the lock was lost");
    cluster.wait_nth(7001, "accept 127.0.0.1:7001 ", 2);
    cluster.send(7001, "lock 7");
    cluster.send(7002, "unlock 7");
    cluster.wait_nth(7001, "locked 7", 2);
}

#[test]
fn locks_are_for_members_and_leave_nothing_behind() {
    let zookeeper = ZooKeeper::start(1);
    let mut cluster = cluster_of(&zookeeper, TIMEOUT, &[7001]);
    contract::locks_are_for_members(&mut cluster);
    cluster.send(7002, "unlock 1");
    cluster.wait(7002, "unlocked 1");
    let raw = Raw::connect(&zookeeper);
    sheepdog_testkit::wait("the locks' nodes to be removed", || raw.names("/lock").is_empty());
}

#[test]
fn a_restart_within_the_timeout_waits_and_a_restart_after_leaving_does_not() {
    let zookeeper = ZooKeeper::start(1);
    let mut cluster = cluster_of(&zookeeper, TIMEOUT, &[7001, 7002]);
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
    let mut cluster = cluster_of(&zookeeper, 1000, &[7001]);
    let mut other = Cluster::new(spec(&zookeeper, "test", 1000));
    other.join(7001);
    assert_eq!(
        other.wait(7001, "error join"),
        "error join: Previous zookeeper session exist, shoot myself. Please wait for 1 seconds to join me again."
    );
    cluster.settle("unharmed");
}

/// It looked for the member before that was one.
#[test]
fn a_join_with_the_address_of_a_living_member_is_refused_and_harms_nobody() {
    let zookeeper = ZooKeeper::start(1);
    let mut cluster = cluster_of(&zookeeper, TIMEOUT, &[7001, 7002]);
    let raw = Raw::connect(&zookeeper);
    for port in [7001, 7002] {
        raw.create("/queue/", &join_entry(port), zookeeper_client::CreateMode::PersistentSequential);
    }
    cluster.join(7003);
    cluster.wait(7003, "accept 127.0.0.1:7003 ");
    cluster.settle("end");
    cluster.assert_one_history();
    for port in [7001, 7002] {
        assert_eq!(cluster.count(port, "leave "), 0);
        assert_eq!(cluster.count(port, "failed "), 0);
    }
}

#[test]
fn of_two_processes_with_one_address_started_together_one_is_a_member() {
    let zookeeper = ZooKeeper::start(1);
    for (id, first) in [("alone", &[][..]), ("others", &[7001, 7002][..])] {
        let mut cluster = Cluster::of(spec(&zookeeper, id, 1000), first);
        let mut double = [0, 1].map(|_| Cluster::new(spec(&zookeeper, id, 1000)));
        for one in &mut double {
            one.may_fail = true;
            one.start(7003);
        }
        double.iter_mut().for_each(|one| one.send(7003, "join"));
        let refused = |one: &Cluster| one.count(7003, "failed ") + one.count(7003, "error join") > 0;
        let mut refused_one = || {
            double.iter_mut().for_each(Cluster::drain);
            double.iter().position(refused)
        };
        let index = sheepdog_testkit::wait_for(
            "one to be refused",
            sheepdog_testkit::wait::DEADLINE,
            &mut refused_one,
        );
        let member = &mut double[1 - index];
        member.send(7003, "notify here");
        member.wait(7003, "notify 127.0.0.1:7003 here");
        for port in first {
            cluster.wait(*port, "notify 127.0.0.1:7003 here");
            cluster.send(*port, "notify end");
            double[1 - index].wait(7003, &format!("notify 127.0.0.1:{port} end"));
        }
        assert!(!refused(&double[1 - index]));
    }
}

/// Its LEAVE is behind the JOIN, which nobody answers but the joiner when the member is gone.
#[test]
fn the_only_member_leaves_although_somebody_waits_to_join() {
    let zookeeper = ZooKeeper::start(1);
    let mut cluster = cluster_of(&zookeeper, TIMEOUT, &[7001]);
    cluster.send(7001, "decline");
    cluster.wait(7001, "declining");
    cluster.join(7002);
    cluster.wait(7001, "join 127.0.0.1:7002 ");
    cluster.send(7001, "leave");
    let accepted = cluster.wait(7002, "accept 127.0.0.1:7002 ");
    assert!(accepted.contains("members=127.0.0.1:7002 "), "{accepted}");
    cluster.wait(7001, "leave 127.0.0.1:7001 members=127.0.0.1:7002");
    cluster.send(7002, "notify end");
    cluster.wait(7001, "notify 127.0.0.1:7002 end");
}

#[test]
fn a_process_stopped_past_the_timeout_rejoins_and_is_suspended_until_then() {
    let zookeeper = ZooKeeper::start(1);
    let mut cluster = cluster_of(&zookeeper, TIMEOUT, &[7001, 7002, 7003]);
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
    let mut cluster = cluster_of(&zookeeper, 2000, &[7001, 7002]);
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
    let mut cluster = cluster_of(&zookeeper, TIMEOUT, &[7001, 7002, 7003]);
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
fn a_queue_with_more_than_a_thousand_million_entries_behind_it_serves() {
    // From here on the servers' counter of changes of the queue, which counts creations twice, is negative.
    let mut zookeeper = ZooKeeper::start_late("/test/queue", 1 << 30);
    let mut cluster = cluster_of(&zookeeper, 2000, &[7001, 7002, 7003]);
    assert_eq!(Raw::connect(&zookeeper).names("/queue").iter().filter(|n| *n == "1073741824").count(), 1);
    cluster.kill(7003);
    cluster.wait(7001, "leave 127.0.0.1:7003 ");
    for i in 0..20 {
        cluster.send(7001, &format!("notify n{i}"));
    }
    zookeeper.kill_all();
    zookeeper.start_all();
    cluster.settle("end");
    cluster.assert_one_history();
    assert_eq!(cluster.count(7002, "notify 127.0.0.1:7001 n"), 20, "every message once");
    assert_eq!(cluster.count(7002, "leave "), 1);
}

#[test]
fn two_clusters_share_an_ensemble_without_seeing_each_other() {
    let zookeeper = ZooKeeper::start(1);
    let mut one = Cluster::new(spec(&zookeeper, "one", TIMEOUT));
    let mut two = Cluster::new(spec(&zookeeper, "deep/two", TIMEOUT));
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
    let mut cluster = cluster_of(&zookeeper, TIMEOUT, &[7001, 7002, 7003]);
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

/// 04, 12.2: what nodes of the original read, and `zk_control` of it.
#[test]
fn the_znodes_are_those_of_the_original() {
    let zookeeper = ZooKeeper::start(1);
    let _cluster = cluster_of(&zookeeper, TIMEOUT, &[7001, 7002]);
    let raw = Raw::connect(&zookeeper);
    let members = ["IPv4 ip:127.0.0.1 port:7001", "IPv4 ip:127.0.0.1 port:7002"];
    assert_eq!(raw.names("/member"), members);
    assert_eq!(raw.names("/queue_pos"), members);
    for name in members {
        let (session, stat) = raw.get(&format!("/member/{name}"));
        assert_eq!(session.len(), 24);
        assert_eq!(session[..8], stat.ephemeral_owner.to_le_bytes(), "the session's id");
        let (position, stat) = raw.get(&format!("/queue_pos/{name}"));
        assert_eq!(position, [0xff; 4]);
        assert_ne!(stat.ephemeral_owner, 0);
    }
    for (number, name) in ["0000000000", "0000000001"].into_iter().zip(members) {
        let (string, stat) = raw.get(&format!("/master/{number}"));
        assert_eq!(string.len(), 256);
        assert!(string.starts_with(name.as_bytes()) && string[name.len()] == 0);
        assert_ne!(stat.ephemeral_owner, 0);
        let (entry, stat) = raw.get(&format!("/queue/{number}"));
        let word = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().expect("eight bytes"));
        assert_eq!((entry.len(), entry[8], stat.ephemeral_owner), (983_256, 2, 0), "an answered JOIN");
        assert_eq!((word(144), word(152), word(160)), (491_568, number.parse().expect("a number"), 983_088));
    }
}

/// 04, 12.6: the last member dies with two JOINs waiting. The one that asked first answers both, so the other one, whose
/// number is lower, makes way for it; when that candidate dies, too, the other is master after all.
#[test]
fn a_newcomer_makes_way_for_a_candidate_that_asked_before_it() {
    use zookeeper_client::CreateMode::{Ephemeral, EphemeralSequential, Persistent, PersistentSequential};
    let zookeeper = ZooKeeper::start(1);
    Raw::below(&zookeeper, "").create("/test", b"", Persistent);
    let raw = Raw::connect(&zookeeper);
    for path in ["/master", "/queue", "/member", "/queue_pos", "/lock"] {
        raw.create(path, b"", Persistent);
    }
    let string = |port| {
        let mut string = format!("IPv4 ip:127.0.0.1 port:{port}").into_bytes();
        string.resize(256, 0);
        string
    };
    // The member and master does not answer any more, and somebody has asked to join.
    raw.create("/master/0000000000", &string(7008), Ephemeral);
    raw.create("/member/IPv4 ip:127.0.0.1 port:7008", &[0; 24], Ephemeral);
    raw.create("/queue/", &join_entry(7009), PersistentSequential);
    let mut cluster = Cluster::new(spec(&zookeeper, "test", TIMEOUT));
    cluster.join(7001);
    sheepdog_testkit::wait("the newcomer to ask", || raw.names("/queue").len() == 2);
    let number = || {
        let mut numbers = raw.names("/master").into_iter();
        // Meanwhile one may be gone.
        let data = |n: &str| raw.runtime.block_on(raw.client.get_data(&format!("/master/{n}"))).ok();
        numbers.find(|n| data(n).is_some_and(|(data, _)| data.starts_with(b"IPv4 ip:127.0.0.1 port:7001")))
    };
    let first = number().expect("it competes");
    // The one that asked first was slower to compete.
    raw.create("/master/", &string(7009), EphemeralSequential);
    let other = raw.names("/master").pop().expect("a number");
    raw.delete("/member/IPv4 ip:127.0.0.1 port:7008");
    raw.delete("/master/0000000000");
    sheepdog_testkit::wait("the newcomer to make way", || number().is_some_and(|n| n > other));
    assert!(first < other);
    assert_eq!(cluster.count(7001, "accept "), 0);
    raw.delete(&format!("/master/{other}"));
    let accepted = cluster.wait(7001, "accept 127.0.0.1:7001 ");
    assert!(accepted.contains("members=127.0.0.1:7001 "), "{accepted}");
    cluster.settle("end");
}

/// What an operator's slip does: nobody goes on as a member that hears nothing.
#[test]
fn members_whose_queue_is_removed_end_with_one_clear_line() {
    let zookeeper = ZooKeeper::start(1);
    let mut cluster = cluster_of(&zookeeper, 1000, &[7001, 7002]);
    cluster.may_fail = true;
    let raw = Raw::connect(&zookeeper);
    for number in raw.names("/queue") {
        raw.delete(&format!("/queue/{number}"));
    }
    raw.delete("/queue");
    for port in [7001, 7002] {
        let line = cluster.wait(port, "failed ");
        // One of them may learn it when the other one is gone.
        let start = format!("failed zk server {}: ", zookeeper.hosts());
        let what = line.strip_prefix(&start).unwrap_or_default();
        assert!(
            what == "reading the queue: node not exists" || what == "the watch of a member: node not exists",
            "{line}"
        );
        cluster.send(port, "notify x");
        cluster.wait(port, "error notify: not a member of the cluster");
        assert_eq!(cluster.count(port, "failed"), 1);
    }
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
