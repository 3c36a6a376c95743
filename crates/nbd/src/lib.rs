//! See the crate documentation once written.
