//! Who answers joins: the holder of the lowest number below `/master` that has joined (spec 04, 12.6).
//!
//! A member decides by the lower numbers whose holders are members. A node that has not joined is master only if
//! there is neither a lower number nor any member; finding a member above itself it takes a new, higher number, so that
//! members of the original, which wait for every lower number, need not wait for it. Numbers of the own address are
//! those of another process unless they are of this session.

use std::collections::{HashMap, HashSet};

use sheepdog_proto::NodeId;
use tokio::sync::watch;
use zookeeper_client::CreateMode;

use super::layout::{decode_node_string, encode_node_string};
use super::link::{Fault, Link};
use super::queue;

/// How far this node is on its way in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// It may not compete yet.
    Waiting,
    /// It has no JOIN in the queue.
    Competing,
    /// Its JOIN has this number.
    Asked(i64),
    /// It is a member.
    Joined,
}

/// What the election says about this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Nothing yet.
    Unknown,
    /// A member with a lower number answers.
    Behind,
    /// This node answers, as long as its session lives.
    Master,
}

/// What one look at the candidates means.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Master,
    /// Until this number vanishes.
    Behind(i64),
    /// This candidate has neither joined nor vanished.
    Undecided(i64),
    /// Members have higher numbers than this newcomer.
    Renumber,
}

/// Judges the candidates `lower` than this node, in order of number. Of a member's address nobody else is one.
fn judge(joined: bool, lower: &[(i64, NodeId)], members: &HashSet<NodeId>, me: &NodeId) -> Verdict {
    let mut lower = lower.iter().filter(|(_, node)| !joined || node != me);
    if let Some((number, _)) = lower.clone().find(|(_, node)| members.contains(node)) {
        return Verdict::Behind(*number);
    }
    match lower.next() {
        _ if joined => Verdict::Master,
        Some((number, _)) => Verdict::Undecided(*number),
        None if members.iter().all(|node| node == me) => Verdict::Master,
        None => Verdict::Renumber,
    }
}

/// Takes part until this node is master.
pub async fn compete(
    link: Link,
    me: NodeId,
    mut progress: watch::Receiver<Progress>,
    standing: watch::Sender<Standing>,
) -> Result<(), Fault> {
    if progress.wait_for(|p| *p != Progress::Waiting).await.is_err() {
        return Ok(());
    }
    let name = encode_node_string(&me);
    let mut mine = enter(&link, &name).await?;
    let mut known = HashMap::new();
    // Took a new number, and nothing has changed since.
    let mut renumbered = false;
    loop {
        let now = *progress.borrow_and_update();
        let joined = now == Progress::Joined;
        let (names, members_changed) = link.children_and_watch("/member").await?;
        let members: HashSet<NodeId> = names.iter().filter_map(|n| NodeId::parse(n)).collect();
        let lower = others(&link, mine, &mut known).await?;
        let verdict = judge(joined, &lower, &members, &me);
        let others_come_first = match (&verdict, now) {
            (Verdict::Master, Progress::Asked(join)) => others_wait_before(&link, join, &mut known).await?,
            (Verdict::Master, Progress::Competing) => {
                let end = link.next_number().await?;
                others_wait_before(&link, end, &mut known).await?
            }
            _ => false,
        };
        let was_renumbered = std::mem::take(&mut renumbered);
        let blocker = match verdict {
            Verdict::Master if others_come_first => {
                mine = renumber(&link, mine, &name).await?;
                continue;
            }
            Verdict::Master => {
                tracing::info!("this node answers joins from now on");
                standing.send_replace(Standing::Master);
                return Ok(());
            }
            Verdict::Renumber if !was_renumbered => {
                mine = renumber(&link, mine, &name).await?;
                renumbered = true;
                continue;
            }
            // A member without a number: it is leaving.
            Verdict::Renumber => {
                tokio::select! {
                    _ = members_changed.changed() => {}
                    changed = progress.changed() => if changed.is_err() { return Ok(()) },
                }
                continue;
            }
            Verdict::Behind(number) => {
                standing.send_if_modified(|s| std::mem::replace(s, Standing::Behind) != Standing::Behind);
                number
            }
            Verdict::Undecided(number) => number,
        };
        let (stat, gone) = link.stat_and_watch(&path(blocker)).await?;
        if stat.is_none() {
            continue;
        }
        if let Verdict::Behind(_) = verdict {
            gone.changed().await;
        } else {
            tokio::select! {
                _ = gone.changed() => {}
                _ = members_changed.changed() => {}
                changed = progress.changed() => if changed.is_err() { return Ok(()) },
            }
        }
    }
}

