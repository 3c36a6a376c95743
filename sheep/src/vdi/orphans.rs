//! Removes what families of deleted VDIs left on this node's disks.
//!
//! A reference drop that a dying node had in memory, a home that was away when an object was removed, a client that
//! wrote to a VDI while it was deleted: each leaves objects that no ledger will ever free. Only a VDI and what was
//! derived from it can name its objects. So when every VDI that parent links connect is deleted, whatever this node
//! still stores of them is garbage. The links are those of the inodes, which stay for ever (spec 05, section 2), and
//! those of the VDI table; anything that cannot be read for certain keeps the family. Of families that live on,
//! [`super::leaks`] looks at the tables.
//!
//! VDIs come and go meanwhile. Which there are and which of them are deleted is what this node's VDI table says at one
//! moment, before anything is read: announcements arrive in one order, so a table in which a VDI is deleted has all VDIs
//! that were derived from it. An emptied inode alone says nothing of the kind.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use sheepdog_proto::{
    ClusterFlags, ClusterStatus, Epoch, Flags, ObjectKind, Oid, Opcode, Request, ResultCode, VdiId, Wire,
};
use sheepdog_store::Replica;

use super::leaks::{self, Leaks};
use super::objects::read_lookup_header;
use crate::sheep::Sheep;

/// How long after a deletion or a recovery this node looks: the ordinary drops come first.
const GRACE: Duration = Duration::from_secs(5);

/// What decides whether there is anything new to look at.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Occasion {
    /// Which cluster: a format begins another one.
    ctime: u64,
    pub(super) epoch: Epoch,
    deleted: usize,
}

impl Occasion {
    pub(super) fn is_within_epoch_of(self, other: Occasion) -> bool {
        (self.ctime, self.epoch) == (other.ctime, other.epoch)
    }
}

/// Looks for ever.
pub async fn run(sheep: Arc<Sheep>) {
    let mut parents = HashMap::new();
    let mut done = None;
    let mut leaks = Leaks::default();
    let (mut ctime, mut asked) = (0, None);
    loop {
        let asleep = Instant::now();
        tokio::time::sleep(GRACE).await;
        if asleep.elapsed() > 2 * GRACE {
            leaks.forget();
        }
        let view = sheep.views.load();
        if std::mem::replace(&mut ctime, view.ctime) != view.ctime {
            // The ids may be used anew, with other parents.
            parents.clear();
        }
        if is_quiet(&sheep) && asked != Some((ctime, view.epoch)) {
            ask_for_deleted(&sheep).await;
            asked = Some((ctime, view.epoch));
        }
        let occasion = Occasion { ctime, epoch: view.epoch, deleted: sheep.vdis.deleted_vids().len() };
        if !is_quiet(&sheep) || (done == Some(occasion) && !leaks.is_due()) {
            continue;
        }
        match pass(&sheep, &mut parents, &mut leaks, occasion).await {
            // Drops on their way may write ledgers of what was just removed: look again.
            Ok(removed) if removed > 0 => tracing::warn!("removed {removed} objects that deleted VDIs left"),
            Ok(_) => done = Some(occasion),
            Err(code) => tracing::debug!("cannot tell what deleted VDIs left: {code}"),
        }
    }
}

/// A node that dies while it deletes a VDI may have emptied the inode and told nobody. The first home of each inode looks,
/// and has all nodes look if it is so.
async fn ask_for_deleted(sheep: &Arc<Sheep>) {
    let view = sheep.views.load();
    let census = sheep.vdis.census().into_iter().filter(|(_, (_, deleted))| !deleted);
    for (vid, _) in census {
        let copies = sheep.redundancy(vid, &view).copies;
        if view.my_position(Oid::inode(vid), copies) == Some(0)
            && read_lookup_header(sheep, vid).await.is_ok_and(|header| header.is_deleted())
        {
            say_deleted(sheep, vid).await;
        }
    }
}

/// NOTIFY_VDI_DEL; of `VdiId::NONE` a message that says nothing. Returns when it has come back to this node, behind
/// everything that was said before.
pub async fn say_deleted(sheep: &Arc<Sheep>, vid: VdiId) -> ResultCode {
    let payload = Bytes::from(vid.encode());
    let request = Request::new(Opcode::NOTIFY_VDI_DEL).flag(Flags::WRITE).length(payload.len());
    sheep.cluster.submit_internal(request, payload).await.response.result
}

/// NOTIFY_VDI_DEL: what is deleted is what its inode says.
pub async fn look_whether_deleted(sheep: Arc<Sheep>, vid: VdiId) {
    if !sheep.views.load().flags.contains(ClusterFlags::RECYCLE_VID)
        && read_lookup_header(&sheep, vid).await.is_ok_and(|header| header.is_deleted())
    {
        sheep.vdis.set_deleted(vid);
    }
}

