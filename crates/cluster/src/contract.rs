//! What the daemon may rely on, whatever the driver (spec 04, 4.1 and 4.2).

use std::future::Future;
use std::net::IpAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sheepdog_proto::{ClusterInfo, MAX_CLUSTER_MESSAGE, NodeId, NodeRecord};
use thiserror::Error;

use crate::Lock;
use crate::clock::Moment;

/// A boxed future, so that drivers can be trait objects.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// One step of the cluster's common history. Members are in node order, without those that left but still run.
#[derive(Debug)]
pub enum Event {
    /// A node asks to join. Raised on at least one existing member, and on the joiner itself when nobody else is there
    /// to answer. `Some(info)` is what everybody receives in the accept, `None` means "not answered here".
    Join {
        /// The joining node.
        node: NodeRecord,
        /// Present members without it.
        members: Vec<NodeRecord>,
        /// What the joiner knows about the cluster.
        info: ClusterInfo,
        /// The verdict.
        answer: Answer<Option<ClusterInfo>>,
    },
    /// A node is a member from here on. For the joiner it is the first event but its own join.
    Accept {
        /// The new member.
        node: NodeRecord,
        /// Members with it.
        members: Vec<NodeRecord>,
        /// The answered cluster info.
        info: ClusterInfo,
    },
    /// A node left, crashed, or was lost; also raised on the node itself if it still runs.
    Leave {
        /// The node.
        node: NodeRecord,
        /// Members without it.
        members: Vec<NodeRecord>,
    },
    /// The cluster-wide mutex is free for `node`. Only the requester answers `true`, once it started its operation.
    Block {
        /// Whose turn it is.
        node: NodeRecord,
        /// `true` = the mutex is taken until [`Driver::unblock`].
        answer: Answer<bool>,
    },
    /// A message of [`Driver::notify`] or [`Driver::unblock`], on its sender too.
    Notify {
        /// Who sent it.
        sender: NodeRecord,
        /// The message as sent.
        message: Vec<u8>,
    },
    /// A member changed its weight, space or disks.
    UpdateNode {
        /// The new record.
        node: NodeRecord,
        /// Members with the new record.
        members: Vec<NodeRecord>,
    },
    /// `true`: the [`Lease`] ended, because the membership service has not confirmed this node's session for 2/3 of
    /// the session timeout. `false`: it is confirmed again, and nobody threw this node out. A [`Event::Reconnect`] ends
    /// the suspension as well (ZooKeeper only).
    Suspended(bool),
    /// The session was lost, nothing asked for before will be announced any more; the daemon joins again. Until then
    /// every other request is refused (ZooKeeper only).
    Reconnect,
    /// The driver cannot go on: the daemon ends with status 1 and this text.
    Failed(String),
}

/// The right to answer a question once. Dropping it gives the default answer (`None`, `false`).
pub struct Answer<T: Default>(Option<Box<dyn FnOnce(T) + Send>>);

impl<T: Default> Answer<T> {
    /// An answer that is handed to `deliver`, exactly once.
    pub fn new(deliver: impl FnOnce(T) + Send + 'static) -> Answer<T> {
        Answer(Some(Box::new(deliver)))
    }

    /// Answers.
    pub fn give(mut self, value: T) {
        if let Some(deliver) = self.0.take() {
            deliver(value);
        }
    }
}

impl<T: Default> Drop for Answer<T> {
    fn drop(&mut self) {
        if let Some(deliver) = self.0.take() {
            deliver(T::default());
        }
    }
}

impl<T: Default> std::fmt::Debug for Answer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Answer")
    }
}

/// How long this node is certain to be a member in the eyes of the others (spec 06, A11). A write is acknowledged only
/// while the lease is fresh: afterwards others may have gone on without this node. Ends by itself, by the local clock,
/// so that a process that was stopped finds it ended before it does anything else.
#[derive(Debug)]
pub struct Lease {
    /// Milliseconds of [`Moment`].
    until: AtomicU64,
}

impl Lease {
    /// A lease that has ended.
    pub(crate) fn new() -> Lease {
        Lease { until: AtomicU64::new(0) }
    }

    /// Whether it has not ended.
    pub fn is_fresh(&self) -> bool {
        Moment::now().as_millis() < self.until.load(Ordering::Acquire)
    }

    /// Lets it end at `until`.
    pub(crate) fn extend(&self, until: Moment) {
        self.until.store(until.as_millis(), Ordering::Release);
    }

    /// Ends it now.
    pub(crate) fn end(&self) {
        self.until.store(0, Ordering::Release);
    }
}

