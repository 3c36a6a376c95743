//! The cluster state machine: pure, so that every node that feeds it the same events reaches the same epochs
//! (spec 04, sections 3, 5, 6 and 7).

use sheepdog_proto::cluster::ClusterInfoHeader;
use sheepdog_proto::config::StoreConfig;
use sheepdog_proto::{
    ClusterFlags, ClusterInfo, ClusterStatus, CopyPolicy, DEFAULT_BLOCK_SHIFT, Epoch, INTERNAL_PROTO_VERSION,
    MAX_BLOCK_SHIFT, MAX_COPIES, MIN_BLOCK_SHIFT, NodeId, NodeRecord, ResultCode, cstr,
};

/// A round of recovery to start.
#[derive(Debug, Clone, PartialEq)]
pub struct Round {
    /// Epoch whose homes must end up with every object.
    pub epoch: Epoch,
    /// Epoch from which objects are searched backwards.
    pub tgt_epoch: Epoch,
    /// Members at `tgt_epoch`.
    pub old: Vec<NodeRecord>,
    /// Whether the cluster is told when it is complete (rounds that raised the epoch).
    pub announce: bool,
    /// Search on all nodes (`-W`).
    pub wildcard: bool,
}

/// Whose VDI tables are fetched.
#[derive(Debug, Clone, PartialEq)]
pub enum Tables {
    /// Of a node that joined, by a member.
    OfJoiner(NodeId),
    /// Of the other members, by this node, which joined in this epoch. In 0 the cluster did not run, and there was nothing to
    /// miss.
    OfMembers(Vec<NodeId>, Epoch),
}

/// What the task must do, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Write a line to the log.
    Log(tracing::Level, String),
    /// Log the lines as errors (or as information, for code 0) and end the process.
    Exit(i32, Vec<String>),
    /// Write the `config` file.
    SaveConfig,
    /// Write the epoch file of the current epoch.
    SaveEpoch,
    /// Write the epoch file of the current epoch if this node has none or another (it was learned from a joiner).
    KeepEpoch,
    /// Delete epoch files 1..=this.
    RemoveEpochs(Epoch),
    /// Erase every object and the VDI table (MAKE_FS). Until [`Action::EndFormat`] a start finishes the erasing.
    WipeStore,
    /// The new cluster's configuration and first epoch are on disk.
    EndFormat,
    /// Move every object to the stale area, durably: this node was away.
    StashAll,
    /// Move objects that are no longer at home here to the stale area, with this suffix, durably.
    StashMoved(Epoch),
    /// Make the new state visible to requests.
    Publish,
    /// Fetch VDI tables.
    FetchVdis(Tables),
    /// Keep a copy of the lock states for a node that joins (as of this epoch).
    Checkpoint(Epoch),
    /// Learn the lock states of this epoch from the other members.
    CollectLocks(Epoch),
    /// Begin a recovery round: from here on absent objects are waited for. Comes before [`Action::Publish`], so that
    /// nobody takes an object for missing in between; the round runs when all actions are done.
    Recover(Round),
    /// All members have recovered this epoch.
    Gathered(Epoch),
    /// Forget connections to a node that left, and its shared locks.
    DropNode(NodeId),
}

/// How this node was started, as far as membership depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Startup {
    /// `-g`.
    pub gateway: bool,
    /// No `-V`.
    pub auto_vnodes: bool,
    /// `-W`.
    pub wildcard: bool,
}

/// See the module's documentation.
#[derive(Debug, Clone)]
pub struct State {
    /// This node's record as announced.
    pub me: NodeRecord,
    startup: Startup,
    /// What this node knows about the cluster; `nodes` are the members at `epoch`.
    pub info: ClusterInfo,
    /// The cluster's status.
    pub status: ClusterStatus,
    /// Present members, this node included once accepted.
    pub members: Vec<NodeRecord>,
    /// This node was accepted.
    pub joined: bool,
    /// This node left and goes on as a gateway.
    pub left: bool,
    /// The `config` file's contents.
    pub config: StoreConfig,
    /// The last epoch in this node's own log. It did not see what happened in later ones, even if it is in their lists: others
    /// may have logged its join, and it died before it put its objects away.
    logged: Epoch,
    wildcard_pending: bool,
    completed: (Epoch, Vec<NodeId>),
    /// How often copies of a VDI were altered in an epoch.
    alters: (Epoch, u32),
}

fn ids(nodes: &[NodeRecord]) -> Vec<NodeId> {
    let mut ids: Vec<NodeId> = nodes.iter().map(|n| n.nid).collect();
    ids.sort();
    ids
}

