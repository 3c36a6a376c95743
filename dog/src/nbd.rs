//! `dog nbd serve` (our addition): an NBD server next to any sheep.

use crate::context::Context;
use crate::exit::{Outcome, SYSTEM, fail};

/// Runs the server until it is stopped.
pub async fn serve(context: &Context) -> Outcome {
    context.name()?;
    Err(fail(SYSTEM, "this build of dog has no NBD server"))
}
