//! The cluster task: owns the [`State`], applies the driver's events in order, carries out what follows from them.

use std::collections::VecDeque;
use std::sync::Arc;

use sheepdog_client::Reply;
use sheepdog_cluster::{Driver, Event};
use sheepdog_placement::{Ring, Weights};
use sheepdog_proto::config::EpochLog;
use sheepdog_proto::message::ClusterMessage;
use sheepdog_proto::{
    ClusterInfo, ClusterStatus, Flags, NodeId, NodeRecord, Oid, Opcode, Response, ResultCode, VdiId,
};
use tokio::sync::{mpsc, watch};

use super::handle::{Command, Submission};
use super::state::{Action, State, Tables};
use super::worker::{Work, Worker};
use crate::dispatch;
use crate::recovery;
use crate::recovery::early;
use crate::settle;
use crate::sheep::Sheep;
use crate::start;
use crate::vdi::locks::{TYPE_NORMAL, release_of_lost};
use crate::vdi::unfinished;
use crate::view::View;

/// A call that must reach the driver in this order.
enum DriverCall {
    Notify(u64, Vec<u8>),
    Block,
    Unblock(u64, Vec<u8>),
    Leave,
    Join(NodeRecord, Box<ClusterInfo>),
    UpdateNode(NodeRecord, tokio::sync::oneshot::Sender<ResultCode>),
}

/// Tokens of calls that no operation waits for; those of operations are higher.
const BLOCK: u64 = 0;
const LEAVE: u64 = 1;
const JOIN: u64 = 2;
const UPDATE: u64 = 3;

/// An operation whose message is on its way.
struct Sent {
    token: u64,
    submission: Submission,
}

/// See the module's documentation.
pub struct Task {
    /// Shared with everybody.
    pub sheep: Arc<Sheep>,
    /// Owned here alone.
    pub state: State,
    worker: Worker,
    driver: mpsc::UnboundedSender<DriverCall>,
    next_token: u64,
    notifies: VecDeque<Sent>,
    blocks: VecDeque<Submission>,
    block_asked: bool,
    running: Option<Submission>,
    /// The mutex under which the operation runs was lost with the session.
    dropped: bool,
    unblocking: Option<Sent>,
    exit: watch::Sender<Option<i32>>,
    /// Lock changes of others while the lock states are being learned.
    pub lock_log: Vec<LockChange>,
}

/// A lock operation that was delivered while this node was learning the lock states.
pub enum LockChange {
    /// LOCK_VDI of a vid by a node, with its type.
    Acquire(VdiId, NodeId, u32),
    /// RELEASE_VDI for a node that is gone.
    ReleaseOfLost(VdiId, NodeId),
    /// RELEASE_VDI.
    Release(VdiId, NodeId, u32),
    /// A snapshot was taken; this is the new working VDI.
    CarriedOver(VdiId),
    /// INODE_COHERENCE, and whether it validates.
    Cohered(VdiId, NodeId, bool),
    /// The node left.
    Left(NodeId),
}

async fn call_driver(
    driver: Arc<dyn Driver>,
    mut calls: mpsc::UnboundedReceiver<DriverCall>,
    handle: super::ClusterHandle,
) {
    while let Some(call) = calls.recv().await {
        let (token, result) = match call {
            DriverCall::Notify(token, message) => (token, driver.notify(message).await),
            DriverCall::Block => (BLOCK, driver.block().await),
            DriverCall::Unblock(token, message) => (token, driver.unblock(message).await),
            DriverCall::Leave => (LEAVE, driver.leave().await),
            DriverCall::Join(record, info) => (JOIN, driver.join(record, *info).await),
            DriverCall::UpdateNode(node, reply) => {
                let result = driver.update_node(node).await;
                let code = if result.is_ok() { ResultCode::SUCCESS } else { ResultCode::CLUSTER_ERROR };
                let _ = reply.send(code);
                (UPDATE, result)
            }
        };
        if let Err(error) = result {
            handle.send(Command::DriverFailed(token, error.to_string()));
        }
    }
}

