//! VDIs as the daemon sees them: the state table and the operations on it (spec 05).

pub mod attr;
pub mod create;
pub mod delete;
pub mod holders;
mod leaks;
pub mod locks;
pub mod lookup;
pub mod objects;
pub mod orphans;
pub mod reclaim;
pub mod table;
pub mod tree;
pub mod unfinished;
