//! Random operations on a cluster and on its model.

use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use sheepdog_proto::header::{ObjRequest, VdiRequest};
use sheepdog_proto::inode::TABLE_OFFSET;
use sheepdog_proto::{Flags, Oid, Opcode, Request, ResultCode, VdiId};
use sheepdog_testkit::load::{SLOT, pattern};
use sheepdog_testkit::vdi::name_payload;
use sheepdog_testkit::{Builder, Client, Cluster, Vdi, wait};

use super::audit;
use super::model::{BLOCK, Chain, Image, Model, PER_BLOCK, Snapshot};

/// Names in use at most.
const MAX_NAMES: usize = 6;
/// Snapshots in all at most.
const MAX_SNAPSHOTS: usize = 24;
/// Size of a VDI at most, in blocks.
const MAX_BLOCKS: u64 = 16;
/// The writer that the patterns name.
const WRITER: u32 = 1;

/// A VDI operation that may be cut.
#[derive(Debug, Clone)]
enum Operation {
    Create { name: String },
    Snapshot { name: String, tag: String },
    Clone { name: String, base: Image },
    Delete { name: String, snapid: u32 },
}

impl Operation {
    /// The result, if there is an answer.
    fn ask(&self, client: &mut Client) -> Option<ResultCode> {
        let new = |vdi_size, base_vdi_id, snapid| VdiRequest {
            vdi_size,
            base_vdi_id,
            snapid,
            ..VdiRequest::zeroed()
        };
        let (opcode, name, body) = match self {
            Operation::Create { name } => (Opcode::NEW_VDI, name, new(4 * BLOCK, VdiId::NONE, 0)),
            Operation::Snapshot { name, tag } => {
                let working = client.lookup(name, "", 0).ok()?;
                client.write_obj(Oid::inode(working), 256, &name_payload(tag, None)).ok()?.ok().ok()?;
                let size = client.inode(working).ok()?.vdi_size;
                (Opcode::NEW_VDI, name, new(size, working, 1))
            }
            Operation::Clone { name, base } => {
                (Opcode::NEW_VDI, name, new(base.blocks() * BLOCK, base.vid, 0))
            }
            Operation::Delete { name, snapid } => (Opcode::DEL_VDI, name, new(0, VdiId::NONE, *snapid)),
        };
        let payload = name_payload(name, None);
        let request = Request::new(opcode).flag(Flags::WRITE).with_vdi(body).length(payload.len());
        client.call(request, &payload).ok().map(|(response, _)| response.result)
    }
}

/// A cluster, its model, and where things stand.
pub struct Run {
    cluster: Cluster,
    client: Client,
    gateway: usize,
    random: SmallRng,
    model: Model,
    version: u32,
    names: u32,
    tags: u32,
    /// A killed node, and the steps until it is started again.
    down: Option<(usize, u32)>,
    killed: bool,
}

impl Run {
    /// A cluster of `nodes` with blocks of 1 MiB.
    pub fn start(nodes: usize, seed: u64) -> Run {
        let cluster = Builder::new(nodes).block_size_shift(20).start();
        Run {
            client: cluster.nodes[0].client(),
            cluster,
            gateway: 0,
            random: SmallRng::seed_from_u64(seed),
            model: Model::default(),
            version: 0,
            names: 0,
            tags: 0,
            down: None,
            killed: false,
        }
    }

    /// Kills a node now and then, the client's own too, and starts it again some steps later.
    pub fn disturb(&mut self) {
        match self.down {
            Some((node, 0)) => {
                self.cluster.start(node);
                self.down = None;
                if self.random.random_ratio(1, 2) {
                    self.cluster.wait_recovered();
                }
            }
            Some((node, steps)) => self.down = Some((node, steps - 1)),
            None if self.random.random_ratio(1, 8) => {
                self.cluster.wait_recovered(); // three copies survive one loss at a time
                let node = self.random.random_range(0..self.cluster.nodes.len());
                eprintln!("kill node {node}");
                self.cluster.kill9(node);
                self.killed = true;
                self.down = Some((node, self.random.random_range(0..6)));
                if node == self.gateway {
                    self.gateway = (node + 1) % self.cluster.nodes.len();
                    self.client = self.cluster.nodes[self.gateway].client();
                }
            }
            None => {}
        }
    }

