//! The local driver: any number of sheep on one machine, sharing one queue file with those of the original (spec 04,
//! 11). [`LocalDriver`] is the asynchronous handle; a thread of its own ([`member`]) owns the file and the state.

mod layout;
mod liveness;
mod locks;
mod member;
mod pidfd;
mod queue;
mod wake;

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};

use nix::sys::eventfd::EventFd;
use sheepdog_proto::NodeRecord;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::sync::oneshot;

pub use layout::MAX_LOCAL_NODES;
pub use pidfd::PidFd;
pub use wake::block_event_signal;

use crate::{BoxFuture, Driver, DriverError, Event, Lock, Reply, Request};
use liveness::Liveness;
use locks::Locks;
use member::{Command, Member};
use queue::QueueFile;

/// Where the queue file is without an option.
pub const DEFAULT_PATH: &str = "/tmp/sheepdog_shm";

/// Handle of a running local driver. Dropping it ends its thread without leaving the cluster; the other members see
/// the leave when the process ends.
pub struct LocalDriver {
    path: PathBuf,
    mailbox: Mailbox,
    locks: Locks,
}

/// The way to the driver thread.
#[derive(Clone)]
struct Mailbox {
    commands: mpsc::Sender<Command>,
    waker: Arc<EventFd>,
}

impl Mailbox {
    fn send(&self, command: Command) -> Result<(), DriverError> {
        self.commands.send(command).map_err(|_| DriverError::Stopped)?;
        wake::wake(&self.waker);
        Ok(())
    }
}

impl LocalDriver {
    /// Attaches to the queue file, creating or emptying it if nobody alive uses it, and starts the driver thread.
    pub fn open(path: &Path) -> Result<(LocalDriver, UnboundedReceiver<Event>), DriverError> {
        if !wake::event_signal_blocked() {
            return Err(DriverError::SignalNotBlocked);
        }
        let io = |what| move |source| DriverError::Io { what, path: path.to_owned(), source };
        let waker = Arc::new(wake::waker().map_err(io("no event descriptor for"))?);
        let sleeper = wake::Sleeper::new().map_err(io("no signal descriptor for"))?;
        let (commands, inbox) = mpsc::channel();
        let (events, receiver) = unbounded_channel();
        let mailbox = Mailbox { commands, waker };
        let mut member = Member::new(QueueFile::open(path)?, events, mailbox.clone())?;
        member.attach()?;
        std::thread::Builder::new()
            .name("cluster".to_owned())
            .spawn(move || member.run(&inbox, &sleeper))
            .map_err(io("no thread for"))?;
        Ok((LocalDriver { path: path.to_owned(), mailbox, locks: Locks::new(path) }, receiver))
    }
}

impl Drop for LocalDriver {
    fn drop(&mut self) {
        let _ = self.mailbox.send(Command::Stop);
    }
}

impl Driver for LocalDriver {
    fn name(&self) -> &'static str {
        "local"
    }

    fn local_addr(&self) -> Result<IpAddr, DriverError> {
        Ok(Ipv4Addr::LOCALHOST.into())
    }

    fn members_hint(&self) -> Vec<NodeRecord> {
        let read = || {
            let queue = QueueFile::open(&self.path)?;
            let mut lnodes = queue.lock()?.newest()?;
            let mut liveness = Liveness::new(queue.id());
            lnodes.retain(|n| liveness.alive(n.pid));
            Ok::<_, DriverError>(layout::members(&lnodes, None))
        };
        read().unwrap_or_else(|e| {
            tracing::warn!("cannot list the present members: {e}");
            Vec::new()
        })
    }

    fn max_info_nodes(&self) -> usize {
        member::MAX_INFO_NODES
    }

    fn request(&self, request: Request) -> BoxFuture<'_, Reply> {
        let (reply, answer) = oneshot::channel();
        let sent = self.mailbox.send(Command::Request(request, reply));
        Box::pin(async move {
            sent?;
            answer.await.unwrap_or(Err(DriverError::Stopped))
        })
    }

    fn lock(&self, id: u64) -> BoxFuture<'_, Result<Lock, DriverError>> {
        Box::pin(self.locks.lock(id))
    }
}

#[cfg(test)]
mod tests;
