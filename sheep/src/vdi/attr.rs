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

/// Work part of GET_VDI_ATTR.
pub async fn get_vdi_attr(
    sheep: &Arc<Sheep>,
    request: &Request,
    payload: &[u8],
) -> Result<VdiResponse, ResultCode> {
    if payload.len() != ATTR_LEN {
        return Err(ResultCode::INVALID_PARMS);
    }
    let wanted = AttrHeader::get(payload);
    let query = Query {
        name: cstr(&wanted.name).to_vec(),
        tag: cstr(&wanted.tag).to_vec(),
        snapid: request.vdi().snapid,
    };
    let vid = lookup(sheep, &query).await.result?;
    let ctime = read_lookup_header(sheep, vid).await?.create_time;
    let mut record = payload.to_vec();
    record[CTIME_AT..CTIME_AT + 8].copy_from_slice(&ctime.to_le_bytes());
    let name_hash = hash::name_hash(&wanted.name);
    let attr_id = probe(sheep, request.flags, &wanted, name_hash, record.into()).await?;
    let copies = sheep.copies_of(Oid::attr(name_hash, attr_id), &sheep.views.load());
    let vdi_id = sheepdog_proto::VdiId::new(name_hash);
    Ok(VdiResponse { vdi_id, attr_id, copies, ..VdiResponse::zeroed() })
}

/// Walks the ids from the attribute's hash upwards; a plain create reads first, too, so that it never replaces an
/// attribute of another key.
async fn probe(
    sheep: &Arc<Sheep>,
    flags: Flags,
    wanted: &AttrHeader,
    name_hash: u32,
    record: Bytes,
) -> Result<u32, ResultCode> {
    let create = flags.contains(Flags::ATTR_CREAT);
    let first = wanted.id();
    for step in 0..MAX_PROBES {
        let id = first.wrapping_add(step);
        let oid = Oid::attr(name_hash, id);
        let present = match sheep.gateway.read_object(sheep, oid, 0, AttrHeader::LEN).await {
            Ok(bytes) => Some(AttrHeader::get(&bytes)),
            Err(ResultCode::NO_OBJ) => None,
            Err(code) => return Err(code),
        };
        let emptied = present.is_some_and(|p| p.name[0] == 0);
        match present {
            None if create => return write(sheep.gateway.create_object(sheep, oid, 0, record).await, id),
            None => return Err(ResultCode::NO_OBJ),
            Some(p) if p.same_key(wanted) => {
                if flags.contains(Flags::ATTR_DEL) {
                    let zero = Bytes::from_static(&[0]);
                    return write(sheep.gateway.write_object(sheep, oid, 0, zero).await, id);
                }
                if create && flags.contains(Flags::ATTR_EXCL) {
                    return Err(ResultCode::VDI_EXIST);
                }
                if create {
                    return write(sheep.gateway.create_object(sheep, oid, 0, record).await, id);
                }
                return Ok(id);
            }
            // A plain set takes the place of a deleted attribute, as the original's does.
            Some(_) if emptied && create && !flags.contains(Flags::ATTR_EXCL) => {
                return write(sheep.gateway.create_object(sheep, oid, 0, record).await, id);
            }
            Some(_) => {}
        }
    }
    Err(ResultCode::FULL_VDI)
}

fn write(result: Result<(), ResultCode>, id: u32) -> Result<u32, ResultCode> {
    result.map(|()| id).map_err(|_| ResultCode::EIO)
}
