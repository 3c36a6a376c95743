//! Checking erasure-coded objects: parity against data, missing strips rebuilt.

use bytes::Bytes;
use futures_util::future::try_join_all;
use sheepdog_erasure::Code;
use sheepdog_proto::header::{ObjRequest, OrderRequest, order};
use sheepdog_proto::{CopyPolicy, Flags, NodeRecord, Oid, Opcode, Request, ResultCode};

use super::{PAUSE, ROUNDS, report_busy, unreadable};
use crate::context::Context;
use crate::exit::{FAILURE, Outcome, Stop, fail};
use crate::inode::Inode;
use crate::out;
use crate::session::{Failed, success};

/// A strip; `None` = it does not exist.
type Strip = Option<Bytes>;

/// Checks an object on its homes; strip `i` belongs on `homes[i]`.
pub async fn check(
    context: &Context,
    oid: Oid,
    inode: &Inode,
    policy: CopyPolicy,
    homes: &[NodeRecord],
) -> Outcome {
    let code = Code::from_policy(policy.to_byte()).map_err(|e| fail(FAILURE, e))?;
    let length = code.strip_file_len(inode.header.block_size()) as usize;
    let mut strips = read_all(context, oid, homes, length).await?;
    for round in 1.. {
        if consistent(&code, &strips)? {
            return Ok(());
        }
        tokio::time::sleep(PAUSE).await;
        let again = read_all(context, oid, homes, length).await?;
        if again == strips {
            break;
        }
        if round == ROUNDS {
            report_busy(oid);
            return Ok(());
        }
        strips = again;
    }
    let lost: Vec<usize> = (0..strips.len()).filter(|i| strips[*i].is_none()).collect();
    if lost.len() > code.parity_strips() {
        let (lost, parity) = (lost.len(), code.parity_strips());
        out::log(format_args!("failed to rebuild object {oid}. {lost} copies get lost, more than {parity}"));
        return Ok(());
    }
    let writer = StripWriter { context, oid, policy, homes };
    if lost.is_empty() {
        out::log(format_args!("object {oid} is inconsistent"));
        if let Some((bad, content)) = locate(&code, &strips)?
            && writer.write(bad, content).await
        {
            out!("fixed replica {oid}, copy index {bad}\n");
        }
        return Ok(());
    }
    for (index, content) in lost.iter().zip(rebuild(&code, &strips, &lost)?) {
        if writer.write(*index, content).await {
            out!("fixed missing {oid}, copy index {index}\n");
        }
    }
    Ok(())
}

async fn read_all(
    context: &Context,
    oid: Oid,
    homes: &[NodeRecord],
    length: usize,
) -> Result<Vec<Strip>, Stop> {
    let reads = homes.iter().enumerate().map(|(i, home)| read_one(context, oid, home, i as u8, length));
    try_join_all(reads).await
}

async fn read_one(
    context: &Context,
    oid: Oid,
    home: &NodeRecord,
    ec_index: u8,
    length: usize,
) -> Result<Strip, Stop> {
    let epoch = context.cluster.epoch;
    let body = ObjRequest { oid, ec_index, tgt_epoch: epoch, ..ObjRequest::zeroed() };
    let request = Request::new(Opcode::READ_PEER).epoch(epoch).length(length).with_obj(body);
    match context.session.send(&home.nid, request, Bytes::new()).await {
        Err(e) => Err(unreadable(oid, home, e)),
        Ok(reply) => match reply.response.result {
            ResultCode::SUCCESS if reply.data.len() == length => Ok(Some(reply.data)),
            ResultCode::SUCCESS => Err(unreadable(oid, home, "short answer")),
            ResultCode::NO_OBJ => Ok(None),
            other => Err(unreadable(oid, home, other)),
        },
    }
}

/// Whether all strips exist and fit together.
fn consistent(code: &Code, strips: &[Strip]) -> Result<bool, Stop> {
    if strips.iter().any(Option::is_none) {
        return Ok(false);
    }
    let data = code.data_strips();
    let parity: Vec<usize> = (data..code.strips()).collect();
    let expected = rebuild(code, strips, &parity)?;
    Ok(parity.iter().zip(expected).all(|(i, parity)| strips[*i].as_deref() == Some(&parity[..])))
}

/// Rebuilds strips from the first others that exist.
fn rebuild(code: &Code, strips: &[Strip], lost: &[usize]) -> Result<Vec<Vec<u8>>, Stop> {
    let inputs: Vec<(usize, &[u8])> = strips
        .iter()
        .enumerate()
        .filter(|(i, _)| !lost.contains(i))
        .filter_map(|(i, strip)| Some((i, strip.as_deref()?)))
        .take(code.data_strips())
        .collect();
    let length = inputs.first().map_or(0, |(_, strip)| strip.len());
    let mut rebuilt = vec![vec![0; length]; lost.len()];
    let mut outputs: Vec<&mut [u8]> = rebuilt.iter_mut().map(Vec::as_mut_slice).collect();
    code.decode_many(lost, &inputs, &mut outputs).map_err(|e| fail(FAILURE, e))?;
    Ok(rebuilt)
}