impl State {
    /// State of a starting node: `nodes` are the members of its last logged epoch.
    pub fn new(
        me: NodeRecord,
        startup: Startup,
        config: StoreConfig,
        epoch: Epoch,
        nodes: Vec<NodeRecord>,
    ) -> State {
        let mut flags = config.flags;
        if config.ctime == 0 {
            flags = if startup.auto_vnodes {
                flags.with(ClusterFlags::AUTO_VNODES)
            } else {
                flags.without(ClusterFlags::AUTO_VNODES)
            };
        }
        let header = ClusterInfoHeader {
            epoch,
            ctime: config.ctime,
            flags,
            nr_copies: config.copies,
            copy_policy: config.copy_policy,
            status: ClusterStatus::Wait as u8,
            block_size_shift: config.block_size_shift,
            default_store: config.default_store,
            ..ClusterInfoHeader::zeroed()
        };
        State {
            me,
            startup,
            info: ClusterInfo { header, nodes },
            status: ClusterStatus::Wait,
            members: Vec::new(),
            joined: false,
            left: false,
            config,
            logged: epoch,
            wildcard_pending: startup.wildcard,
            completed: (Epoch(0), Vec::new()),
            alters: (Epoch(0), 0),
        }
    }

    /// The current epoch.
    pub fn epoch(&self) -> Epoch {
        self.info.header.epoch
    }

    /// How often copies of a VDI were altered in this epoch.
    pub fn alters(&self) -> u32 {
        if self.alters.0 == self.epoch() { self.alters.1 } else { 0 }
    }

    /// Whether weights follow from the space of the nodes.
    pub fn auto_vnodes(&self) -> bool {
        self.info.header.flags.contains(ClusterFlags::AUTO_VNODES)
    }

    /// The cluster info with the present status, as CLUSTER_INFO and join requests carry it.
    pub fn cluster_info(&self) -> ClusterInfo {
        let mut info = self.info.clone();
        info.header.status = self.status as u8;
        info
    }

    /// Judges a join request (spec 04, 5.3). `None` = not ours to answer.
    pub fn judge_join(
        &mut self,
        node: &NodeRecord,
        members: &[NodeRecord],
        theirs: &ClusterInfo,
        actions: &mut Vec<Action>,
    ) -> Option<ClusterInfo> {
        let ending = matches!(self.status, ClusterStatus::Killed) || self.left;
        let first = node.nid == self.me.nid;
        if ending || first != members.is_empty() || (!first && !self.joined) {
            return None;
        }
        let mut status = self.status;
        if status == ClusterStatus::Wait {
            status = self.judge_waiting(node, members, theirs, actions);
        } else if self.is_foreign(theirs) {
            actions.push(Action::Log(
                tracing::Level::WARN,
                format!(
                    "{} belongs to another cluster (created {:x}) and will have to leave",
                    node.nid, theirs.header.ctime
                ),
            ));
        }
        let mut answer = self.info.clone();
        answer.header.status = status as u8;
        answer.header.proto_ver = INTERNAL_PROTO_VERSION;
        Some(answer)
    }

    fn is_foreign(&self, theirs: &ClusterInfo) -> bool {
        theirs.header.epoch.0 != 0 && self.epoch().0 != 0 && theirs.header.ctime != self.info.header.ctime
    }

    fn judge_waiting(
        &mut self,
        node: &NodeRecord,
        members: &[NodeRecord],
        theirs: &ClusterInfo,
        actions: &mut Vec<Action>,
    ) -> ClusterStatus {
        if self.is_foreign(theirs) {
            let text = format!(
                "joining node ctime doesn't match: {} vs {}",
                theirs.header.ctime, self.info.header.ctime
            );
            actions.push(Action::Log(tracing::Level::ERROR, text));
            return ClusterStatus::Wait;
        }
        if self.epoch().is_before(theirs.header.epoch) {
            let auto = self.auto_vnodes();
            self.info = theirs.clone();
            self.keep_vnodes_strategy(auto);
        }
        let present = |n: &NodeRecord| n.nid == node.nid || members.iter().any(|m| m.nid == n.nid);
        if self.epoch().0 > 0 && self.info.nodes.iter().all(present) {
            ClusterStatus::Ok
        } else {
            ClusterStatus::Wait
        }
    }

    fn keep_vnodes_strategy(&mut self, auto: bool) {
        let flags = &mut self.info.header.flags;
        *flags = if auto {
            flags.with(ClusterFlags::AUTO_VNODES)
        } else {
            flags.without(ClusterFlags::AUTO_VNODES)
        };
    }

