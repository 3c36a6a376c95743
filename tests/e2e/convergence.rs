//! Replicas become equal again after a gateway died between them (spec 06, 14.2 P4; T12).
//!
//! `SHEEPDOG_GATEWAY_KILLS` sets how often the gateway is killed.

use std::time::Duration;

use sheepdog_testkit::load::{Load, Region, Summary};
use sheepdog_testkit::wait::wait_for;
use sheepdog_testkit::{Builder, Cluster};

const WRITERS: usize = 8;
/// The node that writes and dies; it stores nothing, so no other replica is missing when it is gone.
const GATEWAY: usize = 3;

fn kills(default: u32) -> u32 {
    match std::env::var("SHEEPDOG_GATEWAY_KILLS") {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("SHEEPDOG_GATEWAY_KILLS={text}: not a number")),
        Err(_) => default,
    }
}

/// Kills the gateway again and again under load; `equal` looks at the stores of the others afterwards.
fn kill_gateway_under_load(mut cluster: Cluster, mut equal: impl FnMut(&mut Cluster) -> Result<(), String>) {
    let mut client = cluster.client();
    let vid = client.create_vdi("busy", WRITERS as u64 * (4 << 20)).expect("create");
    let mut regions = Region::divide(&mut client, vid, WRITERS).expect("regions");
    let kills = kills(6);
    let mut slowest = Duration::ZERO;
    for kill in 0..kills {
        let load = Load::start(regions, vec![cluster.nodes[GATEWAY].port], u64::from(kill) + 1);
        wait_for("writes", Duration::from_secs(30), || (load.operations() > 300).then_some(()));
        // Every second time one home is not fast enough to get the last writes.
        let slow = (kill % 2 == 1).then_some(kill as usize % GATEWAY);
        if let Some(home) = slow {
            cluster.sigstop(home);
            wait_for("writers stuck", Duration::from_secs(5), || {
                let now = load.operations();
                std::thread::sleep(Duration::from_millis(100));
                (load.operations() == now).then_some(())
            });
        }
        cluster.kill9(GATEWAY);
        if let Some(home) = slow {
            cluster.sigcont(home);
        }
        cluster.wait_members(GATEWAY);
        let begun = std::time::Instant::now();
        regions = load.stop();
        let mut last = String::new();
        let until = begun + Duration::from_secs(10);
        while let Err(difference) = equal(&mut cluster) {
            assert!(std::time::Instant::now() < until, "kill {kill}: {difference}");
            last = difference;
            std::thread::sleep(Duration::from_millis(50));
        }
        slowest = slowest.max(begun.elapsed());
        eprintln!("kill {kill}: equal after {:?} {last}", begun.elapsed());
        for region in regions.iter_mut() {
            region.settle(&mut cluster.client());
        }
        for node in 0..GATEWAY {
            let mut client = cluster.nodes[node].client();
            let lost: Vec<String> = regions.iter().flat_map(|r| r.verify(&mut client)).collect();
            assert!(lost.is_empty(), "kill {kill}, at node {node}: {lost:#?}");
        }
        cluster.restart(GATEWAY);
        cluster.wait_members(GATEWAY + 1);
    }
    let summary = Summary::of(&regions);
    assert!(summary.violations.is_empty(), "{:#?}", summary.violations);
    assert!(summary.errors.is_empty(), "{:#?}", summary.errors);
    eprintln!(
        "{kills} kills, {} writes acknowledged, {} of unknown outcome, equal after at most {slowest:?}",
        summary.acknowledged, summary.unknown
    );
}

#[test]
fn replicas_are_equal_soon_after_their_gateway_was_killed() {
    let cluster = Builder::new(4).gateway(GATEWAY).copies(3).start();
    kill_gateway_under_load(cluster, |cluster| {
        let found = cluster.compare_replicas(3);
        match (found.missing.is_empty(), found.differences.is_empty()) {
            (true, true) => Ok(()),
            _ => Err(format!("{:?} {:?}", found.missing, found.differences)),
        }
    });
}

fn strips_fit(cluster: &mut Cluster) -> Result<(), String> {
    let out = cluster.dog_at(0, &["vdi", "check", "busy"], b"").ok();
    match ["inconsistent", "missing", "failed"].iter().any(|word| out.contains(word)) {
        true => Err(out),
        false => Ok(()),
    }
}

/// All nodes are killed in the middle of writes: parity fits again after the start, and what was being written is there
/// or not, as a whole in every stripe.
#[test]
fn strips_fit_together_after_all_nodes_were_killed() {
    let mut cluster = Builder::new(3).erasure(2, 1).start();
    let mut client = cluster.client();
    let vid = client.create_vdi("busy", WRITERS as u64 * (4 << 20)).expect("create");
    let mut regions = Region::divide(&mut client, vid, WRITERS).expect("regions");
    for kill in 0..3 {
        let ports = cluster.nodes.iter().map(|n| n.port).collect();
        let load = Load::start(regions, ports, kill + 1);
        wait_for("writes", Duration::from_secs(30), || (load.operations() > 300).then_some(()));
        cluster.kill9_all();
        regions = load.stop();
        for node in 0..3 {
            cluster.spawn(node);
        }
        cluster.wait_running();
        wait_for("parity that fits", Duration::from_secs(10), || strips_fit(&mut cluster).ok());
        for region in regions.iter_mut() {
            region.settle(&mut cluster.client());
        }
        let lost: Vec<String> = regions.iter().flat_map(|r| r.verify(&mut cluster.client())).collect();
        assert!(lost.is_empty(), "{lost:#?}");
    }
}

#[test]
fn strips_fit_together_soon_after_their_gateway_was_killed() {
    let cluster = Builder::new(4).gateway(GATEWAY).erasure(2, 1).start();
    kill_gateway_under_load(cluster, strips_fit);
}

/// A write is on one home alone when its gateway and all other homes die: more than parity makes up for. However long they are
/// away, their strips are good when they return.
#[test]
fn strips_of_homes_that_were_away_for_long_are_not_given_up() {
    let mut cluster = Builder::new(4).gateway(GATEWAY).erasure(2, 1).start();
    let mut client = cluster.client();
    let vid = client.create_vdi("busy", WRITERS as u64 * (4 << 20)).expect("create");
    let mut regions = Region::divide(&mut client, vid, WRITERS).expect("regions");
    regions.iter_mut().for_each(|r| r.settle(&mut client));
    let load = Load::start(regions, vec![cluster.nodes[GATEWAY].port], 1);
    wait_for("writes", Duration::from_secs(30), || (load.operations() > 300).then_some(()));
    [1, 2].iter().for_each(|home| cluster.sigstop(*home));
    wait_for("writers stuck", Duration::from_secs(5), || {
        let now = load.operations();
        std::thread::sleep(Duration::from_millis(100));
        (load.operations() == now).then_some(())
    });
    [GATEWAY, 1, 2].iter().for_each(|node| cluster.kill9(*node));
    let regions = load.stop();
    // Longer than anything is waited for when it is decided about interrupted writes.
    std::thread::sleep(Duration::from_secs(23));
    [1, 2, GATEWAY].iter().for_each(|node| cluster.start(*node));
    cluster.wait_members(4);
    cluster.wait_gathered();
    for node in 0..4 {
        let mut client = cluster.nodes[node].client();
        let lost: Vec<String> = regions.iter().flat_map(|r| r.verify(&mut client)).collect();
        assert!(lost.is_empty(), "at node {node}: {lost:#?}");
    }
    cluster.assert_strips_agree(2, 1);
}
