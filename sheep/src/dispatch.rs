//! The table of operations: one row per opcode; nothing else in the daemon decides by opcode what a request is.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use sheepdog_client::Reply;
use sheepdog_proto::{Opcode, Request};

use crate::cluster::ops::{self as main, Main};
use crate::ops::{cluster, node, objects, order, vdis};
use crate::sheep::Sheep;

/// Executes a request on this node.
pub type Handler = for<'a> fn(&'a Arc<Sheep>, Request, Bytes) -> BoxFuture<'a, Reply>;

/// How an operation is executed (spec 01, 6.2).
#[derive(Clone, Copy)]
pub enum Class {
    /// By this node, for all nodes that store the object.
    Gateway,
    /// On this node's replica.
    Peer,
    /// By this node alone.
    Local(Handler),
    /// Work part here under the cluster-wide block, then the main part everywhere.
    Cluster(Option<Handler>, Option<Main>),
}

/// One row.
pub struct Row {
    /// The opcode.
    pub opcode: Opcode,
    /// How it is executed.
    pub class: Class,
    /// Served while the cluster waits, too.
    pub force: bool,
    /// Request and result are logged at info level.
    pub logged: bool,
}

const fn row(opcode: Opcode, class: Class) -> Row {
    Row { opcode, class, force: false, logged: false }
}

impl Row {
    const fn force(mut self) -> Row {
        self.force = true;
        self
    }

    const fn logged(mut self) -> Row {
        self.logged = true;
        self
    }
}

use Class::{Cluster, Gateway, Local, Peer};

