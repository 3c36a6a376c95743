//! What this node does in one session: entering, answering joins, watching members, leaving (spec 04, 12.5 to 12.8).

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use sheepdog_proto::{ClusterInfo, NodeId, NodeRecord};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;
use zookeeper_client::{CreateMode, Error as ZkError};

use super::election::{self, Progress, Standing};
use super::history::History;
use super::layout::{Body, Entry, encode_position, encode_session, member_path, position_path};
use super::link::{Fault, Link, LinkOwner, fence};
use super::locks::Locks;
use super::member::Command;
use super::queue::{self, Read, Write};
use super::tasks::{Tell, enter, log_fault, needed, watch_member, watch_session};
use crate::clock::Moment;
use crate::{Answer, DriverError, Event, Lease, Lock, Reply};

/// Entries read ahead of the daemon; each may have a megabyte.
const READ_AHEAD: usize = 8;
/// Before a question that was answered "no" is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(50);
/// Checkpoints are this many entries apart.
const CHECKPOINT: i64 = 1000;

/// What the session's tasks tell the member.
pub enum Input {
    /// JOIN has this number, or cannot be written.
    Entered(Result<i64, DriverError>),
    /// See [`Standing`].
    Elected,
    /// A member's node is gone; entries from this number on may say so already.
    Death(NodeId, i64),
    /// That node is there again.
    Back(NodeId),
    /// Ask again what was declined.
    AskAgain,
    /// The session is over.
    Lost,
    /// A server refused what this task cannot do without.
    Refused(&'static str, ZkError),
}

/// Whether this node has the mutex.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    No,
    Asked(u64),
    Declined,
    Granted,
    Released,
}

/// A JOIN at the head of what was read.
struct OpenJoin {
    number: i64,
    entry: Entry,
    version: i32,
    asked: Option<u64>,
}

/// What a handled entry means for the session.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It goes on.
    On,
    /// Others threw this node out: it needs a new session.
    Expelled,
    /// Another process is the member of this address.
    Taken,
}

/// See the module's documentation. Dropping it ends its tasks and the ZooKeeper session.
pub struct Session {
    generation: u64,
    owner: LinkOwner,
    me: NodeRecord,
    events: mpsc::UnboundedSender<Event>,
    mailbox: mpsc::UnboundedSender<Command>,
    tasks: JoinSet<()>,
    /// What the reader has found; present once JOIN is written.
    pub reads: Option<mpsc::Receiver<Read>>,
    progress: watch::Sender<Progress>,
    standing: watch::Receiver<Standing>,
    writer: mpsc::UnboundedSender<Write>,
    /// The next number to handle.
    position: Arc<AtomicI64>,
    history: History,
    /// Number of our JOIN.
    join: i64,
    open_join: Option<OpenJoin>,
    drained: bool,
    turn: Turn,
    watched: HashMap<NodeId, AbortHandle>,
    dying: Vec<(NodeId, i64)>,
    checkpoint: i64,
    questions: u64,
    election: AbortHandle,
    /// Answered when JOIN is written.
    pub joining: Option<oneshot::Sender<Reply>>,
    /// `leave` was called.
    pub leaving: bool,
    left: Vec<oneshot::Sender<Reply>>,
    locks: Locks,
    lease: Arc<Lease>,
}

