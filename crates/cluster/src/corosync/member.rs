//! The driver's thread: feeds the group's deliveries to [`Queues`], carries out what follows, sends what the daemon
//! asks for, and keeps the lease.
//!
//! Corosync orders everything by a token that goes round its nodes. A message of this process that came back proves
//! that it had the token; the message before that one, that everybody had it since. From then on the others need the
//! token timeout and the consensus timeout before they go on without this node: that is the lease (spec 04, 15).

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsFd;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use sheepdog_proto::{ClusterInfo, NodeRecord};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;

use super::ffi::{ACCESS, Code, Delivery, Group, SECURITY, TRY_AGAIN};
use super::layout::{Body, Message, Peer, ProcessId};
use super::locks::{self, Locks};
use super::queues::{Action, Queues};
use super::{Mailbox, option_lost};
use crate::clock::Moment;
use crate::{Answer, DriverError, Event, Lease, Lock, Reply, Request};

/// How often things are looked at that nobody announces.
const TICK: Duration = Duration::from_millis(50);
/// Between two messages that corosync had no room for.
const RETRY: Duration = Duration::from_millis(5);
/// A joiner that was not told who has the mutex waits this long before it asks for it, and as long again after each
/// release by somebody it did not know of (spec 04, 13.3).
const HOLD: Duration = Duration::from_secs(5);
/// At most this long in all.
const MAX_HOLD: Duration = Duration::from_secs(30);
/// Between heartbeats as long as there is no lease.
const FIRST_BEATS: Duration = Duration::from_millis(20);
/// A process in the group that does not ask to join is named in the log this often.
const STUCK: Duration = Duration::from_secs(10);

/// What the thread is asked to do.
pub enum Command {
    /// A call of the daemon.
    Request(Request, oneshot::Sender<Reply>),
    /// Get the mutex with this number.
    Lock(u64, oneshot::Sender<Result<Lock, DriverError>>),
    /// The own request for a mutex is over; answered when the others are told.
    Unlock(u64, oneshot::Sender<()>),
    /// The verdict on a join.
    JoinAnswer(u64, Option<Box<ClusterInfo>>),
    /// Whether the mutex was taken.
    BlockAnswer(u64, bool),
    /// End the thread.
    Stop,
}

/// Something on its way out.
struct Outgoing {
    bytes: Vec<u8>,
    reply: Option<oneshot::Sender<Reply>>,
}

/// The proof that the token goes round.
struct Heartbeat {
    group: Group,
    lease: Arc<Lease>,
    limit: Duration,
    interval: Duration,
    /// When the message before the last that came back was sent.
    before: Option<Moment>,
    /// When the one that is on its way was sent.
    sent: Option<Moment>,
    next: Instant,
    /// What the daemon knows of the lease, once there was one.
    fresh: Option<bool>,
}

/// Mutexes by number, from the first request on.
struct Mutexes {
    group: Group,
    locks: Locks,
    /// Own requests that are not granted.
    waiting: HashMap<u64, oneshot::Sender<Result<Lock, DriverError>>>,
    /// What the locks of this process depend on.
    held: HashMap<u64, Arc<()>>,
    outbox: VecDeque<(Vec<u8>, Option<oneshot::Sender<()>>)>,
}

/// See the module's documentation.
pub struct Member {
    process: ProcessId,
    group: Group,
    heartbeat: Heartbeat,
    mutexes: Option<Mutexes>,
    events: UnboundedSender<Event>,
    mailbox: Mailbox,
    queues: Option<Queues>,
    /// This process's record, as joined and updated.
    me: Option<NodeRecord>,
    left: bool,
    outbox: VecDeque<Outgoing>,
    /// Own BLOCKs not sent yet; never more than one is out.
    blocks_due: usize,
    block_out: bool,
    /// Until when the first own BLOCK waits, and until when at most.
    hold: Option<(Instant, Instant)>,
    /// What stops the queue, and when the log says so next.
    stuck: Option<(ProcessId, Instant)>,
}

/// Ends the thread.
struct End;

type Flow = Result<(), End>;

