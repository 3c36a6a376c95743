//! A cluster of many daemons on one machine: how long it takes to become and stay one, and what each daemon needs.

use std::time::{Duration, Instant};

use sheepdog_proto::header::ClusterRequest;
use sheepdog_proto::{ClusterFlags, VdiId};

use crate::client::Client;
use crate::cluster::{Builder, Cluster};
use crate::vdi::Vdi;
use crate::wait::{wait, wait_for};

/// How long an epoch change of a large cluster may take on a slow machine.
const PATIENCE: Duration = Duration::from_secs(300);
/// Bytes of the volume.
const VOLUME: u64 = 256 << 20;

/// What was measured.
#[derive(Debug)]
pub struct Figures {
    /// Daemons.
    pub nodes: usize,
    /// From the first start until everybody sees everybody.
    pub form: Duration,
    /// From MAKE_FS until everybody serves at epoch 1.
    pub format: Duration,
    /// From SIGKILL of the lost nodes until all others agree on an epoch without them.
    pub lose: Duration,
    /// From their start until all agree on an epoch with them.
    pub regain: Duration,
    /// From then until nobody recovers.
    pub recover: Duration,
    /// Largest resident set of a daemon, in bytes, at the end.
    pub rss: u64,
    /// Mean resident set, in bytes.
    pub mean_rss: u64,
    /// Most threads of a daemon.
    pub threads: u64,
    /// Processor time that all daemons together need in a second without work.
    pub idle: f64,
}

/// Starts `nodes` daemons, formats with three copies, writes a volume, kills the last `lost` nodes at once while it
/// writes, starts them again and verifies through several nodes.
pub fn run(nodes: usize, lost: usize) -> Figures {
    let begin = Instant::now();
    // The lost nodes are two zones, so that no object loses all of its three copies.
    let zones: Vec<u32> = (0..nodes).map(|i| (i / (lost / 2).max(1)) as u32).collect();
    let mut cluster = Builder::new(nodes).zones(&zones).unformatted().start();
    let form = begin.elapsed();
    let format = ClusterRequest {
        copies: 3,
        flags: ClusterFlags::AUTO_VNODES,
        block_size_shift: 22,
        ..ClusterRequest::zeroed()
    };
    let begin = Instant::now();
    cluster.format(format, "plain");
    agree(&mut cluster, nodes);
    let format = begin.elapsed();

    let mut client = cluster.client();
    let vid = client.create_vdi("scale", VOLUME).expect("create");
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    fill(&mut vdi, &mut client, 1);

    let begin = Instant::now();
    for node in nodes - lost..nodes {
        cluster.nodes[node].signal(nix::sys::signal::Signal::SIGKILL);
    }
    for node in nodes - lost..nodes {
        cluster.kill9(node);
    }
    agree(&mut cluster, nodes - lost);
    let lose = begin.elapsed();
    fill(&mut vdi, &mut client, 2);

    let begin = Instant::now();
    for node in nodes - lost..nodes {
        cluster.start(node);
    }
    agree(&mut cluster, nodes);
    let regain = begin.elapsed();
    let begin = Instant::now();
    cluster.wait_recovered();
    let recover = begin.elapsed();
    for node in [0, nodes / 2, nodes - 1] {
        verify(&mut cluster.nodes[node].client(), vid, 2);
    }
    let idle = idle(&cluster);
    let sizes: Vec<u64> = cluster.nodes.iter().map(|n| n.memory("VmRSS")).collect();
    Figures {
        nodes,
        form,
        format,
        lose,
        regain,
        recover,
        rss: sizes.iter().copied().max().unwrap_or(0),
        mean_rss: sizes.iter().sum::<u64>() / nodes as u64,
        threads: cluster.nodes.iter().map(|n| n.threads()).max().unwrap_or(0),
        idle,
    }
}

/// Waits until all running nodes serve at one epoch with `count` members.
fn agree(cluster: &mut Cluster, count: usize) {
    let running = cluster.running();
    assert_eq!(running.len(), count);
    wait_for(&format!("one epoch of {count} nodes"), PATIENCE, || {
        let first = cluster.info(running[0])?;
        let agreed = first.nodes.len() == count
            && running.iter().all(|i| {
                cluster.info(*i).is_some_and(|c| {
                    c.header.epoch == first.header.epoch
                        && c.nodes.len() == count
                        && c.header.status == sheepdog_proto::ClusterStatus::Ok as u8
                })
            });
        agreed.then_some(())
    });
}

fn block(object: u64, round: u8) -> [u8; 4096] {
    [(object as u8).wrapping_mul(31) ^ round; 4096]
}

fn fill(vdi: &mut Vdi, client: &mut Client, round: u8) {
    for object in 0..VOLUME >> 22 {
        vdi.write(client, object << 22, &block(object, round)).expect("write");
    }
}

fn verify(client: &mut Client, vid: VdiId, round: u8) {
    let vdi = Vdi::open(client, vid).expect("open");
    for object in 0..VOLUME >> 22 {
        let read = vdi.read(client, object << 22, 4096).expect("read");
        assert!(read == block(object, round), "object {object}");
    }
}

/// Processor seconds per second of all daemons over two seconds.
fn idle(cluster: &Cluster) -> f64 {
    let used = || cluster.nodes.iter().map(|n| n.cpu()).sum::<Duration>();
    let (begin, before) = (Instant::now(), used());
    wait("two seconds of rest", || begin.elapsed() > Duration::from_secs(2));
    (used() - before).as_secs_f64() / begin.elapsed().as_secs_f64()
}
