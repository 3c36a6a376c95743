//! Writers that remember what was acknowledged, and check it.
//!
//! Every writer owns some blocks of one VDI, cut into slots of 4 KiB. A slot's content names its writer, its place and a
//! version, so any slot read back tells which write it came from. Per slot a writer keeps the versions it may hold: the
//! last acknowledged one and every later one whose outcome nobody knows because the connection broke. Anything else
//! found there is a lost or a torn write.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use sheepdog_proto::{Oid, Opcode, Request, ResultCode, VdiId};

use crate::client::Client;
use crate::vdi::{Vdi, refusal};

/// Bytes of a slot.
pub const SLOT: usize = 4096;
/// Most slots of one write: 64 KiB.
const MAX_RUN: u64 = 16;
/// One operation in this many is a read.
const READS: u32 = 6;

/// Content of a slot. Version 0 is "never written": zeros.
pub fn pattern(writer: u32, slot: u64, version: u32) -> Vec<u8> {
    if version == 0 {
        return vec![0; SLOT];
    }
    let mut state = u64::from(version) << 32 ^ slot << 8 ^ u64::from(writer) ^ 0x9e37_79b9_7f4a_7c15;
    let mut bytes = Vec::with_capacity(SLOT);
    bytes.extend(version.to_le_bytes());
    bytes.extend(writer.to_le_bytes());
    bytes.extend(slot.to_le_bytes());
    while bytes.len() < SLOT {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend((state ^ state >> 29).to_le_bytes());
    }
    bytes
}

/// The version that a slot's bytes are, if they are one in full.
fn version_of(writer: u32, slot: u64, bytes: &[u8]) -> Option<u32> {
    let version = u32::from_le_bytes(*bytes.first_chunk::<4>()?);
    (pattern(writer, slot, version) == bytes).then_some(version)
}

/// What a writer owns and knows.
pub struct Region {
    writer: u32,
    vdi: Vdi,
    /// First slot of the VDI that belongs to the writer.
    first: u64,
    /// Versions each slot may hold; the first one is the last acknowledged.
    candidates: Vec<Vec<u32>>,
    next_version: u32,
    /// Writes acknowledged.
    pub acknowledged: u64,
    /// Writes whose connection broke before the answer.
    pub unknown: u64,
    /// Error results that a client must not see.
    pub errors: Vec<String>,
    /// Reads that gave something else than a possible version.
    pub violations: Vec<String>,
    /// Longest time from a request to its answer.
    pub slowest: Duration,
    /// Times of the writes that were acknowledged, in order.
    pub latencies: Vec<Duration>,
}

impl Region {
    /// Cuts the blocks of a VDI among `writers` writers.
    pub fn divide(client: &mut Client, vid: VdiId, writers: usize) -> io::Result<Vec<Region>> {
        let vdi = Vdi::open(client, vid)?;
        let slots_per_block = vdi.header.block_size() / SLOT as u64;
        let blocks = vdi.table.len() / writers;
        assert!(blocks > 0, "a block for every writer");
        let slots = blocks as u64 * slots_per_block;
        Ok((0..writers)
            .map(|w| Region {
                writer: w as u32 + 1,
                vdi: vdi.clone(),
                first: w as u64 * slots,
                candidates: vec![vec![0]; slots as usize],
                next_version: 1,
                acknowledged: 0,
                unknown: 0,
                errors: Vec::new(),
                violations: Vec::new(),
                slowest: Duration::ZERO,
                latencies: Vec::new(),
            })
            .collect())
    }

    fn offset(&self, slot: u64) -> u64 {
        (self.first + slot) * SLOT as u64
    }

    /// Writes `count` slots from `slot` on. `false` if the connection is gone.
    fn write(&mut self, client: &mut Client, slot: u64, count: u64) -> bool {
        let version = self.next_version;
        self.next_version += 1;
        let slots = slot..slot + count;
        let data: Vec<u8> =
            slots.clone().flat_map(|s| pattern(self.writer, self.first + s, version)).collect();
        for s in slots.clone() {
            self.candidates[s as usize].push(version);
        }
        let started = Instant::now();
        let result = self.vdi.write(client, self.offset(slot), &data);
        let took = started.elapsed();
        self.slowest = self.slowest.max(took);
        match result {
            Ok(()) => {
                self.acknowledged += 1;
                self.latencies.push(took);
                for s in slots {
                    self.candidates[s as usize] = vec![version];
                }
                true
            }
            Err(e) => {
                self.unknown += 1;
                self.complain("write", slot, &e);
                false
            }
        }
    }

