//! What the daemon relies on, whatever the driver (spec 04, 4.2).

use super::Cluster;

/// All at once: the order is the driver's, but everybody's. Gives how often anybody was asked about a join.
pub fn joins_have_one_order(cluster: &mut Cluster) -> usize {
    let ports = [7003, 7001, 7002, 7004];
    for port in ports {
        cluster.start(port);
    }
    for port in ports {
        cluster.send(port, "join");
    }
    for port in ports {
        cluster.wait(port, &format!("accept 127.0.0.1:{port} "));
    }
    cluster.settle("end");
    cluster.assert_one_history();
    let longest = ports.iter().map(|p| cluster.history(*p)).max_by_key(Vec::len).expect("four");
    assert_eq!(longest.len(), 8, "four accepts, four messages: {longest:#?}");
    let all = "members=127.0.0.1:7001,127.0.0.1:7002,127.0.0.1:7003,127.0.0.1:7004 version=10";
    assert!(longest[3].ends_with(all), "{longest:#?}");
    // The first member answers itself with nobody else; the joiners with others present are not asked.
    let asked_self = |p: &u16| cluster.count(*p, &format!("join 127.0.0.1:{p} ")) > 0;
    assert_eq!(ports.iter().filter(|p| asked_self(p)).count(), 1);
    ports.iter().map(|p| cluster.count(*p, "join ")).sum()
}

/// Many messages of the three members 7001 to 7003 have one order, which keeps each sender's.
pub fn messages_have_one_order(cluster: &mut Cluster, each: usize) {
    let ports = [7001, 7002, 7003];
    for i in 0..each {
        for port in ports {
            cluster.send(port, &format!("notify {i}"));
        }
    }
    for port in ports {
        cluster.wait_nth(port, "notify ", each * 3);
    }
    cluster.assert_one_history();
    for port in ports {
        let prefix = format!("notify 127.0.0.1:{port} ");
        let own: Vec<usize> =
            cluster.history(7001).iter().filter_map(|l| l.strip_prefix(&prefix)?.parse().ok()).collect();
        assert_eq!(own, (0..each).collect::<Vec<_>>(), "messages of one sender keep their order");
    }
}

/// The members 7001 to 7003 all want the mutex several times.
pub fn one_block_at_a_time(cluster: &mut Cluster, each: usize) {
    let ports = [7001, 7002, 7003];
    for _ in 0..each {
        for port in ports {
            cluster.send(port, "block");
        }
    }
    for round in 0..each * ports.len() {
        let holder = loop {
            let (port, line) = cluster.next();
            if line == "granted" {
                break port;
            }
        };
        if let Some(last) = round.checked_sub(1) {
            let end = format!(" done-{last}");
            let handled = cluster.log(holder).iter().any(|l| l.ends_with(&end));
            assert!(handled, "granted before {end} was handled");
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
        assert_eq!(cluster.count(port, "granted"), each);
    }
    cluster.send(7001, "unblock nothing");
    assert_eq!(cluster.wait(7001, "error"), "error unblock: the cluster is not blocked by this node");
}

/// 7001 is the only member; 7002 joins while 7001 has the mutex.
pub fn a_newcomer_waits_for_the_block(cluster: &mut Cluster) {
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

/// Of the members 7001 and 7002, the second changes its record.
pub fn updates_reach_everybody(cluster: &mut Cluster) {
    cluster.send(7002, "update 64");
    for port in [7001, 7002] {
        assert_eq!(cluster.wait(port, "update"), "update 127.0.0.1:7002 vnodes=64 listed=64");
    }
}

/// 7001 is a member. Calls that make no sense, and the limit of a message.
pub fn calls_out_of_place_are_errors(cluster: &mut Cluster) {
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

/// The members 7001 to 7003 want mutexes by number; one of them dies with one.
pub fn locks_exclude_and_end_with_their_holder(cluster: &mut Cluster) {
    cluster.send(7001, "lock 5");
    cluster.wait(7001, "locked 5");
    cluster.send(7002, "lock 18446744073709551615");
    cluster.wait(7002, "locked 18446744073709551615");
    for port in [7002, 7003] {
        cluster.send(port, "lock 5");
    }
    // Nothing of it holds up the rest.
    one_block_at_a_time(cluster, 1);
    let have = |c: &Cluster| [7002, 7003].map(|p| c.count(p, "locked 5"));
    assert_eq!(have(cluster), [0, 0], "two have it");
    cluster.send(7001, "unlock 5");
    cluster.wait(7001, "unlocked 5");
    while have(cluster) == [0, 0] {
        cluster.next();
    }
    let [first, second] = if have(cluster)[0] == 1 { [7002, 7003] } else { [7003, 7002] };
    cluster.settle("one");
    assert_eq!(cluster.count(second, "locked 5"), 0, "two have it");
    cluster.kill(first);
    cluster.wait(second, "locked 5");
    // One process asks twice.
    cluster.send(7001, "lock 6");
    cluster.wait(7001, "locked 6");
    cluster.send(second, "lock 6");
    cluster.send(second, "lock 6");
    cluster.send(7001, "unlock 6");
    cluster.wait(second, "locked 6");
    cluster.settle("twice");
    assert_eq!(cluster.count(second, "locked 6"), 1, "one process has it twice");
    let log = cluster.log(7001).join("\n") + &cluster.log(second).join("\n");
    assert!(!log.contains("error lock") && !log.contains("error unlock"), "{log}");
}

/// 7001 is a member, 7002 is none: it has no locks, and 7001 none any more after it left.
pub fn locks_are_for_members(cluster: &mut Cluster) {
    cluster.start(7002);
    cluster.send(7002, "lock 1");
    cluster.wait(7002, "error lock: not a member of the cluster");
    cluster.send(7002, "join");
    cluster.wait(7002, "accept 127.0.0.1:7002 ");
    cluster.send(7001, "lock 1");
    cluster.wait(7001, "locked 1");
    cluster.send(7002, "lock 1");
    cluster.settle("asked");
    assert_eq!(cluster.count(7002, "locked"), 0);
    cluster.send(7001, "leave");
    cluster.wait(7002, "locked 1");
    cluster.send(7001, "unlock 1");
    cluster.wait(7001, "error unlock: the lock was lost");
    cluster.send(7001, "lock 2");
    cluster.wait(7001, "error lock: not a member of the cluster");
}