/// The view that a state means.
pub fn view_of(state: &State) -> View {
    let h = &state.info.header;
    let mut info = state.cluster_info();
    info.header.proto_ver = sheepdog_proto::INTERNAL_PROTO_VERSION;
    let ring = Ring::new(state.members.clone(), Weights::of_cluster(h.flags)).unwrap_or_else(|error| {
        tracing::error!("cannot place objects on {} nodes: {error}", state.members.len());
        Ring::new(Vec::new(), Weights::Recorded).expect("a ring of no nodes has no limits to pass")
    });
    View {
        epoch: h.epoch,
        status: state.status,
        ctime: h.ctime,
        flags: h.flags,
        nr_copies: h.nr_copies,
        copy_policy: h.copy_policy,
        block_size_shift: h.block_size_shift,
        alters: state.alters(),
        disable_recovery: h.disable_recovery != 0,
        me: state.me.nid,
        ring,
        joined: state.joined,
        info,
    }
}

/// Answers that the cluster did not do it.
fn refuse(submission: Submission) {
    let response = Response::to(&submission.request, ResultCode::CLUSTER_ERROR);
    let _ = submission.reply.send(Reply::empty(response));
}

impl Task {
    /// Starts the task; `exit` gets the process's exit status when the cluster decides that it ends.
    pub fn spawn(
        sheep: Arc<Sheep>,
        state: State,
        driver: Arc<dyn Driver>,
        worker: Worker,
        events: mpsc::UnboundedReceiver<Event>,
        commands: mpsc::UnboundedReceiver<Command>,
        exit: watch::Sender<Option<i32>>,
    ) {
        let (calls, receiver) = mpsc::unbounded_channel();
        tokio::spawn(call_driver(driver, receiver, sheep.cluster.clone()));
        let task = Task {
            sheep,
            state,
            worker,
            driver: calls,
            next_token: UPDATE,
            notifies: VecDeque::new(),
            blocks: VecDeque::new(),
            block_asked: false,
            running: None,
            dropped: false,
            unblocking: None,
            exit,
            lock_log: Vec::new(),
        };
        tokio::spawn(task.run(events, commands));
    }

    async fn run(
        mut self,
        mut events: mpsc::UnboundedReceiver<Event>,
        mut commands: mpsc::UnboundedReceiver<Command>,
    ) {
        loop {
            tokio::select! {
                biased;
                event = events.recv() => match event {
                    Some(event) => self.event(event).await,
                    None => return self.end(1, &["the cluster driver has stopped".into()]),
                },
                command = commands.recv() => match command {
                    Some(command) => self.command(command).await,
                    None => return,
                },
            }
        }
    }

    fn end(&self, code: i32, lines: &[String]) {
        for line in lines {
            if code == 0 { tracing::info!("{line}") } else { tracing::error!("{line}") }
        }
        self.exit.send_if_modified(|exit| exit.is_none() && exit.insert(code) == &code);
    }

    async fn event(&mut self, event: Event) {
        match event {
            Event::Join { node, members, info, answer } => {
                let mut actions = Vec::new();
                let verdict = self.state.judge_join(&node, &members, &info, &mut actions);
                self.act(actions).await;
                answer.give(verdict);
            }
            Event::Accept { node, members, info } => {
                tracing::info!("{} joined, {} members", node.nid, members.len());
                let actions = self.state.accept(&node, members, info);
                self.act(actions).await;
                if node.nid == self.state.me.nid {
                    self.ask_block();
                }
            }
            Event::Leave { node, members } => {
                tracing::info!("{} left, {} members", node.nid, members.len());
                let actions = self.state.leave(&node, members);
                self.act(actions).await;
            }
            Event::UpdateNode { node, members } => {
                let actions = self.state.update_node(&node, members);
                self.act(actions).await;
            }
            Event::Block { node, answer } => {
                let mine =
                    node.nid == self.state.me.nid && self.running.is_none() && self.unblocking.is_none();
                let next = if mine { self.blocks.pop_front() } else { None };
                answer.give(next.is_some());
                if let Some(submission) = next {
                    self.worker.operate(submission.request, submission.payload.clone());
                    self.running = Some(submission);
                }
            }
            Event::Notify { sender, message } => self.deliver(sender, &message).await,
            Event::Suspended(true) => tracing::warn!("writes wait until this node is known to be a member"),
            Event::Suspended(false) => tracing::info!("writes go on"),
            Event::Reconnect => self.reconnect().await,
            Event::Failed(reason) => self.end(1, &[reason]),
        }
    }

