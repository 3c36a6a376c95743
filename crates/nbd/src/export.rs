//! What is exported: every VDI by its name, snapshots as `NAME@TAG`, `NAME:TAG` and `NAME:ID` (spec 08, 7.3.4).
//!
//! All connections to one export share one [`Volume`], so that writes of one are seen by all and flushes cover all:
//! the condition for CAN_MULTI_CONN. The first connection opens it and takes the VDI's lock, the last one closes it.

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use sheepdog_client::{ClientError, OpenOptions, Service, SnapshotRef, Volume, VolumeError, vdi};
use sheepdog_proto::inode::{InodeHeader, STORE_POLICY_BTREE};
use thiserror::Error;
use tokio::sync::{Mutex, Notify};

/// Most exports that one listing names.
const MAX_LISTED: usize = 10_000;

/// Why there is no such export.
#[derive(Debug, Clone, Error)]
pub enum ExportError {
    /// No VDI or snapshot of that name is exported.
    #[error("no export named '{0}'")]
    Unknown(String),
    /// Somebody else has it.
    #[error("VDI {0} is locked by another client")]
    Locked(String),
    /// The cluster cannot say.
    #[error("{0}")]
    Failed(String),
}

impl From<ClientError> for ExportError {
    fn from(error: ClientError) -> ExportError {
        ExportError::Failed(error.to_string())
    }
}

/// One line of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// To ask for.
    pub name: String,
    /// For people.
    pub description: String,
}

/// An export in use; dropping it gives it back.
pub struct Export {
    /// The volume, shared by all connections.
    pub volume: Arc<Volume>,
    /// The name asked for, or what it stands for when that was empty.
    pub name: String,
    /// For people.
    pub description: String,
    /// Dropped with the export: what the source uses to count users.
    pub hold: Box<dyn Send + Sync>,
}

/// Something that has exports.
pub trait ExportSource: Send + Sync + 'static {
    /// All exports, bounded.
    fn list(&self) -> BoxFuture<'_, Result<Vec<Listed>, ExportError>>;

    /// Opens an export; the empty name is the default one.
    fn open<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Export, ExportError>>;

    /// Waits until every export that was dropped is given back: what a server does before it ends.
    fn settled(&self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }
}

/// What to export, and how.
#[derive(Debug, Clone, Default)]
pub struct VdiExportsOptions {
    /// What the empty name stands for; without one, the only VDI there is.
    pub default_export: Option<String>,
    /// Export nothing writable. A client then sees a VDI that somebody else writes as it was when the first client of
    /// the export, or the last one since, connected.
    pub read_only: bool,
    /// Export only these VDIs and their snapshots; empty = all.
    pub only: Vec<String>,
}

/// The VDIs of a cluster as exports. Clones share their volumes.
#[derive(Clone)]
pub struct VdiExports {
    shared: Arc<Shared>,
}

struct Shared {
    service: Arc<dyn Service>,
    options: VdiExportsOptions,
    /// Held while opening and closing: an export that is being closed is reopened after its lock is released.
    open: Mutex<HashMap<String, Open>>,
    /// An export was closed.
    closed: Notify,
}

struct Open {
    volume: Arc<Volume>,
    users: usize,
}

/// Counts one user of an export.
struct Hold {
    shared: Arc<Shared>,
    name: String,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let (shared, name) = (self.shared.clone(), std::mem::take(&mut self.name));
        // Without a runtime the process is ending; the volume's own drop is all that can be done.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { shared.give_back(&name).await });
        }
    }
}

/// The ways to read an export name: the VDI itself first, since names may contain separators.
fn readings(name: &str) -> Vec<(&str, Option<SnapshotRef>)> {
    let mut out = vec![(name, None)];
    if let Some((vdi, tag)) = name.rsplit_once('@')
        && !tag.is_empty()
    {
        out.push((vdi, Some(SnapshotRef::Tag(tag.to_owned()))));
    }
    if let Some((vdi, text)) = name.rsplit_once(':')
        && !text.is_empty()
    {
        // As QEMU does: all digits are an id.
        let snapshot = match text.parse() {
            Ok(id) if text.bytes().all(|b| b.is_ascii_digit()) => SnapshotRef::Id(id),
            _ => SnapshotRef::Tag(text.to_owned()),
        };
        out.push((vdi, Some(snapshot)));
    }
    out.retain(|(vdi, _)| !vdi.is_empty());
    out
}

fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok().filter(|text| !text.is_empty())
}

fn describe(header: &InodeHeader) -> String {
    let size = header.vdi_size;
    match (header.is_snapshot(), text(header.tag())) {
        (false, _) => format!("VDI of {size} bytes"),
        (true, Some(tag)) => format!("snapshot {} ({tag}) of {size} bytes", header.snap_id),
        (true, None) => format!("snapshot {} of {size} bytes", header.snap_id),
    }
}

impl VdiExports {
    /// Exports what `service` has.
    pub fn new(service: Arc<dyn Service>, options: VdiExportsOptions) -> VdiExports {
        VdiExports {
            shared: Arc::new(Shared { service, options, open: Mutex::default(), closed: Notify::new() }),
        }
    }

    /// Number of exports in use.
    pub async fn in_use(&self) -> usize {
        self.shared.open.lock().await.len()
    }
}

