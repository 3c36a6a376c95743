//! Writes that may be on some homes of their object only (spec 06, 15.1 A3).
//!
//! A home remembers each write of a gateway until the gateway says that it is done. When an epoch ends, the objects of
//! what is not done become *unsettled*: their replicas here are not read (strips not touched at all) until
//! [`crate::settle`] has made all homes equal. Writes of strips are remembered with the bytes that they replaced, so that
//! a write that reached only some strips can be undone.
//!
//! Objects written to lately are also kept in a side file of the metadata directory, `dirty_objects`, a list of 8-byte
//! object ids: after a restart all of them are unsettled as a whole. An object is entered before the first write to it;
//! entries of objects at rest are dropped from time to time.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use sheepdog_proto::{Epoch, Oid, Wire};
use sheepdog_store::{Replica, Store, SyncMode};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::order::Order;

const FILE: &str = "dirty_objects";
/// The side file is written anew when it has this many entries more than objects are in use.
const SLACK: usize = 4096;
/// An object not written to for this long is at rest.
const REST: Duration = Duration::from_secs(30);
/// Writes of gateways that never tell (the original) count as done after this long.
const UNTOLD: Duration = Duration::from_secs(5);

/// A write: the process that is its gateway, and its number there. 0, 0 = by a gateway that does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct WriteId {
    /// The gateway.
    pub writer: u32,
    /// The number.
    pub seq: u32,
}

/// Whether `a` is `b` or before it; numbers wrap around.
fn up_to(a: u32, b: u32) -> bool {
    b.wrapping_sub(a) as i32 >= 0
}

struct Live {
    oid: Oid,
    regions: u64,
    at: Instant,
}

#[derive(Default)]
struct Writer {
    live: HashMap<u32, Live>,
    highest: u32,
    open: HashSet<u32>,
    told: bool,
}

/// What became of a write of a strip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Fate {
    /// It is not here.
    Absent = 0,
    /// It is here; whether it stands is open.
    Applied = 1,
    /// It stands.
    Kept = 2,
    /// It was undone.
    Undone = 3,
    /// Its gateway said that it is done.
    Done = 4,
    /// This process was not there.
    Unknown = 5,
}

impl Fate {
    /// From a byte of an answer.
    pub fn of(byte: u8) -> Fate {
        match byte {
            0 => Fate::Absent,
            1 => Fate::Applied,
            2 => Fate::Kept,
            3 => Fate::Undone,
            4 => Fate::Done,
            _ => Fate::Unknown,
        }
    }
}

/// A write of a strip and what it replaced.
struct Undo {
    id: WriteId,
    epoch: Epoch,
    strip: u8,
    offset: u64,
    old: Bytes,
    fate: Fate,
    at: Instant,
}

#[derive(Default)]
struct Unsettled {
    regions: u64,
    /// Known from the side file alone: this process knows no write of it.
    remembered: bool,
    settled: Arc<Notify>,
}

/// The side file, open for appending.
#[derive(Default)]
struct List {
    file: Option<File>,
    entries: usize,
}

/// See the module's documentation.
pub struct Intents {
    path: PathBuf,
    durable: bool,
    writers: Mutex<HashMap<u32, Writer>>,
    undo: Mutex<HashMap<Oid, Vec<Undo>>>,
    unsettled: Mutex<HashMap<Oid, Unsettled>>,
    nr_unsettled: AtomicUsize,
    /// Objects in the side file, with the time of their last write.
    dirty: Mutex<HashMap<Oid, Instant>>,
    list: Mutex<List>,
    since: AtomicU32,
    /// Objects that this node is settling for all homes.
    pub leading: Order,
    /// Objects that a task of this node cares for until they are settled.
    in_care: Arc<Mutex<HashSet<(Oid, Epoch)>>>,
}

/// The duty to settle an object; given back when dropped.
pub struct Care {
    in_care: Arc<Mutex<HashSet<(Oid, Epoch)>>>,
    what: (Oid, Epoch),
}

impl Drop for Care {
    fn drop(&mut self) {
        self.in_care.lock().remove(&self.what);
    }
}

/// The part of an object of `size` bytes that a region covers, in bytes: a 64th, whole pages.
pub fn region_len(size: u64) -> u64 {
    (size.div_ceil(64)).next_multiple_of(4096).max(4096)
}

