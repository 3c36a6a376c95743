//! Several real processes and Debian's corosync, on one node and on three that can be cut from each other.

mod common;

use std::process::Command;
use std::time::Instant;

use common::{Cluster, contract};
use nix::sys::signal::Signal;
use sheepdog_testkit::{Corosync, Hosts, Nic, in_own_network};

fn corosync() -> Cluster {
    Cluster::new("corosync")
}

/// Members 7001, 7002, ... on hosts 0, 1, ...
fn on_hosts(hosts: &Hosts, ports: &[u16]) -> Cluster {
    let mut cluster = corosync();
    cluster.may_fail = true;
    for port in ports {
        cluster.inside.insert(*port, hosts.inside(usize::from(port % 7001)));
    }
    cluster.join_all(ports);
    cluster
}

#[test]
fn joins_messages_and_the_mutex_have_one_order() {
    if in_own_network("joins_messages_and_the_mutex_have_one_order") {
        return;
    }
    let _corosync = Corosync::single();
    let mut cluster = corosync();
    contract::joins_have_one_order(&mut cluster);
    cluster.kill(7004);
    for port in [7001, 7002, 7003] {
        cluster.wait(port, "leave 127.0.0.1:7004 members=127.0.0.1:7001,127.0.0.1:7002,127.0.0.1:7003");
    }
    contract::one_block_at_a_time(&mut cluster, 5);
    contract::updates_reach_everybody(&mut cluster);
    drop(cluster);
    let mut cluster = corosync();
    cluster.join_all(&[7001, 7002, 7003]);
    contract::messages_have_one_order(&mut cluster, 150);
}

#[test]
fn a_newcomer_waits_for_the_block_that_was_granted_before_it_joined() {
    if in_own_network("a_newcomer_waits_for_the_block_that_was_granted_before_it_joined") {
        return;
    }
    let _corosync = Corosync::single();
    let mut cluster = corosync();
    cluster.join_all(&[7001]);
    contract::a_newcomer_waits_for_the_block(&mut cluster);
    drop(cluster);
    let mut cluster = corosync();
    cluster.join_all(&[7001]);
    contract::calls_out_of_place_are_errors(&mut cluster);
}

#[test]
fn deaths_leaves_and_returns_are_one_event_each() {
    if in_own_network("deaths_leaves_and_returns_are_one_event_each") {
        return;
    }
    let _corosync = Corosync::single();
    let mut cluster = corosync();
    cluster.join_all(&[7001, 7002, 7003]);
    for _ in 0..3 {
        cluster.send(7001, "block");
    }
    cluster.wait(7001, "granted");
    cluster.send(7002, "block");
    cluster.settle("asked");
    let begin = Instant::now();
    cluster.kill(7001);
    let (at, _) = cluster.wait_nth(7002, "leave 127.0.0.1:7001 members=127.0.0.1:7002,127.0.0.1:7003", 1);
    println!("leave seen {:?} after SIGKILL", at - begin);
    cluster.wait(7002, "granted");
    cluster.send(7002, "unblock done");
    cluster.join(7001);
    cluster.wait(7001, "accept 127.0.0.1:7001 ");
    // A gateway goes on receiving, and its end is no news.
    cluster.send(7003, "leave");
    cluster.send(7003, "leave");
    for port in [7001, 7002, 7003] {
        cluster.wait(port, "leave 127.0.0.1:7003 members=127.0.0.1:7001,127.0.0.1:7002");
    }
    cluster.send(7002, "notify still");
    cluster.wait(7003, "notify 127.0.0.1:7002 still");
    cluster.kill(7003);
    cluster.join(7003);
    cluster.wait_nth(7002, "accept 127.0.0.1:7003 members=127.0.0.1:7001,127.0.0.1:7002,127.0.0.1:7003", 2);
    cluster.wait(7003, "accept 127.0.0.1:7003 ");
    cluster.settle("end");
    cluster.assert_one_history();
    assert_eq!(cluster.count(7002, "leave "), 2);
}

#[test]
fn locks_exclude_and_end_with_their_holder() {
    if in_own_network("locks_exclude_and_end_with_their_holder") {
        return;
    }
    let _corosync = Corosync::single();
    let mut cluster = corosync();
    cluster.join_all(&[7001, 7002, 7003]);
    contract::locks_exclude_and_end_with_their_holder(&mut cluster);
    drop(cluster);
    // What stands after a colon is ignored.
    let mut cluster = Cluster::new("corosync:192.0.2.1");
    cluster.join_all(&[7001]);
    contract::locks_are_for_members(&mut cluster);
}