impl Shared {
    fn exported(&self, vdi: &str) -> bool {
        self.options.only.is_empty() || self.options.only.iter().any(|only| only == vdi)
    }

    async fn headers(&self) -> Result<Vec<InodeHeader>, ExportError> {
        let all = vdi::list(&*self.service).await?;
        let readable = all.into_iter().filter_map(|(_, header)| header.ok());
        Ok(readable.filter(|header| text(header.name()).is_some_and(|name| self.exported(name))).collect())
    }

    async fn list(&self) -> Result<Vec<Listed>, ExportError> {
        let headers = self.headers().await?;
        // Hypervolumes are mostly containers of the object store; they can be opened but are not offered.
        let offered = headers.iter().filter(|header| header.store_policy != STORE_POLICY_BTREE);
        let lines = offered.filter_map(|header| {
            let name = text(header.name())?;
            let name = match (header.is_snapshot(), text(header.tag())) {
                (false, _) => name.to_owned(),
                (true, Some(tag)) => format!("{name}@{tag}"),
                (true, None) => format!("{name}:{}", header.snap_id),
            };
            Some(Listed { name, description: describe(header) })
        });
        Ok(lines.take(MAX_LISTED).collect())
    }

    async fn default_name(&self) -> Result<String, ExportError> {
        if let Some(name) = &self.options.default_export {
            return Ok(name.clone());
        }
        let headers = self.headers().await?;
        let mut working = headers.iter().filter(|header| !header.is_snapshot());
        match (working.next().and_then(|header| text(header.name())), working.next()) {
            (Some(name), None) => Ok(name.to_owned()),
            _ => Err(ExportError::Unknown(String::new())),
        }
    }

    async fn open_volume(&self, name: &str) -> Result<Volume, ExportError> {
        let options = OpenOptions { read_only: self.options.read_only, ..OpenOptions::default() };
        for (vdi, snapshot) in readings(name) {
            if !self.exported(vdi) {
                continue;
            }
            match Volume::open(self.service.clone(), vdi, snapshot, options).await {
                Ok(volume) => return Ok(volume),
                Err(VolumeError::NotFound(_)) => {}
                Err(VolumeError::Locked(name)) => return Err(ExportError::Locked(name)),
                // A name that no VDI can have.
                Err(error) if error.code() == Some(sheepdog_proto::ResultCode::INVALID_PARMS) => {}
                Err(error) => return Err(ExportError::Failed(error.to_string())),
            }
        }
        Err(ExportError::Unknown(name.to_owned()))
    }

    async fn open(self: &Arc<Self>, name: &str) -> Result<Export, ExportError> {
        let name = if name.is_empty() { self.default_name().await? } else { name.to_owned() };
        let mut open = self.open.lock().await;
        let volume = match open.get_mut(&name) {
            Some(entry) => {
                // It may have grown; a new connection sees that.
                entry.volume.reload().await.map_err(|error| ExportError::Failed(error.to_string()))?;
                entry.users += 1;
                entry.volume.clone()
            }
            None => {
                let volume = Arc::new(self.open_volume(&name).await?);
                open.insert(name.clone(), Open { volume: volume.clone(), users: 1 });
                volume
            }
        };
        drop(open);
        let description = describe(&volume.header());
        let hold = Box::new(Hold { shared: self.clone(), name: name.clone() });
        Ok(Export { volume, name, description, hold })
    }

    async fn give_back(&self, name: &str) {
        let mut open = self.open.lock().await;
        let Some(entry) = open.get_mut(name) else { return };
        entry.users -= 1;
        if entry.users > 0 {
            return;
        }
        if let Some(entry) = open.remove(name)
            && let Err(error) = entry.volume.close().await
        {
            tracing::warn!(export = name, %error, "the export was not closed cleanly");
        }
        drop(open);
        self.closed.notify_waiters();
    }
}

impl ExportSource for VdiExports {
    fn list(&self) -> BoxFuture<'_, Result<Vec<Listed>, ExportError>> {
        Box::pin(self.shared.list())
    }

    fn open<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Export, ExportError>> {
        // In a task of its own: a lock taken for a client that gave up meanwhile must be given back.
        let (shared, name) = (self.shared.clone(), name.to_owned());
        Box::pin(async move {
            let opening = tokio::spawn(async move { shared.open(&name).await });
            opening.await.unwrap_or_else(|error| Err(ExportError::Failed(error.to_string())))
        })
    }

    fn settled(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            loop {
                let closed = self.shared.closed.notified();
                tokio::pin!(closed);
                closed.as_mut().enable();
                if self.shared.open.lock().await.is_empty() {
                    return;
                }
                closed.await;
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn export_names_are_read_as_vdi_then_as_snapshot() {
        let tag = |t: &str| Some(SnapshotRef::Tag(t.into()));
        assert_eq!(readings("a"), [("a", None)]);
        assert_eq!(readings("a@t"), [("a@t", None), ("a", tag("t"))]);
        assert_eq!(readings("a:7"), [("a:7", None), ("a", Some(SnapshotRef::Id(7)))]);
        assert_eq!(readings("a:t"), [("a:t", None), ("a", tag("t"))]);
        assert_eq!(readings("a:@"), [("a:@", None), ("a", tag("@"))]);
        assert_eq!(readings("@"), [("@", None)]);
        assert_eq!(readings(":1"), [(":1", None)]);
    }
}
