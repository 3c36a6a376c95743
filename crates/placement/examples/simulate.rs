//! What a membership change costs in clusters too large to start: time to place, time to plan recovery, bytes moved.
//!
//! `cargo run --release -p sheepdog-placement --example simulate [NODES...]`; without arguments 256, 1024 and 6144.
//! Each node is its own zone, weights follow the space, three copies, 4 MiB objects. The optimum moves what the lost
//! node held, or what the new one has to hold, and nothing else.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use sheepdog_placement::{Ring, Weights};
use sheepdog_proto::{NodeId, NodeRecord, Oid, VdiId};

const COPIES: usize = 3;
/// Objects of the simulated cluster.
const OBJECTS: u32 = 1 << 20;
/// Bytes of one.
const OBJECT: u64 = 4 << 20;

fn node(i: usize) -> NodeRecord {
    let ip = Ipv4Addr::from(0x0a00_0001 + i as u32);
    NodeRecord {
        nid: NodeId::new(ip.into(), 7000),
        nr_vnodes: 128,
        zone: i as u32,
        // Disks differ a little, as they do.
        space: (1 << 40) + (((i as u64 * 2_654_435_761) % 97) << 30),
    }
}

fn objects() -> impl Iterator<Item = Oid> {
    (0..OBJECTS).map(|i| Oid::data(VdiId::new(0x10_0000 + i / 4096), i % 4096))
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let begin = Instant::now();
    let value = work();
    (value, begin.elapsed())
}

struct Change {
    build: Duration,
    /// Time of one node to find, among all objects, those that it has to hold.
    plan: Duration,
    moved: u64,
    optimum: u64,
}

fn change(before: &Ring, members: Vec<NodeRecord>, lost: Option<NodeId>) -> Change {
    let (after, build) = timed(|| Ring::new(members, Weights::FromSpace).expect("a valid list"));
    let mut moved = 0;
    let mut optimum = 0;
    for oid in objects() {
        let old: Vec<NodeId> = before.nodes_of(oid, COPIES).map(|n| n.nid).collect();
        moved += after.nodes_of(oid, COPIES).filter(|n| !old.contains(&n.nid)).count() as u64;
        optimum += u64::from(lost.is_some_and(|lost| old.contains(&lost)));
    }
    if lost.is_none() {
        let newcomer = after.nodes().iter().find(|n| before.index_of(&n.nid).is_none()).expect("one more");
        let index = after.index_of(&newcomer.nid).expect("a member");
        optimum = objects().filter(|oid| after.owns(*oid, COPIES, index, None)).count() as u64;
    }
    let (mine, plan) = timed(|| objects().filter(|oid| after.owns(*oid, COPIES, 0, None)).count());
    assert!(mine > 0, "every node holds something");
    Change { build, plan, moved: moved * OBJECT, optimum: optimum * OBJECT }
}

fn main() {
    let mut sizes: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    if sizes.is_empty() {
        sizes = vec![256, 1024, 6144];
    }
    println!("{OBJECTS} objects of 4 MiB, {COPIES} copies");
    println!("nodes  change  ring points  build ms  plan ms  moved GiB  optimum GiB  moved/optimum");
    for size in sizes {
        let all: Vec<NodeRecord> = (0..size).map(node).collect();
        let full = Ring::new(all.clone(), Weights::FromSpace).expect("a valid list");
        let lost = all[size / 2].nid;
        let fewer: Vec<NodeRecord> = all.iter().copied().filter(|n| n.nid != lost).collect();
        let small = Ring::new(fewer.clone(), Weights::FromSpace).expect("a valid list");
        let rows = [("leave", change(&full, fewer, Some(lost))), ("join", change(&small, all, None))];
        for (what, c) in rows {
            let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
            println!(
                "{size:5}  {what:6}  {:11}  {:8.1}  {:7.1}  {:9.1}  {:11.1}  {:13.2}",
                full.len(),
                c.build.as_secs_f64() * 1e3,
                c.plan.as_secs_f64() * 1e3,
                gib(c.moved),
                gib(c.optimum),
                c.moved as f64 / c.optimum.max(1) as f64
            );
        }
    }
}