    /// The session is lost (spec 04, 8.4): nobody can tell whether what was sent was delivered, so it is answered as
    /// failed, what was not begun waits for the new session, and this node joins again.
    async fn reconnect(&mut self) {
        let actions = self.state.reconnect();
        self.act(actions).await;
        for sent in self.notifies.drain(..).chain(self.unblocking.take()) {
            refuse(sent.submission);
        }
        self.worker.abandon();
        unfinished::settle(&self.sheep, self.state.me.nid);
        self.dropped = self.running.is_some();
        self.block_asked = false;
        let (record, info) = (self.state.me, self.state.cluster_info());
        let _ = self.driver.send(DriverCall::Join(record, Box::new(info)));
    }

    async fn command(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => self.submit(submission),
            Command::WorkDone(reply) => self.work_done(reply),
            Command::DriverFailed(token, error) => self.driver_failed(token, &error),
            Command::Leave => {
                let _ = self.driver.send(DriverCall::Leave);
            }
            Command::Kill => {
                let actions = self.state.kill();
                self.act(actions).await;
            }
            Command::LocksCollected => self.replay_locks(),
            Command::Rebuild => {
                if self.state.status == ClusterStatus::Ok {
                    let actions = self.state.same_epoch_round();
                    self.act(actions).await;
                }
            }
            Command::UpdateNode(node, reply) => {
                let _ = self.driver.send(DriverCall::UpdateNode(node, reply));
            }
        }
    }

    fn replay_locks(&mut self) {
        let vdis = &self.sheep.vdis;
        for change in self.lock_log.drain(..) {
            match change {
                LockChange::Acquire(vid, node, kind) => {
                    vdis.with_lock(vid, |lock| lock.acquire(node, kind));
                }
                LockChange::Release(vid, node, kind) => vdis.release_lock(vid, node, kind),
                LockChange::ReleaseOfLost(vid, owner) => {
                    vdis.with_lock(vid, |lock| lock.release_of(owner));
                }
                LockChange::CarriedOver(vid) => vdis.carry_lock_over(vid),
                LockChange::Cohered(vid, node, validate) => {
                    vdis.with_lock(vid, |lock| lock.cohere(node, validate));
                }
                LockChange::Left(node) => vdis.for_each_lock(|lock| lock.drop_participant(node)),
            }
        }
        vdis.set_collecting(false);
    }

    fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    fn submit(&mut self, mut submission: Submission) {
        submission.request.epoch = self.state.epoch();
        if submission.request.opcode == Opcode::RELEASE_VDI {
            // Nodes that joined since do not know where a snapshot took the lock.
            let mut body = submission.request.vdi();
            if body.lock_type == TYPE_NORMAL {
                body.base_vdi_id = self.sheep.vdis.lock_of(body.base_vdi_id, self.state.me.nid);
                submission.request = submission.request.with_vdi(body);
            }
        }
        if !ClusterMessage::fits(submission.payload.len()) {
            let response = Response::to(&submission.request, ResultCode::INVALID_PARMS);
            let _ = submission.reply.send(Reply::empty(response));
            return;
        }
        if dispatch::work_part(submission.request.opcode).is_some() {
            self.blocks.push_back(submission);
            self.ask_block();
            return;
        }
        let message = ClusterMessage {
            request: submission.request,
            response: Response::to(&submission.request, ResultCode::SUCCESS),
            data: submission.payload.to_vec(),
        };
        let token = self.token();
        self.notifies.push_back(Sent { token, submission });
        let _ = self.driver.send(DriverCall::Notify(token, message.encode()));
    }

    /// One block at a time: the next is asked for when the last one's message has come back (spec 04, 13.3).
    fn ask_block(&mut self) {
        if !self.blocks.is_empty() && !self.block_asked && self.state.joined {
            self.block_asked = true;
            let _ = self.driver.send(DriverCall::Block);
        }
    }

    fn work_done(&mut self, reply: Reply) {
        let Some(submission) = self.running.take() else { return };
        if std::mem::take(&mut self.dropped) {
            refuse(submission);
            return self.ask_block();
        }
        let request = submission.request;
        let data = if dispatch::main_part(request.opcode).is_none() {
            vec![0; reply.data.len()]
        } else if request.flags.contains(Flags::WRITE) {
            submission.payload.to_vec()
        } else {
            reply.data.to_vec()
        };
        let mut response = reply.response;
        response.data_length = data.len() as u32;
        if request.flags.contains(Flags::WRITE) {
            response.data_length = 0;
        }
        let message = ClusterMessage { request, response, data };
        let token = self.token();
        self.unblocking = Some(Sent { token, submission });
        let _ = self.driver.send(DriverCall::Unblock(token, message.encode()));
    }

    fn driver_failed(&mut self, token: u64, error: &str) {
        tracing::error!("cluster driver: {error}");
        if let Some(at) = self.notifies.iter().position(|s| s.token == token) {
            self.notifies.remove(at).into_iter().for_each(|sent| refuse(sent.submission));
        } else if self.unblocking.as_ref().is_some_and(|s| s.token == token) {
            self.end(1, &[format!("Failed to unblock, {error}, exiting.")]);
        } else if token == BLOCK && self.block_asked && self.running.is_none() && self.unblocking.is_none() {
            self.block_asked = false;
            self.blocks.drain(..).for_each(refuse);
        }
    }

    async fn deliver(&mut self, sender: NodeRecord, bytes: &[u8]) {
        let mut message = match ClusterMessage::decode(bytes) {
            Ok(message) => message,
            Err(error) => {
                tracing::error!("{} sent an unusable message: {error}", sender.nid);
                return;
            }
        };
        let opcode = message.request.opcode;
        let mine = if sender.nid != self.state.me.nid {
            None
        } else if dispatch::work_part(opcode).is_some() {
            self.block_asked = false;
            self.unblocking.take()
        } else {
            self.notifies.pop_front()
        };
        if opcode == Opcode::NEW_VDI && !message.response.result.is_ok() {
            unfinished::settle(&self.sheep, sender.nid);
        }
        if message.response.result.is_ok()
            && let Some(main) = dispatch::main_part(opcode)
        {
            message.response.result = main(self, &message, &sender).await;
        }
        if let Some(sent) = mine {
            let has_data = !message.request.flags.contains(Flags::WRITE) && message.response.result.is_ok();
            let data = if has_data { message.data.into() } else { bytes::Bytes::new() };
            let mut response = message.response;
            response.data_length = data.len() as u32;
            let _ = sent.submission.reply.send(Reply { response, data });
        }
        self.ask_block();
    }

    /// Carries out actions in order. While they change what requests may rely on, no replica is written here.
    pub async fn act(&mut self, actions: Vec<Action>) {
        if actions.iter().any(|a| matches!(a, Action::FetchVdis(Tables::OfMembers(..)))) {
            // Before anybody sees the new view.
            self.worker.joined(&self.sheep);
        }
        let published = actions.contains(&Action::Publish);
        if published {
            self.sheep.gate.close().await;
            let over = self.sheep.views.epoch();
            if over != self.state.epoch()
                && let Err(error) = early::abandon_incomplete(&self.sheep, over).await
            {
                return self.end(1, &[format!("cannot remove objects that lack writes: {error}")]);
            }
        }
        for action in actions {
            self.act_one(action).await;
            if self.exit.borrow().is_some() {
                return;
            }
        }
        self.sheep.recovery.launch();
        // In this order: what is made equal here waits for the recovery of what is not whole.
        let view = self.sheep.views.load();
        if published && view.status == ClusterStatus::Ok {
            settle::start(&self.sheep, view.epoch);
        }
    }

    async fn act_one(&mut self, action: Action) {
        match action {
            Action::Log(tracing::Level::ERROR, text) => tracing::error!("{text}"),
            Action::Log(tracing::Level::WARN, text) => tracing::warn!("{text}"),
            Action::Log(_, text) => tracing::info!("{text}"),
            Action::Exit(code, lines) => self.end(code, &lines),
            Action::SaveConfig => {
                self.choose_layout().await;
                self.save_config();
            }
            Action::SaveEpoch => self.save_epoch(),
            Action::KeepEpoch => {
                let known = self.sheep.meta.read_epoch(self.state.epoch());
                if known.map_or(true, |log| log.nodes != self.state.info.nodes) {
                    self.save_epoch();
                } else {
                    self.sheep.history.note(self.state.epoch());
                }
            }
            Action::RemoveEpochs(latest) => {
                if let Err(error) = self.sheep.meta.remove_epochs(latest) {
                    tracing::error!("cannot remove old epochs: {error}");
                }
            }
            Action::WipeStore => self.wipe().await,
            Action::EndFormat => {
                if let Err(error) = tokio::task::block_in_place(|| self.sheep.meta.end_format()) {
                    self.end(1, &[format!("cannot end the format: {error}")]);
                }
            }
            Action::StashAll => self.stash_all().await,
            Action::StashMoved(suffix) => self.stash_moved(suffix).await,
            Action::Publish => self.publish(),
            Action::FetchVdis(tables) => self.worker.fetch(tables),
            Action::Checkpoint(epoch) => self.sheep.vdis.take_checkpoint(epoch),
            Action::CollectLocks(epoch) => {
                self.sheep.vdis.set_collecting(true);
                self.worker.push(Work::CollectLocks(epoch));
            }
            Action::Recover(round) => self.sheep.recovery.begin(round),
            Action::Gathered(epoch) => self.sheep.recovery.gathered(&self.sheep, epoch).await,
            Action::DropNode(node) => {
                self.sheep.peers.forget(&node);
                unfinished::settle(&self.sheep, node);
                self.sheep.vdis.for_each_lock(|lock| lock.drop_participant(node));
                if let Some(grace) = self.sheep.lock_grace {
                    tokio::spawn(release_of_lost(self.sheep.clone(), node, grace));
                }
                if self.sheep.vdis.is_collecting() {
                    self.lock_log.push(LockChange::Left(node));
                }
            }
        }
    }

    fn publish(&mut self) {
        let view = view_of(&self.state);
        let (status, epoch, alters) = (view.status, view.epoch, view.alters);
        let before = self.sheep.views.load();
        if before.epoch != epoch {
            self.sheep.intents.epoch_ends();
        } else if before.alters != alters && status == ClusterStatus::Ok {
            let sheep = &self.sheep;
            let may_be_home =
                |oid: Oid| !sheep.redundancy(oid.vid(), &view).known || sheep.is_home(oid, &view);
            let kept = tokio::task::block_in_place(|| sheep.early.keep_homes(epoch, may_be_home));
            if let Err(error) = kept {
                self.end(1, &[format!("cannot note which early writes are of no interest: {error}")]);
            }
        }
        // Open first: whoever sees the new view finds the gate open.
        let ending = status == ClusterStatus::Killed && self.state.joined && !self.state.left;
        if status == ClusterStatus::Ok || status == ClusterStatus::Shutdown || ending {
            self.sheep.gate.open(epoch, alters);
        }
        self.sheep.views.publish(view);
        self.sheep.gateway.arbiter.forget_other(epoch);
        if self.state.joined && epoch.0 > 0 {
            tokio::task::block_in_place(|| self.sheep.intents.note(epoch));
        }
    }

    fn save_config(&self) {
        let written = tokio::task::block_in_place(|| self.sheep.meta.write_config(&self.state.config));
        if let Err(error) = written {
            tracing::error!("cannot write the configuration: {error}");
        }
    }

    /// An epoch that cannot be logged would be unknown after a restart: the node ends instead.
    fn save_epoch(&mut self) {
        let ring = view_of(&self.state).ring;
        if self.state.info.nodes.len() == ring.nodes().len() {
            self.state.info.nodes = ring.nodes().to_vec();
        }
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let log = EpochLog { nodes: self.state.info.nodes.clone(), time: now.as_secs() as i64 };
        let epoch = self.state.epoch();
        let written = tokio::task::block_in_place(|| {
            self.sheep.history.note(epoch);
            self.sheep.meta.write_epoch(epoch, &log)
        });
        if let Err(error) = written {
            self.end(1, &[format!("cannot log current epoch {epoch}: {error}")]);
        }
    }

    async fn wipe(&mut self) {
        if let Err(error) = tokio::task::block_in_place(|| self.sheep.meta.begin_format()) {
            return self.end(1, &[format!("cannot begin the format: {error}")]);
        }
        self.sheep.recovery.stop();
        self.sheep.tombstones.clear();
        self.sheep.recovery.lacking.clear();
        if let Err(error) = tokio::task::block_in_place(|| self.sheep.early.clear()) {
            return self.end(1, &[format!("cannot clear the log of early writes: {error}")]);
        }
        tokio::task::block_in_place(|| self.sheep.recovery.altered.clear());
        self.sheep.history.restart(sheepdog_proto::Epoch(1));
        if let Some(store) = &self.sheep.store {
            let layout = start::driver(&self.sheep.meta, &self.state.config.default_store);
            let layout = layout.ok().flatten().unwrap_or_else(|| store.layout());
            if let Err(error) = store.format(layout).await {
                return self.end(1, &[format!("cannot format the store: {error}")]);
            }
        }
        self.sheep.vdis.clear();
        self.sheep.gateway.grants.clear();
        self.sheep.intents.clear();
    }

    /// A node that just learned of its cluster's store driver arranges its disks accordingly.
    async fn choose_layout(&mut self) {
        let Some(store) = &self.sheep.store else { return };
        let changed = match start::driver(&self.sheep.meta, &self.state.config.default_store) {
            Ok(Some(layout)) if layout != store.layout() => store.set_layout(layout).await,
            Ok(_) => return,
            Err(error) => return self.end(1, &[error.to_string()]),
        };
        if let Err(error) = changed {
            self.end(1, &[format!("cannot rearrange the store: {error}")]);
        }
    }

    /// Objects that stayed where they are would be served as current: then the node ends instead.
    async fn stash_all(&mut self) {
        self.sheep.intents.leave_to_others();
        let Some(store) = &self.sheep.store else { return };
        let epoch = self.sheep.meta.latest_epoch().unwrap_or_default();
        let stashed = match store.stash_all(epoch).await {
            Ok(_) => store.sync_dirs().await,
            Err(error) => Err(error),
        };
        if let Err(error) = stashed {
            self.end(1, &[format!("cannot move outdated objects to the stale area: {error}")]);
        }
    }

    /// Moves what is no longer at home here, by the view about to be published. Objects of VDIs that are not known yet
    /// are left to the round of recovery, which begins when the tables of the others have arrived.
    async fn stash_moved(&mut self, suffix: sheepdog_proto::Epoch) {
        let view = view_of(&self.state);
        let stashed =
            match (recovery::stash_strangers(&self.sheep, &view, suffix, true).await, &self.sheep.store) {
                (Ok(()), Some(store)) => store.sync_dirs().await,
                (outcome, _) => outcome,
            };
        if let Err(error) = stashed {
            self.end(1, &[format!("cannot move objects to the stale area: {error}")]);
        }
    }
}
