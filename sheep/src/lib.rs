//! The sheep daemon: composition of the project's crates (spec 04, 16 to 20).
//!
//! Read top-down: [`daemon`] starts everything; [`server`] receives requests; [`dispatch`] says what each one is;
//! [`gateway`] brings object requests to all replicas, [`peer`] executes them on one; [`cluster`] applies membership
//! events in order and publishes [`view`]s; [`recovery`] moves objects after them; [`vdi`] is what VDIs are.

pub mod clients;
pub mod cluster;
pub mod daemon;
pub mod disks;
pub mod dispatch;
pub mod faults;
pub mod gate;
pub mod gateway;
pub mod history;
pub mod holds;
pub mod intents;
pub mod listen;
pub mod nbd;
pub mod ops;
pub mod order;
pub mod peer;
pub mod peers;
pub mod recovery;
pub mod server;
pub mod service;
pub mod settle;
pub mod sheep;
pub mod shell;
pub mod start;
pub mod stats;
mod undo_log;
pub mod vdi;
pub mod view;
