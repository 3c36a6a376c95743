//! Table updates: entries of objects that were created or given back, written to the inode in batches.
//!
//! One task writes at a time; what arrives meanwhile forms its next batch. A batch is cut into runs of adjacent
//! indexes, each one WRITE_OBJ: entries that did not change are never rewritten, because the original forgets their
//! reference counts then (spec 05, section 9). Updates are always durable when confirmed. `READONLY` means that the
//! VDI became a snapshot after the data was written: the entries then belong into the new working VDI's table, as they
//! are (spec 01, 12.5).

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

/// Adjacent entries.
struct Run {
    start: u32,
    vids: Vec<u32>,
}

fn runs(entries: &BTreeMap<u32, u32>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (idx, vid) in entries {
        match runs.last_mut() {
            Some(run) if run.start as usize + run.vids.len() == *idx as usize => run.vids.push(*vid),
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

    async fn write_entries(&self, entries: &BTreeMap<u32, u32>) -> Result<(), VolumeError> {
        if let Map::Tree(tree) = &self.map {
            return self.write_tree(tree, entries).await;
        }
        let work = runs(entries).into_iter().map(|run| self.write_run(run));
        let results: Vec<_> = futures_util::stream::iter(work).buffer_unordered(PARALLEL).collect().await;
        results.into_iter().collect()
    }

    async fn write_run(&self, run: Run) -> Result<(), VolumeError> {
        let mut payload = BytesMut::with_capacity(4 * run.vids.len());
        run.vids.iter().for_each(|vid| payload.put_u32_le(*vid));
        let payload = payload.freeze();
        let mut attempt = 0;
        loop {
            let vid = self.vid();
            let body = ObjRequest {
                oid: Oid::inode(vid),
                offset: table_offset(run.start) as u32,
                ..ObjRequest::zeroed()
            };
            let request = Request::new(Opcode::WRITE_OBJ)
                .flag(Flags::WRITE.with(Flags::DIRECT))
                .length(payload.len())
                .with_obj(body);
            let code =
                self.service.call(request, payload.clone()).await.during("table update")?.response.result;
            if code.is_ok() {
                self.map.set_flat((run.start..).zip(run.vids));
                return Ok(());
            }
            let Some(stale) = Stale::of(code) else {
                return Err(VolumeError::Refused { what: "table update", code });
            };
            self.catch_up(stale, vid, attempt).await?;
            attempt += 1;
        }
    }

    async fn write_tree(
        &self,
        tree: &Mutex<IndexTree>,
        entries: &BTreeMap<u32, u32>,
    ) -> Result<(), VolumeError> {
        let mut attempt = 0;
        loop {
            let vid = self.vid();
            let error = match self.try_tree(tree, vid, entries).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            let VolumeError::Refused { code, .. } = error else { return Err(error) };
            let Some(stale) = Stale::of(code) else { return Err(error) };
            // The new working VDI has an index of its own, which is read again; the entries belong into it.
            self.catch_up(stale, vid, attempt).await?;
            attempt += 1;
        }
    }

    async fn try_tree(
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
        let outcome = inner.write_entries(&entries).await;
        for update in batch {
            let _ = update.done.send(outcome.clone()); // the caller may have gone
        }
    }
}
