//! Why a volume operation failed.

use sheepdog_proto::ResultCode;
use thiserror::Error;

use crate::service::ClientError;

/// Why a volume could not be opened, or an operation on it failed. Cheap to clone: one failed request may fail several
/// operations.
#[derive(Debug, Clone, Error, PartialEq, Eq)]
pub enum VolumeError {
    /// No VDI, or no snapshot, of that name.
    #[error("no such VDI: {0}")]
    NotFound(String),
    /// Somebody else holds the lock.
    #[error("VDI {0} is locked")]
    Locked(String),
    /// Opened read-only, or a snapshot.
    #[error("the volume is read-only")]
    ReadOnly,
    /// Outside of the volume.
    #[error("{len} bytes at {offset} are outside of a volume of {size} bytes")]
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Bytes of the volume.
        size: u64,
    },
    /// The sheep refused.
    #[error("{what}: {code}")]
    Refused {
        /// What was tried.
        what: &'static str,
        /// The answer.
        code: ResultCode,
    },
    /// No answer: connection lost, protocol broken.
    #[error("{what}: {cause}")]
    Connection {
        /// What was tried.
        what: &'static str,
        /// Why there was none.
        cause: String,
    },
    /// The inode cannot be used.
    #[error("invalid inode: {0}")]
    Inode(&'static str),
}

impl VolumeError {
    /// The sheep's result code, if there is one.
    pub fn code(&self) -> Option<ResultCode> {
        match self {
            VolumeError::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }

    pub(super) fn from_client(what: &'static str, error: ClientError) -> VolumeError {
        match error {
            ClientError::Refused(code) => VolumeError::Refused { what, code },
            other => VolumeError::Connection { what, cause: other.to_string() },
        }
    }
}

/// Shorthand to name what failed.
pub(super) trait During<T> {
    fn during(self, what: &'static str) -> Result<T, VolumeError>;
}

impl<T> During<T> for Result<T, ClientError> {
    fn during(self, what: &'static str) -> Result<T, VolumeError> {
        self.map_err(|error| VolumeError::from_client(what, error))
    }
}
