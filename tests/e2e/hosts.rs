//! Three hosts in network namespaces: an I/O network of its own, cuts of one interface, of one host, of the majority
//! (spec 04, 15 and 16).

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sheepdog_proto::ClusterStatus;
use sheepdog_testkit::{Builder, Client, Cluster, Nic, Vdi, in_own_network, wait};

/// Session timeout over ZooKeeper, in milliseconds.
const TIMEOUT: u64 = 4000;

fn pattern(seed: u32, len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| ((i ^ seed).wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// A volume whose first two objects are written.
fn volume(client: &mut Client) -> (Vdi, Vec<u8>) {
    let vid = client.create_vdi("v", 64 << 20).expect("create");
    let mut vdi = Vdi::open(client, vid).expect("open");
    let data = pattern(1, 8 << 20);
    vdi.write(client, 0, &data).expect("write");
    (vdi, data)
}

/// A volume of blocks with one copy each: the numbers of the blocks that a node holds, by node. Such a node could write
/// them alone.
fn volume_of_single_copies(cluster: &mut Cluster) -> (Vdi, [Vec<u64>; 3]) {
    // Enough that every node holds some.
    const BLOCKS: u64 = 40;
    let mut client = cluster.client();
    let vid = client.create_vdi("v", BLOCKS << 22).expect("create");
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    for block in 0..BLOCKS {
        vdi.write(&mut client, block << 22, &[1; 4096]).expect("write");
    }
    let held = [0, 1, 2].map(|node: usize| {
        let dir = &cluster.nodes[node].object_dirs()[0];
        let blocks =
            (0..BLOCKS).filter(|block| dir.join(format!("00{:06x}{block:08x}", vid.get())).is_file());
        blocks.collect::<Vec<u64>>()
    });
    assert_eq!(held.iter().map(Vec::len).sum::<usize>(), BLOCKS as usize);
    assert!(held.iter().all(|blocks| !blocks.is_empty()), "{held:?}");
    (vdi, held)
}

fn cut(cluster: &Cluster, host: usize, nics: &[Nic]) {
    nics.iter().for_each(|nic| cluster.hosts.as_ref().expect("hosts").cut(host, *nic));
}

fn heal(cluster: &Cluster, host: usize, nics: &[Nic]) {
    nics.iter().for_each(|nic| cluster.hosts.as_ref().expect("hosts").heal(host, *nic));
}

fn traffic(cluster: &Cluster, nic: Nic) -> u64 {
    (0..3).map(|host| cluster.hosts.as_ref().expect("hosts").traffic(host, nic)).sum()
}

/// All replicas hold `data`, read through every node.
fn assert_everywhere(cluster: &mut Cluster, vdi: &Vdi, data: &[u8]) {
    for node in 0..3 {
        let mut client = cluster.nodes[node].client();
        assert!(vdi.read(&mut client, 0, data.len()).expect("read") == data, "node {node}");
    }
    assert!(cluster.compare_replicas(3).missing.is_empty());
}

#[test]
fn replicas_travel_by_the_io_network_and_by_the_other_one_while_it_is_cut() {
    if in_own_network("hosts::replicas_travel_by_the_io_network_and_by_the_other_one_while_it_is_cut") {
        return;
    }
    let mut cluster = Builder::new(3).zookeeper(TIMEOUT).on_hosts().start();
    // Bound to the cluster network alone, and to the I/O network with the port given.
    let node = &cluster.nodes[0];
    let connects = |ip: &str, port: u16| std::net::TcpStream::connect((ip, port)).is_ok();
    assert!(connects("10.9.0.1", node.port) && connects("10.9.1.1", node.port + 1));
    assert!(!connects("10.9.1.1", node.port) && !connects("10.9.0.1", node.port + 1));

    let mut client = cluster.nodes[0].client();
    let before = (traffic(&cluster, Nic::Cluster), traffic(&cluster, Nic::Io));
    let (mut vdi, mut data) = volume(&mut client);
    let after = (traffic(&cluster, Nic::Cluster), traffic(&cluster, Nic::Io));
    // Two copies of 8 MiB leave the first host and arrive at two others.
    let (main, io) = (after.0 - before.0, after.1 - before.1);
    assert!(io > 32 << 20 && main < 8 << 20, "cluster network {main}, I/O network {io}");

    // One I/O interface is cut in the middle of the work: nobody leaves, the writes go on by the other network.
    let epoch = cluster.epoch(0);
    cut(&cluster, 1, &[Nic::Io]);
    let begin = Instant::now();
    data[..4 << 20].copy_from_slice(&pattern(2, 4 << 20));
    vdi.write(&mut client, 0, &data[..4 << 20]).expect("write");
    eprintln!("the write that met the cut took {:?}", begin.elapsed());
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    assert_eq!(cluster.epoch(0), epoch);

    // Healed: it is used again without a restart.
    heal(&cluster, 1, &[Nic::Io]);
    let healed = cluster.hosts.as_ref().expect("hosts").traffic(1, Nic::Io);
    wait("the I/O network of host 1 is used again", || {
        vdi.write(&mut client, 4 << 20, &data[4 << 20..5 << 20]).expect("write");
        cluster.hosts.as_ref().expect("hosts").traffic(1, Nic::Io) > healed + (2 << 20)
    });
    assert_everywhere(&mut cluster, &vdi, &data);
}

/// Writes these blocks again and again until the healing, for which the last write waits. Gives the times of the
/// acknowledgements before.
fn write_until_healed(
    vdi: &mut Vdi,
    client: &mut Client,
    blocks: &[u64],
    begin: Instant,
    healed: &AtomicBool,
) -> Vec<Duration> {
    let mut acknowledged = Vec::new();
    for block in blocks.iter().cycle() {
        vdi.write(client, *block << 22, &[2; 4096]).expect("write");
        if healed.load(Ordering::Acquire) {
            break;
        }
        acknowledged.push(begin.elapsed());
    }
    acknowledged
}

#[test]
fn over_zookeeper_a_cut_host_acknowledges_nothing_and_rejoins_when_healed() {
    if !in_own_network("hosts::over_zookeeper_a_cut_host_acknowledges_nothing_and_rejoins_when_healed") {
        hosts_cut_from_the_servers_acknowledge_nothing(&[0], &Nic::ALL);
    }
}

#[test]
fn over_zookeeper_a_host_with_the_io_network_alone_acknowledges_nothing() {
    if !in_own_network("hosts::over_zookeeper_a_host_with_the_io_network_alone_acknowledges_nothing") {
        hosts_cut_from_the_servers_acknowledge_nothing(&[0], &[Nic::Cluster]);
    }
}

#[test]
fn over_zookeeper_a_majority_that_does_not_reach_the_servers_acknowledges_nothing() {
    if !in_own_network(
        "hosts::over_zookeeper_a_majority_that_does_not_reach_the_servers_acknowledges_nothing",
    ) {
        hosts_cut_from_the_servers_acknowledge_nothing(&[1, 2], &[Nic::Cluster]);
    }
}

/// The other hosts go on, and what the cut ones acknowledged before that is there when they are back.
fn hosts_cut_from_the_servers_acknowledge_nothing(hosts: &[usize], nics: &[Nic]) {
    // One copy: some objects have their only home on a cut host, which could write them alone.
    let mut cluster = Builder::new(3).copies(1).zookeeper(TIMEOUT).on_hosts().start();
    let (vdi, held) = volume_of_single_copies(&mut cluster);
    let mut isolated: Vec<(usize, Client)> = hosts.iter().map(|h| (*h, cluster.nodes[*h].client())).collect();
    for (_, client) in &mut isolated {
        client.set_timeout(Duration::from_secs(90)).expect("set");
    }
    let other = (0..3).find(|h| !hosts.contains(h)).expect("a host that is not cut");
    hosts.iter().for_each(|host| cut(&cluster, *host, nics));
    let begin = Instant::now();
    let healed = AtomicBool::new(false);
    let acknowledged = std::thread::scope(|scope| {
        let mut writers = Vec::new();
        for (host, client) in &mut isolated {
            let (mut vdi, blocks, healed) = (vdi.clone(), &held[*host], &healed);
            writers.push(scope.spawn(move || write_until_healed(&mut vdi, client, blocks, begin, healed)));
        }
        wait("the others go on without them", || cluster.members(other).len() == 3 - hosts.len());
        let without = begin.elapsed();
        // They stay cut for a while, in which they must not acknowledge anything.
        std::thread::sleep(Duration::from_secs(3));
        healed.store(true, Ordering::Release);
        hosts.iter().for_each(|host| heal(&cluster, *host, nics));
        writers
            .into_iter()
            .map(|w| {
                let all = w.join().expect("writer");
                let last = all.last().copied().unwrap_or_default();
                eprintln!(
                    "others went on after {without:?}, {} acknowledgements, the last after {last:?}",
                    all.len()
                );
                assert!(last < without, "acknowledged {last:?} after the cut, others went on at {without:?}");
                last
            })
            .collect::<Vec<Duration>>()
    });
    cluster.wait_members(3);
    hosts.iter().for_each(|host| cluster.wait_status(*host, ClusterStatus::Ok));
    cluster.wait_recovered();
    // Read through another node.
    let mut client = cluster.nodes[other].client();
    for (host, last) in hosts.iter().zip(acknowledged) {
        let read = vdi.read(&mut client, held[*host][0] << 22, 4096).expect("read");
        assert!(last.is_zero() || read == [2; 4096], "host {host}");
    }
}

#[test]
fn over_zookeeper_the_host_that_reaches_the_servers_goes_on_when_the_majority_is_cut() {
    if in_own_network(
        "hosts::over_zookeeper_the_host_that_reaches_the_servers_goes_on_when_the_majority_is_cut",
    ) {
        return;
    }
    let mut cluster = Builder::new(3).zookeeper(TIMEOUT).on_hosts().start();
    let mut client = cluster.nodes[0].client();
    let (mut vdi, mut data) = volume(&mut client);
    for host in [1, 2] {
        cut(&cluster, host, &Nic::ALL);
    }
    wait("the remaining host goes on alone", || cluster.members(0).len() == 1);
    data[..65536].copy_from_slice(&pattern(3, 65536));
    vdi.write(&mut client, 0, &data[..65536]).expect("write");
    for host in [1, 2] {
        heal(&cluster, host, &Nic::ALL);
    }
    cluster.wait_members(3);
    cluster.wait_recovered();
    assert_everywhere(&mut cluster, &vdi, &data);
}

#[test]
fn over_corosync_a_cut_host_ends_and_the_majority_goes_on() {
    if in_own_network("hosts::over_corosync_a_cut_host_ends_and_the_majority_goes_on") {
        return;
    }
    let mut cluster = Builder::new(3).corosync().on_hosts().start();
    let mut client = cluster.nodes[0].client();
    let (mut vdi, mut data) = volume(&mut client);
    cut(&cluster, 2, &Nic::ALL);
    let begin = Instant::now();
    data[..65536].copy_from_slice(&pattern(4, 65536));
    vdi.write(&mut client, 0, &data[..65536]).expect("write");
    eprintln!("the write that met the cut took {:?}", begin.elapsed());
    let status = cluster.nodes[2].wait_exit(Duration::from_secs(30));
    assert_eq!(status.code(), Some(1));
    let log = cluster.nodes[2].log();
    assert!(
        log.contains("a number of leaving node (2) is larger than majority (2), network partition"),
        "{log}"
    );
    heal(&cluster, 2, &Nic::ALL);
    cluster.corosync.as_mut().expect("corosync").wait_formed();
    cluster.start(2);
    cluster.wait_members(3);
    cluster.wait_recovered();
    assert_everywhere(&mut cluster, &vdi, &data);
}

#[test]
fn over_corosync_nobody_acknowledges_when_every_host_is_alone() {
    if in_own_network("hosts::over_corosync_nobody_acknowledges_when_every_host_is_alone") {
        return;
    }
    let mut cluster = Builder::new(3).copies(1).corosync().on_hosts().start();
    let (vdi, held) = volume_of_single_copies(&mut cluster);
    let mut isolated: Vec<Client> = (0..3).map(|i| cluster.nodes[i].client()).collect();
    for host in [1, 2] {
        cut(&cluster, host, &Nic::ALL);
    }
    let begin = Instant::now();
    let acknowledged = std::thread::scope(|scope| {
        let mut writers = Vec::new();
        for (node, client) in isolated.iter_mut().enumerate() {
            let (mut vdi, blocks) = (vdi.clone(), &held[node]);
            writers.push(scope.spawn(move || {
                let mut last = Duration::ZERO;
                for block in blocks.iter().cycle() {
                    if vdi.write(client, *block << 22, &[2; 4096]).is_err() {
                        break;
                    }
                    last = begin.elapsed();
                }
                eprintln!("node {node}: last acknowledgement {last:?} after the cut");
                // Of three nodes corosync's token timeout is 1.65 s, the lease half as long again; a new ring needs 11/5.
                assert!(last < Duration::from_millis(3000), "node {node}: {last:?}");
                last
            }));
        }
        writers.into_iter().map(|w| w.join().expect("writer")).collect::<Vec<Duration>>()
    });
    for node in 0..3 {
        assert_eq!(cluster.nodes[node].wait_exit(Duration::from_secs(30)).code(), Some(1));
    }
    for host in [1, 2] {
        heal(&cluster, host, &Nic::ALL);
    }
    cluster.corosync.as_mut().expect("corosync").wait_formed();
    for node in 0..3 {
        cluster.start(node);
    }
    cluster.wait_members(3);
    cluster.wait_recovered();
    let mut client = cluster.nodes[1].client();
    for node in 0..3 {
        let read = vdi.read(&mut client, held[node][0] << 22, 4096).expect("read");
        assert!(acknowledged[node].is_zero() || read == [2; 4096], "node {node}");
    }
}
