//! Free ports for parallel tests.
//!
//! Ports are handed out in blocks below the range that the kernel uses for outgoing connections. A block belongs to the
//! process that holds the lock on its file; the search starts at a place that depends on the process id, so two test
//! processes seldom meet. Every port of a block is bound once before it is given out.

use std::fs::{File, OpenOptions};
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt;

use nix::fcntl::{Flock, FlockArg};

const FIRST: u16 = 10_000;
const BLOCK: u16 = 16;
const BLOCKS: u16 = 1_300;

/// Consecutive ports, reserved until dropped.
#[derive(Debug)]
pub struct Ports {
    first: u16,
    _lock: Flock<File>,
}

impl Ports {
    /// Most ports in one block.
    pub const MAX: usize = BLOCK as usize;

    /// Reserves a block of [`Ports::MAX`] ports.
    pub fn reserve() -> Ports {
        let dir = std::env::temp_dir().join(format!("sheepdog-test-ports-{}", nix::unistd::getuid()));
        std::fs::create_dir_all(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        let start = (std::process::id() % u32::from(BLOCKS)) as u16;
        for step in 0..BLOCKS {
            let block = (start + step) % BLOCKS;
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(0o600)
                .open(dir.join(block.to_string()))
                .unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
            let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { continue };
            let first = FIRST + block * BLOCK;
            if (first..first + BLOCK).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok()) {
                return Ports { first, _lock: lock };
            }
        }
        panic!("no block of {BLOCK} free ports from {FIRST} on");
    }

    /// The block's port `index`.
    pub fn get(&self, index: usize) -> u16 {
        assert!(index < Self::MAX, "a block has {BLOCK} ports");
        self.first + index as u16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_do_not_overlap() {
        let (a, b) = (Ports::reserve(), Ports::reserve());
        let distance = a.get(0).abs_diff(b.get(0));
        assert!(distance >= BLOCK, "{} and {}", a.get(0), b.get(0));
    }
}
