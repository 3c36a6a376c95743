//! `dog upgrade config-convert`.

use super::{destination, read_source, write_destination};
use crate::context::Context;
use crate::exit::{Outcome, Stop, fail};

/// Bytes of a config file.
const CONFIG_LEN: usize = 40;
/// Offset of the default block size shift.
const SHIFT_OFFSET: usize = 29;
/// Offset of the version, u16.
const VERSION_OFFSET: usize = 30;
/// Version written.
const NEW_VERSION: u16 = 6;

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let target = destination(context)?;
    let mut config = read_source(context, "config file")?;
    if config.len() != CONFIG_LEN {
        let text = format!("original config file has invalid size: {}", config.len());
        return Err(fail(Stop::Usage, text));
    }
    let version = u16::from_le_bytes([config[VERSION_OFFSET], config[VERSION_OFFSET + 1]]);
    if !matches!(version, 2 | 4) {
        return Err(fail(Stop::Usage, format_args!("unknown version config file: {version}")));
    }
    config[SHIFT_OFFSET] = sheepdog_proto::DEFAULT_BLOCK_SHIFT;
    config[VERSION_OFFSET..VERSION_OFFSET + 2].copy_from_slice(&NEW_VERSION.to_le_bytes());
    write_destination(target, &config)
}
