//! What writes of strips replaced, on disk: after a loss of all nodes, too, a write that reached only some strips of a stripe
//! is undone (spec 06, 15.1 A3). [`crate::intents`] has the same in memory and says what it means.
//!
//! Two files of the metadata directory, `strip_writes.0` and `strip_writes.1`, take turns. A file is a sequence of records;
//! it begins with everything that is still of interest when it becomes the current one, closed by a `Complete` record, so the
//! other one is not needed any more from then on. The current one is that of the highest generation which is complete. Files
//! are filled with zeros once and written over and over, so that a flush changes no metadata of the file system. The first one is
//! small: it says since when there is a log, and a node that never gets strips has no other.
//!
//! A record, little endian, 52 bytes and its payload:
//!
//! | bytes | |
//! |---|---|
//! | 0..4 | magic `SDUL` |
//! | 4..8 | CRC-32 of all that follows, payload included |
//! | 8..16 | generation of the file |
//! | 16 | kind: 1 write, 2 decision, 3 done, 4 since, 5 complete, 6 announced |
//! | 17 | strip (write, announced), fate (decision) |
//! | 18..20 | 0 |
//! | 20..24 | length of the payload |
//! | 24..32 | object id |
//! | 32..36 | epoch |
//! | 36..40, 40..44 | gateway and number of the write; done: the highest number |
//! | 44..48 | offset in the strip, in bytes |
//! | 48..52 | CRC-32 of the bytes that are written |
//!
//! A write is logged before it is carried out: whether it was, the last field tells. Payload: the bytes that a write replaced;
//! those of one that this node, as its gateway, is about to send to the other homes; the numbers (4 bytes each) up to the
//! highest that are not done.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;
use sheepdog_proto::{Epoch, Oid, Wire};

use crate::intents::{Fate, WriteId};

const MAGIC: &[u8; 4] = b"SDUL";
const HEADER: usize = 52;
/// Bytes of a file; larger if more is of interest at once.
const SEGMENT: u64 = 8 << 20;
/// Bytes of the first file.
const SMALL: u64 = 4096;

/// See the module's documentation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// A strip is about to be written.
    Write { oid: Oid, strip: u8, epoch: Epoch, id: WriteId, offset: u32, new: u32, old: Bytes },
    /// A strip of this node will be written, and so will those of others, by this gateway.
    Announced { oid: Oid, strip: u8, epoch: Epoch, id: WriteId, offset: u32, data: Bytes },
    /// Whether a write stands was decided.
    Decision { oid: Oid, epoch: Epoch, id: WriteId, fate: Fate },
    /// A gateway said that its writes up to `highest` are done, except `open`.
    Done { writer: u32, highest: u32, open: Vec<u32> },
    /// The log tells of all writes since this epoch.
    Since(Epoch),
    /// End of what a file begins with.
    Complete,
}

