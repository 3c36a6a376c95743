//! Where the files of a disk are: the two store drivers (spec 03, sections 1 and 14).

use std::path::{Path, PathBuf};

use sheepdog_proto::{ObjectKind, Oid};

use crate::name::{Replica, StaleName};

/// A store driver: it differs from the other one only in the directories of live objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Layout {
    /// All objects of a disk in one directory.
    #[default]
    Plain,
    /// Inodes, vmstate and attributes in `meta`, the others in 256 directories by the low byte of the vid.
    Tree,
}

/// Name of the directory of old epochs, in every disk.
pub(crate) const STALE_DIR: &str = ".stale";

impl Layout {
    /// The driver of that name.
    pub fn by_name(name: &str) -> Option<Layout> {
        match name {
            "plain" => Some(Layout::Plain),
            "tree" => Some(Layout::Tree),
            _ => None,
        }
    }

    /// The driver's name, as in `config`.
    pub fn name(self) -> &'static str {
        match self {
            Layout::Plain => "plain",
            Layout::Tree => "tree",
        }
    }

    /// Directory of an object, relative to its disk; empty for the disk itself.
    pub fn sub_dir(self, oid: Oid) -> String {
        match (self, oid.kind()) {
            (Layout::Plain, _) => String::new(),
            (Layout::Tree, ObjectKind::Inode | ObjectKind::VmState | ObjectKind::Attr) => "meta".into(),
            (Layout::Tree, _) => format!("{:02x}", oid.vid().get() & 0xff),
        }
    }

    /// Every directory below a disk that holds live objects; the disk itself is the empty name.
    pub(crate) fn sub_dirs(self) -> Vec<String> {
        match self {
            Layout::Plain => vec![String::new()],
            Layout::Tree => {
                std::iter::once("meta".into()).chain((0..=255).map(|b| format!("{b:02x}"))).collect()
            }
        }
    }

    /// Directory of an object in `disk`.
    pub fn dir(self, disk: &Path, oid: Oid) -> PathBuf {
        match self {
            Layout::Plain => disk.to_owned(),
            Layout::Tree => disk.join(self.sub_dir(oid)),
        }
    }

    /// Path of a live object in `disk`.
    pub fn path(self, disk: &Path, replica: Replica) -> PathBuf {
        self.dir(disk, replica.oid).join(replica.to_string())
    }

    /// Path of an old object in `disk`; flat in both drivers.
    pub fn stale_path(self, disk: &Path, name: StaleName) -> PathBuf {
        disk.join(STALE_DIR).join(name.to_string())
    }
}
