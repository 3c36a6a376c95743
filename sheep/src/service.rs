//! This daemon as a [`Service`], for volumes that it serves itself: no socket in between.

use std::sync::Arc;

use bytes::Bytes;
use sheepdog_client::{CallFuture, Service};
use sheepdog_proto::{ClusterStatus, Flags, Opcode, Request, ResultCode};

use crate::clients::{Client, Origin};
use crate::dispatch::{self, Class};
use crate::gateway;
use crate::ops::result;
use crate::sheep::Sheep;
use crate::vdi::holders;

/// Executes requests of this process as if they came from a client.
pub struct InProcess {
    sheep: Arc<Sheep>,
    client: Client,
}

impl InProcess {
    /// A client that is connected from now on.
    pub fn new(sheep: Arc<Sheep>) -> InProcess {
        InProcess { client: Client::new(sheep.clone(), Origin::Daemon), sheep }
    }
}

impl Service for InProcess {
    fn call(&self, mut request: Request, payload: Bytes) -> CallFuture<'_> {
        let sheep = &self.sheep;
        if request.flags.contains(Flags::WRITE) {
            request.data_length = payload.len() as u32;
        }
        Box::pin(async move {
            let _progress = sheep.begin();
            let Some(row) = dispatch::find(request.opcode) else {
                return Ok(result(&request, ResultCode::INVALID_PARMS));
            };
            let status = sheep.views.load().status;
            if status != ClusterStatus::Ok && !row.force {
                let code = match status {
                    ClusterStatus::Killed => ResultCode::KILLED,
                    ClusterStatus::Shutdown => ResultCode::SHUTDOWN,
                    _ if sheep.views.load().ctime == 0 => ResultCode::WAIT_FOR_FORMAT,
                    _ => ResultCode::WAIT_FOR_JOIN,
                };
                return Ok(result(&request, code));
            }
            Ok(match row.class {
                Class::Gateway => match inline_read(sheep, &request) {
                    Some(reply) => reply,
                    None => gateway::execute(sheep, &self.client, request, payload).await,
                },
                Class::Local(handler) => handler(sheep, request, payload).await,
                Class::Cluster(..) if request.opcode == Opcode::LOCK_VDI => {
                    holders::lock(sheep, &self.client, request, payload).await
                }
                Class::Cluster(..) => sheep.cluster.submit(request, payload).await,
                Class::Peer => result(&request, ResultCode::INVALID_PARMS),
            })
        })
    }

    fn discards(&self) -> bool {
        true
    }
}

fn inline_read(sheep: &Arc<Sheep>, request: &Request) -> Option<sheepdog_client::Reply> {
    (request.opcode == Opcode::READ_OBJ).then(|| gateway::try_read_inline(sheep, request)).flatten()
}
