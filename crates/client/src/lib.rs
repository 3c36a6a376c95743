//! Talking to a sheep: framing, pipelined connections, and (in `volume`) a VDI as a block device.
//!
//! [`frame`] moves headers and payloads over a socket for both sides of the protocol, [`Connection`] matches answers to
//! requests by id so that any number may be in flight (spec 01, 2.2), [`Service`] is what everything above needs of a
//! sheep: a connection is one, and a daemon serving its own volumes is another.

pub mod connection;
pub mod frame;
pub mod service;

pub use connection::{Address, Connection};
pub use service::{CallFuture, ClientError, Reply, Service};