    /// Notes an error that no client should see. A broken connection is none, nor is the answer of a daemon that is told to
    /// end: both mean "go elsewhere".
    fn complain(&mut self, what: &str, slot: u64, error: &io::Error) {
        let ending = matches!(refusal(error), Some(ResultCode::KILLED | ResultCode::SHUTDOWN));
        if error.kind() == io::ErrorKind::Other && !ending {
            self.errors.push(format!("writer {}: {what} of slot {slot}: {error:?}", self.writer));
        }
    }

    fn check(&self, slot: u64, bytes: &[u8]) -> Result<(), String> {
        let allowed = &self.candidates[slot as usize];
        let place = self.first + slot;
        match version_of(self.writer, place, bytes) {
            Some(v) if allowed.contains(&v) => Ok(()),
            Some(v) => Err(format!(
                "writer {} slot {place}: holds version {v}, possible are {allowed:?}",
                self.writer
            )),
            None => Err(format!(
                "writer {} slot {place}: holds no version at all (begins {:02x?}), possible are {allowed:?}",
                self.writer,
                &bytes[..24.min(bytes.len())]
            )),
        }
    }

    fn read(&mut self, client: &mut Client, slot: u64, count: u64) -> bool {
        let started = Instant::now();
        let result = self.vdi.read(client, self.offset(slot), count as usize * SLOT);
        self.slowest = self.slowest.max(started.elapsed());
        match result {
            Ok(data) => {
                for (s, bytes) in (slot..).zip(data.chunks(SLOT)) {
                    if let Err(text) = self.check(s, bytes) {
                        self.violations.push(text);
                    }
                }
                true
            }
            Err(e) => {
                self.complain("read", slot, &e);
                false
            }
        }
    }

    /// Reads everything back; gives what is wrong.
    pub fn verify(&self, client: &mut Client) -> Vec<String> {
        let mut wrong = Vec::new();
        let step = MAX_RUN * 4;
        for slot in (0..self.candidates.len() as u64).step_by(step as usize) {
            let count = step.min(self.candidates.len() as u64 - slot);
            match self.vdi.read(client, self.offset(slot), count as usize * SLOT) {
                Ok(data) => {
                    wrong.extend((slot..).zip(data.chunks(SLOT)).filter_map(|(s, b)| self.check(s, b).err()));
                }
                Err(e) => wrong.push(format!("writer {} slot {slot}: cannot be read: {e}", self.writer)),
            }
        }
        wrong
    }

    /// Slots whose content is not known for certain: object and bytes inside it.
    pub fn unknown_ranges(&self) -> Vec<(Oid, Range<u64>)> {
        let block = self.vdi.header.block_size();
        let unsure = self.candidates.iter().enumerate().filter(|(_, c)| c.len() > 1);
        unsure
            .map(|(slot, _)| {
                let at = self.offset(slot as u64);
                let inside = at % block;
                (Oid::data(self.vdi.vid(), (at / block) as u32), inside..inside + SLOT as u64)
            })
            .collect()
    }

    /// Writes one slot into every block that has no owner yet, so that no creation is left half done.
    pub fn settle(&mut self, client: &mut Client) {
        let per_block = self.vdi.header.block_size() / SLOT as u64;
        for slot in (0..self.candidates.len() as u64).step_by(per_block as usize) {
            let index = (self.offset(slot) / self.vdi.header.block_size()) as usize;
            if self.vdi.table[index] != self.vdi.vid().get() {
                assert!(self.write(client, slot, 1), "creating block {index}: {:?}", self.errors);
            }
        }
    }
}

/// Writers at work.
pub struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    writers: Vec<JoinHandle<Region>>,
}

/// The connection, if the daemon behind it is a member of a running cluster: one that still joins refuses clients (spec
/// 01, 6.1), which is not what the load is about.
fn once_it_serves(mut client: Client) -> Option<Client> {
    let (response, _) = client.call(Request::new(Opcode::STAT_SHEEP), &[]).ok()?;
    response.result.is_ok().then_some(client)
}

