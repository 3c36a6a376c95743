//! NBD server over volumes: today's QEMU, nbd.ko and libnbd reach VDIs through it (spec 08, 7.3).
//!
//! [`Server`] speaks fixed newstyle NBD with simple, structured and extended replies to clients of a [`Listener`];
//! an [`ExportSource`] says what there is to export, normally [`VdiExports`]: every VDI and snapshot of a cluster, one
//! shared [`sheepdog_client::Volume`] per export. A connection is one task that receives, executes and answers: what
//! finishes together leaves in one vectored write, and payloads are received once, into the buffer that goes down to
//! the sheep. Everything a client can make the server hold is bounded by [`Limits`].

mod execute;
pub mod export;
mod handshake;
pub mod listen;
mod output;
mod proto;
mod server;
mod socket;
mod transmission;

pub use export::{Export, ExportError, ExportSource, Listed, VdiExports, VdiExportsOptions};
pub use listen::{ListenAddr, Listener};
pub use server::{Limits, Server};
