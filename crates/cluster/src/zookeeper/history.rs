//! What the queue's entries mean: members and holders of the mutex as functions of the position (spec 04, 12.5, 12.7,
//! 12.8). Pure: every member that applies the same entries gets the same events.

use std::collections::{BTreeMap, HashMap};

use sheepdog_proto::{NodeId, NodeRecord};

use super::layout::{Body, Entry};
use crate::Event;

/// State after an entry.
#[derive(Debug, Default)]
pub struct History {
    members: BTreeMap<NodeId, NodeRecord>,
    blocks: Vec<NodeId>,
}

impl History {
    /// The state in which a joiner finds itself before its own ACCEPT.
    pub fn new(members: Vec<NodeRecord>, mut blocks: Vec<NodeId>) -> History {
        let members: BTreeMap<_, _> = members.into_iter().map(|n| (n.nid, n)).collect();
        blocks.retain(|n| members.contains_key(n));
        History { members, blocks }
    }

    /// Members in node order.
    pub fn members(&self) -> Vec<NodeRecord> {
        self.members.values().copied().collect()
    }

    /// Whether `node` is a member.
    pub fn is_member(&self, node: &NodeId) -> bool {
        self.members.contains_key(node)
    }

    /// Who has the mutex or gets it next.
    pub fn head(&self) -> Option<NodeId> {
        self.blocks.first().copied()
    }

    /// Ends the membership of `node`, if it has one.
    pub fn remove(&mut self, node: &NodeId) -> Option<Event> {
        self.blocks.retain(|n| n != node);
        let node = self.members.remove(node)?;
        Some(Event::Leave { node, members: self.members() })
    }

    /// The events that an entry causes, in order. A JOIN causes none before it is answered.
    pub fn apply(&mut self, entry: Entry) -> Vec<Event> {
        let node = entry.sender;
        advance_blocks(&mut self.blocks, &entry);
        match entry.body {
            Body::Join(_) | Body::Block => Vec::new(),
            Body::Accept(info, _) => {
                // A member that joins again is a new one: its old incarnation ends here at the latest.
                let mut events = Vec::from_iter(self.remove(&node.nid));
                self.members.insert(node.nid, node);
                events.push(Event::Accept { node, members: self.members(), info });
                events
            }
            Body::Leave => Vec::from_iter(self.remove(&node.nid)),
            Body::Unblock(message) | Body::Notify(message) => vec![Event::Notify { sender: node, message }],
            Body::UpdateNode if !self.is_member(&node.nid) => Vec::new(),
            Body::UpdateNode => {
                self.members.insert(node.nid, node);
                vec![Event::UpdateNode { node, members: self.members() }]
            }
        }
    }
}

/// What an entry does to the list of those who have or want the mutex. An UNBLOCK of anybody but the holder changes
/// nothing. An ACCEPT ends what its node asked for in an earlier life, and whatever those asked for whom nobody buried
/// because all died together.
pub fn advance_blocks(blocks: &mut Vec<NodeId>, entry: &Entry) {
    let nid = entry.sender.nid;
    match &entry.body {
        Body::Block => blocks.push(nid),
        Body::Unblock(_) if blocks.first() == Some(&nid) => drop(blocks.remove(0)),
        Body::Leave => blocks.retain(|n| *n != nid),
        Body::Accept(_, before) => blocks.retain(|n| *n != nid && before.iter().any(|m| m.nid == *n)),
        _ => {}
    }
}

/// The number of the oldest BLOCK of `members` among `entries`, which lack the ACCEPTs, that one of these may have
/// ended. An UNBLOCK counts for its sender's last BLOCK: the one before may be of an earlier life.
pub fn oldest_open_block(entries: &[(i64, Entry)], members: &[NodeRecord]) -> Option<i64> {
    let mut open: HashMap<NodeId, Vec<i64>> = HashMap::new();
    for (number, entry) in entries {
        let blocks = open.entry(entry.sender.nid).or_default();
        match entry.body {
            Body::Block => blocks.push(*number),
            Body::Unblock(_) => drop(blocks.pop()),
            Body::Leave => blocks.clear(),
            _ => {}
        }
    }
    members.iter().filter_map(|m| open.get(&m.nid)?.first().copied()).min()
}
