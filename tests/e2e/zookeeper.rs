//! Daemons that find each other through ZooKeeper.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use sheepdog_proto::ClusterStatus;
use sheepdog_testkit::load::{Load, Region};
use sheepdog_testkit::{Builder, Cluster, Vdi, wait};

const TIMEOUT: u64 = 4000;

#[test]
fn a_node_stopped_past_the_timeout_rejoins_with_the_data_written_meanwhile() {
    let mut cluster = Builder::new(3).zookeeper(TIMEOUT).start();
    let mut client = cluster.client();
    let vid = client.create_vdi("v", 64 << 20).expect("create");
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    vdi.write(&mut client, 0, &[1; 65536]).expect("write");
    cluster.sigstop(2);
    wait("the stopped node is thrown out", || cluster.members(0).len() == 2);
    vdi.write(&mut client, 0, &[2; 65536]).expect("write");
    cluster.sigcont(2);
    cluster.wait_members(3);
    cluster.wait_status(2, ClusterStatus::Ok);
    cluster.wait_recovered();
    let mut late = cluster.nodes[2].client();
    let vdi = Vdi::open(&mut late, vid).expect("open");
    assert!(vdi.read(&mut late, 0, 65536).expect("read") == [2; 65536]);
    assert!(cluster.compare_replicas(3).missing.is_empty());
}

#[test]
fn a_session_lost_during_an_operation_ends_the_operation_and_not_the_node() {
    let mut cluster = Builder::new(3).zookeeper(TIMEOUT).start();
    // The new VDI's inode cannot be written as long as one of its homes is silent.
    cluster.sigstop(2);
    let mut client = cluster.nodes[0].client();
    let creation = std::thread::spawn(move || client.create_vdi("interrupted", 64 << 20));
    let has_inode = |cluster: &sheepdog_testkit::Cluster| {
        let dir = std::fs::read_dir(&cluster.nodes[1].object_dirs()[0]).expect("a directory");
        dir.flatten().any(|e| e.file_name().to_string_lossy().starts_with("80"))
    };
    wait("the operation writes", || has_inode(&cluster));
    cluster.sigstop(0);
    wait("the stopped nodes are thrown out", || cluster.members(1).len() == 1);
    cluster.sigcont(0);
    cluster.sigcont(2);
    cluster.wait_members(3);
    // Whether it was done is unknown to the client if it failed; the node serves either way.
    eprintln!("interrupted: {:?}", creation.join().expect("no panic"));
    cluster.wait_running();
    for node in [0, 2, 1] {
        let mut client = cluster.nodes[node].client();
        let vid = client.create_vdi(&format!("after-{node}"), 64 << 20).expect("create");
        let mut vdi = Vdi::open(&mut client, vid).expect("open");
        vdi.write(&mut client, 0, &[7; 4096]).expect("write");
    }
    cluster.wait_recovered();
}

#[test]
fn no_write_is_acknowledged_while_the_lease_is_not_fresh() {
    let mut cluster = Builder::new(1).copies(1).zookeeper(TIMEOUT).start();
    let mut client = cluster.client();
    let vid = client.create_vdi("v", 64 << 20).expect("create");
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    vdi.write(&mut client, 0, &[1; 4096]).expect("write");
    let server = cluster.zookeeper.as_ref().expect("a server");
    server.signal_all(Signal::SIGSTOP);
    let silent = Instant::now();
    // Writes go on within the lease; the first that meets its end is answered after the server is back.
    let resumed = Duration::from_millis(TIMEOUT);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            loop {
                vdi.write(&mut client, 0, &[2; 4096]).expect("write");
                let at = silent.elapsed();
                if at > resumed {
                    return at;
                }
                // Before the session could have expired.
                assert!(at < Duration::from_millis(TIMEOUT * 3 / 4), "acknowledged after {at:?}");
            }
        });
        std::thread::sleep(resumed.saturating_sub(silent.elapsed()));
        server.signal_all(Signal::SIGCONT);
        eprintln!("the write that met the end of the lease took until {:?}", writer.join().expect("writer"));
    });
}

