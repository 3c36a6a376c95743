//! The order of changes: overlapping jobs of one replica run one after the other, in submission order.
//!
//! Each job covers a byte range of a replica (structural jobs cover all of it). A job that overlaps a running or an
//! earlier waiting job of the same replica waits; everything else runs free. Whatever the threads hold at any moment is
//! therefore free of conflicts, also between small and large work. Pure bookkeeping: no threads, no files.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ops::Range;

use tokio::sync::oneshot;

use crate::name::Replica;

/// The claim of a running or waiting job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Claim {
    /// `None`: conflicts with nothing.
    pub(crate) replica: Option<Replica>,
    /// Bytes of the replica.
    pub(crate) range: Range<u64>,
    /// Identity and age; assigned by [`Sched::submit`].
    pub(crate) seq: u64,
}

impl Claim {
    /// A claim of some bytes of a replica.
    pub(crate) fn range(replica: Replica, range: Range<u64>) -> Claim {
        Claim { replica: Some(replica), range, seq: 0 }
    }

    /// A claim of a whole replica, whatever its size.
    pub(crate) fn whole(replica: Replica) -> Claim {
        Claim::range(replica, 0..u64::MAX)
    }

    /// A claim that conflicts with nothing, but is waited for by a drain.
    pub(crate) fn free() -> Claim {
        Claim { replica: None, range: 0..0, seq: 0 }
    }
}

/// Anything that carries a claim.
pub(crate) trait Claims {
    /// The claim.
    fn claim(&self) -> &Claim;
    /// The claim, for the scheduler to number.
    fn claim_mut(&mut self) -> &mut Claim;
}

struct Object<J> {
    active: Vec<(u64, Range<u64>)>,
    waiting: VecDeque<J>,
}

