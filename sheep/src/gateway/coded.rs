//! Erasure-coded objects at the gateway: splitting, encoding, degraded reads (spec 02, section 11; spec 06, 5.2, 6.3).
//!
//! Strip `i` of an object lives on the `i`-th node of its placement. Every strip that has a home is always written,
//! parity included, and a write of part of a stripe reads the rest of that stripe first, once, before any strip is
//! sent. A read that misses data strips decodes them from parity; it never answers with strips of a failed write mixed
//! in, because requests to overlapping stripes are ordered before they come here.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, join_all};
use futures_util::stream::{FuturesUnordered, StreamExt};
use sheepdog_buffer::PageBuf;
use sheepdog_erasure::{Code, STRIPE, StripeRange};
use sheepdog_proto::header::ObjRequest;
use sheepdog_proto::{CopyPolicy, Epoch, Flags, NodeId, Oid, Opcode, Request, ResultCode};
use sheepdog_store::Replica;

use super::replicas::{Failure, call, deciding};
use crate::intents::WriteId;
use crate::sheep::Sheep;
use crate::view::View;

/// A data strip that is not there within this time is rebuilt from parity.
const HEDGE_AFTER: Duration = Duration::from_secs(1);

/// The code of a policy that is known to be valid.
pub fn code_of(policy: CopyPolicy) -> Result<Code, ResultCode> {
    Code::from_policy(policy.to_byte()).map_err(|_| ResultCode::INVALID_PARMS)
}

/// An operation on one coded object in one epoch.
pub struct Attempt<'a> {
    /// Shared state.
    pub sheep: &'a Arc<Sheep>,
    /// The epoch's view.
    pub view: &'a View,
    /// The object.
    pub oid: Oid,
    /// Its code.
    pub code: Code,
    /// What homes know the write by.
    pub id: WriteId,
}

