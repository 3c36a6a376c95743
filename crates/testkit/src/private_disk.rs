//! A file system for one test: how much of it is free depends on nobody else.
//!
//! `cluster reweight` raises an epoch for every node whose free and used bytes together have changed by a hundredth;
//! on a disk that is shared with the rest of the machine, chance decides about that.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::binaries::system;

/// Room of the file system; memory is taken only for what is written.
const OPTIONS: &str = "size=8g,mode=755";

/// Unmounted when dropped; nothing else of the machine sees it, since the test has a mount namespace
/// ([`crate::in_own_mounts`]).
pub struct PrivateDisk(Option<PathBuf>);

impl PrivateDisk {
    /// Puts one on a directory. Before Linux 6.6, tmpfs lacks the extended attributes that stores need: the directory
    /// stays as it is then.
    pub fn mount(at: &Path) -> PrivateDisk {
        let mounted = Command::new(system("mount", "mount"))
            .args(["-t", "tmpfs", "-o", OPTIONS, "tmpfs"])
            .arg(at)
            .status();
        assert!(mounted.unwrap().success(), "mount at {}", at.display());
        let disk = PrivateDisk(Some(at.to_path_buf()));
        if xattr::set(at, "user.probe", b"1").is_ok() {
            return disk;
        }
        println!("no extended attributes on tmpfs: the test shares the machine's disk");
        drop(disk);
        PrivateDisk(None)
    }
}

impl Drop for PrivateDisk {
    fn drop(&mut self) {
        if let Some(at) = &self.0 {
            // A daemon that is just dying may still have files open.
            let _ = Command::new(system("umount", "mount")).arg("-l").arg(at).status();
        }
    }
}