/// Objects of deleted VDIs on this node and the VDIs that parent links connect with theirs.
pub(super) struct Family {
    /// In ascending order.
    pub(super) members: Vec<VdiId>,
    /// All members but those that were only announced are deleted.
    is_deleted: bool,
    pub(super) replicas: Vec<Replica>,
}

/// Whether every node has all its objects and nothing is waiting to be dropped here.
fn is_quiet(sheep: &Sheep) -> bool {
    is_settled(sheep)
        && !sheep.views.load().flags.contains(ClusterFlags::RECYCLE_VID)
        && sheep.gateway.reclaim.is_idle()
}

/// Whether every node has all its objects and this one knows all VDIs.
pub(super) fn is_settled(sheep: &Sheep) -> bool {
    let view = sheep.views.load();
    let gathered = view.epoch == Epoch(1) || sheep.recovery.last_gathered() == view.epoch;
    view.status == ClusterStatus::Ok && gathered && *sheep.tables.borrow() && sheep.recovery.is_idle()
}

/// What the VDI table says at one moment: parent, and whether the VDI is deleted.
type Census = BTreeMap<VdiId, (VdiId, bool)>;

/// Objects of deleted VDIs on this node. Attributes belong to names and inodes stay.
fn candidates(sheep: &Sheep, census: &Census) -> Vec<Replica> {
    let Some(store) = &sheep.store else { return Vec::new() };
    let mut found = store.working();
    found.retain(|replica| {
        !matches!(replica.oid.kind(), ObjectKind::Attr | ObjectKind::Inode)
            && census.get(&replica.oid.vid()).is_some_and(|(_, deleted)| *deleted)
    });
    found
}

async fn pass(
    sheep: &Arc<Sheep>,
    parents: &mut HashMap<VdiId, VdiId>,
    leaks: &mut Leaks,
    occasion: Occasion,
) -> Result<usize, ResultCode> {
    let mut removed = 0;
    let mut living = Vec::new();
    let census = sheep.vdis.census();
    for family in families_of(sheep, &census, candidates(sheep, &census), parents).await? {
        if family.is_deleted && is_dead(sheep, &family.members).await? {
            removed += remove(sheep, family.replicas, occasion.epoch).await?;
        } else {
            living.push(family);
        }
    }
    removed += leaks::pass(sheep, leaks, living, occasion).await?;
    Ok(removed)
}

/// Removes replicas of this node, if the epoch is still this one. How many there were.
pub(super) async fn remove(
    sheep: &Arc<Sheep>,
    replicas: Vec<Replica>,
    epoch: Epoch,
) -> Result<usize, ResultCode> {
    let Some(store) = &sheep.store else { return Ok(0) };
    let mut removed = 0;
    for replica in replicas {
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

/// The families that these replicas belong to.
async fn families_of(
    sheep: &Arc<Sheep>,
    census: &Census,
    replicas: Vec<Replica>,
    parents: &mut HashMap<VdiId, VdiId>,
) -> Result<Vec<Family>, ResultCode> {
    if replicas.is_empty() {
        return Ok(Vec::new());
    }
    let (mut links, mut announced) = (Vec::new(), BTreeSet::new());
    for (vid, (in_table, _)) in census {
        let vid = *vid;
        links.push((vid, *in_table));
        let parent = match parents.entry(vid) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(unknown) => match read_lookup_header(sheep, vid).await {
                Ok(header) => *unknown.insert(header.parent_vdi_id),
                // Announced and never created: it names nothing.
                Err(ResultCode::NO_OBJ) => {
                    announced.insert(vid);
                    continue;
                }
                Err(code) => return Err(code),
            },
        };
        links.push((vid, parent));
    }
    let mut of: HashMap<VdiId, usize> = HashMap::new();
    let mut found: Vec<Family> = Vec::new();
    for (number, mut members) in families(&links).into_iter().enumerate() {
        members.sort_unstable();
        of.extend(members.iter().map(|vid| (*vid, number)));
        let is_deleted = members
            .iter()
            .all(|vid| announced.contains(vid) || census.get(vid).is_some_and(|(_, deleted)| *deleted));
        found.push(Family { members, is_deleted, replicas: Vec::new() });
    }
    for replica in replicas {
        if let Some(number) = of.get(&replica.oid.vid()) {
            found[*number].replicas.push(replica);
        }
    }
    found.retain(|family| !family.replicas.is_empty());
    Ok(found)
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
