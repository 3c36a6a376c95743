//! One process's part in the shared queue: its read positions, its requests, and the watch over dead processes (spec
//! 04, 11.3 to 11.6).
//!
//! The thread never waits for the daemon: a question is sent with an answer that comes back as a command, and until
//! then nothing behind the question is read. It holds the file lock only while it looks or writes.

use std::collections::VecDeque;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sheepdog_proto::cluster::ClusterInfoHeader;
use sheepdog_proto::{ClusterInfo, NodeRecord};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;

use super::Mailbox;
use super::layout::{
    self, BLOCK, BUF_LEN, EventKind, LocalNode, MAX_LOCAL_NODES, NONBLOCK, QueueEvent, Ring, SLOTS, distance,
    next,
};
use super::liveness::Liveness;
use super::queue::{Locked, Mark, QueueFile};
use super::wake::Sleeper;
use crate::{Answer, DriverError, Event, Reply, Request};

type Result<T> = std::result::Result<T, DriverError>;
/// How often dead processes are looked for, questions answered "no" repeated, and the write quota renewed.
const TICK: Duration = Duration::from_millis(50);
/// Most events that all processes together write to a ring in one [`TICK`]: readers that wake up at least that often
/// are never a whole ring behind, which ends them.
const TICK_QUOTA: usize = 400;
/// Most unconsumed block events, with room for what others write at the same moment.
const MAX_PENDING_BLOCKS: usize = SLOTS - 50;
/// Longest member list of a cluster info in an event.
pub const MAX_INFO_NODES: usize = (BUF_LEN - ClusterInfoHeader::LEN) / NodeRecord::LEN;

/// What the thread is asked to do.
pub enum Command {
    /// A call of the daemon.
    Request(Request, oneshot::Sender<Reply>),
    /// The verdict on the join question with this number.
    JoinAnswer(u64, Option<Box<ClusterInfo>>),
    /// Whether the block question with this number was accepted.
    BlockAnswer(u64, bool),
    /// End the thread.
    Stop,
}

/// A question on its way to the daemon.
#[derive(Clone, Copy)]
struct Asked {
    number: u64,
    slot: usize,
    sender: LocalNode,
}

enum Flow {
    Consumed,
    Stop,
}

/// State of one process in the queue.
pub struct Member {
    queue: Arc<QueueFile>,
    liveness: Liveness,
    events: UnboundedSender<Event>,
    mailbox: Mailbox,
    /// Set by our JOIN.
    me: Option<LocalNode>,
    /// Our ACCEPT was read.
    joined: bool,
    nonblock_pos: usize,
    /// Of the event there: another one means that more than a ring was written meanwhile.
    last_read: Option<Mark>,
    block_pos: usize,
    join_asked: Option<Asked>,
    block_asked: Option<Asked>,
    /// Answered "no": not asked again before the next tick.
    join_declined: bool,
    block_declined: bool,
    questions: u64,
    /// Positions of both rings at the last tick, for the quota.
    tick_pos: [usize; 2],
    /// Requests not written yet because the quota was used up.
    backlog: VecDeque<(Request, oneshot::Sender<Reply>)>,
    /// Block requests accepted but not written yet.
    blocks_due: usize,
}

impl Member {
    /// A member that has neither joined nor attached.
    pub fn new(queue: QueueFile, events: UnboundedSender<Event>, mailbox: Mailbox) -> Result<Member> {
        Ok(Member {
            liveness: Liveness::new(queue.id()),
            queue: Arc::new(queue),
            events,
            mailbox,
            me: None,
            joined: false,
            nonblock_pos: 0,
            last_read: None,
            block_pos: 0,
            join_asked: None,
            block_asked: None,
            join_declined: false,
            block_declined: false,
            questions: 0,
            tick_pos: [0; 2],
            backlog: VecDeque::new(),
            blocks_due: 0,
        })
    }

    /// Takes the file's positions as ours, or empties the file if all listed processes are dead.
    pub fn attach(&mut self) -> Result<()> {
        let queue = self.queue.clone();
        self.attach_locked(&queue.lock()?)
    }

