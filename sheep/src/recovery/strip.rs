//! Recovering one strip of an erasure-coded object (spec 06, 10.6, without its mixing of states, W-01).
//!
//! Epochs are searched newest first. In each one every index is asked of the node that had it; the wanted strip itself,
//! or `d` others to compute it from, end the search. Strips of an older epoch join those of a newer one only if the
//! newer epoch cannot have acknowledged a write of the object: one of its homes, whose store was there, did not have its
//! strip. Writes that are in progress meanwhile are left out of what is read: they come to the new strip, too, before they
//! are done, and if they fail, all strips are without them. So strips of different states never meet. With `-W` the other nodes are asked, too, after the homes.

use std::sync::Arc;

use bytes::Bytes;
use sheepdog_buffer::PageBuf;
use sheepdog_erasure::Code;
use sheepdog_placement::{Ring, Weights};
use sheepdog_proto::header::{ObjRequest, OrderRequest, order};
use sheepdog_proto::{Epoch, Flags, NodeId, NodeRecord, Oid, Opcode, Request, ResultCode};
use sheepdog_store::{Replica, Store, StoreError};

use super::Active;
use super::object::{COPY_DEADLINE, Recovered, removal, unknown};
use crate::cluster::ops::epoch_log;
use crate::intents::{Fate, LeftOut, WriteId, before_open_writes};
use crate::settle::decode_ids;
use crate::sheep::Sheep;

/// Room for the writes that are left out of a strip, in bytes.
const MOST_LEFT_OUT: usize = 64 << 10;

/// What a node said about a strip.
enum Answer {
    Strip(Bytes, LeftOut),
    /// It did not have it in that epoch, and would know.
    Absent,
    Unknown(String),
    Replaced,
}

/// The object being recovered, and what was found of it.
struct Search<'a> {
    sheep: &'a Arc<Sheep>,
    active: &'a Active,
    store: &'a Store,
    oid: Oid,
    code: Code,
    len: u64,
    wanted: usize,
    found: Vec<(usize, Bytes)>,
    /// Who has these strips, and what was left out of them.
    left: Vec<(NodeId, usize, LeftOut)>,
    /// The last epoch in which somebody removed the object; 0 = nobody knows of one.
    removed: Epoch,
}

/// Recovers the strip of `oid` that `replica` names, `len` bytes long.
pub async fn recover(
    sheep: &Arc<Sheep>,
    active: &Active,
    store: &Store,
    replica: Replica,
    code: Code,
    len: u64,
) -> Recovered {
    if sheep.intents.is_unsettled(replica.oid) {
        return Recovered::Later("writes of it are being settled".into());
    }
    let wanted = usize::from(replica.strip.unwrap_or(0));
    let (oid, found, left) = (replica.oid, Vec::new(), Vec::new());
    let removed = sheep.tombstones.epoch_of(oid);
    let mut search = Search { sheep, active, store, oid, code, len, wanted, found, left, removed };
    let strip = match search.run().await {
        Ok(strip) => strip,
        Err(outcome) => return outcome,
    };
    let Some(_pass) = sheep.gate.enter(active.round.epoch) else { return Recovered::Replaced };
    let sources: Vec<usize> = search.found.iter().map(|(index, _)| *index).collect();
    tracing::debug!(
        "{replica}: recovered at epoch {}, from strips {sources:?} or as it was",
        active.round.epoch
    );
    let made = match store.is_cut_off(replica, active.round.epoch, len) && store.exists(replica) {
        // Nobody writes to it before it is recovered. One that is whole was made by a gateway meanwhile, and is newer.
        true => store.create(replica, len, 0, strip).await,
        false => super::pieces::restore(sheep, active, store, replica, strip).await.map(drop),
    };
    match made {
        Ok(()) => Recovered::Here,
        Err(error) => Recovered::Later(error.to_string()),
    }
}

