//! What else than data blocks is coded, and disks that are unplugged, while nodes die or are being written to (spec 02, 11.2; 06).

use sheepdog_proto::header::VdiStateRequest;
use sheepdog_proto::{Oid, Opcode, Request, ResultCode, VdiId};
use sheepdog_testkit::load::{Load, Region, Summary};
use sheepdog_testkit::{Builder, Client, Cluster, Vdi, wait};

const BLOCK: u64 = 4 << 20;
const BLOCKS: u32 = 6;
/// Bytes of saved memory in an object.
const MEMORY: usize = 700_000;
/// Where a clone's block is overwritten, and by how much.
const CHANGED: std::ops::Range<usize> = 70_001..135_000;

fn byte(what: u32, index: u32) -> u8 {
    (what * 37 + index * 11 + 1) as u8
}

/// A snapshot, a clone of it, memory saved under both.
struct Machine {
    base: Vdi,
    clone: Vdi,
    saved: u32,
    keys: u32,
}

impl Machine {
    fn new(cluster: &mut Cluster) -> Machine {
        let mut client = cluster.client();
        let vid = client.create_vdi("base", u64::from(BLOCKS) * BLOCK).expect("create");
        let mut base = Vdi::open(&mut client, vid).expect("open");
        for block in 0..BLOCKS {
            let data = vec![byte(0, block); 200_000];
            base.write(&mut client, u64::from(block) * BLOCK, &data).expect("write");
        }
        client.snapshot("base", "s").expect("snapshot");
        let clone = client.clone_vdi(vid, "clone").expect("clone");
        let clone = Vdi::open(&mut client, clone).expect("open");
        Machine { base, clone, saved: 0, keys: 0 }
    }

    fn memory(&self, index: u32) -> Oid {
        Oid::vmstate(self.base.vid(), index)
    }

    /// Saves an object of memory and copies a block of the snapshot for the clone, if one is left.
    fn work(&mut self, client: &mut Client) {
        let code = client.create_obj(self.memory(self.saved), None, 0, &vec![byte(1, self.saved); MEMORY]);
        assert_eq!(code.expect("an answer"), ResultCode::SUCCESS);
        let block = self.saved;
        self.saved += 1;
        if block < BLOCKS {
            let data = vec![byte(2, block); CHANGED.len()];
            let at = u64::from(block) * BLOCK + CHANGED.start as u64;
            self.clone.write(client, at, &data).expect("copy on write");
        }
    }

    fn set_attribute(&mut self, cluster: &Cluster) {
        let (key, value) = (format!("key{}", self.keys), format!("value{}", self.keys));
        cluster.dog_at(0, &["vdi", "setattr", "clone", &key, &value], b"").ok();
        self.keys += 1;
    }

    fn assert_right(&self, cluster: &mut Cluster) {
        for node in cluster.running() {
            let mut client = cluster.nodes[node].client();
            for index in 0..self.saved {
                let (response, data) = client.read_obj(self.memory(index), 0, MEMORY).expect("read");
                assert_eq!(response.result, ResultCode::SUCCESS, "memory {index} at node {node}");
                assert!(data.iter().all(|b| *b == byte(1, index)), "memory {index} at node {node}");
            }
            for block in 0..BLOCKS {
                let mut right = vec![byte(0, block); 200_000];
                let at = u64::from(block) * BLOCK;
                assert!(self.base.read(&mut client, at, 200_000).expect("read") == right, "block {block}");
                if block < self.saved {
                    right[CHANGED].fill(byte(2, block));
                }
                let clone = self.clone.read(&mut client, at, 200_000).expect("read");
                assert!(clone == right, "block {block} of the clone at node {node}");
            }
            for key in 0..self.keys {
                let value =
                    cluster.dog_at(node, &["vdi", "getattr", "clone", &format!("key{key}")], b"").ok();
                assert_eq!(value, format!("value{key}"), "at node {node}");
            }
        }
    }
}

