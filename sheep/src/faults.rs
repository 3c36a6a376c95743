//! What a failing disk means for requests and for the node (spec 03, section 10; spec 06, 3.7).

use std::sync::Arc;

use sheepdog_proto::ResultCode;
use sheepdog_store::StoreError;

use crate::sheep::Sheep;

/// The answer of a peer whose store failed. Losing the last disk makes the node leave the cluster; the requester is
/// told to try again, because the next epoch has other homes.
pub fn peer_result(sheep: &Arc<Sheep>, error: &StoreError) -> ResultCode {
    match error.result() {
        ResultCode::EIO => {
            tracing::error!("leaving sheepdog cluster: {error}");
            sheep.cluster.leave();
            ResultCode::NETWORK_ERROR
        }
        code => {
            if code == ResultCode::NETWORK_ERROR || code == ResultCode::NO_SPACE {
                tracing::error!("{error}");
            }
            code
        }
    }
}
