//! Files and limits of the running process: pid file (spec 04, 17.4) and open files (spec 04, 19).

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};

/// A locked pid file. It stays behind if dropped, as after a crash; [`PidFile::remove`] is for an orderly end.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    // Closing any descriptor of the file in this process would release the lock.
    _file: File,
}

impl PidFile {
    /// Creates the file 0600, locks it against other processes and writes our pid. Fails if another process holds it.
    pub fn create(path: &Path) -> io::Result<PidFile> {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_SYNC)
            .open(path)?;
        let whole = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        fcntl(&file, FcntlArg::F_SETLK(&whole))?;
        // Only now is it ours to empty.
        file.set_len(0)?;
        writeln!(file, "{}", std::process::id())?;
        Ok(PidFile { path: path.to_owned(), _file: file })
    }

    /// Unlinks the file.
    pub fn remove(self) -> io::Result<()> {
        std::fs::remove_file(&self.path)
    }
}

/// Open files wanted: a thousand for each of 6144 nodes.
const WANTED_FILES: rlim_t = 6144 * 1000;

/// Raises the limit of open files as far as allowed and logs what is missing. Returns the limit in force.
pub fn raise_open_file_limit() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft >= WANTED_FILES {
        return Ok(soft);
    }
    let Err(e) = setrlimit(Resource::RLIMIT_NOFILE, WANTED_FILES, WANTED_FILES.max(hard)) else {
        return Ok(WANTED_FILES);
    };
    tracing::error!("failed to set nofile to suggested {WANTED_FILES}, {}", e.desc());
    tracing::error!("please increase nofile via sysctl fs.nr_open");
    let best = hard.min(WANTED_FILES);
    setrlimit(Resource::RLIMIT_NOFILE, best, hard)?;
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_pid_file_holds_exactly_our_pid() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("sheep.pid");
        std::fs::write(&path, "12345678901234567890\nrubbish").expect("write");
        let pid = PidFile::create(&path).expect("create");
        // Opening and closing the file here would release the lock; look at it under another name.
        let text = std::process::Command::new("cat").arg(&path).output().expect("cat");
        assert_eq!(String::from_utf8_lossy(&text.stdout), format!("{}\n", std::process::id()));
        pid.remove().expect("remove");
        assert!(!path.exists());
        let pid = PidFile::create(&path).expect("create");
        assert_eq!(std::fs::metadata(&path).expect("stat").permissions().mode() & 0o7777, 0o600);
        drop(pid);
        assert!(path.exists(), "a crash leaves it");
    }

    #[test]
    fn the_open_file_limit_never_falls() {
        let (before, _) = getrlimit(Resource::RLIMIT_NOFILE).expect("limit");
        let now = raise_open_file_limit().expect("raise");
        assert!(now >= before.min(WANTED_FILES));
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).expect("limit").0, now);
    }
}
