//! What can go wrong, and what a requester is told (spec 03, section 10; spec 06, W-16 and W-17).

use std::io;
use std::path::PathBuf;

use sheepdog_proto::ResultCode;

/// Failure of a store operation.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The object is not on this node.
    #[error("no such object")]
    NoObject,
    /// The disk has no room.
    #[error("no space left on the disk")]
    NoSpace,
    /// A passing lack of resources; the request may be repeated.
    #[error("temporary failure: {0}")]
    Retry(io::Error),
    /// This object cannot be read or written; its disk is otherwise believed sound.
    #[error("object file failed: {0}")]
    Io(io::Error),
    /// The disk failed and was removed from the node.
    #[error("disk {} failed", path.display())]
    DiskFailed {
        /// The disk; empty if there was none.
        path: PathBuf,
        /// Whether no disk is left.
        last: bool,
    },
    /// The range ends past the object's size.
    #[error("range {offset}+{len} is past the object's {size} bytes")]
    InvalidRange {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Bytes of the object's file.
        size: u64,
    },
    /// The store was dropped before the operation was done.
    #[error("the store is closed")]
    Closed,
    /// A disk cannot be used, or none can.
    #[error("{0}")]
    Open(String),
}

impl StoreError {
    /// The wire result of this error.
    pub fn result(&self) -> ResultCode {
        match self {
            StoreError::NoObject => ResultCode::NO_OBJ,
            StoreError::NoSpace => ResultCode::NO_SPACE,
            StoreError::Retry(_) | StoreError::DiskFailed { last: false, .. } => ResultCode::NETWORK_ERROR,
            StoreError::Io(_) | StoreError::DiskFailed { last: true, .. } | StoreError::Open(_) => {
                ResultCode::EIO
            }
            StoreError::InvalidRange { .. } => ResultCode::INVALID_PARMS,
            StoreError::Closed => ResultCode::SHUTDOWN,
        }
    }
}

/// Another value of the same I/O error.
pub(crate) fn duplicate_io(e: &io::Error) -> io::Error {
    match e.raw_os_error() {
        Some(errno) => io::Error::from_raw_os_error(errno),
        None => io::Error::new(e.kind(), e.to_string()),
    }
}

/// The C library's text of an error, without Rust's "(os error N)".
pub(crate) fn strerror(e: &io::Error) -> String {
    match e.raw_os_error() {
        Some(errno) => nix::errno::Errno::from_raw(errno).desc().to_owned(),
        None => e.to_string(),
    }
}

/// What an errno says about where the fault is, before looking at the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The file is absent, if its directory is not.
    Absent,
    /// Disk or quota full.
    Full,
    /// A passing lack of resources.
    Passing,
    /// The whole disk.
    Disk,
    /// A medium error: of the object, or of the disk if repeated.
    Medium,
    /// Only this object.
    Object,
}

pub(crate) fn fault_of(e: &io::Error) -> Fault {
    match e.raw_os_error() {
        Some(libc::ENOENT) => Fault::Absent,
        Some(libc::ENOSPC | libc::EDQUOT) => Fault::Full,
        Some(libc::EMFILE | libc::ENFILE | libc::EINTR | libc::EAGAIN | libc::EEXIST | libc::ENOMEM) => {
            Fault::Passing
        }
        Some(libc::EROFS | libc::ENXIO | libc::ENODEV | libc::ESTALE | libc::ESHUTDOWN | libc::ENOTCONN) => {
            Fault::Disk
        }
        Some(libc::EIO) => Fault::Medium,
        _ => Fault::Object,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_errors_of_the_whole_disk_count_against_it() {
        let of = |errno| fault_of(&io::Error::from_raw_os_error(errno));
        for errno in [libc::EROFS, libc::ENXIO, libc::ENODEV, libc::ESTALE] {
            assert_eq!(of(errno), Fault::Disk);
        }
        for errno in [libc::EACCES, libc::EPERM, libc::EFBIG, libc::EINVAL, libc::EISDIR, libc::EUCLEAN] {
            assert_eq!(of(errno), Fault::Object);
        }
        for errno in [libc::EMFILE, libc::ENFILE, libc::EINTR, libc::EAGAIN, libc::EEXIST, libc::ENOMEM] {
            assert_eq!(of(errno), Fault::Passing);
        }
        assert_eq!([of(libc::ENOSPC), of(libc::EDQUOT)], [Fault::Full; 2]);
        assert_eq!([of(libc::ENOENT), of(libc::EIO)], [Fault::Absent, Fault::Medium]);
    }

    #[test]
    fn results_are_the_ones_of_the_wire() {
        let failed = |last| StoreError::DiskFailed { path: PathBuf::new(), last }.result();
        assert_eq!([failed(false), failed(true)], [ResultCode::NETWORK_ERROR, ResultCode::EIO]);
        let passing = StoreError::Retry(io::Error::from_raw_os_error(libc::EMFILE));
        assert_eq!(passing.result(), ResultCode::NETWORK_ERROR);
        assert_eq!(StoreError::NoSpace.result(), ResultCode::NO_SPACE);
    }
}