    /// Now and then a VDI operation whose node is killed while it works on it.
    pub fn cut(&mut self) {
        if self.down.is_some() || !self.random.random_ratio(1, 12) {
            return;
        }
        self.cluster.wait_recovered();
        self.move_client();
        let Some((text, what)) = self.pick_operation() else { return };
        let node = self.gateway;
        let (mut client, operation) = (self.cluster.nodes[node].client(), what.clone());
        let asked = std::thread::spawn(move || operation.ask(&mut client));
        std::thread::sleep(Duration::from_micros(self.random.random_range(0..40_000)));
        eprintln!("kill node {node} in: {text}");
        self.cluster.kill9(node);
        let answer = asked.join().unwrap_or(None); // the kit panics where a connection ends
        self.killed = true;
        self.down = Some((node, self.random.random_range(0..6)));
        self.gateway = (node + 1) % self.cluster.nodes.len();
        self.cluster.wait_members(self.cluster.nodes.len() - 1);
        self.cluster.wait_recovered();
        self.client = self.cluster.nodes[self.gateway].client();
        self.learn(what, answer);
        self.model.prune();
    }

    fn pick_operation(&mut self) -> Option<(String, Operation)> {
        let what = match self.random.random_range(0..5) {
            0 => {
                self.names += 1;
                let name = format!("cut{}", self.names % 9);
                (!self.model.chains.contains_key(&name) && self.model.chains.len() < MAX_NAMES)
                    .then_some(Operation::Create { name })?
            }
            1 => {
                self.tags += 1;
                Operation::Snapshot { name: self.pick_working()?, tag: format!("tag{}", self.tags) }
            }
            2 => {
                let (source, index) = self.pick_snapshot()?;
                self.names += 1;
                let name = format!("cut{}", self.names % 9);
                let base = self.snapshot(&source, index).image.clone();
                (!self.model.chains.contains_key(&name) && self.model.chains.len() < MAX_NAMES)
                    .then_some(Operation::Clone { name, base })?
            }
            3 => {
                let name = self.pick_working()?;
                Operation::Delete { name, snapid: 0 }
            }
            _ => {
                let (name, index) = self.pick_snapshot()?;
                let snapid = self.snapshot(&name, index).image.snap_id;
                Operation::Delete { name, snapid }
            }
        };
        Some((format!("{what:?}").chars().take(60).collect(), what))
    }

    /// Finds out what became of an operation that may have been cut. What was acknowledged must be so.
    fn learn(&mut self, what: Operation, answer: Option<ResultCode>) {
        let acknowledged = answer == Some(ResultCode::SUCCESS);
        match what {
            Operation::Create { name } => {
                let found = self.client.lookup(&name, "", 0);
                assert!(found.is_ok() || !acknowledged, "{name}: {found:?}");
                if let Ok(vid) = found {
                    self.model.chains.entry(name).or_default().working = Some(Image::empty(vid, 1, 4));
                }
            }
            Operation::Clone { name, base } => {
                let found = self.client.lookup(&name, "", 0);
                assert!(found.is_ok() || !acknowledged, "{name}: {found:?}");
                if let Ok(vid) = found {
                    self.model.chains.entry(name).or_default().working = Some(base.derive(vid, 1));
                }
            }
            Operation::Snapshot { name, tag } => {
                // Other nodes find out whether the new working VDI was made when all is recovered.
                let settled = Instant::now() + Duration::from_secs(15);
                let mut found = self.client.lookup(&name, "", 0);
                while found == Err(ResultCode::NO_VDI) && Instant::now() < settled {
                    std::thread::sleep(Duration::from_millis(100));
                    found = self.client.lookup(&name, "", 0);
                }
                let chain = self.model.chains.get_mut(&name).expect("it was picked");
                let old = chain.working.take().expect("it was picked");
                if found == Ok(old.vid) {
                    assert!(!acknowledged, "{name}: no snapshot was taken");
                    chain.working = Some(old);
                    return self.wait_writable(&name);
                }
                match found {
                    Ok(vid) => chain.working = Some(old.derive(vid, old.snap_id + 1)),
                    // Base and child are written one after the other: the name can be made again from the snapshot.
                    Err(ResultCode::NO_VDI) if !acknowledged => {}
                    Err(code) => panic!("{name}: {code}"),
                }
                chain.snapshots.push(Snapshot { tag, image: old });
            }
            Operation::Delete { name, snapid } => {
                let again = VdiRequest { snapid, ..VdiRequest::zeroed() };
                let found = self.client.lookup(&name, "", snapid);
                assert!(found.is_err() || !acknowledged, "{name}: {found:?}");
                if found.is_ok() {
                    // Its table may be cleared in part.
                    let deleted = self.client.vdi_op(Opcode::DEL_VDI, &name, None, again).result;
                    assert_eq!(deleted, ResultCode::SUCCESS, "{name} {snapid}");
                }
                let chain = self.model.chains.get_mut(&name).expect("it was picked");
                match snapid {
                    0 => chain.working = None,
                    _ => chain.snapshots.retain(|s| s.image.snap_id != snapid),
                }
            }
        }
    }