impl Member {
    /// A member that has not joined.
    pub fn new(
        group: Group,
        process: ProcessId,
        pulse: Group,
        token: Duration,
        lease: Arc<Lease>,
        events: UnboundedSender<Event>,
        mailbox: Mailbox,
    ) -> Member {
        let heartbeat = Heartbeat {
            group: pulse,
            lease,
            // Token timeout and half of the consensus timeout, which is at least 6/5 of it.
            limit: token * 3 / 2,
            interval: token / 10,
            before: None,
            sent: None,
            next: Instant::now(),
            fresh: None,
        };
        Member {
            process,
            group,
            heartbeat,
            mutexes: None,
            events,
            mailbox,
            queues: None,
            me: None,
            left: false,
            outbox: VecDeque::new(),
            blocks_due: 0,
            block_out: false,
            hold: None,
            stuck: None,
        }
    }

    /// The thread: runs until told to stop, or until corosync ends, which the daemon learns as an event.
    pub fn run(mut self, inbox: &mpsc::Receiver<Command>, waker: &EventFd) {
        let mut tick = Instant::now();
        while self.turn(inbox, &mut tick).is_ok() {
            let waits =
                !self.outbox.is_empty() || self.mutexes.as_ref().is_some_and(|m| !m.outbox.is_empty());
            let wait = if waits { RETRY } else { TICK };
            if let Err(e) = self.sleep(waker, wait) {
                let _ = self.fail(format!("waiting for cluster events: {e}"));
                return;
            }
        }
        // The right to acknowledge ends with the thread.
        self.heartbeat.lease.end();
    }

