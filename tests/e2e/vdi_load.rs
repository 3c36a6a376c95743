//! Many VDIs, many snapshots, many clients at once (spec 05, section 26).
//!
//! `SHEEPDOG_MANY_SNAPSHOTS` and `SHEEPDOG_MANY_VDIS` set the numbers; times are printed.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use sheepdog_proto::header::VdiRequest;
use sheepdog_proto::inode::table_offset;
use sheepdog_proto::{ClusterFlags, Oid, Opcode, ResultCode, VdiId, Wire};
use sheepdog_testkit::binaries::system;
use sheepdog_testkit::load::{SLOT, pattern};
use sheepdog_testkit::{Builder, Client, Cluster, Vdi, wait_for};

use crate::vdi_model::audit;

const BLOCK: u64 = 1 << 20;

fn setting(name: &str, default: usize) -> usize {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text}: not a number")),
        Err(_) => default,
    }
}

fn delete(client: &mut Client, name: &str, snapid: u32) {
    let response = client.vdi_op(Opcode::DEL_VDI, name, None, VdiRequest { snapid, ..VdiRequest::zeroed() });
    assert_eq!(response.result, ResultCode::SUCCESS, "{name} {snapid}");
}

fn wait_empty(cluster: &Cluster) {
    wait_for("all objects but inodes to be gone", Duration::from_secs(120), || {
        let empty = |i: usize| cluster.objects_of(i).keys().all(|oid| oid.is_inode());
        (0..cluster.nodes.len()).all(empty).then_some(())
    });
}

#[test]
fn of_two_creators_of_one_name_one_wins() {
    let mut cluster = Cluster::new(3);
    let ports: Vec<u16> = cluster.nodes.iter().map(|n| n.port).collect();
    for round in 0..10 {
        let name = format!("wanted{round}");
        let results: Vec<Result<VdiId, ResultCode>> = std::thread::scope(|scope| {
            let create = |port: u16, name: String| {
                move || Client::connect(port).expect("connect").create_vdi(&name, BLOCK)
            };
            let threads: Vec<_> = ports.iter().map(|p| scope.spawn(create(*p, name.clone()))).collect();
            threads.into_iter().map(|t| t.join().expect("no panic")).collect()
        });
        let won: Vec<VdiId> = results.iter().filter_map(|r| r.ok()).collect();
        assert_eq!(won.len(), 1, "{results:?}");
        assert!(results.iter().all(|r| r.is_ok() || *r == Err(ResultCode::VDI_EXIST)), "{results:?}");
        for node in 0..3 {
            assert_eq!(cluster.nodes[node].client().lookup(&name, "", 0), Ok(won[0]), "node {node}");
        }
    }
    let list = cluster.dog(&["vdi", "list", "-r"]).ok();
    assert_eq!(list.lines().count(), 10, "{list}");
}

/// A client as QEMU is one: keeps its table over a snapshot and follows the name when it is told READONLY.
struct Machine {
    client: Client,
    name: String,
    vid: VdiId,
    table: Vec<u32>,
    reloads: u32,
}

impl Machine {
    fn open(port: u16, name: &str) -> Machine {
        let mut client = Client::connect(port).expect("connect");
        let vid = client.lookup(name, "", 0).expect("the VDI");
        let table = Vdi::open(&mut client, vid).expect("open").table;
        Machine { client, name: name.into(), vid, table, reloads: 0 }
    }

    fn reload(&mut self) {
        let vid = self.client.lookup(&self.name, "", 0).expect("the working VDI");
        assert_ne!(vid, self.vid, "READONLY, but the name leads to the same VDI");
        self.vid = vid;
        self.reloads += 1;
    }