/// A call that adds to the common history.
#[derive(Debug)]
pub enum Request {
    /// [`Driver::join`].
    Join(NodeRecord, Box<ClusterInfo>),
    /// [`Driver::leave`].
    Leave,
    /// [`Driver::end`].
    End,
    /// [`Driver::notify`].
    Notify(Vec<u8>),
    /// [`Driver::block`].
    Block,
    /// [`Driver::unblock`].
    Unblock(Vec<u8>),
    /// [`Driver::update_node`].
    Update(NodeRecord),
}

/// The answer to a [`Request`].
pub type Reply = Result<(), DriverError>;

/// A source of membership and of totally ordered messages. Success of a call means that the request is in the common
/// history (or will be without further action); its effect arrives as an [`Event`].
pub trait Driver: Send + Sync {
    /// Name as in `-c`.
    fn name(&self) -> &'static str;

    /// The address to advertise when the operator gave none (spec 04, 16.4).
    fn local_addr(&self) -> Result<IpAddr, DriverError>;

    /// Members present now, for checks before joining (spec 04, 5.4). Empty if none or unknown.
    fn members_hint(&self) -> Vec<NodeRecord>;

    /// The lease under which this node may acknowledge writes; `None` if a node that lives is always a member.
    fn lease(&self) -> Option<Arc<Lease>> {
        None
    }

    /// Longest member list of a cluster info that a join can carry.
    fn max_info_nodes(&self) -> usize;

    /// Carries out a request whose lengths were checked; the calls below do that.
    fn request(&self, request: Request) -> BoxFuture<'_, Reply>;

    /// Waits for the cluster-wide mutex `id`; [`Lock`] says how long it is held. Only for members, and first come, first
    /// served, but by the local driver. Not to be awaited by the task that handles events.
    fn lock(&self, id: u64) -> BoxFuture<'_, Result<Lock, DriverError>>;

    /// Asks to join as `me`, telling the cluster what this node knows of it.
    fn join(&self, me: NodeRecord, info: ClusterInfo) -> BoxFuture<'_, Reply> {
        let (got, max) = (info.nodes.len(), self.max_info_nodes());
        if got > max {
            return Box::pin(async move { Err(DriverError::InfoTooLong { got, max }) });
        }
        self.request(Request::Join(me, Box::new(info)))
    }

    /// Leaves: others see a [`Event::Leave`], this process goes on receiving every event. Without effect before
    /// joining and the second time. Locks end (over the local driver, with the process).
    fn leave(&self) -> BoxFuture<'_, Reply> {
        self.request(Request::Leave)
    }

    /// As [`Driver::leave`], for a process that is about to end and receives nothing any more.
    fn end(&self) -> BoxFuture<'_, Reply> {
        self.request(Request::End)
    }

    /// Sends a message of at most [`MAX_CLUSTER_MESSAGE`] bytes to all members, this one included.
    fn notify(&self, message: Vec<u8>) -> BoxFuture<'_, Reply> {
        match check_length(&message) {
            Ok(()) => self.request(Request::Notify(message)),
            Err(e) => Box::pin(async { Err(e) }),
        }
    }

    /// Asks for the cluster-wide mutex; [`Event::Block`] announces it.
    fn block(&self) -> BoxFuture<'_, Reply> {
        self.request(Request::Block)
    }

    /// Releases the mutex and sends `message` in one step.
    fn unblock(&self, message: Vec<u8>) -> BoxFuture<'_, Reply> {
        match check_length(&message) {
            Ok(()) => self.request(Request::Unblock(message)),
            Err(e) => Box::pin(async { Err(e) }),
        }
    }

    /// Announces a changed record of this node; address and port must be those it joined with.
    fn update_node(&self, node: NodeRecord) -> BoxFuture<'_, Reply> {
        self.request(Request::Update(node))
    }
}

fn check_length(message: &[u8]) -> Reply {
    let (got, max) = (message.len(), MAX_CLUSTER_MESSAGE);
    if got > max { Err(DriverError::MessageTooLong { got, max }) } else { Ok(()) }
}

