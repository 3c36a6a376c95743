//! The queue: writing entries exactly once, reading them in sequence, looking back, tidying up (spec 04, 12.4).

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use futures_util::future::try_join_all;
use sheepdog_proto::{NodeId, NodeRecord};
use tokio::sync::{mpsc, oneshot};
use zookeeper_client::CreateMode;

use super::history;
use super::layout::{Body, Entry, JOIN_LEN, decode_position, queue_path};
use super::link::{Fault, Link, RETRY, open_to_all};
use super::session::Input;
use super::tasks::Tell;
use crate::DriverError;

/// How far back a joiner looks for what is still open, and how many entries outlive the oldest checkpoint.
pub const KEPT: i64 = 1000;
/// Requests under way at the same time when many entries are looked at.
const BATCH: usize = 100;
/// A write that fails so often in a row is not hit by a dying server.
const SUSPICIOUS: u64 = 10;
/// Requests for JOINs and ACCEPTs under way at the same time, of a megabyte each.
const LARGE_BATCH: usize = 4;

/// What the reader has to tell.
pub enum Read {
    /// The entry with this number. A JOIN comes again when it has become an ACCEPT. `version` is its znode's.
    Entry {
        /// Its number.
        number: i64,
        /// Its content.
        entry: Entry,
        /// Data version.
        version: i32,
    },
    /// There was no entry with this number yet.
    Drained(i64),
    /// The entry with this number was removed before it was read.
    Gap(i64),
}

/// Reads from `number` on, for ever.
pub async fn read(link: Link, mut number: i64, out: mpsc::Sender<Read>) -> Result<(), Fault> {
    loop {
        let path = queue_path(number);
        let Some((data, stat)) = link.get(&path).await? else {
            if wait_for(&link, &path, number, &out).await? {
                continue;
            }
            return Ok(());
        };
        let mut version = stat.version;
        match Entry::decode(&data) {
            Err(e) => tracing::error!("{path} is skipped: {e}"),
            Ok(mut entry) => {
                while let Body::Join(_) = entry.body {
                    let Some((data, stat, changed)) = link.get_and_watch(&path).await? else {
                        let _ = out.send(Read::Gap(number)).await;
                        return Ok(());
                    };
                    version = stat.version;
                    match Entry::decode(&data) {
                        Ok(read) => entry = read,
                        Err(e) => tracing::error!("{path}: {e}"),
                    }
                    if let Body::Join(_) = entry.body {
                        let read = Read::Entry { number, entry: entry.clone(), version };
                        if out.send(read).await.is_err() {
                            return Ok(());
                        }
                        changed.changed().await;
                    }
                }
                if out.send(Read::Entry { number, entry, version }).await.is_err() {
                    return Ok(());
                }
            }
        }
        number += 1;
    }
}

/// Waits until an entry exists; `false` if nobody listens or it never will.
async fn wait_for(link: &Link, path: &str, number: i64, out: &mpsc::Sender<Read>) -> Result<bool, Fault> {
    let (stat, created) = link.stat_and_watch(path).await?;
    if stat.is_some() {
        return Ok(true);
    }
    if out.send(Read::Drained(number)).await.is_err() {
        return Ok(false);
    }
    let mut created = std::pin::pin!(created.changed());
    loop {
        if tokio::time::timeout(link.timeout, &mut created).await.is_ok() {
            return Ok(true);
        }
        // Less than what was read: somebody has removed the queue, and there is a new one.
        let next = link.next_number().await?;
        if next < number || next > number && link.stat(path).await?.is_none() {
            let _ = out.send(Read::Gap(number)).await;
            return Ok(false);
        }
    }
}

/// Creates an entry. `from`: a number that is not above the one it gets; where the search begins when a connection
/// broke and nobody knows whether the entry was written.
pub async fn push(link: &Link, entry: &Entry, from: i64) -> Result<i64, Fault> {
    let data = entry.encode();
    let options = open_to_all(CreateMode::PersistentSequential);
    let mut attempt = 0_u64;
    loop {
        attempt += 1;
        let client = link.client().await?;
        match client.create("/queue/", &data, &options).await {
            Ok((_, number)) => return Ok(number.into_i64()),
            Err(e) if super::link::is_answer(&e) => return Err(Fault::Refused(e)),
            Err(e) => tracing::debug!("outcome of a write unknown: {e}"),
        }
        if attempt.is_multiple_of(SUSPICIOUS) {
            tracing::warn!(
                "zookeeper has closed the connection {attempt} times instead of taking an entry of {} bytes: is \
                 jute.maxbuffer of the servers smaller?",
                data.len()
            );
        }
        tokio::time::sleep(RETRY).await;
        link.sync().await?;
        for number in from..link.next_number().await? {
            let Some((data, _)) = link.get(&queue_path(number)).await? else { continue };
            if data.get(..8) == Some(&entry.id.to_le_bytes()) {
                return Ok(number);
            }
        }
    }
}

/// An order to the writer.
pub enum Write {
    /// An entry of the daemon.
    Entry(Body, NodeRecord, oneshot::Sender<Result<(), DriverError>>),
    /// A LEAVE for a node whose membership ended, unless it is back.
    Bury(NodeId),
}

