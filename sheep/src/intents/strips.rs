//! Writes of strips that were interrupted: what they replaced, what became of them, and how to undo or to make up for them.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use sheepdog_proto::{Epoch, Oid, Response};
use sheepdog_store::{Replica, Store, StoreError};
use tokio::time::Instant;

use super::{DoneWrites, Fate, Intents, WriteId, Writer, up_to};
use crate::undo_log::Record;

/// A write of a strip and what it replaced.
pub(super) struct Undo {
    pub(super) id: WriteId,
    pub(super) epoch: Epoch,
    pub(super) strip: u8,
    pub(super) offset: u64,
    /// Bytes written.
    pub(super) len: u64,
    /// What they replaced; nothing any more once it is decided about the write.
    pub(super) old: Bytes,
    /// Checksum of what was written.
    pub(super) new: u32,
    pub(super) fate: Fate,
    /// Not carried out, or in part.
    pub(super) torn: bool,
    /// Sent once more since: it is not done without this home.
    pub(super) again: bool,
    /// Its epoch is over, and not everybody has recovered a later one: who was away may ask for it.
    pub(super) over: bool,
    pub(super) at: Instant,
}

impl Announced {
    pub(super) fn record(&self, id: WriteId) -> Record {
        let Announced { replica, epoch, offset, ref data } = *self;
        let (oid, strip) = (replica.oid, replica.strip.unwrap_or(0));
        Record::Announced { oid, strip, epoch, id, offset: offset as u32, data: data.clone() }
    }
}

/// Whether it is open of one of them whether it stands.
pub(super) fn has_open(all: &[Undo]) -> bool {
    all.iter().any(Undo::is_open)
}

impl Undo {
    fn is_open(&self) -> bool {
        self.fate == Fate::Applied
    }

    fn write(&self, oid: Oid) -> Record {
        let Undo { id, epoch, strip, new, .. } = *self;
        // A strip is no longer than an object, whose offsets have 32 bits.
        Record::Write { oid, strip, epoch, id, offset: self.offset as u32, new, old: self.old.clone() }
    }

    pub(super) fn records(&self, oid: Oid) -> Vec<Record> {
        let Undo { id, epoch, fate, .. } = *self;
        let mut out = vec![self.write(oid)];
        if fate != Fate::Applied {
            out.push(Record::Decision { oid, epoch, id, fate });
        }
        out
    }
}

/// A write of a strip of this node that it sends, as its gateway, to the other homes at the same time.
pub(super) struct Announced {
    pub(super) replica: Replica,
    pub(super) epoch: Epoch,
    pub(super) offset: u64,
    pub(super) data: Bytes,
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

/// The writes that were left out of what was read of a strip, in short: their number and a checksum of their ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LeftOut(u64);

/// Where an answer carries it; other sheep leave that zero.
const LEFT_OUT_AT: std::ops::Range<usize> = 12..20;

impl LeftOut {
    /// Of these writes, in any order.
    pub fn of(ids: &[WriteId]) -> LeftOut {
        let mut ids = ids.to_vec();
        ids.sort_unstable();
        ids.dedup();
        let mut hash = crc32fast::Hasher::new();
        for id in &ids {
            hash.update(&id.writer.to_le_bytes());
            hash.update(&id.seq.to_le_bytes());
        }
        match ids.len() as u64 {
            0 => LeftOut(0),
            count => LeftOut(count << 32 | u64::from(hash.finalize())),
        }
    }

    /// Adds it to an answer with what was read.
    pub fn mark(self, mut response: Response) -> Response {
        response.body[LEFT_OUT_AT].copy_from_slice(&self.0.to_le_bytes());
        response
    }

    /// What such an answer says.
    pub fn marked(response: &Response) -> LeftOut {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&response.body[LEFT_OUT_AT]);
        LeftOut(u64::from_le_bytes(bytes))
    }
}