    fn attach_locked(&mut self, file: &Locked) -> Result<()> {
        let newest = file.newest()?;
        if !newest.is_empty() && !newest.iter().any(|n| self.liveness.alive(n.pid)) {
            file.reset()?;
        }
        self.read_up_to(file, file.pos(NONBLOCK)?)?;
        self.block_pos = before_oldest_pending_block(file)?;
        self.tick_pos = [file.pos(BLOCK)?, self.nonblock_pos];
        Ok(())
    }

    /// The thread: runs until told to stop or until the file fails, which the daemon learns as an event.
    pub fn run(mut self, inbox: &mpsc::Receiver<Command>, sleeper: &Sleeper) {
        let mut next_tick = Instant::now() + TICK;
        loop {
            match self.turn(inbox, &mut next_tick) {
                Ok(true) => {}
                Ok(false) => return,
                Err(e) => {
                    let _ = self.events.send(Event::Failed(e.to_string()));
                    return;
                }
            }
            if let Err(e) = sleeper.sleep_until(next_tick, &self.mailbox.waker) {
                let _ = self.events.send(Event::Failed(format!("waiting for cluster events: {e}")));
                return;
            }
        }
    }

    /// One round; `false` = stop.
    fn turn(&mut self, inbox: &mpsc::Receiver<Command>, next_tick: &mut Instant) -> Result<bool> {
        if Instant::now() >= *next_tick {
            *next_tick = Instant::now() + TICK;
            self.tick()?;
        }
        while let Ok(command) = inbox.try_recv() {
            match command {
                Command::Request(request, reply) => self.backlog.push_back((request, reply)),
                Command::JoinAnswer(number, info) => self.join_answered(number, info)?,
                Command::BlockAnswer(number, granted) => self.block_answered(number, granted)?,
                Command::Stop => return Ok(false),
            }
            self.write_backlog()?;
        }
        self.write_backlog()?;
        self.read()?;
        Ok(true)
    }

    fn tick(&mut self) -> Result<()> {
        self.join_declined = false;
        self.block_declined = false;
        let queue = self.queue.clone();
        let file = queue.lock()?;
        self.tick_pos = [file.pos(BLOCK)?, file.pos(NONBLOCK)?];
        if self.me.is_some() {
            self.bury_dead(&file, TICK_QUOTA)?;
        }
        Ok(())
    }

    fn has_quota(&self, file: &Locked, ring: Ring) -> Result<bool> {
        let at_tick = self.tick_pos[usize::from(ring == NONBLOCK)];
        Ok(distance(at_tick, file.pos(ring)?) < TICK_QUOTA)
    }

    // ---- writing ----

    /// Writes what the quotas allow.
    fn write_backlog(&mut self) -> Result<()> {
        if self.backlog.is_empty() && self.blocks_due == 0 {
            return Ok(());
        }
        let queue = self.queue.clone();
        let file = queue.lock()?;
        while !self.backlog.is_empty() && self.has_quota(&file, NONBLOCK)? {
            let Some((request, reply)) = self.backlog.pop_front() else { break };
            match self.handle(&file, request) {
                Err(e @ (DriverError::Io { .. } | DriverError::BadQueue { .. })) => {
                    let _ = reply.send(Err(DriverError::Stopped));
                    return Err(e);
                }
                result => drop(reply.send(result)),
            }
        }
        while let Some(me) = self.me.filter(|_| self.blocks_due > 0) {
            if distance(self.block_pos, file.pos(BLOCK)?) >= MAX_PENDING_BLOCKS
                || !self.has_quota(&file, BLOCK)?
            {
                break;
            }
            self.append(&file, BLOCK, EventKind::Block, me, Vec::new())?;
            self.blocks_due -= 1;
        }
        Ok(())
    }

