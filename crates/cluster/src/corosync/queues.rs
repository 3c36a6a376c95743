//! What the group's deliveries mean: members, joins, the mutex, partitions (spec 04, 13.3 to 13.5). Pure: every member
//! that takes the same deliveries takes the same actions.

use std::collections::VecDeque;

use sheepdog_proto::{ClusterInfo, NodeRecord};

use super::ffi::{Changed, Reason};
use super::layout::{Body, Message, Peer, ProcessId};

/// What is to be done. Questions carry the number under which the answer is expected.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Send a message about this process.
    Send(Peer, Box<Body>),
    /// Ask the daemon about a join.
    AskJoin {
        /// Number of the question.
        question: u64,
        /// The joiner.
        node: NodeRecord,
        /// Members without it.
        members: Vec<NodeRecord>,
        /// What it knows.
        info: Box<ClusterInfo>,
    },
    /// Offer the mutex to the daemon.
    AskBlock(u64),
    /// Tell the daemon.
    Accept {
        /// The new member.
        node: NodeRecord,
        /// Members with it.
        members: Vec<NodeRecord>,
        /// The answered cluster info.
        info: Box<ClusterInfo>,
    },
    /// Tell the daemon.
    Leave(NodeRecord, Vec<NodeRecord>),
    /// Tell the daemon.
    Notify(NodeRecord, Vec<u8>),
    /// Tell the daemon.
    Update(NodeRecord, Vec<NodeRecord>),
    /// This process was accepted. `false`: it does not know who has the mutex.
    Joined(bool),
    /// An UNBLOCK whose BLOCK is not known here.
    UnknownUnblock,
    /// The own UNBLOCK is in the history.
    Unblocked,
    /// The driver cannot go on.
    Fail(String),
    /// For the log.
    Warn(String),
}

/// A question to the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    No,
    Yes(u64),
    /// Answered "no"; asked again after a while.
    Declined,
    /// Answered "yes".
    Done,
}

/// An event in the order of the group that is not handled yet.
#[derive(Debug)]
enum Pending {
    Join {
        who: ProcessId,
        body: Option<(NodeRecord, ClusterInfo)>,
        asked: Asked,
        /// Who had or wanted the mutex when it entered; `None` if this process did not know.
        blocks: Option<Vec<ProcessId>>,
    },
    Accept {
        joiner: Peer,
        info: ClusterInfo,
        members: Vec<Peer>,
        blocks: Option<Vec<ProcessId>>,
    },
    Leave(ProcessId),
    Notify(NodeRecord, Vec<u8>),
    Update(NodeRecord),
}

/// A change of the list of those who have or want the mutex.
#[derive(Debug, Clone, Copy)]
enum BlockChange {
    Block(ProcessId),
    Unblock(ProcessId),
    Gone(ProcessId),
}

/// `false` = an UNBLOCK without its BLOCK.
fn change_blocks(blocks: &mut Vec<ProcessId>, change: BlockChange) -> bool {
    match change {
        BlockChange::Block(who) => blocks.push(who),
        // All of them: its second one would stay for ever.
        BlockChange::Gone(who) => blocks.retain(|b| *b != who),
        BlockChange::Unblock(who) => match blocks.iter().position(|b| *b == who) {
            Some(at) => drop(blocks.remove(at)),
            None => return false,
        },
    }
    true
}

/// State of one process in the group.
#[derive(Debug)]
pub struct Queues {
    me: Peer,
    /// Accepted, or elected as the first member.
    joined: bool,
    /// Left, but alive: it answers no joins.
    left: bool,
    members: Vec<Peer>,
    events: VecDeque<Pending>,
    /// Who has the mutex, then who wants it, in order. Known once joined.
    blocks: Vec<ProcessId>,
    /// Before that: what changed since this process entered the group.
    changes: Vec<BlockChange>,
    /// Whether this process has the mutex, if it is at the head.
    turn: Asked,
    questions: u64,
}

impl Queues {
    /// State before entering the group.
    pub fn new(me: Peer) -> Queues {
        Queues {
            me,
            joined: false,
            left: false,
            members: Vec::new(),
            events: VecDeque::new(),
            blocks: Vec::new(),
            changes: Vec::new(),
            turn: Asked::No,
            questions: 0,
        }
    }

    /// Whether this process is or was a member.
    pub fn joined(&self) -> bool {
        self.joined
    }

    /// Whether the daemon took the mutex and did not release it; releases it.
    pub fn take_turn(&mut self) -> bool {
        // What was granted stays at the head until the own UNBLOCK comes back: not offered again.
        let granted = self.turn == Asked::Done && self.blocks.first() == Some(&self.me.process);
        if granted {
            self.turn = Asked::Yes(0);
        }
        granted
    }

    fn nodes(&self) -> Vec<NodeRecord> {
        let mut nodes: Vec<_> = self.members.iter().map(|m| m.node).collect();
        nodes.sort_by_key(|n| n.nid);
        nodes
    }

    fn change(&mut self, change: BlockChange) -> bool {
        if self.joined {
            return change_blocks(&mut self.blocks, change);
        }
        self.changes.push(change);
        true
    }