impl Session {
    /// Starts to join as `me` in the session of `owner`.
    pub fn start(
        generation: u64,
        owner: LinkOwner,
        lease: Arc<Lease>,
        me: NodeRecord,
        info: ClusterInfo,
        events: mpsc::UnboundedSender<Event>,
        mailbox: mpsc::UnboundedSender<Command>,
    ) -> Session {
        let link = owner.link.clone();
        let (progress, entering) = watch::channel(Progress::Waiting);
        let (elect, standing) = watch::channel(Standing::Unknown);
        let (writer, orders) = mpsc::unbounded_channel();
        let position = Arc::new(AtomicI64::new(0));
        let mut tasks = JoinSet::new();
        let tell = Tell { generation, mailbox: mailbox.clone() };
        let election = election::compete(link.clone(), me.nid, entering.clone(), elect);
        let election = tasks.spawn(needed(tell.clone(), "the election", election));
        let writer_task = queue::write(link.clone(), orders, position.clone(), tell.clone());
        tasks.spawn(needed(tell.clone(), "writing to the queue", writer_task));
        let is_member = move || *entering.borrow() == Progress::Joined;
        tasks.spawn(fence(link.clone(), lease.clone(), is_member, events.clone()));
        let locks = Locks::new(link.clone(), me.nid, lease.clone());
        tasks.spawn(watch_session(link.clone(), standing.clone(), tell.clone()));
        let join = Entry { id: rand::random(), sender: me, body: Body::Join(info) };
        tasks.spawn(enter(link, join, progress.clone(), standing.clone(), tell));
        Session {
            generation,
            owner,
            me,
            events,
            mailbox,
            tasks,
            reads: None,
            progress,
            standing,
            writer,
            position,
            history: History::default(),
            join: 0,
            open_join: None,
            drained: false,
            turn: Turn::No,
            watched: HashMap::new(),
            dying: Vec::new(),
            checkpoint: 0,
            questions: 0,
            election,
            joining: None,
            leaving: false,
            left: Vec::new(),
            locks,
            lease,
        }
    }

    fn link(&self) -> &Link {
        &self.owner.link
    }

    /// The address it joins under.
    pub fn nid(&self) -> NodeId {
        self.me.nid
    }

    fn joined(&self) -> bool {
        *self.progress.borrow() == Progress::Joined
    }

    fn tell(&self) -> Tell {
        Tell { generation: self.generation, mailbox: self.mailbox.clone() }
    }

    fn raise(&self, event: Event) {
        // A daemon that does not listen any more has dropped the driver, too.
        let _ = self.events.send(event);
    }

    fn question(&mut self) -> u64 {
        self.questions += 1;
        self.questions
    }

    // ---- what the daemon wants ----

    /// Hands a message to the writer.
    pub fn write(&self, body: Body, sender: NodeRecord, reply: oneshot::Sender<Reply>) {
        if !self.joined() {
            let _ = reply.send(Err(DriverError::NotJoined));
        } else if let Err(mpsc::error::SendError(Write::Entry(_, _, reply))) =
            self.writer.send(Write::Entry(body, sender, reply))
        {
            let _ = reply.send(Err(DriverError::SessionLost));
        }
    }

    /// NOTIFY.
    pub fn notify(&self, message: Vec<u8>, reply: oneshot::Sender<Reply>) {
        self.write(Body::Notify(message), self.me, reply);
    }

    /// BLOCK. A node that left is watched by nobody: its mutex would never be released if it died.
    pub fn block(&self, reply: oneshot::Sender<Reply>) {
        if self.leaving {
            let _ = reply.send(Err(DriverError::NotJoined));
        } else {
            self.write(Body::Block, self.me, reply);
        }
    }

    /// UNBLOCK.
    pub fn unblock(&mut self, message: Vec<u8>, reply: oneshot::Sender<Reply>) {
        if self.turn != Turn::Granted {
            let _ = reply.send(Err(DriverError::NotBlocked));
            return;
        }
        self.turn = Turn::Released;
        self.write(Body::Unblock(message), self.me, reply);
    }

    /// A mutex by number, for members.
    pub fn lock(&mut self, id: u64, reply: oneshot::Sender<Result<Lock, DriverError>>) {
        if self.leaving || !self.joined() {
            let _ = reply.send(Err(DriverError::NotJoined));
        } else {
            self.locks.lock(id, reply);
        }
    }

    /// UPDATE_NODE.
    pub fn update(&mut self, node: NodeRecord, reply: oneshot::Sender<Reply>) {
        if node.nid != self.me.nid {
            let _ = reply.send(Err(DriverError::NotMe(node.nid)));
        } else {
            self.write(Body::UpdateNode, node, reply);
        }
    }