async fn enter(link: &Link, name: &[u8]) -> Result<i64, Fault> {
    link.create("/master/", name, CreateMode::EphemeralSequential).await
}

/// Gives the number `mine` up for a new one.
async fn renumber(link: &Link, mine: i64, name: &[u8]) -> Result<i64, Fault> {
    link.delete(&path(mine)).await?;
    enter(link, name).await
}

/// Removes all numbers of this session.
pub async fn withdraw(link: &Link) -> Result<(), Fault> {
    for candidate in candidates(link, i64::MAX, &mut HashMap::new()).await? {
        if candidate.session == link.session {
            link.delete(&path(candidate.number)).await?;
        }
    }
    Ok(())
}

/// Who holds a number.
#[derive(Clone, Copy)]
struct Candidate {
    number: i64,
    node: NodeId,
    session: i64,
}

fn path(number: i64) -> String {
    format!("/master/{number:010}")
}

/// Candidates with numbers below `end`, in order.
async fn candidates(
    link: &Link,
    end: i64,
    known: &mut HashMap<i64, Candidate>,
) -> Result<Vec<Candidate>, Fault> {
    let names = link.children("/master").await?;
    let mut numbers: Vec<i64> = names.iter().filter_map(|n| n.parse().ok()).filter(|n| *n < end).collect();
    numbers.sort_unstable();
    let mut found = Vec::new();
    for number in numbers {
        let candidate = match known.get(&number) {
            Some(candidate) => *candidate,
            None => {
                let Some((data, stat)) = link.get(&path(number)).await? else { continue };
                let Some(node) = decode_node_string(&data) else { continue };
                let candidate = Candidate { number, node, session: stat.ephemeral_owner };
                known.insert(number, candidate);
                candidate
            }
        };
        found.push(candidate);
    }
    Ok(found)
}

/// The same without those of this session.
async fn others(
    link: &Link,
    end: i64,
    known: &mut HashMap<i64, Candidate>,
) -> Result<Vec<(i64, NodeId)>, Fault> {
    let found = candidates(link, end, known).await?.into_iter();
    Ok(found.filter(|c| c.session != link.session).map(|c| (c.number, c.node)).collect())
}

/// Whether a living candidate's JOIN comes before `join`, where ours is or will be at the earliest, and has no answer. This node reads the queue from its own JOIN
/// on and would never answer it; the other one answers both.
async fn others_wait_before(
    link: &Link,
    join: i64,
    known: &mut HashMap<i64, Candidate>,
) -> Result<bool, Fault> {
    let waiting = queue::open_joins(link, join).await?;
    if waiting.is_empty() {
        return Ok(false);
    }
    let living = others(link, i64::MAX, known).await?;
    Ok(living.iter().any(|(_, node)| waiting.contains(node)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_member_is_master_and_a_newcomer_only_of_nobody() {
        let node = |port| NodeId::new(std::net::Ipv4Addr::LOCALHOST.into(), port);
        let me = node(9);
        let table = [
            // joined, lower candidates, members, verdict
            (false, vec![], vec![], Verdict::Master),
            (false, vec![], vec![9], Verdict::Master),
            (false, vec![(0, 9)], vec![], Verdict::Undecided(0)),
            (false, vec![(0, 9)], vec![9], Verdict::Behind(0)),
            (true, vec![(0, 9)], vec![9], Verdict::Master),
            (false, vec![(0, 1)], vec![], Verdict::Undecided(0)),
            (false, vec![(0, 1)], vec![1], Verdict::Behind(0)),
            (false, vec![(0, 1), (1, 2)], vec![2], Verdict::Behind(1)),
            (false, vec![], vec![3], Verdict::Renumber),
            (false, vec![(0, 1)], vec![3], Verdict::Undecided(0)),
            (true, vec![(0, 1)], vec![9], Verdict::Master),
            (true, vec![(0, 1), (2, 3)], vec![3, 9], Verdict::Behind(2)),
            (true, vec![], vec![3, 9], Verdict::Master),
        ];
        for (joined, lower, members, want) in table {
            let lower: Vec<_> = lower.into_iter().map(|(n, port)| (n, node(port))).collect();
            let members: HashSet<_> = members.into_iter().map(node).collect();
            let got = judge(joined, &lower, &members, &me);
            assert_eq!(got, want, "joined {joined}, lower {lower:?}, members {members:?}");
        }
    }
}
