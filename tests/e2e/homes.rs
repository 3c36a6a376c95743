//! What homes do with writes of a gateway that the test plays: it decides which home gets which write, and when homes are
//! told that it is done (spec 06, 15.1 A3).

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::Duration;

use sheepdog_proto::header::{ForwardRequest, ObjRequest, OrderRequest, order};
use sheepdog_proto::{CopyPolicy, Epoch, Flags, Oid, Opcode, Request, ResultCode, VdiId};
use sheepdog_testkit::{Builder, Cluster, disk, wait};

const WRITER: u32 = 0x7e57;
/// Bytes of an object that are written, and of one of two data strips.
const LEN: usize = 64 << 10;
const STRIP: usize = LEN / 2;

/// A write of this gateway, for one home.
fn write(oid: Oid, strip: Option<usize>, seq: u32, epoch: u32, len: usize) -> Request {
    let policy = CopyPolicy::erasure(2, 1).expect("a valid policy").to_byte();
    let body = ObjRequest {
        oid,
        copies: 3,
        copy_policy: if strip.is_some() { policy } else { 0 },
        ec_index: strip.unwrap_or(0) as u8,
        tgt_epoch: Epoch(WRITER),
        write_seq: seq,
        ..ObjRequest::zeroed()
    };
    Request::new(Opcode::WRITE_PEER).flag(Flags::WRITE).epoch(Epoch(epoch)).with_obj(body).length(len)
}

fn must_write(cluster: &Cluster, node: usize, request: Request, data: &[u8]) {
    let (response, _) = cluster.nodes[node].client().must(request, data);
    assert_eq!(response.result, ResultCode::SUCCESS, "at node {node}");
}

/// Every write up to `highest` is done, except `open`. Gives whether something of ended epochs is undecided there.
fn done(cluster: &Cluster, node: usize, highest: u32, open: &[u32]) -> bool {
    let payload: Vec<u8> =
        std::iter::once(&WRITER).chain(open).flat_map(|number| number.to_le_bytes()).collect();
    let body = OrderRequest { what: order::DONE, serial: highest, ..OrderRequest::zeroed() };
    let request = Request::new(Opcode::ORDER_PEER).flag(Flags::WRITE).with_order(body).length(payload.len());
    let (response, _) = cluster.nodes[node].client().must(request, &payload);
    assert_eq!(response.result, ResultCode::SUCCESS);
    response.order().verdict != 0
}

fn created(cluster: &mut Cluster, blocks: u32, content: impl Fn(u32) -> u8) -> VdiId {
    let mut client = cluster.client();
    let vid = client.create_vdi("vm", u64::from(blocks) << 22).expect("create");
    for block in 0..blocks {
        let code = client.create_obj(Oid::data(vid, block), None, 0, &vec![content(block); LEN]);
        assert_eq!(code.expect("an answer"), ResultCode::SUCCESS, "block {block}");
    }
    vid
}

fn assert_content(cluster: &mut Cluster, oid: Oid, byte: u8) {
    for node in cluster.running() {
        let (response, data) = cluster.nodes[node].client().read_obj(oid, 0, LEN).expect("read");
        assert_eq!(response.result, ResultCode::SUCCESS, "{oid} at node {node}");
        assert!(data.iter().all(|b| *b == byte), "{oid} at node {node}: begins {:02x?}", &data[..4]);
    }
}

/// W-06: the home to be repaired has a write that its source may still have to carry out. A copy made now would lack it.
#[test]
fn a_repair_waits_for_writes_that_its_source_may_lack() {
    let mut cluster = Builder::new(3).copies(3).start();
    let oid = Oid::data(created(&mut cluster, 1, |_| 1), 0);
    let (target, source) = (1, 2);
    let request = write(oid, None, 1, 1, LEN);
    must_write(&cluster, target, request, &[2; LEN]);
    let members = cluster.members(0);
    let from = members.iter().find(|n| n.nid.port == cluster.nodes[source].port).expect("a member").nid;
    let body = ForwardRequest { oid, addr: from.addr, port: from.port };
    let mut repair = cluster.nodes[target].client();
    repair.send(Request::new(Opcode::REPAIR_REPLICA).with_forward(body), &[]).expect("send");
    // Time to be wrong in.
    repair.set_timeout(Duration::from_millis(500)).expect("timeout");
    match repair.receive() {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
        answer => panic!("it did not wait: {answer:?}"),
    }
    for node in [source, 0] {
        must_write(&cluster, node, request, &[2; LEN]);
    }
    (0..3).for_each(|node| assert!(!done(&cluster, node, 1, &[])));
    repair.set_timeout(Duration::from_secs(30)).expect("timeout");
    assert_eq!(repair.receive().expect("an answer").0.result, ResultCode::SUCCESS);
    assert_content(&mut cluster, oid, 2);
    cluster.assert_replicas_equal(3);
}

