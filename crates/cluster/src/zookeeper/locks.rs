//! Cluster-wide mutexes below `/lock`, shared with the original's sheep: `/lock/ID` has a sequential ephemeral node of each
//! that has or wants it, the lowest has it (spec 04, 12.9). A waiter watches the node before its own, so that a release
//! wakes one of them. The servers remove the nodes of a session that ended; its holders know by their [`Lock`].

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use sheepdog_proto::NodeId;
use tokio::sync::{Mutex, oneshot, watch};
use tokio::task::JoinSet;
use zookeeper_client::{CreateMode, Error as ZkError};

use super::layout::encode_node_string;
use super::link::{Fault, Link};
use crate::{DriverError, Lease, Lock};

/// Where a request for a lock is answered.
type Reply = oneshot::Sender<Result<Lock, DriverError>>;

/// The locks of one session. Dropping it loses them.
pub struct Locks {
    link: Link,
    me: NodeId,
    lease: Arc<Lease>,
    /// In this process, one at a time has a node below `/lock/ID`: what else is there of this session is left over.
    turns: HashMap<u64, Weak<Mutex<()>>>,
    /// Turns `true` when this node leaves the cluster.
    ended: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Locks {
    /// No lock yet.
    pub fn new(link: Link, me: NodeId, lease: Arc<Lease>) -> Locks {
        let (turns, tasks) = (HashMap::new(), JoinSet::new());
        Locks { link, me, lease, turns, ended: watch::channel(false).0, tasks }
    }

    /// Answers when the lock is held, and keeps it until it ends.
    pub fn lock(&mut self, id: u64, reply: Reply) {
        while self.tasks.try_join_next().is_some() {}
        self.turns.retain(|_, turn| turn.strong_count() > 0);
        let turn = self.turns.get(&id).and_then(Weak::upgrade).unwrap_or_default();
        self.turns.insert(id, Arc::downgrade(&turn));
        let (link, me, lease) = (self.link.clone(), self.me, self.lease.clone());
        let ended = self.ended.subscribe();
        self.tasks.spawn(async move {
            let _turn = turn.lock().await;
            match hold(link, id, me, lease, ended, reply).await {
                // Everybody concerned knows by the end of the channels.
                Ok(()) | Err(Fault::Lost) => {}
                Err(Fault::Refused(e)) => tracing::error!("zookeeper, lock {id}: {e}"),
            }
        });
    }

    /// Ends all locks and requests: this node leaves.
    pub fn end(&self) {
        self.ended.send_replace(true);
    }
}

async fn hold(
    link: Link,
    id: u64,
    me: NodeId,
    lease: Arc<Lease>,
    mut ended: watch::Receiver<bool>,
    reply: Reply,
) -> Result<(), Fault> {
    let parent = format!("/lock/{id}");
    let mine = enter(&link, &parent, &me).await?;
    let held = tokio::select! {
        held = wait_until_first(&link, &parent, mine) => held.map(|()| true),
        // The sender lives as long as this task.
        _ = ended.wait_for(|ended| *ended) => Ok(false),
    };
    let mut done = None;
    match held {
        Ok(true) => {
            let (end, mut asked) = oneshot::channel();
            let alive = Arc::new(());
            let lock = Lock::new(&alive, Some(lease), move |done| drop(end.send(done)));
            // A caller that does not wait any more drops the lock, which ends it.
            drop(reply.send(Ok(lock)));
            tokio::select! {
                ended = &mut asked => done = ended.ok(),
                _ = ended.wait_for(|ended| *ended) => {}
            }
        }
        Ok(false) => {
            drop(reply.send(Err(DriverError::NotJoined)));
            remove_left_over(&link, &parent, mine).await?;
        }
        Err(Fault::Lost) => return Err(Fault::Lost),
        Err(Fault::Refused(e)) => {
            let error = DriverError::Ensemble { hosts: "lock".into(), reason: e.to_string() };
            drop(reply.send(Err(error)));
        }
    }
    link.delete(&path(&parent, mine)).await?;
    if let Some(done) = done {
        let _ = done.send(());
    }
    match link.delete(&parent).await {
        Err(Fault::Refused(ZkError::NotEmpty)) => Ok(()),
        result => result,
    }
}

fn path(parent: &str, number: i64) -> String {
    format!("{parent}/{number:010}")
}

/// Creates our node, and its parent if that is missing, and gives its number.
async fn enter(link: &Link, parent: &str, me: &NodeId) -> Result<i64, Fault> {
    let (prefix, data) = (format!("{parent}/"), encode_node_string(me));
    loop {
        match link.create(&prefix, &data, CreateMode::EphemeralSequential).await {
            Err(Fault::Refused(ZkError::NoNode)) => {}
            result => return result,
        }
        match link.create(parent, &[], CreateMode::Persistent).await {
            Ok(_) | Err(Fault::Refused(ZkError::NodeExists)) => {}
            Err(e) => return Err(e),
        }
    }
}

/// Deletes the nodes below `mine` that repeated requests of this session created.
async fn remove_left_over(link: &Link, parent: &str, mine: i64) -> Result<(), Fault> {
    for number in link.children(parent).await?.iter().filter_map(|n| n.parse().ok()).filter(|n| *n < mine) {
        let path = path(parent, number);
        if link.stat(&path).await?.is_some_and(|stat| stat.ephemeral_owner == link.session) {
            link.delete(&path).await?;
        }
    }
    Ok(())
}

/// Waits until no lower number is left. A node of this session among them was created by a repeated request.
async fn wait_until_first(link: &Link, parent: &str, mine: i64) -> Result<(), Fault> {
    loop {
        let numbers = link.children(parent).await?;
        let lower = numbers.iter().filter_map(|n| n.parse::<i64>().ok()).filter(|n| *n < mine);
        let Some(before) = lower.max() else { return Ok(()) };
        let before = path(parent, before);
        let (stat, changed) = link.stat_and_watch(&before).await?;
        match stat {
            Some(stat) if stat.ephemeral_owner == link.session => link.delete(&before).await?,
            Some(_) => drop(changed.changed().await),
            None => {}
        }
    }
}