#[test]
fn memory_attributes_and_copied_blocks_are_right_after_the_loss_of_a_node() {
    let mut cluster = Builder::new(4).erasure(2, 1).start();
    let mut machine = Machine::new(&mut cluster);
    let mut client = cluster.nodes[0].client();
    for victim in [1, 2, 3] {
        machine.work(&mut client);
        machine.set_attribute(&cluster);
        // In the middle of one operation, and before anybody has noticed for those after it.
        let (mut own, mut other) = (client, cluster.nodes[0].client());
        let memory = machine.memory(1000 + victim as u32);
        let saving = std::thread::spawn(move || {
            (0..4).for_each(|n| {
                let code = other.create_obj(memory, None, n << 20, &vec![byte(3, n); 1 << 20]);
                assert_eq!(code.expect("an answer"), ResultCode::SUCCESS);
            });
        });
        cluster.kill9(victim);
        machine.work(&mut own);
        machine.set_attribute(&cluster);
        saving.join().expect("saved");
        machine.assert_right(&mut cluster);
        let (response, data) = own.read_obj(memory, 3 << 20, 1 << 20).expect("read");
        assert_eq!(response.result, ResultCode::SUCCESS);
        assert!(data.iter().all(|b| *b == byte(3, 3)));
        cluster.start(victim);
        cluster.wait_members(4);
        cluster.wait_gathered();
        machine.assert_right(&mut cluster);
        cluster.assert_strips_agree(2, 1);
        client = own;
    }
    assert!(machine.saved == 6 && machine.keys == 6);
}

/// `dog node md unplug` and `plug` of coded objects that are being written.
#[test]
fn disks_of_strips_are_unplugged_and_plugged_under_load() {
    let mut cluster = Builder::new(6).disks(2).erasure(4, 2).start();
    let mut client = cluster.client();
    let vid = client.create_vdi("load", 8 * BLOCK).expect("create");
    let mut regions = Region::divide(&mut client, vid, 4).expect("regions");
    regions.iter_mut().for_each(|r| r.settle(&mut client));
    let load = Load::start(regions, cluster.nodes.iter().map(|n| n.port).collect(), 3);
    let more_work = || {
        let before = load.operations();
        wait("more work", || load.operations() > before + 100);
    };
    more_work();
    let mut moved = 0;
    for node in 0..6 {
        let disk = cluster.nodes[node].disks[1].clone();
        let path = disk.display().to_string();
        let files = |cluster: &mut Cluster| {
            cluster.strips().values().flat_map(|f| f.values()).filter(|p| p.starts_with(&disk)).count()
        };
        moved += files(&mut cluster);
        cluster.dog_at(node, &["node", "md", "unplug", "-f", &path], b"").ok();
        let line = format!("unplugged {path}: all its objects are on the other disks");
        wait(&line, || cluster.nodes[node].log().contains(&line));
        assert_eq!(files(&mut cluster), 0);
        more_work();
        if node % 2 == 0 {
            let new = cluster.dir().join(format!("new-{node}"));
            cluster.dog_at(node, &["node", "md", "plug", &new.display().to_string()], b"").ok();
            cluster.nodes[node].disks[1] = new;
        } else {
            cluster.nodes[node].disks.pop();
        }
        more_work();
    }
    assert!(moved > 0);
    let regions = load.stop();
    cluster.wait_recovered();
    assert_eq!(cluster.epoch(0), Some(1));
    let summary = Summary::of(&regions);
    assert!(summary.violations.is_empty() && summary.errors.is_empty(), "{summary:#?}");
    cluster.assert_strips_agree(4, 2);
    for node in cluster.running() {
        let mut client = cluster.nodes[node].client();
        let lost: Vec<String> = regions.iter().flat_map(|r| r.verify(&mut client)).collect();
        assert!(lost.is_empty(), "at node {node}: {lost:#?}");
    }
    eprintln!("{} writes, {moved} strips on disks that were unplugged", summary.acknowledged);
}