fn connect_any(ports: &[u16], random: &mut SmallRng, stop: &AtomicBool) -> Option<Client> {
    while !stop.load(Ordering::Relaxed) {
        let port = ports[random.random_range(0..ports.len())];
        if let Some(client) = Client::connect(port).ok().and_then(once_it_serves) {
            return Some(client);
        }
        std::thread::sleep(Duration::from_millis(5)); // between two attempts to connect
    }
    None
}

fn run(mut region: Region, ports: &[u16], stop: &AtomicBool, done: &AtomicU64, seed: u64) -> Region {
    let mut random = SmallRng::seed_from_u64(seed ^ u64::from(region.writer) << 48);
    let slots = region.candidates.len() as u64;
    'connections: while let Some(mut client) = connect_any(ports, &mut random, stop) {
        while !stop.load(Ordering::Relaxed) {
            let slot = random.random_range(0..slots);
            let count = random.random_range(1..=MAX_RUN).min(slots - slot);
            let alive = if random.random_ratio(1, READS) {
                region.read(&mut client, slot, count)
            } else {
                region.write(&mut client, slot, count)
            };
            done.fetch_add(1, Ordering::Relaxed);
            if !alive {
                continue 'connections;
            }
        }
        break;
    }
    region
}

impl Load {
    /// Starts a thread for each region; every connection goes to a random one of `ports`.
    pub fn start(regions: Vec<Region>, ports: Vec<u16>, seed: u64) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicU64::new(0));
        let writers = regions
            .into_iter()
            .map(|region| {
                let (stop, done, ports) = (Arc::clone(&stop), Arc::clone(&done), ports.clone());
                std::thread::spawn(move || run(region, &ports, &stop, &done, seed))
            })
            .collect();
        Load { stop, done, writers }
    }

    /// Operations finished so far, whatever their outcome.
    pub fn operations(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Ends the writers and gives their regions back.
    pub fn stop(self) -> Vec<Region> {
        self.stop.store(true, Ordering::Relaxed);
        self.writers.into_iter().map(|w| w.join().expect("a writer does not panic")).collect()
    }
}

/// Sums of all regions, for reports.
#[derive(Debug, Default)]
pub struct Summary {
    /// Writes acknowledged.
    pub acknowledged: u64,
    /// Writes without an answer.
    pub unknown: u64,
    /// Slots whose content is one of several.
    pub unsure_slots: usize,
    /// Longest operation.
    pub slowest: Duration,
    /// Times of acknowledged writes, ascending.
    pub latencies: Vec<Duration>,
    /// Error results seen.
    pub errors: Vec<String>,
    /// Impossible contents seen while running.
    pub violations: Vec<String>,
}

impl Summary {
    /// Of these regions.
    pub fn of(regions: &[Region]) -> Summary {
        let mut sum = Summary::default();
        for r in regions {
            sum.acknowledged += r.acknowledged;
            sum.unknown += r.unknown;
            sum.unsure_slots += r.unknown_ranges().len();
            sum.slowest = sum.slowest.max(r.slowest);
            sum.latencies.extend(&r.latencies);
            sum.errors.extend(r.errors.iter().cloned());
            sum.violations.extend(r.violations.iter().cloned());
        }
        sum.latencies.sort_unstable();
        sum
    }

    /// The time within which this share (0.99) of the acknowledged writes were done.
    pub fn percentile(&self, share: f64) -> Duration {
        let last = self.latencies.len().saturating_sub(1);
        self.latencies.get((last as f64 * share) as usize).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_tells_its_version_and_nothing_else_does() {
        let bytes = pattern(3, 77, 5);
        assert_eq!(bytes.len(), SLOT);
        assert_eq!(version_of(3, 77, &bytes), Some(5));
        assert_eq!(version_of(3, 78, &bytes), None);
        assert_eq!(version_of(4, 77, &bytes), None);
        assert_eq!(version_of(3, 77, &[0; SLOT]), Some(0));
        let mut torn = bytes.clone();
        torn[2048..].copy_from_slice(&pattern(3, 77, 4)[2048..]);
        assert_eq!(version_of(3, 77, &torn), None);
    }
}
