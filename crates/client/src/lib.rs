//! Talking to a sheep: framing, pipelined connections, and (in [`volume`]) a VDI as a block device.
//!
//! [`frame`] moves headers and payloads over a socket for both sides of the protocol, [`Connection`] matches answers to
//! requests by id so that any number may be in flight (spec 01, 2.2), [`Service`] is what everything above needs of a
//! sheep: a connection is one, and a daemon serving its own volumes is another. [`Reconnect`] is a connection that
//! outlives its sockets, [`vdi`] the requests that name, list and create VDIs.

pub mod connection;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
pub mod frame;
pub mod reconnect;
pub mod service;
pub mod vdi;
pub mod volume;

pub use connection::{Address, Connection};
pub use reconnect::{Reconnect, ReconnectOptions};
pub use service::{CallFuture, ClientError, Reply, Service};
pub use volume::{Extent, OpenOptions, Segment, SnapshotRef, Volume, VolumeError};
