//! Removes what families of deleted VDIs left on this node's disks.
//!
//! A reference drop that a dying node had in memory, a home that was away when an object was removed, a client that
//! wrote to a VDI while it was deleted: each leaves objects that no ledger will ever free. Only a VDI and what was
//! derived from it can name its objects. So when every VDI that parent links connect is deleted, whatever this node
//! still stores of them is garbage. The links are those of the inodes, which stay for ever (spec 05, section 2), and
//! those of the VDI table; anything that cannot be read for certain keeps the family.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use sheepdog_proto::{ClusterFlags, ClusterStatus, Epoch, ObjectKind, ResultCode, VdiId};
use sheepdog_store::Replica;

use super::objects::read_lookup_header;
use crate::sheep::Sheep;

/// How long after a deletion or a recovery this node looks: the ordinary drops come first.
const GRACE: Duration = Duration::from_secs(5);

/// What decides whether there is anything new to look at.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Occasion {
    /// Which cluster: a format begins another one.
    ctime: u64,
    epoch: Epoch,
    deleted: usize,
}

/// Looks for ever.
pub async fn run(sheep: Arc<Sheep>) {
    let mut parents = HashMap::new();
    let mut done = None;
    let mut ctime = 0;
    loop {
        tokio::time::sleep(GRACE).await;
        let view = sheep.views.load();
        if std::mem::replace(&mut ctime, view.ctime) != view.ctime {
            // The ids may be used anew, with other parents.
            parents.clear();
        }
        let occasion = Occasion { ctime, epoch: view.epoch, deleted: sheep.vdis.deleted_vids().len() };
        if done == Some(occasion) || !is_quiet(&sheep) {
            continue;
        }
        match pass(&sheep, &mut parents).await {
            // Drops on their way may write ledgers of what was just removed: look again.
            Ok(removed) if removed > 0 => tracing::warn!("removed {removed} objects that deleted VDIs left"),
            Ok(_) => done = Some(occasion),
            Err(code) => tracing::debug!("cannot tell what deleted VDIs left: {code}"),
        }
    }
}

/// Whether every node has all its objects and nothing is waiting to be dropped here.
fn is_quiet(sheep: &Sheep) -> bool {
    let view = sheep.views.load();
    let gathered = view.epoch == Epoch(1) || sheep.recovery.last_gathered() == view.epoch;
    view.status == ClusterStatus::Ok
        && gathered
        && *sheep.tables.borrow()
        && !view.flags.contains(ClusterFlags::RECYCLE_VID)
        && sheep.recovery.is_idle()
        && sheep.gateway.reclaim.is_idle()
}

/// Objects of deleted VDIs on this node. Attributes belong to names and inodes stay.
fn candidates(sheep: &Sheep) -> Vec<Replica> {
    let Some(store) = &sheep.store else { return Vec::new() };
    let deleted = sheep.vdis.deleted_vids();
    let mut found = store.working();
    found.retain(|replica| {
        !matches!(replica.oid.kind(), ObjectKind::Attr | ObjectKind::Inode)
            && deleted.contains(&replica.oid.vid())
    });
    found
}

async fn pass(sheep: &Arc<Sheep>, parents: &mut HashMap<VdiId, VdiId>) -> Result<usize, ResultCode> {
    let candidates = candidates(sheep);
    let Some(store) = sheep.store.as_ref().filter(|_| !candidates.is_empty()) else { return Ok(0) };
    let epoch = sheep.views.epoch();
    let vids: BTreeSet<VdiId> = candidates.iter().map(|r| r.oid.vid()).collect();
    let dead = dead(sheep, &vids, parents).await?;
    let mut removed = 0;
    for replica in candidates.into_iter().filter(|r| dead.contains(&r.oid.vid())) {
        let _pass = sheep.gate.enter(epoch).ok_or(ResultCode::OLD_NODE_VER)?;
        sheep.tombstones.add(replica.oid, epoch);
        match store.remove(replica).await {
            Ok(()) => removed += 1,
            Err(sheepdog_store::StoreError::NoObject) => {}
            Err(error) => tracing::error!("cannot remove {}: {error}", replica.oid),
        }
    }
    Ok(removed)
}

/// Those of `vids` whose whole family is deleted.
async fn dead(
    sheep: &Arc<Sheep>,
    vids: &BTreeSet<VdiId>,
    parents: &mut HashMap<VdiId, VdiId>,
) -> Result<BTreeSet<VdiId>, ResultCode> {
    let mut links = Vec::new();
    for (vid, in_table) in sheep.vdis.parents() {
        links.push((vid, in_table));
        let parent = match parents.entry(vid) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(unknown) => match read_lookup_header(sheep, vid).await {
                Ok(header) => *unknown.insert(header.parent_vdi_id),
                // Announced and never created: it names nothing.
                Err(ResultCode::NO_OBJ) => continue,
                Err(code) => return Err(code),
            },
        };
        links.push((vid, parent));
    }
    let mut dead = BTreeSet::new();
    for family in families(&links).into_iter().filter(|f| f.iter().any(|v| vids.contains(v))) {
        if is_dead(sheep, &family).await? {
            dead.extend(family);
        }
    }
    Ok(dead)
}

/// Whether all members have emptied inodes, or none because they were never created.
async fn is_dead(sheep: &Arc<Sheep>, family: &[VdiId]) -> Result<bool, ResultCode> {
    for vid in family {
        match read_lookup_header(sheep, *vid).await {
            Ok(header) if header.is_deleted() => {}
            Err(ResultCode::NO_OBJ) => {}
            Ok(_) => return Ok(false),
            Err(code) => return Err(code),
        }
    }
    Ok(true)
}

/// The sets of vids that links connect. `VdiId::NONE` connects nothing.
pub(super) fn families(links: &[(VdiId, VdiId)]) -> Vec<Vec<VdiId>> {
    let mut neighbours: BTreeMap<VdiId, Vec<VdiId>> = BTreeMap::new();
    for (vid, parent) in links {
        neighbours.entry(*vid).or_default();
        if !parent.is_none() {
            neighbours.entry(*vid).or_default().push(*parent);
            neighbours.entry(*parent).or_default().push(*vid);
        }
    }
    let mut seen = BTreeSet::new();
    let mut families = Vec::new();
    for vid in neighbours.keys() {
        if !seen.insert(*vid) {
            continue;
        }
        let mut family = vec![*vid];
        let mut at = 0;
        while at < family.len() {
            for next in &neighbours[&family[at]] {
                if seen.insert(*next) {
                    family.push(*next);
                }
            }
            at += 1;
        }
        families.push(family);
    }
    families
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_what_any_link_connects() {
        let links = [(1, 0), (2, 1), (3, 0), (4, 3), (4, 1), (5, 0), (6, 9)];
        let links = links.map(|(a, b)| (VdiId::new(a), VdiId::new(b)));
        let mut found = families(&links);
        found.iter_mut().for_each(|f| f.sort());
        let vids = |list: &[u32]| list.iter().map(|v| VdiId::new(*v)).collect::<Vec<_>>();
        assert_eq!(found, [vids(&[1, 2, 3, 4]), vids(&[5]), vids(&[6, 9])]);
    }
}
