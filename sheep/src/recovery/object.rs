//! Recovering one replicated object (spec 06, 10.5, with rule A1 of 15.1).
//!
//! The search begins at the round's target epoch and goes back one epoch at a time. It goes back only when that epoch
//! cannot have acknowledged a write of the object: when every home of the epoch says that it did not have it, or one
//! does whose store was there (a write is acknowledged by all homes). Otherwise a home that is away may hold a newer
//! version than any older epoch has, and the object waits.
//!
//! Where copies of the VDI were altered, an epoch's homes are those of the largest number since ([`super::altered`]); what
//! nodes put away that are none any more comes after what the homes have, and before older epochs.
//!
//! A home that has no version of an epoch may have writes of it ([`super::early`]), which are all that happened in it. If those
//! that may have more are away, the search goes back, and what was written since is put on top of what it finds.
//!
//! It ends at the epoch in which a home knows the object to have been removed ([`super::tombstones`]). The epoch in which
//! everybody had everything (last gathered) does not end it: what nobody could reach then is in no list of then, and may
//! return with its homes. Only an object that nobody has at all is not waited for below that epoch.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sheepdog_buffer::PageBuf;
use sheepdog_placement::{Ring, Weights};
use sheepdog_proto::header::{ObjRequest, OrderRequest, order};
use sheepdog_proto::{Epoch, Flags, NodeId, NodeRecord, Oid, Opcode, Request, Response, ResultCode};
use sheepdog_store::{DigestOf, Replica, Store, StoreError};

use super::altered::Counts;
use super::early::Patch;
use super::tombstones::marked;
use super::{Active, early, is_damaged};
use crate::cluster::ops::epoch_log;
use crate::faults::unnoted;
use crate::gateway::coded::code_of;
use crate::gateway::object::is_coded;
use crate::ops::objects::repair;
use crate::sheep::Sheep;
use crate::view::View;

/// Deadline of a copy from another node.
pub const COPY_DEADLINE: Duration = Duration::from_secs(30);

/// How it ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Recovered {
    /// The object is in the working directory.
    Here,
    /// No node that ever stored it has it: it was removed.
    Nowhere,
    /// A newer round began.
    Replaced,
    /// Not now; the reason.
    Later(String),
    /// Fewer strips than the code needs are left, this many, and there are no others.
    TooFew(usize),
}

/// What one epoch's homes said.
enum Search {
    Found,
    Replaced,
    /// The epoch had no version of its own.
    Absent,
    Unknown(String),
}

/// Recovers `oid` for the round.
pub async fn recover(sheep: &Arc<Sheep>, active: &Active, oid: Oid) -> Recovered {
    let Some(store) = &sheep.store else { return Recovered::Nowhere };
    let view = sheep.views.load();
    if view.epoch != active.round.epoch {
        return Recovered::Replaced;
    }
    let Some((replica, size)) = sheep.my_replica(oid, &view) else { return Recovered::Nowhere };
    let redundancy = sheep.redundancy(oid.vid(), &view);
    if store.exists(replica) {
        match is_damaged(store, replica, size) {
            false => return finished(sheep, active, oid).await,
            true if is_coded(oid, &redundancy) => tracing::warn!("{replica} is cut off"),
            true => return mend(sheep, &view, oid, redundancy.copies).await,
        }
    }
    // In an epoch that goes on: what this node had, and lost with a disk, may still be on its way to the others' disks.
    if active.round.tgt_epoch == active.round.epoch && sheep.intents.may_be_done(oid) {
        return Recovered::Later("writes of it are not known to be done".into());
    }
    if is_coded(oid, &redundancy) {
        return match code_of(redundancy.policy) {
            Ok(code) => super::strip::recover(sheep, active, store, replica, code, size).await,
            Err(code) => Recovered::Later(code.to_string()),
        };
    }
    let removed = sheep.tombstones.epoch_of(oid);
    let candidate =
        LocalCandidate::find(sheep, oid, if oid.is_sparse() { DigestOf::Blocks } else { DigestOf::All })
            .await;
    let copies = redundancy.copies;
    let counts = sheep.recovery.altered.counts(oid.vid(), copies, sheep.history.losses());
    let since = Vec::new();
    let mut hunt = Hunt { sheep, active, oid, copies, counts, candidate, removed, since };
    let mut epoch = active.round.tgt_epoch;
    let mut nodes = Some(active.round.old.clone());
    loop {
        let Some(members) = nodes.take() else {
            let reason = format!("the members of epoch {epoch} are not known");
            return unknown(sheep, active, &[replica], epoch, reason).await;
        };
        match hunt.search(epoch, members).await {
            Search::Found => return Recovered::Here,
            Search::Replaced => return Recovered::Replaced,
            Search::Unknown(reason) => return unknown(sheep, active, &[replica], epoch, reason).await,
            Search::Absent => {}
        }
        if epoch.0 <= 1 || !hunt.removed.is_before(epoch) {
            return Recovered::Nowhere;
        }
        epoch = Epoch(epoch.0 - 1);
        nodes = epoch_log(sheep, epoch).await.map(|log| log.nodes);
    }
}

