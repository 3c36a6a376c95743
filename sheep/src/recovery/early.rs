//! Writes that come before their object.
//!
//! A node that became a home of an object with this epoch, and has not recovered it yet, need not let a write of part of it
//! wait: it logs the write, and recovery puts it on top of the copy that it makes ([`finish`]). Every write that is acknowledged
//! in an epoch reaches every home of the object, so what is logged here of the epoch is *all* that happened to the object in it:
//! on top of any version of the epoch before it gives the present one.
//!
//! While writes of the epoch are logged the object is *open* here: nothing but such writes, and recovery, touches the file that
//! recovery makes, and this node has nothing of the object to give to others. What is logged of an epoch that ended before the
//! object was recovered stays until everybody has everything. Then "I have no version of that epoch" no longer means that nothing
//! was written in it (A1 of spec 06, 15.1); a node that searches takes the logged writes instead and goes on to the epoch
//! before ([`ask`]). So an early write is as durable as any other: with the version before it, on as many nodes.
//!
//! The log is `early_writes` in the metadata directory. It is filled with zeros in advance and written from its beginning again
//! whenever nothing in it is of interest. If it is full, writes wait for their objects. A record, little endian, 36 bytes and
//! its payload:
//!
//! | bytes | |
//! |---|---|
//! | 0..4 | magic `SDEW` |
//! | 4..8 | CRC-32 of all that follows, payload included |
//! | 8..16 | generation: how often the log began anew; a record of another one than the first ends the log |
//! | 16..20 | length of the payload; all bits set: not a write, the object's are in its file, or of no interest |
//! | 20..24 | epoch; 0 = all |
//! | 24..28 | offset in the object, in bytes |
//! | 28..36 | object id |

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use parking_lot::Mutex;
use sheepdog_proto::header::{OrderRequest, order};
use sheepdog_proto::{Epoch, NodeId, Oid, Opcode, Request, Response, ResultCode, Wire};
use sheepdog_store::{Store, StoreError};

use super::Active;
use super::object::COPY_DEADLINE;
use crate::faults::{peer_result, unnoted};
use crate::intents::WriteId;
use crate::order::Order;
use crate::peers::Lane;
use crate::sheep::Sheep;
use crate::view::View;

const FILE: &str = "early_writes";
const MAGIC: &[u8; 4] = b"SDEW";
const HEADER: usize = 36;
/// Deadline of the question whether a member knows of early writes.
const KNOWN_DEADLINE: Duration = Duration::from_secs(2);
/// In the place of a payload's length.
const DROPPED: u32 = u32::MAX;
/// The log is not longer than this, in bytes.
const LIMIT: u64 = 128 << 20;
/// It grows by so many bytes at once.
const STEP: u64 = 8 << 20;
/// Longer writes wait for their object, in bytes.
const LONGEST: usize = 256 << 10;

/// A write: where, and what.
pub type Patch = (u64, Bytes);

/// A write in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    epoch: Epoch,
    id: WriteId,
    offset: u32,
    len: u32,
    /// Where its payload is in the log.
    at: u64,
}

#[derive(Default)]
struct Log {
    file: Option<Arc<File>>,
    generation: u64,
    at: u64,
    /// Up to here it is filled.
    len: u64,
    /// Bytes appended since the start of the process.
    appended: u64,
    writes: HashMap<Oid, Vec<Entry>>,
}

/// See the module's documentation.
pub struct EarlyWrites {
    path: PathBuf,
    durable: bool,
    log: Mutex<Log>,
    /// `appended` of what is on disk; `None` = a flush failed, and nobody knows what is.
    synced: Mutex<Option<u64>>,
    /// Objects with writes.
    objects: AtomicUsize,
    /// Held while a write is logged, and while the log of an object becomes part of its file.
    turns: Order,
}

/// What became of a write.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken {
    /// It is in the log.
    Yes,
    /// The object is here by now.
    Here,
    /// It must wait for the object.
    Wait,
}

