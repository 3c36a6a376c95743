//! Everything at once: writers that verify, over replicated and erasure-coded VDIs, against kills, freezes, restarts, joins,
//! lost disks, also while a node is frozen, disks that are plugged and unplugged, and copies that are altered (spec 06, 14.2
//! P1 and P4).
//!
//! `SHEEPDOG_TORTURE_SECONDS` sets how long the faults last (10 by default, `scripts/torture` sets more),
//! `SHEEPDOG_TORTURE_SEED` their order, `SHEEPDOG_TORTURE_LOG=debug` the level of the
//! daemons' logs. A model knows every acknowledged write; at the end contents are read
//! through every node, and replicas and strips are compared on disk. What has no known outcome is old or new, never a mixture.

use std::collections::HashSet;
use std::path::Path;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use sheepdog_proto::header::{VdiRequest, VdiStateRequest};
use sheepdog_proto::{CopyPolicy, Flags, Oid, Opcode, Request, ResultCode, VdiId};
use sheepdog_testkit::load::{Load, Region, SLOT, Summary};
use sheepdog_testkit::{Builder, Cluster, disk, wait};

/// The last one comes and goes.
const NODES: usize = 8;
const SPARE: usize = NODES - 1;
const COPIES: u8 = 3;
const CODE: (u8, u8) = (4, 2);
/// Of each kind of VDI.
const WRITERS: usize = 4;

fn setting(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text}: not a number")),
        Err(_) => default,
    }
}

fn created(cluster: &mut Cluster, name: &str, policy: Option<CopyPolicy>) -> VdiId {
    let body = VdiRequest {
        vdi_size: (WRITERS as u64 * 2) << 22,
        copies: policy.map_or(COPIES, |p| p.strips()),
        copy_policy: policy.map_or(0, |p| p.to_byte()),
        ..VdiRequest::zeroed()
    };
    let response = cluster.client().vdi_op(Opcode::NEW_VDI, name, None, body);
    assert!(response.result.is_ok(), "{name}: {:?}", response.result);
    response.vdi().vdi_id
}

fn change_disk(cluster: &Cluster, node: usize, opcode: Opcode, disk: &Path) {
    let payload = format!("{}\0", disk.display()).into_bytes();
    let request = Request::new(opcode).flag(Flags::WRITE).length(payload.len());
    let (response, _) = cluster.nodes[node].client().must(request, &payload);
    assert!(response.result.is_ok(), "{opcode} {}: {:?}", disk.display(), response.result);
}

/// What goes wrong next.
#[derive(Debug, Clone, Copy)]
enum Fault {
    Kill,
    KillTwo,
    KillAll,
    Freeze,
    Restart,
    Join,
    LoseDisk,
    FreezeAndLoseDisk,
    SwapDisk,
    AlterCopies,
}

const FAULTS: [Fault; 15] = [
    Fault::Kill,
    Fault::Kill,
    Fault::Kill,
    Fault::KillTwo,
    Fault::KillTwo,
    Fault::KillAll,
    Fault::Freeze,
    Fault::Freeze,
    Fault::Restart,
    Fault::Join,
    Fault::LoseDisk,
    Fault::FreezeAndLoseDisk,
    Fault::SwapDisk,
    Fault::AlterCopies,
    Fault::AlterCopies,
];

struct Torture {
    cluster: Cluster,
    random: SmallRng,
    load: Load,
    disks: u32,
    /// The replicated VDI.
    plain: VdiId,
}

impl Torture {
    fn work(&self, operations: u64, patience: Duration) {
        let (before, end) = (self.load.operations(), Instant::now() + patience);
        wait("work", || self.load.operations() > before + operations || Instant::now() > end);
    }

    fn victim(&mut self) -> usize {
        self.random.random_range(0..SPARE)
    }