    /// The group changed.
    pub fn changed(&mut self, members: &[Changed], left: &[Changed], joined: &[Changed]) -> Vec<Action> {
        let mut actions = Vec::new();
        let verdict = self.split(members, left).or_else(|| self.merge(members, joined));
        match verdict {
            Some(Action::Fail(text)) => return vec![Action::Fail(text)],
            Some(other) => actions.push(other),
            None => {}
        }
        for Changed { process, .. } in left {
            self.change(BlockChange::Gone(*process));
            let is_join = |e: &Pending| matches!(e, Pending::Join { who, .. } if who == process);
            match self.events.iter().position(is_join) {
                Some(at) => drop(self.events.remove(at)),
                None => self.events.push_back(Pending::Leave(*process)),
            }
        }
        for Changed { process, .. } in joined {
            if *process == self.me.process {
                // Nothing before this change is ours.
                self.events.clear();
                self.changes.clear();
            }
            let blocks = self.joined.then(|| self.blocks.clone());
            self.events.push_back(Pending::Join { who: *process, body: None, asked: Asked::No, blocks });
        }
        let came = |m: &Changed| {
            self.events.iter().any(|e| matches!(e, Pending::Join { who, .. } if *who == m.process))
        };
        if !self.joined && !members.is_empty() && members.iter().all(came) {
            // Whoever saw everybody join is the first member.
            self.joined = true;
            for change in std::mem::take(&mut self.changes) {
                change_blocks(&mut self.blocks, change);
            }
        }
        self.pass(&mut actions);
        actions
    }

    /// A part of the members was lost with their nodes: the smaller part ends. Processes that ended by themselves do
    /// not count, they cannot be on another side, and neither do those whose end waits to be handled.
    fn split(&self, present: &[Changed], left: &[Changed]) -> Option<Action> {
        let is_lost = |m: &&Peer| left.iter().any(|l| l.process == m.process && l.reason == Reason::NodeDown);
        let is_here = |m: &&Peer| present.iter().any(|p| p.process == m.process);
        let here: Vec<&Peer> = self.members.iter().filter(is_here).collect();
        let lost: Vec<&Peer> = self.members.iter().filter(is_lost).collect();
        if lost.is_empty() || here.len() > lost.len() {
            return None;
        }
        let lowest = |side: &[&Peer]| side.iter().map(|m| m.node.nid).min();
        if here.len() == lost.len() && lowest(&here) < lowest(&lost) {
            return Some(Action::Warn(format!(
                "half of the members ({}) are lost; this half has the lowest address and goes on",
                lost.len()
            )));
        }
        Some(Action::Fail(format!(
            "a number of leaving node ({}) is larger than majority ({}), network partition",
            lost.len(),
            (here.len() + lost.len()) / 2 + 1
        )))
    }

    /// Two groups that went on by themselves met: the smaller one ends, or at equal size the one without the lowest
    /// process.
    fn merge(&self, members: &[Changed], joined: &[Changed]) -> Option<Action> {
        let theirs: Vec<ProcessId> =
            joined.iter().filter(|j| j.reason == Reason::NodeUp).map(|j| j.process).collect();
        let ours: Vec<ProcessId> =
            members.iter().map(|m| m.process).filter(|p| !joined.iter().any(|j| j.process == *p)).collect();
        if theirs.is_empty() || !ours.contains(&self.me.process) {
            return None;
        }
        let wins = ours.len() > theirs.len()
            || ours.len() == theirs.len() && ours.iter().min() < theirs.iter().min();
        let sides = format!("{} here, {} there", ours.len(), theirs.len());
        Some(if wins {
            Action::Warn(format!(
                "two parts of the cluster met that went on by themselves ({sides}); the other one has to end"
            ))
        } else {
            Action::Fail(format!(
                "two parts of the cluster met that went on by themselves ({sides}); this one ends, start it again"
            ))
        })
    }

    /// A message was delivered.
    pub fn delivered(&mut self, message: Message) -> Vec<Action> {
        let mut actions = Vec::new();
        let Peer { process, node } = message.sender;
        match message.body {
            Body::Join(info) => {
                for event in &mut self.events {
                    if let Pending::Join { who, body, .. } = event
                        && *who == process
                    {
                        *body = Some((node, info));
                        break;
                    }
                }
            }
            Body::Accept(info, members, blocks) => {
                let event = self
                    .events
                    .iter_mut()
                    .find(|e| matches!(e, Pending::Join { who, .. } if *who == process));
                if let Some(event) = event {
                    // The record used is the one of the JOIN.
                    let node = match event {
                        Pending::Join { body: Some((node, _)), .. } => *node,
                        _ => node,
                    };
                    *event = Pending::Accept { joiner: Peer { process, node }, info, members, blocks };
                }
            }
            Body::Leave => self.events.push_back(Pending::Leave(process)),
            Body::Notify(message) => self.events.push_back(Pending::Notify(node, message)),
            Body::UpdateNode => self.events.push_back(Pending::Update(node)),
            Body::Block => drop(self.change(BlockChange::Block(process))),
            Body::Unblock(message) => {
                if process == self.me.process {
                    self.turn = Asked::No;
                    actions.push(Action::Unblocked);
                }
                if !self.change(BlockChange::Unblock(process)) {
                    actions.push(Action::UnknownUnblock);
                }
                self.events.push_back(Pending::Notify(node, message));
            }
        }
        self.pass(&mut actions);
        actions
    }