fn encode(generation: u64, len: u32, epoch: Epoch, offset: u32, oid: Oid, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + payload.len());
    out.extend(MAGIC);
    out.extend([0; 4]);
    out.extend(generation.to_le_bytes());
    [len, epoch.0, offset].iter().for_each(|n| out.extend(n.to_le_bytes()));
    out.extend(oid.0.to_le_bytes());
    out.extend(payload);
    let crc = crc32fast::hash(&out[8..]);
    out[4..8].copy_from_slice(&crc.to_le_bytes());
    out
}

/// What a log says: its generation, its end and the writes that are of interest.
fn parse(bytes: &[u8]) -> (u64, u64, HashMap<Oid, Vec<Entry>>) {
    let (mut generation, mut at) = (None, 0);
    let mut writes: HashMap<Oid, Vec<Entry>> = HashMap::new();
    while let Some(header) = bytes.get(at..at + HEADER) {
        let len = u32::get(&header[16..]);
        let payload = if len == DROPPED { 0 } else { len as usize };
        let Some(body) = bytes.get(at + 8..).and_then(|rest| rest.get(..HEADER - 8 + payload)) else { break };
        let whole = header[..4] == *MAGIC && u32::get(&header[4..]) == crc32fast::hash(body);
        if !whole || *generation.get_or_insert(u64::get(&header[8..])) != u64::get(&header[8..]) {
            break;
        }
        let (epoch, oid) = (Epoch(u32::get(&header[20..])), Oid::get(&header[28..]));
        if len == DROPPED {
            remove(&mut writes, oid, epoch, u64::MAX);
        } else {
            let offset = u32::get(&header[24..]);
            let entry = Entry { epoch, id: WriteId::default(), offset, len, at: (at + HEADER) as u64 };
            writes.entry(oid).or_default().push(entry);
        }
        at += HEADER + payload;
    }
    (generation.unwrap_or(0), at as u64, writes)
}

/// Removes the writes of an object in an epoch, 0 = in all, as far as they are before a position of the log.
fn remove(writes: &mut HashMap<Oid, Vec<Entry>>, oid: Oid, epoch: Epoch, before: u64) {
    if let Some(all) = writes.get_mut(&oid) {
        all.retain(|entry| entry.at > before || epoch != Epoch(0) && entry.epoch != epoch);
        if all.is_empty() {
            writes.remove(&oid);
        }
    }
}

