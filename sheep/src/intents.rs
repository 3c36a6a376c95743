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

use bytes::Bytes;
use parking_lot::Mutex;
use sheepdog_proto::{Epoch, Oid, Wire};
use sheepdog_store::{Replica, Store, StoreError, SyncMode};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::order::Order;
use crate::undo_log::{Record, UndoLog};

const FILE: &str = "dirty_objects";
/// The side file is written anew when it has this many entries more than objects are in use.
const SLACK: usize = 4096;
/// An object not written to for this long is at rest.
const REST: Duration = Duration::from_secs(30);
/// How long what was decided about a write is remembered: another home may ask.
const REMEMBER: Duration = Duration::from_secs(600);
/// So many gateways are remembered, the latest ones.
const GATEWAYS: usize = 1024;
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
    /// When it last told; `None` = never.
    told: Option<Instant>,
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

/// A write of a strip and what it replaced.
struct Undo {
    id: WriteId,
    epoch: Epoch,
    strip: u8,
    offset: u64,
    /// Bytes written.
    len: u64,
    /// What they replaced; nothing any more once it is decided about the write.
    old: Bytes,
    /// Checksum of what was written.
    new: u32,
    fate: Fate,
    /// Not carried out, or in part.
    torn: bool,
    /// Sent once more since: it is not done without this home.
    again: bool,
    at: Instant,
}

impl Announced {
    fn record(&self, id: WriteId) -> Record {
        let Announced { replica, epoch, offset, ref data } = *self;
        let (oid, strip) = (replica.oid, replica.strip.unwrap_or(0));
        Record::Announced { oid, strip, epoch, id, offset: offset as u32, data: data.clone() }
    }
}

impl Undo {
    fn write(&self, oid: Oid) -> Record {
        let Undo { id, epoch, strip, new, .. } = *self;
        // A strip is no longer than an object, whose offsets have 32 bits.
        Record::Write { oid, strip, epoch, id, offset: self.offset as u32, new, old: self.old.clone() }
    }

    fn records(&self, oid: Oid) -> Vec<Record> {
        let Undo { id, epoch, fate, .. } = *self;
        let mut out = vec![self.write(oid)];
        if fate != Fate::Applied {
            out.push(Record::Decision { oid, epoch, id, fate });
        }
        out
    }
}

/// A write of a strip of this node that it sends, as its gateway, to the other homes at the same time.
struct Announced {
    replica: Replica,
    epoch: Epoch,
    offset: u64,
    data: Bytes,
}

/// Which of these writes of a strip, the oldest first, it has: offset, checksum and what was replaced. `None` = there is
/// no strip, or it cannot be read.
async fn carried_out(store: &Store, replica: Replica, writes: &[(u64, u32, Bytes)]) -> Vec<Option<bool>> {
    let mut out = Vec::new();
    // What they replaced is laid over the strip, one after the other: so it was before each.
    let mut before: Vec<(u64, &Bytes)> = Vec::new();
    for (offset, new, old) in writes.iter().rev() {
        let found = match store.read(replica, *offset, old.len()).await {
            Err(StoreError::NoObject) => match store.stale_epochs(replica).last() {
                Some(epoch) => store.read_stale(replica, *epoch, *offset, old.len()).await,
                None => Err(StoreError::NoObject),
            },
            other => other,
        };
        out.push(found.ok().map(|bytes| {
            let mut bytes = bytes.to_vec();
            before.iter().for_each(|(at, part)| lay_over(&mut bytes, *offset, part, *at));
            crc32fast::hash(&bytes) == *new
        }));
        before.push((*offset, old));
    }
    out.reverse();
    out
}

