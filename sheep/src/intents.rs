//! Writes that may be on some homes of their object only (spec 06, 15.1 A3).
//!
//! A home remembers each write of a gateway until the gateway says that it is done. When an epoch ends, the objects of
//! what is not done become *unsettled*: their replicas here are not read (strips not touched at all) until
//! [`crate::settle`] has made all homes equal. Writes of strips are remembered with the bytes that they replaced, so that
//! a write that reached only some strips can be undone; that is kept in a log, too ([`crate::undo_log`]), as is what became
//! of them.
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

use parking_lot::Mutex;
use sheepdog_proto::{Epoch, Oid, Wire};
use sheepdog_store::{Store, SyncMode};
use tokio::sync::Notify;
use tokio::time::Instant;

use self::strips::{Announced, Logged, Undo, has_open};
use crate::order::Order;
use crate::undo_log::{Record, UndoLog};

mod strips;

pub use self::strips::{LeftOut, before_open_writes};

const FILE: &str = "dirty_objects";
/// The side file is written anew when it has this many entries more than objects are in use.
const SLACK: usize = 4096;
/// An object not written to for this long is at rest.
const REST: Duration = Duration::from_secs(30);
/// How long what was decided about a write is remembered when no home can be away that would ask.
const REMEMBER: Duration = Duration::from_secs(600);
/// So many gateways are remembered, the latest ones.
const GATEWAYS: usize = 1024;
/// Writes of gateways that never tell (the original) count as done after this long.
const UNTOLD: Duration = Duration::from_secs(5);

/// How long writes in progress may take to be done before a home gives up taking over for now. Short: one of them may be
/// waiting for this home, where it is sent again.
const QUIET: Duration = Duration::from_millis(300);
/// Between two looks at them.
const QUIET_PAUSE: Duration = Duration::from_millis(5);

/// After this long all homes have answered a write, or it was sent again; above the deadline of requests to peers.
const ANSWERED: Duration = Duration::from_secs(60);

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
    /// It failed here, or was sent once more since it was begun: it is not done without this home.
    again: bool,
}

/// The writes of a gateway that are done: those up to a number, except some.
#[derive(Default, Clone)]
struct DoneWrites {
    highest: u32,
    open: HashSet<u32>,
}

impl DoneWrites {
    fn has(&self, seq: u32) -> bool {
        up_to(seq, self.highest) && !self.open.contains(&seq)
    }

    /// What was told may arrive in another order than it was sent: what is done stays done.
    fn learn(&mut self, told: &DoneWrites) {
        if self.highest == told.highest {
            self.open.retain(|seq| told.open.contains(seq));
        } else if up_to(self.highest, told.highest) {
            *self = told.clone();
        }
    }
}

#[derive(Default)]
struct Writer {
    live: HashMap<u32, Live>,
    done: DoneWrites,
    /// When it last told; `None` = never.
    told: Option<Instant>,
}

impl Writer {
    fn tells(&mut self, told: &DoneWrites, now: Instant) {
        match self.told.replace(now) {
            None => self.done = told.clone(),
            Some(_) => self.done.learn(told),
        }
    }
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
    /// It stands because all homes have it that were there when that was decided, and nobody knew more.
    Loose = 6,
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
            6 => Fate::Loose,
            _ => Fate::Unknown,
        }
    }
}