/// The object is here, but perhaps for the last writes.
async fn finished(sheep: &Arc<Sheep>, active: &Active, oid: Oid) -> Recovered {
    if !sheep.early.has(oid) {
        return Recovered::Here;
    }
    let Some(_pass) = sheep.gate.enter(active.round.epoch) else { return Recovered::Replaced };
    match early::finish(sheep, &sheep.views.load(), oid, 0).await {
        Ok(()) => Recovered::Here,
        Err(code) => Recovered::Later(format!("writes that came before it: {code}")),
    }
}

/// A data object whose file was cut off gets the content of another home. If none has it whole, it stays as it is.
async fn mend(sheep: &Arc<Sheep>, view: &View, oid: Oid, copies: u8) -> Recovered {
    let mut unknown = None;
    for home in view.ring.nodes_of(oid, copies.into()).filter(|n| n.nid != sheep.me) {
        match repair(sheep, oid, home.nid, Flags::RECOVERY).await {
            Ok(()) => {
                tracing::warn!("{oid} was cut off, restored from {}", home.nid);
                return Recovered::Here;
            }
            Err(code) => {
                tracing::warn!("{oid} is cut off, {} cannot help: {code}", home.nid);
                if !matches!(code, ResultCode::NO_OBJ | ResultCode::AGAIN | ResultCode::INVALID_PARMS) {
                    unknown = Some(format!("it is cut off; {}: {code}", home.nid));
                }
            }
        }
    }
    unknown.map_or(Recovered::Here, Recovered::Later)
}

/// The search cannot go on at `epoch`. The object waits, unless all members had everything since and nobody has anything
/// of it (one of `names`): then there is nothing to wait for.
pub(super) async fn unknown(
    sheep: &Arc<Sheep>,
    active: &Active,
    names: &[Replica],
    epoch: Epoch,
    reason: String,
) -> Recovered {
    let settled = !sheep.recovery.last_gathered().is_before(epoch);
    if settled && matches!(anybody_has(sheep, active, names).await, Ok(false)) {
        return Recovered::Nowhere;
    }
    Recovered::Later(reason)
}

/// Whether this node has any state of a replica.
pub fn has_any(sheep: &Sheep, name: Replica) -> bool {
    let early = name.strip.is_none() && sheep.early.has(name.oid);
    early || sheep.store.as_ref().is_some_and(|s| s.exists(name) || !s.stale_epochs(name).is_empty())
}