    fn handle(&mut self, file: &Locked, request: Request) -> Reply {
        match request {
            Request::Join(me, info) => self.join(file, me, &info),
            // The end of the process is seen as such.
            Request::Leave | Request::End => self.leave(file),
            Request::Notify(message) => {
                let me = self.me.ok_or(DriverError::NotJoined)?;
                self.append(file, NONBLOCK, EventKind::Notify, me, message)
            }
            Request::Block => {
                self.me.ok_or(DriverError::NotJoined)?;
                self.blocks_due += 1;
                Ok(())
            }
            Request::Unblock(message) => self.unblock(file, message),
            Request::Update(node) => {
                let me = self.me.ok_or(DriverError::NotJoined)?;
                if me.node.nid != node.nid {
                    return Err(DriverError::NotMe(node.nid));
                }
                self.append(file, NONBLOCK, EventKind::UpdateNode, LocalNode { node, ..me }, Vec::new())
            }
        }
    }

    fn join(&mut self, file: &Locked, node: NodeRecord, info: &ClusterInfo) -> Reply {
        if self.me.is_some() {
            return Err(DriverError::AlreadyJoined);
        }
        let info = encode_info(info)?;
        // Between opening and now the cluster may have come and gone.
        self.attach_locked(file)?;
        // All of them, or a dead one with our address would stay listed beside us.
        self.bury_dead(file, MAX_LOCAL_NODES)?;
        let listed = file.newest()?;
        if let Some(other) = listed.iter().find(|n| n.node.nid == node.nid) {
            return Err(DriverError::AddressInUse { node: node.nid, pid: other.pid });
        }
        if listed.len() >= MAX_LOCAL_NODES {
            return Err(DriverError::Full(listed.len()));
        }
        // What was just written about the dead is history to us.
        self.read_up_to(file, file.pos(NONBLOCK)?)?;
        self.block_pos = before_oldest_pending_block(file)?;
        let me = LocalNode { node, pid: std::process::id() as i32, gateway: 0 };
        self.append(file, NONBLOCK, EventKind::Join, me, info)?;
        self.me = Some(me);
        Ok(())
    }

