//! Cluster-wide mutexes, by messages in a group of their own: the original's sheep, whose locks do nothing on corosync,
//! are not in it and see nothing of it (spec 04, 13.5).
//!
//! A request is a message. Everybody who is in the group when it is delivered agrees to it at once, or, if it has or wants
//! the same mutex by an earlier request, when that is over; a request is granted when all have agreed that are still
//! there. As all see requests and changes of the group in one order, nothing has to be handed over to a newcomer: it
//! was not asked about the requests before it, and asks everybody about its own. Pure: what to send and whom to wake is
//! returned.

use sheepdog_proto::{DecodeError, Wire, wire};

use super::ffi::Changed;
use super::layout::ProcessId;

/// First bytes of a message.
const MAGIC: u32 = u32::from_le_bytes(*b"SDLK");
/// [`LockMessage::kind`] of a request.
const WANT: u32 = 1;
/// [`LockMessage::kind`] of an agreement.
const AGREE: u32 = 2;

wire! {
    /// A message of the group.
    LockMessage [40] {
        /// [`MAGIC`].
        0 => magic: u32,
        /// [`WANT`] or [`AGREE`].
        4 => kind: u32,
        /// The sender's corosync node.
        8 => nodeid: u32,
        /// Its process id there.
        12 => pid: u32,
        /// Who asked: its corosync node.
        16 => asker_nodeid: u32,
        /// Its process id there.
        20 => asker_pid: u32,
        /// The asker's number for the request.
        24 => number: u64,
        /// Which mutex.
        32 => id: u64,
    }
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Send a message to the group.
    Send(Vec<u8>),
    /// The own request with this number has its mutex.
    Granted(u64),
}

/// An own request that is not over.
struct Want {
    number: u64,
    id: u64,
    /// Who has not agreed, once its place in the order is known.
    awaited: Option<Vec<ProcessId>>,
    granted: bool,
}

/// A request that is agreed to when all these own ones are over.
struct Deferred {
    asker: ProcessId,
    number: u64,
    id: u64,
    before: Vec<u64>,
}

/// One process's view.
pub struct Locks {
    me: ProcessId,
    present: Vec<ProcessId>,
    wants: Vec<Want>,
    deferred: Vec<Deferred>,
    numbers: u64,
}

impl Locks {
    /// Nothing is wanted.
    pub fn new(me: ProcessId) -> Locks {
        Locks { me, present: Vec::new(), wants: Vec::new(), deferred: Vec::new(), numbers: 0 }
    }

    /// A new own request: its number, and the message that asks for it.
    pub fn want(&mut self, id: u64) -> (u64, Vec<u8>) {
        self.numbers += 1;
        let number = self.numbers;
        self.wants.push(Want { number, id, awaited: None, granted: false });
        (number, self.message(WANT, self.me, number, id))
    }

    /// An own request is over, granted or not.
    pub fn end(&mut self, number: u64) -> Vec<Action> {
        self.wants.retain(|w| w.number != number);
        for deferred in &mut self.deferred {
            deferred.before.retain(|n| *n != number);
        }
        self.agree()
    }

    /// The group changed.
    pub fn changed(&mut self, members: &[Changed]) -> Vec<Action> {
        self.present = members.iter().map(|m| m.process).collect();
        let present = &self.present;
        self.deferred.retain(|d| present.contains(&d.asker));
        for awaited in self.wants.iter_mut().filter_map(|w| w.awaited.as_mut()) {
            awaited.retain(|p| present.contains(p));
        }
        self.grant()
    }

    /// A message was delivered.
    pub fn delivered(&mut self, bytes: &[u8]) -> Result<Vec<Action>, DecodeError> {
        let message = LockMessage::decode(bytes)?;
        let sender = ProcessId { nodeid: message.nodeid, pid: message.pid };
        let asker = ProcessId { nodeid: message.asker_nodeid, pid: message.asker_pid };
        let LockMessage { number, id, .. } = message;
        Ok(match (message.magic, message.kind) {
            (MAGIC, WANT) => {
                let ordered = |w: &&Want| w.id == id && w.awaited.is_some();
                let before = self.wants.iter().filter(ordered).map(|w| w.number).collect();
                if asker == self.me
                    && let Some(want) = self.wants.iter_mut().find(|w| w.number == number)
                {
                    want.awaited = Some(self.present.clone());
                }
                self.deferred.push(Deferred { asker, number, id, before });
                self.agree()
            }
            (MAGIC, AGREE) if asker == self.me => {
                let want = self.wants.iter_mut().find(|w| w.number == number);
                if let Some(awaited) = want.and_then(|w| w.awaited.as_mut()) {
                    awaited.retain(|p| *p != sender);
                }
                self.grant()
            }
            _ => Vec::new(),
        })
    }

    fn message(&self, kind: u32, asker: ProcessId, number: u64, id: u64) -> Vec<u8> {
        let message = LockMessage {
            magic: MAGIC,
            kind,
            nodeid: self.me.nodeid,
            pid: self.me.pid,
            asker_nodeid: asker.nodeid,
            asker_pid: asker.pid,
            number,
            id,
        };
        message.to_bytes().to_vec()
    }