impl Record {
    fn encode(&self, generation: u64) -> Vec<u8> {
        let no_id = WriteId::default();
        let (kind, detail, oid, epoch, id, offset, new) = match self {
            Record::Write { oid, strip, epoch, id, offset, new, .. } => {
                (1, *strip, *oid, *epoch, *id, *offset, *new)
            }
            Record::Announced { oid, strip, epoch, id, offset, .. } => {
                (6, *strip, *oid, *epoch, *id, *offset, 0)
            }
            Record::Decision { oid, epoch, id, fate } => (2, *fate as u8, *oid, *epoch, *id, 0, 0),
            Record::Done { writer, highest, .. } => {
                (3, 0, Oid(0), Epoch(0), WriteId { writer: *writer, seq: *highest }, 0, 0)
            }
            Record::Since(epoch) => (4, 0, Oid(0), *epoch, no_id, 0, 0),
            Record::Complete => (5, 0, Oid(0), Epoch(0), no_id, 0, 0),
        };
        let numbers: Vec<u8>;
        let payload: &[u8] = match self {
            Record::Write { old: bytes, .. } | Record::Announced { data: bytes, .. } => bytes,
            Record::Done { open, .. } => {
                numbers = open.iter().flat_map(|n| n.to_le_bytes()).collect();
                &numbers
            }
            _ => &[],
        };
        let mut out = Vec::with_capacity(HEADER + payload.len());
        out.extend(MAGIC);
        out.extend([0; 4]);
        out.extend(generation.to_le_bytes());
        out.extend([kind, detail, 0, 0]);
        out.extend((payload.len() as u32).to_le_bytes());
        out.extend(oid.0.to_le_bytes());
        for number in [epoch.0, id.writer, id.seq, offset, new] {
            out.extend(number.to_le_bytes());
        }
        out.extend(payload);
        let crc = crc32fast::hash(&out[8..]);
        out[4..8].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// The record at the beginning of `bytes`, its generation and its length; `None` = there is no whole one.
    fn decode(bytes: &[u8]) -> Option<(Record, u64, usize)> {
        let header = bytes.get(..HEADER)?;
        let end = HEADER.checked_add(u32::get(&header[20..]) as usize)?;
        let body = bytes.get(8..end)?;
        if &header[..4] != MAGIC || u32::get(&header[4..]) != crc32fast::hash(body) {
            return None;
        }
        let payload = &bytes[HEADER..end];
        let (oid, epoch, offset) =
            (Oid::get(&header[24..]), Epoch(u32::get(&header[32..])), u32::get(&header[44..]));
        let id = WriteId { writer: u32::get(&header[36..]), seq: u32::get(&header[40..]) };
        let record = match header[16] {
            1 => Record::Write {
                oid,
                strip: header[17],
                epoch,
                id,
                offset,
                new: u32::get(&header[48..]),
                old: Bytes::copy_from_slice(payload),
            },
            2 => Record::Decision { oid, epoch, id, fate: Fate::of(header[17]) },
            3 => Record::Done {
                writer: id.writer,
                highest: id.seq,
                open: payload.chunks_exact(4).map(u32::get).collect(),
            },
            4 => Record::Since(epoch),
            5 => Record::Complete,
            6 => Record::Announced {
                oid,
                strip: header[17],
                epoch,
                id,
                offset,
                data: Bytes::copy_from_slice(payload),
            },
            _ => return None,
        };
        Some((record, u64::get(&header[8..]), end))
    }
}

/// The records of a file and its generation, if it is complete.
fn parse(bytes: &[u8]) -> Option<(u64, Vec<Record>)> {
    let (_, generation, _) = Record::decode(bytes)?;
    let (mut records, mut at, mut complete) = (Vec::new(), 0, false);
    while let Some((record, g, len)) = Record::decode(&bytes[at..]) {
        if g != generation {
            break;
        }
        complete |= record == Record::Complete;
        records.push(record);
        at += len;
    }
    complete.then_some((generation, records))
}

#[derive(Default)]
struct State {
    /// The current file, if anything was written.
    file: Option<Arc<File>>,
    /// Which of the two it is.
    index: usize,
    generation: u64,
    at: u64,
    len: u64,
    /// Bytes appended since the start of the process.
    appended: u64,
}

/// See the module's documentation.
pub struct UndoLog {
    base: PathBuf,
    durable: bool,
    state: Mutex<State>,
    /// `appended` of what is on disk.
    synced: Mutex<u64>,
    /// A flush failed. The kernel tells that once and takes the pages for clean: a later flush would succeed without them.
    failed: AtomicBool,
}

impl UndoLog {
    /// Reads what is there: `None` = nothing that is complete.
    pub fn open(base: &Path, durable: bool) -> (UndoLog, Option<Vec<Record>>) {
        let mut state = State::default();
        let mut found = None;
        for index in 0..2 {
            let path = path(base, index);
            let Ok(bytes) = std::fs::read(&path) else { continue };
            let Some((generation, records)) = parse(&bytes) else { continue };
            if generation >= state.generation {
                // Not appended to: the first record begins the other file.
                state = State { index, generation, ..State::default() };
                found = Some(records);
            }
        }
        let (state, synced) = (Mutex::new(state), Mutex::new(0));
        (UndoLog { base: base.to_owned(), durable, state, synced, failed: AtomicBool::new(false) }, found)
    }

    /// Fails from the first failed flush on: from then on nobody knows what is on disk.
    fn usable(&self) -> io::Result<()> {
        match self.failed.load(Ordering::Acquire) {
            true => Err(io::Error::other("the log of writes of strips could not be flushed before")),
            false => Ok(()),
        }
    }

