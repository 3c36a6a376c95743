//! Taking over stores of older releases (spec 03, section 21).
//!
//! Version 5 (all of 0.9) differs from version 6 in three fields of `config`; everything else is read as it is. It is
//! changed in place, after backups of `config` and of every epoch log. Other versions are refused, naming the release
//! that wrote them; nothing is touched then.

use std::fs;
use std::path::Path;

use sheepdog_proto::config::{STORE_VERSION, StoreConfig};
use sheepdog_proto::{ClusterFlags, DEFAULT_BLOCK_SHIFT, Wire};

use crate::meta::{MetaDir, MetaError};

/// The version that can be taken over.
const VERSION_0_9: u16 = 5;

fn refused(text: String) -> MetaError {
    MetaError::Upgrade(text)
}

/// The release that wrote a store version.
fn release_of(version: u16) -> &'static str {
    match version {
        0 => "0.4.0 or 0.5.0",
        1 => "0.5.1 to 0.5.5",
        2 => "0.5.6, 0.6 or 0.7",
        3 => "0.8.0",
        4 => "0.8.1 to 0.8.3",
        VERSION_0_9 => "0.9",
        _ => "a newer release",
    }
}

fn has_files(dir: &Path) -> bool {
    let Ok(entries) = fs::read_dir(dir) else { return false };
    entries.flatten().any(|e| if e.path().is_dir() { has_files(&e.path()) } else { true })
}

impl MetaDir {
    /// Makes a version 5 store one of version 6. `stamp` is appended to the names of the backups; `auto_vnodes`: weights
    /// will follow from space (no `-V`). `false` = nothing to do, the store is current.
    ///
    /// # Errors
    /// [`MetaError::Upgrade`] for versions that cannot be taken over, and for a store that was not shut down cleanly or
    /// has unwritten data in its object cache.
    pub fn upgrade(&self, stamp: &str, auto_vnodes: bool) -> Result<bool, MetaError> {
        let path = self.path().join("config");
        let bytes = match fs::read(&path) {
            Ok(bytes) if bytes.is_empty() => return Ok(false),
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(source) => return Err(MetaError::Io { path, source }),
        };
        let mut whole = bytes;
        whole.resize(StoreConfig::LEN, 0);
        let mut config = StoreConfig::get(&whole);
        match config.version {
            STORE_VERSION => return Ok(false),
            VERSION_0_9 => {}
            v => {
                let how = if v < VERSION_0_9 { "; convert its files with 'dog upgrade'" } else { "" };
                return Err(refused(format!(
                    "the store has layout version {v}, written by {}, which cannot be upgraded in place{how}",
                    release_of(v)
                )));
            }
        }
        if config.ctime != 0 && config.shutdown != 1 {
            return Err(refused(
                "the store of release 0.9 was not shut down cleanly: start it with 0.9 and run 'dog cluster shutdown'".into(),
            ));
        }
        if has_files(&self.path().join("cache")) {
            return Err(refused(
                "the object cache of release 0.9 is not empty: flush it with 0.9 first".into(),
            ));
        }
        self.back_up(stamp)?;
        config.version = STORE_VERSION;
        config.block_size_shift = DEFAULT_BLOCK_SHIFT;
        if auto_vnodes {
            config.flags = config.flags.with(ClusterFlags::AUTO_VNODES);
        }
        self.write_config(&config)?;
        Ok(true)
    }

    fn back_up(&self, stamp: &str) -> Result<(), MetaError> {
        let epochs = self.path().join("epoch");
        let copy = |from: &Path| {
            let mut to = from.to_path_buf().into_os_string();
            to.push(format!(".{stamp}"));
            fs::copy(from, &to).map_err(|source| MetaError::Io { path: to.into(), source })
        };
        copy(&self.path().join("config"))?;
        let list = fs::read_dir(&epochs).map_err(|source| MetaError::Io { path: epochs.clone(), source })?;
        for entry in list.flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.len() == 8 && name.bytes().all(|b| b.is_ascii_digit()) {
                copy(&entry.path())?;
            }
        }
        crate::disk::sync_dir(self.path())
            .map_err(|source| MetaError::Io { path: self.path().into(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sheepdog_proto::Epoch;

    fn store(version: u16, shutdown: u8) -> (tempfile::TempDir, MetaDir) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let meta = MetaDir::open(dir.path()).expect("opens");
        let config = StoreConfig { ctime: 7, shutdown, version, space: 9, ..StoreConfig::zeroed() };
        meta.write_config(&config).expect("written");
        let log = sheepdog_proto::config::EpochLog { nodes: vec![], time: 1 };
        meta.write_epoch(Epoch(1), &log).expect("written");
        (dir, meta)
    }

    #[test]
    fn a_store_of_0_9_is_taken_over_with_backups() {
        let (dir, meta) = store(5, 1);
        assert!(meta.read_config().is_err());
        assert!(meta.upgrade("2026-01-02_030405", true).expect("upgraded"));
        let config = meta.read_config().expect("current");
        assert_eq!((config.version, config.block_size_shift, config.ctime, config.space), (6, 22, 7, 9));
        assert!(config.flags.contains(ClusterFlags::AUTO_VNODES));
        assert!(dir.path().join("config.2026-01-02_030405").exists());
        assert!(dir.path().join("epoch/00000001.2026-01-02_030405").exists());
        assert_eq!(meta.latest_epoch().expect("readable"), Epoch(1), "a backup is no epoch");
        assert!(!meta.upgrade("x", true).expect("current already"));
    }

    #[test]
    fn what_cannot_be_taken_over_is_refused_untouched() {
        for (version, shutdown) in [(5, 0), (4, 1), (0, 1), (7, 1)] {
            let (dir, meta) = store(version, shutdown);
            let before = fs::read(dir.path().join("config")).expect("readable");
            assert!(matches!(meta.upgrade("x", true), Err(MetaError::Upgrade(_))), "version {version}");
            assert_eq!(fs::read(dir.path().join("config")).expect("readable"), before);
            assert!(!dir.path().join("config.x").exists());
        }
        let (dir, meta) = store(5, 1);
        fs::create_dir_all(dir.path().join("cache/020609")).expect("made");
        fs::write(dir.path().join("cache/020609/0000000000000000"), b"dirty").expect("written");
        assert!(matches!(meta.upgrade("x", true), Err(MetaError::Upgrade(_))));
    }
}
