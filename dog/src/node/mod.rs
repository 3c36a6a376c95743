//! `dog node ...` (spec 07, section 13).

pub mod format;
pub mod info;
pub mod kill;
pub mod list;
pub mod loglevel;
pub mod md;
pub mod recovery;
pub mod stat;
pub mod vnodes;