#[derive(Default)]
struct Unsettled {
    regions: u64,
    /// Known from the list of objects alone: nobody here knows its writes.
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
    /// This gateway's writes of strips that are here, too, in the present epoch.
    announced: Mutex<HashMap<WriteId, Announced>>,
    log: UndoLog,
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
    /// Coded objects whose parity this node has made to fit, with the epoch in which it did.
    mended: Mutex<HashMap<Oid, Epoch>>,
    /// Since when it waits to be decided about writes of an object and an epoch.
    waiting: Mutex<HashMap<(Oid, Epoch), Instant>>,
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
        let durable = store.is_some_and(|s| s.sync_mode() != SyncMode::NoSync);
        let (log, records) = UndoLog::open(base, durable);
        let remembered = records.is_none();
        let Logged { writers, undo, announced, since } = Logged::replay(records.unwrap_or_default(), now);
        let open = undo.iter().filter(|(_, all)| has_open(all));
        let unsettled: HashMap<Oid, Unsettled> = oids
            .iter()
            .chain(open.map(|(oid, _)| oid))
            .map(|oid| (*oid, Unsettled { regions: u64::MAX, remembered, ..Unsettled::default() }))
            .collect();
        Intents {
            path,
            durable,
            writers: Mutex::new(writers),
            undo: Mutex::new(undo),
            announced: Mutex::new(announced),
            log,
            nr_unsettled: AtomicUsize::new(unsettled.len()),
            unsettled: Mutex::new(unsettled),
            list: Mutex::new(List { file: None, entries: objects.len() }),
            dirty: Mutex::new(objects),
            since: AtomicU32::new(since),
            leading: Order::default(),
            in_care: Arc::default(),
            mended: Mutex::default(),
            waiting: Mutex::default(),
        }
    }

    /// This process takes part from `epoch` on. Blocks for a disk write the first time: what the log does not tell of since then
    /// was not written here, also if nothing was.
    pub fn note(&self, epoch: Epoch) {
        if self.since.compare_exchange(u32::MAX, epoch.0, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            self.restart_log();
        }
    }

    /// What the log is to hold.
    fn logged(&self) -> Vec<Record> {
        let since = self.since.load(Ordering::Acquire);
        let mut out: Vec<Record> =
            (since != u32::MAX).then_some(Record::Since(Epoch(since))).into_iter().collect();
        {
            let writers = self.writers.lock();
            let mut told: Vec<_> = writers.iter().filter_map(|(id, w)| Some((w.told?, *id, w))).collect();
            told.sort_by_key(|(at, ..)| std::cmp::Reverse(*at));
            out.extend(told.into_iter().take(GATEWAYS).map(|(_, writer, w)| Record::Done {
                writer,
                highest: w.done.highest,
                open: w.done.open.iter().copied().collect(),
            }));
        }
        for (oid, all) in self.undo.lock().iter() {
            for undo in all {
                out.extend(undo.records(*oid));
            }
        }
        out.extend(self.announced.lock().iter().map(|(id, a)| a.record(*id)));
        out
    }

    /// Forgets everything (MAKE_FS).
    pub fn clear(&self) {
        self.writers.lock().clear();
        self.undo.lock().clear();
        self.announced.lock().clear();
        self.mended.lock().clear();
        self.unsettled.lock().clear();
        self.nr_unsettled.store(0, Ordering::Release);
        let mut list = self.list.lock();
        self.dirty.lock().clear();
        *list = List::default();
        self.since.store(1, Ordering::Release);
        self.restart_log();
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
            writer.done.highest = writer.done.highest.wrapping_add(1);
            writer.done.highest
        } else {
            id.seq
        };
        let before = writer.live.get(&seq).map_or(0, |live| live.regions);
        writer.live.insert(seq, Live { oid, regions: before | regions, at: now, again: false });
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

    fn restart_log(&self) {
        if let Err(error) = self.log.restart(self.logged()) {
            // What is in it is of epochs that nobody asks for any more.
            tracing::error!("cannot begin a new log of writes of strips: {error}");
        }
    }

    /// A gateway says: every write up to `highest` is done, except `open`.
    pub fn done(&self, writer: u32, highest: u32, open: &[u32]) {
        let now = Instant::now();
        let told = DoneWrites { highest, open: open.iter().copied().collect() };
        {
            let mut writers = self.writers.lock();
            let known = writers.entry(writer).or_default();
            known.live.retain(|seq, _| !told.has(*seq));
            known.tells(&told, now);
            if let Some(silent) = writers.get_mut(&0) {
                silent.live.retain(|_, live| now.duration_since(live.at) < UNTOLD);
            }
        }
        let is_done = |id: WriteId| id.writer == writer && told.has(id.seq);
        let mut forgotten = self.announced.lock().extract_if(|id, _| is_done(*id)).count() > 0;
        self.undo.lock().retain(|_, all| {
            all.retain(|u| {
                let keep = match u.fate {
                    Fate::Applied => !is_done(u.id),
                    // Until everybody has everything: Intents::gathered.
                    Fate::Loose => true,
                    _ => u.over || now.duration_since(u.at) < REMEMBER,
                };
                forgotten |= !keep;
                keep
            });
            !all.is_empty()
        });
        if forgotten {
            let record = Record::Done { writer, highest, open: open.to_vec() };
            // Not flushed: after a power cut it was not said, which is no harm.
            if let Err(error) = self.log.append(&record, false, || self.logged()) {
                tracing::warn!("cannot log that writes of strips are done: {error}");
            }
        }
    }

    /// The epoch ends: from here on what is not done is unsettled. Nothing is being written.
    pub fn epoch_ends(&self) {
        // From here on this gateway can be asked.
        self.announced.lock().clear();
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
        for (oid, all) in self.undo.lock().iter_mut() {
            all.iter_mut().for_each(|u| u.over = true);
            if has_open(all) {
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

    /// Parity of the object fits in this epoch; homes that ask once more are only told so, as others may write by then.
    pub fn mended(&self, oid: Oid, epoch: Epoch) {
        let mut mended = self.mended.lock();
        mended.retain(|_, e| *e == epoch);
        mended.insert(oid, epoch);
    }

    /// Whether [`Intents::mended`] was called for this epoch.
    pub fn is_mended(&self, oid: Oid, epoch: Epoch) -> bool {
        self.mended.lock().get(&oid) == Some(&epoch)
    }

    /// Takes on the duty to settle an object in this epoch; `None` = somebody has it.
    pub fn take_on(&self, oid: Oid, epoch: Epoch) -> Option<Care> {
        let what = (oid, epoch);
        self.in_care.lock().insert(what).then(|| Care { in_care: self.in_care.clone(), what })
    }

    /// This node's objects are out of date and will be recovered from others, which settled what was to be settled. Writes of
    /// strips of which it is open here whether they stand stay so: the others may yet decide, and read the old strips.
    pub fn leave_to_others(&self) {
        let open: HashSet<Oid> = {
            let undo = self.undo.lock();
            undo.iter().filter(|(_, all)| has_open(all)).map(|(oid, _)| *oid).collect()
        };
        let mut unsettled = self.unsettled.lock();
        for (_, gone) in unsettled.extract_if(|oid, _| !open.contains(oid)) {
            gone.settled.notify_waiters();
        }
        for left in unsettled.values_mut() {
            left.remembered = false;
        }
        self.nr_unsettled.store(unsettled.len(), Ordering::Release);
    }

    /// Another node says that all homes of the object are equal. `false` = it is still open here of writes of it whether they
    /// stand, which may yet be undone: nobody may write over them before.
    #[must_use]
    pub fn equal_elsewhere(&self, oid: Oid) -> bool {
        let decided = self.open_writes(oid).is_empty();
        if decided {
            self.settled(oid);
        }
        decided
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

    /// Waits until every write to the object that came here is known to be done; `false` = that takes too long.
    pub async fn becomes_quiet(&self, oid: Oid) -> bool {
        let quiet = async {
            while self.is_busy(oid) {
                tokio::time::sleep(QUIET_PAUSE).await;
            }
        };
        tokio::time::timeout(QUIET, quiet).await.is_ok()
    }

    /// Whether all homes may have a write of the object that was begun here and of which it is not known that it is done.
    pub fn may_be_done(&self, oid: Oid) -> bool {
        let now = Instant::now();
        let answered =
            |id: u32, live: &Live| now.duration_since(live.at) >= if id == 0 { UNTOLD } else { ANSWERED };
        let begun = self.writers.lock().iter().any(|(id, writer)| {
            writer.live.values().any(|live| live.oid == oid && !live.again && !answered(*id, live))
        });
        begun || self.may_have_done_strip(oid)
    }

    /// Whether a write to the object is not known to be done.
    pub fn is_busy(&self, oid: Oid) -> bool {
        let now = Instant::now();
        let writers = self.writers.lock();
        writers.iter().any(|(id, writer)| {
            writer.live.values().any(|l| l.oid == oid && (*id != 0 || now.duration_since(l.at) < UNTOLD))
        })
    }
}

#[cfg(test)]
mod tests;