/// Every node carries out an operation under the cluster-wide mutex, and serves what it made.
fn assert_operations_everywhere(cluster: &mut Cluster, name: &str) {
    for node in 0..cluster.nodes.len() {
        let mut client = cluster.nodes[node].client();
        let vid = client.create_vdi(&format!("{name}-{node}"), 64 << 20).expect("create");
        let mut vdi = Vdi::open(&mut client, vid).expect("open");
        vdi.write(&mut client, 0, &[7; 4096]).expect("write");
    }
}

#[test]
fn each_of_three_servers_dies_under_load_and_nobody_leaves() {
    let mut cluster = Builder::new(3).zookeeper(TIMEOUT).servers(3).start();
    let mut client = cluster.client();
    let vid = client.create_vdi("v", 64 << 20).expect("create");
    let ports: Vec<u16> = cluster.nodes.iter().map(|n| n.port).collect();
    let load = Load::start(Region::divide(&mut client, vid, 3).expect("regions"), ports, 1);
    for server in 0..3 {
        let servers = cluster.zookeeper.as_mut().expect("servers");
        eprintln!("killing server {server}, server {} leads", servers.leader());
        servers.kill(server);
        assert_operations_everywhere(&mut cluster, &format!("without-{server}"));
        let before = load.operations();
        wait("the load goes on", || load.operations() > before + 100);
        cluster.zookeeper.as_mut().expect("servers").start_all();
    }
    let regions = load.stop();
    assert_eq!((cluster.members(0).len(), cluster.epoch(0)), (3, Some(1)));
    for node in 0..3 {
        let mut client = cluster.nodes[node].client();
        for region in &regions {
            assert!(region.acknowledged > 0);
            assert_eq!((&region.errors, &region.violations), (&Vec::new(), &Vec::new()));
            assert_eq!(region.verify(&mut client), Vec::<String>::new(), "node {node}");
        }
    }
}

/// As if the ensemble had been away for longer than the timeout by its own clock. Nobody is left to bury the others.
#[test]
fn all_sessions_expire_at_once_and_everybody_is_back() {
    let mut cluster = Builder::new(3).zookeeper(TIMEOUT).start();
    let mut client = cluster.client();
    let vid = client.create_vdi("v", 64 << 20).expect("create");
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    vdi.write(&mut client, 0, &[1; 65536]).expect("write");
    // With luck somebody has the mutex when they are stopped. Whether that operation was done is unknown if it failed.
    let stop = Arc::new(AtomicBool::new(false));
    let (mut creator, stopped) = (cluster.nodes[1].client(), stop.clone());
    let creating = std::thread::spawn(move || {
        let operations = (0..).take_while(|_| !stopped.load(Ordering::Acquire));
        operations.filter(|i| creator.create_vdi(&format!("before-{i}"), 4 << 20).is_err()).count()
    });
    wait("operations", || cluster.client().lookup("before-3", "", 0).is_ok());
    for node in 0..3 {
        cluster.sigstop(node);
    }
    let expired = || cluster.zookeeper.as_ref().expect("a server").ephemerals() == Some(0);
    wait("all sessions expire", expired);
    for node in 0..3 {
        cluster.sigcont(node);
    }
    cluster.wait_members(3);
    cluster.wait_running();
    stop.store(true, Ordering::Release);
    eprintln!("{} operations failed", creating.join().expect("no panic"));
    cluster.wait_recovered();
    assert_operations_everywhere(&mut cluster, "after");
    for node in 0..3 {
        let mut client = cluster.nodes[node].client();
        assert!(vdi.read(&mut client, 0, 65536).expect("read") == [1; 65536], "node {node}");
        let log = cluster.nodes[node].log();
        assert!(log.contains("reconnected"), "{log}");
    }
}
