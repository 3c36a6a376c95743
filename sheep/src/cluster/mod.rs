//! Membership and everything that must happen in one order on all nodes (spec 04).
//!
//! [`state`] decides, as a pure state machine: an event and the present state give the new state and a list of
//! [`state::Action`]s. [`task`] owns it, receives the driver's events one by one, carries the actions out and
//! publishes the resulting [`crate::view::View`]. [`ops`] are the main parts of cluster operations, [`handle`] is how
//! the rest of the daemon asks for one.

pub mod handle;
pub mod ops;
pub mod state;
pub mod task;
pub mod worker;

pub use handle::ClusterHandle;
