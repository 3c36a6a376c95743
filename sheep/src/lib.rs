//! The sheep daemon: composition of the project's crates (spec 04, 16 to 20).

pub mod shell;
