//! What a starting daemon finds on its disks (spec 03, section 2; spec 04, 5.1 and 17.1).

use std::path::PathBuf;
use std::sync::Arc;

use sheepdog_proto::config::StoreConfig;
use sheepdog_proto::{ClusterFlags, Epoch, NodeId, NodeRecord, cstr};
use sheepdog_store::{DiskFailure, Layout, MetaDir, MetaError, ScanReport, Store, StoreOptions, SyncMode};
use thiserror::Error;

use crate::cluster::state::{Startup, State};
use crate::shell::localtime::LocalTime;
use crate::shell::options::Options;

/// Why a daemon does not start. Each displays as the line to log; nothing was changed.
#[derive(Debug, Error)]
pub enum StartError {
    /// The metadata directory.
    #[error("{0}")]
    Meta(#[from] MetaError),
    /// A disk.
    #[error("{0}")]
    Store(#[from] sheepdog_store::StoreError),
    /// A disk that is somebody's metadata directory.
    #[error("{} is meta-store, abort", .0.display())]
    IsMetaDir(PathBuf),
    /// `-V` given or not given, unlike before.
    #[error("Designation of before a restart and a vnodes option is different.")]
    VnodesStrategy,
    /// Another `-V` than in the last epoch.
    #[error("mismatch specified vnodes is compared with the previous. previous vnodes:{0}")]
    Vnodes(u16),
    /// No such store driver.
    #[error("backend store '{0}' is not supported")]
    Driver(String),
    /// The log of the last epoch is unusable.
    #[error("invalid epoch {0} log")]
    Epoch(Epoch),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

/// The opened store of a storage node.
pub struct OpenStore {
    /// Objects.
    pub store: Store,
    /// What the scan found.
    pub report: ScanReport,
    /// A disk is used for the first time, or one with objects of this node is missing.
    pub incomplete: bool,
}

/// Suffix of backups: local time as `YYYY-MM-DD_HHMMSS`.
fn backup_stamp() -> String {
    let t = LocalTime::at(std::time::SystemTime::now());
    format!("{:04}-{:02}-{:02}_{:02}{:02}{:02}", t.year, t.month, t.day, t.hour, t.minute, t.second)
}

/// Reads and checks the configuration; an older or newer store is refused before anything is touched.
pub fn configuration(meta: &MetaDir, options: &Options) -> Result<StoreConfig, StartError> {
    let auto = options.vnodes.is_none();
    if meta.is_formatting() {
        // Whatever the configuration says: the caller empties the store.
        meta.remove_epochs(meta.latest_epoch()?)?;
        return Ok(StoreConfig { version: sheepdog_proto::config::STORE_VERSION, ..StoreConfig::default() });
    }
    if options.upgrade && meta.upgrade(&backup_stamp(), auto)? {
        tracing::info!("the store of release 0.9 is now one of this release; backups are beside its files");
    }
    let mut config = meta.read_config().map_err(|error| match error {
        MetaError::Version(_) if !options.upgrade => {
            StartError::Other(format!("{error}\nuse '-u' option to upgrade sheep store"))
        }
        error => error.into(),
    })?;
    if config.ctime > 0 && !options.gateway && config.flags.contains(ClusterFlags::AUTO_VNODES) != auto {
        return Err(StartError::VnodesStrategy);
    }
    config.version = sheepdog_proto::config::STORE_VERSION;
    Ok(config)
}

/// The store driver of this node: the one that `dog node format` chose, else the cluster's (spec 03, 5). `None`: there is
/// none yet.
pub fn driver(meta: &MetaDir, cluster: &[u8]) -> Result<Option<Layout>, StartError> {
    let (own, _) = meta.node_config()?;
    let name = own.unwrap_or_else(|| String::from_utf8_lossy(cstr(cluster)).into_owned());
    if name.is_empty() {
        return Ok(None);
    }
    Layout::by_name(&name).map(Some).ok_or(StartError::Driver(name))
}

/// Who is told of disks that fail later.
pub struct DiskEvents {
    /// Before its objects count as gone.
    pub before_loss: Arc<dyn Fn() + Send + Sync>,
    /// Afterwards.
    pub failed: Arc<dyn Fn(DiskFailure) + Send + Sync>,
}

/// Opens the disks and reads what is on them.
pub fn open_store(
    meta: &MetaDir,
    options: &Options,
    config: &StoreConfig,
    events: DiskEvents,
) -> Result<OpenStore, StartError> {
    let disks = if options.disks.is_empty() { vec![meta.default_disk()] } else { options.disks.clone() };
    if let Some(foreign) = options.disks.iter().find(|d| MetaDir::is_meta_dir(d)) {
        return Err(StartError::IsMetaDir(foreign.clone()));
    }
    if let (_, Some(warning)) = meta.node_config()? {
        tracing::warn!("{warning}");
    }
    let store_options = StoreOptions {
        sync: if options.nosync { SyncMode::NoSync } else { SyncMode::Durable },
        direct_io: options.direct_io,
        before_disk_loss: Some(events.before_loss),
        on_disk_failure: Some(events.failed),
        layout: driver(meta, &config.default_store)?.unwrap_or_default(),
        removed_disks: Some(meta.path().join("removed_disks")),
        protected: vec![meta.path().to_owned(), meta.path().join("epoch")],
        epoch: meta.latest_epoch()?,
        ..StoreOptions::default()
    };
    let new = disks.iter().any(|d| !matches!(xattr::get(d, "user.md.size"), Ok(Some(_))));
    let (store, lines) = Store::open(&disks, store_options)?;
    lines.iter().for_each(|line| tracing::info!("{line}"));
    let report = store.scan();
    for path in &report.foreign {
        tracing::warn!("{} is not an object, left alone", path.display());
    }
    for (path, reason) in &report.unreadable {
        tracing::error!("{}: {reason}", path.display());
    }
    if report.adopted > 0 {
        tracing::info!("{} objects moved into the directories of the tree", report.adopted);
    }
    let incomplete = new || store.lacks_disk();
    Ok(OpenStore { store, report, incomplete })
}

/// This node's record.
pub fn record(options: &Options, me: NodeId, space: u64) -> NodeRecord {
    NodeRecord {
        nid: me,
        nr_vnodes: options.weight(),
        zone: options.zone.unwrap_or_else(|| me.default_zone()),
        space: if options.gateway { 0 } else { space },
    }
}

/// The state in which this node asks to join.
pub fn state(
    meta: &MetaDir,
    options: &Options,
    me: NodeRecord,
    config: StoreConfig,
) -> Result<State, StartError> {
    let epoch = meta.latest_epoch()?;
    let nodes = match epoch {
        Epoch(0) => Vec::new(),
        _ => meta.read_epoch(epoch).map_err(|_| StartError::Epoch(epoch))?.nodes,
    };
    let fixed = config.ctime > 0 && !config.flags.contains(ClusterFlags::AUTO_VNODES);
    if fixed && epoch != Epoch(0) && !options.gateway {
        let previous = nodes.iter().find(|n| n.nid == me.nid).map_or(0, |n| n.nr_vnodes);
        if previous != me.nr_vnodes {
            return Err(StartError::Vnodes(previous));
        }
    }
    let startup = Startup {
        gateway: options.gateway,
        auto_vnodes: options.vnodes.is_none(),
        wildcard: options.wildcard_recovery,
    };
    Ok(State::new(me, startup, config, epoch, nodes))
}