    /// An announced snapshot that was not taken is taken back.
    fn wait_writable(&mut self, name: &str) {
        let image = self.working(name).clone();
        let running = self.cluster.running();
        for node in running {
            let mut client = self.cluster.nodes[node].client();
            // A write of nothing behind every table is refused for snapshots only.
            wait("the VDI to be writable", || {
                let oid = Oid::data(image.vid, 0);
                client.write_obj(oid, 0, &[]).expect("an answer") != ResultCode::READONLY
            });
        }
    }

    /// Moves the client to another node.
    fn move_client(&mut self) {
        self.cluster.wait_running(); // one that still joins refuses clients
        let running = self.cluster.running();
        self.gateway = *running.choose(&mut self.random).expect("a node runs");
        self.client = self.cluster.nodes[self.gateway].client();
    }

    fn pick_working(&mut self) -> Option<String> {
        self.model.working_names().choose(&mut self.random).cloned()
    }

    fn pick_snapshot(&mut self) -> Option<(String, usize)> {
        self.model.snapshots().choose(&mut self.random).cloned()
    }

    fn working(&mut self, name: &str) -> &mut Image {
        self.model.chains.get_mut(name).and_then(|c| c.working.as_mut()).expect("it was picked")
    }

    fn snapshot(&self, name: &str, index: usize) -> &Snapshot {
        &self.model.chains[name].snapshots[index]
    }

    fn dog(&self, args: &[&str]) -> String {
        let output = self.cluster.dog_at(self.gateway, args, &[]);
        assert_eq!((output.code, output.stderr.as_str()), (0, ""), "dog {args:?}: {}", output.stdout);
        output.stdout
    }

    fn lookup(&mut self, name: &str, snapid: u32) -> VdiId {
        self.client.lookup(name, "", snapid).unwrap_or_else(|e| panic!("{name} {snapid}: {e}"))
    }

    /// One random operation.
    pub fn step(&mut self, number: u64) {
        // Never so few VDIs that nothing happens.
        let few = self.model.working_names().len() < 3 && self.random.random();
        let what = if few { 0 } else { self.random.random_range(0..100) };
        let before = std::time::Instant::now();
        let done = match what {
            0..8 => self.create(),
            8..45 => self.write(),
            45..57 => self.take_snapshot(),
            57..65 => self.clone_snapshot(),
            65..70 => self.roll_back(),
            70..74 => self.roll_back_live(),
            74..78 => self.delete_working(),
            78..85 => self.delete_snapshot(),
            85..89 => self.resize(),
            89..94 => self.discard(),
            94..96 => self.rewrite_table(),
            96..98 => self.verify_one(),
            _ => {
                self.move_client();
                None
            }
        };
        if let Some(text) = done {
            eprintln!("{number} at node {}: {text} ({} ms)", self.gateway, before.elapsed().as_millis());
        }
        self.model.prune();
    }

    fn create(&mut self) -> Option<String> {
        let gone: Option<String> =
            self.model.chains.iter().find(|(_, c)| c.working.is_none()).map(|(n, _)| n.clone());
        let name = match gone {
            Some(name) if self.random.random() => name,
            _ if self.model.chains.len() < MAX_NAMES => {
                self.names += 1;
                // Few names, so that they come again after deletion.
                format!("vm{}", self.names % 9)
            }
            _ => return None,
        };
        if self.model.chains.get(&name).is_some_and(|c| c.working.is_some()) {
            let again = self.client.create_vdi(&name, BLOCK);
            assert_eq!(again, Err(ResultCode::VDI_EXIST), "{name}");
            return Some(format!("create {name}: exists"));
        }
        let blocks = self.random.random_range(1..=8);
        let vid = if self.random.random() {
            self.client.create_vdi(&name, blocks * BLOCK).unwrap_or_else(|e| panic!("create {name}: {e}"))
        } else {
            self.dog(&["vdi", "create", &name, &(blocks * BLOCK).to_string()]);
            self.lookup(&name, 0)
        };
        let chain = self.model.chains.entry(name.clone()).or_default();
        let image = Image::empty(vid, chain.next_snap_id(), blocks);
        chain.working = Some(image);
        Some(format!("create {name} {blocks} blocks: {:06x}", vid.get()))
    }