#[test]
fn a_second_process_with_the_address_of_a_living_one_ends_and_harms_nobody() {
    if in_own_network("a_second_process_with_the_address_of_a_living_one_ends_and_harms_nobody") {
        return;
    }
    let _corosync = Corosync::single();
    let mut cluster = corosync();
    cluster.join_all(&[7001, 7002]);
    let mut other = corosync();
    other.may_fail = true;
    other.join(7002);
    let line = other.wait(7002, "failed");
    assert!(line.contains("7002 is already a member of the cluster (corosync node 1, pid "), "{line}");
    other.kill(7002);
    cluster.settle("unharmed");
    assert_eq!(cluster.count(7001, "leave") + cluster.count(7001, "accept"), 2, "{:#?}", cluster.log(7001));
}

#[test]
fn without_corosync_there_is_one_clear_line_and_status_1() {
    if in_own_network("without_corosync_there_is_one_clear_line_and_status_1") {
        return;
    }
    let member = || Command::new(env!("CARGO_BIN_EXE_cluster-member"));
    let output = member().args(["corosync", "127.0.0.1", "7001"]).output().expect("cluster-member runs");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(text, "failed to initialize cpg (2) - is corosync running?\n");
    assert_eq!(output.status.code(), Some(1));
    let mut corosync = Corosync::single();
    let mut cluster = self::corosync();
    cluster.may_fail = true;
    cluster.join_all(&[7001]);
    corosync.kill(0);
    assert_eq!(cluster.wait(7001, "failed"), "failed corosync driver received EPOLLHUP event, exiting.");
}

#[test]
fn a_cut_ends_the_smaller_part_and_healing_lets_it_rejoin() {
    if in_own_network("a_cut_ends_the_smaller_part_and_healing_lets_it_rejoin") {
        return;
    }
    let hosts = Hosts::new(3);
    let mut corosync = hosts.corosync();
    let mut cluster = on_hosts(&hosts, &[7001, 7002, 7003]);
    let begin = Instant::now();
    hosts.cut(0, Nic::Cluster);
    for port in [7002, 7003] {
        let (at, _) = cluster.wait_nth(port, "leave 127.0.0.1:7001 members=127.0.0.1:7002,127.0.0.1:7003", 1);
        println!("{port}: leave seen {:?} after the cut", at - begin);
    }
    let (at, line) = cluster.wait_nth(7001, "failed ", 1);
    println!("7001 ended {:?} after the cut", at - begin);
    assert_eq!(line, "failed a number of leaving node (2) is larger than majority (2), network partition");
    // Its right to acknowledge ended before the others went on.
    let suspended = cluster.log(7001).iter().position(|l| *l == "suspended true");
    let failed = cluster.log(7001).iter().position(|l| l.starts_with("failed"));
    assert!(suspended < failed, "{:#?}", cluster.log(7001));
    cluster.kill(7001);
    cluster.send(7002, "notify without");
    cluster.wait(7003, "notify 127.0.0.1:7002 without");
    hosts.heal(0, Nic::Cluster);
    corosync.wait_formed();
    cluster.join(7001);
    cluster.wait(7001, "accept 127.0.0.1:7001 members=127.0.0.1:7001,127.0.0.1:7002,127.0.0.1:7003");
    cluster.settle("end");
    cluster.assert_one_history();
}

#[test]
fn two_rings_that_started_apart_and_meet_become_one_cluster_of_the_first() {
    if in_own_network("two_rings_that_started_apart_and_meet_become_one_cluster_of_the_first") {
        return;
    }
    let hosts = Hosts::new(2);
    let mut corosync = hosts.corosync();
    hosts.cut(1, Nic::Cluster);
    corosync.wait_apart();
    let mut cluster = on_hosts(&hosts, &[]);
    for port in [7001, 7002] {
        cluster.inside.insert(port, hosts.inside(usize::from(port % 7001)));
        cluster.join(port);
        cluster.wait(port, &format!("accept 127.0.0.1:{port} members=127.0.0.1:{port}"));
    }
    hosts.heal(1, Nic::Cluster);
    let line = cluster.wait(7002, "failed ");
    assert!(
        line.contains("two parts of the cluster met that went on by themselves (1 here, 1 there)"),
        "{line}"
    );
    cluster.kill(7002);
    cluster.send(7001, "notify goes-on");
    cluster.wait(7001, "notify 127.0.0.1:7001 goes-on");
    cluster.join(7002);
    cluster.wait(7001, "accept 127.0.0.1:7002 members=127.0.0.1:7001,127.0.0.1:7002");
}

#[test]
fn a_stopped_process_catches_up() {
    if in_own_network("a_stopped_process_catches_up") {
        return;
    }
    let _corosync = Corosync::single();
    let mut cluster = corosync();
    cluster.join_all(&[7001, 7002]);
    cluster.signal(7002, Signal::SIGSTOP);
    for i in 0..20 {
        cluster.send(7001, &format!("notify n{i}"));
    }
    cluster.wait(7001, "notify 127.0.0.1:7001 n19");
    cluster.signal(7002, Signal::SIGCONT);
    cluster.wait(7002, "notify 127.0.0.1:7001 n19");
    cluster.settle("end");
    cluster.assert_one_history();
}
