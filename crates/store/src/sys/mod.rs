//! System calls that have no safe wrapper; the only unsafe code of this crate.

pub(crate) mod fiemap;
pub(crate) mod rw;
pub(crate) mod uring;
