//! Creations of one block by several holders of a shared lock: what each of them was acknowledged stays (spec 05, 17).
//!
//! An iSCSI target creates a block that its table has not; with two targets both may do so at once. The second creation must
//! add to the first one, not replace it.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU32, Ordering};

use sheepdog_proto::header::{ObjRequest, VdiRequest};
use sheepdog_proto::{ClusterFlags, Flags, Oid, Opcode, Request, ResultCode, VdiId};
use sheepdog_testkit::{Builder, Client, Cluster, Vdi};

const SHARED: u32 = 1;
const SHIFT: u8 = 20;
const BLOCK: usize = 1 << SHIFT;
const PIECE: usize = 5000;

fn builder(nodes: usize) -> Builder {
    Builder::new(nodes).flags(ClusterFlags::AUTO_VNODES.with(ClusterFlags::USE_LOCK)).block_size_shift(SHIFT)
}

/// The part of a block that a writer writes: neighbours in one page, and in one stripe.
fn place(writer: u8) -> usize {
    12_345 + usize::from(writer) * PIECE
}

fn piece(writer: u8, block: u32) -> Vec<u8> {
    vec![(block as u8).wrapping_mul(2) ^ (0x40 << writer) | 1; PIECE]
}

fn create(
    client: &mut Client,
    vid: VdiId,
    cow: Option<VdiId>,
    block: u32,
    writer: u8,
) -> Result<(), ResultCode> {
    let cow = cow.map(|base| Oid::data(base, block));
    let code = client.create_obj(Oid::data(vid, block), cow, place(writer) as u32, &piece(writer, block));
    code.expect("an answer").ok()
}

fn lock(client: &mut Client, name: &str) -> VdiId {
    let body = VdiRequest { lock_type: SHARED, ..VdiRequest::zeroed() };
    let response = client.vdi_op(Opcode::LOCK_VDI, name, Some(""), body);
    assert_eq!(response.result, ResultCode::SUCCESS);
    let vid = response.vdi().vdi_id;
    refresh(client, vid);
    vid
}

/// As a target does before it uses its table.
fn refresh(client: &mut Client, vid: VdiId) {
    let body = ObjRequest { oid: Oid::inode(vid), ..ObjRequest::zeroed() };
    let read = Request::new(Opcode::READ_OBJ).flag(Flags::TGT).with_obj(body);
    assert_eq!(
        client.must(read.length(sheepdog_proto::inode::GREF_OFFSET), &[]).0.result,
        ResultCode::SUCCESS
    );
}

/// What a block holds after these writers, over `base`.
fn expected(block: u32, base: u8, writers: &[u8]) -> Vec<u8> {
    let mut all = vec![base; BLOCK];
    for writer in writers {
        all[place(*writer)..][..PIECE].copy_from_slice(&piece(*writer, block));
    }
    all
}

fn content(client: &mut Client, vid: VdiId, block: u32) -> Result<Vec<u8>, ResultCode> {
    let (response, data) = client.read_obj(Oid::data(vid, block), 0, BLOCK).expect("an answer");
    response.result.ok().map(|()| data)
}

fn assert_content(client: &mut Client, vid: VdiId, block: u32, expected: &[u8]) {
    let read = content(client, vid, block).expect("read");
    let differs = (0..BLOCK).find(|at| read[*at] != expected[*at]);
    assert_eq!(differs, None, "block {block}: first difference");
}

/// Clients at nodes 0 and 1 that share the VDI.
fn sharers(cluster: &Cluster, name: &str) -> (VdiId, [Client; 2]) {
    let mut clients = [0, 1].map(|node| cluster.nodes[node].client());
    let vids = clients.each_mut().map(|client| lock(client, name));
    assert_eq!(vids[0], vids[1]);
    (vids[0], clients)
}

