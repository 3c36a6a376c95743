//! Commands on a volume.

use bytes::Bytes;
use sheepdog_client::{Extent, Volume, VolumeError};
use sheepdog_proto::ResultCode;

use crate::output::Reply;
use crate::proto::{Context, MAX_REQUEST, Mode, cmd, cmd_flag, errno};

/// Most bytes that one BLOCK_STATUS looks at; it may answer about less than it was asked for.
const MAX_STATUS: u64 = 64 << 30;
/// Most extents of one answer.
const MAX_EXTENTS: usize = 16 << 10;
/// Allocation flags of a hole: not allocated, and reads as zeros.
const HOLE_AND_ZERO: u32 = 3;

/// A command as received.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Command {
    pub(crate) flags: u16,
    pub(crate) kind: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

impl Command {
    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Bytes of memory it needs besides itself.
    pub(crate) fn cost(&self) -> usize {
        match self.kind {
            cmd::READ | cmd::WRITE => usize::try_from(self.length).unwrap_or(usize::MAX),
            _ => 0,
        }
    }

    fn known_flags(&self) -> u16 {
        // FUA may be set on anything; where nothing is written it means nothing.
        cmd_flag::FUA
            | match self.kind {
                cmd::READ => cmd_flag::DF,
                cmd::WRITE => cmd_flag::PAYLOAD_LEN,
                cmd::WRITE_ZEROES => cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO,
                cmd::BLOCK_STATUS => cmd_flag::REQ_ONE,
                _ => 0,
            }
    }

    /// The error that the command gets without being tried.
    pub(crate) fn refusal(&self, volume: &Volume, contexts: &[Context]) -> Option<u32> {
        let writes = matches!(self.kind, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES);
        if self.kind > cmd::BLOCK_STATUS || self.flags & !self.known_flags() != 0 {
            return Some(errno::EINVAL);
        }
        if writes && volume.is_read_only() {
            return Some(errno::EPERM);
        }
        if matches!(self.kind, cmd::READ | cmd::WRITE) && self.length > u64::from(MAX_REQUEST) {
            return Some(errno::EINVAL);
        }
        let inside = self.offset.checked_add(self.length).is_some_and(|end| end <= volume.size());
        if !inside && self.kind != cmd::FLUSH {
            return Some(match self.kind {
                cmd::WRITE | cmd::WRITE_ZEROES => errno::ENOSPC,
                _ => errno::EINVAL,
            });
        }
        let pointless = self.kind == cmd::BLOCK_STATUS && (contexts.is_empty() || self.length == 0);
        pointless.then_some(errno::EINVAL)
    }
}

/// The error number for a failed operation (spec 08, 7.3.4).
fn number(error: &VolumeError) -> u32 {
    match (error, error.code()) {
        (VolumeError::ReadOnly, _) | (_, Some(ResultCode::READONLY)) => errno::EPERM,
        (VolumeError::OutOfRange { .. }, _) => errno::EINVAL,
        (_, Some(ResultCode::NO_SPACE)) => errno::ENOSPC,
        (_, Some(ResultCode::SHUTDOWN | ResultCode::KILLED)) => errno::ESHUTDOWN,
        _ => errno::EIO,
    }
}

/// Executes a command that was not refused.
pub(crate) async fn execute(
    volume: &Volume,
    command: &Command,
    payload: Bytes,
    contexts: &[Context],
    mode: Mode,
) -> Reply {
    let fua = command.has(cmd_flag::FUA);
    let outcome = match command.kind {
        cmd::READ => match volume.read(command.offset, command.length as usize).await {
            Ok(segments) => {
                let whole = command.has(cmd_flag::DF);
                return Reply::Data { offset: command.offset, segments, whole };
            }
            Err(error) => Err(error),
        },
        cmd::WRITE => volume.write(command.offset, payload, fua).await,
        cmd::FLUSH => volume.flush().await,
        cmd::TRIM => volume.discard(command.offset, command.length).await,
        cmd::WRITE_ZEROES => return Reply::Status(write_zeroes(volume, command, fua).await),
        cmd::BLOCK_STATUS => match block_status(volume, command, contexts, mode).await {
            Ok(extents) => return Reply::Extents(extents),
            Err(error) => Err(error),
        },
        // Prefetching is a hint; the sheep keeps its own caches.
        cmd::CACHE => Ok(()),
        _ => return Reply::Status(errno::EINVAL),
    };
    match outcome {
        Ok(()) => Reply::Status(0),
        Err(error) => {
            tracing::warn!(vdi = volume.name(), ?command, %error, "request failed");
            Reply::Status(number(&error))
        }
    }
}

async fn write_zeroes(volume: &Volume, command: &Command, fua: bool) -> u32 {
    let (offset, len, no_hole) = (command.offset, command.length, command.has(cmd_flag::NO_HOLE));
    let outcome = async {
        if command.has(cmd_flag::FAST_ZERO) && (no_hole || !volume.zeroes_are_fast(offset, len).await?) {
            return Ok(errno::ENOTSUP);
        }
        volume.write_zeroes(offset, len, no_hole, fua).await.map(|()| 0)
    };
    outcome.await.unwrap_or_else(|error| {
        tracing::warn!(vdi = volume.name(), ?command, %error, "request failed");
        number(&error)
    })
}

async fn block_status(
    volume: &Volume,
    command: &Command,
    contexts: &[Context],
    mode: Mode,
) -> Result<Vec<(Context, Vec<(u64, u32)>)>, VolumeError> {
    let extents = volume.extents(command.offset, command.length.min(MAX_STATUS)).await?;
    Ok(contexts
        .iter()
        .map(|context| {
            let mut out = merged(extents.iter().map(|(len, extent)| (*len, value(*context, *extent))), mode);
            out.truncate(if command.has(cmd_flag::REQ_ONE) { 1 } else { MAX_EXTENTS });
            (*context, out)
        })
        .collect())
}

fn value(context: Context, extent: Extent) -> u32 {
    match (context, extent) {
        (Context::Allocation, Extent::Hole) => HOLE_AND_ZERO,
        (Context::Allocation, _) => 0,
        (Context::Depth, Extent::Hole) => 0,
        (Context::Depth, Extent::Own) => 1,
        (Context::Depth, Extent::Inherited) => 2,
    }
}

/// Merges neighbours of equal value, as far as the length field holds them.
fn merged(extents: impl Iterator<Item = (u64, u32)>, mode: Mode) -> Vec<(u64, u32)> {
    let longest = if mode == Mode::Extended { u64::MAX } else { u64::from(u32::MAX) & !0xfff };
    let mut out: Vec<(u64, u32)> = Vec::new();
    for (mut len, value) in extents {
        while len > 0 {
            match out.last_mut() {
                Some((total, last)) if *last == value && *total < longest => {
                    let part = len.min(longest - *total);
                    *total += part;
                    len -= part;
                }
                _ => {
                    let part = len.min(longest);
                    out.push((part, value));
                    len -= part;
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_neighbours_are_merged_up_to_what_the_length_field_holds() {
        let parts = [(5, 0), (7, 0), (3, 3), (1 << 33, 3)];
        assert_eq!(merged(parts.into_iter(), Mode::Extended), [(12, 0), ((1 << 33) + 3, 3)]);
        let narrow = merged(parts.into_iter(), Mode::Structured);
        assert_eq!(narrow[0], (12, 0));
        assert!(narrow.iter().all(|(len, _)| *len <= u64::from(u32::MAX)));
        assert_eq!(narrow.iter().map(|(len, _)| len).sum::<u64>(), (1 << 33) + 15);
    }
}
