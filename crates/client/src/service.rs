//! [`Service`]: something that answers Sheepdog requests.

use std::future::Future;
use std::io;
use std::pin::Pin;

use bytes::Bytes;
use sheepdog_proto::{Request, Response, ResultCode};
use thiserror::Error;

/// Why a request got no usable answer.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The sheep could not be reached.
    #[error("failed to connect to {addr}: {source}")]
    Connect {
        /// Where to.
        addr: String,
        /// Why.
        source: io::Error,
    },
    /// The connection ended before the answer. The request may or may not have been executed.
    #[error("connection lost: {0}")]
    Lost(String),
    /// The peer broke the protocol; the connection is closed.
    #[error("protocol error: {0}")]
    Protocol(&'static str),
    /// The sheep answered with an error.
    #[error("{0}")]
    Refused(ResultCode),
}

impl ClientError {
    /// The result code, if the sheep gave one.
    pub fn code(&self) -> Option<ResultCode> {
        match self {
            ClientError::Refused(code) => Some(*code),
            _ => None,
        }
    }
}

/// An answer: header and payload.
#[derive(Debug, Clone)]
pub struct Reply {
    /// The header.
    pub response: Response,
    /// Exactly `response.data_length` bytes.
    pub data: Bytes,
}

impl Reply {
    /// An answer without payload.
    pub fn empty(response: Response) -> Reply {
        Reply { response, data: Bytes::new() }
    }

    /// The answer, or its result as the error.
    pub fn success(self) -> Result<Reply, ClientError> {
        if self.response.result.is_ok() { Ok(self) } else { Err(ClientError::Refused(self.response.result)) }
    }
}

/// Future of an answer.
pub type CallFuture<'a> = Pin<Box<dyn Future<Output = Result<Reply, ClientError>> + Send + 'a>>;

/// Something that answers requests: a connection to a sheep, or a sheep in this process.
pub trait Service: Send + Sync {
    /// Sends `request` with `payload` (which sets its `data_length` when it has the WRITE flag) and waits for the
    /// answer. Any number of calls may be in flight; they are answered in any order. Error results are answers, not
    /// errors.
    fn call(&self, request: Request, payload: Bytes) -> CallFuture<'_>;

    /// Whether DISCARD_OBJ is refused for snapshots and gives back as many adjacent blocks as its payload has entries.
    /// The original's destroys what snapshots name (spec 01, 7.6).
    fn discards(&self) -> bool {
        false
    }
}