    fn write(&mut self) -> Option<String> {
        let name = self.pick_working()?;
        self.version += 1;
        let version = self.version;
        let (vid, slots) = (self.working(&name).vid, self.working(&name).slots.len() as u64);
        let first = self.random.random_range(0..slots);
        let count = self.random.random_range(1..=16).min(slots - first);
        let data: Vec<u8> = (first..first + count).flat_map(|s| pattern(WRITER, s, version)).collect();
        let mut vdi = Vdi::open(&mut self.client, vid).expect("open");
        vdi.write(&mut self.client, first * SLOT as u64, &data)
            .unwrap_or_else(|e| panic!("write {name}: {e}"));
        self.working(&name).slots[first as usize..(first + count) as usize].fill(version);
        Some(format!("write {name} {first}+{count}"))
    }

    fn take_snapshot(&mut self) -> Option<String> {
        if self.model.snapshots().len() >= MAX_SNAPSHOTS {
            return None;
        }
        let name = self.pick_working()?;
        self.tags += 1;
        let tag = format!("tag{}", self.tags);
        let vid = if self.random.random() {
            self.client.snapshot(&name, &tag).unwrap_or_else(|e| panic!("snapshot {name}: {e}"))
        } else {
            self.dog(&["vdi", "snapshot", &name, "-s", &tag]);
            self.lookup(&name, 0)
        };
        let chain = self.model.chains.get_mut(&name).expect("it was picked");
        let old = chain.working.take().expect("it was picked");
        chain.working = Some(old.derive(vid, old.snap_id + 1));
        let text = format!("snapshot {name} {tag}: {:06x} goes on as {:06x}", old.vid.get(), vid.get());
        chain.snapshots.push(Snapshot { tag, image: old });
        Some(text)
    }

    fn clone_snapshot(&mut self) -> Option<String> {
        if self.model.chains.len() >= MAX_NAMES {
            return None;
        }
        let (source, index) = self.pick_snapshot()?;
        let base = self.snapshot(&source, index).image.clone();
        self.names += 1;
        let name = format!("vm{}", self.names % 9);
        if self.model.chains.contains_key(&name) {
            return None;
        }
        let vid = if self.random.random() {
            self.client.clone_vdi(base.vid, &name).unwrap_or_else(|e| panic!("clone {name}: {e}"))
        } else {
            self.dog(&["vdi", "clone", &source, &name, "-s", &base.snap_id.to_string()]);
            self.lookup(&name, 0)
        };
        self.model
            .chains
            .insert(name.clone(), Chain { working: Some(base.derive(vid, 1)), snapshots: vec![] });
        Some(format!("clone {source} {} as {name}: {:06x}", base.snap_id, vid.get()))
    }

    fn roll_back(&mut self) -> Option<String> {
        let (name, index) = self.pick_snapshot()?;
        self.model.chains[&name].working.as_ref()?;
        let base = self.snapshot(&name, index).image.clone();
        let vid = if self.random.random() {
            let deleted = self.client.vdi_op(Opcode::DEL_VDI, &name, None, VdiRequest::zeroed());
            assert_eq!(deleted.result, ResultCode::SUCCESS, "{name}");
            self.client.clone_vdi(base.vid, &name).unwrap_or_else(|e| panic!("roll back {name}: {e}"))
        } else {
            self.dog(&["vdi", "rollback", &name, "-s", &base.snap_id.to_string(), "-f"]);
            self.lookup(&name, 0)
        };
        let chain = self.model.chains.get_mut(&name).expect("it was picked");
        chain.working = Some(base.derive(vid, chain.next_snap_id()));
        Some(format!("rollback {name} to {}: {:06x}", base.snap_id, vid.get()))
    }

