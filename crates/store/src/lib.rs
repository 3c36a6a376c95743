//! Objects in files: the on-disk store of a sheep (spec 03).
//!
//! [`MetaDir`] is the metadata directory: lock, `config`, epoch logs. [`Store`] keeps replicas and strips as files on one
//! or more disks. The set of objects of a node *is* the set of file names; an in-memory [index](Store::list) mirrors it.
//!
//! Every change of an object passes the scheduler, which keeps overlapping work on one object in submission order, and
//! then one of the disk's own threads: a committer that batches small writes behind one device flush, and a pair of
//! workers for everything large or structural. What may rely on that shared flush is decided by a bitmap of durably
//! mapped blocks per open file; everything else takes `fdatasync` of its file. Nothing is acknowledged before it is
//! durable, unless the store runs in [`SyncMode::NoSync`].

mod blockmap;
mod commit;
mod create;
mod disk;
mod diskset;
mod error;
mod failure;
mod fdcache;
mod hash;
mod index;
mod layout;
mod meta;
#[cfg(test)]
mod model_tests;
mod name;
mod object;
mod open;
mod plug;
mod probe;
mod queue;
mod read;
mod relayout;
mod relocate;
mod removed;
mod ring;
mod scan;
mod sched;
mod space;
mod stale;
mod store;
mod sys;
mod trim;
mod upgrade;
mod worker;

pub use create::GENTLE_PIECE;
pub use error::StoreError;
pub use failure::DiskFailure;
pub use hash::DigestOf;
pub use layout::Layout;
pub use meta::{MetaDir, MetaError, replace_file};
pub use name::{Replica, StaleName};
pub use plug::{PlugError, Released, Unplugged};
pub use relocate::{SettleReport, Stuck};
pub use ring::DiskRing;
pub use scan::ScanReport;
pub use space::Space;
pub use store::{Store, StoreOptions, SyncMode, WriteHook};
pub use trim::trim_zeros;

/// Result of a store operation.
pub type Result<T> = std::result::Result<T, StoreError>;
