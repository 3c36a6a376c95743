//! Recomputes every object and ledger that must exist from the inodes alone, and compares (spec 05, section 10).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use sheepdog_proto::inode::INODE_HEADER_LEN;
use sheepdog_proto::{ObjectKind, Oid, Opcode, Request, VDI_BITMAP_LEN, VdiId};
use sheepdog_testkit::{Client, Cluster, wait_for};

/// How long dropped references may take.
const SETTLE: Duration = Duration::from_secs(60);

/// Vids in use.
pub fn vids(client: &mut Client) -> Vec<VdiId> {
    let (_, bytes) = client.must(Request::new(Opcode::READ_VDIS).length(VDI_BITMAP_LEN), &[]);
    let bytes = bytes.iter().enumerate().filter(|(_, b)| **b != 0);
    let bits =
        bytes.flat_map(|(i, b)| (0..8).filter(move |bit| b >> bit & 1 == 1).map(move |bit| i * 8 + bit));
    bits.map(|v| VdiId::new(v as u32)).collect()
}

/// Every reference of every VDI: object, generation, count.
fn references(client: &mut Client, blocks: usize, leaks: bool) -> Vec<(Oid, i32, i32)> {
    let mut all = Vec::new();
    for vid in vids(client) {
        let (response, bytes) =
            client.read_obj(Oid::inode(vid), INODE_HEADER_LEN as u32, 4 * blocks).expect("an answer");
        if !response.result.is_ok() {
            continue; // announced, never created
        }
        let owners: Vec<u32> = sheepdog_proto::inode::table(&bytes).iter().map(|v| v.get()).collect();
        let grefs = client.grefs(vid, blocks).expect("grefs");
        for (index, (owner, (generation, count))) in owners.into_iter().zip(grefs).enumerate() {
            if owner == 0 {
                // A node may die between clearing the one and the other; the next entry starts anew.
                let clean = leaks || (generation, count) == (0, 0);
                assert!(clean, "{vid:?}: block {index} has no owner but a reference");
            } else {
                all.push((Oid::data(VdiId::new(owner), index as u32), generation, count));
            }
        }
    }
    all
}

/// The ledger that live references leave: each stands for itself and against the copies it made.
fn expected(references: &[(Oid, i32, i32)]) -> BTreeMap<Oid, Vec<i32>> {
    let mut ledgers: BTreeMap<Oid, Vec<i32>> = BTreeMap::new();
    for (oid, generation, count) in references {
        let slots = ledgers.entry(*oid).or_default();
        let at = *generation as usize;
        slots.resize(slots.len().max(at + 2), 0);
        slots[at] += 1;
        slots[at + 1] -= count;
    }
    for slots in ledgers.values_mut() {
        while slots.last() == Some(&0) {
            slots.pop();
        }
    }
    ledgers
}

fn check(cluster: &mut Cluster, blocks: usize, leaks: bool) -> Result<(), String> {
    let mut client = cluster.client();
    let references = references(&mut client, blocks, leaks);
    let ledgers = expected(&references);
    let on_disk: BTreeSet<Oid> =
        (0..cluster.nodes.len()).flat_map(|i| cluster.objects_of(i).into_keys()).collect();
    let kept: BTreeSet<Oid> = on_disk.iter().filter(|o| o.kind() == ObjectKind::Data).copied().collect();
    let wanted: BTreeSet<Oid> = ledgers.keys().copied().collect();
    if let Some(lost) = wanted.difference(&kept).next() {
        panic!("{lost} is referenced and gone");
    }
    if leaks {
        return Ok(());
    }
    if let Some(left) = kept.difference(&wanted).next() {
        return Err(format!("{left} is not referenced and still there"));
    }
    for (oid, slots) in &ledgers {
        let found = client.ledger(*oid).map_err(|e| e.to_string())?.unwrap_or(vec![1]);
        if found != *slots {
            return Err(format!("the ledger of {oid} is {found:?}, the inodes say {slots:?}"));
        }
    }
    let orphan = on_disk.iter().filter(|o| o.kind() == ObjectKind::Ledger).map(|o| o.data_of_ledger());
    match orphan.into_iter().find(|data| !ledgers.contains_key(data)) {
        Some(data) => Err(format!("{data} has a ledger and no reference")),
        None => Ok(()),
    }
}

/// Panics unless objects and ledgers are exactly those that the inodes' first `blocks` entries ask for; with `leaks`,
/// unless all objects that they ask for are there.
pub fn assert_exact(cluster: &mut Cluster, blocks: usize, leaks: bool) {
    let mut last = String::new();
    let end = std::time::Instant::now() + SETTLE - Duration::from_secs(1);
    wait_for("ledgers to agree with the inodes", SETTLE, || match check(cluster, blocks, leaks) {
        Ok(()) => Some(()),
        Err(text) => {
            assert!(std::time::Instant::now() < end, "{text}");
            last = text;
            None
        }
    });
}

/// Data objects that inodes name, and their ledgers where the inodes ask for one.
pub fn referenced(cluster: &mut Cluster, blocks: usize) -> BTreeSet<Oid> {
    let references = references(&mut cluster.client(), blocks, true);
    let ledgers = expected(&references).into_iter();
    ledgers
        .flat_map(|(oid, slots)| [Some(oid), (slots != [1]).then(|| Oid::ledger_of(oid))])
        .flatten()
        .collect()
}

/// Waits until no node holds anything but emptied inodes.
pub fn assert_empty(cluster: &Cluster) {
    let left = || {
        let of = |i: usize| cluster.objects_of(i).into_keys().filter(|o| !o.is_inode()).map(move |o| (i, o));
        (0..cluster.nodes.len()).flat_map(of).collect::<Vec<_>>()
    };
    let end = std::time::Instant::now() + SETTLE;
    loop {
        let now = left();
        if now.is_empty() {
            return;
        }
        assert!(std::time::Instant::now() < end, "all VDIs are deleted, but nodes hold {now:?}");
        std::thread::sleep(Duration::from_millis(50)); // between two looks
    }
}