impl EarlyWrites {
    /// Reads the log.
    pub fn open(base: &Path, durable: bool) -> io::Result<EarlyWrites> {
        let path = base.join(FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        let (generation, at, writes) = parse(&bytes);
        if at < bytes.len() as u64 {
            // What is left of earlier generations, and of a record that was cut off, is not to be taken for a continuation.
            let file = OpenOptions::new().write(true).open(&path)?;
            file.set_len(at)?;
            file.sync_all()?;
        }
        let log = Log { generation, at, len: at, writes, ..Log::default() };
        Ok(EarlyWrites {
            path,
            durable,
            objects: AtomicUsize::new(log.writes.len()),
            log: Mutex::new(log),
            synced: Mutex::new(Some(0)),
            turns: Order::default(),
        })
    }

    /// Whether writes of any epoch are logged for the object.
    pub fn has(&self, oid: Oid) -> bool {
        self.objects.load(Ordering::Acquire) > 0 && self.log.lock().writes.contains_key(&oid)
    }

    /// Whether writes of `epoch` are.
    pub fn has_of(&self, oid: Oid, epoch: Epoch) -> bool {
        self.objects.load(Ordering::Acquire) > 0
            && self.log.lock().writes.get(&oid).is_some_and(|all| all.iter().any(|e| e.epoch == epoch))
    }

    /// The objects that have some.
    pub fn oids(&self) -> Vec<Oid> {
        match self.objects.load(Ordering::Acquire) {
            0 => Vec::new(),
            _ => self.log.lock().writes.keys().copied().collect(),
        }
    }

    /// The writes of an epoch in their order, without the first `skip`.
    pub fn writes(&self, oid: Oid, epoch: Epoch, skip: usize) -> io::Result<Vec<Patch>> {
        if self.objects.load(Ordering::Acquire) == 0 {
            return Ok(Vec::new());
        }
        let (file, entries) = {
            let mut log = self.log.lock();
            let all = log.writes.get(&oid).into_iter().flatten();
            let entries: Vec<Entry> = all.filter(|e| e.epoch == epoch).skip(skip).copied().collect();
            if entries.is_empty() {
                return Ok(Vec::new());
            }
            (self.file(&mut log)?, entries)
        };
        let read = |entry: Entry| {
            let mut data = vec![0; entry.len as usize];
            file.read_exact_at(&mut data, entry.at)?;
            Ok((u64::from(entry.offset), data.into()))
        };
        entries.into_iter().map(read).collect()
    }

    fn file(&self, log: &mut Log) -> io::Result<Arc<File>> {
        if let Some(file) = &log.file {
            return Ok(file.clone());
        }
        let mut options = OpenOptions::new();
        let file = options.create(true).truncate(false).read(true).write(true).open(&self.path)?;
        if self.durable
            && let Some(dir) = self.path.parent()
        {
            File::open(dir)?.sync_data()?;
        }
        Ok(log.file.insert(Arc::new(file)).clone())
    }

    /// Appends a record; returns where its payload is, and `appended` after it. `None` = there is no room.
    fn append(
        &self,
        log: &mut Log,
        len: u32,
        epoch: Epoch,
        offset: u32,
        oid: Oid,
        payload: &[u8],
    ) -> io::Result<Option<(u64, u64)>> {
        if log.writes.is_empty() {
            (log.at, log.generation) = (0, log.generation + 1);
        }
        let end = log.at + (HEADER + payload.len()) as u64;
        if end > LIMIT && len != DROPPED {
            return Ok(None);
        }
        let file = self.file(log)?;
        if end > log.len {
            let upto = end.next_multiple_of(STEP);
            if self.durable {
                let zeros = vec![0; 1 << 20];
                for at in (log.len..upto).step_by(zeros.len()) {
                    file.write_all_at(&zeros[..zeros.len().min((upto - at) as usize)], at)?;
                }
                file.sync_all()?;
            } else {
                file.set_len(upto)?;
            }
            log.len = upto;
        }
        let record = encode(log.generation, len, epoch, offset, oid, payload);
        file.write_all_at(&record, log.at)?;
        let payload_at = log.at + HEADER as u64;
        log.at = end;
        log.appended += record.len() as u64;
        Ok(Some((payload_at, log.appended)))
    }

    /// One flush serves everybody who waits for one.
    fn sync(&self, mine: u64) -> io::Result<()> {
        if !self.durable {
            return Ok(());
        }
        let mut synced = self.synced.lock();
        match *synced {
            None => return Err(io::Error::other("an earlier flush of the log of early writes failed")),
            Some(upto) if upto >= mine => return Ok(()),
            Some(_) => {}
        }
        let (file, upto) = {
            let log = self.log.lock();
            (log.file.clone(), log.appended)
        };
        let flushed = file.map_or(Ok(()), |file| file.sync_data());
        *synced = flushed.is_ok().then_some(upto);
        flushed
    }

    /// Logs a write, durably. `false` = there is no room.
    fn add(&self, oid: Oid, epoch: Epoch, id: WriteId, offset: u32, payload: &[u8]) -> io::Result<bool> {
        let mine = {
            let mut log = self.log.lock();
            let len = payload.len() as u32;
            let Some((at, mine)) = self.append(&mut log, len, epoch, offset, oid, payload)? else {
                return Ok(false);
            };
            log.writes.entry(oid).or_default().push(Entry { epoch, id, offset, len, at });
            self.objects.store(log.writes.len(), Ordering::Release);
            mine
        };
        self.sync(mine).map(|()| true)
    }

    /// Whether this write is in the log already.
    fn knows(&self, oid: Oid, epoch: Epoch, id: WriteId) -> bool {
        let log = self.log.lock();
        let mut all = log.writes.get(&oid).into_iter().flatten();
        id.writer != 0 && all.any(|e| (e.epoch, e.id) == (epoch, id))
    }

    /// The writes of objects in an epoch (0 = in all) are not of interest any more. They count until that is durable.
    fn drop_of(&self, oids: &[Oid], epoch: Epoch) -> io::Result<()> {
        let (mut mine, mut dropped) = (0, Vec::new());
        {
            let mut log = self.log.lock();
            for oid in oids.iter().filter(|oid| log.writes.contains_key(oid)).copied().collect::<Vec<_>>() {
                if let Some((at, upto)) = self.append(&mut log, DROPPED, epoch, 0, oid, &[])? {
                    mine = upto;
                    dropped.push((oid, at));
                }
            }
        }
        self.sync(mine)?;
        let mut log = self.log.lock();
        for (oid, before) in dropped {
            remove(&mut log.writes, oid, epoch, before);
        }
        self.objects.store(log.writes.len(), Ordering::Release);
        Ok(())
    }

    fn drop_all(&self, oid: Oid) -> io::Result<()> {
        self.drop_of(&[oid], Epoch(0))
    }

    /// Everybody has everything of `epoch`.
    pub fn gathered(&self, epoch: Epoch) {
        let over: Vec<Oid> = {
            let log = self.log.lock();
            let is_over = |all: &[Entry]| all.iter().all(|e| !epoch.is_before(e.epoch));
            log.writes.iter().filter(|(_, all)| is_over(all)).map(|(oid, _)| *oid).collect()
        };
        if let Err(error) = self.drop_of(&over, Epoch(0)) {
            tracing::warn!("cannot note that early writes of gathered epochs are of no interest: {error}");
        }
    }

    /// In the middle of `epoch`, after copies were altered, this node may be the home of these objects only: of others it does
    /// not get all writes any more.
    pub fn keep_homes(&self, epoch: Epoch, may_be_home: impl Fn(Oid) -> bool) -> io::Result<()> {
        let mut moved = self.oids();
        moved.retain(|oid| self.has_of(*oid, epoch) && !may_be_home(*oid));
        self.drop_of(&moved, epoch)
    }

    /// Forgets everything (MAKE_FS).
    pub fn clear(&self) -> io::Result<()> {
        let mut log = self.log.lock();
        log.writes.clear();
        self.objects.store(0, Ordering::Release);
        if log.len > 0 {
            let file = self.file(&mut log)?;
            file.set_len(0)?;
            file.sync_all()?;
        }
        (log.at, log.len) = (0, 0);
        Ok(())
    }

    /// After a start: what a crash kept from becoming part of files that recovery had made. `latest` is the epoch of the crash.
    /// Of an earlier epoch nothing is missing in such a file.
    pub async fn complete_files(&self, store: &Store, latest: Epoch) -> Result<(), StoreError> {
        for oid in self.oids() {
            let replica = Sheep::replica(oid);
            let Some(size) = store.file_len(replica) else { continue };
            if let Err(error) = self.complete_file(store, oid, size, latest).await {
                tracing::error!(
                    "{oid} lacks writes that came before it, it is to be recovered again: {error}"
                );
                store.remove(replica).await?;
            }
        }
        Ok(())
    }

    async fn complete_file(
        &self,
        store: &Store,
        oid: Oid,
        size: u64,
        latest: Epoch,
    ) -> Result<(), StoreError> {
        for (offset, data) in self.writes(oid, latest, 0).map_err(StoreError::Io)? {
            store.write(Sheep::replica(oid), size, offset, data).await?;
        }
        self.drop_all(oid).map_err(StoreError::Io)
    }
}

/// `epoch` is over, and no write is in progress. A file that recovery made and that lacks early writes is not the object: the log
/// with an older version is.
pub async fn abandon_incomplete(sheep: &Sheep, epoch: Epoch) -> Result<(), StoreError> {
    let Some(store) = &sheep.store else { return Ok(()) };
    for oid in sheep.early.oids() {
        let replica = Sheep::replica(oid);
        if sheep.early.has_of(oid, epoch) && store.exists(replica) {
            tracing::warn!("{oid} lacks writes that came before it, it is to be recovered again");
            store.remove(replica).await?;
        }
    }
    Ok(())
}

/// Logs a write of part of an object that is still to be recovered here. The caller holds a pass of the epoch.
pub async fn take(
    sheep: &Arc<Sheep>,
    view: &View,
    oid: Oid,
    id: WriteId,
    offset: u64,
    payload: &[u8],
) -> Result<Taken, ResultCode> {
    let _turn = sheep.early.turns.turn(oid, 0..1, true).await;
    if !sheep.recovery.takes_early(sheep, oid, view) {
        return Ok(Taken::Here);
    }
    // Sent again: perhaps no home has the object.
    if payload.len() > LONGEST || sheep.early.knows(oid, view.epoch, id) {
        return Ok(Taken::Wait);
    }
    tracing::debug!(
        "{oid}: {id:?} at {offset}, {} bytes, epoch {}, comes before it",
        payload.len(),
        view.epoch
    );
    let first = !sheep.early.has_of(oid, view.epoch);
    let added = tokio::task::block_in_place(|| sheep.early.add(oid, view.epoch, id, offset as u32, payload));
    let added = match added {
        Err(error) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
            false
        }
        other => other.map_err(|error| unnoted(sheep, oid, &error))?,
    };
    if first {
        sheep.recovery.put_first(oid);
    }
    Ok(if added { Taken::Yes } else { Taken::Wait })
}

