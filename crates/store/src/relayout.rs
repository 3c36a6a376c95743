//! Between the two layouts: objects that lie where the other one, or nobody, would put them (spec 03, section 14).

use std::fs;
use std::io;
use std::path::PathBuf;

use sheepdog_proto::Oid;

use crate::Result;
use crate::disk::Disk;
use crate::layout::Layout;
use crate::name::{Replica, is_temporary};
use crate::store::Store;

impl Store {
    /// Gives the disks another layout and moves the objects, for a node that learns of its cluster's when it joins.
    /// Nothing else may be going on.
    pub async fn set_layout(&self, layout: Layout) -> Result<()> {
        self.drain().await;
        *self.inner.layout.lock() = layout;
        self.exec_all(move |inner, disk| {
            let here = inner.index.all_working().into_iter().filter(|(_, id)| *id == disk.id);
            let replicas: Vec<Replica> = here.map(|(replica, _)| replica).collect();
            rearrange(disk, layout, &replicas).map_err(|e| inner.fault(disk, Oid(0), &e))
        })
        .await
        .map(drop)
    }
}

fn rearrange(disk: &Disk, layout: Layout, replicas: &[Replica]) -> io::Result<()> {
    let old: Vec<PathBuf> = replicas.iter().map(|r| disk.file(*r)).collect();
    let old_dirs: Vec<PathBuf> = replicas.iter().map(|r| disk.dir(*r)).collect();
    disk.set_layout(layout)?;
    for ((replica, from), dir) in replicas.iter().zip(old).zip(old_dirs) {
        fs::rename(&from, disk.file(*replica))?;
        disk.mark_dirty(dir);
        disk.mark_dirty(disk.dir(*replica));
    }
    disk.sync_dirty()
}

/// What lay flat in a disk of the tree layout.
#[derive(Default)]
pub(crate) struct Flat {
    /// Objects put into their directories.
    pub(crate) moved: usize,
    /// Temporary files removed.
    pub(crate) temporaries: usize,
    /// No objects, or objects whose place is taken.
    pub(crate) foreign: Vec<PathBuf>,
}

/// Moves the objects that lie flat in a disk of the tree layout into their directories.
pub(crate) fn adopt_flat(disk: &Disk) -> io::Result<Flat> {
    let (mut flat, known) = (Flat::default(), disk.layout().sub_dirs());
    for entry in fs::read_dir(&disk.path)? {
        let entry = entry?;
        let (name, is_file) = (entry.file_name(), entry.file_type()?.is_file());
        let name = name.to_str().unwrap_or_default();
        match Replica::parse(name) {
            _ if is_file && is_temporary(name) => {
                fs::remove_file(entry.path())?;
                flat.temporaries += 1;
            }
            Some(replica) if is_file && !disk.file(replica).exists() => {
                fs::rename(entry.path(), disk.file(replica))?;
                disk.mark_dirty(disk.dir(replica));
                flat.moved += 1;
            }
            _ if name.starts_with('.') || known.iter().any(|dir| dir == name) => {}
            _ => flat.foreign.push(entry.path()),
        }
    }
    if flat.moved > 0 {
        disk.mark_dirty(disk.path.clone());
        disk.sync_dirty()?;
    }
    Ok(flat)
}
