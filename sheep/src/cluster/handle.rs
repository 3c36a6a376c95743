//! How the rest of the daemon asks the cluster task for something.

use std::sync::Arc;

use bytes::Bytes;
use sheepdog_client::Reply;
use sheepdog_proto::{NodeRecord, Request, Response, ResultCode};
use tokio::sync::{Semaphore, mpsc, oneshot};

/// Cluster operations of this node waiting for their turn; more wait outside.
const MAX_WAITING: usize = 1024;

/// A cluster operation and who waits for it.
pub struct Submission {
    /// The request.
    pub request: Request,
    /// Its payload.
    pub payload: Bytes,
    /// Gets the answer.
    pub reply: oneshot::Sender<Reply>,
}

/// What the task can be asked.
pub enum Command {
    /// Execute a cluster operation.
    Submit(Submission),
    /// The work part of the running operation ended.
    WorkDone(Reply),
    /// The driver refused a call; the token names the operation.
    DriverFailed(u64, String),
    /// Leave the cluster and go on as a gateway.
    Leave,
    /// End this node.
    Kill,
    /// The disks of this node changed: recover, in the present epoch, what it should have and has not.
    Rebuild,
    /// The lock states of the others have been learned.
    LocksCollected,
    /// Announce a changed record of this node.
    UpdateNode(NodeRecord, oneshot::Sender<ResultCode>),
}

/// Clones ask the same task.
#[derive(Clone)]
pub struct ClusterHandle {
    commands: mpsc::UnboundedSender<Command>,
    waiting: Arc<Semaphore>,
}

impl ClusterHandle {
    /// The handle and the task's end of it.
    pub fn new() -> (ClusterHandle, mpsc::UnboundedReceiver<Command>) {
        let (commands, receiver) = mpsc::unbounded_channel();
        (ClusterHandle { commands, waiting: Arc::new(Semaphore::new(MAX_WAITING)) }, receiver)
    }

    /// Executes a cluster operation and waits for its result.
    pub async fn submit(&self, request: Request, payload: Bytes) -> Reply {
        let refused = || Reply::empty(Response::to(&request, ResultCode::CLUSTER_ERROR));
        let Ok(_permit) = self.waiting.acquire().await else { return refused() };
        self.submit_internal(request, payload).await
    }

    /// As [`ClusterHandle::submit`] for operations that another operation, or the daemon itself, waits for: they do not
    /// queue behind clients.
    pub async fn submit_internal(&self, request: Request, payload: Bytes) -> Reply {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Submit(Submission { request, payload, reply }));
        let refused = |_| Reply::empty(Response::to(&request, ResultCode::CLUSTER_ERROR));
        answer.await.unwrap_or_else(refused)
    }

    /// Announces a changed record of this node.
    pub async fn update_node(&self, node: NodeRecord) -> ResultCode {
        let (reply, answer) = oneshot::channel();
        self.send(Command::UpdateNode(node, reply));
        answer.await.unwrap_or(ResultCode::CLUSTER_ERROR)
    }

    /// Leaves the cluster; the node goes on as a gateway.
    pub fn leave(&self) {
        self.send(Command::Leave);
    }

    /// Ends this node when its requests are answered.
    pub fn kill(&self) {
        self.send(Command::Kill);
    }

    /// Sends a command; after the task's end nobody needs it.
    pub fn send(&self, command: Command) {
        let _ = self.commands.send(command);
    }
}
