//! What a file system can do, found out when a disk is added.
//!
//! The shared flush is allowed only where it was shown to be sound: ext4 without data journalling or DAX, blocks of at
//! least 4 KiB, and a `fdatasync` of a clean file that reaches the device (its flush counter moves) or a device without
//! volatile cache. Everything else takes `fdatasync` per file.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::sys::statfs;
use sheepdog_buffer::PageBuf;

use crate::object::reopen_direct;
use crate::sys::fiemap;

/// `EXT4_JOURNAL_DATA_FL`: data of files below goes through the journal.
const JOURNAL_DATA: u32 = 0x4000;

/// Abilities of a disk's file system.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Abilities {
    /// `O_DIRECT` works with 4096-byte alignment.
    pub(crate) direct: bool,
    /// One flush makes all finished writes into mapped blocks durable.
    pub(crate) shared_flush: bool,
}

/// A clean file without a name on the disk's file system, whose `fdatasync` flushes the device.
pub(crate) fn flush_file(dir: &Path) -> io::Result<File> {
    let unnamed =
        OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(dir);
    let file = match unnamed {
        Ok(file) => file,
        Err(_) => scratch(dir)?,
    };
    file.sync_all()?;
    Ok(file)
}

/// A file that is unlinked at once.
fn scratch(dir: &Path) -> io::Result<File> {
    let path = dir.join(format!(".scratch.{}", std::process::id()));
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(&path)?;
    fs::remove_file(path)?;
    Ok(file)
}

/// Tries everything out.
pub(crate) fn abilities(dir: &Path, flush: &File) -> Abilities {
    Abilities { direct: has_direct(dir), shared_flush: may_share_flush(dir, flush).unwrap_or(false) }
}

fn has_direct(dir: &Path) -> bool {
    let attempt = || -> io::Result<()> {
        let file = flush_file(dir)?;
        match reopen_direct(&file)?.write_all_at(&PageBuf::zeroed(4096), 0) {
            // A full disk says nothing about alignment, and must not keep a node from starting.
            Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => Ok(()),
            other => other,
        }
    };
    attempt().is_ok()
}

fn may_share_flush(dir: &Path, flush: &File) -> io::Result<bool> {
    let handle = File::open(dir)?;
    let fs_info = statfs::fstatfs(handle.as_fd())?;
    let ext4 = fs_info.filesystem_type() == statfs::EXT4_SUPER_MAGIC;
    if !ext4 || (fs_info.block_size() as u64) < crate::trim::BLOCK {
        return Ok(false);
    }
    if fiemap::inode_flags(&handle)? & JOURNAL_DATA != 0 {
        return Ok(false);
    }
    let dev = handle.metadata()?.dev();
    let (major, minor) = (nix::sys::stat::major(dev), nix::sys::stat::minor(dev));
    Ok(mount_is_plain(major, minor)? && flush_reaches_device(major, minor, flush)?)
}

/// Whether the mount has neither data journalling nor DAX.
fn mount_is_plain(major: u64, minor: u64) -> io::Result<bool> {
    let device = format!("{major}:{minor}");
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let Some(line) = mounts.lines().find(|l| l.split(' ').nth(2) == Some(&device)) else { return Ok(false) };
    // After " - ": type, source, options of the file system.
    let Some((_, tail)) = line.split_once(" - ") else { return Ok(false) };
    let source = tail.split(' ').nth(1).and_then(|s| s.rsplit('/').next()).unwrap_or_default();
    // Lists defaults too, unlike mountinfo; absent in some containers.
    let all = fs::read_to_string(format!("/proc/fs/ext4/{source}/options")).unwrap_or_default();
    let odd = |option: &str| option == "data=journal" || (option.starts_with("dax") && option != "dax=never");
    let options = tail.split([' ', ',']).chain(all.lines());
    Ok(!options.map(str::trim).any(odd))
}

fn flush_reaches_device(major: u64, minor: u64, flush: &File) -> io::Result<bool> {
    let device = format!("/sys/dev/block/{major}:{minor}");
    let cache = fs::read_to_string(format!("{device}/queue/write_cache"))
        .or_else(|_| fs::read_to_string(format!("{device}/../queue/write_cache")))?;
    if cache.trim() == "write through" {
        return Ok(true);
    }
    let flushes = || -> io::Result<Option<u64>> {
        let stat = fs::read_to_string(format!("{device}/stat"))?;
        Ok(stat.split_ascii_whitespace().nth(15).and_then(|n| n.parse().ok()))
    };
    for _ in 0..3 {
        let before = flushes()?;
        flush.sync_data()?;
        if before.is_none() || flushes()? <= before {
            return Ok(false);
        }
    }
    Ok(true)
}