/// Part of a strip as it was before the writes that are open here, for a node that computes another strip from it: such a
/// write is open wherever it arrived as long as that node has no strip to write to. `None` = they come and go too fast.
pub async fn before_open_writes(
    intents: &Intents,
    store: &Store,
    replica: Replica,
    offset: u64,
    len: usize,
) -> Result<Option<Bytes>, StoreError> {
    for _ in 0..32 {
        let before = intents.replaced_by_open(replica);
        let bytes = store.read(replica, offset, len).await?;
        let after = intents.replaced_by_open(replica);
        // What was done meanwhile may have been carried out after the read.
        if before.iter().any(|(id, epoch, ..)| !after.iter().any(|(i, e, ..)| (i, e) == (id, epoch))) {
            continue;
        }
        if after.is_empty() {
            return Ok(Some(bytes));
        }
        let ids: Vec<WriteId> = after.iter().map(|(id, ..)| *id).collect();
        tracing::debug!("{replica}: read without {ids:?}");
        let mut bytes = bytes.to_vec();
        after.iter().for_each(|(_, _, at, old)| lay_over(&mut bytes, offset, old, *at));
        return Ok(Some(bytes.into()));
    }
    Ok(None)
}

/// Lays `part`, which is at `at`, over `bytes`, which are at `offset`, where they overlap.
fn lay_over(bytes: &mut [u8], offset: u64, part: &[u8], at: u64) {
    let (start, end) = (offset.max(at), (offset + bytes.len() as u64).min(at + part.len() as u64));
    if start < end {
        let (to, from, len) = ((start - offset) as usize, (start - at) as usize, (end - start) as usize);
        bytes[to..to + len].copy_from_slice(&part[from..from + len]);
    }
}

/// What a log says.
struct Logged {
    writers: HashMap<u32, Writer>,
    undo: HashMap<Oid, Vec<Undo>>,
    announced: HashMap<WriteId, Announced>,
    since: u32,
}

