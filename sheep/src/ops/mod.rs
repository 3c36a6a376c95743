//! Local operations: answered by this node alone (spec 01, section 7).

pub mod cluster;
pub mod node;
pub mod objects;
pub mod order;
pub mod vdis;

use bytes::Bytes;
use sheepdog_client::Reply;
use sheepdog_proto::{Request, Response, ResultCode};

/// An answer without payload.
pub fn result(request: &Request, code: ResultCode) -> Reply {
    Reply::empty(Response::to(request, code))
}

/// A list of variable length: `BUFFER_SMALL` if it does not fit what the client asked for.
pub fn list(request: &Request, data: Vec<u8>) -> Reply {
    if data.len() > request.reply_capacity() {
        return result(request, ResultCode::BUFFER_SMALL);
    }
    crate::gateway::reply_data(request, Bytes::from(data))
}

/// An answer of fixed size: `INVALID_PARMS` if it does not fit.
pub fn fixed(request: &Request, data: Vec<u8>) -> Reply {
    if data.len() > request.reply_capacity() {
        return result(request, ResultCode::INVALID_PARMS);
    }
    crate::gateway::reply_data(request, Bytes::from(data))
}
