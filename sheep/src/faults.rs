//! What a failing disk means for requests and for the node (spec 03, section 10; spec 06, 3.7).

use std::io;
use std::sync::Arc;

use sheepdog_proto::{Oid, ResultCode};
use sheepdog_store::StoreError;

use crate::sheep::Sheep;

/// The answer of a peer whose store failed. Losing the last disk makes the node leave the cluster; the requester is
/// told to try again, because the next epoch has other homes. One unreadable file is a fault of that replica alone: it
/// counts as missing, and the gateway replaces it.
pub fn peer_result(sheep: &Arc<Sheep>, error: &StoreError) -> ResultCode {
    match error {
        StoreError::NoObject | StoreError::InvalidRange { .. } => error.result(),
        StoreError::Io(_) => {
            tracing::error!("{error}");
            ResultCode::NO_OBJ
        }
        StoreError::DiskFailed { last: true, .. } | StoreError::Open(_) => {
            tracing::error!("leaving sheepdog cluster: {error}");
            sheep.cluster.leave();
            ResultCode::NETWORK_ERROR
        }
        _ => {
            tracing::error!("{error}");
            error.result()
        }
    }
}

/// The answer when something about `oid` could not be noted in the metadata directory. A node that cannot do that must not take
/// part: it leaves, and the requester is told to try again (spec 06, 3.7).
pub fn unnoted(sheep: &Sheep, oid: Oid, error: &io::Error) -> ResultCode {
    tracing::error!("cannot note what is done to {oid}: {error}");
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => return ResultCode::NO_SPACE,
        // Passes by.
        _ if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) => {}
        _ => {
            tracing::error!("leaving sheepdog cluster: the metadata directory cannot be used");
            sheep.cluster.leave();
        }
    }
    ResultCode::NETWORK_ERROR
}

/// As [`peer_result`] for a node that recovers: an unreadable file is not the same as none, because "none" would send
/// the search to older versions.
pub fn recovery_result(sheep: &Arc<Sheep>, error: &StoreError) -> ResultCode {
    match error {
        StoreError::Io(_) => {
            tracing::error!("{error}");
            ResultCode::EIO
        }
        _ => peer_result(sheep, error),
    }
}