impl Search<'_> {
    async fn run(&mut self) -> Result<Bytes, Recovered> {
        let mut epoch = self.active.round.tgt_epoch;
        let mut nodes = self.active.round.old.clone();
        loop {
            match self.search(epoch, nodes).await {
                Ok(Some(strip)) => return Ok(strip),
                Ok(None) => {}
                Err(Recovered::Later(reason)) => return Err(self.unknown(epoch, reason).await),
                Err(outcome) => return Err(outcome),
            }
            if epoch.0 <= 1 || !self.removed.is_before(epoch) {
                return Err(match self.found.len() {
                    0 => Recovered::Nowhere,
                    n => Recovered::TooFew(n),
                });
            }
            epoch = Epoch(epoch.0 - 1);
            let Some(log) = epoch_log(self.sheep, epoch).await else {
                let reason = format!("the members of epoch {epoch} are not known");
                return Err(self.unknown(epoch, reason).await);
            };
            nodes = log.nodes;
        }
    }

    /// The search cannot go on at `epoch`.
    async fn unknown(&self, epoch: Epoch, reason: String) -> Recovered {
        if !self.found.is_empty() {
            return Recovered::Later(reason);
        }
        let strip = |index| Replica { oid: self.oid, strip: Some(index as u8) };
        let names: Vec<Replica> = (0..self.code.strips()).map(strip).collect();
        unknown(self.sheep, self.active, &names, epoch, reason).await
    }

    /// Looks at one epoch. `Ok(None)` = it had no state of its own, older ones may be added.
    async fn search(&mut self, epoch: Epoch, nodes: Vec<NodeRecord>) -> Result<Option<Bytes>, Recovered> {
        let weights = Weights::of_cluster(self.sheep.views.load().flags);
        let ring = Ring::new(nodes, weights).map_err(|e| Recovered::Later(e.to_string()))?;
        let homes: Vec<NodeId> = ring.nodes_of(self.oid, self.code.strips()).map(|n| n.nid).collect();
        let (mut unknown, mut proven) = (None, false);
        let wanted = self.wanted;
        let order = std::iter::once(wanted).chain((0..self.code.strips()).filter(|i| *i != wanted));
        let mut places: Vec<(usize, NodeId)> =
            order.clone().filter_map(|index| Some((index, *homes.get(index)?))).collect();
        let nr_homes = places.len();
        if self.active.round.wildcard {
            let storing: Vec<NodeId> =
                ring.nodes().iter().filter(|n| n.nr_vnodes > 0).map(|n| n.nid).collect();
            let all = order.flat_map(|index| storing.iter().map(move |node| (index, *node)));
            places.extend(all.filter(|(index, node)| homes.get(*index) != Some(node)));
        }
        for (nth, (index, node)) in places.into_iter().enumerate() {
            if self.found.iter().any(|(i, _)| *i == index) {
                continue;
            }
            match self.ask(node, index, epoch).await {
                Answer::Strip(strip, _) if index == self.wanted => return Ok(Some(strip)),
                Answer::Strip(strip, left) => {
                    self.found.push((index, strip));
                    self.left.push((node, index, left));
                }
                // Only a home proves something.
                Answer::Absent => proven |= nth < nr_homes,
                Answer::Unknown(reason) => unknown = Some(reason),
                Answer::Replaced => return Err(Recovered::Replaced),
            }
            if self.found.len() == self.code.data_strips() {
                self.same_state().await?;
                return self.decode().map(Some);
            }
        }
        match unknown {
            Some(reason) if !proven => Err(Recovered::Later(reason)),
            _ => Ok(None),
        }
    }

    async fn ask(&mut self, home: NodeId, index: usize, epoch: Epoch) -> Answer {
        let strip = if home == self.sheep.me {
            self.own(index, epoch).await
        } else if self.sheep.views.load().is_member(&home) {
            self.remote(home, index, epoch).await
        } else {
            return Answer::Unknown(format!("{home}, which had strip {index} at epoch {epoch}, is away"));
        };
        match strip {
            Ok((strip, left)) => Answer::Strip(strip, left),
            Err(ResultCode::OLD_NODE_VER) => Answer::Replaced,
            Err(ResultCode::NO_OBJ) => Answer::Absent,
            Err(code) => Answer::Unknown(format!("strip {index} at epoch {epoch}: {home}: {code}")),
        }
    }

    async fn remote(
        &mut self,
        home: NodeId,
        index: usize,
        epoch: Epoch,
    ) -> Result<(Bytes, LeftOut), ResultCode> {
        let body =
            ObjRequest { oid: self.oid, tgt_epoch: epoch, ec_index: index as u8, ..ObjRequest::zeroed() };
        let request = Request::new(Opcode::READ_PEER)
            .flag(Flags::RECOVERY)
            .epoch(self.active.round.epoch)
            .length(self.len as usize)
            .with_obj(body);
        let reply = self.sheep.peers.call(&home, request, Bytes::new(), COPY_DEADLINE).await;
        let reply = reply.map_err(|_| ResultCode::NETWORK_ERROR)?;
        self.removed = self.removed.max(removal(&reply.response));
        reply.response.result.ok()?;
        if reply.data.len() as u64 != self.len {
            return Err(ResultCode::NETWORK_ERROR);
        }
        Ok((reply.data, LeftOut::marked(&reply.response)))
    }

    async fn own(&self, index: usize, epoch: Epoch) -> Result<(Bytes, LeftOut), ResultCode> {
        let replica = Replica { oid: self.oid, strip: Some(index as u8) };
        let len = self.len as usize;
        if self.store.is_cut_off(replica, epoch, self.len) {
            return Err(ResultCode::AGAIN);
        }
        let read = match before_open_writes(&self.sheep.intents, self.store, replica, 0, len).await {
            Ok(strip) => Ok(strip.ok_or(ResultCode::AGAIN)?),
            Err(StoreError::NoObject) if self.sheep.recovery.lacking.has(self.store, replica, epoch) => {
                return Err(ResultCode::AGAIN);
            }
            Err(StoreError::NoObject) => {
                self.store.read_stale(replica, epoch, 0, len).await.map(|strip| (strip, LeftOut::default()))
            }
            Err(error) => Err(error),
        };
        match read {
            Err(StoreError::NoObject) if !self.sheep.history.covers(epoch) => Err(ResultCode::AGAIN),
            other => other.map_err(|error| crate::faults::recovery_result(self.sheep, &error)),
        }
    }

    /// In an epoch that goes on, a write that all homes have, this one included before it lost its strip, may not be known to
    /// be done to some: strips with and without it do not fit, and without it this one would lack it.
    async fn same_state(&self) -> Result<(), Recovered> {
        let Some((node, index, left)) = self.left.first().copied() else { return Ok(()) };
        if self.active.round.tgt_epoch != self.active.round.epoch {
            return Ok(());
        }
        if self.left.iter().any(|(_, _, other)| *other != left) {
            return Err(Recovered::Later("strips of it are of different moments".into()));
        }
        if left == LeftOut::default() {
            return Ok(());
        }
        let ids = self.left_out(node, index).await.filter(|ids| LeftOut::of(ids) == left);
        let Some(ids) = ids else {
            return Err(Recovered::Later("what is left out of its strips is not known".into()));
        };
        let fate = |id: &WriteId| self.sheep.intents.fate(self.oid, *id, self.active.round.epoch);
        match ids.iter().any(|id| matches!(fate(id), Fate::Done | Fate::Kept | Fate::Loose)) {
            true => Err(Recovered::Later("others do not know yet that writes of it are done".into())),
            false => Ok(()),
        }
    }

    /// The writes that `node` leaves out of a strip.
    async fn left_out(&self, node: NodeId, index: usize) -> Option<Vec<WriteId>> {
        if node == self.sheep.me {
            let replica = Replica { oid: self.oid, strip: Some(index as u8) };
            return Some(self.sheep.intents.open_of(replica));
        }
        let body = OrderRequest {
            oid: self.oid,
            what: order::LEFT_OUT,
            kind: index as u8,
            ..OrderRequest::zeroed()
        };
        let request = Request::new(Opcode::ORDER_PEER)
            .epoch(self.active.round.epoch)
            .length(MOST_LEFT_OUT)
            .with_order(body);
        let reply = self.sheep.peers.call(&node, request, Bytes::new(), COPY_DEADLINE).await.ok()?;
        reply.response.result.is_ok().then(|| decode_ids(&reply.data))
    }

    fn decode(&self) -> Result<Bytes, Recovered> {
        let inputs: Vec<(usize, &[u8])> = self.found.iter().map(|(i, strip)| (*i, &strip[..])).collect();
        let mut out = PageBuf::dirty(self.len as usize);
        match self.code.decode(self.wanted, &inputs, &mut out) {
            Ok(()) => Ok(out.freeze()),
            Err(error) => Err(Recovered::Later(error.to_string())),
        }
    }
}
