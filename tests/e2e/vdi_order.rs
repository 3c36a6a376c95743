//! VDI operations through one node against table updates through another: they take effect in one order (spec 05, 26).

use sheepdog_proto::header::{ObjRequest, VdiRequest};
use sheepdog_proto::inode::{TABLE_OFFSET, table_offset};
use sheepdog_proto::{ClusterFlags, Oid, Opcode, Request, ResultCode, VdiId, VdiState, Wire};
use sheepdog_testkit::{Builder, Client, Cluster, Vdi, wait};

use crate::vdi_model::audit;

const BLOCK: u64 = 1 << 20;
const ROUNDS: u32 = 12;

fn delete(client: &mut Client, name: &str, snapid: u32) {
    let response = client.vdi_op(Opcode::DEL_VDI, name, None, VdiRequest { snapid, ..VdiRequest::zeroed() });
    assert_eq!(response.result, ResultCode::SUCCESS, "{name} {snapid}");
}

fn wait_empty(cluster: &Cluster) {
    wait("all objects but inodes to be gone", || {
        (0..cluster.nodes.len()).all(|i| cluster.objects_of(i).keys().all(|oid| oid.is_inode()))
    });
}

/// A block as an inode names it: its first byte, or `None` for a hole. Panics if it names what is not there.
fn first_byte(client: &mut Client, vid: VdiId, index: u32) -> Option<u8> {
    let vdi = Vdi::open(client, vid).expect("open");
    if vdi.table[index as usize] == 0 {
        return None;
    }
    let bytes = vdi
        .read(client, u64::from(index) * BLOCK, 1)
        .unwrap_or_else(|e| panic!("{vid:?} block {index}: {e}"));
    Some(bytes[0])
}

/// A discard either comes before the snapshot, and the block is in neither, or is refused and it is in both.
#[test]
fn a_discard_is_before_a_snapshot_or_refused() {
    let mut cluster = Builder::new(3).block_size_shift(20).start();
    let mut client = cluster.nodes[0].client();
    let mut vid = client.create_vdi("vm", 4 * BLOCK).expect("create");
    let mut refused = 0;
    for round in 1..=ROUNDS {
        let mut vdi = Vdi::open(&mut client, vid).expect("open");
        for block in 0..4 {
            vdi.write(&mut client, block * BLOCK, &[round as u8; 512]).expect("write");
        }
        let results: Vec<ResultCode> = std::thread::scope(|scope| {
            let discards: Vec<_> = (0..4_u32)
                .map(|index| {
                    let mut other = cluster.nodes[1 + index as usize % 2].client();
                    scope.spawn(move || {
                        let body = ObjRequest { oid: Oid::data(vid, index), ..ObjRequest::zeroed() };
                        other.must(Request::new(Opcode::DISCARD_OBJ).with_obj(body), &[]).0.result
                    })
                })
                .collect();
            client.snapshot("vm", &format!("s{round}")).expect("snapshot");
            discards.into_iter().map(|d| d.join().expect("no panic")).collect()
        });
        let (old, new) = (vid, client.lookup("vm", "", 0).expect("the working VDI"));
        for (index, result) in (0..).zip(results) {
            let both = (first_byte(&mut client, old, index), first_byte(&mut client, new, index));
            let expected = match result {
                ResultCode::SUCCESS => None,
                ResultCode::READONLY => Some(round as u8),
                other => panic!("discard: {other}"),
            };
            refused += u32::from(result == ResultCode::READONLY);
            assert_eq!(both, (expected, expected), "round {round}, block {index}: {result}");
        }
        vid = new;
    }
    eprintln!("{refused} of {} discards were refused", 4 * ROUNDS);
    audit::assert_exact(&mut cluster, 4, false);
    for id in (1..=ROUNDS).chain([0]) {
        delete(&mut client, "vm", id);
    }
    wait_empty(&cluster);
}

/// A tool clears a snapshot's table through one node, as `dog vdi delete` does, while another node clones it: whatever
/// the clone names is there.
/// A client that was there before the snapshot clears entries of what is the working VDI to it, as QEMU discards; one that
/// comes later clears the snapshot's, as `dog` and QEMU delete.
#[test]
fn who_does_not_know_of_a_snapshot_cannot_clear_its_entries() {
    let cluster = Builder::new(3).block_size_shift(20).start();
    let mut client = cluster.nodes[0].client();
    let vid = client.create_vdi("vm", 4 * BLOCK).expect("create");
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    for block in 0..2 {
        vdi.write(&mut client, block * BLOCK, &[7; 512]).expect("write");
    }
    let discard = |client: &mut Client, vid: VdiId| {
        client.write_obj(Oid::inode(vid), table_offset(0) as u32, &[0; 4]).expect("an answer")
    };
    let mut old = cluster.nodes[1].client();
    old.inode(vid).expect("connected");
    let working = cluster.nodes[2].client().snapshot("vm", "s").expect("snapshot");
    assert_eq!(discard(&mut old, vid), ResultCode::READONLY);
    assert_eq!(discard(&mut old, working), ResultCode::SUCCESS);
    assert_eq!(first_byte(&mut client, vid, 0), Some(7));
    assert_eq!(first_byte(&mut client, working, 0), None);
    let mut new = cluster.nodes[1].client();
    assert_eq!(discard(&mut new, vid), ResultCode::SUCCESS);
    assert_eq!(first_byte(&mut client, vid, 0), None);
    delete(&mut client, "vm", 1);
    delete(&mut client, "vm", 0);
    wait_empty(&cluster);
}