/// The regions that a range touches, a bit for each.
pub fn regions_of(size: u64, offset: u64, len: u64) -> u64 {
    let region = region_len(size);
    let (first, last) = ((offset / region).min(63), ((offset + len.max(1) - 1) / region).min(63));
    (u64::MAX >> (63 - last)) & (u64::MAX << first)
}

/// The ranges of an object of `size` bytes that `regions` cover.
pub fn ranges(size: u64, regions: u64) -> Vec<std::ops::Range<u64>> {
    let region = region_len(size);
    let mut out: Vec<std::ops::Range<u64>> = Vec::new();
    for bit in (0..64).filter(|bit| regions >> bit & 1 == 1) {
        let range = (bit * region).min(size)..((bit + 1) * region).min(size);
        match out.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ if range.is_empty() => {}
            _ => out.push(range),
        }
    }
    out
}

impl Intents {
    /// Reads the side file: what it names is unsettled.
    pub fn open(base: &Path, store: Option<&Store>) -> Intents {
        let path = base.join(FILE);
        let oids: HashSet<Oid> =
            std::fs::read(&path).unwrap_or_default().chunks_exact(8).map(Oid::get).collect();
        let now = Instant::now();
        let objects: HashMap<Oid, Instant> = oids.iter().map(|oid| (*oid, now)).collect();
        let unsettled: HashMap<Oid, Unsettled> = oids
            .iter()
            .map(|oid| (*oid, Unsettled { regions: u64::MAX, remembered: true, ..Unsettled::default() }))
            .collect();
        Intents {
            path,
            durable: store.is_some_and(|s| s.sync_mode() != SyncMode::NoSync),
            writers: Mutex::default(),
            undo: Mutex::default(),
            nr_unsettled: AtomicUsize::new(unsettled.len()),
            unsettled: Mutex::new(unsettled),
            list: Mutex::new(List { file: None, entries: objects.len() }),
            dirty: Mutex::new(objects),
            since: AtomicU32::new(u32::MAX),
            leading: Order::default(),
            in_care: Arc::default(),
        }
    }

