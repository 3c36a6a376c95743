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
use sheepdog_client::Reply;
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
            _ => ObjRequest {
                tgt_epoch: Epoch(self.id.writer),
                write_seq: self.id.seq,
                alters: self.view.alters as u8,
                ..body
            },
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

    /// Gives every home that lacks its strip, or cannot read all of it, a rebuilt one. Nobody else touches the object
    /// meanwhile.
    pub async fn heal(&self, object_size: u64) -> Result<(), Failure> {
        let strips = self.strips(object_size).await?;
        self.rebuild(object_size, &strips).await
    }

    /// As [`Attempt::heal`], and replaces strip `suspect` if all others fit without it.
    pub async fn repair(&self, object_size: u64, suspect: usize) -> Result<(), Failure> {
        let mut strips = self.strips(object_size).await?;
        if strips.iter().all(Option::is_some) && self.is_misfit(&strips, suspect)? {
            tracing::warn!("{}: strip {suspect} does not fit the others, which do", self.oid);
            strips[suspect] = None;
        }
        self.rebuild(object_size, &strips).await
    }

    /// Every strip as a whole; `None` = its home lacks it or cannot read it.
    async fn strips(&self, object_size: u64) -> Result<Vec<Option<Bytes>>, Failure> {
        let range = self.whole(object_size);
        let (offset, len) = (range.strip_offset(self.code), range.strip_len(self.code) as usize);
        let homes = self.homes()?;
        let reads = homes.iter().enumerate().map(|(index, node)| {
            let request = self.request(Opcode::READ_PEER, index, offset).length(len);
            call(self.sheep, *node, request, Bytes::new())
        });
        let strip = |read: Result<Reply, Failure>| match read {
            Ok(reply) => Ok(Some(reply.data)),
            Err(failure) if failure.code == ResultCode::NO_OBJ => Ok(None),
            Err(failure) => Err(failure),
        };
        join_all(reads).await.into_iter().map(strip).collect()
    }

    fn whole(&self, object_size: u64) -> StripeRange {
        StripeRange::of(0, u32::try_from(object_size).unwrap_or(u32::MAX))
    }

    /// Whether the strips fit together without `suspect`, but not with it. It takes two parity strips to tell.
    fn is_misfit(&self, strips: &[Option<Bytes>], suspect: usize) -> Result<bool, Failure> {
        let others = strips.iter().enumerate().filter(|(index, _)| *index != suspect);
        let others: Vec<(usize, Bytes)> = others.filter_map(|(i, s)| Some((i, s.clone()?))).collect();
        let data = self.code.data_strips();
        if others.len() <= data || suspect >= strips.len() {
            return Ok(false);
        }
        let len = others[0].1.len() * data;
        let object = assemble(self.code, others[..data].to_vec(), len)?;
        let fitting = encode(self.code, &object, strips.len())?;
        let fits = |index: usize| strips[index].as_ref() == Some(&fitting[index]);
        Ok(others.iter().all(|(index, _)| fits(*index)) && !fits(suspect))
    }

    /// Computes the strips that are not there from those that are, and gives them to their homes.
    async fn rebuild(&self, object_size: u64, strips: &[Option<Bytes>]) -> Result<(), Failure> {
        let lacking: Vec<usize> = (0..strips.len()).filter(|index| strips[*index].is_none()).collect();
        if lacking.is_empty() {
            return Ok(());
        }
        let data = self.code.data_strips();
        let there = strips.iter().enumerate().filter_map(|(i, s)| Some((i, s.clone()?)));
        let there: Vec<(usize, Bytes)> = there.take(data).collect();
        if there.len() < data {
            return Err(ResultCode::NO_OBJ.into());
        }
        let homes = self.homes()?;
        let object = assemble(self.code, there, self.whole(object_size).object_len() as usize)?;
        let rebuilt = encode(self.code, &object, homes.len())?;
        for index in lacking {
            let request = self.request(Opcode::CREATE_AND_WRITE_PEER, index, 0).flag(Flags::WRITE);
            call(self.sheep, homes[index], request, rebuilt[index].clone()).await?;
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