    fn put_entry(&mut self, index: u32, owner: u32) {
        loop {
            let oid = Oid::inode(self.vid);
            let entry = VdiId::new(owner).encode();
            match self.client.write_obj(oid, table_offset(index) as u32, &entry).expect("an answer") {
                ResultCode::SUCCESS => return,
                ResultCode::READONLY => self.reload(),
                other => panic!("{}: table entry {index}: {other}", self.name),
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (index, inside) = ((offset / BLOCK) as u32, (offset % BLOCK) as u32);
        loop {
            let owner = self.table[index as usize];
            let oid = Oid::data(self.vid, index);
            let result = if owner == self.vid.get() {
                self.client.write_obj(oid, inside, data)
            } else {
                let source = (owner != 0).then(|| Oid::data(VdiId::new(owner), index));
                self.client.create_obj(oid, source, inside, data)
            };
            match result.expect("an answer") {
                ResultCode::SUCCESS if owner == self.vid.get() => return,
                ResultCode::SUCCESS => {
                    // The object is the old vid's even if the entry ends in another inode.
                    let created = self.vid.get();
                    self.table[index as usize] = created;
                    return self.put_entry(index, created);
                }
                ResultCode::READONLY => self.reload(),
                other => panic!("{}: block {index}: {other}", self.name),
            }
        }
    }
}

/// Writers through every node while snapshots are taken through every node: no write fails, none is lost, and each
/// snapshot holds for every slot a version from between what was acknowledged before and what was begun before its end.
#[test]
fn snapshots_under_heavy_writes_lose_nothing() {
    const BLOCKS: u64 = 4;
    const SLOTS: u64 = 8;
    let snapshots = setting("SHEEPDOG_LOAD_SNAPSHOTS", 12);
    let mut cluster = Builder::new(3).block_size_shift(20).start();
    let mut client = cluster.nodes[0].client();
    client.create_vdi("busy", 3 * BLOCKS * BLOCK).expect("create");
    let (stop, writes) = (AtomicBool::new(false), AtomicU32::new(0));
    let slots = 3 * BLOCKS * SLOTS;
    let fresh = || (0..slots).map(|_| AtomicU32::new(0)).collect::<Vec<_>>();
    let (begun, acknowledged) = (fresh(), fresh());
    let place = |slot: u64| slot / SLOTS * BLOCK + slot % SLOTS * (BLOCK / SLOTS);
    let values = |list: &[AtomicU32]| list.iter().map(|v| v.load(Ordering::SeqCst)).collect::<Vec<u32>>();
    let mut taken = Vec::new();
    let ports: Vec<u16> = cluster.nodes.iter().map(|n| n.port).collect();
    let ports = &ports;
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..3)
            .map(|w| {
                let port = ports[w as usize];
                let (stop, begun, acknowledged, writes) = (&stop, &begun, &acknowledged, &writes);
                scope.spawn(move || {
                    let mut machine = Machine::open(port, "busy");
                    let mut version = 0;
                    while !stop.load(Ordering::Relaxed) {
                        version += 1;
                        let slot = w * BLOCKS * SLOTS + u64::from(version) * 7 % (BLOCKS * SLOTS);
                        begun[slot as usize].store(version, Ordering::SeqCst);
                        machine.write(place(slot), &pattern(1, slot, version));
                        acknowledged[slot as usize].store(version, Ordering::SeqCst);
                        writes.fetch_add(1, Ordering::Relaxed);
                    }
                    (version, machine.reloads)
                })
            })
            .collect();
        for i in 0..snapshots {
            let before = values(&acknowledged);
            let mut client = cluster.nodes[i % 3].client();
            let tag = format!("s{i}");
            let started = Instant::now();
            client.snapshot("busy", &tag).unwrap_or_else(|e| panic!("snapshot {i}: {e}"));
            eprintln!("snapshot {i}: {} ms", started.elapsed().as_millis());
            taken.push((tag, before, values(&begun)));
            let now = writes.load(Ordering::Relaxed);
            wait_for("writes between two snapshots", Duration::from_secs(60), || {
                (writes.load(Ordering::Relaxed) > now + 60).then_some(())
            });
        }
        stop.store(true, Ordering::Relaxed);
        for writer in writers {
            let (writes, reloads) = writer.join().expect("no write failed");
            eprintln!("{writes} writes, {reloads} reloads");
            assert!(reloads > 0, "the writer never met a snapshot");
        }
    });
    let last = values(&acknowledged);
    taken.push((String::new(), last.clone(), last));
    for (tag, low, high) in &taken {
        let vid = client.lookup("busy", tag, 0).expect("it exists");
        let vdi = Vdi::open(&mut client, vid).expect("open");
        for slot in 0..slots {
            let bytes = vdi.read(&mut client, place(slot), SLOT).expect("read");
            let (low, high) = (low[slot as usize], high[slot as usize]);
            let found = (low..=high).any(|v| bytes == pattern(1, slot, v));
            assert!(found, "'{tag}' slot {slot} holds none of the versions {low} to {high}");
        }
    }
    audit::assert_exact(&mut cluster, 3 * BLOCKS as usize, false);
    for id in (0..=snapshots as u32).rev() {
        delete(&mut client, "busy", id);
    }
    wait_empty(&cluster);
}

