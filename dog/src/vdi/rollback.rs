//! `dog vdi rollback` (spec 07, 9.4).

use crate::context::Context;
use crate::exit::{Outcome, Stop, fail};
use crate::inode::{Part, open};
use crate::objects::{like, new_vdi};
use crate::terminal::confirm;
use crate::vdi::delete::delete;

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let name = context.name()?;
    let options = &context.options;
    let Some(snapshot) = &options.snapshot else {
        return Err(fail(Stop::Usage, "Please specify the '-s' option"));
    };
    let inode = open(&context.session, name, Some(snapshot), Part::Header).await?;
    if !options.force {
        confirm(
            "This operation discards any changes made since the previous\nsnapshot was taken.  Continue? [yes/no]: ",
        )?;
    }
    // A missing working VDI is no obstacle: rolling back again is how a failed rollback is repaired.
    delete(&context.session, name, None, options).await;
    let vid = new_vdi(&context.session, name, like(&inode.header, inode.vid(), 0)).await?;
    if options.verbose && options.raw {
        out!("{vid}\n");
    } else if options.verbose {
        out!("New VDI ID of rollbacked VDI: {vid}\n");
    }
    Ok(())
}
