//! Reading the names of all files at start, one thread per disk (spec 03, section 2, step 12).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sheepdog_proto::inode::INODE_HEADER_LEN;
use sheepdog_proto::{Epoch, Oid, inode::InodeHeader};

use crate::disk::Disk;
use crate::layout::Layout;
use crate::name::{Replica, StaleName, is_temporary};
use crate::read::read_zero_filled;
use crate::relayout::adopt_flat;
use crate::store::Store;

/// What the scan found.
#[derive(Debug, Default)]
pub struct ScanReport {
    /// Every inode object with its header, ascending: the working file, else the newest stale one.
    pub inodes: Vec<(Oid, InodeHeader)>,
    /// Number of working files.
    pub working: usize,
    /// Number of stale files.
    pub stale: usize,
    /// Objects of a tree store that lay flat in their disk and were moved into their directories.
    pub adopted: usize,
    /// Temporary files removed.
    pub temporaries: usize,
    /// Working files that lie on another disk than their own; see [`Store::settle`].
    pub misplaced: Vec<Replica>,
    /// Entries that are no object: foreign names, and directories or links with an object's name. Left untouched.
    pub foreign: Vec<PathBuf>,
    /// What could not be read, and why. Objects among these are in the list all the same.
    pub unreadable: Vec<(PathBuf, String)>,
}

/// The findings of one disk.
#[derive(Default)]
struct Found {
    /// With their allocated bytes.
    working: Vec<(Replica, u64)>,
    stale: Vec<StaleName>,
    inodes: Vec<(Oid, Option<Epoch>, InodeHeader)>,
    report: ScanReport,
}

impl Store {
    /// Reads all disks and fills the index, anew. Blocks for as long as the disks take; call it before any other
    /// operation, outside the event loop.
    pub fn scan(&self) -> ScanReport {
        let set = self.inner.disks();
        let found: Vec<Found> = std::thread::scope(|scope| {
            let threads: Vec<_> = set.all().map(|disk| scope.spawn(|| scan_disk(disk))).collect();
            threads.into_iter().map(|t| t.join().unwrap_or_default()).collect()
        });
        self.inner.index.clear();
        let mut report = ScanReport::default();
        let mut inodes: BTreeMap<Oid, (Option<Epoch>, InodeHeader)> = BTreeMap::new();
        for (disk, found) in set.all().zip(found) {
            for (replica, bytes) in &found.working {
                let home = set.home(replica.oid).is_some_and(|h| h.id == disk.id);
                self.inner.index.add(*replica, disk.id, home, *bytes);
                if !home {
                    report.misplaced.push(*replica);
                }
            }
            for name in &found.stale {
                self.inner.index.add_stale(*name, disk.id);
            }
            for (oid, epoch, header) in found.inodes {
                // `None`, a working file, beats every epoch.
                let better = inodes
                    .get(&oid)
                    .is_none_or(|(old, _)| old.is_some() && (epoch.is_none() || epoch > *old));
                if better {
                    inodes.insert(oid, (epoch, header));
                }
            }
            report.working += found.working.len();
            report.stale += found.stale.len();
            report.adopted += found.report.adopted;
            report.temporaries += found.report.temporaries;
            report.foreign.extend(found.report.foreign);
            report.unreadable.extend(found.report.unreadable);
        }
        report.inodes = inodes.into_iter().map(|(oid, (_, header))| (oid, header)).collect();
        report
    }
}

fn scan_disk(disk: &Disk) -> Found {
    let mut found = Found::default();
    let unreadable = |found: &mut Found, path: &Path, e: io::Error| {
        found.report.unreadable.push((path.to_owned(), e.to_string()));
    };
    let stale = disk.stale_dir();
    if let Err(e) = scan_stale(&stale, &mut found) {
        unreadable(&mut found, &stale, e);
    }
    let dirs = disk.layout().sub_dirs();
    if disk.layout() == Layout::Tree {
        match adopt_flat(disk) {
            Ok(flat) => {
                found.report.adopted = flat.moved;
                found.report.temporaries = flat.temporaries;
                found.report.foreign.extend(flat.foreign);
            }
            Err(e) => unreadable(&mut found, &disk.path, e),
        }
    }
    for dir in &dirs {
        let path = disk.path.join(dir);
        if let Err(e) = scan_working(&path, &dirs, &mut found) {
            unreadable(&mut found, &path, e);
        }
    }
    found
}

fn scan_stale(dir: &Path, found: &mut Found) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        match name.to_str().and_then(StaleName::parse) {
            Some(name) if entry.file_type()?.is_file() => {
                found.stale.push(name);
                read_inode(&entry.path(), name.replica, Some(name.epoch), found);
            }
            _ => found.report.foreign.push(entry.path()),
        }
    }
    Ok(())
}

fn scan_working(dir: &Path, known_dirs: &[String], found: &mut Found) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_str().unwrap_or_default();
        let is_file = entry.file_type()?.is_file();
        if is_file && is_temporary(name) {
            match fs::remove_file(entry.path()) {
                Ok(()) => found.report.temporaries += 1,
                Err(e) => found.report.unreadable.push((entry.path(), e.to_string())),
            }
            continue;
        }
        match Replica::parse(name) {
            Some(replica) if is_file => {
                found.working.push((replica, entry.metadata().map_or(0, |m| m.blocks() * 512)));
                read_inode(&entry.path(), replica, None, found);
            }
            // Names with a dot, and the directories of the layout, are the store's own.
            _ if name.starts_with('.') || known_dirs.iter().any(|d| d == name) => {}
            _ => found.report.foreign.push(entry.path()),
        }
    }
    Ok(())
}

fn read_inode(path: &Path, replica: Replica, epoch: Option<Epoch>, found: &mut Found) {
    if !replica.oid.is_inode() || replica.strip.is_some() {
        return;
    }
    let mut header = [0; INODE_HEADER_LEN];
    match File::open(path).and_then(|file| read_zero_filled(&file, &mut header, 0)) {
        Ok(()) => found.inodes.push((replica.oid, epoch, InodeHeader::from_bytes(&header))),
        Err(e) => found.report.unreadable.push((path.to_owned(), e.to_string())),
    }
}