/// The object's file is here, with the first `included` of the epoch's early writes: puts the others into it, and closes it to
/// such writes. The caller holds a pass of the epoch.
pub async fn finish(sheep: &Arc<Sheep>, view: &View, oid: Oid, included: usize) -> Result<(), ResultCode> {
    if !sheep.early.has(oid) {
        return Ok(());
    }
    let _turn = sheep.early.turns.turn(oid, 0..1, true).await;
    let store = sheep.store.as_ref().ok_or(ResultCode::NO_OBJ)?;
    let (replica, size) = (Sheep::replica(oid), sheep.size_of(oid, view));
    let writes = sheep.early.writes(oid, view.epoch, included).map_err(|e| unnoted(sheep, oid, &e))?;
    // They take effect in this order.
    let writes = writes.into_iter().map(|(offset, data)| store.write(replica, size, offset, data));
    for written in join_all(writes).await {
        written.map_err(|error| peer_result(sheep, &error))?;
    }
    tokio::task::block_in_place(|| sheep.early.drop_all(oid)).map_err(|error| unnoted(sheep, oid, &error))
}

/// The object does not exist.
pub async fn forget(sheep: &Arc<Sheep>, oid: Oid) {
    if sheep.early.has(oid) {
        let _turn = sheep.early.turns.turn(oid, 0..1, true).await;
        if let Err(error) = tokio::task::block_in_place(|| sheep.early.drop_all(oid)) {
            unnoted(sheep, oid, &error);
        }
    }
}

