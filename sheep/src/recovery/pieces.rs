//! Copying an object from the node that it is recovered from.
//!
//! While clients are about, in pieces: a disk works on everything it was given at once, so a client's request waits as
//! long as the pieces in flight take, and with whole objects that is many times its own time. An object that a request
//! waits for is read in one go, or what is left of it.
//!
//! A client's write may come between two pieces, as it may come in the middle of one read. This node gets every such write
//! itself: until the object is complete they are logged ([`super::early`]), or wait here ([`super::Recovery::ready`]).

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use sheepdog_buffer::PageBuf;
use sheepdog_client::Reply;
use sheepdog_proto::header::ObjRequest;
use sheepdog_proto::{NodeId, Oid, Request, ResultCode};
use sheepdog_store::{GENTLE_PIECE, Replica, Store, StoreError};

use super::Active;
use super::object::COPY_DEADLINE;
use crate::sheep::Sheep;

/// Whether an object is copied so that clients notice little of it: nobody waits for it, and there are clients.
fn gently(sheep: &Sheep, active: &Active, oid: Oid) -> bool {
    oid.is_data() && sheep.stats.clients.about(Instant::now()).is_some() && !active.is_waited_for(oid)
}

/// Asks `home` for what `request` asks for, an object from its beginning. The answer is the first one that is no success
/// or too short, else that of the last piece with the data of all.
pub async fn read(
    sheep: &Arc<Sheep>,
    active: &Active,
    home: &NodeId,
    request: Request,
) -> Result<Reply, ResultCode> {
    let (body, size) = (request.obj(), request.data_length as usize);
    let mut whole: Option<PageBuf> = None;
    let mut done = 0;
    loop {
        let len = if gently(sheep, active, body.oid) { GENTLE_PIECE.min(size - done) } else { size - done };
        let piece = ObjRequest { offset: done as u32, ..body };
        let asked = request.length(len).with_obj(piece);
        let reply = sheep.peers.call(home, asked, Bytes::new(), COPY_DEADLINE).await;
        let reply = reply.map_err(|_| ResultCode::NETWORK_ERROR)?;
        if !reply.response.result.is_ok() || reply.data.len() != len || len == size {
            return Ok(reply);
        }
        let buffer = whole.get_or_insert_with(|| PageBuf::dirty(size));
        buffer[done..done + len].copy_from_slice(&reply.data);
        done += len;
        if done == size {
            let data = whole.take().map(PageBuf::freeze).unwrap_or_default();
            return Ok(Reply { response: reply.response, data });
        }
    }
}

/// Makes `data`, all of an object or strip, the working file here. `false` = there is one by now, which is left alone.
pub async fn restore(
    sheep: &Sheep,
    active: &Active,
    store: &Store,
    replica: Replica,
    data: Bytes,
) -> Result<bool, StoreError> {
    match gently(sheep, active, replica.oid) {
        true => store.restore_gently(replica, data).await,
        false => store.create_if_absent(replica, data.len() as u64, 0, data).await,
    }
}
