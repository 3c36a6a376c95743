//! Strips that lack a write which stands.
//!
//! A write of strips whose gateway died, and which all homes have that are left, stands: it may have been acknowledged.
//! A home that was away when this was decided may lack it ([`Fate::Loose`](crate::intents::Fate)); then nobody can have
//! acknowledged it, but others may have read it since. So what such a home kept of that epoch does not fit what the others
//! have, and must not be joined to it. Before a node answers for strips of past epochs it asks all members for such
//! writes and compares with its own log.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use parking_lot::Mutex;
use sheepdog_proto::header::{OrderRequest, order};
use sheepdog_proto::{Epoch, NodeId, Oid, Opcode, Request, ResultCode, Wire};
use sheepdog_store::{Replica, Store};
use tokio::sync::watch;

use super::Active;
use crate::intents::{Fate, WriteId};
use crate::peers::Lane;
use crate::sheep::Sheep;

/// Deadline of one question.
const DEADLINE: Duration = Duration::from_secs(5);
/// Between attempts to ask a node.
const PAUSE: Duration = Duration::from_millis(100);
/// First and largest reply buffer, in bytes.
const BUFFER: (usize, usize) = (64 << 10, 64 << 20);
/// Bytes of an entry: object id, epoch, gateway, number.
const ENTRY: usize = 20;

/// See the module's documentation.
pub struct Lacking {
    /// Objects, and the epochs whose strips here lack a write.
    strips: Mutex<HashSet<(Oid, Epoch)>>,
    /// The epoch in which the others were asked last.
    learned: watch::Sender<Epoch>,
}

impl Default for Lacking {
    fn default() -> Lacking {
        Lacking { strips: Mutex::default(), learned: watch::Sender::new(Epoch(0)) }
    }
}

impl Lacking {
    /// Whether what is here of the strip at the end of `epoch`, a file or none, lacks a write.
    pub fn has(&self, store: &Store, replica: Replica, epoch: Epoch) -> bool {
        let strips = self.strips.lock();
        let file = store.stale_at(replica, epoch).unwrap_or(epoch);
        strips.contains(&(replica.oid, file)) || strips.contains(&(replica.oid, epoch))
    }

    /// What is here of the strips of `oid` at the end of `epoch` lacks a write.
    pub fn note(&self, oid: Oid, epoch: Epoch) {
        if self.strips.lock().insert((oid, epoch)) {
            tracing::info!("{oid}: what is here of epoch {epoch} lacks a write that stands");
        }
    }

    /// Everybody has everything of `epoch`: nobody asks for strips of before.
    pub fn forget(&self, epoch: Epoch) {
        self.strips.lock().retain(|(_, e)| !e.is_before(epoch));
    }

    /// Forgets everything (MAKE_FS).
    pub fn clear(&self) {
        self.strips.lock().clear();
    }
}

/// Waits until this node knows what its strips lack.
pub async fn known(sheep: &Sheep, epoch: Epoch) {
    let mut learned = sheep.recovery.lacking.learned.subscribe();
    while learned.borrow_and_update().is_before(epoch) && !sheep.recovery.is_idle() {
        // The round may also end without having asked.
        let _ = tokio::time::timeout(PAUSE, learned.changed()).await;
    }
}

/// Asks all members. `false` = the round was replaced.
pub async fn learn(sheep: &Arc<Sheep>, active: &Active) -> bool {
    let view = sheep.views.load();
    if sheep.vdis.max_data_strips() > 1 {
        let others = view.others(sheep.me);
        let answers = join_all(others.map(|node| ask(sheep, active, node))).await;
        for entries in answers {
            let Some(entries) = entries else { return false };
            for (oid, epoch, id) in entries {
                if matches!(sheep.intents.fate(oid, id, epoch), Fate::Absent | Fate::Undone) {
                    sheep.recovery.lacking.note(oid, epoch);
                }
            }
        }
    }
    sheep.recovery.lacking.learned.send_replace(active.round.epoch);
    !active.is_replaced()
}

async fn ask(sheep: &Arc<Sheep>, active: &Active, node: NodeId) -> Option<Vec<(Oid, Epoch, WriteId)>> {
    let mut capacity = BUFFER.0;
    loop {
        if active.is_replaced() {
            return None;
        }
        let body = OrderRequest { what: order::LOOSE, ..OrderRequest::zeroed() };
        let request =
            Request::new(Opcode::ORDER_PEER).epoch(active.round.epoch).length(capacity).with_order(body);
        let reply = sheep.peers.call_on(Lane::Control, &node, request, Bytes::new(), DEADLINE).await;
        match reply.map(|reply| (reply.response.result, reply.data)) {
            Ok((ResultCode::SUCCESS, data)) => return Some(decode(&data)),
            // A node of the original keeps no such list.
            Ok((ResultCode::INVALID_PARMS, _)) => return Some(Vec::new()),
            Ok((ResultCode::BUFFER_SMALL, _)) if capacity < BUFFER.1 => {
                capacity *= 4;
                continue;
            }
            Ok((code, _)) => tracing::debug!("{node}: writes that stand are not known: {code}"),
            Err(error) => tracing::debug!("{node}: writes that stand are not known: {error}"),
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// The list that [`decode`] reads.
pub fn encode(entries: &[(Oid, Epoch, WriteId)]) -> Vec<u8> {
    let mut out = Vec::with_capacity(entries.len() * ENTRY);
    for (oid, epoch, id) in entries {
        out.extend(oid.0.to_le_bytes());
        [epoch.0, id.writer, id.seq].iter().for_each(|n| out.extend(n.to_le_bytes()));
    }
    out
}

fn decode(payload: &[u8]) -> Vec<(Oid, Epoch, WriteId)> {
    let entry = |e: &[u8]| {
        let id = WriteId { writer: u32::get(&e[12..]), seq: u32::get(&e[16..]) };
        (Oid::get(e), Epoch(u32::get(&e[8..])), id)
    };
    payload.chunks_exact(ENTRY).map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_survive_the_wire() {
        let entries = [
            (Oid(u64::MAX), Epoch(3), WriteId { writer: 1, seq: 2 }),
            (Oid(5), Epoch(u32::MAX), WriteId { writer: 7, seq: u32::MAX }),
        ];
        assert_eq!(decode(&encode(&entries)), entries);
        assert!(decode(&[1; ENTRY - 1]).is_empty());
    }
}