fn create_and_check(cluster: &mut Cluster, vid: VdiId, block: u32) -> ResultCode {
    let mut client = cluster.client();
    let oid = Oid::data(vid, block);
    let code = client.create_obj(oid, None, 777, &vec![byte(4, block); 70_000]).expect("an answer");
    if code.is_ok() {
        assert_block(cluster, vid, block);
    }
    code
}

fn assert_block(cluster: &mut Cluster, vid: VdiId, block: u32) {
    let (response, data) = cluster.client().read_obj(Oid::data(vid, block), 777, 70_000).expect("read");
    assert_eq!(response.result, ResultCode::SUCCESS, "block {block}");
    assert!(data.iter().all(|b| *b == byte(4, block)), "block {block}");
}

/// A code works on as many zones as it has data strips, without redundancy; more of them give what was written earlier its
/// other strips. With fewer nothing is created.
#[test]
fn a_code_works_on_as_few_zones_as_it_has_data_strips() {
    let mut cluster = Builder::new(6).erasure(4, 2).start();
    let vid = cluster.client().create_vdi("coded", 8 * BLOCK).expect("create");
    for away in [5, 4, 3] {
        cluster.kill9(away);
        cluster.wait_gathered();
    }
    assert_eq!(create_and_check(&mut cluster, vid, 0), ResultCode::SYSTEM_ERROR, "three zones");
    cluster.start(3);
    cluster.wait_members(4);
    cluster.wait_gathered();
    assert_eq!(create_and_check(&mut cluster, vid, 1), ResultCode::SUCCESS, "four zones");
    for back in [4, 5] {
        cluster.start(back);
        cluster.wait_members(back + 1);
        cluster.wait_gathered();
    }
    assert_eq!(create_and_check(&mut cluster, vid, 2), ResultCode::SUCCESS, "six zones");
    cluster.assert_strips_agree(4, 2);
    for away in [0, 3] {
        cluster.kill9(away);
    }
    cluster.wait_running();
    [1, 2].iter().for_each(|block| assert_block(&mut cluster, vid, *block));
}

/// The widest codes, and on fewer zones than strips; small and large blocks.
#[test]
fn sixteen_data_strips_survive_as_many_losses_as_zones_are_left_over() {
    let mut cluster = Builder::new(18).erasure(16, 3).block_size_shift(20).start();
    let vid = cluster.client().create_vdi("coded", 4 << 20).expect("create");
    for block in 0..3 {
        assert_eq!(create_and_check(&mut cluster, vid, block), ResultCode::SUCCESS);
    }
    [2, 11].iter().for_each(|node| cluster.kill9(*node));
    cluster.wait_running();
    (0..3).for_each(|block| assert_block(&mut cluster, vid, block));
    assert_eq!(create_and_check(&mut cluster, vid, 3), ResultCode::SUCCESS);
    [2, 11].iter().for_each(|node| cluster.start(*node));
    cluster.wait_members(18);
    cluster.wait_gathered();
    (0..4).for_each(|block| assert_block(&mut cluster, vid, block));
}

#[test]
fn copies_of_a_coded_vdi_cannot_be_altered() {
    let mut cluster = Builder::new(4).erasure(2, 1).block_size_shift(25).start();
    let vid = cluster.client().create_vdi("coded", 64 << 20).expect("create");
    assert_eq!(create_and_check(&mut cluster, vid, 0), ResultCode::SUCCESS);
    let refused = cluster.dog(&["vdi", "alter-copy", "coded", "-c", "2", "-f"]);
    let text = "coded's copy policy is erasure code, changing it is not supported yet.\n";
    assert_eq!((refused.code, refused.stderr.as_str()), (1, text));
    // Whoever asks the daemons without asking the inode.
    let body = VdiStateRequest { new_vid: vid, copies: 2, block_size_shift: 25, ..VdiStateRequest::zeroed() };
    let request = Request::new(Opcode::ALTER_VDI_COPY).with_vdi_state(body);
    assert_eq!(cluster.client().must(request, &[]).0.result, ResultCode::INVALID_PARMS);
    cluster.wait_recovered();
    assert_block(&mut cluster, vid, 0);
    cluster.assert_strips_agree(2, 1);
}