    /// Why this node may not be in the cluster that `answer` describes (spec 04, 5.4). Also run on the cluster info of
    /// a member before joining.
    pub fn refusal(&self, answer: &ClusterInfo) -> Option<String> {
        let (h, own) = (&answer.header, &self.info.header);
        if h.proto_ver != INTERNAL_PROTO_VERSION {
            return Some(format!("invalid protocol version: {}, {}", h.proto_ver, INTERNAL_PROTO_VERSION));
        }
        if h.epoch.0 != 0 && own.epoch.0 != 0 && h.ctime != own.ctime {
            return Some(format!("joining node ctime doesn't match: {} vs {}", h.ctime, own.ctime));
        }
        if h.ctime > 0 && self.me.nr_vnodes != 0 {
            let cluster_auto = h.flags.contains(ClusterFlags::AUTO_VNODES);
            match (cluster_auto, self.auto_vnodes()) {
                (true, false) => {
                    return Some(
                        "failed to join for vnodes strategy unmatch.  cluster:fixed, joined:auto".into(),
                    );
                }
                (false, true) => {
                    return Some(
                        "failed to join for vnodes strategy unmatch.  cluster:auto, joined:fixed".into(),
                    );
                }
                _ => {}
            }
        }
        None
    }

    /// A node was accepted; `answer` is the cluster as the members see it (spec 04, 5.2 and 5.8).
    pub fn accept(
        &mut self,
        node: &NodeRecord,
        members: Vec<NodeRecord>,
        answer: ClusterInfo,
    ) -> Vec<Action> {
        let mut actions = Vec::new();
        let is_me = node.nid == self.me.nid;
        if is_me && let Some(reason) = self.refusal(&answer) {
            return vec![Action::Exit(1, vec![reason, "failed to join Sheepdog".into()])];
        }
        let answered = ClusterStatus::from_byte(answer.header.status);
        let Some(status) = answered.ok().filter(|s| *s != ClusterStatus::Killed) else {
            let text = format!("invalid cluster status {} in the answer to a join", answer.header.status);
            return vec![Action::Exit(1, vec![text, "failed to join Sheepdog".into()])];
        };
        let never_formatted = self.info.header.ctime == 0;
        let answered_epoch = answer.header.epoch;
        let auto = if self.startup.gateway && never_formatted {
            answer.header.flags.contains(ClusterFlags::AUTO_VNODES)
        } else {
            self.auto_vnodes()
        };
        self.info = answer;
        self.keep_vnodes_strategy(auto);
        // A node that is ending goes on ending, whatever the cluster does.
        let ending = matches!(self.status, ClusterStatus::Killed | ClusterStatus::Shutdown);
        self.status = if ending { self.status } else { status };
        self.members = members;
        self.joined = true;
        if self.status != status || status == ClusterStatus::Shutdown {
            actions.push(Action::Publish);
            return actions;
        }
        let store_chosen = !cstr(&self.info.header.default_store).is_empty();
        let was_member = !self.missed_epochs() && self.info.nodes.iter().any(|n| n.nid == self.me.nid);
        if store_chosen && !self.startup.gateway && !was_member {
            actions.push(Action::StashAll);
        }
        self.decide_epoch(&mut actions);
        actions.push(Action::Publish);
        self.fetch_tables(node, is_me, &mut actions);
        self.hand_over_locks(answered_epoch, is_me, &mut actions);
        actions
    }

    fn missed_epochs(&self) -> bool {
        self.logged.is_before(self.epoch())
    }

    /// Locks live in memory only: members keep a copy for the joiner, which asks for it (spec 05, section 18).
    fn hand_over_locks(&self, answered: Epoch, is_me: bool, actions: &mut Vec<Action>) {
        let locks = self.info.header.flags.contains(ClusterFlags::USE_LOCK);
        if !locks || self.status != ClusterStatus::Ok || answered.0 == 0 || self.members.len() < 2 {
            return;
        }
        let key = Epoch(answered.0 - 1);
        actions.push(if is_me { Action::CollectLocks(key) } else { Action::Checkpoint(key) });
    }

    fn fetch_tables(&self, node: &NodeRecord, is_me: bool, actions: &mut Vec<Action>) {
        if !is_me {
            actions.push(Action::FetchVdis(Tables::OfJoiner(node.nid)));
            return;
        }
        let others: Vec<NodeId> = self.members.iter().map(|n| n.nid).filter(|n| *n != self.me.nid).collect();
        if !others.is_empty() {
            let joined = if self.status == ClusterStatus::Ok { self.epoch() } else { Epoch(0) };
            actions.push(Action::FetchVdis(Tables::OfMembers(others, joined)));
        }
    }

