//! Recovering one strip of an erasure-coded object (spec 06, 10.6, without its mixing of states, W-01).
//!
//! A strip is looked for at the node that had its index, newest epoch first, but never before an epoch in which the
//! index had no home: writes of that epoch did not reach it, so an older strip is out of date. Then it is computed
//! from `d` other strips that were found by the same rule.

use std::sync::Arc;

use bytes::Bytes;
use sheepdog_buffer::PageBuf;
use sheepdog_erasure::Code;
use sheepdog_placement::{Ring, Weights};
use sheepdog_proto::header::ObjRequest;
use sheepdog_proto::{Epoch, Flags, NodeId, Oid, Opcode, Request, ResultCode};
use sheepdog_store::{Replica, Store, StoreError};

use super::Active;
use super::object::{COPY_DEADLINE, Recovered};
use crate::cluster::ops::epoch_log;
use crate::sheep::Sheep;

/// What the search for one strip gave.
enum Found {
    Strip(Bytes),
    /// Every epoch that could have it says no.
    Absent,
    /// A node that may have it is away or does not answer.
    Unknown(String),
    Replaced,
}

/// The object being recovered, and what never changes about it.
struct Search<'a> {
    sheep: &'a Arc<Sheep>,
    active: &'a Active,
    store: &'a Store,
    oid: Oid,
    code: Code,
    len: u64,
    /// Homes by index of each epoch looked at, newest first: loaded once for all strips.
    history: Vec<(Epoch, Vec<NodeId>)>,
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
    let mut search = Search { sheep, active, store, oid: replica.oid, code, len, history: Vec::new() };
    let index = usize::from(replica.strip.unwrap_or(0));
    let strip = match search.find(index).await {
        Found::Strip(strip) => strip,
        Found::Replaced => return Recovered::Replaced,
        own => match search.decode(index, matches!(own, Found::Absent)).await {
            Ok(strip) => strip,
            Err(outcome) => return outcome,
        },
    };
    let Some(_pass) = sheep.gate.enter(active.round.epoch) else { return Recovered::Replaced };
    match store.create_if_absent(replica, len, 0, strip).await {
        Ok(_) => Recovered::Here,
        Err(error) => Recovered::Later(error.to_string()),
    }
}

impl Search<'_> {
    /// Homes by index at the `n`-th epoch back from the round's target; `Ok(None)` = there is none.
    async fn epoch_back(&mut self, n: usize) -> Result<Option<(Epoch, Vec<NodeId>)>, String> {
        while self.history.len() <= n {
            let (epoch, nodes) = match self.history.last() {
                None => (self.active.round.tgt_epoch, self.active.round.old.clone()),
                Some((last, _)) if last.0 <= 1 => return Ok(None),
                Some((last, _)) => {
                    let epoch = Epoch(last.0 - 1);
                    let log = epoch_log(self.sheep, epoch).await;
                    (epoch, log.ok_or_else(|| format!("the members of epoch {epoch} are not known"))?.nodes)
                }
            };
            let weights = Weights::of_cluster(self.sheep.views.load().flags);
            let ring = Ring::new(nodes, weights).map_err(|e| e.to_string())?;
            let homes = ring.nodes_of(self.oid, self.code.strips()).map(|n| n.nid).collect();
            self.history.push((epoch, homes));
        }
        Ok(self.history.get(n).cloned())
    }

    async fn find(&mut self, index: usize) -> Found {
        let floor = self.sheep.recovery.last_gathered();
        for n in 0.. {
            let (epoch, homes) = match self.epoch_back(n).await {
                Ok(Some(found)) => found,
                Ok(None) => return Found::Absent,
                Err(reason) => return Found::Unknown(reason),
            };
            let Some(home) = homes.get(index) else {
                // Writes of this epoch had nowhere to put this strip: older ones are out of date.
                return Found::Absent;
            };
            match self.ask(*home, index, epoch).await {
                Ok(strip) => return Found::Strip(strip),
                Err(ResultCode::OLD_NODE_VER) => return Found::Replaced,
                Err(ResultCode::NO_OBJ) => {}
                Err(code) => {
                    return Found::Unknown(format!("strip {index} at epoch {epoch}: {home}: {code}"));
                }
            }
            if epoch.0 <= floor.0 {
                return Found::Absent;
            }
        }
        Found::Absent
    }

    async fn ask(&self, home: NodeId, index: usize, epoch: Epoch) -> Result<Bytes, ResultCode> {
        if home == self.sheep.me {
            return self.own(index, epoch).await;
        }
        if !self.sheep.views.load().is_member(&home) {
            return Err(ResultCode::WAIT_FOR_JOIN);
        }
        let body =
            ObjRequest { oid: self.oid, tgt_epoch: epoch, ec_index: index as u8, ..ObjRequest::zeroed() };
        let request = Request::new(Opcode::READ_PEER)
            .flag(Flags::RECOVERY)
            .epoch(self.active.round.epoch)
            .length(self.len as usize)
            .with_obj(body);
        let reply = self.sheep.peers.call(&home, request, Bytes::new(), COPY_DEADLINE).await;
        let reply = reply.map_err(|_| ResultCode::NETWORK_ERROR)?;
        reply.response.result.ok()?;
        if reply.data.len() as u64 == self.len { Ok(reply.data) } else { Err(ResultCode::NETWORK_ERROR) }
    }

    async fn own(&self, index: usize, epoch: Epoch) -> Result<Bytes, ResultCode> {
        let replica = Replica { oid: self.oid, strip: Some(index as u8) };
        let len = self.len as usize;
        let read = match self.store.read(replica, 0, len).await {
            Err(StoreError::NoObject) => self.store.read_stale(replica, epoch, 0, len).await,
            other => other,
        };
        read.map_err(|error| crate::faults::recovery_result(self.sheep, &error))
    }

    /// Computes the strip from others. `absent`: nobody ever had it as it is now, so with no other strip either there
    /// is no object.
    async fn decode(&mut self, index: usize, absent: bool) -> Result<Bytes, Recovered> {
        let mut strips: Vec<(usize, Bytes)> = Vec::new();
        let mut unknown = if absent { None } else { Some(format!("strip {index} is out of reach")) };
        for other in (0..self.code.strips()).filter(|i| *i != index) {
            if strips.len() == self.code.data_strips() {
                break;
            }
            match self.find(other).await {
                Found::Strip(strip) => strips.push((other, strip)),
                Found::Replaced => return Err(Recovered::Replaced),
                Found::Absent => {}
                Found::Unknown(reason) => unknown = Some(reason),
            }
        }
        if strips.len() < self.code.data_strips() {
            return Err(match unknown {
                None if strips.is_empty() => Recovered::Nowhere,
                None => Recovered::Later(format!("only {} strips are left", strips.len())),
                Some(reason) => Recovered::Later(reason),
            });
        }
        let inputs: Vec<(usize, &[u8])> = strips.iter().map(|(i, strip)| (*i, &strip[..])).collect();
        let mut out = PageBuf::dirty(self.len as usize);
        match self.code.decode(index, &inputs, &mut out) {
            Ok(()) => Ok(out.freeze()),
            Err(error) => Err(Recovered::Later(error.to_string())),
        }
    }
}
