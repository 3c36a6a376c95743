//! What was removed here, so that a node that was away does not bring it back (spec 06, W-09).
//!
//! A home that executes a removal remembers the object with the epoch. When a node returns with an old replica and
//! somebody searches the object, the homes of later epochs answer "no such object", with that epoch beside it: the search
//! goes back no further. An object that was created again since is found first, because searches begin with the newest
//! epoch.
//!
//! The memory is a log in the metadata directory, bounded, without synchronous writes: what it forgets may come back as
//! garbage to which no VDI refers, never as data.

use std::collections::{HashMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use sheepdog_proto::{Epoch, Oid, Response};
use sheepdog_store::replace_file;

const FILE: &str = "removed_objects";
/// Bytes of a record: object id and epoch, little-endian.
const RECORD: usize = 12;
/// Removals remembered; older ones are forgotten. With blocks of 4 MiB these are 2 TiB.
const MOST: usize = 512 << 10;
/// Marks an answer that carries the epoch of a removal, in bytes that other sheep leave alone.
const MARK: [u8; 4] = *b"gone";

/// See the module's documentation.
pub struct Tombstones {
    dir: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    epochs: HashMap<Oid, Epoch>,
    order: VecDeque<(Oid, Epoch)>,
    log: Option<File>,
    /// Records in the file.
    logged: usize,
}

impl State {
    fn add(&mut self, oid: Oid, epoch: Epoch) -> bool {
        if self.epochs.insert(oid, epoch) == Some(epoch) {
            return false;
        }
        self.order.push_back((oid, epoch));
        if self.order.len() > MOST
            && let Some((oid, epoch)) = self.order.pop_front()
            && self.epochs.get(&oid) == Some(&epoch)
        {
            self.epochs.remove(&oid);
        }
        true
    }

    fn rewrite(&mut self, dir: &Path) -> io::Result<()> {
        self.log = None;
        let records: Vec<u8> = self.order.iter().flat_map(|(oid, epoch)| record(*oid, *epoch)).collect();
        replace_file(dir, FILE, &records)?;
        self.log = Some(OpenOptions::new().append(true).open(dir.join(FILE))?);
        self.logged = self.order.len();
        Ok(())
    }
}

fn record(oid: Oid, epoch: Epoch) -> [u8; RECORD] {
    let mut bytes = [0; RECORD];
    bytes[..8].copy_from_slice(&oid.0.to_le_bytes());
    bytes[8..].copy_from_slice(&epoch.0.to_le_bytes());
    bytes
}

impl Tombstones {
    /// Reads the log of a metadata directory.
    pub fn open(dir: &Path) -> Tombstones {
        let mut state = State::default();
        let stored = std::fs::read(dir.join(FILE)).unwrap_or_default();
        let (records, _) = stored.as_chunks::<RECORD>();
        for [a, b, c, d, e, f, g, h, epoch @ ..] in records {
            let oid = Oid(u64::from_le_bytes([*a, *b, *c, *d, *e, *f, *g, *h]));
            state.add(oid, Epoch(u32::from_le_bytes(*epoch)));
        }
        let tombstones = Tombstones { dir: dir.to_owned(), state: Mutex::new(state) };
        tombstones.complain(tombstones.state.lock().rewrite(dir));
        tombstones
    }

    fn complain(&self, outcome: io::Result<()>) {
        if let Err(error) = outcome {
            tracing::warn!("cannot write {}: {error}", self.dir.join(FILE).display());
        }
    }

    /// `oid` is being removed from this node in `epoch`.
    pub fn add(&self, oid: Oid, epoch: Epoch) {
        let mut state = self.state.lock();
        if !state.add(oid, epoch) {
            return;
        }
        state.logged += 1;
        let written = if state.logged > 2 * MOST {
            state.rewrite(&self.dir)
        } else {
            state.log.as_mut().map_or(Ok(()), |log| log.write_all(&record(oid, epoch)))
        };
        drop(state);
        self.complain(written);
    }

    /// The last epoch in which `oid` was removed here; 0 = it was not.
    pub fn epoch_of(&self, oid: Oid) -> Epoch {
        self.state.lock().epochs.get(&oid).copied().unwrap_or_default()
    }

    /// Forgets everything (format).
    pub fn clear(&self) {
        let mut state = self.state.lock();
        *state = State::default();
        let written = state.rewrite(&self.dir);
        drop(state);
        self.complain(written);
    }

    /// Adds what is known of `oid` to an answer that it is not here.
    pub fn mark(&self, oid: Oid, mut response: Response) -> Response {
        let epoch = self.epoch_of(oid);
        if epoch != Epoch(0) {
            response.body[12..16].copy_from_slice(&MARK);
            response.body[16..20].copy_from_slice(&epoch.0.to_le_bytes());
        }
        response
    }
}

/// What a node that answered [`Tombstones::mark`] knows; 0 = nothing.
pub fn marked(response: &Response) -> Epoch {
    match response.body {
        [_, _, _, _, _, _, _, _, _, _, _, _, m0, m1, m2, m3, a, b, c, d, ..] if [m0, m1, m2, m3] == MARK => {
            Epoch(u32::from_le_bytes([a, b, c, d]))
        }
        _ => Epoch(0),
    }
}

#[cfg(test)]
mod tests {
    use sheepdog_proto::ResultCode;

    use super::*;

    #[test]
    fn removals_are_remembered_across_restarts_and_torn_records() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let tombstones = Tombstones::open(dir.path());
        tombstones.add(Oid(1), Epoch(3));
        tombstones.add(Oid(2), Epoch(4));
        tombstones.add(Oid(1), Epoch(7));
        drop(tombstones);
        let mut file = OpenOptions::new().append(true).open(dir.path().join(FILE)).expect("log");
        file.write_all(&[9; 5]).expect("a torn record");
        let again = Tombstones::open(dir.path());
        let known = [1, 2, 3].map(|oid| again.epoch_of(Oid(oid)).0);
        assert_eq!(known, [7, 4, 0]);
        again.add(Oid(3), Epoch(8));
        assert_eq!(Tombstones::open(dir.path()).epoch_of(Oid(3)), Epoch(8));
        again.clear();
        assert_eq!(Tombstones::open(dir.path()).epoch_of(Oid(1)), Epoch(0));
    }

    #[test]
    fn the_oldest_are_forgotten() {
        let mut state = State::default();
        for oid in 0..MOST as u64 + 2 {
            state.add(Oid(oid), Epoch(1));
        }
        assert_eq!(state.order.len(), MOST);
        assert!(!state.epochs.contains_key(&Oid(1)) && state.epochs.contains_key(&Oid(2)));
    }

    #[test]
    fn an_answer_carries_the_epoch_where_others_carry_nothing() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let tombstones = Tombstones::open(dir.path());
        tombstones.add(Oid(1), Epoch(9));
        let none = Response { result: ResultCode::NO_OBJ, ..Response::zeroed() };
        assert_eq!(marked(&tombstones.mark(Oid(1), none)), Epoch(9));
        assert_eq!(tombstones.mark(Oid(2), none), none);
        assert_eq!(marked(&none), Epoch(0));
        let noise = Response { body: [0xaa; 28], ..none };
        assert_eq!(marked(&noise), Epoch(0));
    }
}