#[test]
fn a_clone_of_a_snapshot_that_is_being_cleared_names_only_what_is_there() {
    let mut cluster = Builder::new(3).block_size_shift(20).start();
    let mut client = cluster.nodes[0].client();
    let mut whole = 0;
    for round in 0..ROUNDS {
        let name = format!("vm{round}");
        let base = client.create_vdi(&name, 8 * BLOCK).expect("create");
        let mut vdi = Vdi::open(&mut client, base).expect("open");
        for block in 0..8 {
            vdi.write(&mut client, block * BLOCK, &[7; 512]).expect("write");
        }
        client.snapshot(&name, "s").expect("snapshot");
        delete(&mut client, &name, 0);
        let clone = std::thread::scope(|scope| {
            let clears: Vec<_> = (0..8)
                .map(|index| {
                    let mut other = cluster.nodes[1 + index % 2].client();
                    scope.spawn(move || {
                        let offset = (TABLE_OFFSET + 4 * index) as u32;
                        other.write_obj(Oid::inode(base), offset, &[0; 4]).expect("an answer")
                    })
                })
                .collect();
            let clone = client.clone_vdi(base, &format!("clone{round}")).expect("clone");
            for clear in clears {
                assert_eq!(clear.join().expect("no panic"), ResultCode::SUCCESS);
            }
            clone
        });
        delete(&mut client, &name, 1);
        let blocks: Vec<Option<u8>> = (0..8).map(|i| first_byte(&mut client, clone, i)).collect();
        assert!(blocks.iter().all(|b| b.is_none_or(|b| b == 7)), "{blocks:?}");
        whole += blocks.iter().filter(|b| b.is_some()).count();
    }
    eprintln!("{whole} of {} blocks were cloned in time", 8 * ROUNDS);
    audit::assert_exact(&mut cluster, 8, false);
    for round in 0..ROUNDS {
        delete(&mut client, &format!("clone{round}"), 0);
    }
    wait_empty(&cluster);
}

fn snapshots(client: &mut Client) -> usize {
    let (_, bytes) = client.must(Request::new(Opcode::GET_VDI_COPIES).length(64 * VdiState::LEN), &[]);
    bytes.chunks_exact(VdiState::LEN).map(VdiState::get).filter(|s| s.snapshot != 0).count()
}

/// Strict mode with too few zones: a snapshot is refused before anybody hears of it, and the VDI goes on.
#[test]
fn a_refused_snapshot_leaves_the_vdi_as_it_was() {
    let mut cluster = Builder::new(3).flags(ClusterFlags::AUTO_VNODES.with(ClusterFlags::STRICT)).start();
    let mut client = cluster.client();
    let vid = client.create_vdi("vm", 8 << 20).expect("create");
    let mut vdi = Vdi::open(&mut client, vid).expect("open");
    vdi.write(&mut client, 0, &[1; 512]).expect("write");
    let snapshot = client.snapshot("vm", "s").expect("snapshot");
    cluster.kill9(2);
    cluster.wait_epoch(2);
    let body = VdiRequest { vdi_size: 8 << 20, base_vdi_id: snapshot, snapid: 1, ..VdiRequest::zeroed() };
    assert_eq!(client.vdi_op(Opcode::NEW_VDI, "vm", None, body).result, ResultCode::BASE_VDI_WRITE);
    let clone = VdiRequest { base_vdi_id: vid, snapid: 0, ..body };
    assert_eq!(client.vdi_op(Opcode::NEW_VDI, "other", None, clone).result, ResultCode::BASE_VDI_WRITE);
    assert_eq!(client.create_vdi("new", 8 << 20), Err(ResultCode::VDI_WRITE));
    for node in [0, 1] {
        assert_eq!(snapshots(&mut cluster.nodes[node].client()), 1, "node {node}");
    }
    cluster.start(2);
    cluster.wait_recovered();
    let mut working = Vdi::open(&mut client, snapshot).expect("open");
    working.write(&mut client, 0, &[2; 512]).expect("the working VDI takes writes");
    client.snapshot("vm", "t").expect("snapshot");
    assert!(client.create_vdi("new", 8 << 20).is_ok() && client.clone_vdi(vid, "other").is_ok());
    assert_eq!(vdi.read(&mut client, 0, 512).expect("the first snapshot"), [1; 512]);
    audit::assert_exact(&mut cluster, 2, false);
}
