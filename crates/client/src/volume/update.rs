//! Table updates: entries of objects that were created or given back, written to the inode in batches.
//!
//! One task writes at a time; what arrives meanwhile forms its next batch. A batch is cut into runs of adjacent
//! indexes, each one WRITE_OBJ: entries that did not change are never rewritten, because the original forgets their
//! reference counts then (spec 05, section 9). Updates are always durable when confirmed. `READONLY` means that the
//! VDI became a snapshot after the data was written: the entries then belong into the new working VDI's table, as they
//! are (spec 01, 12.5). A sheep lets entries of a snapshot be cleared, as deletions need it; where it can tell a discard
//! ([`Service::discards`](crate::Service::discards)), entries are cleared by DISCARD_OBJ, which is refused.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::StreamExt;
use parking_lot::Mutex;
use sheepdog_proto::btree::BTREE_NODE_LEN;
use sheepdog_proto::header::ObjRequest;
use sheepdog_proto::inode::{InodeHeader, table_offset};
use sheepdog_proto::{Flags, Oid, Opcode, Request, ResultCode, VdiId};
use tokio::sync::oneshot;

use super::error::During;
use super::index_tree::{IndexTree, NodeWrite, SetError};
use super::map::Map;
use super::open::Stale;
use super::read::PARALLEL;
use super::{Inner, VolumeError};
use crate::vdi;

/// Byte offset of `btree_counter` in the inode.
const COUNTER_OFFSET: u32 = 568;

/// Entries waiting to be written.
#[derive(Default)]
pub(super) struct Updates {
    queue: Vec<Update>,
    running: bool,
}

struct Update {
    entries: Vec<(u32, u32)>,
    done: oneshot::Sender<Result<(), VolumeError>>,
}

/// Indexes and owners.
type Entries = Vec<(u32, u32)>;

/// Adjacent entries, all set or all cleared.
struct Run {
    start: u32,
    vids: Vec<u32>,
}

impl Run {
    fn continues(&self, idx: u32, vid: u32) -> bool {
        self.start as usize + self.vids.len() == idx as usize && self.clears() == (vid == 0)
    }

    fn clears(&self) -> bool {
        self.vids.first() == Some(&0)
    }

    fn entries(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        (self.start..).zip(self.vids.iter().copied())
    }
}

fn runs(entries: &BTreeMap<u32, u32>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (idx, vid) in entries {
        match runs.last_mut() {
            Some(run) if run.continues(*idx, *vid) => run.vids.push(*vid),
            _ => runs.push(Run { start: *idx, vids: vec![*vid] }),
        }
    }
    runs
}

impl Inner {
    /// Makes entries durable and known. Callers hold the blocks' locks.
    pub(super) async fn update_table(self: &Arc<Self>, entries: Vec<(u32, u32)>) -> Result<(), VolumeError> {
        if entries.is_empty() {
            return Ok(());
        }
        let (done, outcome) = oneshot::channel();
        let idle = {
            let mut updates = self.updates.lock();
            updates.queue.push(Update { entries, done });
            !std::mem::replace(&mut updates.running, true)
        };
        if idle {
            tokio::spawn(run_updates(self.clone()));
        }
        outcome.await.unwrap_or_else(|_| {
            Err(VolumeError::Connection { what: "table update", cause: "the task ended".into() })
        })
    }

    /// Writes entries, and those that are refused because of a snapshot into the new working VDI.
    async fn write_entries(&self, mut entries: BTreeMap<u32, u32>) -> Result<(), VolumeError> {
        let mut outcome = Ok(());
        let mut attempt = 0;
        loop {
            let (vid, refused) = {
                // Nobody may replace the table between a change of it and the writes that make the change durable.
                let _still = self.moving.lock().await;
                let vid = self.vid();
                (vid, self.try_entries(vid, entries).await)
            };
            let mut why = None;
            entries = BTreeMap::new();
            for (run, error) in refused {
                match error.code().and_then(Stale::of) {
                    Some(stale) => {
                        why = Some(stale);
                        entries.extend(run);
                    }
                    None => outcome = Err(error),
                }
            }
            let Some(stale) = why else { return outcome };
            self.catch_up(stale, vid, attempt).await?;
            attempt += 1;
        }
    }