    fn decide_epoch(&mut self, actions: &mut Vec<Action>) {
        if self.status != ClusterStatus::Ok {
            return;
        }
        if self.config.ctime == 0 {
            self.learn_config();
        }
        let old = self.info.nodes.clone();
        // Nodes that were restarted do not know how many there were in an epoch that goes on.
        self.alters = (Epoch(0), 0);
        if ids(&self.members) != ids(&old) {
            self.raise_epoch(old, actions);
        } else {
            let missed = self.missed_epochs();
            actions.push(Action::KeepEpoch);
            self.logged = self.epoch();
            if self.config.shutdown == 0 || self.wildcard_pending || missed {
                let round = Round {
                    epoch: self.epoch(),
                    tgt_epoch: self.epoch(),
                    old: self.members.clone(),
                    announce: false,
                    wildcard: std::mem::take(&mut self.wildcard_pending),
                };
                actions.push(Action::Recover(round));
            }
        }
        self.config.shutdown = 0;
        actions.push(Action::SaveConfig);
    }

    fn learn_config(&mut self) {
        let h = &self.info.header;
        self.config.ctime = h.ctime;
        self.config.flags = h.flags;
        self.config.copies = h.nr_copies;
        self.config.copy_policy = h.copy_policy;
        self.config.block_size_shift = h.block_size_shift;
        self.config.default_store = h.default_store;
    }

    /// Epoch + 1 with the present members; recovery from the members of the epoch before.
    fn raise_epoch(&mut self, old: Vec<NodeRecord>, actions: &mut Vec<Action>) {
        let tgt_epoch = self.epoch();
        self.info.header.epoch = tgt_epoch.next();
        self.info.nodes = self.members.clone();
        // A crash after the log would leave objects that this node no longer has at home among the current ones.
        actions.push(Action::StashMoved(tgt_epoch));
        actions.push(Action::SaveEpoch);
        self.logged = self.epoch();
        actions.push(Action::Recover(Round {
            epoch: self.epoch(),
            tgt_epoch,
            old,
            announce: true,
            wildcard: std::mem::take(&mut self.wildcard_pending),
        }));
    }