    /// Gives up mastership and writes LEAVE. The nodes of this member vanish when everybody can know it.
    pub async fn leave(&mut self, reply: oneshot::Sender<Reply>) -> Result<(), Fault> {
        if self.leaving || !self.joined() {
            let _ = reply.send(Ok(()));
            return Ok(());
        }
        self.leaving = true;
        self.election.abort();
        self.left.push(reply);
        self.locks.end();
        election::withdraw(self.link()).await?;
        let (reply, written) = oneshot::channel();
        self.write(Body::Leave, self.me, reply);
        if self.history.members().len() == 1 {
            // Nobody answers a JOIN before it, so this node would never come to its LEAVE.
            let _ = written.await;
            self.remove_nodes().await?;
        }
        Ok(())
    }

    // ---- what the tasks tell ----

    /// Begins to read at our JOIN.
    pub fn entered(&mut self, join: i64) {
        self.position.store(join, Ordering::Relaxed);
        self.join = join;
        self.checkpoint = join / CHECKPOINT;
        let (out, reads) = mpsc::channel(READ_AHEAD);
        self.reads = Some(reads);
        let reader = queue::read(self.link().clone(), join, out);
        self.tasks.spawn(needed(self.tell(), "reading the queue", reader));
        if let Some(reply) = self.joining.take() {
            let _ = reply.send(Ok(()));
        }
    }

    /// Something changed that decides whether an open JOIN is ours to answer, or a question may be repeated.
    pub async fn look_again(&mut self) -> Result<(), Fault> {
        if self.turn == Turn::Declined {
            self.turn = Turn::No;
        }
        self.ask_join().await?;
        self.offer_block();
        Ok(())
    }

    /// A member died, or left: it is buried if the queue does not know by now.
    pub fn death(&mut self, node: NodeId, end: i64) {
        self.watched.remove(&node);
        self.dying.push((node, end));
        self.bury();
    }

    /// A member that was not buried because its node is there again, which is watched from here on.
    pub fn back(&mut self, node: NodeId) {
        if self.history.is_member(&node) && !self.watched.contains_key(&node) {
            self.watch_member(node);
        }
    }

    fn bury(&mut self) {
        let position = self.position.load(Ordering::Relaxed);
        let history = &self.history;
        self.dying.retain(|(node, end)| {
            if *end <= position && history.is_member(node) {
                let _ = self.writer.send(Write::Bury(*node));
            }
            *end > position
        });
    }

    // ---- what the queue says ----

    /// Handles what the reader found.
    pub async fn handle(&mut self, read: Read) -> Result<Outcome, Fault> {
        match read {
            Read::Drained(number) => {
                self.position.store(number, Ordering::Relaxed);
                self.drained = true;
                self.bury();
                self.offer_block();
                Ok(Outcome::On)
            }
            Read::Gap(number) => {
                tracing::error!(
                    "queue entry {number} was removed before this node had read it, or the queue is another one"
                );
                Ok(Outcome::Expelled)
            }
            Read::Entry { number, entry, version } => {
                self.drained = false;
                self.position.store(number, Ordering::Relaxed);
                if let Body::Join(_) = entry.body {
                    let asked = self.open_join.take().filter(|o| o.version == version).and_then(|o| o.asked);
                    self.open_join = Some(OpenJoin { number, entry, version, asked });
                    self.ask_join().await?;
                    return Ok(Outcome::On);
                }
                self.open_join = None;
                self.apply(number, entry).await
            }
        }
    }

    async fn apply(&mut self, number: i64, entry: Entry) -> Result<Outcome, Fault> {
        let mine = entry.sender.nid == self.me.nid;
        match &entry.body {
            Body::Accept(_, before) if !self.joined() => self.enter_history(number, before.clone()).await?,
            Body::Accept(..) if mine => return Ok(Outcome::Taken),
            Body::Accept(..) => {}
            // Instead of the answer to our JOIN.
            _ if number == self.join => return Ok(Outcome::Taken),
            Body::UpdateNode if mine => self.me = entry.sender,
            Body::Unblock(_) if mine && self.history.head() == Some(self.me.nid) => self.turn = Turn::No,
            Body::Leave if mine && self.history.is_member(&self.me.nid) => {
                if !self.leaving {
                    tracing::error!("this node was taken for dead and thrown out");
                    return Ok(Outcome::Expelled);
                }
                self.turn = Turn::No;
                self.remove_nodes().await?;
            }
            _ => {}
        }
        let is_accept = matches!(entry.body, Body::Accept(..));
        let node = entry.sender.nid;
        for event in self.history.apply(entry) {
            if let Event::Leave { node, .. } = &event
                && let Some(watch) = self.watched.remove(&node.nid)
            {
                watch.abort();
            }
            self.raise(event);
        }
        if is_accept && !mine {
            self.watch_member(node);
        }
        self.position.store(number + 1, Ordering::Relaxed);
        if !is_accept {
            self.save_checkpoint(number);
        }
        self.bury();
        Ok(Outcome::On)
    }