    fn millis(&mut self, range: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.random.random_range(range))
    }

    /// Whatever is lost for good is lost from a cluster that has everything: else more than the redundancy might go.
    fn complete(&mut self) {
        self.cluster.wait_recovered();
    }

    fn strike(&mut self, fault: Fault) {
        match fault {
            Fault::Kill => {
                let node = self.victim();
                self.cluster.kill9(node);
                let patience = self.millis(0..1500);
                self.work(150, patience);
                self.cluster.start(node);
            }
            Fault::KillTwo => {
                let a = self.victim();
                let b = (a + self.random.random_range(1..SPARE)) % SPARE;
                self.cluster.kill9(a);
                self.cluster.kill9(b);
                let patience = self.millis(0..1500);
                self.work(150, patience);
                self.cluster.start(b);
                self.cluster.start(a);
            }
            Fault::KillAll => {
                let running = self.cluster.running();
                self.cluster.kill9_all();
                let first = self.random.random_range(0..running.len());
                for i in 0..running.len() {
                    self.cluster.start(running[(first + i) % running.len()]);
                }
                self.complete();
            }
            Fault::Freeze => {
                let node = self.victim();
                self.cluster.sigstop(node);
                let patience = self.millis(100..2000);
                self.work(u64::MAX / 2, patience);
                self.cluster.sigcont(node);
            }
            Fault::Restart => {
                let node = self.victim();
                assert_eq!(self.cluster.stop(node), Some(0));
                self.work(50, Duration::from_secs(1));
                self.cluster.start(node);
            }
            Fault::Join if self.cluster.nodes[SPARE].pid().is_some() => {
                self.cluster.kill9(SPARE);
                self.complete();
                self.cluster.wipe(SPARE);
            }
            Fault::Join => self.cluster.start(SPARE),
            Fault::LoseDisk => {
                self.complete();
                let node = self.victim();
                self.lose_disk(node);
                self.replace_lost_disk(node);
            }
            Fault::FreezeAndLoseDisk => {
                self.complete();
                let (node, frozen) = (self.victim(), self.victim());
                // Either may be first: what is frozen has requests of before in its sockets.
                let freeze_first = self.random.random();
                if freeze_first {
                    self.cluster.sigstop(frozen);
                }
                self.lose_disk(node);
                if !freeze_first {
                    self.cluster.sigstop(frozen);
                }
                let patience = self.millis(100..2000);
                self.work(u64::MAX / 2, patience);
                self.cluster.sigcont(frozen);
                self.replace_lost_disk(node);
            }
            Fault::SwapDisk => {
                self.cluster.wait_running();
                let node = self.victim();
                let disk = self.cluster.nodes[node].disks[1].clone();
                let number = self.disks;
                self.disks += 1;
                change_disk(&self.cluster, node, Opcode::MD_UNPLUG_DISKS, &disk);
                let line = format!("unplugged {}: all its objects are on the other disks", disk.display());
                wait(&line, || self.cluster.nodes[node].log().contains(&line));
                self.plug_another(node, number);
            }
            Fault::AlterCopies => {
                self.alter_copies(COPIES - 1);
                let patience = self.millis(0..1000);
                self.work(100, patience);
                let killed = self.random.random::<bool>().then(|| self.victim());
                if let Some(node) = killed {
                    self.cluster.kill9(node);
                    let patience = self.millis(0..1000);
                    self.work(100, patience);
                }
                self.alter_copies(COPIES);
                if let Some(node) = killed {
                    self.cluster.start(node);
                }
            }
        }
    }

    /// As `dog vdi alter-copy` does, whatever is being recovered.
    fn alter_copies(&mut self, copies: u8) {
        self.cluster.wait_running();
        let mut client = self.cluster.client();
        let nr_copies_at = 554;
        let written = client.write_obj(Oid::inode(self.plain), nr_copies_at, &[copies]);
        assert_eq!(written.expect("an answer"), ResultCode::SUCCESS);
        let shift = 22;
        let body = VdiStateRequest {
            new_vid: self.plain,
            copies,
            block_size_shift: shift,
            ..VdiStateRequest::zeroed()
        };
        let request = Request::new(Opcode::ALTER_VDI_COPY).with_vdi_state(body);
        assert_eq!(client.must(request, &[]).0.result, ResultCode::SUCCESS);
    }

    fn lose_disk(&mut self, node: usize) {
        disk::remove(&self.cluster.nodes[node].disks[1]);
    }

    /// Waits until the node has noticed, and gives it a fresh one when everything is back.
    fn replace_lost_disk(&mut self, node: usize) {
        let line = format!("removed disk {}", self.cluster.nodes[node].disks[1].display());
        wait("the loss to be noticed", || self.cluster.nodes[node].log().contains(&line));
        self.complete();
        let number = self.disks;
        self.disks += 1;
        self.plug_another(node, number);
    }

    /// A fresh disk in the place of the node's second one, for the next starts, too.
    fn plug_another(&mut self, node: usize, number: u32) {
        let new = self.cluster.dir().join(format!("disk-{number}"));
        change_disk(&self.cluster, node, Opcode::MD_PLUG_DISKS, &new);
        let old = std::mem::replace(&mut self.cluster.nodes[node].disks[1], new.clone());
        let paths = self.cluster.nodes[node].args_mut().last_mut().expect("the directories come last");
        *paths = paths.replace(&old.display().to_string(), &new.display().to_string());
        self.complete();
    }
}

