//! Building a ring of 256 nodes and placing objects on it and on the disks of a node.

use criterion::{Criterion, Throughput, criterion_main};
use sheepdog_placement::{Disk, DiskRing, Ring, Weights};
use sheepdog_proto::{NodeId, NodeRecord, Oid, VdiId};
use std::hint::black_box;
use std::net::IpAddr;

const NODES: u16 = 256;
const OBJECTS: u32 = 1_000_000;

fn nodes() -> Vec<NodeRecord> {
    (0..NODES)
        .map(|i| NodeRecord {
            nid: NodeId::new(IpAddr::from([10, 1, (i >> 8) as u8, i as u8]), 7000),
            nr_vnodes: 128,
            zone: i.into(),
            space: 0,
        })
        .collect()
}

fn all(c: &mut Criterion) {
    let ring = Ring::new(nodes(), Weights::Recorded).expect("few nodes");
    let disks: Vec<Disk> =
        (0..12).map(|i| Disk { path: format!("/disk{i}").into(), size: 8 << 40 }).collect();
    let disk_ring = DiskRing::new(disks).expect("few disks");
    let vid = VdiId::new(0x7c2b25);

    let mut group = c.benchmark_group("256 nodes x 128 vnodes");
    group.sample_size(10);
    group.bench_function("build", |b| b.iter(|| Ring::new(nodes(), Weights::FromSpace).expect("few nodes")));
    group.throughput(Throughput::Elements(OBJECTS.into()));
    for copies in [1, 3, 6, 31] {
        group.bench_function(format!("place 1M objects, {copies} copies"), |b| {
            b.iter(|| {
                for index in 0..OBJECTS {
                    black_box(ring.homes(Oid::data(vid, index), copies));
                }
            });
        });
    }
    group.bench_function("place 1M objects on 12 disks of 8 TiB", |b| {
        b.iter(|| {
            for index in 0..OBJECTS {
                black_box(disk_ring.disk_of(Oid::data(vid, index)));
            }
        });
    });
    group.finish();
}

mod benches {
    #![allow(missing_docs, reason = "the macro makes a public function without documentation")]
    criterion::criterion_group!(benches, super::all);
}
criterion_main!(benches::benches);