    fn leave(&mut self, file: &Locked) -> Reply {
        match self.me {
            Some(me) if me.gateway == 0 => {
                self.append(file, NONBLOCK, EventKind::Gateway, me, Vec::new())?;
                self.me = Some(LocalNode { gateway: 1, ..me });
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn unblock(&mut self, file: &Locked, message: Vec<u8>) -> Reply {
        let me = self.me.ok_or(DriverError::NotJoined)?;
        let slot = next(self.block_pos);
        let head = file.head(BLOCK, slot)?;
        let pending = self.block_pos != file.pos(BLOCK)? && head.kind == EventKind::Block as u32;
        if !pending || !head.sender.is(&me) || head.removed != 0 || head.callbacked == 0 {
            return Err(DriverError::NotBlocked);
        }
        file.set_removed(BLOCK, slot)?;
        self.append(file, NONBLOCK, EventKind::Notify, me, message)
    }

    fn append(
        &mut self,
        file: &Locked,
        ring: Ring,
        kind: EventKind,
        sender: LocalNode,
        buf: Vec<u8>,
    ) -> Result<()> {
        let mut lnodes = file.newest()?;
        layout::apply(&mut lnodes, kind, &sender);
        let event = QueueEvent { kind, sender, callbacked: false, removed: false, buf, lnodes };
        file.append(ring, &event)?;
        self.signal(file)
    }

    /// Tells all other processes that there is something to read.
    fn signal(&mut self, file: &Locked) -> Result<()> {
        let me = std::process::id() as i32;
        for node in file.newest()? {
            if node.pid != me && self.liveness.alive(node.pid) {
                let _ = kill(Pid::from_raw(node.pid), Signal::SIGUSR1);
            }
        }
        Ok(())
    }

    /// Writes LEAVE for listed processes that are dead, at most `limit`, and voids their block events.
    fn bury_dead(&mut self, file: &Locked, limit: usize) -> Result<()> {
        let listed = file.newest()?;
        let dead: Vec<_> = listed.into_iter().filter(|n| !self.liveness.alive(n.pid)).collect();
        for node in dead.into_iter().take(limit) {
            for slot in 0..SLOTS {
                let head = file.head(BLOCK, slot)?;
                if head.kind == EventKind::Block as u32 && head.removed == 0 && head.sender.is(&node) {
                    file.set_removed(BLOCK, slot)?;
                }
            }
            self.append(file, NONBLOCK, EventKind::Leave, node, Vec::new())?;
        }
        Ok(())
    }

    // ---- reading ----

    /// The events up to this slot are read.
    fn read_up_to(&mut self, file: &Locked, slot: usize) -> Result<()> {
        self.nonblock_pos = slot;
        self.last_read = Some(file.mark(NONBLOCK, slot)?);
        Ok(())
    }

    /// A process that was stopped, or had no time to run, does not find what was overwritten meanwhile.
    fn check_not_lapped(&self, file: &Locked) -> Result<()> {
        match &self.last_read {
            Some(last) if *last != file.mark(NONBLOCK, self.nonblock_pos)? => {
                Err(DriverError::MissedEvents(SLOTS))
            }
            _ => Ok(()),
        }
    }

    /// Reads until nothing is left or the head waits for an answer. Nonblock events go first.
    fn read(&mut self) -> Result<()> {
        let Some(me) = self.me else { return Ok(()) };
        let queue = self.queue.clone();
        let file = queue.lock()?;
        self.check_not_lapped(&file)?;
        loop {
            let flow = if self.nonblock_pos != file.pos(NONBLOCK)? {
                let slot = next(self.nonblock_pos);
                let flow = self.nonblock(&file, &me, slot)?;
                if matches!(flow, Flow::Consumed) {
                    self.read_up_to(&file, slot)?;
                }
                flow
            } else if self.block_pos != file.pos(BLOCK)? {
                let slot = next(self.block_pos);
                let flow = self.block(&file, &me, slot)?;
                if matches!(flow, Flow::Consumed) {
                    self.block_pos = slot;
                }
                flow
            } else {
                Flow::Stop
            };
            if matches!(flow, Flow::Stop) {
                return Ok(());
            }
        }
    }

    fn nonblock(&mut self, file: &Locked, me: &LocalNode, slot: usize) -> Result<Flow> {
        let event = file.event(NONBLOCK, slot)?;
        let mine = event.sender.is(me);
        let concerns_me = self.joined || mine && matches!(event.kind, EventKind::Join | EventKind::Accept);
        if event.removed || !concerns_me {
            return Ok(Flow::Consumed);
        }
        let node = event.sender.node;
        let members = layout::members(&event.lnodes, None);
        let raised = match event.kind {
            EventKind::Join => return self.ask_join(file, slot, &event, mine),
            EventKind::Accept => {
                self.joined = true;
                self.join_asked = None;
                let info = decode_info(file, &event.buf)?;
                Some(Event::Accept { node, members, info })
            }
            EventKind::Leave if event.sender.gateway != 0 => None,
            EventKind::Leave | EventKind::Gateway => {
                if let Some(own) = self.me.as_mut().filter(|_| mine) {
                    own.gateway = 1;
                }
                Some(Event::Leave { node, members })
            }
            EventKind::Notify => Some(Event::Notify { sender: node, message: event.buf }),
            EventKind::UpdateNode => {
                if let Some(own) = self.me.as_mut().filter(|_| mine) {
                    own.node = node;
                }
                Some(Event::UpdateNode { node, members })
            }
            EventKind::Block => return Err(file.bad("block event among the others")),
        };
        if let Some(event) = raised {
            self.raise(event)?;
        }
        Ok(Flow::Consumed)
    }

    /// The daemon is asked about a foreign join if it is a member itself, about its own only if nobody else can be.
    fn ask_join(&mut self, file: &Locked, slot: usize, event: &QueueEvent, mine: bool) -> Result<Flow> {
        let joiner = event.sender;
        let others = event.lnodes.iter().filter(|n| n.gateway == 0 && n.node.nid != joiner.node.nid);
        let others: Vec<_> = others.copied().collect();
        let mut members = layout::members(&others, None);
        if mine {
            if others.iter().any(|n| self.liveness.alive(n.pid)) {
                return Ok(Flow::Stop);
            }
            members.clear();
        } else if self.me.is_none_or(|me| me.gateway != 0) {
            return Ok(Flow::Stop);
        }
        if self.join_declined || self.join_asked.is_some_and(|a| a.slot == slot && a.sender.is(&joiner)) {
            return Ok(Flow::Stop);
        }
        let info = decode_info(file, &event.buf)?;
        let number = self.next_question();
        self.join_asked = Some(Asked { number, slot, sender: joiner });
        let mailbox = self.mailbox.clone();
        let answer = Answer::new(move |info: Option<ClusterInfo>| {
            let _ = mailbox.send(Command::JoinAnswer(number, info.map(Box::new)));
        });
        self.raise(Event::Join { node: joiner.node, members, info, answer })?;
        Ok(Flow::Stop)
    }

    fn join_answered(&mut self, number: u64, info: Option<Box<ClusterInfo>>) -> Result<()> {
        let Some(asked) = self.join_asked.take_if(|a| a.number == number) else { return Ok(()) };
        let Some(info) = info else {
            self.join_declined = true;
            return Ok(());
        };
        let info = encode_info(&info)?;
        let queue = self.queue.clone();
        let file = queue.lock()?;
        let head = file.head(NONBLOCK, asked.slot)?;
        if head.kind == EventKind::Join as u32 && head.sender.is(&asked.sender) {
            file.accept(asked.slot, &info)?;
            self.signal(&file)?;
        }
        Ok(())
    }

    fn block(&mut self, file: &Locked, me: &LocalNode, slot: usize) -> Result<Flow> {
        let head = file.head(BLOCK, slot)?;
        if head.kind != EventKind::Block as u32 {
            return Err(file.bad(format!("event type {} among the block events", head.kind)));
        }
        let sender_listed = || Ok::<_, DriverError>(file.newest()?.iter().any(|n| n.is(&head.sender)));
        if head.removed != 0 || !sender_listed()? {
            self.block_asked = None;
            return Ok(Flow::Consumed);
        }
        if head.callbacked != 0 || !head.sender.is(me) || self.block_asked.is_some() || self.block_declined {
            return Ok(Flow::Stop);
        }
        let number = self.next_question();
        self.block_asked = Some(Asked { number, slot, sender: head.sender });
        let mailbox = self.mailbox.clone();
        let answer = Answer::new(move |granted| {
            let _ = mailbox.send(Command::BlockAnswer(number, granted));
        });
        self.raise(Event::Block { node: head.sender.node, answer })?;
        Ok(Flow::Stop)
    }

    fn block_answered(&mut self, number: u64, granted: bool) -> Result<()> {
        let Some(asked) = self.block_asked.take_if(|a| a.number == number) else { return Ok(()) };
        if !granted {
            self.block_declined = true;
            return Ok(());
        }
        let queue = self.queue.clone();
        let file = queue.lock()?;
        let head = file.head(BLOCK, asked.slot)?;
        if head.kind == EventKind::Block as u32 && head.sender.is(&asked.sender) && head.removed == 0 {
            file.set_callbacked(BLOCK, asked.slot)?;
        }
        Ok(())
    }

    fn next_question(&mut self) -> u64 {
        self.questions += 1;
        self.questions
    }

    fn raise(&self, event: Event) -> Result<()> {
        self.events.send(event).map_err(|_| DriverError::Stopped)
    }
}

/// The position from which the oldest undecided block event is read. A newcomer that started at the newest one would
/// take its own request for the head while another's is granted.
fn before_oldest_pending_block(file: &Locked) -> Result<usize> {
    let newest = file.pos(BLOCK)?;
    let listed = file.newest()?;
    let mut slot = newest;
    for _ in 0..SLOTS {
        let before = slot;
        slot = next(slot);
        let head = file.head(BLOCK, slot)?;
        let pending = head.kind == EventKind::Block as u32 && head.removed == 0;
        if pending && listed.iter().any(|n| n.is(&head.sender)) {
            return Ok(before);
        }
    }
    Ok(newest)
}

fn encode_info(info: &ClusterInfo) -> Result<Vec<u8>> {
    if info.nodes.len() > MAX_INFO_NODES {
        return Err(DriverError::InfoTooLong { got: info.nodes.len(), max: MAX_INFO_NODES });
    }
    Ok(info.encode_padded(BUF_LEN))
}

fn decode_info(file: &Locked, buf: &[u8]) -> Result<ClusterInfo> {
    ClusterInfo::decode(buf).map_err(|e| file.bad(e.to_string()))
}