    /// Agrees to what nothing stands before.
    fn agree(&mut self) -> Vec<Action> {
        let (free, waiting) =
            std::mem::take(&mut self.deferred).into_iter().partition(|d| d.before.is_empty());
        self.deferred = waiting;
        let free: Vec<Deferred> = free;
        free.iter().map(|d| Action::Send(self.message(AGREE, d.asker, d.number, d.id))).collect()
    }

    fn grant(&mut self) -> Vec<Action> {
        let mut granted = Vec::new();
        for want in &mut self.wants {
            if !want.granted && want.awaited.as_ref().is_some_and(Vec::is_empty) {
                want.granted = true;
                granted.push(Action::Granted(want.number));
            }
        }
        granted
    }
}

#[cfg(test)]
mod tests {
    use super::super::ffi::Reason;
    use super::*;
    use std::collections::VecDeque;

    /// Processes of one group, which deliver what is in the order.
    struct Group {
        members: Vec<Locks>,
        order: VecDeque<Vec<u8>>,
        granted: Vec<(u32, u64)>,
    }

    fn process(pid: u32) -> ProcessId {
        ProcessId { nodeid: 1, pid }
    }

    impl Group {
        fn of(pids: &[u32]) -> Group {
            let mut group = Group { members: Vec::new(), order: VecDeque::new(), granted: Vec::new() };
            pids.iter().for_each(|pid| group.join(*pid));
            group
        }

        fn join(&mut self, pid: u32) {
            self.members.push(Locks::new(process(pid)));
            self.change();
        }

        fn lose(&mut self, pid: u32) {
            self.members.retain(|m| m.me != process(pid));
            self.change();
        }

        fn change(&mut self) {
            let list: Vec<Changed> =
                self.members.iter().map(|m| Changed { process: m.me, reason: Reason::Process }).collect();
            for at in 0..self.members.len() {
                let actions = self.members[at].changed(&list);
                self.act(at, actions);
            }
        }

        fn at(&self, pid: u32) -> usize {
            self.members.iter().position(|m| m.me == process(pid)).expect("a member")
        }

        fn want(&mut self, pid: u32, id: u64) -> u64 {
            let at = self.at(pid);
            let (number, bytes) = self.members[at].want(id);
            self.order.push_back(bytes);
            number
        }

        fn end(&mut self, pid: u32, number: u64) {
            let at = self.at(pid);
            let actions = self.members[at].end(number);
            self.act(at, actions);
        }

        fn act(&mut self, at: usize, actions: Vec<Action>) {
            for action in actions {
                match action {
                    Action::Send(bytes) => self.order.push_back(bytes),
                    Action::Granted(number) => self.granted.push((self.members[at].me.pid, number)),
                }
            }
        }

        /// Delivers until nothing is left; what was granted since the last time.
        fn run(&mut self) -> Vec<(u32, u64)> {
            while let Some(bytes) = self.order.pop_front() {
                for at in 0..self.members.len() {
                    let actions = self.members[at].delivered(&bytes).expect("a message");
                    self.act(at, actions);
                }
            }
            std::mem::take(&mut self.granted)
        }
    }

    #[test]
    fn a_mutex_is_granted_in_the_order_of_the_requests_and_others_do_not_matter() {
        let mut group = Group::of(&[1, 2, 3]);
        let (b, a, c) = (group.want(2, 5), group.want(1, 5), group.want(3, 6));
        let second = group.want(2, 5);
        assert_eq!(group.run(), [(2, b), (3, c)]);
        group.end(2, b);
        assert_eq!(group.run(), [(1, a)]);
        group.end(1, a);
        assert_eq!(group.run(), [(2, second)], "also twice by one process");
    }

    #[test]
    fn a_newcomer_waits_for_the_holder_and_is_not_asked_about_the_requests_before() {
        let mut group = Group::of(&[1, 2]);
        let a = group.want(1, 5);
        assert_eq!(group.run(), [(1, a)]);
        let b = group.want(2, 5);
        group.run();
        group.join(3);
        let c = group.want(3, 5);
        assert_eq!(group.run(), []);
        group.end(1, a);
        assert_eq!(group.run(), [(2, b)]);
        group.end(2, b);
        assert_eq!(group.run(), [(3, c)]);
    }

    #[test]
    fn the_dead_neither_hold_nor_wait() {
        let mut group = Group::of(&[1, 2, 3]);
        let a = group.want(1, 5);
        assert_eq!(group.run(), [(1, a)]);
        let (_, c) = (group.want(2, 5), group.want(3, 5));
        assert_eq!(group.run(), []);
        group.lose(2);
        assert_eq!(group.run(), []);
        group.lose(1);
        assert_eq!(group.run(), [(3, c)]);
    }

    #[test]
    fn a_request_that_was_given_up_holds_up_nobody_before_and_after_its_place_is_known() {
        let mut group = Group::of(&[1, 2]);
        let early = group.want(1, 5);
        group.end(1, early);
        let b = group.want(2, 5);
        assert_eq!(group.run(), [(2, b)]);
        let late = group.want(1, 5);
        group.run();
        group.end(1, late);
        let again = group.want(2, 5);
        group.end(2, b);
        assert_eq!(group.run(), [(2, again)]);
    }

    #[test]
    fn foreign_bytes_are_refused_or_ignored() {
        let mut group = Group::of(&[1]);
        assert!(group.members[0].delivered(b"short").is_err());
        assert_eq!(group.members[0].delivered(&[7; 40]).expect("decodes"), []);
    }
}