/// Whether another node has any state of an object; `INVALID_PARMS` from a node of the original.
async fn other_has(
    sheep: &Arc<Sheep>,
    active: &Active,
    node: NodeId,
    names: &[Replica],
) -> Result<bool, ResultCode> {
    let Some(first) = names.first() else { return Ok(false) };
    let kind = if first.strip.is_some() { names.len() as u8 } else { 0 };
    let body = OrderRequest { oid: first.oid, what: order::HAS, kind, ..OrderRequest::zeroed() };
    let request = Request::new(Opcode::ORDER_PEER).epoch(active.round.epoch).with_order(body);
    let reply = sheep.peers.call(&node, request, Bytes::new(), COPY_DEADLINE).await;
    match reply.map_err(|_| ResultCode::NETWORK_ERROR)?.response.result {
        ResultCode::SUCCESS => Ok(true),
        ResultCode::NO_OBJ => Ok(false),
        code => Err(code),
    }
}

/// Whether a member has any state of one of the replicas.
async fn anybody_has(sheep: &Arc<Sheep>, active: &Active, names: &[Replica]) -> Result<bool, ResultCode> {
    let view = sheep.views.load();
    for node in view.members() {
        if node.nid != sheep.me {
            match other_has(sheep, active, node.nid, names).await {
                Err(ResultCode::INVALID_PARMS) => {}
                Ok(false) => continue,
                other => return other,
            }
        }
        for name in names {
            let found = if node.nid == sheep.me {
                has_any(sheep, *name)
            } else {
                // Its state at the end of the first epoch is the oldest that it has.
                let body = ObjRequest {
                    oid: name.oid,
                    tgt_epoch: Epoch(1),
                    ec_index: name.strip.unwrap_or(0),
                    ..ObjRequest::zeroed()
                };
                let request = Request::new(Opcode::READ_PEER)
                    .flag(Flags::RECOVERY)
                    .epoch(active.round.epoch)
                    .length(1)
                    .with_obj(body);
                let reply = sheep.peers.call(&node.nid, request, Bytes::new(), COPY_DEADLINE).await;
                match reply.map_err(|_| ResultCode::NETWORK_ERROR)?.response.result {
                    ResultCode::SUCCESS => true,
                    ResultCode::NO_OBJ | ResultCode::AGAIN => false,
                    code => return Err(code),
                }
            };
            if found {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// A stale copy on this node that may equal the current version: its epoch and its digest.
struct LocalCandidate(Option<(Epoch, DigestOf, [u8; 20])>);

impl LocalCandidate {
    /// Digest of blocks for what is mostly holes, as inodes are.
    async fn find(sheep: &Sheep, oid: Oid, of: DigestOf) -> LocalCandidate {
        let Some(store) = &sheep.store else { return LocalCandidate(None) };
        let replica = Sheep::replica(oid);
        let Some(epoch) = store.stale_epochs(replica).into_iter().max() else { return LocalCandidate(None) };
        let size = sheep.size_of(oid, &sheep.views.load());
        let hash = store.hash(replica, size, Some(epoch), of).await;
        LocalCandidate(hash.ok().map(|h| (epoch, of, h)))
    }
}

/// One object being searched.
struct Hunt<'a> {
    sheep: &'a Arc<Sheep>,
    active: &'a Active,
    oid: Oid,
    copies: u8,
    counts: Counts,
    candidate: LocalCandidate,
    /// The last epoch in which somebody removed it; 0 = nobody knows of one.
    removed: Epoch,
    /// What was written in the epochs that were passed by, the latest first.
    since: Vec<Vec<Patch>>,
}

impl Hunt<'_> {
    /// The nodes that were homes among the members of an epoch as long as there were `copies`, in order.
    fn homes(&self, ring: &Ring, copies: u8) -> Vec<NodeId> {
        ring.nodes_of(self.oid, copies.into()).map(|n| n.nid).collect()
    }

    /// Who may have had the object among the members of an epoch: its homes, beginning with this node; with `-W` then
    /// everybody else, because placement may have changed.
    fn candidates(&self, ring: &Ring, epoch: Epoch) -> Vec<NodeId> {
        // Who ceased to be a home in the present epoch has nothing of it, and need not be here.
        let present = !epoch.is_before(self.active.round.epoch);
        let mut nodes = self.homes(ring, if present { self.copies } else { self.counts.most });
        if let Some(at) = nodes.iter().position(|n| *n == self.sheep.me) {
            nodes.rotate_left(at);
        }
        if self.active.round.wildcard {
            let storing = ring.nodes().iter().filter(|n| n.nr_vnodes > 0);
            let others: Vec<NodeId> = storing.map(|n| n.nid).filter(|n| !nodes.contains(n)).collect();
            nodes.extend(others);
        }
        nodes
    }

    /// Looks at one epoch.
    async fn search(&mut self, epoch: Epoch, members: Vec<NodeRecord>) -> Search {
        let view = self.sheep.views.load();
        let Ok(ring) = Ring::new(members, Weights::of_cluster(view.flags)) else {
            return Search::Unknown("unusable epoch log".into());
        };
        // Moved away in this very epoch: outdated if a home has the object, the only copy if none has.
        let mut own = false;
        let (mut unknown, mut proven, mut lacked) = (None, false, false);
        let always = self.homes(&ring, self.counts.least);
        // Writes of the epoch, if a home has only those; and whether all others that may have more are away.
        let (mut written, mut only_away) = (None, true);
        for home in self.candidates(&ring, epoch) {
            if self.active.is_replaced() {
                return Search::Replaced;
            }
            if !view.is_member(&home) {
                unknown = Some(format!("{home}, which stored it at epoch {epoch}, is away"));
                continue;
            }
            if home == self.sheep.me && self.has_own_of_the_present(epoch) {
                own = true;
                continue;
            }
            match self.try_home(epoch, home).await {
                Ok(()) => return Search::Found,
                Err(ResultCode::OLD_NODE_VER) => return Search::Replaced,
                Err(ResultCode::NO_OBJ) => proven |= always.contains(&home),
                Err(code) => {
                    let early = match code {
                        ResultCode::AGAIN => early::ask(self.sheep, &view, home, self.oid, epoch).await,
                        _ => None,
                    };
                    if early.is_some() {
                        written = written.or(early);
                    } else if code == ResultCode::AGAIN && home == self.sheep.me && self.counts.lacked {
                        lacked = true;
                    } else {
                        only_away = false;
                        unknown = Some(format!("{home}: {code}"));
                    }
                }
            }
        }
        // Where placement is in doubt, one node without the object proves nothing.
        proven &= !self.active.round.wildcard;
        if let Some(written) = written
            && !proven
            && !own
            && only_away
            && !self.active.round.wildcard
        {
            tracing::info!("{}: {} writes of epoch {epoch} came before it", self.oid, written.len());
            self.since.push(written);
            return Search::Absent;
        }
        if self.counts.least < self.counts.most && (proven || (lacked && unknown.is_none())) {
            match self.search_put_away(epoch, &ring).await {
                Search::Absent => proven = true,
                Search::Unknown(reason) => unknown = Some(reason),
                done => return done,
            }
        } else if lacked {
            unknown.get_or_insert_with(|| "this node lost what it had".to_owned());
        }
        match unknown {
            Some(reason) if !proven => Search::Unknown(reason),
            _ if own => match self.link(epoch).await {
                Ok(()) => Search::Found,
                Err(ResultCode::OLD_NODE_VER) => Search::Replaced,
                Err(ResultCode::NO_OBJ) => Search::Absent,
                Err(code) => Search::Unknown(format!("the stale copy here: {code}")),
            },
            _ => Search::Absent,
        }
    }

    /// Asks those who were homes in an epoch for a part of it only, as copies were altered, for what they put away then.
    /// Nothing was written later.
    async fn search_put_away(&mut self, epoch: Epoch, ring: &Ring) -> Search {
        let always = self.homes(ring, self.counts.least);
        let before = Epoch(epoch.0.saturating_sub(1));
        let mut unknown = None;
        for node in self.homes(ring, self.counts.most).into_iter().filter(|n| !always.contains(n)) {
            if self.active.is_replaced() {
                return Search::Replaced;
            }
            if !self.sheep.views.load().is_member(&node) {
                unknown = Some(format!("{node}, which stored it at epoch {epoch}, is away"));
                continue;
            }
            match self.try_home(before, node).await {
                Ok(()) => return Search::Found,
                Err(ResultCode::OLD_NODE_VER) => return Search::Replaced,
                Err(ResultCode::NO_OBJ) => {}
                Err(code) => unknown = Some(format!("{node}: {code}")),
            }
        }
        unknown.map_or(Search::Absent, Search::Unknown)
    }

    fn has_own_of_the_present(&self, epoch: Epoch) -> bool {
        let stale = self.sheep.store.as_ref().and_then(|s| s.stale_at(Sheep::replica(self.oid), epoch));
        !epoch.is_before(self.active.round.epoch) && stale.is_some()
    }

    async fn try_home(&mut self, epoch: Epoch, home: NodeId) -> Result<(), ResultCode> {
        if home == self.sheep.me {
            let linked = match epoch.is_before(self.active.round.epoch) {
                true => self.link(epoch).await,
                false => Err(ResultCode::NO_OBJ),
            };
            let empty = linked == Err(ResultCode::NO_OBJ)
                && (!self.sheep.history.covers(epoch) || self.sheep.early.has_of(self.oid, epoch));
            return if empty { Err(ResultCode::AGAIN) } else { linked };
        }
        if let Some((stale, of, hash)) = self.candidate.0 {
            let theirs = match self.remote_hash(epoch, home, of).await {
                // A node of the original.
                Err(ResultCode::INVALID_PARMS) if of == DigestOf::Blocks => {
                    self.candidate = LocalCandidate::find(self.sheep, self.oid, DigestOf::All).await;
                    return Box::pin(self.try_home(epoch, home)).await;
                }
                theirs => theirs?,
            };
            if theirs == hash {
                return self.link(stale).await;
            }
            self.candidate.0 = None;
        }
        self.copy(epoch, home).await
    }

    fn request(&self, opcode: Opcode, tgt_epoch: Epoch) -> Request {
        let body = ObjRequest { oid: self.oid, tgt_epoch, ..ObjRequest::zeroed() };
        Request::new(opcode).epoch(self.active.round.epoch).with_obj(body)
    }

    /// The answer's result; what it tells of a removal is kept.
    fn judge(&mut self, response: &Response) -> Result<(), ResultCode> {
        self.removed = self.removed.max(removal(response));
        response.result.ok()
    }

    async fn remote_hash(
        &mut self,
        epoch: Epoch,
        home: NodeId,
        of: DigestOf,
    ) -> Result<[u8; 20], ResultCode> {
        let body =
            OrderRequest { oid: self.oid, what: order::DIGEST, serial: epoch.0, ..OrderRequest::zeroed() };
        let request = match of {
            DigestOf::Blocks => {
                Request::new(Opcode::ORDER_PEER).epoch(self.active.round.epoch).with_order(body)
            }
            _ => self.request(Opcode::GET_HASH, epoch),
        };
        let reply = self.sheep.peers.call(&home, request, Bytes::new(), COPY_DEADLINE).await;
        let reply = reply.map_err(|_| ResultCode::NETWORK_ERROR)?;
        self.judge(&reply.response).map(|()| reply.response.hash().digest)
    }

    /// Makes the stale copy of `epoch` the working one again.
    async fn link(&self, epoch: Epoch) -> Result<(), ResultCode> {
        let store = self.sheep.store.as_ref().ok_or(ResultCode::NO_OBJ)?;
        let (view, replica) = (self.sheep.views.load(), Sheep::replica(self.oid));
        let _pass = self.sheep.gate.enter(self.active.round.epoch).ok_or(ResultCode::OLD_NODE_VER)?;
        if !self.since.is_empty() {
            let size = self.sheep.size_of(self.oid, &view) as usize;
            return match store.read_stale(replica, epoch, 0, size).await {
                Ok(data) => self.make(store, &view, data).await,
                Err(error) => Err(crate::faults::recovery_result(self.sheep, &error)),
            };
        }
        match store.link_stale(replica, epoch).await {
            Ok(true) if self.sheep.early.has(self.oid) => {
                // The link must outlive a power cut as the note does that nothing is missing in the file.
                let synced = store.sync_dirs().await;
                synced.map_err(|error| own_fault(crate::faults::peer_result(self.sheep, &error)))?;
                early::finish(self.sheep, &view, self.oid, 0).await.map_err(own_fault)
            }
            Ok(true) => Ok(()),
            Ok(false) | Err(StoreError::NoObject) => Err(ResultCode::NO_OBJ),
            Err(error) => Err(crate::faults::peer_result(self.sheep, &error)),
        }
    }

    async fn copy(&mut self, epoch: Epoch, home: NodeId) -> Result<(), ResultCode> {
        let sheep = self.sheep;
        let store = sheep.store.as_ref().ok_or(ResultCode::NO_OBJ)?;
        let view = sheep.views.load();
        let size = sheep.size_of(self.oid, &view);
        let mut request = self.request(Opcode::READ_PEER, epoch).flag(Flags::RECOVERY).length(size as usize);
        if epoch == Epoch(0) {
            request = request.flag(Flags::WILDCARD);
        }
        if self.active.round.wildcard {
            request = request.flag(Flags::WILDCARD);
            tracing::debug!("doing wildcard recovery: at epoch {epoch}, object {}, from {home}", self.oid);
        }
        let reply = super::pieces::read(sheep, self.active, &home, request).await?;
        self.judge(&reply.response)?;
        if reply.data.len() as u64 != size {
            return Err(ResultCode::NETWORK_ERROR);
        }
        // The epoch must not move between the copy and its becoming the working object.
        let _pass = sheep.gate.enter(self.active.round.epoch).ok_or(ResultCode::OLD_NODE_VER)?;
        self.make(store, &view, reply.data).await
    }

    /// Makes the object out of what was found and what was written since. The caller holds a pass of the epoch.
    async fn make(&self, store: &Store, view: &View, found: Bytes) -> Result<(), ResultCode> {
        let (sheep, epoch) = (self.sheep, self.active.round.epoch);
        let early =
            sheep.early.writes(self.oid, epoch, 0).map_err(|error| unnoted(sheep, self.oid, &error))?;
        let whole = match self.since.is_empty() && early.is_empty() {
            true => found,
            false => {
                let mut whole = PageBuf::copy_of(&found);
                for (at, data) in self.since.iter().rev().flatten().chain(&early) {
                    let at = *at as usize;
                    whole[at..at + data.len()].copy_from_slice(data);
                }
                whole.freeze()
            }
        };
        let restored =
            super::pieces::restore(sheep, self.active, store, Sheep::replica(self.oid), whole).await;
        let created = restored.map_err(|error| own_fault(crate::faults::peer_result(sheep, &error)))?;
        // A file that somebody else made has what was logged by then.
        let included = if created { early.len() } else { 0 };
        early::finish(sheep, view, self.oid, included).await.map_err(own_fault)
    }
}

/// A fault of this node's disks says nothing of what another one has.
fn own_fault(code: ResultCode) -> ResultCode {
    if code == ResultCode::NO_OBJ { ResultCode::EIO } else { code }
}

/// The epoch in which the answering node removed the object; 0 = it says nothing.
pub(super) fn removal(response: &Response) -> Epoch {
    if response.result == ResultCode::NO_OBJ { marked(response) } else { Epoch(0) }
}