/// Every operation, ascending by opcode.
pub static TABLE: &[Row] = &[
    row(Opcode::CREATE_AND_WRITE_OBJ, Gateway),
    row(Opcode::READ_OBJ, Gateway),
    row(Opcode::WRITE_OBJ, Gateway),
    row(Opcode::REMOVE_OBJ, Gateway),
    row(Opcode::DISCARD_OBJ, Local(objects::discard)),
    row(Opcode::NEW_VDI, Cluster(Some(vdis::new_vdi), Some(main::new_vdi))).logged(),
    row(Opcode::LOCK_VDI, Cluster(Some(vdis::lock_vdi), Some(main::lock_vdi))),
    row(Opcode::RELEASE_VDI, Cluster(Some(vdis::release_vdi), Some(main::release_vdi))),
    row(Opcode::GET_VDI_INFO, Cluster(Some(vdis::get_vdi_info), None)),
    row(Opcode::READ_VDIS, Local(vdis::read_vdis)).force(),
    row(Opcode::FLUSH_VDI, Local(objects::flush_vdi)),
    row(Opcode::DEL_VDI, Cluster(Some(vdis::del_vdi), Some(main::del_vdi))).logged(),
    row(Opcode::GET_CLUSTER_DEFAULT, Local(cluster::get_cluster_default)).force(),
    row(Opcode::GET_NODE_LIST, Local(cluster::get_node_list)).force(),
    row(Opcode::MAKE_FS, Cluster(None, Some(main::make_fs))).force().logged(),
    row(Opcode::SHUTDOWN, Cluster(None, Some(main::shutdown))).force().logged(),
    row(Opcode::STAT_SHEEP, Local(node::stat_sheep)),
    row(Opcode::STAT_CLUSTER, Local(cluster::stat_cluster)).force(),
    row(Opcode::GET_VDI_ATTR, Cluster(Some(vdis::get_vdi_attr), None)),
    row(Opcode::FORCE_RECOVER, Cluster(Some(main::force_recover_work), Some(main::force_recover)))
        .force()
        .logged(),
    row(Opcode::GET_STORE_LIST, Local(cluster::get_store_list)).force(),
    row(Opcode::CLEANUP, Cluster(None, Some(main::cleanup))).force(),
    row(Opcode::TRACE_STATUS, Local(node::trace)).force(),
    row(Opcode::TRACE_READ_BUF, Local(node::trace_read)).force(),
    row(Opcode::STAT_RECOVERY, Local(node::stat_recovery)),
    row(Opcode::FLUSH_DEL_CACHE, Local(node::flush_del_cache)),
    row(Opcode::NOTIFY_VDI_DEL, Cluster(None, Some(main::notify_vdi_del))).force(),
    row(Opcode::KILL_NODE, Local(node::kill_node)).force().logged(),
    row(Opcode::TRACE_ENABLE, Local(node::trace)).force(),
    row(Opcode::TRACE_DISABLE, Local(node::trace)).force(),
    row(Opcode::GET_OBJ_LIST, Local(objects::get_obj_list)),
    row(Opcode::GET_EPOCH, Local(cluster::get_epoch)),
    row(Opcode::CREATE_AND_WRITE_PEER, Peer),
    row(Opcode::READ_PEER, Peer),
    row(Opcode::WRITE_PEER, Peer),
    row(Opcode::REMOVE_PEER, Peer),
    row(Opcode::ORDER_PEER, Local(order::order_peer)),
    row(Opcode::ENABLE_RECOVER, Cluster(None, Some(main::enable_recover))).logged(),
    row(Opcode::DISABLE_RECOVER, Cluster(None, Some(main::disable_recover))).logged(),
    row(Opcode::GET_VDI_COPIES, Local(vdis::get_vdi_copies)).force(),
    row(Opcode::COMPLETE_RECOVERY, Cluster(None, Some(main::complete_recovery))).force(),
    row(Opcode::FLUSH_PEER, Local(objects::flush_peer)),
    row(Opcode::NOTIFY_VDI_ADD, Cluster(None, Some(main::notify_vdi_add))).force(),
    row(Opcode::DELETE_CACHE, Cluster(None, Some(main::delete_cache))),
    row(Opcode::MD_INFO, Local(node::md_info)),
    row(Opcode::MD_PLUG_DISKS, Local(node::md_plug)).logged(),
    row(Opcode::MD_UNPLUG_DISKS, Local(node::md_unplug)).logged(),
    row(Opcode::GET_HASH, Local(objects::get_hash)),
    row(Opcode::REWEIGHT, Cluster(None, Some(main::reweight))).logged(),
    row(Opcode::STAT, Local(node::stat)),
    row(Opcode::GET_LOGLEVEL, Local(node::get_log_level)).force(),
    row(Opcode::SET_LOGLEVEL, Local(node::set_log_level)).force(),
    row(Opcode::NFS_CREATE, Local(node::nfs)),
    row(Opcode::NFS_DELETE, Local(node::nfs)),
    row(Opcode::EXIST, Local(objects::exist)).force(),
    row(Opcode::CLUSTER_INFO, Local(cluster::cluster_info)).force(),
    row(Opcode::ALTER_CLUSTER_COPY, Cluster(None, Some(main::alter_cluster_copy))).logged(),
    row(Opcode::ALTER_VDI_COPY, Cluster(None, Some(main::alter_vdi_copy))).logged(),
    row(Opcode::DECREF_OBJ, Gateway),
    row(Opcode::DECREF_PEER, Peer),
    row(Opcode::REPAIR_REPLICA, Local(objects::repair_replica)),
    row(Opcode::OIDS_EXIST, Local(objects::oids_exist)).force(),
    row(Opcode::VDI_STATE_CHECKPOINT_CTL, Local(vdis::checkpoint)),
    row(Opcode::INODE_COHERENCE, Cluster(None, Some(main::inode_coherence))),
    row(Opcode::READ_DEL_VDIS, Local(vdis::read_del_vdis)).force(),
    row(Opcode::GET_RECOVERY, Local(node::get_recovery)).force(),
    row(Opcode::SET_RECOVERY, Local(node::set_recovery)).force(),
    row(Opcode::SET_VNODES, Local(node::set_vnodes)),
    row(Opcode::GET_VNODES, Local(node::get_vnodes)),
];

/// The row of an opcode; `None` = unknown or obsolete.
pub fn find(opcode: Opcode) -> Option<&'static Row> {
    TABLE.binary_search_by_key(&opcode, |row| row.opcode).ok().map(|at| &TABLE[at])
}

/// The work part of a cluster operation, if it has one.
pub fn work_part(opcode: Opcode) -> Option<Handler> {
    match find(opcode)?.class {
        Class::Cluster(work, _) => work,
        _ => None,
    }
}

/// The main part of a cluster operation, if it has one.
pub fn main_part(opcode: Opcode) -> Option<Main> {
    match find(opcode)?.class {
        Class::Cluster(_, main) => main,
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_opcode_has_exactly_one_row_in_order() {
        let rows: Vec<Opcode> = TABLE.iter().map(|r| r.opcode).collect();
        assert_eq!(rows, Opcode::ALL);
        assert!(find(Opcode(0xf0)).is_none() && find(Opcode(0x91)).is_none());
    }
}
