//! What a change of the members costs every node of a large cluster, with the daemon's own state machine.
//!
//! `cargo run --release -p sheep --example membership [NODES...]`; without arguments 256, 1024 and 6144.

use std::time::{Duration, Instant};

use sheep::cluster::state::{Startup, State};
use sheep::cluster::task::view_of;
use sheepdog_proto::config::StoreConfig;
use sheepdog_proto::header::ClusterRequest;
use sheepdog_proto::{ClusterFlags, Epoch, NodeId, NodeRecord};

/// Changes measured; the median is told.
const ROUNDS: usize = 9;
const STARTUP: Startup = Startup { gateway: false, auto_vnodes: true, wildcard: false };

fn node(number: usize) -> NodeRecord {
    let [_, _, a, b] = (number as u32).to_be_bytes();
    NodeRecord {
        nid: NodeId::new([10, 0, a, b].into(), 7000),
        nr_vnodes: 0,
        zone: number as u32,
        space: 4 << 40,
    }
}

fn state_of(number: usize) -> State {
    State::new(node(number), STARTUP, StoreConfig::default(), Epoch(0), Vec::new())
}

/// Node 0 of a formatted cluster.
fn formed(nodes: usize) -> State {
    let mut first = state_of(0);
    let members: Vec<NodeRecord> = (0..nodes).map(node).collect();
    let info = first.cluster_info();
    let answer = first.judge_join(&members[0], &[], &info, &mut Vec::new()).expect("the only node answers");
    first.accept(&members[0], members.clone(), answer);
    let format =
        ClusterRequest { ctime: 1, copies: 3, flags: ClusterFlags::AUTO_VNODES, ..ClusterRequest::zeroed() };
    first.format(&format, b"plain").expect("a valid request");
    first
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1000.0
}

fn timed<T>(times: &mut Vec<Duration>, work: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let value = work();
    times.push(begun.elapsed());
    value
}

fn measure(nodes: usize) {
    let mut state = formed(nodes);
    let before: Vec<NodeRecord> = (0..nodes).map(node).collect();
    let mut after = before.clone();
    after.push(node(nodes));
    let theirs = state_of(nodes).cluster_info();
    let [mut judged, mut joined, mut left] = [const { Vec::new() }; 3];
    let mut bytes = 0;
    for _ in 0..ROUNDS {
        let answer = timed(&mut judged, || {
            let answer = state.judge_join(&node(nodes), &before, &theirs, &mut Vec::new());
            let answer = answer.expect("a member answers");
            bytes = answer.encode_prefix().len();
            answer
        });
        timed(&mut joined, || {
            let actions = state.accept(&node(nodes), after.clone(), answer);
            (actions, view_of(&state))
        });
        timed(&mut left, || {
            let actions = state.leave(&node(nodes), before.clone());
            (actions, view_of(&state))
        });
    }
    assert_eq!(state.epoch(), Epoch(1 + 2 * ROUNDS as u32), "every change is an epoch");
    println!(
        "{nodes:5}  {:8.2}  {:7.1}  {:8.1}  {:13.0}",
        median(judged),
        median(joined),
        median(left),
        bytes as f64 / 1024.0
    );
}

fn main() {
    let mut sizes: Vec<usize> = std::env::args().skip(1).map(|a| a.parse().expect("a number")).collect();
    if sizes.is_empty() {
        sizes = vec![256, 1024, 6143]; // with the one that joins and leaves 6144, the limit
    }
    println!("nodes  judge ms  join ms  leave ms  answer KiB");
    sizes.into_iter().for_each(measure);
}
