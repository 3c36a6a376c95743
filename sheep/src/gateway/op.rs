//! One operation on one object, and a single attempt at it in one epoch.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use sheepdog_erasure::{Code, STRIPE, StripeRange};
use sheepdog_proto::header::ObjRequest;
use sheepdog_proto::{Epoch, Flags, NodeId, Oid, Opcode, Request, ResultCode};

use super::coded::{Attempt, code_of, overlay};
use super::numbers::Number;
use super::object::{is_coded, take_back};
use super::replicas::{self, Failure};
use crate::intents::WriteId;
use crate::settle;
use crate::sheep::Sheep;
use crate::vdi::table::Redundancy;
use crate::view::View;

/// What is done to an object.
#[derive(Debug, Clone)]
pub enum Op {
    /// Reads `len` bytes at `offset`.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: usize,
    },
    /// Overwrites a range of an existing object.
    Write {
        /// First byte.
        offset: u64,
        /// What to write.
        data: Bytes,
    },
    /// Creates or replaces the object: zeros but for `data` at `offset`.
    Create {
        /// First byte.
        offset: u64,
        /// What to write.
        data: Bytes,
    },
    /// Writes a part of the object; creates it first if it is not there.
    Add {
        /// First byte of what a creation writes.
        offset: u64,
        /// What a creation writes: over nothing but zeros.
        data: Bytes,
        /// The part of `data` that is written to an object that is there; the rest is what it had before.
        new: Range<usize>,
    },
    /// Rebuilds strips of a coded object that are missing, and one that does not fit.
    Repair {
        /// The index of the strip that may not fit.
        suspect: u8,
    },
}

/// So often a home may lack an object that it was just given, because its disk is failing at that moment.
const HEALS: u32 = 20;

/// What an attempt leaves for the next one in the same epoch.
#[derive(Default)]
pub struct Scratch {
    /// Homes that lack the object get it first. Needs the turn of the whole object.
    pub heal: bool,
    /// How often a home lacked it nevertheless.
    pub(super) healed: u32,
    /// The whole stripes that a write of part of a coded object replaces; read once, before any strip is sent.
    pub(super) stripes: Option<Bytes>,
    /// [`Op::Add`] found nothing and began to create: as long as the turn and the epoch last nobody else can have written.
    pub(super) creating: bool,
}

/// A request to a home; of a write, with the number that the home knows it by.
pub(super) fn request_for(
    opcode: Opcode,
    oid: Oid,
    offset: u64,
    view: &View,
    copies: u8,
    id: WriteId,
) -> Request {
    let body = ObjRequest {
        oid,
        offset: offset as u32,
        copies,
        alters: if opcode == Opcode::READ_PEER { 0 } else { view.alters as u8 },
        tgt_epoch: Epoch(if opcode == Opcode::READ_PEER { 0 } else { id.writer }),
        write_seq: id.seq,
        ..ObjRequest::zeroed()
    };
    let request = Request::new(opcode).epoch(view.epoch).with_obj(body);
    if opcode == Opcode::READ_PEER || opcode == Opcode::REMOVE_PEER {
        request
    } else {
        request.flag(Flags::WRITE)
    }
}

impl Op {
    /// The client's opcode.
    pub fn opcode(&self) -> Opcode {
        match self {
            Op::Read { .. } => Opcode::READ_OBJ,
            Op::Write { .. } => Opcode::WRITE_OBJ,
            Op::Create { .. } | Op::Add { .. } => Opcode::CREATE_AND_WRITE_OBJ,
            Op::Repair { .. } => Opcode::REPAIR_REPLICA,
        }
    }

    /// First byte.
    pub fn offset(&self) -> u64 {
        match self {
            Op::Read { offset, .. }
            | Op::Write { offset, .. }
            | Op::Create { offset, .. }
            | Op::Add { offset, .. } => *offset,
            Op::Repair { .. } => 0,
        }
    }

    /// Bytes read or written.
    pub fn len(&self) -> usize {
        match self {
            Op::Read { len, .. } => *len,
            Op::Write { data, .. } | Op::Create { data, .. } | Op::Add { data, .. } => data.len(),
            Op::Repair { .. } => 0,
        }
    }

    /// Whether it changes the object.
    pub fn is_write(&self) -> bool {
        !matches!(self, Op::Read { .. })
    }

    /// The bytes that it touches: whole stripes of a coded object, everything when it creates or repairs.
    pub fn range(&self, coded: bool) -> Range<u64> {
        match self {
            Op::Create { .. } | Op::Add { .. } | Op::Repair { .. } => 0..u64::MAX,
            _ if coded => {
                let stripes = self.stripes();
                let start = u64::from(stripes.object_offset());
                start..start + stripes.object_len()
            }
            _ => self.offset()..self.offset() + self.len() as u64,
        }
    }