impl Logged {
    fn replay(records: Vec<Record>, now: Instant) -> Logged {
        let mut out = Logged {
            writers: HashMap::new(),
            undo: HashMap::new(),
            announced: HashMap::new(),
            since: u32::MAX,
        };
        for record in records {
            match record {
                Record::Write { oid, strip, epoch, id, offset, new, old } => {
                    let offset = u64::from(offset);
                    let all = out.undo.entry(oid).or_default();
                    // A file may begin with a write that is also the first one appended to it.
                    let same = |u: &Undo| (u.id, u.epoch, u.strip, u.offset) == (id, epoch, strip, offset);
                    if !all.iter().any(|u| same(u) && u.old == old) {
                        let (fate, torn) = (Fate::Applied, false);
                        all.push(Undo {
                            id,
                            epoch,
                            strip,
                            offset,
                            len: old.len() as u64,
                            old,
                            new,
                            fate,
                            torn,
                            again: false,
                            at: now,
                        });
                    }
                }
                Record::Announced { oid, strip, epoch, id, offset, data } => {
                    let (replica, offset) = (Replica { oid, strip: Some(strip) }, offset.into());
                    out.announced.insert(id, Announced { replica, epoch, offset, data });
                }
                Record::Decision { oid, epoch, id, fate } => {
                    out.announced.retain(|i, a| *i != id || a.epoch != epoch);
                    let all = out.undo.entry(oid).or_default().iter_mut();
                    for undo in all.filter(|u| u.id == id && u.epoch == epoch && u.fate == Fate::Applied) {
                        (undo.fate, undo.old) = (fate, Bytes::new());
                    }
                }
                Record::Done { writer, highest, open } => {
                    let open: HashSet<u32> = open.into_iter().collect();
                    let done = |id: WriteId| {
                        id.writer == writer && up_to(id.seq, highest) && !open.contains(&id.seq)
                    };
                    out.undo
                        .values_mut()
                        .for_each(|all| all.retain(|u| u.fate != Fate::Applied || !done(u.id)));
                    out.announced.retain(|id, _| !done(*id));
                    let told = Some(now);
                    out.writers.insert(writer, Writer { highest, open, told, ..Writer::default() });
                }
                Record::Since(epoch) => out.since = epoch.0,
                Record::Complete => {}
            }
        }
        out.undo.retain(|_, all| !all.is_empty());
        out
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
        let open = undo.iter().filter(|(_, all)| all.iter().any(|u| u.fate == Fate::Applied));
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

    /// This process takes part from `epoch` on.
    pub fn note(&self, epoch: Epoch) {
        let _ = self.since.compare_exchange(u32::MAX, epoch.0, Ordering::AcqRel, Ordering::Acquire);
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
                highest: w.highest,
                open: w.open.iter().copied().collect(),
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

    fn restart_log(&self) {
        if let Err(error) = self.log.restart(self.logged()) {
            // What is in it is of epochs that nobody asks for any more.
            tracing::error!("cannot begin a new log of writes of strips: {error}");
        }
    }

    /// Remembers what a write of `data` to a strip is about to replace. Blocks until that is on disk; the strip must not be written
    /// before, nor if it fails.
    pub fn keep(
        &self,
        replica: Replica,
        id: WriteId,
        epoch: Epoch,
        offset: u64,
        old: Bytes,
        data: &[u8],
    ) -> io::Result<()> {
        if id.writer == 0 {
            return Ok(()); // nobody would say when it is done
        }
        let (oid, strip) = (replica.oid, replica.strip.unwrap_or(0));
        let new = crc32fast::hash(data);
        let (fate, torn, at) = (Fate::Applied, false, Instant::now());
        let len = old.len() as u64;
        let undo = Undo { id, epoch, strip, offset, len, old, new, fate, torn, again: false, at };
        let record = undo.write(oid);
        self.undo.lock().entry(oid).or_default().push(undo);
        let logged = self.log.append(&record, true, || self.logged());
        if logged.is_err()
            && let Some(all) = self.undo.lock().get_mut(&oid)
        {
            // It is as before: the same bytes written back would be no harm either.
            all.pop_if(|u| u.id == id && u.epoch == epoch);
        }
        logged
    }

    /// A write is about to be sent to all homes of strips, of which this node is one. If it dies before its own strip is
    /// written, it does that when it returns, so that it does not lack what all others have.
    pub fn announce(&self, replica: Replica, id: WriteId, epoch: Epoch, offset: u64, data: Bytes) {
        let announced = Announced { replica, epoch, offset, data };
        let record = announced.record(id);
        self.announced.lock().insert(id, announced);
        if let Err(error) = self.log.append(&record, false, || self.logged()) {
            tracing::warn!("{}: cannot log a write: {error}", replica.oid);
        }
    }

    /// Carries out what was announced in `epoch`, the last one of the process before, and is missing here.
    async fn make_up(&self, store: &Store, epoch: Epoch) {
        let announced = std::mem::take(&mut *self.announced.lock());
        let mut announced: Vec<(WriteId, Announced)> =
            announced.into_iter().filter(|(_, a)| a.epoch == epoch).collect();
        announced.sort_by_key(|(id, _)| *id);
        for (id, Announced { replica, offset, data, .. }) in announced {
            let (missing, logged) = {
                let undo = self.undo.lock();
                let all = || {
                    undo.get(&replica.oid).into_iter().flatten().filter(|u| Some(u.strip) == replica.strip)
                };
                let mine = all().rev().find(|u| u.id == id && u.epoch == epoch);
                // What was written over it since is not in doubt; of other gateways nobody knows the order.
                let newer =
                    |u: &&Undo| u.id.writer != id.writer || (u.id.seq != id.seq && up_to(id.seq, u.id.seq));
                let end = offset + data.len() as u64;
                let covered = all().filter(newer).any(|u| u.offset < end && offset < u.offset + u.len);
                (mine.is_none_or(|u| u.torn && u.fate == Fate::Applied) && !covered, mine.is_some())
            };
            if !missing {
                continue;
            }
            let Some(size) = store.file_len(replica) else { continue };
            let Ok(old) = store.read(replica, offset, data.len()).await else { continue };
            // One that was begun has told what was there before.
            let kept = if logged { Ok(()) } else { self.keep(replica, id, epoch, offset, old, &data) };
            let made_up = match kept {
                Ok(()) => store.write(replica, size, offset, data).await.map_err(|e| e.to_string()),
                Err(error) => Err(error.to_string()),
            };
            match &made_up {
                Ok(()) => tracing::info!("{replica}: write {id:?} of epoch {epoch} is made up for"),
                Err(e) => tracing::warn!("{replica}: write {id:?} of epoch {epoch} is not made up for: {e}"),
            }
            self.carried_out(replica.oid, id, epoch, made_up.is_ok());
        }
    }

    /// Looks which open writes of an earlier process, whose last epoch was `last`, were carried out: they are logged before.
    pub async fn verify(&self, store: &Store, last: Epoch) {
        self.look(store).await;
        self.make_up(store, last).await;
    }

    async fn look(&self, store: &Store) {
        let mut open: HashMap<Replica, Vec<(u64, u32, Bytes)>> = HashMap::new();
        for (oid, all) in self.undo.lock().iter() {
            for undo in all.iter().filter(|u| u.fate == Fate::Applied) {
                let replica = Replica { oid: *oid, strip: Some(undo.strip) };
                open.entry(replica).or_default().push((undo.offset, undo.new, undo.old.clone()));
            }
        }
        for (replica, writes) in open {
            let mut found = carried_out(store, replica, &writes).await.into_iter();
            let mut undo = self.undo.lock();
            let all = undo.get_mut(&replica.oid).into_iter().flatten();
            for undo in all.filter(|u| u.fate == Fate::Applied && Some(u.strip) == replica.strip) {
                match found.next().flatten() {
                    Some(done) => undo.torn = !done,
                    // Without the strip nothing can be said, and there is nothing to undo.
                    None => undo.fate = Fate::Unknown,
                }
            }
        }
    }

    /// A write of a strip is about to be sent to the store, perhaps once more.
    pub fn asked(&self, oid: Oid, id: WriteId) {
        if let Some(all) = self.undo.lock().get_mut(&oid) {
            all.iter_mut().filter(|u| u.id == id).for_each(|u| u.again = true);
        }
    }

    /// A write of a strip failed.
    pub fn failed(&self, oid: Oid, id: WriteId, epoch: Epoch) {
        self.carried_out(oid, id, epoch, false);
    }

    fn carried_out(&self, oid: Oid, id: WriteId, epoch: Epoch, whole: bool) {
        if let Some(all) = self.undo.lock().get_mut(&oid)
            && let Some(last) = all.iter_mut().rev().find(|u| u.id == id && u.epoch == epoch)
        {
            last.torn = !whole;
        }
    }

    /// Whether all homes may have a write of the object of which this one does not know that it is done.
    pub fn may_be_done(&self, oid: Oid) -> bool {
        let undo = self.undo.lock();
        undo.get(&oid).into_iter().flatten().any(|u| u.fate == Fate::Applied && !u.torn && !u.again)
    }

    /// Writes that were kept loosely.
    pub fn loose(&self) -> Vec<(Oid, Epoch, WriteId)> {
        let undo = self.undo.lock();
        let all = undo.iter().flat_map(|(oid, all)| all.iter().map(move |u| (oid, u)));
        let mut out: Vec<_> =
            all.filter(|(_, u)| u.fate == Fate::Loose).map(|(oid, u)| (*oid, u.epoch, u.id)).collect();
        out.dedup();
        out
    }

    /// All members have every object of `epoch`: what was kept loosely before will not be asked for.
    pub fn forget_loose(&self, epoch: Epoch) {
        self.undo.lock().retain(|_, all| {
            all.retain(|u| u.fate != Fate::Loose || !u.epoch.is_before(epoch));
            !all.is_empty()
        });
    }

    /// Whether the decision about a write of `epoch` may wait for homes that are away: not longer than `limit`.
    pub fn may_wait(&self, oid: Oid, epoch: Epoch, limit: Duration) -> bool {
        let mut waiting = self.waiting.lock();
        waiting.retain(|_, since| since.elapsed() < 4 * limit);
        waiting.entry((oid, epoch)).or_insert_with(Instant::now).elapsed() < limit
    }

    /// The object is about to be created anew or removed: its writes before that are over.
    pub fn replaced(&self, oid: Oid) -> io::Result<()> {
        let open: Vec<(Epoch, Vec<WriteId>)> = self.open_writes(oid).into_iter().collect();
        for (epoch, ids) in open {
            for id in ids {
                self.decided(oid, id, epoch, Fate::Kept)?;
            }
        }
        let announced: Vec<(WriteId, Announced)> =
            self.announced.lock().extract_if(|_, a| a.replica.oid == oid).collect();
        for (id, Announced { epoch, .. }) in announced {
            self.log
                .append(&Record::Decision { oid, epoch, id, fate: Fate::Kept }, true, || self.logged())?;
        }
        Ok(())
    }

    /// A gateway says: every write up to `highest` is done, except `open`.
    pub fn done(&self, writer: u32, highest: u32, open: &[u32]) {
        let now = Instant::now();
        let open: HashSet<u32> = open.iter().copied().collect();
        {
            let mut writers = self.writers.lock();
            let known = writers.entry(writer).or_default();
            known.live.retain(|seq, _| !up_to(*seq, highest) || open.contains(seq));
            if known.told.is_none() || up_to(known.highest, highest) {
                (known.highest, known.open) = (highest, open.clone());
            }
            known.told = Some(now);
            if let Some(silent) = writers.get_mut(&0) {
                silent.live.retain(|_, live| now.duration_since(live.at) < UNTOLD);
            }
        }
        let is_done = |id: WriteId| id.writer == writer && up_to(id.seq, highest) && !open.contains(&id.seq);
        let mut forgotten = self.announced.lock().extract_if(|id, _| is_done(*id)).count() > 0;
        self.undo.lock().retain(|_, all| {
            all.retain(|u| {
                let keep = match u.fate {
                    Fate::Applied => !is_done(u.id),
                    Fate::Loose => true, // until everybody has everything: Intents::forget_loose
                    _ => now.duration_since(u.at) < REMEMBER,
                };
                forgotten |= !keep;
                keep
            });
            !all.is_empty()
        });
        if forgotten {
            let record = Record::Done { writer, highest, open: open.into_iter().collect() };
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
            let open = undo.iter().filter(|(_, all)| all.iter().any(|u| u.fate == Fate::Applied));
            open.map(|(oid, _)| *oid).collect()
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

    /// What the open writes of this strip replaced, the newest first, and which they are.
    pub fn replaced_by_open(&self, replica: Replica) -> Vec<(WriteId, Epoch, u64, Bytes)> {
        let undo = self.undo.lock();
        let all = undo.get(&replica.oid).into_iter().flatten().rev();
        let open = all.filter(|u| u.fate == Fate::Applied && Some(u.strip) == replica.strip);
        open.map(|u| (u.id, u.epoch, u.offset, u.old.clone())).collect()
    }

    /// What became of a write of `epoch` here.
    pub fn fate(&self, oid: Oid, id: WriteId, epoch: Epoch) -> Fate {
        let here = |u: &&Undo| u.id == id && u.epoch == epoch;
        let last = |all: &Vec<Undo>| {
            let undo = all.iter().rev().find(here)?;
            Some(if undo.torn && undo.fate == Fate::Applied { Fate::Absent } else { undo.fate })
        };
        if let Some(fate) = self.undo.lock().get(&oid).and_then(last) {
            return fate;
        }
        let done = self
            .writers
            .lock()
            .get(&id.writer)
            .is_some_and(|w| w.told.is_some() && up_to(id.seq, w.highest) && !w.open.contains(&id.seq));
        match (done, epoch.0 < self.since.load(Ordering::Acquire)) {
            (true, _) => Fate::Done,
            (false, true) => Fate::Unknown,
            (false, false) => Fate::Absent,
        }
    }

    /// Whether a write of `epoch` is known here that was carried out in part or not at all.
    pub fn is_torn(&self, oid: Oid, id: WriteId, epoch: Epoch) -> bool {
        let undo = self.undo.lock();
        let mut all = undo.get(&oid).into_iter().flatten().rev();
        all.find(|u| u.id == id && u.epoch == epoch).is_some_and(|u| u.torn && u.fate == Fate::Applied)
    }

    /// Whether the write of `epoch` stands was decided, and done here. Blocks until that is on disk.
    pub fn decided(&self, oid: Oid, id: WriteId, epoch: Epoch, fate: Fate) -> io::Result<()> {
        let mut known = false;
        if let Some(all) = self.undo.lock().get_mut(&oid) {
            for undo in all.iter_mut().filter(|u| u.id == id && u.epoch == epoch && u.fate == Fate::Applied) {
                (undo.fate, undo.old, undo.at, known) = (fate, Bytes::new(), Instant::now(), true);
            }
        }
        if !known {
            return Ok(());
        }
        self.log.append(&Record::Decision { oid, epoch, id, fate }, true, || self.logged())
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
            intents.keep(replica, ID, Epoch(4), 0, Bytes::from_static(old), b"new").expect("logged");
        }
        assert_eq!(intents.fate(Oid(3), ID, Epoch(4)), Fate::Applied);
        let old: Vec<Bytes> =
            intents.to_undo(Oid(3), ID, Epoch(4)).into_iter().map(|(_, _, old)| old).collect();
        assert_eq!(old, [&b"bb"[..], b"aa"]);
        intents.decided(Oid(3), ID, Epoch(4), Fate::Undone).expect("logged");
        assert_eq!(intents.fate(Oid(3), ID, Epoch(4)), Fate::Undone);
        assert!(intents.open_writes(Oid(3)).is_empty());
        let other = WriteId { seq: 6, ..ID };
        assert_eq!(intents.fate(Oid(3), other, Epoch(4)), Fate::Absent);
        assert_eq!(intents.fate(Oid(3), other, Epoch(1)), Fate::Unknown, "before this process");
        intents.done(9, 6, &[]);
        assert_eq!(intents.fate(Oid(3), other, Epoch(4)), Fate::Done);
    }
    #[test]
    fn after_a_restart_open_writes_of_strips_are_known() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let intents = intents(dir.path());
        intents.note(Epoch(2));
        let replica = Replica { oid: Oid(3), strip: Some(1) };
        let ids: Vec<WriteId> = (1..=4).map(|seq| WriteId { writer: 9, seq }).collect();
        for id in &ids {
            intents.keep(replica, *id, Epoch(4), 512, Bytes::from_static(b"old"), b"new").expect("logged");
        }
        intents.done(9, 1, &[]);
        intents.decided(Oid(3), ids[1], Epoch(4), Fate::Undone).expect("logged");
        intents.decided(Oid(3), ids[2], Epoch(4), Fate::Kept).expect("logged");
        // Once read from what was appended, once from what a file begins with.
        for restarted in [false, true] {
            if restarted {
                intents.restart_log();
            }
            let again = super::tests::intents(dir.path());
            assert_eq!(again.unsettled(), [Oid(3)]);
            assert!(!again.is_remembered(Oid(3)), "all its writes are known");
            let fates: Vec<Fate> = ids.iter().map(|id| again.fate(Oid(3), *id, Epoch(4))).collect();
            assert_eq!(fates, [Fate::Done, Fate::Undone, Fate::Kept, Fate::Applied]);
            assert_eq!(again.to_undo(Oid(3), ids[3], Epoch(4)), [(replica, 512, Bytes::from_static(b"old"))]);
            assert_eq!(again.fate(Oid(3), WriteId { seq: 5, ..ids[0] }, Epoch(2)), Fate::Absent);
            assert_eq!(again.fate(Oid(3), WriteId { seq: 5, ..ids[0] }, Epoch(1)), Fate::Unknown);
        }
        intents.enter(Oid(8)).expect("entered");
        let again = super::tests::intents(dir.path());
        again.leave_to_others();
        assert_eq!(again.unsettled(), [Oid(3)], "others may yet decide about it");
        again.decided(Oid(3), ids[3], Epoch(4), Fate::Undone).expect("logged");
        again.leave_to_others();
        assert!(again.all_settled());
    }
    #[tokio::test]
    async fn after_a_restart_what_is_logged_is_told_from_what_was_carried_out() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (meta, disk) = (dir.path().join("meta"), dir.path().join("disk"));
        std::fs::create_dir_all(&meta).expect("directory");
        let (store, _) = Store::open(&[disk], sheepdog_store::StoreOptions::default()).expect("store");
        let replica = Replica { oid: Oid(3), strip: Some(1) };
        store.create(replica, 8192, 0, Bytes::from(vec![b'-'; 8192])).await.expect("created");
        let first = intents(&meta);
        first.note(Epoch(2));
        // Overlapping ones; the last two only in part and not at all.
        let writes = [(0, "aaaa"), (2, "bbbb"), (4, "cccc"), (4000, "dddd")];
        let id = |n: usize| WriteId { writer: 9, seq: n as u32 + 1 };
        for (n, (offset, new)) in writes.iter().enumerate() {
            let old = store.read(replica, *offset, 4).await.expect("read");
            first.keep(replica, id(n), Epoch(4), *offset, old, new.as_bytes()).expect("logged");
            let carried_out = &new[..[4, 4, 2, 0][n]];
            store.write(replica, 8192, *offset, carried_out.into()).await.expect("written");
        }
        let again = intents(&meta);
        again.verify(&store, Epoch(4)).await;
        let fates: Vec<Fate> = (0..4).map(|n| again.fate(replica.oid, id(n), Epoch(4))).collect();
        assert_eq!(fates, [Fate::Applied, Fate::Applied, Fate::Absent, Fate::Absent]);
        assert_eq!(again.to_undo(replica.oid, id(2), Epoch(4)), [(replica, 4, Bytes::from_static(b"bb--"))]);

        again.replaced(replica.oid).expect("logged");
        store.remove(replica).await.expect("removed");
        first.verify(&store, Epoch(4)).await;
        assert_eq!(first.fate(replica.oid, id(0), Epoch(4)), Fate::Unknown, "there is no strip");
        let third = intents(&meta);
        assert_eq!(third.fate(replica.oid, id(3), Epoch(4)), Fate::Kept);
    }

    #[tokio::test]
    async fn what_was_announced_and_not_written_is_made_up_for() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (meta, disk) = (dir.path().join("meta"), dir.path().join("disk"));
        std::fs::create_dir_all(&meta).expect("directory");
        let (store, _) = Store::open(&[disk], sheepdog_store::StoreOptions::default()).expect("store");
        let strip = |oid| Replica { oid: Oid(oid), strip: Some(1) };
        for oid in 1..=5 {
            store.create(strip(oid), 8192, 0, Bytes::from(vec![b'-'; 8192])).await.expect("created");
        }
        let first = intents(&meta);
        first.note(Epoch(2));
        let id = |n: u32| WriteId { writer: 9, seq: n };
        let announce = |oid: u64, n, epoch| {
            first.announce(strip(oid), id(n), Epoch(epoch), 0, Bytes::from_static(b"new"));
        };
        announce(1, 1, 4); // nothing more
        announce(2, 2, 4); // logged, not written
        first.keep(strip(2), id(2), Epoch(4), 0, Bytes::from_static(b"---"), b"new").expect("logged");
        announce(3, 3, 3); // of an epoch that others have settled
        announce(4, 4, 4); // done
        announce(5, 5, 4); // taken back
        first.keep(strip(5), id(5), Epoch(4), 0, Bytes::from_static(b"---"), b"new").expect("logged");
        first.decided(Oid(5), id(5), Epoch(4), Fate::Undone).expect("logged");
        first.done(9, 5, &[1, 2, 3, 5]);
        for restarted in [false, true] {
            if restarted {
                first.restart_log();
            }
            let again = intents(&meta);
            again.verify(&store, Epoch(4)).await;
            let mut found = Vec::new();
            for oid in 1..=5 {
                found.push(store.read(strip(oid), 0, 3).await.expect("read"));
                store.write(strip(oid), 8192, 0, Bytes::from_static(b"---")).await.expect("written");
            }
            assert_eq!(found, [&b"new"[..], b"new", b"---", b"---", b"---"]);
            assert_eq!(again.fate(Oid(1), id(1), Epoch(4)), Fate::Applied);
            assert_eq!(again.fate(Oid(2), id(2), Epoch(4)), Fate::Applied);
            assert_eq!(again.to_undo(Oid(2), id(2), Epoch(4)).len(), 1);
            assert_eq!(again.fate(Oid(3), id(3), Epoch(4)), Fate::Absent);
        }
    }

    #[test]
    fn writes_kept_loosely_are_told_until_everybody_has_everything() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let first = intents(dir.path());
        let replica = Replica { oid: Oid(3), strip: Some(1) };
        first.keep(replica, ID, Epoch(4), 0, Bytes::from_static(b"old"), b"new").expect("logged");
        first.decided(Oid(3), ID, Epoch(4), Fate::Loose).expect("logged");
        let again = intents(dir.path());
        again.done(9, 100, &[]);
        assert_eq!(again.loose(), [(Oid(3), Epoch(4), ID)]);
        assert!(again.open_writes(Oid(3)).is_empty());
        again.forget_loose(Epoch(4));
        assert_eq!(again.loose().len(), 1);
        again.forget_loose(Epoch(5));
        assert!(again.loose().is_empty());
    }
}