/// As a running machine sees it: fio writes and verifies through NBD while snapshots are taken.
#[test]
fn a_verifying_writer_on_nbd_sees_no_snapshot() {
    let flags = ClusterFlags::AUTO_VNODES;
    let mut cluster = Builder::new(3).flags(flags).arg("--nbd").arg("unix:{dir}/nbd{i}.sock").start();
    cluster.client().create_vdi("vm", 32 << 20).expect("create");
    let uri = format!("nbd+unix:///vm?socket={}", cluster.dir().join("nbd0.sock").display());
    let size = "--size=24M";
    let child = Command::new(system("fio", "fio"))
        .args(["--name=vm", "--ioengine=nbd", "--rw=randwrite", "--bs=16k", "--iodepth=8", size])
        .args(["--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--randseed=1", "--loops=2"])
        .arg(format!("--uri={uri}"))
        .current_dir(cluster.dir())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("fio");
    let mut child = Some(child);
    let mut taken = 0;
    while child.as_mut().is_some_and(|c| c.try_wait().expect("fio").is_none()) {
        let mut client = cluster.nodes[taken % 3].client();
        client.snapshot("vm", &format!("s{taken}")).unwrap_or_else(|e| panic!("snapshot {taken}: {e}"));
        taken += 1;
        std::thread::sleep(Duration::from_millis(200)); // the pace of snapshots, nothing waits for it
        if taken == 25 {
            break;
        }
    }
    let output = child.take().expect("started").wait_with_output().expect("fio ends");
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    eprintln!("{taken} snapshots\n{text}");
    assert!(output.status.success() && taken > 0, "fio found something else than it wrote");
    let mut client = cluster.client();
    for id in (0..=taken as u32).rev() {
        delete(&mut client, "vm", id);
    }
    wait_empty(&cluster);
}

#[test]
fn many_snapshots_of_one_vdi_stay_usable() {
    let count = setting("SHEEPDOG_MANY_SNAPSHOTS", 40);
    let mut cluster = Builder::new(3).block_size_shift(20).start();
    let mut client = cluster.client();
    let mut vid = client.create_vdi("deep", 8 * BLOCK).expect("create");
    let mut slowest = Duration::ZERO;
    let started = Instant::now();
    for i in 0..count {
        let mut vdi = Vdi::open(&mut client, vid).expect("open");
        vdi.write(&mut client, i as u64 % 7 * BLOCK, &pattern(1, 0, i as u32 + 1)).expect("write");
        let one = Instant::now();
        vid = client.snapshot("deep", &format!("t{i}")).expect("snapshot");
        slowest = slowest.max(one.elapsed());
    }
    eprintln!("{count} snapshots in {:?}, slowest {slowest:?}", started.elapsed());
    for i in [0, count / 2, count - 1] {
        let snap = client.lookup("deep", &format!("t{i}"), 0).expect("it exists");
        let vdi = Vdi::open(&mut client, snap).expect("open");
        let found = vdi.read(&mut client, i as u64 % 7 * BLOCK, SLOT).expect("read");
        assert!(found == pattern(1, 0, i as u32 + 1), "snapshot {i}");
    }
    let listing = Instant::now();
    let list = cluster.dog(&["vdi", "list", "-r"]).ok();
    eprintln!("list: {:?}", listing.elapsed());
    assert_eq!(list.lines().count(), count + 1);
    let looking = Instant::now();
    assert!(client.lookup("deep", "t0", 0).is_ok() && client.lookup("nosuch", "", 0).is_err());
    assert!(looking.elapsed() < Duration::from_secs(10), "a lookup took {:?}", looking.elapsed());
    // Oldest first: every drop goes through a ledger.
    let deleting = Instant::now();
    for id in (1..=count as u32).chain([0]) {
        delete(&mut client, "deep", id);
    }
    wait_empty(&cluster);
    eprintln!("deleted in {:?}", deleting.elapsed());
}

#[test]
fn many_vdis_stay_usable() {
    let count = setting("SHEEPDOG_MANY_VDIS", 200);
    let mut cluster = Cluster::new(3);
    let mut client = cluster.client();
    let mut hundred = Instant::now();
    let (mut first, mut last) = (None, Duration::ZERO);
    for i in 0..count {
        client.create_vdi(&format!("disk-{i}"), BLOCK).expect("create");
        if i % 100 == 99 {
            last = hundred.elapsed();
            first.get_or_insert(last);
            if i % 500 == 499 || i == 99 {
                eprintln!("VDIs {} to {i}: {last:?}", i - 99);
            }
            hundred = Instant::now();
        }
    }
    let first = first.unwrap_or(last);
    // Twice as slow plus what a busy machine adds; a scan of all VDIs per creation would be tens of times.
    assert!(last < first * 5 + Duration::from_secs(5), "the first hundred took {first:?}, the last {last:?}");
    let listing = Instant::now();
    let list = cluster.dog(&["vdi", "list", "-r"]).ok();
    eprintln!("list of {count}: {:?}", listing.elapsed());
    assert_eq!(list.lines().count(), count);
    let looking = Instant::now();
    for i in [0, count / 2, count - 1] {
        assert!(client.lookup(&format!("disk-{i}"), "", 0).is_ok());
    }
    eprintln!("three lookups: {:?}", looking.elapsed());
    // A node that joins learns them all.
    cluster.kill9(2);
    cluster.start(2);
    let recovering = Instant::now();
    cluster.wait_recovered();
    eprintln!("recovered: {:?}", recovering.elapsed());
    let mut other = cluster.nodes[2].client();
    assert!(other.lookup(&format!("disk-{}", count - 1), "", 0).is_ok());
    assert_eq!(other.create_vdi("disk-0", BLOCK), Err(ResultCode::VDI_EXIST));
}
