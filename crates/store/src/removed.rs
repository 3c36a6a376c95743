//! A side file of the metadata directory about disks whose presence at the next start is not certain (spec 03, 15).
//!
//! A *removed* disk was taken out while others served on: if it is listed again, what it holds is old and must not be
//! served as current. A *held* disk has current objects although the command line may not list it next time: it was
//! plugged into the running node, or it is being drained. One line per disk: the path, or `held ` and the path.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::disk::sync_dir;

const HELD: &[u8] = b"held ";

/// What is remembered of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Memory {
    /// What it holds is old.
    Removed,
    /// What it holds is current, and nowhere else on this node.
    Held,
}

/// Reads the file; absent means empty.
pub(crate) fn read(record: &Path) -> io::Result<Vec<(PathBuf, Memory)>> {
    let bytes = match fs::read(record) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let lines = bytes.split(|b| *b == b'\n').filter(|line| !line.is_empty());
    let entries = lines.map(|line| match line.strip_prefix(HELD) {
        Some(path) => (PathBuf::from(OsStr::from_bytes(path)), Memory::Held),
        None => (PathBuf::from(OsStr::from_bytes(line)), Memory::Removed),
    });
    Ok(entries.collect())
}

/// Replaces the file.
pub(crate) fn write(record: &Path, entries: &[(PathBuf, Memory)]) -> io::Result<()> {
    let mut bytes = Vec::new();
    for (path, memory) in entries {
        if *memory == Memory::Held {
            bytes.extend(HELD);
        }
        bytes.extend(path.as_os_str().as_bytes());
        bytes.push(b'\n');
    }
    let temporary = record.with_extension("tmp");
    let mut file = fs::File::create(&temporary)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, record)?;
    record.parent().map_or(Ok(()), sync_dir)
}

/// Notes something about a disk, or with `None` forgets it.
pub(crate) fn note(record: &Path, disk: &Path, memory: Option<Memory>) -> io::Result<()> {
    let mut entries = read(record)?;
    let before = entries.clone();
    entries.retain(|(path, _)| path.as_os_str() != disk.as_os_str());
    entries.extend(memory.map(|m| (disk.to_owned(), m)));
    if entries == before { Ok(()) } else { write(record, &entries) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_of_a_disk_replaces_what_was_noted_before() {
        let dir = tempfile::tempdir().expect("tempdir");
        let record = dir.path().join("removed_disks");
        let (a, b) = (Path::new("/a b"), Path::new("/held /b"));
        note(&record, a, None).expect("nothing to forget");
        assert!(!record.exists());
        note(&record, a, Some(Memory::Held)).expect("note");
        note(&record, b, Some(Memory::Removed)).expect("note");
        note(&record, a, Some(Memory::Removed)).expect("note");
        let both = [(b.to_owned(), Memory::Removed), (a.to_owned(), Memory::Removed)];
        assert_eq!(read(&record).expect("read"), both);
        assert_eq!(fs::read(&record).expect("file"), b"/held /b\n/a b\n", "as earlier versions wrote it");
        note(&record, b, None).expect("forget");
        assert_eq!(read(&record).expect("read"), both[1..]);
    }
}
