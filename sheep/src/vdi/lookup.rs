//! Finding VDIs by name (spec 05, section 5).

use std::sync::Arc;

use sheepdog_proto::{ClusterFlags, MAX_NAME_LEN, ResultCode, VdiId, cstr, hash};

use super::objects::read_lookup_header;
use crate::sheep::Sheep;

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    /// Name, up to its NUL.
    pub name: Vec<u8>,
    /// Tag, up to its NUL; empty = none.
    pub tag: Vec<u8>,
    /// Snapshot id; 0 = none.
    pub snapid: u32,
}

/// What the scan of a name's probe range found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The VDI, or why there is none.
    pub result: Result<VdiId, ResultCode>,
    /// Snapshot id of the next VDI of this name.
    pub next_snap_id: u32,
    /// Newest snapshot of a name whose working VDI is gone.
    pub survivor: VdiId,
    /// The id that a new VDI of this name takes.
    pub free: Option<VdiId>,
}

impl Query {
    /// From a payload of name, or name and tag; any other length is refused.
    pub fn parse(payload: &[u8], snapid: u32) -> Result<Query, ResultCode> {
        let (name, tag): (&[u8], &[u8]) = match payload.len() {
            MAX_NAME_LEN => (payload, &[]),
            len if len == 2 * MAX_NAME_LEN => payload.split_at(MAX_NAME_LEN),
            _ => return Err(ResultCode::INVALID_PARMS),
        };
        Ok(Query { name: cstr(name).to_vec(), tag: cstr(tag).to_vec(), snapid })
    }

    /// The working VDI of a name.
    pub fn working(name: &[u8]) -> Query {
        Query { name: name.to_vec(), tag: Vec::new(), snapid: 0 }
    }

    fn wants_snapshot(&self) -> bool {
        !self.tag.is_empty() || self.snapid != 0
    }
}

/// Looks a VDI up. Vids without an inode are nobody's (spec 05, 29 rule 1).
pub async fn lookup(sheep: &Arc<Sheep>, query: &Query) -> Found {
    let recycle = sheep.views.load().flags.contains(ClusterFlags::RECYCLE_VID);
    let range =
        if recycle { sheep.vdis.probe_recycled() } else { sheep.vdis.probe(hash::name_hash(&query.name)) };
    let mut found =
        Found { result: Err(ResultCode::NO_VDI), next_snap_id: 1, survivor: VdiId::NONE, free: range.free };
    let mut exists = false;
    for vid in range.candidates {
        let header = match read_lookup_header(sheep, vid).await {
            Ok(header) => header,
            Err(ResultCode::NO_OBJ) => continue,
            Err(code) => {
                found.result = Err(code);
                return found;
            }
        };
        if header.is_deleted() || header.name() != query.name {
            continue;
        }
        if query.wants_snapshot() {
            if !header.is_snapshot() {
                exists = true;
            } else if (!query.tag.is_empty() && header.tag() == query.tag) || header.snap_id == query.snapid {
                found.result = Ok(vid);
                return found;
            }
            continue;
        }
        found.next_snap_id = header.snap_id.wrapping_add(1);
        if !header.is_snapshot() {
            found.result = Ok(vid);
        } else {
            found.survivor = vid;
            if recycle {
                found.result = Ok(vid);
            }
        }
        return found;
    }
    if exists {
        found.result = Err(ResultCode::NO_TAG);
    } else if found.free.is_none() {
        found.result = Err(ResultCode::FULL_VDI);
    }
    found
}
