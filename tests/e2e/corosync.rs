//! Daemons that find each other through corosync.

use std::time::{Duration, Instant};

use sheepdog_testkit::{Builder, Vdi, in_own_network, wait};

#[test]
fn a_cluster_over_corosync_formats_serves_loses_and_regains_a_node() {
    if in_own_network("corosync::a_cluster_over_corosync_formats_serves_loses_and_regains_a_node") {
        return;
    }
    let mut cluster = Builder::new(3).corosync().start();
    let mut client = cluster.client();
    let vid = client.create_vdi("v", 64 << 20).expect("create");
    let data: Vec<u8> = (0..8 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    vdi.write(&mut client, 0, &data).expect("write");
    let begin = Instant::now();
    cluster.kill9(2);
    wait("the death is noticed", || cluster.members(0).len() == 2);
    eprintln!("epoch without the dead node after {:?}", begin.elapsed());
    cluster.restart(2);
    cluster.wait_members(3);
    cluster.wait_epoch(3);
    cluster.wait_recovered();
    for node in 0..3 {
        let mut client = cluster.nodes[node].client();
        let vdi = Vdi::open(&mut client, vid).expect("open");
        assert!(vdi.read(&mut client, 0, data.len()).expect("read") == data, "node {node}");
    }
    assert!(cluster.compare_replicas(3).missing.is_empty());
    // An orderly stop of one of two members leaves the other one alone.
    assert_eq!(cluster.stop(0), Some(0));
    cluster.wait_epoch(4);
    assert_eq!(cluster.stop(1), Some(0));
    wait("the last one goes on", || cluster.epoch(2) == Some(5));
    // Shut down and started in another order, it is the same cluster at the same epoch.
    cluster.start(1);
    cluster.wait_epoch(6);
    cluster.wait_recovered();
    cluster.dog(&["cluster", "shutdown"]).ok();
    for node in [1, 2] {
        assert_eq!(cluster.nodes[node].wait_exit(Duration::from_secs(30)).code(), Some(0));
    }
    cluster.start(2);
    cluster.start(1);
    cluster.wait_members(2);
    cluster.wait_running();
    assert_eq!(cluster.epoch(1), Some(6));
}