    fn stripes(&self) -> StripeRange {
        StripeRange::of(self.offset() as u32, self.len() as u32)
    }

    /// One attempt in one epoch. The caller holds the turn of [`Op::range`]. `STALE_OBJ` = some homes have the object and
    /// some do not: heal.
    pub async fn attempt(
        &self,
        sheep: &Arc<Sheep>,
        view: &View,
        oid: Oid,
        kept: Redundancy,
        scratch: &mut Scratch,
        number: Option<&Number>,
    ) -> Result<Bytes, Failure> {
        let Op::Add { .. } = self else {
            return self.attempt_or_heal(sheep, view, oid, kept, scratch, number).await;
        };
        let op = self.chosen(sheep, view, oid, kept, scratch).await?;
        match op.attempt_or_heal(sheep, view, oid, kept, scratch, number).await {
            // A removal came between, which is in nobody's order: look again.
            Err(Failure { code: ResultCode::NO_OBJ, .. }) => Err(ResultCode::NETWORK_ERROR.into()),
            outcome => outcome,
        }
    }

    /// What [`Op::Add`] comes to.
    async fn chosen(
        &self,
        sheep: &Arc<Sheep>,
        view: &View,
        oid: Oid,
        kept: Redundancy,
        scratch: &mut Scratch,
    ) -> Result<Op, Failure> {
        let Op::Add { offset, data, .. } = self else { return Ok(self.clone()) };
        if !scratch.creating && replicas::is_there(sheep, view, oid, kept).await? {
            let (offset, data) = self.written();
            return Ok(Op::Write { offset, data });
        }
        (scratch.creating, scratch.heal) = (true, false);
        Ok(Op::Create { offset: *offset, data: data.clone() })
    }

    /// What is written to an object that is there.
    fn written(&self) -> (u64, Bytes) {
        match self {
            Op::Write { offset, data } => (*offset, data.clone()),
            Op::Add { offset, data, new } => (offset + new.start as u64, data.slice(new.clone())),
            _ => (0, Bytes::new()),
        }
    }

    async fn attempt_or_heal(
        &self,
        sheep: &Arc<Sheep>,
        view: &View,
        oid: Oid,
        kept: Redundancy,
        scratch: &mut Scratch,
        number: Option<&Number>,
    ) -> Result<Bytes, Failure> {
        let outcome = self.attempt_once(sheep, view, oid, kept, scratch, number).await;
        match outcome {
            Err(Failure { code: ResultCode::STALE_OBJ, .. }) if scratch.heal && scratch.healed < HEALS => {
                scratch.healed += 1;
                if let Some(number) = number {
                    self.begin_anew(sheep, oid, number).await;
                }
                Err(ResultCode::NETWORK_ERROR.into())
            }
            outcome => outcome,
        }
    }

    async fn attempt_once(
        &self,
        sheep: &Arc<Sheep>,
        view: &View,
        oid: Oid,
        kept: Redundancy,
        scratch: &mut Scratch,
        number: Option<&Number>,
    ) -> Result<Bytes, Failure> {
        let id = number.map(|n| n.send(view.epoch)).unwrap_or_default();
        if is_coded(oid, &kept) {
            let coded = Attempt { sheep, view, oid, code: code_of(kept.policy)?, id };
            let data = self.attempt_coded(&coded, sheep.size_of(oid, view), scratch).await?;
            return match number.is_none_or(|n| n.succeed(view.epoch)) {
                true => Ok(data),
                false => Err(ResultCode::OLD_NODE_VER.into()),
            };
        }
        let request = |opcode, offset| request_for(opcode, oid, offset, view, kept.copies, id);
        let reading =
            |offset| request_for(Opcode::READ_PEER, oid, offset, view, kept.copies, WriteId::default());
        if scratch.heal {
            let read = request(Opcode::READ_PEER, 0).length(sheep.size_of(oid, view) as usize);
            let create = request(Opcode::CREATE_AND_WRITE_PEER, 0);
            replicas::heal(sheep, view, read, create, kept.copies).await?;
        }
        match self {
            Op::Read { offset, len } => {
                let read = reading(*offset).length(*len);
                replicas::read(sheep, view, read, kept.copies).await
            }
            Op::Write { offset, data } => {
                let write = request(Opcode::WRITE_PEER, *offset);
                replicas::write(sheep, view, write, data.clone(), kept.copies).await.map(|()| Bytes::new())
            }
            Op::Create { offset, data } => {
                let create = request(Opcode::CREATE_AND_WRITE_PEER, *offset);
                replicas::fan_out(sheep, view, create, data.clone(), kept.copies).await.map(|()| Bytes::new())
            }
            Op::Add { .. } | Op::Repair { .. } => Err(ResultCode::INVALID_PARMS.into()),
        }
    }