    fn roll_back_live(&mut self) -> Option<String> {
        let (name, index) = self.pick_snapshot()?;
        let old = self.model.chains[&name].working.clone()?;
        let base = self.snapshot(&name, index).image.clone();
        let body = VdiRequest {
            vdi_size: base.blocks() * BLOCK,
            base_vdi_id: base.vid,
            snapid: 1,
            ..VdiRequest::zeroed()
        };
        let response = self.client.vdi_op(Opcode::NEW_VDI, &name, None, body);
        assert_eq!(response.result, ResultCode::SUCCESS, "live rollback of {name}");
        let vid = response.vdi().vdi_id;
        let chain = self.model.chains.get_mut(&name).expect("it was picked");
        chain.working = Some(base.derive(vid, old.snap_id + 1));
        chain.snapshots.push(Snapshot { tag: String::new(), image: old });
        Some(format!("live rollback {name} to {}: {:06x}", base.snap_id, vid.get()))
    }

    /// Deletes as dog does, or as a tool of another kind, or as QEMU does: with the table as it is.
    fn delete(&mut self, name: &str, image: &Image, snapid: u32) {
        let vid = image.vid;
        match self.random.random_range(0..3) {
            0 if snapid == 0 => drop(self.dog(&["vdi", "delete", name])),
            0 => drop(self.dog(&["vdi", "delete", name, "-s", &snapid.to_string()])),
            way => {
                if way == 1 {
                    let zeros = vec![0; 4 * image.blocks() as usize];
                    // Over a connection of its own: one from before the snapshot may not.
                    let mut tool = self.cluster.nodes[self.gateway].client();
                    let cleared = tool.write_obj(Oid::inode(vid), TABLE_OFFSET as u32, &zeros);
                    assert_eq!(cleared.expect("an answer"), ResultCode::SUCCESS, "{name}");
                }
                let body = VdiRequest { snapid, ..VdiRequest::zeroed() };
                let deleted = self.client.vdi_op(Opcode::DEL_VDI, name, None, body);
                assert_eq!((deleted.result, deleted.vdi().vdi_id), (ResultCode::SUCCESS, vid), "{name}");
            }
        }
    }

    fn delete_working(&mut self) -> Option<String> {
        let name = self.pick_working()?;
        let image = self.working(&name).clone();
        self.delete(&name, &image, 0);
        assert_eq!(self.client.lookup(&name, "", 0), Err(ResultCode::NO_VDI), "{name}");
        self.model.chains.get_mut(&name).expect("it was picked").working = None;
        Some(format!("delete {name}: {:06x}", image.vid.get()))
    }

    fn delete_snapshot(&mut self) -> Option<String> {
        let (name, index) = self.pick_snapshot()?;
        let image = self.snapshot(&name, index).image.clone();
        self.delete(&name, &image, image.snap_id);
        self.model.chains.get_mut(&name).expect("it was picked").snapshots.remove(index);
        Some(format!("delete {name} {}: {:06x}", image.snap_id, image.vid.get()))
    }

    fn resize(&mut self) -> Option<String> {
        let name = self.pick_working()?;
        let old = self.working(&name).blocks();
        let new = (old + self.random.random_range(1..4)).min(MAX_BLOCKS);
        if new == old {
            return None;
        }
        self.dog(&["vdi", "resize", &name, &(new * BLOCK).to_string()]);
        self.working(&name).slots.resize((new * PER_BLOCK) as usize, 0);
        Some(format!("resize {name} to {new} blocks"))
    }

    fn discard(&mut self) -> Option<String> {
        let name = self.pick_working()?;
        let (vid, blocks) = (self.working(&name).vid, self.working(&name).blocks());
        let index = self.random.random_range(0..blocks);
        if self.random.random() {
            let body = ObjRequest { oid: Oid::data(vid, index as u32), ..ObjRequest::zeroed() };
            let result = self.client.must(Request::new(Opcode::DISCARD_OBJ).with_obj(body), &[]).0.result;
            assert_eq!(result, ResultCode::SUCCESS, "discard {name} {index}");
        } else {
            let mut vdi = Vdi::open(&mut self.client, vid).expect("open");
            vdi.set_owner(&mut self.client, index as u32, VdiId::NONE).expect("discard");
        }
        let range = (index * PER_BLOCK) as usize..((index + 1) * PER_BLOCK) as usize;
        self.working(&name).slots[range].fill(0);
        Some(format!("discard {name} block {index}"))
    }