/// Why a driver refused or failed.
#[derive(Debug, Error)]
pub enum DriverError {
    /// No driver has this name.
    #[error("Invalid cluster driver '{0}'")]
    UnknownDriver(String),
    /// The text after `name:` is unusable.
    #[error("invalid option of cluster driver '{driver}': {reason}")]
    BadOption {
        /// The driver.
        driver: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A system call failed.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// The shared file holds what no writer produces.
    #[error("{}: not a usable event queue: {reason} (remove the file if no sheep uses it)", path.display())]
    BadQueue {
        /// The queue file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The events that this process had not read were overwritten.
    #[error(
        "this process was stopped or had no time to run while {0} or more cluster events passed, and does not know \
         them: it ends, start it again"
    )]
    MissedEvents(usize),
    /// SIGUSR1 is not blocked, so a peer's signal would kill the process.
    #[error("SIGUSR1 must be blocked before any thread starts")]
    SignalNotBlocked,
    /// Somebody who lives is a member under this address.
    #[error("{node} is already a member of the cluster (pid {pid})")]
    AddressInUse {
        /// The address.
        node: NodeId,
        /// The process that has it.
        pid: i32,
    },
    /// The same, of a process that cannot be named.
    #[error("{0} is already a member of the cluster")]
    AddressTaken(NodeId),
    /// The cluster has as many members as the driver can list.
    #[error("the cluster already has {0} members")]
    Full(usize),
    /// The member list of the last epoch is longer than the driver can carry.
    #[error("the last epoch has {got} nodes, the driver carries {max}")]
    InfoTooLong {
        /// Nodes in the list.
        got: usize,
        /// Most nodes.
        max: usize,
    },
    /// A message above the limit.
    #[error("cluster message of {got} bytes, at most {max}")]
    MessageTooLong {
        /// Its length.
        got: usize,
        /// The limit.
        max: usize,
    },
    /// The call needs a joined node.
    #[error("not a member of the cluster")]
    NotJoined,
    /// Second join.
    #[error("already joined")]
    AlreadyJoined,
    /// The record given is another node's.
    #[error("{0} is not this node")]
    NotMe(NodeId),
    /// Unblock without having the mutex.
    #[error("the cluster is not blocked by this node")]
    NotBlocked,
    /// `-c zookeeper` without an address.
    #[error("You must specify zookeeper servers.")]
    NoServers,
    /// `timeout=` without a number of milliseconds.
    #[error("Invalid parameter for timeout")]
    BadTimeout,
    /// No server of the ensemble answered.
    #[error("failed to connect to zk server {hosts} after {retries} retries")]
    Unreachable {
        /// The addresses tried.
        hosts: String,
        /// How often, 100 ms apart.
        retries: u128,
    },
    /// The ensemble answered something unexpected.
    #[error("zk server {hosts}: {reason}")]
    Ensemble {
        /// The addresses.
        hosts: String,
        /// The answer.
        reason: String,
    },
    /// Somebody is registered under this address, longer than a dead predecessor could be.
    #[error("Previous zookeeper session exist, shoot myself. Please wait for {0} seconds to join me again.")]
    PreviousSession(u64),
    /// The lock ended before it was released: others may have had it meanwhile.
    #[error("the lock was lost")]
    LockLost,
    /// The session ended before the request was in the history, or while nobody can tell.
    #[error("the session with the membership service was lost")]
    SessionLost,
    /// The C library of corosync cannot be loaded.
    #[error(
        "corosync's libraries are not installed (Debian's packages corosync, libcpg4, libcfg7, libcmap4): {0}"
    )]
    NoCorosync(String),
    /// Corosync does not run, or refused something.
    #[error("{0}")]
    Corosync(String),
    /// This node has no address to advertise.
    #[error("no valid interface found")]
    NoInterface,
    /// The driver's thread cannot start.
    #[error("cannot start the cluster driver: {0}")]
    Start(std::io::Error),
    /// The driver ended before.
    #[error("the cluster driver has stopped")]
    Stopped,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn a_lease_ends_at_its_time_and_has_ended_before_the_first() {
        let lease = Lease::new();
        assert!(!lease.is_fresh());
        lease.extend(Moment::now().after(Duration::from_secs(3600)));
        assert!(lease.is_fresh());
        lease.extend(Moment::now());
        assert!(!lease.is_fresh());
        lease.extend(Moment::now().after(Duration::from_secs(3600)));
        lease.end();
        assert!(!lease.is_fresh());
    }

    #[test]
    fn an_answer_is_delivered_once_and_dropping_it_gives_the_default() {
        let (tx, rx) = mpsc::channel();
        let sender = tx.clone();
        Answer::new(move |v: bool| sender.send(v).expect("receiver lives")).give(true);
        drop(Answer::new(move |v: bool| tx.send(v).expect("receiver lives")));
        assert_eq!(rx.iter().collect::<Vec<_>>(), [true, false]);
    }
}
