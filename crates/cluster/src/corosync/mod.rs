//! The corosync driver: sheep on the nodes of a corosync cluster, in one closed process group, together with those of the
//! original (spec 04, 13). [`CorosyncDriver`] is the asynchronous handle; a thread of its own ([`member`]) talks to the
//! local corosync through its C library ([`ffi`], loaded when needed), [`queues`] says what the deliveries mean, [`layout`]
//! how messages look.

mod ffi;
mod layout;
mod locks;
mod member;
mod queues;

use std::net::IpAddr;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use sheepdog_proto::NodeRecord;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

use crate::{BoxFuture, Driver, DriverError, Event, Lease, Lock, Reply, Request};
use ffi::{ACCESS, Code, Group, LIBRARY, SECURITY, TRY_AGAIN};
use member::{Command, Member};

/// The group of all sheep of a corosync cluster.
const GROUP: &str = "sheepdog";
/// The group of those that use [`locks`].
const LOCK_GROUP: &str = "sheepdog-locks";
/// Attempts to reach a corosync that is just starting.
const CONNECT_ATTEMPTS: usize = 10;
/// Between two of them.
const CONNECT_RETRY: Duration = Duration::from_millis(200);
/// Corosync's token timeout, if it does not tell.
const DEFAULT_TOKEN: u32 = 1000;

/// Handle of a running corosync driver. Dropping it ends its thread and takes the process out of the group, which the
/// others see as a leave.
pub struct CorosyncDriver {
    mailbox: Mailbox,
    lease: Arc<Lease>,
    /// Keeps the channel open: the thread's last event says why it ended.
    _events: UnboundedSender<Event>,
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
        // A full counter wakes as well.
        let _ = self.waker.write(1);
        Ok(())
    }
}

/// What is said when corosync went away.
fn option_lost(code: Code) -> String {
    match code.0 {
        LIBRARY => "corosync driver received EPOLLHUP event, exiting.".to_owned(),
        code => format!("cpg_dispatch returned {code}"),
    }
}

fn connect(group: &str) -> Result<Group, DriverError> {
    let mut attempt = 0;
    loop {
        match Group::connect(group) {
            Ok(group) => return Ok(group),
            Err(Code(TRY_AGAIN)) if attempt + 1 < CONNECT_ATTEMPTS => {
                attempt += 1;
                std::thread::sleep(CONNECT_RETRY);
            }
            Err(Code(SECURITY | ACCESS)) => {
                return Err(DriverError::Corosync("failed to initialize cpg - permission denied".to_owned()));
            }
            Err(Code(code)) => {
                let hint = if matches!(code, LIBRARY | TRY_AGAIN) { " - is corosync running?" } else { "" };
                return Err(DriverError::Corosync(format!("failed to initialize cpg ({code}){hint}")));
            }
        }
    }
}

impl CorosyncDriver {
    /// Connects to the local corosync and starts the driver thread. The process identity must be final.
    pub fn open() -> Result<(CorosyncDriver, UnboundedReceiver<Event>), DriverError> {
        ffi::available().map_err(DriverError::NoCorosync)?;
        let group = connect(GROUP)?;
        let local = group.local();
        let process = local.map_err(|code| {
            DriverError::Corosync(format!("corosync does not tell the id of this node ({})", code.0))
        })?;
        // A group of this process alone: only the order of its messages is of interest.
        let pulse = connect(&format!("sheepdog-{}-{}", process.nodeid, process.pid))?;
        let token = Duration::from_millis(ffi::token_timeout().unwrap_or(DEFAULT_TOKEN).into());
        tracing::info!(
            "corosync node {}, pid {}, token timeout {} ms",
            process.nodeid,
            process.pid,
            token.as_millis()
        );
        let waker = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        let waker = Arc::new(waker.map_err(|e| DriverError::Start(e.into()))?);
        let (commands, inbox) = mpsc::channel();
        let (events, receiver) = unbounded_channel();
        let mailbox = Mailbox { commands, waker: waker.clone() };
        let lease = Arc::new(Lease::new());
        let member =
            Member::new(group, process, pulse, token, lease.clone(), events.clone(), mailbox.clone());
        std::thread::Builder::new()
            .name("cluster".to_owned())
            .spawn(move || member.run(&inbox, &waker))
            .map_err(DriverError::Start)?;
        Ok((CorosyncDriver { mailbox, lease, _events: events }, receiver))
    }
}

impl Drop for CorosyncDriver {
    fn drop(&mut self) {
        let _ = self.mailbox.send(Command::Stop);
    }
}

impl Driver for CorosyncDriver {
    fn name(&self) -> &'static str {
        "corosync"
    }

    fn local_addr(&self) -> Result<IpAddr, DriverError> {
        ffi::local_addr().map_err(DriverError::Corosync)
    }

    /// The group lists processes, not their addresses.
    fn members_hint(&self) -> Vec<NodeRecord> {
        Vec::new()
    }

    fn lease(&self) -> Option<Arc<Lease>> {
        Some(self.lease.clone())
    }

    fn max_info_nodes(&self) -> usize {
        layout::MAX_INFO_NODES
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
        let (reply, answer) = oneshot::channel();
        let sent = self.mailbox.send(Command::Lock(id, reply));
        Box::pin(async move {
            sent?;
            answer.await.unwrap_or(Err(DriverError::Stopped))
        })
    }
}

#[cfg(test)]
mod tests;
