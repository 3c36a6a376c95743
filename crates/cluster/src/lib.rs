//! Membership: who is in the cluster, in which order things happen, and who may change shared state (spec 04, 4).
//!
//! A [`Driver`] delivers one totally ordered sequence of [`Event`]s through one channel and takes requests to add to
//! that sequence. Questions to the daemon (a join to judge, a block to start) travel in the same channel and carry an
//! [`Answer`], so everything before them has been handled when they are answered. [`open`] selects a driver by the
//! text after `-c`: [LocalDriver], [ZookeeperDriver] or [CorosyncDriver].

#[cfg(test)]
mod captures;
mod clock;
mod contract;
mod corosync;
mod local;
mod lock;
mod select;
mod zookeeper;

pub use contract::{Answer, BoxFuture, Driver, DriverError, Event, Lease, Reply, Request};
pub use corosync::CorosyncDriver;
pub use local::{DEFAULT_PATH, LocalDriver, MAX_LOCAL_NODES, PidFd, block_event_signal};
pub use lock::Lock;
pub use select::{DEFAULT_DRIVER, DRIVER_NAMES, Selection, open, select};
pub use zookeeper::ZookeeperDriver;
