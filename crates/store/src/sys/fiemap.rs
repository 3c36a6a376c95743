//! FIEMAP: which ranges of a file have blocks on disk.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `_IOWR('f', 11, struct fiemap)` with its 32-byte header.
const FS_IOC_FIEMAP: u64 = 0xc020_660b;
/// `_IOR('f', 1, long)`.
const FS_IOC_GETFLAGS: u64 = 0x8008_6601;
const FIEMAP_FLAG_SYNC: u32 = 1;
/// Extents asked for per call.
const EXTENTS: usize = 128;

pub(crate) const EXTENT_LAST: u32 = 0x0001;
pub(crate) const EXTENT_UNWRITTEN: u32 = 0x0800;
pub(crate) const EXTENT_MERGED: u32 = 0x1000;

/// One extent of a file, as `struct fiemap_extent`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Extent {
    pub(crate) logical: u64,
    physical: u64,
    pub(crate) length: u64,
    reserved: [u64; 2],
    pub(crate) flags: u32,
    reserved2: [u32; 3],
}

impl Extent {
    /// An extent for tests of what is made of it.
    #[cfg(test)]
    pub(crate) fn new(logical: u64, length: u64, flags: u32) -> Extent {
        Extent { logical, length, flags, ..Extent::default() }
    }
}

#[repr(C)]
struct Query {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [Extent; EXTENTS],
}

const _: () = assert!(size_of::<Extent>() == 56 && size_of::<Query>() == 32 + 56 * EXTENTS);

/// All extents of a file, after writing back what is dirty in the page cache.
pub(crate) fn extents(file: &File) -> io::Result<Vec<Extent>> {
    let mut all = Vec::new();
    let mut start = 0;
    loop {
        let mut query = Query {
            start,
            length: u64::MAX - start,
            flags: FIEMAP_FLAG_SYNC,
            mapped: 0,
            count: EXTENTS as u32,
            reserved: 0,
            extents: [Extent::default(); EXTENTS],
        };
        // SAFETY: the kernel reads the 32-byte header and writes at most `count` extents, for which `query` has room.
        if unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP as _, &raw mut query) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let found = &query.extents[..(query.mapped as usize).min(EXTENTS)];
        all.extend_from_slice(found);
        match found.last() {
            Some(last) if last.flags & EXTENT_LAST == 0 && last.logical + last.length > start => {
                start = last.logical + last.length;
            }
            _ => return Ok(all),
        }
    }
}

/// The inode flags that `chattr` changes.
pub(crate) fn inode_flags(file: &File) -> io::Result<u32> {
    let mut flags: libc::c_long = 0;
    // SAFETY: the kernel writes at most a long (in fact an int) through the pointer.
    if unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_GETFLAGS as _, &raw mut flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(flags as u32)
}