/// Both create every block at the same moment, then tell the table, as targets do. Gives the blocks with lost writes.
fn race(clients: [Client; 2], vid: VdiId, cow: Option<VdiId>, blocks: u32) -> BTreeSet<u32> {
    let base = if cow.is_some() { b'b' } else { 0 };
    let barrier = Barrier::new(2);
    std::thread::scope(|scope| {
        let threads: Vec<_> = clients
            .into_iter()
            .enumerate()
            .map(|(writer, mut client)| {
                let barrier = &barrier;
                scope.spawn(move || {
                    let mut vdi = Vdi::open(&mut client, vid).expect("open");
                    let mut lost = BTreeSet::new();
                    // No panic in here: the other one would wait for ever.
                    for block in 0..blocks {
                        barrier.wait();
                        let created = create(&mut client, vid, cow, block, writer as u8);
                        barrier.wait();
                        let told = vdi.set_owner(&mut client, block, vid);
                        let read = content(&mut client, vid, block);
                        let right = read.as_deref() == Ok(&expected(block, base, &[0, 1]));
                        if created.is_err() || told.is_err() || !right {
                            let kept =
                                read.map(|data| [0, 1].map(|w| data[place(w)..][..PIECE] == piece(w, block)));
                            eprintln!("writer {writer}, block {block}: {created:?}, {told:?}, kept {kept:?}");
                            lost.insert(block);
                        }
                    }
                    lost
                })
            })
            .collect();
        threads.into_iter().flat_map(|t| t.join().expect("a writer")).collect()
    })
}

#[test]
fn both_creators_of_a_block_keep_their_writes() {
    let mut cluster = builder(4).copies(3).start();
    cluster.client().create_vdi("shared", 128 << SHIFT).expect("create");
    let (vid, clients) = sharers(&cluster, "shared");
    assert_eq!(race(clients, vid, None, 128), BTreeSet::new());
    cluster.assert_replicas_equal(3);
    // Both told the table of the same blocks: each is counted once.
    cluster.dog(&["vdi", "delete", "shared"]).ok();
    sheepdog_testkit::wait("the blocks to be freed", || {
        (0..4).all(|node| cluster.objects_of(node).keys().all(|oid| !oid.is_data()))
    });
}

#[test]
fn both_creators_of_a_copy_keep_their_writes() {
    let mut cluster = builder(4).copies(3).start();
    let mut client = cluster.client();
    let base = client.create_vdi("shared", 64 << SHIFT).expect("create");
    let mut vdi = Vdi::open(&mut client, base).expect("open");
    for block in 0..64 {
        let code = client.create_obj(Oid::data(base, block), None, 0, &[b'b'; BLOCK]).expect("an answer");
        assert_eq!(code, ResultCode::SUCCESS);
        vdi.set_owner(&mut client, block, base).expect("map");
    }
    client.snapshot("shared", "s").expect("snapshot");
    let (vid, clients) = sharers(&cluster, "shared");
    assert_ne!(vid, base);
    assert_eq!(race(clients, vid, Some(base), 64), BTreeSet::new());
    cluster.assert_replicas_equal(3);
    for block in 0..64 {
        assert_content(&mut client, base, block, &[b'b'; BLOCK]);
    }
}

#[test]
fn both_creators_of_a_coded_block_keep_their_writes() {
    let mut cluster = builder(4).erasure(2, 1).start();
    cluster.client().create_vdi("shared", 96 << SHIFT).expect("create");
    let (vid, clients) = sharers(&cluster, "shared");
    assert_eq!(race(clients, vid, None, 96), BTreeSet::new());
    cluster.assert_strips_agree(2, 1);
    // Parity too: without any one node.
    cluster.kill9(3);
    cluster.wait_running();
    let mut client = cluster.client();
    for block in 0..96 {
        assert_content(&mut client, vid, block, &expected(block, 0, &[0, 1]));
    }
}

/// The homes of the block have changed between the two creations, and the new ones have not recovered it.
#[test]
fn a_creation_adds_to_a_block_that_is_still_to_be_recovered() {
    for coded in [false, true] {
        let builder = builder(5);
        let mut cluster = if coded { builder.erasure(2, 2).start() } else { builder.copies(3).start() };
        cluster.client().create_vdi("shared", 32 << SHIFT).expect("create");
        let (vid, [mut a, mut b]) = sharers(&cluster, "shared");
        for block in 0..32 {
            create(&mut a, vid, None, block, 0).expect("created");
        }
        cluster.dog(&["cluster", "recover", "disable"]).ok();
        cluster.kill9(4);
        cluster.wait_running();
        for block in 0..32 {
            create(&mut b, vid, None, block, 1).expect("created");
            eprintln!("block {block}, coded {coded}");
            assert_content(&mut a, vid, block, &expected(block, 0, &[0, 1]));
        }
        cluster.dog(&["cluster", "recover", "enable"]).ok();
        cluster.wait_gathered();
        match coded {
            true => cluster.assert_strips_agree(2, 2),
            false => cluster.assert_replicas_equal(3),
        }
    }
}