impl Attempt<'_> {
    /// Homes by strip index; fewer than the code has strips when the cluster is short of zones.
    fn homes(&self) -> Result<Vec<NodeId>, Failure> {
        let nodes: Vec<NodeId> =
            self.view.ring.nodes_of(self.oid, self.code.strips()).map(|n| n.nid).collect();
        if nodes.is_empty() {
            return Err(ResultCode::WAIT_FOR_JOIN.into());
        }
        if nodes.len() < self.code.data_strips() {
            tracing::error!(
                "There isn't enough copies({}) to send out ({})",
                nodes.len(),
                self.code.data_strips()
            );
            return Err(ResultCode::SYSTEM_ERROR.into());
        }
        Ok(nodes)
    }

    fn request(&self, opcode: Opcode, index: usize, offset: u32) -> Request {
        let body = ObjRequest {
            oid: self.oid,
            offset,
            copies: self.code.strips() as u8,
            copy_policy: self.code.policy(),
            ec_index: index as u8,
            ..ObjRequest::zeroed()
        };
        let body = match opcode {
            Opcode::READ_PEER => body,
            _ => ObjRequest { tgt_epoch: Epoch(self.id.writer), write_seq: self.id.seq, ..body },
        };
        Request::new(opcode).epoch(self.view.epoch).with_obj(body)
    }

    /// Writes or creates whole stripes: every strip that has a home. `STALE_OBJ` = some homes lack their strip.
    pub async fn store(&self, opcode: Opcode, range: StripeRange, stripes: &Bytes) -> Result<(), Failure> {
        let homes = self.homes()?;
        let strips = encode(self.code, stripes, homes.len())?;
        let offset = range.strip_offset(self.code);
        if opcode == Opcode::WRITE_PEER
            && let Some(index) = homes.iter().position(|home| *home == self.sheep.me)
        {
            let replica = Replica { oid: self.oid, strip: Some(index as u8) };
            let (epoch, data) = (self.view.epoch, strips[index].clone());
            tokio::task::block_in_place(|| {
                self.sheep.intents.announce(replica, self.id, epoch, offset.into(), data)
            });
        }
        let sends = homes.iter().zip(strips).enumerate().map(|(index, (node, strip))| {
            call(self.sheep, *node, self.request(opcode, index, offset).flag(Flags::WRITE), strip)
        });
        let failures: Vec<Failure> = join_all(sends).await.into_iter().filter_map(Result::err).collect();
        let Some(failure) = deciding(&failures) else { return Ok(()) };
        let missing = failures.iter().all(|f| f.code == ResultCode::NO_OBJ);
        if missing && failures.len() < homes.len() { Err(ResultCode::STALE_OBJ.into()) } else { Err(failure) }
    }

    /// Reads whole stripes: the data strips, or any `d` strips if some of them fail or are slow.
    pub async fn load(&self, range: StripeRange) -> Result<PageBuf, Failure> {
        let homes = self.homes()?;
        let data = self.code.data_strips();
        let (offset, len) = (range.strip_offset(self.code), range.strip_len(self.code) as usize);
        let ask = |index: usize| -> BoxFuture<'_, (usize, Result<Bytes, Failure>)> {
            let request = self.request(Opcode::READ_PEER, index, offset).length(len);
            let node = homes[index];
            Box::pin(async move {
                (index, call(self.sheep, node, request, Bytes::new()).await.map(|reply| reply.data))
            })
        };
        let mut waiting: FuturesUnordered<_> = (0..data).map(ask).collect();
        let mut spare = data..homes.len();
        let mut strips: Vec<(usize, Bytes)> = Vec::new();
        let mut failures = Vec::new();
        while strips.len() < data {
            match tokio::time::timeout(HEDGE_AFTER, waiting.next()).await {
                Ok(Some((index, Ok(strip)))) => strips.push((index, strip)),
                Ok(Some((_, Err(failure)))) => {
                    failures.push(failure);
                    waiting.extend(spare.next().map(ask));
                }
                Ok(None) => break,
                Err(_) => waiting.extend(spare.next().map(ask)),
            }
        }
        if strips.len() < data {
            return Err(deciding(&failures).unwrap_or(ResultCode::NETWORK_ERROR.into()));
        }
        assemble(self.code, strips, range.object_len() as usize)
    }

    /// Removes every strip; `NO_OBJ` if one was missing.
    pub async fn remove(&self) -> Result<(), Failure> {
        let homes = self.homes()?;
        let sends = homes.iter().enumerate().map(|(index, node)| {
            call(self.sheep, *node, self.request(Opcode::REMOVE_PEER, index, 0), Bytes::new())
        });
        let failures: Vec<Failure> = join_all(sends).await.into_iter().filter_map(Result::err).collect();
        deciding(&failures).map_or(Ok(()), Err)
    }

    /// Gives every home that lacks its strip a rebuilt one. Nobody else touches the object meanwhile.
    pub async fn heal(&self, object_size: u64) -> Result<(), Failure> {
        let range = StripeRange::of(0, u32::try_from(object_size).unwrap_or(u32::MAX));
        let homes = self.homes()?;
        let mut lacking = Vec::new();
        for (index, node) in homes.iter().enumerate() {
            let probe = self.request(Opcode::READ_PEER, index, 0).length(1);
            match call(self.sheep, *node, probe, Bytes::new()).await {
                Ok(_) => {}
                Err(f) if f.code == ResultCode::NO_OBJ => lacking.push(index),
                Err(failure) => return Err(failure),
            }
        }
        if homes.len() - lacking.len() < self.code.data_strips() {
            return Err(ResultCode::NO_OBJ.into());
        }
        let object = self.load(range).await?.freeze();
        let strips = encode(self.code, &object, homes.len())?;
        for index in lacking {
            let request = self.request(Opcode::CREATE_AND_WRITE_PEER, index, 0).flag(Flags::WRITE);
            call(self.sheep, homes[index], request, strips[index].clone()).await?;
        }
        Ok(())
    }
}