    /// The daemon's verdict on a join.
    pub fn join_answered(&mut self, question: u64, answer: Option<ClusterInfo>) -> Vec<Action> {
        let table = self.members.clone();
        let Some(Pending::Join { who, body: Some((node, _)), asked, blocks, .. }) = self.events.front_mut()
        else {
            return Vec::new();
        };
        if *asked != Asked::Yes(question) {
            return Vec::new();
        }
        let Some(info) = answer else {
            *asked = Asked::Declined;
            return Vec::new();
        };
        *asked = Asked::Done;
        let body = Body::Accept(info, table, blocks.clone());
        vec![Action::Send(Peer { process: *who, node: *node }, Box::new(body))]
    }

    /// Whether the daemon took the mutex.
    pub fn block_answered(&mut self, question: u64, granted: bool) {
        if self.turn == Asked::Yes(question) {
            self.turn = if granted { Asked::Done } else { Asked::Declined };
        }
    }

    /// Asks again what was declined.
    pub fn ask_again(&mut self) -> Vec<Action> {
        if let Some(Pending::Join { asked: asked @ Asked::Declined, .. }) = self.events.front_mut() {
            *asked = Asked::No;
        }
        if self.turn == Asked::Declined {
            self.turn = Asked::No;
        }
        let mut actions = Vec::new();
        self.pass(&mut actions);
        actions
    }

    /// What stops the queue although it should not: a process in the group that never asked to join.
    pub fn stuck(&self) -> Option<ProcessId> {
        match self.events.front() {
            Some(Pending::Join { who, body: None, .. }) if *who != self.me.process => Some(*who),
            _ => None,
        }
    }

    fn question(&mut self) -> u64 {
        self.questions += 1;
        self.questions
    }

    /// Handles events until one has to wait, then offers the mutex.
    fn pass(&mut self, actions: &mut Vec<Action>) {
        while let Some(event) = self.events.pop_front() {
            match event {
                Pending::Join { .. } => {
                    self.events.push_front(event);
                    return self.ask_join(actions);
                }
                Pending::Accept { joiner, info, members, blocks } => {
                    self.accept(joiner, info, members, blocks, actions);
                }
                Pending::Leave(who) => {
                    self.left |= who == self.me.process;
                    if let Some(at) = self.members.iter().position(|m| m.process == who) {
                        let node = self.members.remove(at).node;
                        actions.push(Action::Leave(node, self.nodes()));
                    }
                }
                Pending::Notify(sender, message) => actions.push(Action::Notify(sender, message)),
                Pending::Update(node) => {
                    if let Some(member) = self.members.iter_mut().find(|m| m.node.nid == node.nid) {
                        member.node = node;
                        if member.process == self.me.process {
                            self.me.node = node;
                        }
                        actions.push(Action::Update(node, self.nodes()));
                    }
                }
            }
        }
        if self.joined && self.turn == Asked::No && self.blocks.first() == Some(&self.me.process) {
            let question = self.question();
            self.turn = Asked::Yes(question);
            actions.push(Action::AskBlock(question));
        }
    }

    fn ask_join(&mut self, actions: &mut Vec<Action>) {
        let number = self.questions + 1;
        let members = self.nodes();
        let answers = self.joined && !self.left;
        if let Some(Pending::Join { body: Some((node, info)), asked: asked @ Asked::No, .. }) =
            self.events.front_mut()
            && answers
        {
            *asked = Asked::Yes(number);
            let info = Box::new(info.clone());
            actions.push(Action::AskJoin { question: number, node: *node, members, info });
            self.questions = number;
        }
    }

    fn accept(
        &mut self,
        joiner: Peer,
        info: ClusterInfo,
        table: Vec<Peer>,
        blocks: Option<Vec<ProcessId>>,
        actions: &mut Vec<Action>,
    ) {
        let mine = joiner.process == self.me.process;
        if mine && !self.joined {
            self.members = table;
            self.joined = true;
            self.blocks = blocks.clone().unwrap_or_default();
            for change in std::mem::take(&mut self.changes) {
                change_blocks(&mut self.blocks, change);
            }
        }
        if let Some(other) = self.members.iter().find(|m| m.node.nid == joiner.node.nid) {
            let ProcessId { nodeid, pid } = other.process;
            let text = format!(
                "{} is already a member of the cluster (corosync node {nodeid}, pid {pid})",
                joiner.node.nid
            );
            // The others do not count it as a member; all that follow this rule decide alike.
            actions.push(if mine { Action::Fail(text) } else { Action::Warn(text) });
            return;
        }
        if mine {
            actions.push(Action::Joined(blocks.is_some() || self.members.is_empty()));
        }
        self.members.push(joiner);
        let members = self.nodes();
        actions.push(Action::Accept { node: joiner.node, members, info: Box::new(info) });
    }
}