/// What `home` logged of an object in an epoch that is over; `None` = nothing, or it cannot tell.
pub async fn ask(
    sheep: &Arc<Sheep>,
    view: &View,
    home: NodeId,
    oid: Oid,
    epoch: Epoch,
) -> Option<Vec<Patch>> {
    let size = sheep.size_of(oid, view);
    let writes = if home == sheep.me {
        sheep.early.writes(oid, epoch, 0).ok()?
    } else {
        let body = OrderRequest { oid, what: order::EARLY, serial: epoch.0, ..OrderRequest::zeroed() };
        let request =
            Request::new(Opcode::ORDER_PEER).epoch(view.epoch).length(2 * size as usize).with_order(body);
        let reply = sheep.peers.call(&home, request, Bytes::new(), COPY_DEADLINE).await.ok()?;
        reply.response.result.ok().ok()?;
        decode_patches(&reply.data)?
    };
    let fits = writes.iter().all(|(offset, data)| offset + data.len() as u64 <= size);
    (fits && !writes.is_empty()).then_some(writes)
}

/// Whether every member knows what an early write is. One that does not (the original) would take an older version for the
/// present one where there are early writes on top of it.
pub async fn is_known(sheep: &Arc<Sheep>, active: &Active) -> bool {
    let view = sheep.views.load();
    let body = OrderRequest { what: order::EARLY, ..OrderRequest::zeroed() };
    let request = Request::new(Opcode::ORDER_PEER).epoch(active.round.epoch).with_order(body);
    let others = view.members().iter().map(|n| n.nid).filter(|n| *n != sheep.me);
    let answers = others.map(|node| async move {
        let reply = sheep.peers.call_on(Lane::Control, &node, request, Bytes::new(), KNOWN_DEADLINE).await;
        reply.map(|reply| reply.response.result)
    });
    join_all(answers).await.into_iter().all(|answer| matches!(answer, Ok(ResultCode::NO_OBJ)))
}

