//! Several real processes on one queue file.

mod common;

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use common::{Cluster, contract};
use nix::sys::signal::Signal;

/// A queue file of the test's own.
struct Queue(tempfile::TempDir);

impl Queue {
    fn new() -> Queue {
        Queue(tempfile::tempdir().expect("directory"))
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("queue")
    }

    fn of(&self, ports: &[u16]) -> Cluster {
        Cluster::of(format!("local:{}", self.path().display()), ports)
    }
}

#[test]
fn joins_are_answered_once_and_accepted_in_the_same_order_everywhere() {
    let queue = Queue::new();
    contract::joins_have_one_order(&mut queue.of(&[]));
}
#[test]
fn messages_of_all_senders_have_one_order_over_more_than_a_ring() {
    let queue = Queue::new();
    contract::messages_have_one_order(&mut queue.of(&[7001, 7002, 7003]), 400);
}
#[test]
fn one_block_at_a_time_and_only_after_the_message_before() {
    let queue = Queue::new();
    contract::one_block_at_a_time(&mut queue.of(&[7001, 7002, 7003]), 10);
}
#[test]
fn a_newcomer_waits_for_the_block_that_was_granted_before_it_joined() {
    let queue = Queue::new();
    contract::a_newcomer_waits_for_the_block(&mut queue.of(&[7001]));
}
#[test]
fn locks_exclude_end_with_their_holder_and_leave_nothing_behind() {
    let queue = Queue::new();
    let mut cluster = queue.of(&[7001, 7002, 7003]);
    contract::locks_exclude_and_end_with_their_holder(&mut cluster);
    cluster.send(7001, "lock 9");
    cluster.wait(7001, "locked 9");
    let file = queue.0.path().join("queue.locks/0000000000000009");
    assert!(file.exists());
    cluster.send(7001, "unlock 9");
    cluster.wait(7001, "unlocked 9");
    assert!(!file.exists());
}
#[test]
fn killed_members_are_noticed_though_nobody_reaps_them() {
    let queue = Queue::new();
    let mut cluster = queue.of(&[7001, 7002, 7003]);
    let begin = Instant::now();
    let mut zombie = cluster.kill_unreaped(7002);
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
fn a_stopped_process_catches_up_with_less_than_a_ring_and_ends_after_more() {
    for (count, ends) in [(499, false), (500, true), (1100, true)] {
        let queue = Queue::new();
        let mut cluster = queue.of(&[7001, 7002]);
        cluster.may_fail = true;
        cluster.settle("before");
        cluster.signal(7002, Signal::SIGSTOP);
        for i in 0..count {
            cluster.send(7001, &format!("notify n{i}"));
        }
        cluster.wait(7001, &format!("notify 127.0.0.1:7001 n{}", count - 1));
        cluster.signal(7002, Signal::SIGCONT);
        if ends {
            let line = cluster.wait(7002, "failed ");
            assert!(line.contains("while 500 or more cluster events passed"), "{line}");
            assert_eq!(cluster.count(7002, "notify 127.0.0.1:7001 n"), 0);
        } else {
            cluster.wait(7002, &format!("notify 127.0.0.1:7001 n{}", count - 1));
            cluster.settle("end");
            cluster.assert_one_history();
        }
    }
}

#[test]
fn the_blocks_of_a_dead_member_do_not_stall_the_others() {
    let queue = Queue::new();
    let mut cluster = queue.of(&[7001, 7002, 7003]);
    for _ in 0..3 {
        cluster.send(7001, "block");
    }
    cluster.wait(7001, "granted");
    cluster.send(7001, "notify queued");
    cluster.wait(7002, "notify 127.0.0.1:7001 queued");
    cluster.send(7002, "block");
    cluster.send(7003, "block");
    let mut dead = cluster.kill_unreaped(7001);
    let first = loop {
        let (port, line) = cluster.next();
        if line == "granted" {
            break port;
        }
    };
    cluster.wait(first, "leave 127.0.0.1:7001 ");
    // Sheep of the original look at the void mark alone, and would wait for ever for the second and third.
    let file = std::fs::File::open(queue.path()).expect("queue file");
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
    let queue = Queue::new();
    let mut cluster = queue.of(&[7001, 7002]);
    let mut zombie = cluster.kill_unreaped(7002);
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
    let queue = Queue::new();
    let mut cluster = queue.of(&[7001, 7002]);
    let pid = cluster.members[&7002].child.id();
    let mut original = cluster.members.remove(&7002).expect("member");
    cluster.start(7002);
    cluster.send(7002, "join");
    assert_eq!(
        cluster.wait(7002, "error join"),
        format!("error join: IPv4 ip:127.0.0.1 port:7002 is already a member of the cluster (pid {pid})")
    );
    cluster.kill_unreaped(7002).wait().expect("wait");
    writeln!(original.input, "notify alive").expect("the member lives");
    cluster.wait(7001, "notify 127.0.0.1:7002 alive");
    assert_eq!(cluster.history(7001).len(), 3, "{:#?}", cluster.history(7001));
    original.child.kill().expect("kill");
    original.child.wait().expect("wait");
}

#[test]
fn leaving_makes_a_gateway_that_still_receives_and_whose_end_is_silent() {
    let queue = Queue::new();
    let mut cluster = queue.of(&[7001, 7002]);
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
    cluster.kill_unreaped(7002).wait().expect("wait");
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
    let queue = Queue::new();
    contract::updates_reach_everybody(&mut queue.of(&[7001, 7002]));
}
#[test]
fn a_file_whose_processes_are_all_dead_starts_afresh() {
    let queue = Queue::new();
    let mut cluster = queue.of(&[7001, 7002]);
    cluster.send(7001, "notify old");
    cluster.wait(7002, "notify 127.0.0.1:7001 old");
    let zombies = [cluster.kill_unreaped(7001), cluster.kill_unreaped(7002)];
    cluster.start(7003);
    cluster.send(7003, "hint");
    assert_eq!(cluster.wait(7003, "hint"), "hint ");
    cluster.send(7003, "join");
    assert_eq!(cluster.wait(7003, "accept"), "accept 127.0.0.1:7003 members=127.0.0.1:7003 version=10");
    let bytes = std::os::unix::fs::FileExt::read_exact_at;
    let mut pos = [0; 4];
    let file = std::fs::File::open(queue.path()).expect("queue file");
    bytes(&file, &mut pos, 110_652_008).expect("position");
    assert_eq!(i32::from_le_bytes(pos), 1, "the ring starts again");
    assert_eq!(file.metadata().expect("stat").len(), 221_304_016);
    for mut zombie in zombies {
        zombie.wait().expect("wait");
    }
}

#[test]
fn a_joiner_whose_judges_died_judges_itself() {
    let queue = Queue::new();
    let mut cluster = queue.of(&[7001]);
    cluster.send(7001, "decline");
    cluster.wait(7001, "declining");
    cluster.start(7002);
    cluster.send(7002, "join");
    cluster.wait(7001, "join 127.0.0.1:7002 ");
    cluster.kill_unreaped(7001).wait().expect("wait");
    cluster.wait(7002, "accept 127.0.0.1:7002 ");
    assert_eq!(cluster.wait(7002, "leave"), "leave 127.0.0.1:7001 members=127.0.0.1:7002");
}

#[test]
fn calls_out_of_place_are_errors() {
    let queue = Queue::new();
    contract::calls_out_of_place_are_errors(&mut queue.of(&[7001]));
}
#[test]
fn garbage_written_under_a_running_member_ends_its_driver_with_a_reason() {
    let queue = Queue::new();
    let mut cluster = queue.of(&[7001]);
    cluster.may_fail = true;
    let file = std::fs::OpenOptions::new().write(true).open(queue.path()).expect("queue file");
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xff; 4], 110_652_008).expect("garbage");
    let line = cluster.wait(7001, "failed");
    assert!(line.contains("not a usable event queue: queue position -1"), "{line}");
}