    /// The result of a flush, whatever its reason an error of the metadata directory.
    fn flushed(&self, result: io::Result<()>) -> io::Result<()> {
        result.map_err(|error| {
            self.failed.store(true, Ordering::Release);
            io::Error::other(format!("the log of writes of strips cannot be flushed: {error}"))
        })
    }

    /// Adds a record. `all` gives what is of interest now, this record included; it is called when a file is full. `flush`:
    /// returns when the record survives a power cut. Once a flush has failed, so does everything.
    pub fn append(&self, record: &Record, flush: bool, all: impl FnOnce() -> Vec<Record>) -> io::Result<()> {
        let mine = {
            let mut state = self.state.lock();
            self.usable()?;
            let mut bytes = record.encode(state.generation);
            if state.file.is_none() || state.at + bytes.len() as u64 > state.len {
                self.begin(&mut state, all(), SEGMENT)?;
                bytes = record.encode(state.generation);
            }
            if let Some(file) = &state.file {
                file.write_all_at(&bytes, state.at)?;
            }
            state.at += bytes.len() as u64;
            state.appended += bytes.len() as u64;
            state.appended
        };
        if flush && self.durable { self.sync(mine) } else { Ok(()) }
    }

    /// One flush serves everybody who waits for one.
    fn sync(&self, mine: u64) -> io::Result<()> {
        let mut synced = self.synced.lock();
        if *synced >= mine {
            return Ok(());
        }
        self.usable()?;
        let (file, upto) = {
            let state = self.state.lock();
            (state.file.clone(), state.appended)
        };
        if let Some(file) = file {
            self.flushed(file.sync_data())?;
        }
        *synced = upto;
        Ok(())
    }

    /// Makes the other file the current one, with a multiple of `unit` bytes.
    fn begin(&self, state: &mut State, records: Vec<Record>, unit: u64) -> io::Result<()> {
        let (index, generation) = (1 - state.index, state.generation + 1);
        let all = records.iter().chain([&Record::Complete]);
        let bytes: Vec<u8> = all.flat_map(|record| record.encode(generation)).collect();
        let len = (3 * bytes.len() as u64).next_multiple_of(unit);
        let path = path(&self.base, index);
        let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path)?;
        let before = file.metadata()?.len();
        if before < len && self.durable {
            let zeros = vec![0; 1 << 20];
            for at in (before..len).step_by(zeros.len()) {
                file.write_all_at(&zeros[..zeros.len().min((len - at) as usize)], at)?;
            }
        } else if before < len {
            file.set_len(len)?;
        }
        file.write_all_at(&bytes, 0)?;
        if self.durable {
            self.flushed(file.sync_all().and_then(|()| File::open(&self.base)?.sync_all()))?;
        }
        let at = bytes.len() as u64;
        *state = State { file: Some(Arc::new(file)), index, generation, at, len, appended: state.appended };
        Ok(())
    }

    /// Begins anew with `records` only.
    pub fn restart(&self, records: Vec<Record>) -> io::Result<()> {
        let mut state = self.state.lock();
        self.usable()?;
        let unit = if state.generation == 0 { SMALL } else { SEGMENT };
        self.begin(&mut state, records, unit)
    }
}