    /// Our ACCEPT: takes over the members, watches them, and becomes visible as a member.
    async fn enter_history(&mut self, join: i64, mut before: Vec<NodeRecord>) -> Result<(), Fault> {
        before.retain(|n| n.nid != self.me.nid);
        for node in &before {
            self.watch_member(node.nid);
        }
        let (me, session) = (self.me.nid, self.link().session);
        let confirmed = Moment::now();
        let nodes = [(member_path(&me), encode_session(session)), (position_path(&me), encode_position(-1))];
        for (path, data) in nodes {
            self.create_own(&path, &data).await?;
        }
        // Afterwards: the others wait for the nodes.
        let blocks = queue::open_blocks(self.link(), join, &before).await?;
        self.history = History::new(before, blocks);
        self.progress.send_replace(Progress::Joined);
        // At once: whoever learns of the membership may ask for a lock.
        self.lease.extend(confirmed.after(self.link().confirmed_for()));
        Ok(())
    }

    /// Creates a node of this member. One of another session is of a process with the same address, accepted so shortly
    /// before that nobody knew whether it lived: it is about to end.
    async fn create_own(&self, path: &str, data: &[u8]) -> Result<(), Fault> {
        let link = self.link();
        let deadline = Instant::now() + link.timeout * 3 / 2;
        let exists = || Fault::Refused(ZkError::NodeExists);
        loop {
            match link.create(path, data, CreateMode::Ephemeral).await {
                Err(Fault::Refused(ZkError::NodeExists)) => {}
                result => return result.map(drop),
            }
            let (stat, changed) = link.stat_and_watch(path).await?;
            match stat {
                Some(stat) if stat.ephemeral_owner == link.session => return Ok(()),
                Some(_) => {
                    let gone = tokio::time::timeout_at(deadline, changed.changed()).await;
                    gone.map_err(|_| exists())?;
                }
                None => {}
            }
        }
    }

    async fn remove_nodes(&mut self) -> Result<(), Fault> {
        self.link().delete(&member_path(&self.me.nid)).await?;
        self.link().delete(&position_path(&self.me.nid)).await?;
        for reply in self.left.drain(..) {
            let _ = reply.send(Ok(()));
        }
        Ok(())
    }

    fn watch_member(&mut self, node: NodeId) {
        let (link, tell) = (self.link().clone(), self.tell());
        let watch = watch_member(link, node, tell.clone());
        let watch = self.tasks.spawn(needed(tell, "the watch of a member", watch));
        if let Some(old) = self.watched.insert(node, watch) {
            old.abort();
        }
    }

    /// The first entry but a join beyond every thousandth is recorded, so that older ones can be removed.
    fn save_checkpoint(&mut self, number: i64) {
        if number / CHECKPOINT <= self.checkpoint || self.leaving {
            return;
        }
        self.checkpoint = number / CHECKPOINT;
        let (link, me) = (self.link().clone(), self.me.nid);
        let master = *self.standing.borrow() == Standing::Master;
        let Ok(number) = i32::try_from(number) else { return };
        self.tasks.spawn(log_fault("checkpoint", async move {
            link.set(&position_path(&me), &encode_position(number), None).await?;
            if master { queue::tidy(&link).await } else { Ok(()) }
        }));
    }

    // ---- questions to the daemon ----

