//! Real clusters for tests: the built `sheep` and `dog`, started in temporary directories, killed, stopped, compared.
//!
//! A [`Cluster`] owns its processes, its directory, its ports and its shared-memory file, so tests run in parallel and
//! leave nothing behind; a failed test keeps the directory and prints the tails of the logs. Everything that a test
//! waits for is a condition with a deadline ([`wait`]). The kit talks to daemons with its own blocking [`Client`], so a
//! test judges the daemon by the protocol and not through the project's client crate. Failures of the kit itself panic:
//! it is only ever used by tests.
#![allow(clippy::unwrap_used)]

pub mod binaries;
pub mod client;
pub mod cluster;
pub mod corosync;
pub mod disk;
pub mod hosts;
pub mod load;
pub mod netns;
mod node;
pub mod ports;
mod private_disk;
pub mod scale;
pub mod vdi;
pub mod vectors;
pub mod wait;
pub mod zookeeper;

pub use client::{Client, answer};
pub use cluster::{Builder, Cluster, Engine};
pub use corosync::Corosync;
pub use hosts::{Hosts, Nic};
pub use netns::{in_own_mounts, in_own_network};
pub use node::{Node, Output};
pub use ports::Ports;
pub use private_disk::PrivateDisk;
pub use vdi::Vdi;
pub use wait::{wait, wait_for};
pub use zookeeper::ZooKeeper;