/// The answer to [`ask`]: offset and length (4 bytes each) and bytes of each range that was written, in ascending order.
pub fn answer(sheep: &Sheep, view: &View, oid: Oid, epoch: Epoch) -> Result<Vec<u8>, ResultCode> {
    if !epoch.is_before(view.epoch) {
        return Err(ResultCode::AGAIN); // more may come
    }
    let writes = sheep.early.writes(oid, epoch, 0).map_err(|error| unnoted(sheep, oid, &error))?;
    if writes.is_empty() { Err(ResultCode::NO_OBJ) } else { Ok(encode_patches(&merged(&writes))) }
}

/// Writes without those parts that later ones replaced, in ascending order.
fn merged(writes: &[Patch]) -> Vec<Patch> {
    let mut ranges: Vec<(u64, u64)> = writes.iter().map(|(at, data)| (*at, at + data.len() as u64)).collect();
    ranges.sort_unstable();
    let mut out: Vec<(u64, Vec<u8>)> = Vec::new();
    for (start, end) in ranges {
        match out.last_mut() {
            Some((from, data)) if start <= *from + data.len() as u64 => {
                let len = data.len().max((end - *from) as usize);
                data.resize(len, 0);
            }
            _ => out.push((start, vec![0; (end - start) as usize])),
        }
    }
    for (at, data) in writes {
        let range = out.partition_point(|(from, _)| from <= at);
        if let Some((from, whole)) = range.checked_sub(1).and_then(|i| out.get_mut(i)) {
            let start = (at - *from) as usize;
            whole[start..start + data.len()].copy_from_slice(data);
        }
    }
    out.into_iter().map(|(at, data)| (at, data.into())).collect()
}

fn encode_patches(patches: &[Patch]) -> Vec<u8> {
    let mut out = Vec::new();
    for (at, data) in patches {
        [*at as u32, data.len() as u32].iter().for_each(|n| out.extend(n.to_le_bytes()));
        out.extend(data);
    }
    out
}

fn decode_patches(mut payload: &[u8]) -> Option<Vec<Patch>> {
    let mut out = Vec::new();
    while !payload.is_empty() {
        let (head, rest) = payload.split_at_checked(8)?;
        let (data, rest) = rest.split_at_checked(u32::get(&head[4..]) as usize)?;
        out.push((u32::get(head).into(), Bytes::copy_from_slice(data)));
        payload = rest;
    }
    Some(out)
}

/// Where an answer to a write says that the object itself is not here yet; other sheep leave that zero.
const MARK_AT: std::ops::Range<usize> = 12..16;

/// Says that this node has only the write.
pub fn mark(mut response: Response) -> Response {
    response.body[MARK_AT].copy_from_slice(MAGIC);
    response
}