    /// A node left (spec 04, section 6).
    pub fn leave(&mut self, node: &NodeRecord, members: Vec<NodeRecord>) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.status == ClusterStatus::Shutdown || !self.joined {
            return actions;
        }
        if node.nid == self.me.nid {
            self.me.nr_vnodes = 0;
            self.left = true;
        }
        let old = self.info.nodes.clone();
        self.members = members;
        actions.push(Action::DropNode(node.nid));
        if self.status == ClusterStatus::Ok {
            if !self.left && self.members.iter().all(|n| n.space == 0) {
                actions.push(Action::Exit(0, vec!["only gateway nodes are remaining, exiting".into()]));
                return actions;
            }
            self.raise_epoch(old, &mut actions);
        }
        actions.push(Action::Publish);
        actions
    }

    /// A member changed its weight or space: one epoch, in any status.
    pub fn update_node(&mut self, node: &NodeRecord, members: Vec<NodeRecord>) -> Vec<Action> {
        let mut actions = Vec::new();
        if !self.joined {
            return actions;
        }
        if node.nid == self.me.nid {
            self.me = *node;
            self.config.space = node.space;
            actions.push(Action::SaveConfig);
        }
        let old = self.info.nodes.clone();
        self.members = members;
        self.raise_epoch(old, &mut actions);
        actions.push(Action::Publish);
        actions
    }

    /// MAKE_FS (spec 04, 9.1).
    pub fn format(
        &mut self,
        request: &sheepdog_proto::header::ClusterRequest,
        store: &[u8],
    ) -> Result<Vec<Action>, ResultCode> {
        let copies = if request.copies == 0 { 3 } else { request.copies };
        let shift =
            if request.block_size_shift == 0 { DEFAULT_BLOCK_SHIFT } else { request.block_size_shift };
        let policy = CopyPolicy::from_byte(request.copy_policy).map_err(|_| ResultCode::INVALID_PARMS)?;
        let copies = if policy.is_erasure() { policy.strips() } else { copies };
        if usize::from(copies) > MAX_COPIES
            || !(MIN_BLOCK_SHIFT..=MAX_BLOCK_SHIFT).contains(&shift)
            || request.ctime == 0
        {
            return Err(ResultCode::INVALID_PARMS);
        }
        let latest = self.epoch();
        let h = &mut self.info.header;
        h.nr_copies = copies;
        h.copy_policy = policy.to_byte();
        h.block_size_shift = shift;
        h.flags = request.flags;
        h.ctime = request.ctime;
        h.default_store = sheepdog_proto::fixed_str(store);
        h.epoch = Epoch(1);
        self.info.nodes = self.members.clone();
        self.status = ClusterStatus::Ok;
        self.logged = Epoch(1);
        self.completed = (Epoch(0), Vec::new());
        self.learn_config();
        self.config.shutdown = 0;
        Ok(vec![
            Action::WipeStore,
            Action::SaveConfig,
            Action::RemoveEpochs(latest),
            Action::SaveEpoch,
            Action::EndFormat,
            Action::Gathered(Epoch(1)),
            Action::Publish,
        ])
    }

    /// SHUTDOWN (spec 04, 9.2). `recovering`: the restart will have to recover.
    pub fn shutdown(&mut self, recovering: bool) -> Vec<Action> {
        self.status = ClusterStatus::Shutdown;
        let mut actions = vec![Action::Publish];
        if !recovering && self.config.ctime != 0 {
            self.config.shutdown = 1;
            actions.push(Action::SaveConfig);
        }
        actions
    }

    /// This node ends (SIGTERM, KILL_NODE, last disk lost).
    pub fn kill(&mut self) -> Vec<Action> {
        if self.status != ClusterStatus::Shutdown {
            self.status = ClusterStatus::Killed;
        }
        vec![Action::Publish]
    }

    /// The driver lost its session; the node joins again.
    pub fn reconnect(&mut self) -> Vec<Action> {
        self.status = ClusterStatus::Wait;
        self.joined = false;
        self.members.clear();
        vec![Action::Publish]
    }

    /// FORCE_RECOVER, main part (spec 04, 9.3): `epoch` and `old` as the work part found them.
    pub fn force_recover(&mut self, epoch: Epoch, old: Vec<NodeRecord>) -> Result<Vec<Action>, ResultCode> {
        if epoch != self.epoch() || self.status != ClusterStatus::Wait {
            return Err(ResultCode::FORCE_RECOVER);
        }
        self.status = ClusterStatus::Ok;
        if self.config.ctime == 0 {
            self.learn_config();
        }
        let mut actions = vec![Action::SaveConfig];
        self.raise_epoch(old, &mut actions);
        actions.push(Action::Publish);
        Ok(actions)
    }

    /// ALTER_CLUSTER_COPY: the default for future VDIs.
    pub fn alter_copies(&mut self, copies: u8, policy: u8) -> Result<Vec<Action>, ResultCode> {
        if policy != 0 || copies == 0 || usize::from(copies) > MAX_COPIES {
            return Err(ResultCode::INVALID_PARMS);
        }
        self.info.header.nr_copies = copies;
        self.config.copies = copies;
        Ok(vec![Action::SaveConfig, Action::Publish])
    }

    /// ALTER_VDI_COPY, once the table has the new number: homes change in the present epoch. What is no longer at home here is
    /// put away at once: it would be out of date if the next change made it a replica again.
    pub fn copies_altered(&mut self) -> Vec<Action> {
        let epoch = self.epoch();
        self.alters = (epoch, self.alters() + 1);
        let mut actions = self.same_epoch_round();
        if self.status == ClusterStatus::Ok {
            actions.insert(0, Action::StashMoved(Epoch(epoch.0.saturating_sub(1))));
        }
        actions
    }

    /// A round in the present epoch: redundancy or disks changed.
    pub fn same_epoch_round(&self) -> Vec<Action> {
        let epoch = self.epoch();
        let round =
            Round { epoch, tgt_epoch: epoch, old: self.members.clone(), announce: false, wildcard: false };
        vec![Action::Recover(round), Action::Publish]
    }

    /// ENABLE_RECOVER, DISABLE_RECOVER.
    pub fn set_recovery_disabled(&mut self, disabled: bool) -> Vec<Action> {
        self.info.header.disable_recovery = disabled.into();
        vec![Action::Publish]
    }

    /// COMPLETE_RECOVERY of `epoch` by `node` (spec 06, 10.8).
    pub fn completed(&mut self, epoch: Epoch, node: NodeId) -> Vec<Action> {
        if epoch.is_before(self.completed.0) {
            return Vec::new();
        }
        if epoch != self.completed.0 {
            self.completed = (epoch, Vec::new());
        }
        if let Err(at) = self.completed.1.binary_search(&node) {
            self.completed.1.insert(at, node);
        }
        if epoch == self.epoch() && self.completed.1 == ids(&self.info.nodes) {
            let text = format!("all nodes are recovered, epoch {epoch}");
            return vec![Action::Log(tracing::Level::INFO, text), Action::Gathered(epoch)];
        }
        Vec::new()
    }
}

#[cfg(test)]
mod tests;
