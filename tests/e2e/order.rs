//! Writes of several gateways to one object take effect in one order everywhere (spec 06, 14.2 P2; T6, T7).
//!
//! `SHEEPDOG_ORDER_ROUNDS` sets the number of rounds.

use std::sync::Barrier;

use sheepdog_proto::{Oid, ResultCode};
use sheepdog_testkit::{Builder, Client, Cluster};

fn rounds(default: u32) -> u32 {
    match std::env::var("SHEEPDOG_ORDER_ROUNDS") {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("SHEEPDOG_ORDER_ROUNDS={text}: not a number")),
        Err(_) => default,
    }
}

/// A cluster with an object of zeros, and clients at every node.
fn with_object(mut cluster: Cluster) -> (Cluster, Oid, Vec<Client>) {
    let vid = cluster.client().create_vdi("shared", 8 << 20).expect("create");
    let oid = Oid::data(vid, 0);
    let mut clients: Vec<Client> = cluster.nodes.iter().map(|n| n.client()).collect();
    assert_eq!(clients[0].create_obj(oid, None, 0, &[0; 65536]).expect("create"), ResultCode::SUCCESS);
    (cluster, oid, clients)
}

fn stamped(writer: u8, round: u32, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    for block in data.chunks_mut(512) {
        block.fill(writer);
        block[..4].copy_from_slice(&round.to_le_bytes());
    }
    data
}

/// Two gateways write overlapping 64 KiB at once, a third one reads: it never sees an older state after a newer one,
/// and all replicas are equal at the end of each round.
#[test]
fn overlapping_writes_through_two_gateways_leave_replicas_equal() {
    let (mut cluster, oid, clients) = with_object(Builder::new(4).copies(3).start());
    let rounds = rounds(300);
    let [mut a, mut b, mut c, mut d]: [Client; 4] = clients.try_into().ok().expect("four nodes");
    let barrier = Barrier::new(3);
    let (mut unequal, mut backwards) = (0, 0);
    std::thread::scope(|scope| {
        let barrier = &barrier;
        let write = move |client: &mut Client, writer: u8| {
            for round in 0..rounds {
                barrier.wait();
                let data = stamped(writer, round, 65536);
                let offset = u32::from(writer - 1) * 4096;
                assert_eq!(client.write_obj(oid, offset, &data).expect("write"), ResultCode::SUCCESS);
                barrier.wait();
            }
        };
        let (a, b) = (&mut a, &mut b);
        scope.spawn(move || write(a, 1));
        scope.spawn(move || write(b, 2));
        for round in 0..rounds {
            barrier.wait();
            // The overlap: written by one, then by the other. Seen states never alternate.
            let mut seen: Vec<Vec<u8>> = Vec::new();
            for turn in 0..4 {
                let client = if turn % 2 == 0 { &mut c } else { &mut d };
                let (response, data) = client.read_obj(oid, 4096, 61440).expect("read");
                assert_eq!(response.result, ResultCode::SUCCESS);
                if seen.last() != Some(&data) {
                    backwards += u32::from(seen.contains(&data));
                    seen.push(data);
                }
            }
            barrier.wait();
            let all: Vec<Vec<u8>> =
                [&mut c, &mut d].map(|client| client.read_obj(oid, 0, 65536 + 4096).expect("read").1).into();
            unequal += u32::from(all[0] != all[1]);
            let overlap = &all[0][4096..65536];
            let stamp = &overlap[..5];
            assert!(
                overlap.chunks(512).all(|block| &block[..5] == stamp),
                "round {round}: two writes are mixed"
            );
        }
    });
    assert_eq!((unequal, backwards), (0, 0), "of {rounds} rounds");
    cluster.assert_replicas_equal(3);
}

/// Two gateways write neighbouring 100 bytes of one stripe: neither update is lost.
#[test]
fn neighbours_in_one_stripe_survive_writes_through_two_gateways() {
    let (cluster, oid, clients) = with_object(Builder::new(3).erasure(2, 1).start());
    let rounds = rounds(300);
    let mut clients = clients.into_iter();
    let (mut a, mut b, mut c) =
        (clients.next().expect("a"), clients.next().expect("b"), clients.next().expect("c"));
    let barrier = Barrier::new(3);
    let mut lost = 0;
    std::thread::scope(|scope| {
        let barrier = &barrier;
        let write = move |client: &mut Client, offset: u32, writer: u8| {
            for round in 0..rounds {
                barrier.wait();
                let value = [writer ^ round as u8; 100];
                assert_eq!(client.write_obj(oid, offset, &value).expect("write"), ResultCode::SUCCESS);
                barrier.wait();
            }
        };
        let (a, b) = (&mut a, &mut b);
        scope.spawn(move || write(a, 10, 0x55));
        scope.spawn(move || write(b, 310, 0xaa));
        for round in 0..rounds {
            barrier.wait();
            barrier.wait();
            let (response, data) = c.read_obj(oid, 0, 512).expect("read");
            assert_eq!(response.result, ResultCode::SUCCESS);
            let whole = |range: &[u8], writer: u8| range.iter().all(|b| *b == writer ^ round as u8);
            lost += u32::from(!whole(&data[10..110], 0x55)) + u32::from(!whole(&data[310..410], 0xaa));
        }
    });
    assert_eq!(lost, 0, "of {rounds} rounds");
    drop(cluster);
}

/// A gateway that is alone again goes on directly: what it does needs no other node than the homes.
#[test]
fn a_vdi_used_by_one_gateway_after_another_is_right_at_both() {
    let (_cluster, oid, mut clients) = with_object(Builder::new(3).copies(2).start());
    for round in 0..30u32 {
        let writer = (round % 3) as usize;
        let data = stamped(writer as u8, round, 4096);
        assert_eq!(clients[writer].write_obj(oid, 8192, &data).expect("write"), ResultCode::SUCCESS);
        for client in &mut clients {
            assert_eq!(client.read_obj(oid, 8192, 4096).expect("read").1, data, "round {round}");
        }
    }
}
