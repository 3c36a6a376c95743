//! The driver's thread: feeds the group's deliveries to [`Queues`], carries out what follows, sends what the daemon
//! asks for, and keeps the lease.
//!
//! Corosync orders everything by a token that goes round its nodes. A message of this process that came back proves
//! that it had the token; the message before that one, that everybody had it since. From then on the others need the
//! token timeout and the consensus timeout before they go on without this node: that is the lease (spec 04, 15).

use std::collections::VecDeque;
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
use super::queues::{Action, Queues};
use super::{Mailbox, option_lost};
use crate::{Answer, DriverError, Event, Lease};

/// Answer to a request.
pub type Reply = Result<(), DriverError>;

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
    /// The verdict on a join.
    JoinAnswer(u64, Option<Box<ClusterInfo>>),
    /// Whether the mutex was taken.
    BlockAnswer(u64, bool),
    /// End the thread.
    Stop,
}

/// A call of the daemon.
pub enum Request {
    /// Enter the group and send JOIN.
    Join(NodeRecord, Box<ClusterInfo>),
    /// Send LEAVE and stay in the group.
    Leave,
    /// Leave the group.
    End,
    /// Send NOTIFY.
    Notify(Vec<u8>),
    /// Send BLOCK.
    Block,
    /// Send UNBLOCK.
    Unblock(Vec<u8>),
    /// Send UPDATE_NODE.
    Update(NodeRecord),
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
    before: Option<Instant>,
    /// When the one that is on its way was sent.
    sent: Option<Instant>,
    next: Instant,
    /// What the daemon knows of the lease, once there was one.
    fresh: Option<bool>,
}

/// See the module's documentation.
pub struct Member {
    process: ProcessId,
    group: Group,
    heartbeat: Heartbeat,
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
            let wait = if self.outbox.is_empty() { TICK } else { RETRY };
            if let Err(e) = self.sleep(waker, wait) {
                let _ = self.fail(format!("waiting for cluster events: {e}"));
                return;
            }
        }
        // The right to acknowledge ends with the thread.
        self.heartbeat.lease.extend(Instant::now());
    }

    fn sleep(&self, waker: &EventFd, wait: Duration) -> std::io::Result<()> {
        let pulse = self.heartbeat.next.saturating_duration_since(Instant::now());
        let wait = wait.min(pulse.max(Duration::from_millis(1)));
        let mut fds = [
            PollFd::new(self.group.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.heartbeat.group.as_fd(), PollFlags::POLLIN),
            PollFd::new(waker.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::from(wait.as_millis() as u16)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        let _ = waker.read();
        Ok(())
    }

    fn fail(&self, text: String) -> Flow {
        // Nothing is acknowledged any more, before anybody is told.
        self.heartbeat.lease.extend(Instant::now());
        let _ = self.events.send(Event::Failed(text));
        Err(End)
    }

    fn turn(&mut self, inbox: &mpsc::Receiver<Command>, tick: &mut Instant) -> Flow {
        while let Ok(command) = inbox.try_recv() {
            match command {
                Command::Request(request, reply) => self.request(request, reply)?,
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
            h.lease.extend(before + h.limit);
        }
        if self.queues.is_some() && h.sent.is_none() && h.next <= now && h.group.send(b"token").is_ok() {
            h.sent = Some(now);
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
