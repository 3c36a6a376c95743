//! Checking replicated objects: a majority vote over the hashes of the copies.

use bytes::Bytes;
use futures_util::future::try_join_all;
use sheepdog_proto::header::{ForwardRequest, ObjRequest};
use sheepdog_proto::{NodeRecord, Oid, Opcode, Request, ResultCode};

use super::{PAUSE, ROUNDS, report_busy, unreadable};
use crate::context::Context;
use crate::exit::{Outcome, Stop};
use crate::out;
use crate::session::success;

/// SHA-1 of a copy; `None` = it does not exist.
type Hash = Option<[u8; 20]>;

/// What the copies say.
#[derive(Debug, PartialEq, Eq)]
enum Vote {
    /// No copy exists.
    Nowhere,
    /// No content has more than half of the copies that exist.
    NoMajority,
    /// Position of a copy with the content of the majority.
    Majority(usize),
}

fn vote(hashes: &[Hash]) -> Vote {
    let existing = hashes.iter().flatten().count();
    if existing == 0 {
        return Vote::Nowhere;
    }
    let votes = |hash: &Hash| hashes.iter().filter(|other| *other == hash).count();
    match hashes.iter().position(|hash| hash.is_some() && 2 * votes(hash) > existing) {
        Some(winner) => Vote::Majority(winner),
        None => Vote::NoMajority,
    }
}

fn agree(hashes: &[Hash]) -> bool {
    hashes.iter().all(|hash| hash.is_some() && *hash == hashes[0])
}

/// Checks an object on its homes and repairs the copies that differ from the majority.
pub async fn check(context: &Context, oid: Oid, homes: &[NodeRecord]) -> Outcome {
    let mut hashes = hash_all(context, oid, homes).await?;
    for round in 1.. {
        if agree(&hashes) {
            return Ok(());
        }
        tokio::time::sleep(PAUSE).await;
        let again = hash_all(context, oid, homes).await?;
        if again == hashes {
            break;
        }
        if round == ROUNDS {
            report_busy(oid);
            return Ok(());
        }
        hashes = again;
    }
    match vote(&hashes) {
        Vote::Nowhere => out::log(format_args!("no node has {oid}")),
        Vote::NoMajority => out::log(format_args!("no majority of {oid}")),
        Vote::Majority(winner) => {
            for (home, hash) in homes.iter().zip(&hashes).filter(|(_, hash)| **hash != hashes[winner]) {
                repair(context, oid, &homes[winner], home, hash.is_none()).await;
            }
        }
    }
    Ok(())
}

async fn hash_all(context: &Context, oid: Oid, homes: &[NodeRecord]) -> Result<Vec<Hash>, Stop> {
    try_join_all(homes.iter().map(|home| hash_one(context, oid, home))).await
}

async fn hash_one(context: &Context, oid: Oid, home: &NodeRecord) -> Result<Hash, Stop> {
    let body = ObjRequest { oid, tgt_epoch: context.cluster.epoch, ..ObjRequest::zeroed() };
    let request = Request::new(Opcode::GET_HASH).with_obj(body);
    match context.session.send(&home.nid, request, Bytes::new()).await {
        Err(e) => Err(unreadable(oid, home, e)),
        Ok(reply) => match reply.response.result {
            ResultCode::SUCCESS => Ok(Some(reply.response.hash().digest)),
            ResultCode::NO_OBJ => Ok(None),
            other => Err(unreadable(oid, home, other)),
        },
    }
}

async fn repair(context: &Context, oid: Oid, from: &NodeRecord, to: &NodeRecord, missing: bool) {
    let body = ForwardRequest { oid, addr: from.nid.addr, port: from.nid.port };
    let request = Request::new(Opcode::REPAIR_REPLICA).epoch(context.cluster.epoch).with_forward(body);
    match success(context.session.send(&to.nid, request, Bytes::new()).await) {
        Ok(_) if missing => out!("fixed missing {oid}\n"),
        Ok(_) => out!("fixed replica {oid}\n"),
        Err(_) => {
            let (from, to) = (from.nid.host_port(), to.nid.host_port());
            out::log(format_args!("failed to repair object {oid} from {from} to {to}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_more_than_half_of_the_existing_copies_win() {
        let (a, b, c) = (Some([1; 20]), Some([2; 20]), Some([3; 20]));
        assert_eq!(vote(&[None, None]), Vote::Nowhere);
        assert_eq!(vote(&[a, b]), Vote::NoMajority);
        assert_eq!(vote(&[a, b, c]), Vote::NoMajority);
        assert_eq!(vote(&[b, a, a]), Vote::Majority(1));
        assert_eq!(vote(&[None, a, None]), Vote::Majority(1));
        assert_eq!(vote(&[a, a, b, b]), Vote::NoMajority);
    }

    #[test]
    fn a_missing_copy_is_no_agreement() {
        let a = Some([1; 20]);
        assert!(agree(&[a, a]));
        assert!(!agree(&[a, None]) && !agree(&[None, None]));
    }
}