    fn sleep(&self, waker: &EventFd, wait: Duration) -> std::io::Result<()> {
        let pulse = self.heartbeat.next.saturating_duration_since(Instant::now());
        let wait = wait.min(pulse.max(Duration::from_millis(1)));
        let groups = [&self.group, &self.heartbeat.group].into_iter();
        let groups = groups.chain(self.mutexes.as_ref().map(|m| &m.group)).map(AsFd::as_fd);
        let fds = groups.chain([waker.as_fd()]).map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        let mut fds: Vec<PollFd> = fds.collect();
        match poll(&mut fds, PollTimeout::from(wait.as_millis() as u16)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        let _ = waker.read();
        Ok(())
    }

    fn fail(&self, text: String) -> Flow {
        // Nothing is acknowledged any more, before anybody is told.
        self.heartbeat.lease.end();
        let _ = self.events.send(Event::Failed(text));
        Err(End)
    }

    fn turn(&mut self, inbox: &mpsc::Receiver<Command>, tick: &mut Instant) -> Flow {
        while let Ok(command) = inbox.try_recv() {
            match command {
                Command::Request(request, reply) => self.request(request, reply)?,
                Command::Lock(id, reply) => self.lock(id, reply),
                Command::Unlock(number, done) => {
                    if let Some(mutexes) = &mut self.mutexes {
                        mutexes.end(number, done);
                    }
                }
                Command::JoinAnswer(question, info) => {
                    let actions = self.queues.as_mut().map(|q| q.join_answered(question, info.map(|i| *i)));
                    self.act(actions.unwrap_or_default())?;
                }
                Command::BlockAnswer(question, granted) => {
                    if let Some(queues) = &mut self.queues {
                        queues.block_answered(question, granted);
                    }
                }
                Command::Stop => return Err(End),
            }
        }
        let delivered = match self.group.dispatch() {
            Ok(delivered) => delivered,
            Err(code) => return self.fail(option_lost(code)),
        };
        for delivery in delivered {
            self.deliver(delivery)?;
        }
        if *tick <= Instant::now() {
            *tick = Instant::now() + TICK;
            let actions = self.queues.as_mut().map(Queues::ask_again);
            self.act(actions.unwrap_or_default())?;
            self.report_stuck();
        }
        self.send_block();
        self.flush()?;
        if let Some(mutexes) = &mut self.mutexes
            && let Err(text) = mutexes.turn(&self.mailbox, &self.heartbeat.lease)
        {
            return self.fail(text);
        }
        self.beat()
    }

    fn deliver(&mut self, delivery: Delivery) -> Flow {
        let Some(queues) = &mut self.queues else { return Ok(()) };
        let actions = match delivery {
            Delivery::Message(bytes) => match Message::decode(&bytes) {
                Ok(message) => queues.delivered(message),
                Err(e) => {
                    tracing::error!("a message in the group is skipped: {e}");
                    return Ok(());
                }
            },
            Delivery::Change { members, left, joined } => queues.changed(&members, &left, &joined),
        };
        self.act(actions)
    }

    fn act(&mut self, actions: Vec<Action>) -> Flow {
        for action in actions {
            let event = match action {
                Action::Send(sender, body) => {
                    self.push(sender, *body, None);
                    continue;
                }
                Action::AskJoin { question, node, members, info } => {
                    let mailbox = self.mailbox.clone();
                    let answer = Answer::new(move |info: Option<ClusterInfo>| {
                        let _ = mailbox.send(Command::JoinAnswer(question, info.map(Box::new)));
                    });
                    Event::Join { node, members, info: *info, answer }
                }
                Action::AskBlock(question) => {
                    let Some(node) = self.me else { continue };
                    let mailbox = self.mailbox.clone();
                    let answer = Answer::new(move |granted| {
                        let _ = mailbox.send(Command::BlockAnswer(question, granted));
                    });
                    Event::Block { node, answer }
                }
                Action::Accept { node, members, info } => Event::Accept { node, members, info: *info },
                Action::Leave(node, members) => Event::Leave { node, members },
                Action::Notify(sender, message) => Event::Notify { sender, message },
                Action::Update(node, members) => {
                    if self.me.is_some_and(|me| me.nid == node.nid) {
                        self.me = Some(node);
                    }
                    Event::UpdateNode { node, members }
                }
                Action::Joined(knows) => {
                    let now = Instant::now();
                    self.hold = (!knows).then_some((now + HOLD, now + MAX_HOLD));
                    continue;
                }
                Action::UnknownUnblock => {
                    if let Some((until, end)) = &mut self.hold {
                        *until = (Instant::now() + HOLD).min(*end);
                    }
                    continue;
                }
                Action::Unblocked => {
                    self.block_out = false;
                    continue;
                }
                Action::Fail(text) => return self.fail(text),
                Action::Warn(text) => {
                    tracing::warn!("{text}");
                    continue;
                }
            };
            if self.events.send(event).is_err() {
                return Err(End);
            }
        }
        Ok(())
    }

    fn push(&mut self, sender: Peer, body: Body, reply: Option<oneshot::Sender<Reply>>) {
        self.outbox.push_back(Outgoing { bytes: Message { sender, body }.encode(), reply });
    }

    /// Sends what corosync has room for.
    fn flush(&mut self) -> Flow {
        while let Some(Outgoing { bytes, reply }) = self.outbox.pop_front() {
            match self.group.send(&bytes) {
                Ok(()) => drop(reply.map(|r| r.send(Ok(())))),
                Err(Code(TRY_AGAIN)) => {
                    self.outbox.push_front(Outgoing { bytes, reply });
                    return Ok(());
                }
                Err(code) => {
                    let reason = format!("cpg_mcast_joined returned {}", code.0);
                    match reply {
                        Some(reply) => drop(reply.send(Err(DriverError::Corosync(reason)))),
                        None => return self.fail(reason),
                    }
                }
            }
        }
        Ok(())
    }

    fn send_block(&mut self) {
        let Some(me) = self.me else { return };
        let waits = self.hold.is_some_and(|(until, _)| Instant::now() < until);
        if self.blocks_due > 0 && !self.block_out && !waits {
            self.hold = None;
            self.blocks_due -= 1;
            self.block_out = true;
            self.push(Peer { process: self.process, node: me }, Body::Block, None);
        }
    }

    fn report_stuck(&mut self) {
        let stuck = self.queues.as_ref().and_then(Queues::stuck);
        let now = Instant::now();
        self.stuck = stuck.map(|who| match self.stuck {
            Some((same, at)) if same == who && now < at => (who, at),
            Some((same, _)) if same == who => {
                tracing::error!(
                    "corosync node {}, pid {} is in the group and does not ask to join: cluster operations wait until \
                     that process ends",
                    who.nodeid,
                    who.pid
                );
                (who, now + STUCK)
            }
            _ => (who, now + STUCK),
        });
    }

    /// Sends the next heartbeat when the last one came back, and judges the lease.
    fn beat(&mut self) -> Flow {
        let now = Instant::now();
        let h = &mut self.heartbeat;
        let returned = match h.group.dispatch() {
            Ok(list) => list.iter().any(|d| matches!(d, Delivery::Message(_))),
            Err(code) => return self.fail(option_lost(code)),
        };
        if returned
            && let Some(sent) = h.sent.take()
            && let Some(before) = h.before.replace(sent)
        {
            h.lease.extend(before.after(h.limit));
        }
        let sent = Moment::now();
        if self.queues.is_some() && h.sent.is_none() && h.next <= now && h.group.send(b"token").is_ok() {
            h.sent = Some(sent);
        }
        let fresh = h.lease.is_fresh();
        if h.next <= now {
            h.next = now + if fresh { h.interval } else { h.interval.min(FIRST_BEATS) };
        }
        if h.fresh.is_none() && !fresh {
            return Ok(());
        }
        if h.fresh.replace(fresh).is_some_and(|before| before != fresh) {
            if !fresh {
                tracing::warn!("corosync has not confirmed this node for {} ms", h.limit.as_millis());
            }
            let _ = self.events.send(Event::Suspended(!fresh));
        }
        Ok(())
    }

    fn request(&mut self, request: Request, reply: oneshot::Sender<Reply>) -> Flow {
        let joined = self.queues.as_ref().is_some_and(Queues::joined);
        let result = match (request, self.me) {
            (Request::Join(me, info), None) => match self.join(me, *info) {
                Ok(()) => Ok(()),
                Err(e) => Err(e),
            },
            (Request::Join(..), Some(_)) => Err(DriverError::AlreadyJoined),
            (Request::End, _) => {
                // The others see the process leave the group; a LEAVE before could end old members (spec 04, 13.5).
                self.flush()?;
                let _ = self.group.leave();
                let _ = reply.send(Ok(()));
                return Err(End);
            }
            (Request::Leave, Some(me)) if !self.left && joined => {
                self.left = true;
                // Out of their group: the others get what this process had.
                self.mutexes = None;
                return self.queue(me, Body::Leave, reply);
            }
            (Request::Leave, _) => Ok(()),
            (_, None) => Err(DriverError::NotJoined),
            (_, Some(_)) if !joined => Err(DriverError::NotJoined),
            (Request::Notify(message), Some(me)) => return self.queue(me, Body::Notify(message), reply),
            (Request::Block, Some(_)) => {
                self.blocks_due += 1;
                Ok(())
            }
            (Request::Unblock(message), Some(me)) => {
                if self.queues.as_mut().is_some_and(Queues::take_turn) {
                    return self.queue(me, Body::Unblock(message), reply);
                }
                Err(DriverError::NotBlocked)
            }
            (Request::Update(node), Some(me)) if node.nid != me.nid => Err(DriverError::NotMe(node.nid)),
            // Old members end on a record of nobody they know.
            (Request::Update(_), Some(_)) if self.left => Err(DriverError::NotJoined),
            (Request::Update(node), Some(_)) => return self.queue(node, Body::UpdateNode, reply),
        };
        let _ = reply.send(result);
        Ok(())
    }

    fn queue(&mut self, node: NodeRecord, body: Body, reply: oneshot::Sender<Reply>) -> Flow {
        self.push(Peer { process: self.process, node }, body, Some(reply));
        Ok(())
    }

    fn lock(&mut self, id: u64, reply: oneshot::Sender<Result<Lock, DriverError>>) {
        if self.left || !self.queues.as_ref().is_some_and(Queues::joined) {
            return drop(reply.send(Err(DriverError::NotJoined)));
        }
        if self.mutexes.is_none() {
            match Mutexes::enter(self.process) {
                Ok(mutexes) => self.mutexes = Some(mutexes),
                Err(e) => return drop(reply.send(Err(e))),
            }
        }
        if let Some(mutexes) = &mut self.mutexes {
            let (number, message) = mutexes.locks.want(id);
            mutexes.waiting.insert(number, reply);
            mutexes.outbox.push_back((message, None));
        }
    }

    fn join(&mut self, me: NodeRecord, info: ClusterInfo) -> Reply {
        enter(&mut self.group)?;
        enter(&mut self.heartbeat.group)?;
        let peer = Peer { process: self.process, node: me };
        self.me = Some(me);
        self.queues = Some(Queues::new(peer));
        self.push(peer, Body::Join(info), None);
        Ok(())
    }
}

impl Mutexes {
    fn enter(process: ProcessId) -> Result<Mutexes, DriverError> {
        let mut group = super::connect(super::LOCK_GROUP)?;
        enter(&mut group)?;
        let (waiting, held) = (HashMap::new(), HashMap::new());
        Ok(Mutexes { group, locks: Locks::new(process), waiting, held, outbox: VecDeque::new() })
    }

