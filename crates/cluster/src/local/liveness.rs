//! Is a listed process still the sheep that listed itself? (spec 04, 11.4 and 11.6)
//!
//! The file names processes by pid alone. A pid counts only if it exists, is no zombie and, where `/proc` shows it, has
//! the queue file open. The last check walks all descriptors, so its result is remembered with a descriptor of the
//! process: every process looks at every other one every 50 ms, which would be most of the work of 128 idle daemons if
//! it took more than one cheap call. Where the kernel has no such descriptors, the start time tells a recycled pid.

use std::collections::HashMap;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;

use super::pidfd::PidFd;

/// Judges pids against one queue file.
#[derive(Debug)]
pub struct Liveness {
    file_id: (u64, u64),
    me: i32,
    /// Start time, in clock ticks after boot, and descriptor of the processes seen with the file open.
    seen: HashMap<i32, (u64, Option<PidFd>)>,
}

impl Liveness {
    /// For the file with this device and inode number.
    pub fn new(file_id: (u64, u64)) -> Liveness {
        Liveness { file_id, me: std::process::id() as i32, seen: HashMap::new() }
    }

    /// Whether the pid is a live user of the file.
    pub fn alive(&mut self, pid: i32) -> bool {
        if pid == self.me {
            return true;
        }
        if let Some((_, Some(process))) = self.seen.get(&pid)
            && !process.has_ended()
        {
            return true;
        }
        let alive = pid > 0 && self.examine(pid);
        if !alive {
            self.seen.remove(&pid);
        }
        alive
    }

    fn examine(&mut self, pid: i32) -> bool {
        if kill(Pid::from_raw(pid), None) == Err(Errno::ESRCH) {
            return false;
        }
        let started = match fs::read(format!("/proc/{pid}/stat")) {
            Ok(stat) => match parse_stat(&stat) {
                Some((b'Z' | b'X' | b'x', _)) => return false,
                Some((_, started)) => started,
                None => return true,
            },
            Err(e) if e.kind() == ErrorKind::NotFound => {
                return !fs::exists("/proc/self/stat").unwrap_or(false);
            }
            Err(_) => return true,
        };
        if self.seen.get(&pid).is_some_and(|(known, _)| *known == started) {
            return true;
        }
        // Opened first: should the pid change hands meanwhile, the descriptor is that of the dead one.
        let process = PidFd::open(pid);
        match self.has_file_open(pid) {
            Some(true) => {
                self.seen.insert(pid, (started, process));
                true
            }
            Some(false) => false,
            None => true,
        }
    }

    /// `None` where `/proc` does not tell.
    fn has_file_open(&self, pid: i32) -> Option<bool> {
        let dir = match fs::read_dir(format!("/proc/{pid}/fd")) {
            Ok(dir) => dir,
            Err(e) if e.kind() == ErrorKind::NotFound => return Some(false),
            Err(_) => return None,
        };
        for entry in dir.flatten() {
            // Sockets and pipes have no path; looking closer only at files keeps this cheap.
            let is_path = fs::read_link(entry.path()).is_ok_and(|target| target.is_absolute());
            if is_path && fs::metadata(entry.path()).is_ok_and(|m| (m.dev(), m.ino()) == self.file_id) {
                return Some(true);
            }
        }
        Some(false)
    }
}

/// State and start time of `/proc/PID/stat`: words 3 and 22, counted behind the name, which may hold anything.
fn parse_stat(stat: &[u8]) -> Option<(u8, u64)> {
    let behind = stat.iter().rposition(|b| *b == b')')? + 1;
    let mut words = std::str::from_utf8(&stat[behind..]).ok()?.split_ascii_whitespace();
    let state = *words.next()?.as_bytes().first()?;
    Some((state, words.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn sleeper(stdin: Stdio) -> std::process::Child {
        Command::new("sleep").arg("600").stdin(stdin).spawn().expect("sleep starts")
    }

    #[test]
    fn only_a_running_process_with_the_file_open_is_alive() {
        let file = tempfile::NamedTempFile::new().expect("temporary file");
        let meta = file.as_file().metadata().expect("stat");
        let mut liveness = Liveness::new((meta.dev(), meta.ino()));
        let mut user = sleeper(file.reopen().expect("reopen").into());
        let mut stranger = sleeper(Stdio::null());
        assert!(liveness.alive(std::process::id() as i32));
        assert!(liveness.alive(user.id() as i32));
        assert!(liveness.alive(user.id() as i32), "remembered");
        assert!(!liveness.alive(stranger.id() as i32), "recycled pid");
        assert!(!liveness.alive(0) && !liveness.alive(-1) && !liveness.alive(i32::MAX));

        user.kill().expect("kill");
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while liveness.alive(user.id() as i32) {
            assert!(std::time::Instant::now() < deadline, "a zombie must count as dead");
            std::thread::yield_now();
        }
        user.wait().expect("wait");
        stranger.kill().expect("kill");
        stranger.wait().expect("wait");
    }

    #[test]
    fn a_process_name_cannot_fake_its_state() {
        let stat = b"12 (a) Z 1) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 0";
        assert_eq!(parse_stat(stat), Some((b'S', 4242)));
        assert_eq!(parse_stat(b"12 (a"), None);
        assert_eq!(parse_stat(b"12 (a) S 1 2"), None);
    }
}
