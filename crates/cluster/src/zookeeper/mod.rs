//! The ZooKeeper driver: sheep anywhere, agreeing through an ensemble they share with those of the original (spec 04,
//! 12). [`ZookeeperDriver`] is the asynchronous handle; a thread of its own with its own runtime holds the session, so
//! neither a busy daemon nor a silent ensemble holds up the other (`docs/decisions/0007-zookeeper-client.md`).
//!
//! The znodes are the truth: [`queue`] holds the common history, [`history`] says what it means, [`election`] who
//! answers joins, [`session`] what this node does about it, [`link`] whether the session lives.

mod election;
mod history;
mod layout;
mod link;
mod locks;
mod member;
mod option;
mod queue;
mod session;
mod tasks;

use std::net::IpAddr;
use std::sync::Arc;

use sheepdog_proto::{MAX_NODES, NodeId, NodeRecord};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

use crate::{BoxFuture, Driver, DriverError, Event, Lease, Lock, Reply, Request};
use link::{Fault, LinkOwner};
use member::{Command, Member};
use option::Options;

/// How long the thread lives on for the library to close the session.
const CLOSING: std::time::Duration = std::time::Duration::from_millis(50);

/// Handle of a running ZooKeeper driver. Dropping it ends its thread and, if there is time, the session, which the
/// others see as a death.
pub struct ZookeeperDriver {
    commands: UnboundedSender<Command>,
    present: Vec<NodeRecord>,
    lease: Arc<Lease>,
}

impl ZookeeperDriver {
    /// Connects and starts the driver thread. Blocks for up to the session timeout if no server answers.
    pub fn open(option: Option<&str>) -> Result<(ZookeeperDriver, UnboundedReceiver<Event>), DriverError> {
        let options = Options::parse(option)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(DriverError::Start)?;
        let (commands, inbox) = unbounded_channel();
        let (events, receiver) = unbounded_channel();
        let (opened, outcome) = std::sync::mpsc::channel();
        let mailbox = commands.clone();
        let lease = Arc::new(Lease::new());
        let renewed = lease.clone();
        let run = async move {
            let connected = match LinkOwner::connect(&options).await {
                Ok(owner) => present(&owner, &options).await.map(|nodes| (owner, nodes)),
                Err(e) => Err(e),
            };
            match connected {
                Err(e) => drop(opened.send(Err(e))),
                Ok((owner, nodes)) => {
                    let _ = opened.send(Ok(nodes));
                    Member::new(options, owner, renewed, events, inbox, mailbox).run().await;
                }
            }
        };
        std::thread::Builder::new()
            .name("cluster".to_owned())
            .spawn(move || {
                runtime.block_on(async {
                    run.await;
                    // Lets the library close the session.
                    tokio::time::sleep(CLOSING).await;
                });
                runtime.shutdown_background();
            })
            .map_err(DriverError::Start)?;
        let present = outcome.recv().map_err(|_| DriverError::Stopped)??;
        Ok((ZookeeperDriver { commands, present, lease }, receiver))
    }
}

impl Drop for ZookeeperDriver {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Stop);
    }
}

/// The members as their znodes' names tell.
async fn present(owner: &LinkOwner, options: &Options) -> Result<Vec<NodeRecord>, DriverError> {
    let names = owner.link.children("/member").await.map_err(|fault| match fault {
        Fault::Lost => DriverError::SessionLost,
        Fault::Refused(e) => DriverError::Ensemble { hosts: options.hosts.clone(), reason: e.to_string() },
    })?;
    let ids = names.iter().filter_map(|name| NodeId::parse(name));
    Ok(ids.map(|nid| NodeRecord { nid, ..NodeRecord::zeroed() }).collect())
}

impl Driver for ZookeeperDriver {
    fn name(&self) -> &'static str {
        "zookeeper"
    }

    /// The first address of an interface that is up and no loopback.
    fn local_addr(&self) -> Result<IpAddr, DriverError> {
        let interfaces = nix::ifaddrs::getifaddrs().map_err(|_| DriverError::NoInterface)?;
        let mut found = interfaces.filter_map(|interface| {
            let address = interface.address?;
            let ip: IpAddr = match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
                (Some(v4), _) => v4.ip().into(),
                (_, Some(v6)) => v6.ip().into(),
                _ => return None,
            };
            (!ip.is_loopback()).then_some(ip)
        });
        let first = found.next().ok_or(DriverError::NoInterface)?;
        if let Some(other) = found.next() {
            tracing::warn!("found addresses {first} and {other}, taking the first; -y chooses");
        }
        Ok(first)
    }

    fn members_hint(&self) -> Vec<NodeRecord> {
        self.present.clone()
    }

    fn lease(&self) -> Option<Arc<Lease>> {
        Some(self.lease.clone())
    }

    fn max_info_nodes(&self) -> usize {
        MAX_NODES
    }

    fn request(&self, request: Request) -> BoxFuture<'_, Reply> {
        let (reply, answer) = oneshot::channel();
        let sent = self.commands.send(Command::Request(request, reply));
        Box::pin(async move {
            sent.map_err(|_| DriverError::Stopped)?;
            answer.await.unwrap_or(Err(DriverError::SessionLost))
        })
    }

    fn lock(&self, id: u64) -> BoxFuture<'_, Result<Lock, DriverError>> {
        let (reply, answer) = oneshot::channel();
        let sent = self.commands.send(Command::Lock(id, reply));
        Box::pin(async move {
            sent.map_err(|_| DriverError::Stopped)?;
            answer.await.unwrap_or(Err(DriverError::SessionLost))
        })
    }
}

#[cfg(test)]
mod tests;
