//! VDIs whose copies were altered since everybody had everything.
//!
//! Copies change within an epoch (spec 05, 19), so how many homes an object had in it depends on the moment. A search of
//! such a VDI asks as many as there were at most, and takes only those that were homes all the time for a proof that nothing
//! was written. A node that ceased to be a home has what it put away then as of the epoch before.
//!
//! The memory is a side file of the metadata directory, `altered_copies`, a line for each VDI: id, least and most copies,
//! last epoch in which they were altered. Nodes that join learn it with the VDI table.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use sheepdog_proto::{Epoch, VdiId, VdiState};
use sheepdog_store::replace_file;

const FILE: &str = "altered_copies";

/// How many homes an object may have had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// At least.
    pub least: u8,
    /// At most.
    pub most: u8,
    /// This node did not have everything when copies were altered, nor since, and lost nothing more: what it lacks, it lacked
    /// then, so nothing was acknowledged since that it would have had to write.
    pub lacked: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Record {
    least: u8,
    most: u8,
    epoch: Epoch,
    /// Everything that this node should have was here at some moment since.
    had_all: bool,
    /// How often disks had been lost.
    losses: u32,
}

/// See the module's documentation.
pub struct Altered {
    dir: PathBuf,
    vdis: Mutex<BTreeMap<VdiId, Record>>,
}

impl Altered {
    /// Reads the side file.
    pub fn open(dir: &Path) -> Altered {
        let text = std::fs::read_to_string(dir.join(FILE)).unwrap_or_default();
        let vdis = text.lines().filter_map(parse).collect();
        Altered { dir: dir.to_owned(), vdis: Mutex::new(vdis) }
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<VdiId, Record>)) {
        let mut vdis = self.vdis.lock();
        let before = text(&vdis);
        change(&mut vdis);
        let after = text(&vdis);
        if after != before
            && let Err(error) = replace_file(&self.dir, FILE, after.as_bytes())
        {
            // Needed after a restart only, if recovery is not over by then.
            tracing::warn!("cannot write {}: {error}", self.dir.join(FILE).display());
        }
    }

    /// Copies of `vid` are altered in `epoch`. `has_all`: everything is here that should be by the number before; `losses`: how
    /// often disks were lost. Blocks for a disk write.
    pub fn note(&self, vid: VdiId, old: u8, new: u8, epoch: Epoch, has_all: bool, losses: u32) {
        let now = Record { least: old.min(new), most: old.max(new), epoch, had_all: has_all, losses };
        self.change(|vdis| merge(vdis, vid, now));
    }

    /// What another node's record of the VDI says. Blocks for a disk write.
    pub fn learn(&self, record: &VdiState, epoch: Epoch) {
        if record.most_copies != 0 {
            let (least, most) = (record.least_copies, record.most_copies);
            let now = Record { least, most, epoch, had_all: true, losses: 0 };
            self.change(|vdis| merge(vdis, record.vid, now));
        }
    }

    /// Adds what is known here to a record for another node.
    pub fn mark(&self, record: VdiState) -> VdiState {
        match self.vdis.lock().get(&record.vid) {
            Some(known) => VdiState { least_copies: known.least, most_copies: known.most, ..record },
            None => record,
        }
    }

    /// The numbers for a VDI that has `copies` now.
    pub fn counts(&self, vid: VdiId, copies: u8, losses: u32) -> Counts {
        match self.vdis.lock().get(&vid) {
            Some(known) => Counts {
                least: known.least.min(copies),
                most: known.most.max(copies),
                lacked: !known.had_all && known.losses == losses,
            },
            None => Counts { least: copies, most: copies, lacked: false },
        }
    }

    /// Whether copies of the VDI were altered since everybody had everything.
    pub fn has(&self, vid: VdiId) -> bool {
        self.vdis.lock().contains_key(&vid)
    }

    /// Everything that this node should have is here.
    pub fn complete(&self) {
        self.vdis.lock().values_mut().for_each(|known| known.had_all = true);
    }

    /// All members have every object of `epoch`, in which copies were altered for the last time, or in a later one.
    pub fn gathered(&self, epoch: Epoch) {
        self.change(|vdis| vdis.retain(|_, known| !known.epoch.is_before(epoch)));
    }

    /// Forgets everything (MAKE_FS).
    pub fn clear(&self) {
        self.change(BTreeMap::clear);
    }
}

fn merge(vdis: &mut BTreeMap<VdiId, Record>, vid: VdiId, now: Record) {
    let known = vdis.entry(vid).or_insert(now);
    *known = Record {
        least: known.least.min(now.least),
        most: known.most.max(now.most),
        epoch: known.epoch.max(now.epoch),
        had_all: known.had_all || now.had_all,
        losses: known.losses,
    };
}

fn text(vdis: &BTreeMap<VdiId, Record>) -> String {
    let line =
        |(vid, r): (&VdiId, &Record)| format!("{:x} {} {} {}\n", vid.get(), r.least, r.most, r.epoch.0);
    vdis.iter().map(line).collect()
}

fn parse(line: &str) -> Option<(VdiId, Record)> {
    let mut words = line.split_whitespace();
    let vid = VdiId::new(u32::from_str_radix(words.next()?, 16).ok()?);
    let (least, most) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let epoch = Epoch(words.next()?.parse().ok()?);
    // Nobody knows what is missing since when.
    Some((vid, Record { least, most, epoch, had_all: true, losses: 0 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_since_everybody_had_everything_are_remembered_across_restarts_and_told() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let altered = Altered::open(dir.path());
        let vid = VdiId::new(0xabcdef);
        let counts = |least, most, lacked| Counts { least, most, lacked };
        assert_eq!(altered.counts(vid, 3, 0), counts(3, 3, false));
        altered.note(vid, 3, 1, Epoch(4), false, 0);
        assert_eq!(altered.counts(vid, 1, 0), counts(1, 3, true));
        assert_eq!(altered.counts(vid, 1, 1), counts(1, 3, false), "another disk was lost");
        altered.note(vid, 1, 2, Epoch(5), false, 0);
        assert_eq!(altered.counts(vid, 2, 0), counts(1, 3, true));
        altered.complete();
        altered.note(vid, 2, 4, Epoch(5), false, 0);
        assert_eq!(altered.counts(vid, 4, 0), counts(1, 4, false));

        let again = Altered::open(dir.path());
        assert_eq!(again.counts(vid, 4, 0), counts(1, 4, false));
        let elsewhere = tempfile::tempdir().expect("temporary directory");
        let other = Altered::open(elsewhere.path());
        let record = VdiState { vid, ..VdiState::zeroed() };
        other.learn(&record, Epoch(6));
        assert_eq!(other.counts(vid, 4, 0), counts(4, 4, false), "the original tells nothing");
        other.learn(&again.mark(record), Epoch(6));
        assert_eq!(other.counts(vid, 4, 0), counts(1, 4, false));

        again.gathered(Epoch(5));
        assert_eq!(again.counts(vid, 4, 0), counts(1, 4, false), "perhaps before they were altered");
        again.gathered(Epoch(6));
        assert_eq!(again.counts(vid, 4, 0), counts(4, 4, false));
        assert_eq!(Altered::open(dir.path()).counts(vid, 4, 0), counts(4, 4, false));
    }
}