    /// Some homes lack a strip, others have the write already. What is rebuilt from those would be with it, and stay so if it
    /// fails in the end: it is taken back first, and made anew.
    pub(super) async fn begin_anew(&self, sheep: &Arc<Sheep>, oid: Oid, number: &Number) {
        let coded = is_coded(oid, &sheep.redundancy(oid.vid(), &sheep.views.load()));
        if coded && take_back(sheep, oid, self, number).await {
            number.renew();
        }
    }

    /// Takes a write back that failed for good and may be on some homes. The caller still holds its turn.
    pub async fn undo(
        &self,
        sheep: &Arc<Sheep>,
        view: &View,
        oid: Oid,
        kept: Redundancy,
        id: WriteId,
    ) -> Result<(), Failure> {
        let (Op::Write { .. } | Op::Add { .. }) = self else { return Ok(()) };
        let (offset, data) = self.written();
        let homes: Vec<NodeId> = view.ring.nodes_of(oid, kept.copies.into()).map(|n| n.nid).collect();
        if is_coded(oid, &kept) {
            return Ok(settle::undo_strips(sheep, oid, &homes, id, view.epoch).await?);
        }
        let read = request_for(Opcode::READ_PEER, oid, offset, view, kept.copies, WriteId::default());
        let read = read.flag(Flags::RECOVERY).length(data.len());
        let found = replicas::on_all(sheep, &homes, read, &Bytes::new()).await;
        let mut written = Vec::new();
        let mut old = None;
        for (home, result) in homes.iter().zip(found) {
            match result {
                Ok(reply) if reply.data == data => written.push(*home),
                Ok(reply) => old = old.or(Some(reply.data)),
                Err(failure) if failure.code == ResultCode::NO_OBJ => {}
                Err(failure) => return Err(failure),
            }
        }
        let Some(old) = old else { return Ok(()) };
        let write = request_for(Opcode::WRITE_PEER, oid, offset, view, kept.copies, id);
        let results = replicas::on_all(sheep, &written, write, &old).await;
        let failures: Vec<Failure> = results.into_iter().filter_map(Result::err).collect();
        replicas::deciding(&failures).map_or(Ok(()), Err)
    }

    async fn attempt_coded(
        &self,
        coded: &Attempt<'_>,
        size: u64,
        scratch: &mut Scratch,
    ) -> Result<Bytes, Failure> {
        let range = self.stripes();
        if scratch.heal {
            coded.heal(size).await?;
        }
        match self {
            Op::Read { len, .. } => {
                let stripes = coded.load(range).await?.freeze();
                Ok(stripes.slice(range.skip()..range.skip() + len))
            }
            Op::Write { data, .. } => {
                let stripes = match scratch.stripes.take() {
                    Some(stripes) => stripes,
                    None => merged(coded, range, data).await?,
                };
                scratch.stripes = Some(stripes.clone());
                coded.store(Opcode::WRITE_PEER, range, &stripes).await.map(|()| Bytes::new())
            }
            Op::Create { data, .. } => {
                let stripes = overlay(range, data, &[]);
                coded.store(Opcode::CREATE_AND_WRITE_PEER, range, &stripes).await.map(|()| Bytes::new())
            }
            Op::Add { .. } => Err(ResultCode::INVALID_PARMS.into()),
            Op::Repair { suspect } => coded.repair(size, (*suspect).into()).await.map(|()| Bytes::new()),
        }
    }
}

/// The whole stripes of a write: those that it does not cover are read; a failing read ends the request.
async fn merged(coded: &Attempt<'_>, range: StripeRange, data: &Bytes) -> Result<Bytes, Failure> {
    let mut old = Vec::new();
    for stripe in range.partial() {
        let one = StripeRange::of(stripe * STRIPE as u32, STRIPE as u32);
        old.push((stripe, coded.load(one).await?.freeze()));
    }
    Ok(overlay(range, data, &old))
}

/// The code of an object, if it is coded.
pub fn code_for(sheep: &Sheep, oid: Oid) -> Result<Option<Code>, ResultCode> {
    let redundancy = sheep.redundancy(oid.vid(), &sheep.views.load());
    is_coded(oid, &redundancy).then(|| code_of(redundancy.policy)).transpose()
}
