//! Situations that once stopped a node or the whole cluster: they must pass in bounded time.

use std::time::Duration;

use sheepdog_proto::header::VdiRequest;
use sheepdog_proto::inode::table_offset;
use sheepdog_proto::{Flags, Oid, Opcode, Request, ResultCode};
use sheepdog_testkit::load::{Load, Region};
use sheepdog_testkit::vdi::name_payload;
use sheepdog_testkit::{Builder, Cluster, wait};

/// Cluster operations waiting at one node, more than it admits at once.
const WAITING: usize = 1600;

#[test]
fn more_waiting_operations_than_a_node_admits_do_not_keep_a_creation_from_its_own_announcement() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    client.set_timeout(Duration::from_secs(60)).expect("a longer timeout");
    // What is looked up, as requests that are sent without waiting have no order.
    client.create_vdi("known", 4 << 20).expect("create");
    let request =
        Request::new(Opcode::NEW_VDI).with_vdi(VdiRequest { vdi_size: 4 << 20, ..VdiRequest::zeroed() });
    for i in 0..8 {
        let name = name_payload(&format!("v{i}"), None);
        client.send(request.flag(Flags::WRITE).length(name.len()), &name).expect("send");
    }
    let lookup = Request::new(Opcode::GET_VDI_INFO).flag(Flags::WRITE);
    let name = name_payload("known", None);
    for _ in 0..WAITING {
        client.send(lookup.length(name.len()), &name).expect("send");
    }
    for i in 0..8 + WAITING {
        let (response, _) = client.receive().unwrap_or_else(|e| panic!("answer {i}: {e}"));
        assert_eq!(response.result, ResultCode::SUCCESS, "{}", response.opcode);
    }
    assert_eq!(cluster.nodes[1].client().lookup("v7", "", 0), client.lookup("v7", "", 0));
}

#[test]
fn a_node_told_to_end_while_it_serves_writes_ends_and_the_others_go_on() {
    let mut cluster = Cluster::new(4);
    let mut client = cluster.client();
    let vid = client.create_vdi("busy", 32 << 20).expect("create");
    let mut regions = Region::divide(&mut client, vid, 6).expect("regions");
    regions.iter_mut().for_each(|r| r.settle(&mut client));
    let ports = cluster.nodes.iter().map(|n| n.port).collect();
    let load = Load::start(regions, ports, 7);
    let begun = load.operations();
    sheepdog_testkit::wait("the writers' first writes", || load.operations() > begun + 50);
    let code = cluster.nodes[1].client().call(Request::new(Opcode::KILL_NODE), &[]).expect("answer").0.result;
    assert_eq!(code, ResultCode::SUCCESS);
    let status = cluster.nodes[1].wait_exit(Duration::from_secs(15));
    assert!(status.success(), "{status}");
    let at = load.operations();
    sheepdog_testkit::wait("writes after the node has gone", || load.operations() > at + 50);
    assert_eq!(cluster.stop(2), Some(0), "SIGTERM under load");
    let at = load.operations();
    sheepdog_testkit::wait("writes after two nodes have gone", || load.operations() > at + 50);
    let regions = load.stop();
    let mut client = cluster.client();
    for region in &regions {
        assert_eq!(region.verify(&mut client), Vec::<String>::new());
    }
}

#[test]
fn a_block_that_is_discarded_and_written_again_keeps_the_new_data() {
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    let vid = client.create_vdi("trim", 8 << 20).expect("create");
    let data = Oid::data(vid, 1);
    for round in 0..100u32 {
        let bytes = [round as u8 + 1; 4096];
        assert_eq!(client.create_obj(data, None, 0, &bytes).expect("create"), ResultCode::SUCCESS);
        let entry = table_offset(1) as u32;
        assert_eq!(
            client.write_obj(Oid::inode(vid), entry, &vid.get().to_le_bytes()).expect("map"),
            ResultCode::SUCCESS
        );
        let (response, read) = client.read_obj(data, 0, 4096).expect("read");
        assert_eq!(
            (response.result, read.as_slice()),
            (ResultCode::SUCCESS, bytes.as_slice()),
            "round {round}"
        );
        assert_eq!(client.write_obj(Oid::inode(vid), entry, &[0; 4]).expect("discard"), ResultCode::SUCCESS);
    }
}

#[test]
fn erasure_coded_data_survives_as_many_losses_as_there_are_parity_strips() {
    let mut cluster = Builder::new(6).erasure(4, 2).start();
    let letter = |i: u32| b'a' + (i.wrapping_mul(2_654_435_761) >> 13) as u8 % 26;
    let image: Vec<u8> = (0..9_000_001u32).map(letter).collect();
    cluster.dog(&["vdi", "create", "coded", "16M"]).ok();
    cluster.dog_in(&["vdi", "write", "coded", "777", &image.len().to_string()], &image).ok();
    let read = |cluster: &mut Cluster| {
        let len = image.len().to_string();
        cluster.dog(&["vdi", "read", "coded", "777", &len]).ok().into_bytes()
    };
    assert!(read(&mut cluster) == image, "before any loss");
    cluster.kill9(4);
    assert!(read(&mut cluster) == image, "one node just lost");
    cluster.wait_recovered();
    // Short of zones: parity that has a home is written all the same.
    let part: Vec<u8> = (0..5000u32).map(|i| letter(i).to_ascii_uppercase()).collect();
    cluster.dog_in(&["vdi", "write", "coded", "1000000", "5000"], &part).ok();
    let mut expected = image.clone();
    expected[1_000_000 - 777..1_000_000 - 777 + 5000].copy_from_slice(&part);
    cluster.start(4);
    cluster.wait_recovered();
    cluster.kill9(0);
    cluster.kill9(1);
    assert!(read(&mut cluster) == expected, "two other nodes lost");
    cluster.start(0);
    cluster.start(1);
    cluster.wait_recovered();
    assert!(read(&mut cluster) == expected, "all are back");
    let check = cluster.dog(&["vdi", "check", "coded"]).ok();
    assert_eq!(check.trim(), "finish check&repair coded");
}

/// A deletion looks for objects that may not exist. Whether they do is known when the recovery that follows a join has made its
/// list, which needs the joiner's table, which stands behind the deletion in the queue.
#[test]
fn a_deletion_does_not_wait_for_itself_when_a_node_joins() {
    let mut cluster = Builder::new(4).copies(3).start();
    cluster.client().create_vdi("vm", 16 << 20).expect("create");
    cluster.kill9(3);
    cluster.wait_gathered();
    let mut client = cluster.nodes[1].client();
    cluster.sigstop(2);
    let payload = name_payload("vm", Some(""));
    let request = Request::new(Opcode::DEL_VDI).flag(Flags::WRITE).length(payload.len());
    client.send(request, &payload).expect("send");
    wait("the deletion to begin", || cluster.nodes[1].log().contains("op=DEL_VDI"));
    cluster.start(3);
    wait("the join", || cluster.members(1).len() == 4);
    cluster.sigcont(2);
    assert_eq!(client.receive().expect("an answer").0.result, ResultCode::SUCCESS);
    cluster.wait_gathered();
}