/// Whether an answer says so.
pub fn is_marked(response: &Response) -> bool {
    response.body[MARK_AT] == *MAGIC
}

#[cfg(test)]
mod tests {
    use sheepdog_proto::VdiId;

    use super::*;

    const E: Epoch = Epoch(5);

    fn oid(index: u32) -> Oid {
        Oid::data(VdiId::new(7), index)
    }

    fn id(seq: u32) -> WriteId {
        WriteId { writer: 9, seq }
    }

    fn patch(at: u64, data: &'static [u8]) -> Patch {
        (at, Bytes::from_static(data))
    }

    #[test]
    fn writes_survive_a_restart_in_their_order() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let early = EarlyWrites::open(dir.path(), true).expect("opened");
        assert!(early.add(oid(1), E, id(1), 100, b"one").expect("added"));
        assert!(early.add(oid(2), E, id(2), 0, b"other").expect("added"));
        assert!(early.add(oid(1), E, id(3), 101, b"two").expect("added"));
        assert!(early.add(oid(1), Epoch(6), id(4), 7, b"later").expect("added"));
        assert!(early.knows(oid(1), E, id(3)) && !early.knows(oid(1), E, id(2)));
        assert!(!early.knows(oid(1), E, WriteId::default()), "the original numbers no writes");
        for early in [early, EarlyWrites::open(dir.path(), true).expect("opened")] {
            let of_5 = early.writes(oid(1), E, 0).expect("read");
            assert_eq!(of_5, [patch(100, b"one"), patch(101, b"two")]);
            assert_eq!(early.writes(oid(1), E, 1).expect("read"), [patch(101, b"two")]);
            assert_eq!(early.writes(oid(1), Epoch(6), 0).expect("read"), [patch(7, b"later")]);
            assert!(early.has_of(oid(2), E) && !early.has_of(oid(2), Epoch(6)) && !early.has(oid(3)));
        }
    }

    #[test]
    fn what_was_dropped_stays_so() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let early = EarlyWrites::open(dir.path(), true).expect("opened");
        for index in [1, 2] {
            assert!(early.add(oid(index), E, id(index), 0, b"data").expect("added"));
        }
        early.drop_all(oid(1)).expect("dropped");
        let mut again = EarlyWrites::open(dir.path(), true).expect("opened");
        assert_eq!(again.oids(), [oid(2)]);
        early.drop_all(oid(2)).expect("dropped");
        assert!(
            early.oids().is_empty() && EarlyWrites::open(dir.path(), true).expect("opened").oids().is_empty()
        );
        // From the beginning of the file: what follows is of another generation.
        assert!(early.add(oid(3), E, id(3), 0, b"data").expect("added"));
        again = EarlyWrites::open(dir.path(), true).expect("opened");
        assert_eq!(again.oids(), [oid(3)]);
        // And what is appended after a restart is found by the next.
        assert!(again.add(oid(4), E, id(4), 0, b"more").expect("added"));
        again.drop_all(oid(3)).expect("dropped");
        assert_eq!(EarlyWrites::open(dir.path(), true).expect("opened").oids(), [oid(4)]);
    }

    #[test]
    fn a_cut_or_damaged_record_ends_the_log() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let early = EarlyWrites::open(dir.path(), true).expect("opened");
        for index in [1, 2] {
            assert!(early.add(oid(index), E, id(index), 0, b"data").expect("added"));
        }
        let path = dir.path().join(FILE);
        let whole = std::fs::read(&path).expect("read");
        for (at, left) in [(HEADER + 4 + HEADER, 1), (HEADER + 3, 0), (8, 0)] {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            std::fs::write(&path, &bytes).expect("write");
            assert_eq!(EarlyWrites::open(dir.path(), true).expect("opened").oids().len(), left);
        }
        std::fs::write(&path, &whole[..HEADER + 4 + 20]).expect("write");
        assert_eq!(EarlyWrites::open(dir.path(), true).expect("opened").oids(), [oid(1)]);
    }

    #[test]
    fn a_full_log_takes_no_more_until_it_is_empty() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let early = EarlyWrites::open(dir.path(), false).expect("opened");
        let piece = vec![1; LONGEST];
        let mut taken = 0;
        while early.add(oid(taken % 2), E, id(taken), 0, &piece).expect("added") {
            taken += 1;
        }
        assert_eq!(u64::from(taken), LIMIT / (LONGEST + HEADER) as u64);
        early.drop_all(oid(0)).expect("dropped");
        assert!(!early.add(oid(0), E, id(0), 0, &piece).expect("asked"));
        early.drop_all(oid(1)).expect("dropped");
        assert!(early.add(oid(0), E, id(0), 0, &piece).expect("added"));
    }

    #[test]
    fn objects_of_gathered_epochs_are_of_no_interest() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let early = EarlyWrites::open(dir.path(), true).expect("opened");
        for (index, epoch) in [(1, 4), (1, 5), (2, 5), (2, 6)] {
            assert!(early.add(oid(index), Epoch(epoch), id(epoch), 0, b"data").expect("added"));
        }
        early.gathered(Epoch(5));
        assert_eq!(early.oids(), [oid(2)]);
    }

    #[test]
    fn an_object_that_moves_away_in_an_epoch_keeps_the_writes_of_others() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let early = EarlyWrites::open(dir.path(), true).expect("opened");
        for (index, epoch) in [(1, 4), (1, 5), (2, 5), (3, 5)] {
            assert!(early.add(oid(index), Epoch(epoch), id(epoch), 0, b"data").expect("added"));
        }
        early.keep_homes(E, |home| home == oid(2)).expect("noted");
        for early in [early, EarlyWrites::open(dir.path(), true).expect("opened")] {
            assert!(early.has_of(oid(1), Epoch(4)) && early.has_of(oid(2), E));
            assert!(!early.has_of(oid(1), E) && !early.has(oid(3)));
        }
    }

    #[test]
    fn what_was_overwritten_is_not_told() {
        let writes =
            [patch(10, b"aaaa"), patch(12, b"bb"), patch(30, b"c"), patch(14, b"dd"), patch(8, b"ee")];
        let expected = [patch(8, b"eeaabbdd"), patch(30, b"c")];
        assert_eq!(merged(&writes), expected);
        assert_eq!(decode_patches(&encode_patches(&expected)).as_deref(), Some(&expected[..]));
        assert_eq!(decode_patches(&[0; 7]), None);
        assert_eq!(decode_patches(&[0, 0, 0, 0, 2, 0, 0, 0, 1]), None);
    }

    /// The crash came after recovery had made a file and before the last writes were part of it; of another object there is
    /// no file, and of a third one the writes are of an earlier epoch.
    #[tokio::test(flavor = "multi_thread")]
    async fn files_that_a_crash_left_incomplete_are_completed() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let disk = dir.path().join("obj");
        std::fs::create_dir(&disk).expect("directory");
        let (store, _) = Store::open(&[disk], sheepdog_store::StoreOptions::default()).expect("store");
        let early = EarlyWrites::open(dir.path(), true).expect("opened");
        let size = 4 << 20;
        for index in [1, 3] {
            let replica = Sheep::replica(oid(index));
            store.create(replica, size, 0, Bytes::from_static(b"before")).await.expect("created");
        }
        for (index, epoch) in [(1, 4), (1, 5), (2, 5), (3, 4)] {
            assert!(
                early.add(oid(index), Epoch(epoch), id(index), u32::from(epoch == 5), b"new").expect("added")
            );
        }
        early.complete_files(&store, E).await.expect("completed");
        for (index, bytes) in [(1, b"bnewre"), (3, b"before")] {
            assert_eq!(store.read(Sheep::replica(oid(index)), 0, 6).await.expect("read"), &bytes[..]);
        }
        assert_eq!(early.oids(), [oid(2)]);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_refused_or_read(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let _ = (parse(&bytes), decode_patches(&bytes));
        }
    }
}