/// See the module.
pub(crate) struct Sched<J> {
    next: u64,
    objects: HashMap<Replica, Object<J>>,
    unfinished: BTreeSet<u64>,
    drains: Vec<(u64, oneshot::Sender<()>)>,
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl<J: Claims> Sched<J> {
    pub(crate) fn new() -> Sched<J> {
        Sched { next: 0, objects: HashMap::new(), unfinished: BTreeSet::new(), drains: Vec::new() }
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.unfinished.insert(self.next);
        self.next
    }

    /// Accepts a job: returns it if it may run now, else keeps it.
    pub(crate) fn submit(&mut self, mut job: J) -> Option<J> {
        let seq = self.number();
        job.claim_mut().seq = seq;
        let Some(replica) = job.claim().replica else { return Some(job) };
        let object = self
            .objects
            .entry(replica)
            .or_insert_with(|| Object { active: Vec::new(), waiting: VecDeque::new() });
        let range = job.claim().range.clone();
        let blocked = object.active.iter().any(|(_, r)| overlap(r, &range))
            || object.waiting.iter().any(|j| overlap(&j.claim().range, &range));
        if blocked {
            object.waiting.push_back(job);
            return None;
        }
        object.active.push((seq, range));
        Some(job)
    }

    /// Takes a claim at once or not at all, for work done in the caller's thread.
    pub(crate) fn try_claim(&mut self, claim: &mut Claim) -> bool {
        let Some(replica) = claim.replica else { return false };
        if let Some(object) = self.objects.get(&replica) {
            let blocked = object.active.iter().any(|(_, r)| overlap(r, &claim.range))
                || object.waiting.iter().any(|j| overlap(&j.claim().range, &claim.range));
            if blocked {
                return false;
            }
        }
        claim.seq = self.number();
        let object = self
            .objects
            .entry(replica)
            .or_insert_with(|| Object { active: Vec::new(), waiting: VecDeque::new() });
        object.active.push((claim.seq, claim.range.clone()));
        true
    }

    /// A job is done: returns the jobs that may run now.
    pub(crate) fn finish(&mut self, claim: &Claim) -> Vec<J> {
        self.unfinished.remove(&claim.seq);
        let oldest = self.unfinished.first().copied().unwrap_or(u64::MAX);
        let (reached, rest): (Vec<_>, Vec<_>) = self.drains.drain(..).partition(|(seq, _)| oldest > *seq);
        self.drains = rest;
        for (_, waiter) in reached {
            let _ = waiter.send(()); // nobody waits any more: fine
        }
        claim.replica.map_or_else(Vec::new, |replica| self.promote(replica, claim.seq))
    }

    fn promote(&mut self, replica: Replica, done: u64) -> Vec<J> {
        let Some(object) = self.objects.get_mut(&replica) else { return Vec::new() };
        object.active.retain(|(seq, _)| *seq != done);
        let mut ready = Vec::new();
        let mut still: VecDeque<J> = VecDeque::new();
        for job in object.waiting.drain(..) {
            let range = &job.claim().range;
            let blocked = object.active.iter().any(|(_, r)| overlap(r, range))
                || still.iter().any(|j| overlap(&j.claim().range, range));
            if blocked {
                still.push_back(job);
            } else {
                object.active.push((job.claim().seq, range.clone()));
                ready.push(job);
            }
        }
        object.waiting = still;
        if object.active.is_empty() {
            self.objects.remove(&replica);
        }
        ready
    }

    /// Fires once everything submitted before is finished; `None` if it already is.
    pub(crate) fn drain(&mut self) -> Option<oneshot::Receiver<()>> {
        self.unfinished.first()?;
        let (tx, rx) = oneshot::channel();
        self.drains.push((self.next, tx));
        Some(rx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sheepdog_proto::Oid;

    struct Job(Claim);

    impl Claims for Job {
        fn claim(&self) -> &Claim {
            &self.0
        }
        fn claim_mut(&mut self) -> &mut Claim {
            &mut self.0
        }
    }

    fn job(oid: u64, range: Range<u64>) -> Job {
        Job(Claim::range(Replica::whole(Oid(oid)), range))
    }

    #[test]
    fn overlapping_jobs_run_in_submission_order() {
        let mut sched = Sched::new();
        let a = sched.submit(job(1, 0..10)).expect("free");
        assert!(sched.submit(job(1, 5..15)).is_none());
        // Overlaps only the waiting one: must not overtake it.
        assert!(sched.submit(job(1, 12..20)).is_none());
        let d = sched.submit(job(1, 20..30)).expect("disjoint");
        let e = sched.submit(job(2, 0..10)).expect("another object");
        let ready = sched.finish(&a.0);
        assert!(ready.len() == 1 && ready[0].0.range == (5..15));
        assert!(sched.finish(&d.0).is_empty() && sched.finish(&e.0).is_empty());
        let ready = sched.finish(&ready[0].0);
        assert_eq!(ready[0].0.range, 12..20);
        assert!(sched.finish(&ready[0].0).is_empty() && sched.objects.is_empty());
    }

    #[test]
    fn a_structural_job_excludes_everything_on_its_replica() {
        let mut sched = Sched::new();
        let a = sched.submit(job(1, 0..10)).expect("free");
        assert!(sched.submit(Job(Claim::whole(Replica::whole(Oid(1))))).is_none());
        assert!(sched.submit(job(1, 100..110)).is_none());
        let mut claim = Claim::range(Replica::whole(Oid(1)), 200..201);
        assert!(!sched.try_claim(&mut claim));
        let whole = sched.finish(&a.0);
        assert_eq!(whole.len(), 1);
        assert_eq!(sched.finish(&whole[0].0).len(), 1);
    }

    #[test]
    fn a_drain_waits_for_what_came_before_and_nothing_else() {
        let mut sched = Sched::new();
        assert!(sched.drain().is_none());
        let a = sched.submit(job(1, 0..10)).expect("free");
        let b = sched.submit(job(2, 0..10)).expect("free");
        let mut drained = sched.drain().expect("two unfinished");
        let c = sched.submit(job(3, 0..10)).expect("free");
        sched.finish(&b.0);
        assert!(drained.try_recv().is_err());
        sched.finish(&a.0);
        assert!(drained.try_recv().is_ok());
        sched.finish(&c.0);
    }
}