    /// This process takes part from `epoch` on.
    pub fn note(&self, epoch: Epoch) {
        let _ = self.since.compare_exchange(u32::MAX, epoch.0, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Forgets everything (MAKE_FS).
    pub fn clear(&self) {
        self.writers.lock().clear();
        self.undo.lock().clear();
        self.unsettled.lock().clear();
        self.nr_unsettled.store(0, Ordering::Release);
        let mut list = self.list.lock();
        self.dirty.lock().clear();
        *list = List::default();
        self.since.store(1, Ordering::Release);
        if let Err(error) = std::fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::error!("cannot remove {}: {error}", self.path.display());
        }
    }

    /// Notes a write that is about to begin. `false` = the object must be entered first ([`Intents::enter`]).
    pub fn begin(&self, oid: Oid, id: WriteId, regions: u64) -> bool {
        let now = Instant::now();
        match self.dirty.lock().get_mut(&oid) {
            Some(at) => *at = now,
            None => return false,
        }
        let mut writers = self.writers.lock();
        let writer = writers.entry(id.writer).or_default();
        // What does not tell has no numbers either.
        let seq = if id.writer == 0 {
            writer.highest = writer.highest.wrapping_add(1);
            writer.highest
        } else {
            id.seq
        };
        let live = writer.live.entry(seq).or_insert(Live { oid, regions: 0, at: now });
        (live.oid, live.regions, live.at) = (oid, live.regions | regions, now);
        true
    }

    /// Enters an object in the side file. Blocks for a disk write.
    pub fn enter(&self, oid: Oid) -> io::Result<()> {
        let mut list = self.list.lock();
        let count = {
            let dirty = self.dirty.lock();
            if dirty.contains_key(&oid) {
                return Ok(());
            }
            dirty.len()
        };
        if list.entries >= count + SLACK || count >= 4 * SLACK {
            self.rewrite(&mut list)?;
        }
        if list.file.is_none() {
            list.file = Some(OpenOptions::new().create(true).append(true).open(&self.path)?);
        }
        if let Some(file) = list.file.as_mut() {
            file.write_all(&oid.0.to_le_bytes())?;
            if self.durable {
                file.sync_data()?;
            }
        }
        list.entries += 1;
        self.dirty.lock().insert(oid, Instant::now());
        Ok(())
    }

    /// Writes the side file anew, without objects at rest.
    fn rewrite(&self, list: &mut List) -> io::Result<()> {
        let now = Instant::now();
        let busy: HashSet<Oid> =
            self.writers.lock().values().flat_map(|w| w.live.values().map(|l| l.oid)).collect();
        let bytes: Vec<u8> = {
            let unsettled = self.unsettled.lock();
            let mut dirty = self.dirty.lock();
            dirty.retain(|oid, at| {
                now.duration_since(*at) < REST || busy.contains(oid) || unsettled.contains_key(oid)
            });
            list.entries = dirty.len();
            dirty.keys().flat_map(|oid| oid.0.to_le_bytes()).collect()
        };
        let tmp = self.path.with_extension("tmp");
        let mut file = File::create(&tmp)?;
        file.write_all(&bytes)?;
        if self.durable {
            file.sync_data()?;
        }
        std::fs::rename(&tmp, &self.path)?;
        list.file = None;
        if self.durable
            && let Some(dir) = self.path.parent()
        {
            File::open(dir)?.sync_data()?;
        }
        Ok(())
    }

    /// Remembers what a write of a strip is about to replace.
    pub fn keep(&self, replica: Replica, id: WriteId, epoch: Epoch, offset: u64, old: Bytes) {
        if id.writer == 0 {
            return; // nobody would say when it is done
        }
        let strip = replica.strip.unwrap_or(0);
        let undo = Undo { id, epoch, strip, offset, old, fate: Fate::Applied, at: Instant::now() };
        self.undo.lock().entry(replica.oid).or_default().push(undo);
    }

    /// A gateway says: every write up to `highest` is done, except `open`.
    pub fn done(&self, writer: u32, highest: u32, open: &[u32]) {
        let now = Instant::now();
        let open: HashSet<u32> = open.iter().copied().collect();
        {
            let mut writers = self.writers.lock();
            let known = writers.entry(writer).or_default();
            known.live.retain(|seq, _| !up_to(*seq, highest) || open.contains(seq));
            if !known.told || up_to(known.highest, highest) {
                (known.told, known.highest, known.open) = (true, highest, open.clone());
            }
            if let Some(silent) = writers.get_mut(&0) {
                silent.live.retain(|_, live| now.duration_since(live.at) < UNTOLD);
            }
        }
        let mut undo = self.undo.lock();
        if undo.is_empty() {
            return;
        }
        undo.retain(|_, all| {
            // Decided ones are remembered for a while: another home may ask what was decided.
            all.retain(|u| match u.fate {
                Fate::Applied => {
                    u.id.writer != writer || !up_to(u.id.seq, highest) || open.contains(&u.id.seq)
                }
                _ => now.duration_since(u.at) < 2 * REST,
            });
            !all.is_empty()
        });
    }

    /// The epoch ends: from here on what is not done is unsettled. Nothing is being written.
    pub fn epoch_ends(&self) {
        let mut unsettled = self.unsettled.lock();
        let mut add = |oid: Oid, regions: u64| unsettled.entry(oid).or_default().regions |= regions;
        let now = Instant::now();
        for (id, writer) in self.writers.lock().iter_mut() {
            for (_, live) in writer.live.drain() {
                if *id != 0 || now.duration_since(live.at) < UNTOLD {
                    add(live.oid, live.regions);
                }
            }
        }
        for (oid, all) in self.undo.lock().iter() {
            if all.iter().any(|u| u.fate == Fate::Applied) {
                add(*oid, u64::MAX);
            }
        }
        self.nr_unsettled.store(unsettled.len(), Ordering::Release);
    }

    /// Marks an object as unsettled, as another node says.
    pub fn unsettle(&self, oid: Oid, regions: u64) {
        let mut unsettled = self.unsettled.lock();
        unsettled.entry(oid).or_default().regions |= regions;
        self.nr_unsettled.store(unsettled.len(), Ordering::Release);
    }

    /// Takes on the duty to settle an object in this epoch; `None` = somebody has it.
    pub fn take_on(&self, oid: Oid, epoch: Epoch) -> Option<Care> {
        let what = (oid, epoch);
        self.in_care.lock().insert(what).then(|| Care { in_care: self.in_care.clone(), what })
    }

    /// This node's objects are out of date and will be recovered from others, which settled what was to be settled.
    pub fn leave_to_others(&self) {
        let mut unsettled = self.unsettled.lock();
        for (_, gone) in unsettled.drain() {
            gone.settled.notify_waiters();
        }
        self.nr_unsettled.store(0, Ordering::Release);
        self.undo.lock().clear();
    }

    /// All homes of the object are equal again.
    pub fn settled(&self, oid: Oid) {
        let mut unsettled = self.unsettled.lock();
        if let Some(gone) = unsettled.remove(&oid) {
            gone.settled.notify_waiters();
        }
        self.nr_unsettled.store(unsettled.len(), Ordering::Release);
    }

    /// Whether everything is settled.
    pub fn all_settled(&self) -> bool {
        self.nr_unsettled.load(Ordering::Acquire) == 0
    }

    /// Whether this object is not settled.
    pub fn is_unsettled(&self, oid: Oid) -> bool {
        !self.all_settled() && self.unsettled.lock().contains_key(&oid)
    }

    /// Everything that is not settled.
    pub fn unsettled(&self) -> Vec<Oid> {
        self.unsettled.lock().keys().copied().collect()
    }

    /// Regions of an object that are not settled.
    pub fn regions(&self, oid: Oid) -> u64 {
        self.unsettled.lock().get(&oid).map_or(0, |u| u.regions)
    }

    /// Whether it is not known what of the object is not settled, as this process did not see its last writes.
    pub fn is_remembered(&self, oid: Oid) -> bool {
        self.unsettled.lock().get(&oid).is_some_and(|u| u.remembered)
    }

    /// Waits until the object is settled.
    pub async fn wait(&self, oid: Oid) {
        loop {
            let notify = match self.unsettled.lock().get(&oid) {
                Some(unsettled) => unsettled.settled.clone(),
                None => return,
            };
            let settled = notify.notified();
            tokio::pin!(settled);
            settled.as_mut().enable();
            if !self.is_unsettled(oid) {
                return;
            }
            settled.await;
        }
    }

    /// Whether a write to the object is not known to be done.
    pub fn is_busy(&self, oid: Oid) -> bool {
        let now = Instant::now();
        let writers = self.writers.lock();
        writers.iter().any(|(id, writer)| {
            writer.live.values().any(|l| l.oid == oid && (*id != 0 || now.duration_since(l.at) < UNTOLD))
        })
    }

    /// Writes of strips of the object here of which it is open whether they stand, by epoch.
    pub fn open_writes(&self, oid: Oid) -> HashMap<Epoch, Vec<WriteId>> {
        let mut out: HashMap<Epoch, Vec<WriteId>> = HashMap::new();
        for undo in self.undo.lock().get(&oid).into_iter().flatten().filter(|u| u.fate == Fate::Applied) {
            let ids = out.entry(undo.epoch).or_default();
            if !ids.contains(&undo.id) {
                ids.push(undo.id);
            }
        }
        out
    }

    /// What became of a write of `epoch` here.
    pub fn fate(&self, oid: Oid, id: WriteId, epoch: Epoch) -> Fate {
        let here = |u: &&Undo| u.id == id && u.epoch == epoch;
        let known = self.undo.lock().get(&oid).and_then(|all| all.iter().find(here).map(|u| u.fate));
        if let Some(fate) = known {
            return fate;
        }
        let done = self
            .writers
            .lock()
            .get(&id.writer)
            .is_some_and(|w| w.told && up_to(id.seq, w.highest) && !w.open.contains(&id.seq));
        match (done, epoch.0 < self.since.load(Ordering::Acquire)) {
            (true, _) => Fate::Done,
            (false, true) => Fate::Unknown,
            (false, false) => Fate::Absent,
        }
    }

    /// The write of `epoch` stands.
    pub fn stands(&self, oid: Oid, id: WriteId, epoch: Epoch) {
        self.decide(oid, id, epoch, Fate::Kept);
    }

    fn decide(&self, oid: Oid, id: WriteId, epoch: Epoch, fate: Fate) {
        if let Some(all) = self.undo.lock().get_mut(&oid) {
            for undo in all.iter_mut().filter(|u| u.id == id && u.epoch == epoch && u.fate == Fate::Applied) {
                (undo.fate, undo.at) = (fate, Instant::now());
                if fate == Fate::Kept {
                    undo.old = Bytes::new();
                }
            }
        }
    }

    /// What has to be written to undo a write of `epoch`, in this order.
    pub fn to_undo(&self, oid: Oid, id: WriteId, epoch: Epoch) -> Vec<(Replica, u64, Bytes)> {
        let undo = self.undo.lock();
        let all = undo.get(&oid).into_iter().flatten();
        let mut parts: Vec<_> = all
            .filter(|u| u.id == id && u.epoch == epoch && u.fate == Fate::Applied)
            .map(|u| (Replica { oid, strip: Some(u.strip) }, u.offset, u.old.clone()))
            .collect();
        parts.reverse();
        parts
    }

    /// The write of `epoch` was undone.
    pub fn undone(&self, oid: Oid, id: WriteId, epoch: Epoch) {
        self.decide(oid, id, epoch, Fate::Undone);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: WriteId = WriteId { writer: 9, seq: 5 };

    fn intents(dir: &Path) -> Intents {
        Intents::open(dir, None)
    }

    #[test]
    fn regions_are_64ths_of_the_object() {
        const SIZE: u64 = 4 << 20;
        assert_eq!(regions_of(SIZE, 0, 4096), 1);
        assert_eq!(regions_of(SIZE, 65535, 2), 3);
        assert_eq!(regions_of(SIZE, SIZE - 1, 1), 1 << 63);
        assert_eq!(regions_of(SIZE, 0, SIZE), u64::MAX);
        assert_eq!(ranges(SIZE, 0b1011), [0..131072, 196608..262144]);
        assert_eq!(ranges(SIZE, u64::MAX).first(), Some(&(0..SIZE)));
        assert_eq!(
            ranges(8192, u64::MAX).first(),
            Some(&(0..8192)),
            "an object of two pages has two regions"
        );
    }

    #[test]
    fn what_is_not_done_when_the_epoch_ends_is_unsettled() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let intents = intents(dir.path());
        assert!(!intents.begin(Oid(1), ID, 1), "not entered");
        for oid in [Oid(1), Oid(2)] {
            intents.enter(oid).expect("entered");
        }
        assert!(intents.begin(Oid(1), ID, 1) && intents.begin(Oid(2), WriteId { seq: 6, ..ID }, 2));
        intents.done(9, 7, &[6]);
        assert!(!intents.is_busy(Oid(1)) && intents.is_busy(Oid(2)));
        intents.epoch_ends();
        assert_eq!(intents.unsettled(), [Oid(2)]);
        assert_eq!(intents.regions(Oid(2)), 2);
        intents.settled(Oid(2));
        assert!(intents.all_settled());
    }

    #[test]
    fn after_a_restart_objects_written_lately_are_unsettled() {
        let dir = tempfile::tempdir().expect("temporary directory");
        intents(dir.path()).enter(Oid(77)).expect("entered");
        let again = intents(dir.path());
        assert_eq!(again.unsettled(), [Oid(77)]);
        assert_eq!(again.regions(Oid(77)), u64::MAX);
        again.clear();
        assert!(intents(dir.path()).all_settled());
    }

    #[test]
    fn a_strips_write_is_undone_newest_first_and_remembered() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let intents = intents(dir.path());
        intents.note(Epoch(2));
        let replica = Replica { oid: Oid(3), strip: Some(1) };
        for old in [b"aa", b"bb"] {
            intents.keep(replica, ID, Epoch(4), 0, Bytes::from_static(old));
        }
        assert_eq!(intents.fate(Oid(3), ID, Epoch(4)), Fate::Applied);
        let old: Vec<Bytes> =
            intents.to_undo(Oid(3), ID, Epoch(4)).into_iter().map(|(_, _, old)| old).collect();
        assert_eq!(old, [&b"bb"[..], b"aa"]);
        intents.undone(Oid(3), ID, Epoch(4));
        assert_eq!(intents.fate(Oid(3), ID, Epoch(4)), Fate::Undone);
        assert!(intents.open_writes(Oid(3)).is_empty());
        let other = WriteId { seq: 6, ..ID };
        assert_eq!(intents.fate(Oid(3), other, Epoch(4)), Fate::Absent);
        assert_eq!(intents.fate(Oid(3), other, Epoch(1)), Fate::Unknown, "before this process");
        intents.done(9, 6, &[]);
        assert_eq!(intents.fate(Oid(3), other, Epoch(4)), Fate::Done);
    }
}
