//! Walking all VDIs (spec 07, 7.4).
//!
//! Inodes are read several at a time and delivered in ascending order of their ids; a few requests in flight hide the
//! round trips of clusters with many VDIs.

use futures_util::{Stream, StreamExt, stream};
use sheepdog_proto::{Opcode, Request, ResultCode, VDI_BITMAP_LEN, VdiId};

use crate::exit::{SYSTEM, Stop};
use crate::inode::{Inode, Part, ReadError};
use crate::out;
use crate::session::Session;

/// Inodes read at the same time.
const READ_AHEAD: usize = 32;

/// The ids in use; `None` if the daemon refused (its reason has been printed).
async fn used_ids(session: &Session) -> Result<Option<Vec<VdiId>>, Stop> {
    let Some(used) = bitmap(session, Opcode::READ_VDIS).await? else { return Ok(None) };
    let Some(deleted) = bitmap(session, Opcode::READ_DEL_VDIS).await? else { return Ok(None) };
    let mut ids = Vec::new();
    for (at, byte) in used.iter().enumerate().filter(|(_, byte)| **byte != 0) {
        let live = byte & !deleted.get(at).copied().unwrap_or(0);
        ids.extend((0..8).filter(|bit| live >> bit & 1 != 0).map(|bit| VdiId::new((at * 8 + bit) as u32)));
    }
    Ok(Some(ids))
}

/// The bitmap that an opcode reads; `None` if the daemon refused, after printing why.
pub async fn bitmap(session: &Session, opcode: Opcode) -> Result<Option<bytes::Bytes>, Stop> {
    let reply = session.ask(Request::new(opcode).length(VDI_BITMAP_LEN)).await.map_err(|_| SYSTEM)?;
    if reply.response.result != ResultCode::SUCCESS {
        out::log(reply.response.result);
        return Ok(None);
    }
    Ok(Some(reply.data))
}

/// All VDIs that are not deleted, in ascending order of their ids. Unreadable inodes are reported and skipped.
pub async fn walk(session: &Session, part: Part) -> Result<impl Stream<Item = Inode> + Unpin + '_, Stop> {
    let all = walk_all(session, part).await?;
    Ok(all.filter(|inode| std::future::ready(!inode.header.is_deleted())))
}

/// As [`walk`], with inodes that were emptied but are not known as deleted.
pub async fn walk_all(session: &Session, part: Part) -> Result<impl Stream<Item = Inode> + Unpin + '_, Stop> {
    let ids = used_ids(session).await?.unwrap_or_default();
    let inodes = stream::iter(ids)
        .map(move |vid| {
            let part = part.clone();
            async move { Inode::read(session, vid, &part).await }
        })
        .buffered(READ_AHEAD)
        .filter_map(|inode| std::future::ready(keep(inode)));
    Ok(Box::pin(inodes))
}

fn keep(inode: Result<Inode, ReadError>) -> Option<Inode> {
    match inode {
        Ok(inode) => Some(inode),
        Err(e) => {
            e.report();
            out::log(match e {
                ReadError::Header(..) => "Failed to read inode header",
                ReadError::Map(..) => "Failed to read inode",
            });
            None
        }
    }
}