/// A lost disk is rebuilt in the epoch that goes on: of a write that is on all homes, some know that it is done, and what the
/// others give is without it.
#[test]
fn a_strip_is_rebuilt_from_strips_of_one_moment() {
    // Of the two homes that are left: those that were not told.
    for nr_untold in [1, 2] {
        let mut cluster = Builder::new(3).disks(2).erasure(2, 1).start();
        const BLOCKS: u32 = 16;
        // The last one is what the others look like afterwards.
        let vid = created(&mut cluster, BLOCKS, |block| if block == BLOCKS - 1 { 2 } else { 1 });
        let strips = cluster.strips();
        let model = &strips[&Oid::data(vid, BLOCKS - 1)];
        let new = |index: usize| -> Vec<u8> {
            let (_, path) = model.iter().find(|((_, i), _)| *i == index).expect("all strips");
            fs::read(path).expect("read")[..STRIP].to_vec()
        };
        let on_second_disk = |node: usize, path: &PathBuf| path.starts_with(&cluster.nodes[node].disks[1]);
        let found = strips.iter().find_map(|(oid, files)| {
            let ((node, _), _) = files.iter().find(|((node, _), path)| on_second_disk(*node, path))?;
            (oid.index() != BLOCKS - 1).then_some((*oid, *node))
        });
        let (oid, loser) = found.expect("a strip on some second disk");
        for (node, index) in strips[&oid].keys() {
            must_write(&cluster, *node, write(oid, Some(*index), 1, 1, STRIP), &new(*index));
        }
        let others: Vec<usize> = (0..3).filter(|node| *node != loser).collect();
        let (untold, told) = others.split_at(nr_untold);
        told.iter().chain([&loser]).for_each(|node| assert!(!done(&cluster, *node, 1, &[])));

        let disk = cluster.nodes[loser].disks.pop().expect("two disks");
        disk::remove(&disk);
        wait("the loss to be noticed", || {
            cluster.nodes[loser].log().contains(&format!("removed disk {}, ", disk.display()))
        });
        wait("the strip to be waited for", || {
            let state = cluster.recovery(loser).expect("an answer");
            state.nr_unfound > 0 || state.in_recovery == 0
        });
        untold.iter().for_each(|node| assert!(!done(&cluster, *node, 1, &[])));
        cluster.wait_recovered();
        cluster.assert_strips_agree(2, 1);
        assert_content(&mut cluster, oid, 2);
    }
}

/// A gateway forgets a write of which it knows no outcome only when homes say that nothing of it is undecided: a home that is
/// silent is waited for.
#[test]
fn a_home_says_that_it_is_undecided_about_a_write_of_an_epoch_that_is_over() {
    let mut cluster = Builder::new(4).erasure(2, 1).start();
    let oid = Oid::data(created(&mut cluster, 1, |_| 1), 0);
    let homes = cluster.homes(oid, 3);
    let spare = (0..4).find(|node| !homes.contains(node)).expect("four nodes");
    must_write(&cluster, homes[0], write(oid, Some(0), 1, 1, STRIP), &[2; STRIP]);
    assert!(!done(&cluster, homes[0], 1, &[1]), "the epoch goes on");
    cluster.sigstop(homes[1]);
    cluster.kill9(spare);
    wait("the next epoch", || cluster.epoch(homes[0]) == Some(2));
    assert!(done(&cluster, homes[0], 1, &[1]), "it waits for the silent home");
    cluster.sigcont(homes[1]);
    wait("a decision", || !done(&cluster, homes[0], 1, &[1]));
    cluster.wait_recovered();
    assert_content(&mut cluster, oid, 1);
    cluster.assert_strips_agree(2, 1);
}

/// One home has a write, the others are away: too few strips are left to give the object to anybody. What is decided then would
/// make their strips, which lack it, useless when they return.
#[test]
fn a_write_is_not_decided_about_while_too_few_strips_are_left() {
    let mut cluster = Builder::new(4).erasure(2, 1).start();
    let oid = Oid::data(created(&mut cluster, 1, |_| 1), 0);
    let homes = cluster.homes(oid, 3);
    must_write(&cluster, homes[0], write(oid, Some(0), 1, 1, STRIP), &[2; STRIP]);
    // Both at once: neither tells that it lacks the write.
    let away = [homes[1], homes[2]];
    away.iter().for_each(|home| cluster.sigstop(*home));
    away.iter().for_each(|home| cluster.kill9(*home));
    cluster.wait_members(2);
    cluster.wait_running();
    // Time to be wrong in: whoever leads tries again at least once a second.
    std::thread::sleep(Duration::from_secs(2));
    away.iter().for_each(|home| cluster.start(*home));
    cluster.wait_members(4);
    cluster.wait_gathered();
    assert_content(&mut cluster, oid, 1);
    cluster.assert_strips_agree(2, 1);
}

/// A home that has not heard of a VDI yet would take a strip of it for a replica.
#[test]
fn strips_of_a_vdi_that_a_home_does_not_know_are_refused_there() {
    let cluster = Cluster::new(3);
    let oid = Oid::data(VdiId::new(0xbeef), 0);
    let strip = write(oid, Some(1), 1, 1, STRIP);
    for opcode in [Opcode::CREATE_AND_WRITE_PEER, Opcode::WRITE_PEER] {
        let (response, _) = cluster.nodes[0].client().must(Request { opcode, ..strip }, &[1; STRIP]);
        assert_eq!(response.result, ResultCode::OLD_NODE_VER, "{opcode}");
    }
    assert_eq!(cluster.object_path(0, oid), None);
    // What it would take for itself it takes.
    let whole = Request { opcode: Opcode::CREATE_AND_WRITE_PEER, ..write(oid, None, 2, 1, STRIP) };
    must_write(&cluster, 0, whole, &[1; STRIP]);
}