    /// Handles what was delivered, and sends what corosync has room for.
    fn turn(&mut self, mailbox: &Mailbox, lease: &Arc<Lease>) -> Result<(), String> {
        for delivery in self.group.dispatch().map_err(option_lost)? {
            let actions = match delivery {
                Delivery::Change { members, .. } => self.locks.changed(&members),
                Delivery::Message(bytes) => match self.locks.delivered(&bytes) {
                    Ok(actions) => actions,
                    Err(e) => {
                        tracing::error!("a message in the group of the locks is skipped: {e}");
                        continue;
                    }
                },
            };
            self.act(actions, mailbox, lease);
        }
        while let Some((bytes, done)) = self.outbox.pop_front() {
            match self.group.send(&bytes) {
                Ok(()) => drop(done.map(|d| d.send(()))),
                Err(Code(TRY_AGAIN)) => {
                    self.outbox.push_front((bytes, done));
                    break;
                }
                Err(code) => return Err(format!("cpg_mcast_joined returned {}", code.0)),
            }
        }
        Ok(())
    }

    fn act(&mut self, actions: Vec<locks::Action>, mailbox: &Mailbox, lease: &Arc<Lease>) {
        for action in actions {
            match action {
                locks::Action::Send(bytes) => self.outbox.push_back((bytes, None)),
                locks::Action::Granted(number) => {
                    let alive = Arc::new(());
                    let way = mailbox.clone();
                    let lock = Lock::new(&alive, Some(lease.clone()), move |done| {
                        let _ = way.send(Command::Unlock(number, done));
                    });
                    self.held.insert(number, alive);
                    // A caller that does not wait any more drops the lock, which ends it.
                    drop(self.waiting.remove(&number).map(|reply| reply.send(Ok(lock))));
                }
            }
        }
    }

    fn end(&mut self, number: u64, done: oneshot::Sender<()>) {
        self.held.remove(&number);
        let mut done = Some(done);
        for action in self.locks.end(number) {
            // The end of a request grants nothing to this process before its own message came back.
            if let locks::Action::Send(bytes) = action {
                self.outbox.push_back((bytes, done.take()));
            }
        }
        if let Some(done) = done {
            let _ = done.send(());
        }
    }
}

fn enter(group: &mut Group) -> Reply {
    loop {
        match group.join() {
            Ok(()) => return Ok(()),
            Err(Code(TRY_AGAIN)) => std::thread::sleep(super::CONNECT_RETRY),
            Err(Code(SECURITY | ACCESS)) => {
                return Err(DriverError::Corosync("permission denied to join the sheepdog group".to_owned()));
            }
            Err(code) => {
                return Err(DriverError::Corosync(format!("failed to join the sheepdog group ({})", code.0)));
            }
        }
    }
}
