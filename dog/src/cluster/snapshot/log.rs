//! `user_snap`: the log of the snapshots in a directory (spec 07, 15.4).

use std::fs;
use std::io::{self, Write};

use sheepdog_proto::Wire;

use super::content::{Content, SnapshotError};

const MAGIC: u32 = 0xfee1_c001;
const VERSION: u32 = 1;

sheepdog_proto::wire! {
    /// Start of the log.
    LogHeader [32] {
        /// [`MAGIC`].
        0 => magic: u32,
        /// [`VERSION`]; not looked at.
        4 => version: u32,
        /// The cluster's default copies.
        8 => copies: u8,
        /// Its policy byte.
        9 => copy_policy: u8,
        /// Its block size.
        10 => block_size_shift: u8,
    }
}

sheepdog_proto::wire! {
    /// One snapshot.
    Record [296] {
        /// From 1 on.
        0 => index: u32,
        /// Tag, NUL-padded.
        4 => tag: [u8; 256],
        /// Seconds since 1970.
        264 => time: u64,
        /// The list of its objects.
        272 => trunk: [u8; 20],
    }
}

impl LogHeader {
    /// The header for a cluster with these defaults.
    pub fn of_cluster(copies: u8, copy_policy: u8, block_size_shift: u8) -> LogHeader {
        LogHeader { magic: MAGIC, version: VERSION, copies, copy_policy, block_size_shift }
    }
}

/// A log as read.
pub struct Log {
    /// `None` = nothing was saved yet.
    pub header: Option<LogHeader>,
    /// Oldest first.
    pub records: Vec<Record>,
}

impl Log {
    /// Reads the log of a directory.
    pub fn read(content: &Content) -> Result<Log, SnapshotError> {
        let path = content.log_path();
        let bytes = fs::read(&path).map_err(|e| SnapshotError::file(&path, e))?;
        if bytes.is_empty() {
            return Ok(Log { header: None, records: Vec::new() });
        }
        let header = LogHeader::decode(&bytes).map_err(|_| {
            let why = io::ErrorKind::UnexpectedEof.into();
            SnapshotError::File { what: "failed to read log header".into(), why }
        })?;
        if header.magic != MAGIC {
            return Err(SnapshotError::Magic);
        }
        let records = bytes[LogHeader::LEN..].chunks_exact(Record::LEN).map(Record::get).collect();
        Ok(Log { header: Some(header), records })
    }

    /// Appends a snapshot, and the header before the first one.
    pub fn append(&self, content: &Content, header: LogHeader, record: &Record) -> Result<(), SnapshotError> {
        let path = content.log_path();
        let mut bytes = if self.header.is_none() { header.encode() } else { Vec::new() };
        bytes.extend(record.to_bytes());
        let file = fs::OpenOptions::new().append(true).open(&path);
        file.and_then(|mut file| file.write_all(&bytes)).map_err(|e| SnapshotError::file(&path, e))
    }
}