/// The one strip without which the others fit together, and what it should be. It takes two parity strips to tell.
fn locate(code: &Code, strips: &[Strip]) -> Result<Option<(usize, Vec<u8>)>, Stop> {
    let mut found = None;
    for suspect in 0..strips.len() {
        // From the first data strips besides the suspect, all others are computed and compared.
        let others: Vec<usize> =
            (0..strips.len()).filter(|i| *i != suspect).skip(code.data_strips()).collect();
        if others.is_empty() {
            return Ok(None);
        }
        let lost: Vec<usize> = std::iter::once(suspect).chain(others.iter().copied()).collect();
        let mut rebuilt = rebuild(code, strips, &lost)?;
        let fits = others.iter().zip(&rebuilt[1..]).all(|(i, s)| strips[*i].as_deref() == Some(&s[..]));
        if fits && found.replace((suspect, rebuilt.swap_remove(0))).is_some() {
            return Ok(None);
        }
    }
    Ok(found)
}

struct StripWriter<'a> {
    context: &'a Context,
    oid: Oid,
    policy: CopyPolicy,
    homes: &'a [NodeRecord],
}

impl StripWriter<'_> {
    /// Has a strip put right; `false`, with a message, if that failed. Its home looks once more in the order of the object's
    /// writes, so that none of them is overwritten. A home of the original cannot, and is sent the whole strip.
    async fn write(&self, index: usize, content: Vec<u8>) -> bool {
        let done = match self.ask(index).await {
            Err(Failed::Refused(ResultCode::INVALID_PARMS)) => self.send(index, content).await,
            done => done,
        };
        done.inspect_err(|e| {
            let (oid, place) = (self.oid, self.homes[index].nid.host_port());
            out::log(format_args!("failed to repair object {oid}, copy index {index} on {place}: {e}"));
        })
        .is_ok()
    }

    async fn ask(&self, index: usize) -> Result<(), Failed> {
        let body =
            OrderRequest { oid: self.oid, what: order::REPAIR, kind: index as u8, ..OrderRequest::zeroed() };
        let request = Request::new(Opcode::ORDER_PEER)
            .flag(Flags::WRITE)
            .epoch(self.context.cluster.epoch)
            .with_order(body);
        success(self.context.session.send(&self.homes[index].nid, request, Bytes::new()).await).map(drop)
    }

    async fn send(&self, index: usize, content: Vec<u8>) -> Result<(), Failed> {
        let body = ObjRequest {
            oid: self.oid,
            copies: self.policy.strips(),
            copy_policy: self.policy.to_byte(),
            ec_index: index as u8,
            ..ObjRequest::zeroed()
        };
        let request = Request::new(Opcode::CREATE_AND_WRITE_PEER)
            .flag(Flags::WRITE)
            .epoch(self.context.cluster.epoch)
            .with_obj(body);
        success(self.context.session.send(&self.homes[index].nid, request, content.into()).await).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(code: &Code) -> Vec<Strip> {
        let data: Vec<Vec<u8>> = (0..code.data_strips())
            .map(|s| (0..256u32).map(|i| (i * 7 + s as u32 * 13) as u8).collect())
            .collect();
        let mut strips: Vec<Strip> = data.into_iter().map(|d| Some(Bytes::from(d))).collect();
        strips.resize(code.strips(), None);
        let parity: Vec<usize> = (code.data_strips()..code.strips()).collect();
        for (i, content) in parity.iter().zip(rebuild(code, &strips, &parity).unwrap()) {
            strips[*i] = Some(content.into());
        }
        strips
    }

    fn damage(strip: &Strip) -> Strip {
        let mut bytes = strip.as_ref().unwrap().to_vec();
        bytes[3] ^= 0x55;
        Some(bytes.into())
    }

    #[test]
    fn a_single_bad_strip_is_found_with_two_parity_strips() {
        let code = Code::new(4, 2).unwrap();
        let good = object(&code);
        assert!(consistent(&code, &good).unwrap());
        for bad in 0..6 {
            let mut strips = good.clone();
            strips[bad] = damage(&strips[bad]);
            assert!(!consistent(&code, &strips).unwrap());
            let (index, content) = locate(&code, &strips).unwrap().unwrap();
            assert_eq!((index, Some(&content[..])), (bad, good[bad].as_deref()));
        }
    }

    #[test]
    fn with_one_parity_strip_nothing_can_be_located() {
        let code = Code::new(2, 1).unwrap();
        let mut strips = object(&code);
        strips[1] = damage(&strips[1]);
        assert_eq!(locate(&code, &strips).unwrap(), None);
    }
}
