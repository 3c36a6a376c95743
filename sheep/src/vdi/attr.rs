//! GET_VDI_ATTR: finding, creating and deleting attributes (spec 05, section 14).

use std::sync::Arc;

use bytes::Bytes;
use sheepdog_proto::attr::{ATTR_LEN, AttrHeader};
use sheepdog_proto::header::VdiResponse;
use sheepdog_proto::{Flags, Oid, Request, ResultCode, Wire, cstr, hash};

use super::lookup::{Query, lookup};
use super::objects::read_lookup_header;
use crate::sheep::Sheep;

/// Most ids looked at for one attribute; more collisions than this do not happen by chance.
const MAX_PROBES: u32 = 1024;
/// Offset of `ctime` in a record.
const CTIME_AT: usize = 512;

/// Work part of GET_VDI_ATTR: the result, and the attribute's place once it is known, with errors, too.
pub async fn get_vdi_attr(
    sheep: &Arc<Sheep>,
    request: &Request,
    payload: &[u8],
) -> (ResultCode, VdiResponse) {
    if payload.len() != ATTR_LEN {
        return (ResultCode::INVALID_PARMS, VdiResponse::zeroed());
    }
    let wanted = AttrHeader::get(payload);
    if request.vdi().snapid != wanted.snap_id {
        return (ResultCode::INVALID_PARMS, VdiResponse::zeroed());
    }
    let record = match stamped(sheep, request, &wanted, payload).await {
        Ok(record) => record,
        Err(code) => return (code, VdiResponse::zeroed()),
    };
    let name_hash = hash::name_hash(&wanted.name);
    let (result, attr_id) = probe(sheep, request.flags, &wanted, name_hash, record).await;
    let copies = sheep.copies_of(Oid::attr(name_hash, attr_id), &sheep.views.load());
    let vdi_id = sheepdog_proto::VdiId::new(name_hash);
    (result, VdiResponse { vdi_id, attr_id, copies, ..VdiResponse::zeroed() })
}

/// The record with the VDI's creation time; the VDI must exist.
async fn stamped(
    sheep: &Arc<Sheep>,
    request: &Request,
    wanted: &AttrHeader,
    payload: &[u8],
) -> Result<Bytes, ResultCode> {
    let query = Query {
        name: cstr(&wanted.name).to_vec(),
        tag: cstr(&wanted.tag).to_vec(),
        snapid: request.vdi().snapid,
    };
    let vid = lookup(sheep, &query).await.result?;
    let ctime = read_lookup_header(sheep, vid).await?.create_time;
    let mut record = payload.to_vec();
    record[CTIME_AT..CTIME_AT + 8].copy_from_slice(&ctime.to_le_bytes());
    Ok(record.into())
}

/// Walks the ids from the attribute's hash upwards, to the id where the outcome is decided. A plain create reads first,
/// too, so that it never replaces an attribute of another key.
async fn probe(
    sheep: &Arc<Sheep>,
    flags: Flags,
    wanted: &AttrHeader,
    name_hash: u32,
    record: Bytes,
) -> (ResultCode, u32) {
    let first = wanted.id();
    for step in 0..MAX_PROBES {
        let id = first.wrapping_add(step);
        let oid = Oid::attr(name_hash, id);
        let present = match sheep.gateway.read_object(sheep, oid, 0, AttrHeader::LEN).await {
            Ok(bytes) => Some(AttrHeader::get(&bytes)),
            Err(ResultCode::NO_OBJ) => None,
            Err(code) => return (code, id),
        };
        let written = match decide(flags, wanted, present) {
            Step::Next => continue,
            Step::Answer(code) => return (code, id),
            Step::Create => sheep.gateway.create_object(sheep, oid, 0, record).await,
            Step::Empty => sheep.gateway.write_object(sheep, oid, 0, Bytes::from_static(&[0])).await,
        };
        return (written.err().map_or(ResultCode::SUCCESS, |_| ResultCode::EIO), id);
    }
    (ResultCode::FULL_VDI, first)
}

enum Step {
    Next,
    Answer(ResultCode),
    Create,
    Empty,
}

/// What to do at an id, by what is there.
fn decide(flags: Flags, wanted: &AttrHeader, present: Option<AttrHeader>) -> Step {
    let create = flags.contains(Flags::ATTR_CREAT);
    let exclusive = create && flags.contains(Flags::ATTR_EXCL);
    match present {
        None if create => Step::Create,
        None => Step::Answer(ResultCode::NO_OBJ),
        Some(p) if p.same_key(wanted) => match () {
            () if flags.contains(Flags::ATTR_DEL) => Step::Empty,
            () if exclusive => Step::Answer(ResultCode::VDI_EXIST),
            () if create => Step::Create,
            () => Step::Answer(ResultCode::SUCCESS),
        },
        // A plain set takes the place of a deleted attribute, as the original's does.
        Some(p) if p.name[0] == 0 && create && !exclusive => Step::Create,
        Some(_) => Step::Next,
    }
}
