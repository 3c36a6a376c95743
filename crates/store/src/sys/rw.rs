//! Vectored and non-blocking positioned I/O, and write-back control.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

use bytes::Bytes;

/// Reads at `offset` only what is in the page cache. `WouldBlock` if nothing is.
pub(crate) fn read_cached(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    // SAFETY: one iovec, covering `buf`, which is exclusively borrowed for the call.
    let n = unsafe { libc::preadv2(file.as_raw_fd(), &iov, 1, offset as i64, libc::RWF_NOWAIT) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize) }
}

/// The iovecs of `parts`; they point into the parts, which must outlive their use.
pub(crate) fn iovecs(parts: &[Bytes]) -> Vec<libc::iovec> {
    parts.iter().map(|p| libc::iovec { iov_base: p.as_ptr().cast_mut().cast(), iov_len: p.len() }).collect()
}

/// Writes all of `parts` one after the other at `offset`.
pub(crate) fn write_all(file: &File, parts: &[Bytes], offset: u64) -> io::Result<()> {
    let iov = iovecs(parts);
    let total: usize = parts.iter().map(Bytes::len).sum();
    let done = loop {
        // SAFETY: the iovecs point into `parts`, borrowed for the call; the kernel only reads from them.
        let n = unsafe { libc::pwritev(file.as_raw_fd(), iov.as_ptr(), iov.len() as i32, offset as i64) };
        if n >= 0 {
            break n as usize;
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    };
    if done < total { finish(file, parts, offset, done) } else { Ok(()) }
}

/// Writes what is left of `parts` after the first `done` bytes.
pub(crate) fn finish(file: &File, parts: &[Bytes], offset: u64, done: usize) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let mut start = 0;
    for part in parts {
        let end = start + part.len();
        if end > done {
            let from = done.max(start);
            file.write_all_at(&part[from - start..], offset + from as u64)?;
        }
        start = end;
    }
    Ok(())
}

/// Number of names of an open file. Asks for nothing else on purpose: a query of the time stamps makes the kernel keep
/// finer ones, so that the next write has to change the inode, which io_uring leaves to a helper thread.
pub(crate) fn link_count(file: &File) -> io::Result<u32> {
    let mut out = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: an empty path with AT_EMPTY_PATH means the descriptor itself; the kernel fills the structure.
    let r = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_NLINK, out.as_mut_ptr())
    };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all zeros are a valid value, and the call succeeded.
    let out = unsafe { out.assume_init() };
    if out.stx_mask & libc::STATX_NLINK == 0 {
        Err(io::ErrorKind::Unsupported.into())
    } else {
        Ok(out.stx_nlink)
    }
}

/// Starts write-back of a range without waiting.
pub(crate) fn start_write_back(file: &File, offset: u64, len: u64) -> io::Result<()> {
    sync_range(file, offset, len, libc::SYNC_FILE_RANGE_WRITE)
}

/// Waits until a range is written back. This alone makes nothing durable: extents are not committed, the device's
/// cache is not flushed.
pub(crate) fn wait_write_back(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let flags =
        libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    sync_range(file, offset, len, flags)
}

fn sync_range(file: &File, offset: u64, len: u64, flags: u32) -> io::Result<()> {
    // SAFETY: plain numbers only.
    let r = unsafe { libc::sync_file_range(file.as_raw_fd(), offset as i64, len as i64, flags) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