fn path(base: &Path, index: usize) -> PathBuf {
    base.join(format!("strip_writes.{index}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: WriteId = WriteId { writer: 7, seq: 8 };

    fn write(offset: u32, len: usize) -> Record {
        let old = Bytes::from(vec![3; len]);
        Record::Write { oid: Oid(5), strip: 2, epoch: Epoch(4), id: ID, offset, new: 6, old }
    }

    fn records(dir: &Path) -> Option<Vec<Record>> {
        UndoLog::open(dir, true).1
    }

    #[test]
    fn every_kind_of_record_survives() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (log, before) = UndoLog::open(dir.path(), true);
        assert_eq!(before, None);
        let all = [
            Record::Announced {
                oid: Oid(5),
                strip: 2,
                epoch: Epoch(4),
                id: ID,
                offset: 512,
                data: Bytes::from_static(b"new"),
            },
            write(512, 3),
            Record::Decision { oid: Oid(5), epoch: Epoch(4), id: ID, fate: Fate::Undone },
            Record::Done { writer: 7, highest: 9, open: vec![8, 2] },
        ];
        for record in &all {
            log.append(record, true, || vec![Record::Since(Epoch(3))]).expect("appended");
        }
        let mut expected = vec![Record::Since(Epoch(3)), Record::Complete];
        expected.extend(all);
        assert_eq!(records(dir.path()), Some(expected));
    }

    #[test]
    fn a_full_file_gives_way_to_what_is_of_interest_by_then() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (log, _) = UndoLog::open(dir.path(), true);
        for n in 0..40 {
            log.append(&write(n, 1 << 20), true, || vec![Record::Since(Epoch(n)), write(n, 1 << 20)])
                .expect("appended");
        }
        let left = records(dir.path()).expect("complete");
        assert!(left.len() <= 10, "{} records", left.len());
        assert_eq!(left.last(), Some(&write(39, 1 << 20)));
    }

    #[test]
    fn a_file_that_was_begun_and_not_completed_does_not_count() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (log, _) = UndoLog::open(dir.path(), true);
        log.append(&write(1, 8), true, Vec::new).expect("appended");
        log.restart(vec![write(2, 8)]).expect("restarted");
        let newer = path(dir.path(), log.state.lock().index);
        assert_eq!(records(dir.path()), Some(vec![write(2, 8), Record::Complete]));
        let mut bytes = std::fs::read(&newer).expect("read");
        let complete = HEADER + 8;
        bytes[complete + 16] ^= 1;
        std::fs::write(&newer, bytes).expect("write");
        assert_eq!(records(dir.path()), Some(vec![Record::Complete, write(1, 8)]));
    }

    #[test]
    fn a_cut_or_damaged_record_ends_the_log() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (log, _) = UndoLog::open(dir.path(), true);
        log.append(&write(1, 8), true, Vec::new).expect("appended");
        log.append(&write(2, 8), true, Vec::new).expect("appended");
        let file = path(dir.path(), log.state.lock().index);
        let mut bytes = std::fs::read(&file).expect("read");
        bytes[2 * HEADER + 8 + HEADER + 3] ^= 1;
        std::fs::write(&file, bytes).expect("write");
        assert_eq!(records(dir.path()), Some(vec![Record::Complete, write(1, 8)]));
    }

    #[test]
    fn after_a_failed_flush_nothing_is_taken_for_durable() {
        let dir = tempfile::tempdir().expect("temporary directory");
        // Can be written to, but not flushed.
        let unflushable = || OpenOptions::new().write(true).open("/dev/null").expect("opened");
        let (log, _) = UndoLog::open(dir.path(), true);
        log.append(&write(1, 8), true, Vec::new).expect("appended");
        let good = log.state.lock().file.replace(Arc::new(unflushable()));
        log.append(&write(2, 8), false, Vec::new).expect("nobody waits for it to be durable");
        let error = log.append(&write(3, 8), true, Vec::new).expect_err("cannot be flushed");
        assert_eq!(error.kind(), io::ErrorKind::Other, "whatever it was, the directory is not to be used");
        // The next flush would succeed.
        log.state.lock().file = good;
        for flush in [true, false] {
            log.append(&write(4, 8), flush, Vec::new).expect_err("was not durable before");
        }
        log.restart(Vec::new()).expect_err("as little");
    }

    #[test]
    fn a_file_that_cannot_be_flushed_when_it_is_begun_ends_the_log() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (log, _) = UndoLog::open(dir.path(), true);
        log.append(&write(1, 8), true, Vec::new).expect("appended");
        let other = path(dir.path(), 1 - log.state.lock().index);
        std::os::unix::fs::symlink("/dev/null", &other).expect("linked");
        log.restart(vec![write(2, 8)]).expect_err("cannot be flushed");
        std::fs::remove_file(&other).expect("removed");
        // Part of the new file may be on disk all the same: it would hide what is added to the old one.
        log.append(&write(3, 8), true, Vec::new).expect_err("which is current is not known");
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_refused_or_read(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