    /// Writes entries into the table of `vid`; what failed, and why.
    async fn try_entries(&self, vid: VdiId, entries: BTreeMap<u32, u32>) -> Vec<(Entries, VolumeError)> {
        if let Map::Tree(tree) = &self.map {
            let written = self.write_tree(tree, vid, &entries).await;
            return written.err().map(|error| (entries.into_iter().collect(), error)).into_iter().collect();
        }
        let work = runs(&entries).into_iter().map(|run| async move {
            let written = self.write_run(vid, &run).await;
            written.err().map(|error| (run.entries().collect(), error))
        });
        futures_util::stream::iter(work)
            .buffer_unordered(PARALLEL)
            .filter_map(std::future::ready)
            .collect()
            .await
    }

    async fn write_run(&self, vid: VdiId, run: &Run) -> Result<(), VolumeError> {
        let mut payload = BytesMut::with_capacity(4 * run.vids.len());
        run.vids.iter().for_each(|vid| payload.put_u32_le(*vid));
        let (opcode, oid, offset) = if run.clears() && self.service.discards() {
            (Opcode::DISCARD_OBJ, Oid::data(vid, run.start), 0)
        } else {
            (Opcode::WRITE_OBJ, Oid::inode(vid), table_offset(run.start) as u32)
        };
        let request = Request::new(opcode)
            .flag(Flags::WRITE.with(Flags::DIRECT))
            .length(payload.len())
            .with_obj(ObjRequest { oid, offset, ..ObjRequest::zeroed() });
        self.service
            .call(request, payload.freeze())
            .await
            .and_then(|reply| reply.success())
            .during("table update")?;
        self.map.set_flat(run.entries());
        Ok(())
    }

    /// Changes the index of `vdi`, which nobody replaces meanwhile, and makes it durable.
    async fn write_tree(
        &self,
        tree: &Mutex<IndexTree>,
        vdi: VdiId,
        entries: &BTreeMap<u32, u32>,
    ) -> Result<(), VolumeError> {
        for (idx, vid) in entries {
            loop {
                let set = tree.lock().set(*idx, *vid);
                match set {
                    Ok(()) => break,
                    Err(SetError::Missing(oid)) => self.load_leaf(tree, oid).await?,
                    Err(SetError::Full) => {
                        return Err(VolumeError::Refused { what: "index", code: ResultCode::NO_SPACE });
                    }
                }
            }
        }
        let (writes, counter) = {
            let mut tree = tree.lock();
            (tree.take_writes(), tree.counter())
        };
        for write in writes {
            if let Err(error) = self.write_node(vdi, write, counter).await {
                tree.lock().rewrite_all();
                return Err(error);
            }
        }
        Ok(())
    }

    async fn write_node(&self, vdi: VdiId, write: NodeWrite, counter: u32) -> Result<(), VolumeError> {
        let inode = Oid::inode(vdi);
        match write {
            NodeWrite::Counter(n) => {
                let bytes = Bytes::copy_from_slice(&n.to_le_bytes());
                vdi::write_object(&*self.service, inode, COUNTER_OFFSET, bytes).await
            }
            NodeWrite::Root(root) => {
                // From offset 0: a write inside of the table area would be taken for entries of a flat table.
                let header = InodeHeader { btree_counter: counter, ..**self.header.read() };
                let bytes = [header.to_bytes().as_slice(), &root].concat();
                vdi::write_object(&*self.service, inode, 0, bytes.into()).await
            }
            NodeWrite::Leaf { oid, mut bytes } => {
                bytes.resize(BTREE_NODE_LEN, 0);
                let request = Request::new(Opcode::CREATE_AND_WRITE_OBJ)
                    .flag(Flags::WRITE.with(Flags::DIRECT))
                    .length(bytes.len())
                    .with_obj(ObjRequest { oid, ..ObjRequest::zeroed() });
                self.service.call(request, bytes.into()).await.and_then(|r| r.success()).map(drop)
            }
            NodeWrite::Value { oid, offset, vid } => {
                let bytes = Bytes::copy_from_slice(&vid.to_le_bytes());
                vdi::write_object(&*self.service, oid, offset, bytes).await
            }
        }
        .during("index update")
    }
}

async fn run_updates(inner: Arc<Inner>) {
    loop {
        let batch = {
            let mut updates = inner.updates.lock();
            if updates.queue.is_empty() {
                updates.running = false;
                return;
            }
            std::mem::take(&mut updates.queue)
        };
        let entries = batch.iter().flat_map(|update| update.entries.iter().copied()).collect();
        let outcome = inner.write_entries(entries).await;
        for update in batch {
            let _ = update.done.send(outcome.clone()); // the caller may have gone
        }
    }
}