fn broken(error: sheepdog_erasure::Error) -> Failure {
    tracing::error!("erasure code: {error}");
    ResultCode::SYSTEM_ERROR.into()
}

/// The first `count` strips of whole stripes.
pub fn encode(code: Code, stripes: &[u8], count: usize) -> Result<Vec<Bytes>, Failure> {
    let len = stripes.len() / code.data_strips();
    let mut strips: Vec<PageBuf> = (0..count.min(code.strips())).map(|_| PageBuf::dirty(len)).collect();
    let mut slices: Vec<&mut [u8]> = strips.iter_mut().map(|s| &mut s[..]).collect();
    code.encode_stripes(stripes, &mut slices).map_err(broken)?;
    Ok(strips.into_iter().map(PageBuf::freeze).collect())
}

/// Whole stripes, `len` bytes, from any `d` strips.
pub fn assemble(code: Code, mut strips: Vec<(usize, Bytes)>, len: usize) -> Result<PageBuf, Failure> {
    strips.sort_by_key(|(index, _)| *index);
    let data = code.data_strips();
    let inputs: Vec<(usize, &[u8])> = strips.iter().map(|(index, strip)| (*index, &strip[..])).collect();
    let mut rebuilt: Vec<(usize, PageBuf)> = Vec::new();
    for lost in (0..data).filter(|i| inputs.iter().all(|(index, _)| index != i)) {
        let mut out = PageBuf::dirty(len / data);
        code.decode(lost, &inputs, &mut out).map_err(broken)?;
        rebuilt.push((lost, out));
    }
    let strip_at = |i: usize| -> &[u8] {
        let read = inputs.iter().find(|(index, _)| *index == i).map(|(_, strip)| *strip);
        read.or_else(|| rebuilt.iter().find(|(index, _)| *index == i).map(|(_, strip)| &strip[..]))
            .unwrap_or(&[])
    };
    let parts: Vec<&[u8]> = (0..data).map(strip_at).collect();
    let mut object = PageBuf::dirty(len);
    code.join(&parts, &mut object).map_err(broken)?;
    Ok(object)
}

/// Bytes of `data` laid over the stripes of its range; `old` gives the stripes that are not covered whole, by number.
pub fn overlay(range: StripeRange, data: &[u8], old: &[(u32, Bytes)]) -> Bytes {
    let mut stripes = PageBuf::zeroed(range.object_len() as usize);
    for (stripe, bytes) in old {
        let at = (*stripe - range.first()) as usize * STRIPE;
        stripes[at..at + STRIPE].copy_from_slice(bytes);
    }
    let skip = range.skip();
    stripes[skip..skip + data.len()].copy_from_slice(data);
    stripes.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_d_strips_give_the_stripes_back() {
        let code = Code::new(4, 2).expect("valid");
        let object: Vec<u8> = (0..8 * STRIPE).map(|i| (i * 7 % 251) as u8).collect();
        let strips = encode(code, &object, 6).expect("encodes");
        for a in 0..6 {
            for b in a + 1..6 {
                let some = (0..6).filter(|i| *i != a && *i != b).map(|i| (i, strips[i].clone())).collect();
                assert_eq!(
                    &assemble(code, some, object.len()).expect("decodes")[..],
                    &object[..],
                    "without {a}, {b}"
                );
            }
        }
    }

    #[test]
    fn a_write_of_part_of_a_stripe_keeps_the_rest_of_it() {
        let range = StripeRange::of(700, 100);
        let old: Vec<u8> = (0..STRIPE).map(|i| i as u8).collect();
        let stripes = overlay(range, &[9; 100], &[(1, Bytes::from(old.clone()))]);
        assert_eq!(&stripes[..188], &old[..188]);
        assert_eq!(&stripes[188..288], &[9; 100]);
        assert_eq!(&stripes[288..], &old[288..]);
    }
}
