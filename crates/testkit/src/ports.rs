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
    count: usize,
    _locks: Vec<Flock<File>>,
}

impl Ports {
    /// Ports in one block.
    pub const MAX: usize = BLOCK as usize;

    /// Reserves a block of [`Ports::MAX`] ports.
    pub fn reserve() -> Ports {
        Ports::reserve_many(Ports::MAX)
    }

    /// Reserves at least `count` ports.
    pub fn reserve_many(count: usize) -> Ports {
        let blocks = count.div_ceil(Ports::MAX) as u16;
        let dir = std::env::temp_dir().join(format!("sheepdog-test-ports-{}", nix::unistd::getuid()));
        std::fs::create_dir_all(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        let start = (std::process::id() % u32::from(BLOCKS)) as u16;
        for step in 0..BLOCKS {
            let block = (start + step) % (BLOCKS - blocks + 1);
            let lock = |block: u16| {
                let file = OpenOptions::new()
                    .create(true)
                    .truncate(false)
                    .write(true)
                    .mode(0o600)
                    .open(dir.join(block.to_string()))
                    .unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
                Flock::lock(file, FlockArg::LockExclusiveNonblock).ok()
            };
            let Some(locks) = (block..block + blocks).map(lock).collect::<Option<Vec<_>>>() else { continue };
            let (first, ports) = (FIRST + block * BLOCK, blocks * BLOCK);
            if (first..first + ports).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok()) {
                return Ports { first, count: ports.into(), _locks: locks };
            }
        }
        panic!("no block of {BLOCK} free ports from {FIRST} on");
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The port `index`.
    pub fn get(&self, index: usize) -> u16 {
        assert!(index < self.count, "{} ports were reserved", self.count);
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
        let many = Ports::reserve_many(100);
        assert_eq!(many.count(), 112);
        assert_eq!(many.get(111) - many.get(0), 111);
        let outside = |p: u16| p < many.get(0) || p > many.get(111);
        assert!(outside(a.get(0)) && outside(b.get(0)));
    }
}
