//! Measures the store against plain `O_DSYNC` writes to the same disk, as ratios.
//!
//! `cargo run --release -p sheepdog-store --example measure -- DIR [ROUNDS]`. Objects are written once before; the
//! configurations of a round alternate; the median of the rounds is printed.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use rand::Rng;
use sheepdog_buffer::PageBuf;
use sheepdog_proto::{Oid, VdiId};
use sheepdog_store::{Replica, Store, StoreOptions, SyncMode};

const OBJECTS: u32 = 32;
const SIZE: u64 = 4 << 20;
const SPAN: Duration = Duration::from_millis(1500);

fn object(i: u32) -> Replica {
    Replica::whole(Oid::data(VdiId::new(0xbe), i))
}

fn payload(len: usize) -> Bytes {
    let mut buf = PageBuf::zeroed(len);
    buf.fill(0x5a);
    buf.freeze()
}

/// A random place for `len` bytes.
fn place(len: u64) -> (Replica, u64) {
    let mut rng = rand::rng();
    (object(rng.random_range(0..OBJECTS)), rng.random_range(0..SIZE / len) * len)
}

/// CPU time of this process, in microseconds.
fn cpu() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("getrusage");
    [usage.user_time(), usage.system_time()].iter().map(|t| t.num_microseconds() as f64).sum()
}

/// Operations per second, and CPU microseconds per operation.
#[derive(Clone, Copy)]
struct Rate {
    ops: f64,
    cpu: f64,
}

impl Rate {
    fn new(done: &AtomicU64, start: Instant, cpu_before: f64) -> Rate {
        let done = done.load(Relaxed) as f64;
        Rate { ops: done / start.elapsed().as_secs_f64(), cpu: (cpu() - cpu_before) / done }
    }
}

/// Open, write synchronously, close, on `depth` threads.
fn plain(disk: &Path, len: usize, depth: usize) -> Rate {
    let done = AtomicU64::new(0);
    let used = cpu();
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..depth {
            scope.spawn(|| {
                let data = payload(len);
                while start.elapsed() < SPAN {
                    let (replica, offset) = place(len as u64);
                    let write = || -> io::Result<()> {
                        let path = disk.join(replica.to_string());
                        let file: File = OpenOptions::new()
                            .read(true)
                            .write(true)
                            .custom_flags(libc::O_DSYNC)
                            .open(path)?;
                        file.write_all_at(&data, offset)
                    };
                    write().expect("plain write");
                    done.fetch_add(1, Relaxed);
                }
            });
        }
    });
    Rate::new(&done, start, used)
}

async fn run<F, Fut>(depth: usize, work: F) -> Rate
where
    F: Fn() -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send,
{
    let work = Arc::new(work);
    let done = Arc::new(AtomicU64::new(0));
    let used = cpu();
    let start = Instant::now();
    let tasks: Vec<_> = (0..depth)
        .map(|_| {
            let (work, done) = (work.clone(), done.clone());
            tokio::spawn(async move {
                while start.elapsed() < SPAN {
                    work().await;
                    done.fetch_add(1, Relaxed);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("task");
    }
    Rate::new(&done, start, used)
}

async fn stored(store: &Store, len: usize, depth: usize) -> Rate {
    let (store, data) = (store.clone(), payload(len));
    run(depth, move || {
        let (store, data) = (store.clone(), data.clone());
        async move {
            let (replica, offset) = place(len as u64);
            store.write(replica, SIZE, offset, data).await.expect("write");
        }
    })
    .await
}

async fn reads(store: &Store, len: usize, depth: usize) -> Rate {
    let store = store.clone();
    run(depth, move || {
        let store = store.clone();
        async move {
            let (replica, offset) = place(len as u64);
            match store.try_read_cached(replica, offset, len) {
                Some(read) => drop(read.expect("read")),
                None => drop(store.read(replica, offset, len).await.expect("read")),
            }
            tokio::task::yield_now().await;
        }
    })
    .await
}

fn median(mut values: Vec<Rate>) -> Rate {
    values.sort_by(|a, b| a.ops.total_cmp(&b.ops));
    values[values.len() / 2]
}

fn open(disk: &Path, sync: SyncMode) -> Store {
    let options = StoreOptions { sync, ..StoreOptions::default() };
    let (store, log) = Store::open(&[disk.to_owned()], options).expect("open");
    println!("{}", log.join("\n"));
    store.scan();
    store
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let mut args = std::env::args().skip(1);
    let disk = PathBuf::from(args.next().expect("usage: measure DIR [ROUNDS]"));
    let rounds: usize = args.next().map_or(3, |n| n.parse().expect("a number of rounds"));
    let store = open(&disk, SyncMode::Durable);
    for i in 0..OBJECTS {
        store.create(object(i), SIZE, 0, payload(SIZE as usize)).await.expect("create");
    }
    // Warm: opens every object and reads its block map.
    stored(&store, 4096, 32).await;
    for (len, depth) in [(4096, 1), (4096, 8), (4096, 32), (512 << 10, 8), (4 << 20, 1), (4 << 20, 4)] {
        let (mut before, mut after) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            before.push(tokio::task::block_in_place(|| plain(&disk, len, depth)));
            after.push(stored(&store, len, depth).await);
        }
        let (before, after) = (median(before), median(after));
        println!(
            "durable write {len:>8} QD{depth:<3} {:>9.0} op/s = {:.2} of O_DSYNC, CPU {:.0} us/op = {:.2}",
            after.ops,
            after.ops / before.ops,
            after.cpu,
            after.cpu / before.cpu
        );
    }
    for (len, depth) in [(4096, 1), (4096, 32), (4 << 20, 1)] {
        reads(&store, 4 << 20, 1).await;
        println!("warm read     {len:>8} QD{depth:<3} {:>9.0} op/s", reads(&store, len, depth).await.ops);
    }
    drop(store);
    let store = open(&disk, SyncMode::NoSync);
    for (len, depth) in [(4096, 1), (4096, 32), (4 << 20, 1)] {
        println!("nosync write  {len:>8} QD{depth:<3} {:>9.0} op/s", stored(&store, len, depth).await.ops);
    }
    store.flush().await.expect("flush");
}
