//! Epoch fencing between daemons, and waiting in the right places (spec 01, 6.4; spec 04, 10.2; spec 06).

use std::io::ErrorKind;
use std::time::Duration;

use sheepdog_proto::header::ObjRequest;
use sheepdog_proto::{Epoch, Flags, Oid, Opcode, Request, ResultCode};
use sheepdog_testkit::{Cluster, Vdi};

fn peer(opcode: Opcode, oid: Oid, epoch: u32) -> Request {
    Request::new(opcode).with_obj(ObjRequest { oid, ..ObjRequest::zeroed() }).epoch(Epoch(epoch))
}

/// 22.10
#[test]
fn peers_refuse_the_past_and_wait_for_the_future() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    let vid = client.create_vdi("fenced", 4 << 20).expect("create");
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    vdi.write(&mut client, 0, &[1; 4096]).expect("write");
    let oid = Oid::data(vid, 0);

    let (response, data) = client.must(peer(Opcode::READ_PEER, oid, 0).length(512), &[]);
    assert_eq!((response.result, response.epoch.0, data.len()), (ResultCode::OLD_NODE_VER, 1, 0));
    let write = peer(Opcode::WRITE_PEER, oid, 0).flag(Flags::WRITE).length(512);
    assert_eq!(client.must(write, &[9; 512]).0.result, ResultCode::OLD_NODE_VER);

    let mut early = cluster.nodes[0].client();
    let id = early.send(peer(Opcode::READ_PEER, oid, 2).length(512), &[]).expect("send");
    early.set_timeout(Duration::from_secs(1)).expect("timeout");
    assert_eq!(early.receive().expect_err("it waits").kind(), ErrorKind::WouldBlock);
    cluster.kill9(2);
    cluster.wait_epoch(2);
    early.set_timeout(Duration::from_secs(60)).expect("timeout");
    let (response, data) = early.receive().expect("the epoch has come");
    assert_eq!((response.id, response.result, response.epoch.0), (id, ResultCode::SUCCESS, 2));
    assert_eq!(data, [1; 512], "the refused write left no trace");
}

/// 06, 3.6 and W-13: a silent peer delays only its own objects, and writes finish once it is expelled or goes on.
#[test]
fn a_frozen_node_delays_but_loses_nothing() {
    let mut cluster = Cluster::new(4);
    let mut client = cluster.nodes[0].client();
    let vid = client.create_vdi("frozen", 32 << 20).expect("create");
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    for block in 0..8 {
        vdi.write(&mut client, block << 22, &[1; 4096]).expect("write");
    }
    let frozen = 3;
    cluster.sigstop(frozen);
    let ring = cluster.ring();
    let port = cluster.nodes[frozen].port;
    let is_home = |block: u32| ring.nodes_of(Oid::data(vid, block), 3).any(|n| n.nid.port == port);
    for block in (0..8).filter(|b| !is_home(*b)) {
        let oid = Oid::data(vid, block);
        let result = client.write_obj(oid, 0, &[2; 4096]).expect("an object without the frozen home");
        assert_eq!(result, ResultCode::SUCCESS, "block {block}");
    }
    let with: Vec<u32> = (0..8).filter(|b| is_home(*b)).collect();
    let ids: Vec<u32> = with
        .iter()
        .map(|block| {
            let body = ObjRequest { oid: Oid::data(vid, *block), ..ObjRequest::zeroed() };
            let request = Request::new(Opcode::WRITE_OBJ).flag(Flags::WRITE).with_obj(body).length(4096);
            client.send(request, &[2; 4096]).expect("send")
        })
        .collect();
    cluster.sigcont(frozen);
    for _ in &ids {
        let (response, _) = client.receive().expect("an answer");
        assert!(ids.contains(&response.id));
        assert_eq!(response.result, ResultCode::SUCCESS);
    }
    cluster.wait_recovered();
    for block in 0..8u64 {
        for node in 0..4 {
            let read = vdi.read(&mut cluster.nodes[node].client(), block << 22, 4096).expect("read");
            assert_eq!(read, [2; 4096], "block {block} at node {node}");
        }
    }
    cluster.assert_replicas_equal(3);
}