    /// Asks the daemon about an open JOIN if this node answers joins.
    async fn ask_join(&mut self) -> Result<(), Fault> {
        let master = *self.standing.borrow() == Standing::Master && !self.leaving;
        let number = self.questions + 1;
        let joined = self.joined();
        let Some(open) = self.open_join.as_ref().filter(|o| master && o.asked.is_none()) else {
            return Ok(());
        };
        let nid = open.entry.sender.nid;
        if !joined && nid != self.me.nid {
            return Ok(());
        }
        // Who joins again has waited until its earlier nodes were gone, which was before its JOIN.
        if self.history.is_member(&nid) && self.link().stat(&member_path(&nid)).await?.is_some() {
            return self.refuse_join().await;
        }
        let Some(open) = self.open_join.as_mut() else { return Ok(()) };
        let Body::Join(info) = &open.entry.body else { return Ok(()) };
        open.asked = Some(number);
        let (node, info) = (open.entry.sender, info.clone());
        self.questions = number;
        if let Some(event) = self.history.remove(&node.nid) {
            // A predecessor nobody has buried yet.
            self.raise(event);
        }
        let members = self.history.members();
        let (generation, mailbox) = (self.generation, self.mailbox.clone());
        let answer = Answer::new(move |info: Option<ClusterInfo>| {
            let _ = mailbox.send(Command::JoinAnswer(generation, number, info.map(Box::new)));
        });
        self.raise(Event::Join { node, members, info, answer });
        Ok(())
    }

    /// A second process with the address of a living member: a LEAVE of nobody in place of its JOIN tells it, and means
    /// nothing to the others.
    async fn refuse_join(&mut self) -> Result<(), Fault> {
        let Some(open) = self.open_join.take() else { return Ok(()) };
        tracing::warn!("{} asks to join, but is a member and lives: refused", open.entry.sender.nid);
        let nobody = Entry { id: open.entry.id, sender: NodeRecord::zeroed(), body: Body::Leave };
        self.replace_join(&open, &nobody).await
    }

    /// Writes `entry` into the JOIN, unless another master was faster.
    async fn replace_join(&self, join: &OpenJoin, entry: &Entry) -> Result<(), Fault> {
        let path = super::layout::queue_path(join.number);
        match self.link().set(&path, &entry.encode(), Some(join.version)).await {
            Ok(()) | Err(Fault::Refused(ZkError::BadVersion)) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Writes the daemon's answer into the JOIN.
    pub async fn join_answered(
        &mut self,
        question: u64,
        info: Option<Box<ClusterInfo>>,
    ) -> Result<(), Fault> {
        let Some(open) = self.open_join.as_mut().filter(|o| o.asked == Some(question)) else { return Ok(()) };
        let Some(info) = info else {
            open.asked = None;
            self.ask_again_later();
            return Ok(());
        };
        let Some(open) = &self.open_join else { return Ok(()) };
        let body = Body::Accept(*info, self.history.members());
        let accept = Entry { body, ..open.entry.clone() };
        self.replace_join(open, &accept).await
    }

    /// Offers the mutex to the daemon when everything written so far was handled and it is this node's turn.
    fn offer_block(&mut self) {
        if !self.drained || self.turn != Turn::No || self.leaving || self.history.head() != Some(self.me.nid)
        {
            return;
        }
        let number = self.question();
        self.turn = Turn::Asked(number);
        let (generation, mailbox) = (self.generation, self.mailbox.clone());
        let answer = Answer::new(move |granted| {
            let _ = mailbox.send(Command::BlockAnswer(generation, number, granted));
        });
        self.raise(Event::Block { node: self.me, answer });
    }

    /// The daemon took the mutex or not.
    pub fn block_answered(&mut self, question: u64, granted: bool) {
        if self.turn != Turn::Asked(question) {
            return;
        }
        self.turn = if granted { Turn::Granted } else { Turn::Declined };
        if !granted {
            self.ask_again_later();
        }
    }

    fn ask_again_later(&mut self) {
        let tell = self.tell();
        self.tasks.spawn(async move {
            tokio::time::sleep(ASK_AGAIN).await;
            tell.tell(Input::AskAgain);
        });
    }
}
