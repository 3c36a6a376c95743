//! `dog vdi export` (our addition): writes an image or snapshot to a file or standard output.
//!
//! A file appears under its name only when it is complete; what reads as zeros becomes holes. Objects are read and
//! written several at a time.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use sheepdog_proto::Flags;
use tempfile::{Builder, NamedTempFile};

use crate::args::ImageFormat;
use crate::context::Context;
use crate::exit::{FAILURE, Outcome, SYSTEM, Stop, fail};
use crate::inode::{Inode, Part, open};
use crate::objects::{read, report_read};
use crate::out::{errno_text, text};
use crate::session::Session;
use crate::terminal::{Progress, Unit};
use crate::vdi::import_source::is_zero;
use crate::vdi::read::to_stdout;
use crate::vdi::{Piece, ahead, pieces, qemu_img};

/// Objects read at the same time.
const READ_AHEAD: usize = 8;
/// Zeros of this many bytes become a hole.
const GRAIN: usize = 64 << 10;
/// Status after Ctrl-C, as shells report it.
const INTERRUPTED: i32 = 130;

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let name = context.name()?;
    let Some(word) = context.arg(1) else {
        return Err(fail(Stop::Usage, "Please specify the file to export to"));
    };
    let options = &context.options;
    let inode = open(&context.session, name, options.snapshot.as_ref(), Part::Map).await?;
    let qcow2 = options.format == Some(ImageFormat::Qcow2);
    if word == b"-" {
        if qcow2 {
            return Err(fail(Stop::Usage, "qcow2 needs a file: it is not written from front to back"));
        }
        return to_stdout(&context.session, &inode, 0..inode.header.vdi_size).await;
    }
    let path = Path::new(OsStr::from_bytes(word));
    let failed =
        |e: io::Error| fail(SYSTEM, format_args!("Failed to write {}: {}", text(word), errno_text(&e)));
    let work = async {
        match path.metadata() {
            Ok(kind) if kind.is_dir() => Err(failed(nix::errno::Errno::EISDIR.into())),
            Ok(_) if !options.force => Err(failed(io::ErrorKind::AlreadyExists.into())),
            Ok(kind) if !kind.is_file() => to_device(context, &inode, path, qcow2, &failed).await,
            _ => to_file(context, &inode, path, qcow2, &failed).await,
        }
    };
    tokio::select! {
        outcome = work => outcome,
        _ = tokio::signal::ctrl_c() => Err(fail(Stop::Code(INTERRUPTED), "interrupted")),
    }
}

type Report<'a> = &'a dyn Fn(io::Error) -> Stop;

/// A new file takes the place of the old one at the end.
async fn to_file(context: &Context, inode: &Inode, path: &Path, qcow2: bool, failed: Report<'_>) -> Outcome {
    // The target of a symbolic link is replaced, not the link.
    let path: PathBuf = path.canonicalize().unwrap_or_else(|_| path.into());
    let directory = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = Builder::new();
    builder.prefix(".dog-export").permissions(Permissions::from_mode(0o666));
    let file: NamedTempFile = builder.tempfile_in(directory).map_err(failed)?;
    if qcow2 {
        let snapshot = context.options.snapshot.as_ref();
        qemu_img::export(context, inode.header.name(), snapshot, file.path()).await?;
    } else {
        file.as_file().set_len(inode.header.vdi_size).map_err(failed)?;
        let target = Arc::new(file.as_file().try_clone().map_err(failed)?);
        copy(&context.session, inode, target, true, failed).await?;
    }
    file.as_file().sync_all().map_err(failed)?;
    if context.options.force {
        file.persist(&path).map_err(|e| failed(e.error))?;
    } else {
        file.persist_noclobber(&path).map_err(|e| failed(e.error))?;
    }
    Ok(())
}

/// A disk keeps what is not overwritten: zeros are written, too.
async fn to_device(
    context: &Context,
    inode: &Inode,
    path: &Path,
    qcow2: bool,
    failed: Report<'_>,
) -> Outcome {
    if qcow2 {
        return Err(fail(FAILURE, "qcow2 is written to files only"));
    }
    let file = OpenOptions::new().write(true).open(path).map_err(failed)?;
    let target = Arc::new(file);
    copy(&context.session, inode, target.clone(), false, failed).await?;
    target.sync_all().map_err(failed)
}

/// Why a block was not copied.
enum Problem {
    Object(sheepdog_proto::Oid, crate::session::Failed),
    File(io::Error),
}

async fn copy(
    session: &Session,
    inode: &Inode,
    file: Arc<File>,
    sparse: bool,
    failed: Report<'_>,
) -> Outcome {
    let (size, block_size) = (inode.header.vdi_size, inode.header.block_size());
    let progress = Progress::new(size, Unit::Bytes);
    let wanted = |piece: &Piece| !sparse || inode.block(piece.index).is_some();
    let file = &file;
    let copied = stream::iter(pieces(0..size, block_size).filter(wanted)).map(|piece| async move {
        let at = piece.index * block_size;
        let data = match inode.block(piece.index) {
            None => Bytes::from(vec![0; piece.length]),
            Some(oid) => read(session, oid, piece.offset, piece.length, Flags::DIRECT)
                .await
                .map_err(|e| Problem::Object(oid, e))?,
        };
        let file = file.clone();
        let written = tokio::task::spawn_blocking(move || put(&file, at, &data, sparse)).await;
        written.map_err(|e| Problem::File(io::Error::other(e)))?.map_err(Problem::File)?;
        Ok(at + piece.length as u64)
    });
    let mut copied = std::pin::pin!(copied.buffered(ahead(READ_AHEAD, block_size)));
    while let Some(result) = copied.next().await {
        match result {
            Ok(reached) if reached < size => progress.show(reached),
            Ok(_) => {}
            Err(Problem::File(e)) => return Err(failed(e)),
            Err(Problem::Object(oid, e)) => {
                report_read(oid, e);
                return Err(fail(FAILURE, "Failed to read VDI"));
            }
        }
    }
    progress.show(size);
    Ok(())
}

/// Writes a block; in a new file runs of zeros are left out.
fn put(file: &File, at: u64, data: &[u8], sparse: bool) -> io::Result<()> {
    if !sparse {
        return file.write_all_at(data, at);
    }
    let mut start = 0;
    while start < data.len() {
        let grain = |from: usize| &data[from..(from + GRAIN).min(data.len())];
        let mut end = start;
        while end < data.len() && !is_zero(grain(end)) {
            end += grain(end).len();
        }
        file.write_all_at(&data[start..end], at + start as u64)?;
        start = end + if end < data.len() { grain(end).len() } else { 0 };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn zeros_become_holes() {
        let file = tempfile::tempfile().unwrap();
        let mut data = vec![0; 16 * GRAIN + 10];
        data[3 * GRAIN + 1] = 1;
        data[16 * GRAIN + 9] = 2;
        file.set_len(data.len() as u64 + 7).unwrap();
        put(&file, 7, &data, true).unwrap();
        let mut back = vec![9; data.len() + 7];
        file.read_exact_at(&mut back, 0).unwrap();
        assert!(back[..7].iter().all(|b| *b == 0) && back[7..] == data);
        assert!(file.metadata().unwrap().blocks() * 512 < 6 * GRAIN as u64);
        put(&file, 0, &vec![0; GRAIN], false).unwrap();
        file.read_exact_at(&mut back, 0).unwrap();
        assert!(back[..GRAIN].iter().all(|b| *b == 0));
    }
}