#[test]
fn everything_at_once_loses_nothing() {
    let seed = setting("SHEEPDOG_TORTURE_SEED", u64::from(std::process::id()));
    let duration = Duration::from_secs(setting("SHEEPDOG_TORTURE_SECONDS", 10));
    eprintln!("SHEEPDOG_TORTURE_SEED={seed}");
    let mut random = SmallRng::seed_from_u64(seed);
    let level = std::env::var("SHEEPDOG_TORTURE_LOG").unwrap_or_else(|_| "info".into());
    let mut builder = Builder::new(NODES).disks(2).copies(COPIES).arg("-l").arg(&format!("level={level}"));
    if seed % 2 == 1 {
        builder = builder.arg("-R").arg("max=1,interval=300"); // more writes come before their objects
    }
    let mut cluster = builder.start();
    let plain = created(&mut cluster, "plain", None);
    let policy = CopyPolicy::erasure(CODE.0, CODE.1).expect("a valid policy");
    let coded = created(&mut cluster, "coded", Some(policy));
    let mut client = cluster.client();
    let mut regions = Region::divide(&mut client, plain, WRITERS).expect("regions");
    regions.extend(Region::divide(&mut client, coded, WRITERS).expect("regions"));
    regions.iter_mut().for_each(|r| r.settle(&mut client));
    let ports = cluster.nodes[..SPARE].iter().map(|n| n.port).collect();
    let load = Load::start(regions, ports, random.random());
    let mut torture = Torture { cluster, random, load, disks: 0, plain };
    torture.work(200, Duration::from_secs(30));
    let (end, mut faults) = (Instant::now() + duration, 0);
    while Instant::now() < end {
        let fault = FAULTS[torture.random.random_range(0..FAULTS.len())];
        eprintln!("{fault:?}");
        torture.strike(fault);
        faults += 1;
        let (operations, patience) = (torture.random.random_range(0..300), torture.millis(100..1500));
        torture.work(operations, patience);
    }
    let Torture { mut cluster, load, .. } = torture;
    let mut regions = load.stop();
    cluster.wait_recovered();
    regions.iter_mut().for_each(|r| r.settle(&mut cluster.nodes[0].client()));
    report(&mut cluster, &regions, faults);
}

fn report(cluster: &mut Cluster, regions: &[Region], faults: u32) {
    let summary = Summary::of(regions);
    let mut lost = summary.violations.clone();
    for node in cluster.running() {
        let mut client = cluster.nodes[node].client();
        lost.extend(
            regions.iter().flat_map(|r| r.verify(&mut client)).map(|text| format!("node {node}: {text}")),
        );
    }
    let unknown: HashSet<(Oid, u64)> =
        regions.iter().flat_map(Region::unknown_ranges).map(|(oid, range)| (oid, range.start)).collect();
    let replicas = cluster.compare_replicas(COPIES.into());
    let strips = cluster.compare_strips(CODE.0, CODE.1);
    let slot = SLOT as u64;
    // Bytes of an object that one byte of a strip stands for.
    let factor =
        |oid: Oid| if strips.differences.iter().any(|d| d.oid == oid) { u64::from(CODE.0) } else { 1 };
    let differences = replicas.differences.iter().chain(&strips.differences);
    let diverged: Vec<_> = differences
        .filter(|d| {
            let range = d.range.start * factor(d.oid)..d.range.end * factor(d.oid);
            !(range.start / slot..range.end.div_ceil(slot)).any(|s| unknown.contains(&(d.oid, s * slot)))
        })
        .collect();
    let missing: Vec<_> = replicas.missing.iter().chain(&strips.missing).collect();
    eprintln!(
        "{faults} faults, {} writes acknowledged, {} without an answer, {} lost, {} of {} objects diverged, \
         {} replicas missing, p99 {:?}, slowest {:?}",
        summary.acknowledged,
        summary.unknown,
        lost.len(),
        diverged.len(),
        replicas.objects + strips.objects,
        missing.len(),
        summary.percentile(0.99),
        summary.slowest
    );
    assert!(lost.is_empty(), "{lost:#?}");
    assert!(diverged.is_empty(), "{diverged:#?}");
    assert!(missing.is_empty(), "{missing:?}");
    assert!(summary.errors.is_empty(), "errors that clients must not see: {:#?}", summary.errors);
}