/// A creation that was cut short left fewer strips than the code needs: nothing of it was acknowledged, and nothing of it can
/// be recovered. The next one makes the block.
#[test]
fn a_creation_replaces_strips_that_make_no_block() {
    let mut cluster = builder(4).erasure(2, 2).start();
    cluster.client().create_vdi("shared", 4 << SHIFT).expect("create");
    let (vid, [mut a, _b]) = sharers(&cluster, "shared");
    for block in 0..2 {
        create(&mut a, vid, None, block, 0).expect("created");
    }
    let strips = cluster.strips();
    drop(a);
    cluster.kill9_all();
    for strips in strips.values() {
        for ((_, index), path) in strips {
            if *index != 1 {
                fs::remove_file(path).expect("removed");
            }
        }
    }
    (0..4).for_each(|node| cluster.start(node));
    cluster.wait_running();
    let (_, [mut a, _b]) = sharers(&cluster, "shared");
    create(&mut a, vid, None, 0, 1).expect("created");
    assert_content(&mut a, vid, 0, &expected(0, 0, &[1]));
    // The same when it is known to recovery already.
    cluster.kill9(1);
    cluster.wait_running();
    cluster.start(1);
    cluster.wait_members(4);
    create(&mut a, vid, None, 1, 1).expect("created");
    assert_content(&mut a, vid, 1, &expected(1, 0, &[1]));
    cluster.wait_gathered();
    cluster.assert_strips_agree(2, 2);
}

/// A gateway dies in the middle of its creations; the other target then writes to the same blocks.
#[test]
fn creations_of_a_gateway_that_died_are_added_to() {
    for coded in [false, true] {
        let builder = builder(5);
        let mut cluster = if coded { builder.erasure(2, 2).start() } else { builder.copies(3).start() };
        cluster.client().create_vdi("shared", 256 << SHIFT).expect("create");
        let (vid, [a, mut b]) = sharers(&cluster, "shared");
        let acknowledged = AtomicU32::new(0);
        let mut clients = vec![a];
        clients.extend((0..3).map(|_| cluster.nodes[0].client()));
        std::thread::scope(|scope| {
            // Four at once, so that some are cut short.
            for (lane, mut client) in (0..4).zip(clients) {
                let acknowledged = &acknowledged;
                scope.spawn(move || {
                    for block in (lane..64).step_by(4) {
                        let code =
                            client.create_obj(Oid::data(vid, block), None, place(0) as u32, &piece(0, block));
                        if !code.is_ok_and(ResultCode::is_ok) {
                            return;
                        }
                        acknowledged.fetch_add(1, Ordering::AcqRel);
                    }
                });
            }
            sheepdog_testkit::wait("some creations", || acknowledged.load(Ordering::Acquire) >= 16);
            cluster.kill9(0);
        });
        eprintln!("{} of 64 were acknowledged, coded {coded}", acknowledged.load(Ordering::Acquire));
        for block in 0..64 {
            create(&mut b, vid, None, block, 1).expect("created");
        }
        let kept = |block: u32, b: &mut Client| {
            let data = content(b, vid, block).expect("read");
            assert_eq!(data[place(1)..][..PIECE], piece(1, block), "block {block}");
            let first = &data[place(0)..][..PIECE];
            // What was not acknowledged is there as a whole or not at all.
            assert!(
                *first == piece(0, block) || first.iter().all(|byte| *byte == 0),
                "block {block} is torn"
            );
            u32::from(*first == piece(0, block))
        };
        let there: u32 = (0..64).map(|block| kept(block, &mut b)).sum();
        assert!(there >= acknowledged.load(Ordering::Acquire), "only {there} are left, coded {coded}");
        cluster.wait_gathered();
        match coded {
            true => cluster.assert_strips_agree(2, 2),
            false => cluster.assert_replicas_equal(3),
        }
    }
}

/// Who holds a VDI alone replaces what is there: what an unfinished request of its own, or a discard, left.
#[test]
fn without_a_shared_lock_a_creation_replaces_the_block() {
    let mut cluster = builder(3).copies(2).start();
    let vid = cluster.client().create_vdi("alone", 4 << SHIFT).expect("create");
    let mut client = cluster.nodes[1].client();
    for lock in [false, true] {
        if lock {
            let locked = client.vdi_op(Opcode::LOCK_VDI, "alone", Some(""), VdiRequest::zeroed());
            assert_eq!(locked.result, ResultCode::SUCCESS);
        }
        for writer in [0, 1] {
            create(&mut client, vid, None, 0, writer).expect("created");
            assert_content(&mut client, vid, 0, &expected(0, 0, &[writer]));
        }
    }
}