    /// The table written as it is: inherited entries keep their references (spec 05, 9).
    fn rewrite_table(&mut self) -> Option<String> {
        let name = self.pick_working()?;
        let vid = self.working(&name).vid;
        let vdi = Vdi::open(&mut self.client, vid).expect("open");
        let bytes: Vec<u8> = vdi.table.iter().flat_map(|v| v.to_le_bytes()).collect();
        let result = self.client.write_obj(Oid::inode(vid), TABLE_OFFSET as u32, &bytes);
        assert_eq!(result.expect("an answer"), ResultCode::SUCCESS, "{name}");
        Some(format!("table of {name} written again"))
    }

    fn verify_one(&mut self) -> Option<String> {
        let images = self.model.images();
        let (name, _, snapid, image) = *images.choose(&mut self.random)?;
        verify(&mut self.client, name, snapid, image);
        Some(format!("verify {name} {snapid}"))
    }

    /// Contents of everything, and the ledgers.
    pub fn audit(&mut self) {
        for (name, tag, snapid, image) in self.model.images() {
            verify(&mut self.client, name, snapid, image);
            if !tag.is_empty() {
                assert_eq!(self.client.lookup(name, tag, 0), Ok(image.vid), "{name} {tag}");
            }
        }
        audit::assert_exact(&mut self.cluster, MAX_BLOCKS as usize, self.killed);
    }

    /// Homes hold equal replicas of whatever is referenced; a killed node may have left more.
    fn compare_replicas(&mut self) {
        let referenced = audit::referenced(&mut self.cluster, MAX_BLOCKS as usize);
        let found = self.cluster.compare_replicas(3);
        let counts = |oid: &Oid| !self.killed || oid.is_inode() || referenced.contains(oid);
        let missing: Vec<_> = found.missing.iter().filter(|(oid, _)| counts(oid)).collect();
        let differ: Vec<_> = found.differences.iter().filter(|d| counts(&d.oid)).collect();
        assert!(missing.is_empty() && differ.is_empty(), "missing: {missing:?}, different: {differ:?}");
    }

    /// Everything is as the model says, checks find nothing, and when all is deleted nothing is left.
    pub fn finish(mut self) {
        if let Some((node, _)) = self.down.take() {
            self.cluster.start(node);
        }
        self.cluster.wait_recovered();
        self.audit();
        self.compare_replicas();
        let images: Vec<(String, u32, Image)> =
            self.model.images().into_iter().map(|(n, _, s, i)| (n.to_string(), s, i.clone())).collect();
        eprintln!("{} VDIs at the end, {} names", images.len(), self.model.chains.len());
        for (name, snapid, _) in &images {
            let snapid = snapid.to_string();
            let mut args = vec!["vdi", "check", name];
            if snapid != "0" {
                args.extend(["-s", &snapid]);
            }
            let text = self.dog(&args);
            let bad = ["fixed", "no node has", "no majority", "inconsistent"];
            assert!(!bad.iter().any(|b| text.contains(b)), "{args:?}: {text}");
        }
        for (name, snapid, image) in &images {
            self.delete(name, image, *snapid);
        }
        audit::assert_empty(&self.cluster);
    }
}

/// Panics unless a VDI is found by its name and holds what it must, read whole.
fn verify(client: &mut Client, name: &str, snapid: u32, image: &Image) {
    let place = format!("{name} {snapid} ({:06x})", image.vid.get());
    assert_eq!(client.lookup(name, "", snapid), Ok(image.vid), "{place}");
    let vdi = Vdi::open(client, image.vid).unwrap_or_else(|e| panic!("{place}: {e}"));
    let head = &vdi.header;
    assert_eq!((head.snap_id, head.is_snapshot()), (image.snap_id, snapid != 0), "{place}");
    assert_eq!(head.vdi_size, image.blocks() * BLOCK, "{place}");
    for block in 0..image.blocks() {
        let bytes =
            vdi.read(client, block * BLOCK, BLOCK as usize).unwrap_or_else(|e| panic!("{place}: {e}"));
        for (slot, bytes) in (block * PER_BLOCK..).zip(bytes.chunks(SLOT)) {
            let version = image.slots[slot as usize];
            assert!(bytes == pattern(WRITER, slot, version), "{place}: slot {slot} is not version {version}");
        }
    }
}