/// Part of a strip as it was before the writes that are open here, for a node that computes another strip from it: such a
/// write is open wherever it arrived as long as that node has no strip to write to. `None` = they come and go too fast.
pub async fn before_open_writes(
    intents: &Intents,
    store: &Store,
    replica: Replica,
    offset: u64,
    len: usize,
) -> Result<Option<(Bytes, LeftOut)>, StoreError> {
    for _ in 0..32 {
        let before = intents.replaced_by_open(replica);
        let bytes = store.read(replica, offset, len).await?;
        let after = intents.replaced_by_open(replica);
        // What was done meanwhile may have been carried out after the read.
        if before.iter().any(|(id, epoch, ..)| !after.iter().any(|(i, e, ..)| (i, e) == (id, epoch))) {
            continue;
        }
        if after.is_empty() {
            return Ok(Some((bytes, LeftOut::default())));
        }
        let ids: Vec<WriteId> = after.iter().map(|(id, ..)| *id).collect();
        tracing::debug!("{replica}: read without {ids:?}");
        let mut bytes = bytes.to_vec();
        after.iter().for_each(|(_, _, at, old)| lay_over(&mut bytes, offset, old, *at));
        return Ok(Some((bytes.into(), LeftOut::of(&ids))));
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
pub(super) struct Logged {
    pub(super) writers: HashMap<u32, Writer>,
    pub(super) undo: HashMap<Oid, Vec<Undo>>,
    pub(super) announced: HashMap<WriteId, Announced>,
    pub(super) since: u32,
}

impl Logged {
    pub(super) fn replay(records: Vec<Record>, now: Instant) -> Logged {
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
                            over: true,
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
                    for undo in all.filter(|u| u.id == id && u.epoch == epoch && u.is_open()) {
                        (undo.fate, undo.old) = (fate, Bytes::new());
                    }
                }
                Record::Done { writer, highest, open } => {
                    let told = DoneWrites { highest, open: open.into_iter().collect() };
                    let done = |id: WriteId| id.writer == writer && told.has(id.seq);
                    out.undo.values_mut().for_each(|all| all.retain(|u| !u.is_open() || !done(u.id)));
                    out.announced.retain(|id, _| !done(*id));
                    out.writers.entry(writer).or_default().tells(&told, now);
                }
                Record::Since(epoch) => out.since = epoch.0,
                Record::Complete => {}
            }
        }
        out.undo.retain(|_, all| !all.is_empty());
        out
    }
}

