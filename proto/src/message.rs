//! The message of a cluster operation (spec 04, 8.2): request header, response header, data.

use crate::{DecodeError, HEADER_LEN, MAX_CLUSTER_MESSAGE, Request, Response, Wire};

/// Bytes of the two headers.
pub const MESSAGE_HEADER_LEN: usize = 2 * HEADER_LEN;

/// One cluster operation on its way to every node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterMessage {
    /// As received from the client, with the originator's epoch.
    pub request: Request,
    /// Result so far and what the work part produced.
    pub response: Response,
    /// The request's payload, or the response's.
    pub data: Vec<u8>,
}

impl ClusterMessage {
    /// Whether `data_len` bytes of data fit the limit of 128 KiB.
    pub fn fits(data_len: usize) -> bool {
        data_len <= MAX_CLUSTER_MESSAGE - MESSAGE_HEADER_LEN
    }

    /// Decodes a message as a driver delivers it.
    pub fn decode(bytes: &[u8]) -> Result<ClusterMessage, DecodeError> {
        if bytes.len() < MESSAGE_HEADER_LEN {
            return Err(DecodeError::Truncated {
                what: "cluster message",
                need: MESSAGE_HEADER_LEN,
                got: bytes.len(),
            });
        }
        Ok(ClusterMessage {
            request: Request::get(bytes),
            response: Response::get(&bytes[HEADER_LEN..]),
            data: bytes[MESSAGE_HEADER_LEN..].to_vec(),
        })
    }

    /// Encodes the message.
    pub fn encode(&self) -> Vec<u8> {
        [self.request.to_bytes().as_slice(), &self.response.to_bytes(), &self.data].concat()
    }
}