/// Writes in the order of the orders. `position` is where the reader of this node is.
pub async fn write(
    link: Link,
    mut orders: mpsc::UnboundedReceiver<Write>,
    position: Arc<AtomicI64>,
    tell: Tell,
) -> Result<(), Fault> {
    while let Some(order) = orders.recv().await {
        let (body, sender, reply) = match order {
            Write::Entry(body, sender, reply) => (body, sender, reply),
            Write::Bury(nid) => {
                // A server that lags does not know yet that it is back.
                link.sync().await?;
                if link.stat(&super::layout::member_path(&nid)).await?.is_some() {
                    tell.tell(Input::Back(nid));
                    continue;
                }
                (Body::Leave, NodeRecord { nid, ..NodeRecord::zeroed() }, oneshot::channel().0)
            }
        };
        // Without them everybody waits for this node, or for one that is dead.
        let needed = matches!(body, Body::Leave | Body::Unblock(_));
        let entry = Entry { id: rand::random(), sender, body };
        let result = push(&link, &entry, position.load(Ordering::Relaxed)).await;
        let answer = match result {
            Ok(_) => Ok(()),
            Err(Fault::Lost) => return Err(Fault::Lost),
            Err(fault) if needed => return Err(fault),
            Err(Fault::Refused(e)) => {
                Err(DriverError::Ensemble { hosts: "queue".into(), reason: e.to_string() })
            }
        };
        let _ = reply.send(answer);
    }
    Ok(())
}

/// What is known of an entry without reading it.
struct Found {
    number: i64,
    len: usize,
    version: i32,
}

/// The entries that are left of the last [`KEPT`] numbers before `end`, in order.
async fn look_back(link: &Link, end: i64) -> Result<Vec<Found>, Fault> {
    let numbers: Vec<i64> = ((end - KEPT).max(0)..end).collect();
    let mut found = Vec::new();
    for batch in numbers.chunks(BATCH) {
        let paths: Vec<String> = batch.iter().map(|n| queue_path(*n)).collect();
        let stats = try_join_all(paths.iter().map(|p| link.stat(p))).await?;
        found.extend(batch.iter().zip(stats).filter_map(|(number, stat)| {
            let stat = stat?;
            let len = usize::try_from(stat.data_length).unwrap_or(0);
            Some(Found { number: *number, len, version: stat.version })
        }));
    }
    Ok(found)
}

/// Reads these entries at the same time.
async fn fetch(link: &Link, numbers: &[i64]) -> Result<Vec<(i64, Entry)>, Fault> {
    let paths: Vec<String> = numbers.iter().map(|n| queue_path(*n)).collect();
    let data = try_join_all(paths.iter().map(|p| link.get(p))).await?;
    let entries = numbers.iter().zip(data);
    Ok(entries.filter_map(|(number, data)| Some((*number, Entry::decode(&data?.0).ok()?))).collect())
}

/// Who of `members` waits for or has the mutex when the entry `join` is reached, in order. The original starts with
/// nobody, and its joiners may be granted a mutex that is taken.
pub async fn open_blocks(link: &Link, join: i64, members: &[NodeRecord]) -> Result<Vec<NodeId>, Fault> {
    let found = look_back(link, join).await?;
    let small: Vec<i64> = found.iter().filter(|f| f.len != JOIN_LEN).map(|f| f.number).collect();
    let mut entries = Vec::new();
    for batch in small.chunks(BATCH) {
        entries.extend(fetch(link, batch).await?);
    }
    let Some(oldest) = history::oldest_open_block(&entries, members) else { return Ok(Vec::new()) };
    // They are large, and most joins find nobody who wants the mutex.
    let accepts = found.iter().filter(|f| f.len == JOIN_LEN && f.version > 0 && f.number > oldest);
    let accepts: Vec<i64> = accepts.map(|f| f.number).collect();
    let mut waiting = Vec::new();
    let mut entries = entries.into_iter().peekable();
    for batch in accepts.chunks(LARGE_BATCH) {
        for (number, accept) in fetch(link, batch).await? {
            while let Some((_, entry)) = entries.next_if(|(n, _)| *n < number) {
                history::advance_blocks(&mut waiting, &entry);
            }
            history::advance_blocks(&mut waiting, &accept);
        }
    }
    entries.for_each(|(_, entry)| history::advance_blocks(&mut waiting, &entry));
    Ok(waiting)
}

/// Who asked to join before the entry `join` and has no answer.
pub async fn open_joins(link: &Link, join: i64) -> Result<Vec<NodeId>, Fault> {
    let unanswered = |f: &Found| f.len == JOIN_LEN && f.version == 0;
    let numbers: Vec<i64> =
        look_back(link, join).await?.into_iter().filter(unanswered).map(|f| f.number).collect();
    let mut waiting = Vec::new();
    for batch in numbers.chunks(LARGE_BATCH) {
        let joins = fetch(link, batch).await?.into_iter().filter(|(_, e)| matches!(e.body, Body::Join(_)));
        waiting.extend(joins.map(|(_, e)| e.sender.nid));
    }
    Ok(waiting)
}

/// Removes entries that every member has passed long ago. Does nothing while a member has no checkpoint.
pub async fn tidy(link: &Link) -> Result<(), Fault> {
    let mut oldest = i64::MAX;
    for name in link.children("/queue_pos").await? {
        let Some((data, _)) = link.get(&format!("/queue_pos/{name}")).await? else { continue };
        oldest = oldest.min(decode_position(&data).into());
    }
    if oldest < 0 || oldest == i64::MAX {
        return Ok(());
    }
    let mut old: Vec<i64> = link.children("/queue").await?.iter().filter_map(|n| n.parse().ok()).collect();
    old.retain(|n| *n < oldest - KEPT);
    for batch in old.chunks(BATCH) {
        let paths: Vec<String> = batch.iter().map(|n| queue_path(*n)).collect();
        try_join_all(paths.iter().map(|p| link.delete(p))).await?;
    }
    if !old.is_empty() {
        tracing::info!("{} old entries removed from the queue", old.len());
    }
    Ok(())
}