impl Intents {
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
        let (again, over) = (false, false);
        let undo = Undo { id, epoch, strip, offset, len, old, new, fate, torn, again, over, at };
        let record = undo.write(oid);
        self.undo.lock().entry(oid).or_default().push(undo);
        let logged = self.log.append(&record, true, || self.logged());
        if logged.is_err() {
            self.not_kept(oid, id, epoch, offset);
        }
        logged
    }

    /// The last part that [`Intents::keep`] remembers of a write is not written. Others may have been remembered since.
    pub(super) fn not_kept(&self, oid: Oid, id: WriteId, epoch: Epoch, offset: u64) {
        let mut undo = self.undo.lock();
        let Some(all) = undo.get_mut(&oid) else { return };
        let this = |u: &Undo| (u.id, u.epoch, u.offset) == (id, epoch, offset);
        if let Some(at) = all.iter().rposition(this) {
            all.remove(at);
        }
        if all.is_empty() {
            undo.remove(&oid);
        }
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
                (mine.is_none_or(|u| u.torn && u.is_open()) && !covered, mine.is_some())
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
            for undo in all.iter().filter(|u| u.is_open()) {
                let replica = Replica { oid: *oid, strip: Some(undo.strip) };
                open.entry(replica).or_default().push((undo.offset, undo.new, undo.old.clone()));
            }
        }
        for (replica, writes) in open {
            let mut found = carried_out(store, replica, &writes).await.into_iter();
            let mut undo = self.undo.lock();
            let all = undo.get_mut(&replica.oid).into_iter().flatten();
            for undo in all.filter(|u| u.is_open() && Some(u.strip) == replica.strip) {
                match found.next().flatten() {
                    Some(done) => undo.torn = !done,
                    // Without the strip nothing can be said, and there is nothing to undo.
                    None => undo.fate = Fate::Unknown,
                }
            }
        }
    }

    /// A write is about to be sent to the store, perhaps once more.
    pub fn asked(&self, oid: Oid, id: WriteId) {
        self.not_done_yet(id);
        if let Some(all) = self.undo.lock().get_mut(&oid) {
            all.iter_mut().filter(|u| u.id == id).for_each(|u| u.again = true);
        }
    }

    /// A write is not done without this home.
    pub fn not_done_yet(&self, id: WriteId) {
        if let Some(live) = self.writers.lock().get_mut(&id.writer).and_then(|w| w.live.get_mut(&id.seq)) {
            live.again = true;
        }
    }

    /// This home is read for write `seq` of a gateway, which is therefore not done.
    pub fn read_for(&self, oid: Oid, seq: u32) {
        for writer in self.writers.lock().values_mut() {
            if let Some(live) = writer.live.get_mut(&seq).filter(|live| live.oid == oid) {
                live.again = true;
            }
        }
    }

    /// A write failed.
    pub fn failed(&self, oid: Oid, id: WriteId, epoch: Epoch) {
        self.not_done_yet(id);
        self.carried_out(oid, id, epoch, false);
    }

    fn carried_out(&self, oid: Oid, id: WriteId, epoch: Epoch, whole: bool) {
        if let Some(all) = self.undo.lock().get_mut(&oid)
            && let Some(last) = all.iter_mut().rev().find(|u| u.id == id && u.epoch == epoch)
        {
            last.torn = !whole;
        }
    }

    /// Whether all homes may have a write of a strip of which this one does not know that it is done.
    pub(super) fn may_have_done_strip(&self, oid: Oid) -> bool {
        let undo = self.undo.lock();
        undo.get(&oid).into_iter().flatten().any(|u| u.is_open() && !u.torn && !u.again)
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

    /// All members have every object of `epoch`: what was decided about writes of before will not be asked for.
    pub fn gathered(&self, epoch: Epoch) {
        self.undo.lock().retain(|_, all| {
            all.retain(|u| u.fate != Fate::Loose || !u.epoch.is_before(epoch));
            let old = all.iter_mut().filter(|u| u.epoch.is_before(epoch));
            old.for_each(|u| u.over = false);
            !all.is_empty()
        });
    }

    /// These writes of `epoch` in the order in which they are undone: the newest here first, as the bytes that it replaced are
    /// those that the one before wrote.
    pub fn newest_first(&self, oid: Oid, ids: &[WriteId], epoch: Epoch) -> Vec<WriteId> {
        let undo = self.undo.lock();
        let all = undo.get(&oid).map_or(&[][..], |all| all);
        let place = |id: &WriteId| all.iter().rposition(|u| u.id == *id && u.epoch == epoch);
        let mut ids = ids.to_vec();
        ids.sort_by_key(|id| std::cmp::Reverse(place(id)));
        ids
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

    /// Writes of strips of the object here of which it is open whether they stand, by epoch.
    pub fn open_writes(&self, oid: Oid) -> HashMap<Epoch, Vec<WriteId>> {
        let mut out: HashMap<Epoch, Vec<WriteId>> = HashMap::new();
        for undo in self.undo.lock().get(&oid).into_iter().flatten().filter(|u| u.is_open()) {
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
        let open = all.filter(|u| u.is_open() && Some(u.strip) == replica.strip);
        open.map(|u| (u.id, u.epoch, u.offset, u.old.clone())).collect()
    }

    /// The writes of this strip of which it is open whether they stand.
    pub fn open_of(&self, replica: Replica) -> Vec<WriteId> {
        self.replaced_by_open(replica).into_iter().map(|(id, ..)| id).collect()
    }

    /// Whether it is open of a write of this gateway in an epoch before `epoch` whether it stands.
    pub fn has_open_of_before(&self, writer: u32, epoch: Epoch) -> bool {
        let undo = self.undo.lock();
        undo.values().flatten().any(|u| u.is_open() && u.id.writer == writer && u.epoch.is_before(epoch))
    }

    /// What became of a write of `epoch` here.
    pub fn fate(&self, oid: Oid, id: WriteId, epoch: Epoch) -> Fate {
        let here = |u: &&Undo| u.id == id && u.epoch == epoch;
        let last = |all: &Vec<Undo>| {
            let undo = all.iter().rev().find(here)?;
            Some(if undo.torn && undo.is_open() { Fate::Absent } else { undo.fate })
        };
        if let Some(fate) = self.undo.lock().get(&oid).and_then(last) {
            return fate;
        }
        let done =
            self.writers.lock().get(&id.writer).is_some_and(|w| w.told.is_some() && w.done.has(id.seq));
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
        all.find(|u| u.id == id && u.epoch == epoch).is_some_and(|u| u.torn && u.is_open())
    }

    /// Whether the write of `epoch` stands was decided, and done here. Blocks until that is on disk.
    pub fn decided(&self, oid: Oid, id: WriteId, epoch: Epoch, fate: Fate) -> io::Result<()> {
        let mut known = false;
        if let Some(all) = self.undo.lock().get_mut(&oid) {
            for undo in all.iter_mut().filter(|u| u.id == id && u.epoch == epoch && u.is_open()) {
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
            .filter(|u| u.id == id && u.epoch == epoch && u.is_open())
            .map(|u| (Replica { oid, strip: Some(u.strip) }, u.offset, u.old.clone()))
            .collect();
        parts.reverse();
        parts
    }
}
