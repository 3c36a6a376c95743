//! `dog cluster snapshot save|list|load|show` (spec 07, section 15): not in this release.

use crate::context::Context;
use crate::exit::{Outcome, SYSTEM, fail};

/// Refuses.
pub async fn run(_context: &Context) -> Outcome {
    Err(fail(SYSTEM, "cluster snapshots are not supported by this version of dog"))
}
