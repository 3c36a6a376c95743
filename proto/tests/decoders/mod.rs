//! Runs every decoder of the crate on the same bytes; shared by the property test and the fuzz target.

use sheepdog_proto::admin::{MdInfo, RecoveryState, RecoveryThrottling, SdStat, decode_md_info};
use sheepdog_proto::attr::AttrHeader;
use sheepdog_proto::btree::{BtreeHeader, BtreeNode, InnerEntry, LeafEntry};
use sheepdog_proto::cluster::{ClusterInfo, ClusterInfoHeader, EpochRecord};
use sheepdog_proto::config::{EpochLog, StoreConfig};
use sheepdog_proto::header::{
    CheckpointRequest, ClusterDefaultResponse, ClusterRequest, CoherenceRequest, ForwardRequest,
    HashResponse, NodeResponse, ObjRequest, RefRequest, VdiRequest, VdiResponse, VdiStateRequest,
};
use sheepdog_proto::inode::{InodeHeader, grefs, is_table_update, table};
use sheepdog_proto::ledger::Ledger;
use sheepdog_proto::message::ClusterMessage;
use sheepdog_proto::node::{addr_from_bytes, decode_nodes, encode_nodes};
use sheepdog_proto::redundancy::{format_copies, parse_copies};
use sheepdog_proto::{
    ClusterFlags, ClusterStatus, CopyPolicy, Epoch, Flags, NodeId, NodeRecord, Oid, Opcode, Request,
    Response, ResultCode, VdiId, VdiState, Wire,
};

/// Decodes a fixed structure, prints it, encodes it, and checks that a second round changes nothing.
fn fixed<T: Wire + std::fmt::Debug>(bytes: &[u8]) {
    match T::decode(bytes) {
        Ok(value) => {
            assert!(bytes.len() >= T::SIZE);
            let once = value.encode();
            assert_eq!(once.len(), T::SIZE);
            assert_eq!(T::get(&once).encode(), once, "{}", T::NAME);
            let _ = format!("{value:?}");
        }
        Err(error) => {
            assert!(bytes.len() < T::SIZE, "{}: {error}", T::NAME);
            let _ = error.to_string();
        }
    }
}

fn every_fixed_structure(bytes: &[u8]) {
    fixed::<Request>(bytes);
    fixed::<ObjRequest>(bytes);
    fixed::<VdiRequest>(bytes);
    fixed::<ClusterRequest>(bytes);
    fixed::<VdiStateRequest>(bytes);
    fixed::<RefRequest>(bytes);
    fixed::<ForwardRequest>(bytes);
    fixed::<CheckpointRequest>(bytes);
    fixed::<CoherenceRequest>(bytes);
    fixed::<Response>(bytes);
    fixed::<VdiResponse>(bytes);
    fixed::<NodeResponse>(bytes);
    fixed::<HashResponse>(bytes);
    fixed::<ClusterDefaultResponse>(bytes);
    fixed::<NodeId>(bytes);
    fixed::<NodeRecord>(bytes);
    fixed::<ClusterInfoHeader>(bytes);
    fixed::<EpochRecord>(bytes);
    fixed::<VdiState>(bytes);
    fixed::<StoreConfig>(bytes);
    fixed::<InodeHeader>(bytes);
    fixed::<AttrHeader>(bytes);
    fixed::<BtreeHeader>(bytes);
    fixed::<LeafEntry>(bytes);
    fixed::<InnerEntry>(bytes);
    fixed::<MdInfo>(bytes);
    fixed::<SdStat>(bytes);
    fixed::<RecoveryState>(bytes);
    fixed::<RecoveryThrottling>(bytes);
    fixed::<Oid>(bytes);
    fixed::<VdiId>(bytes);
    fixed::<Epoch>(bytes);
    fixed::<Flags>(bytes);
    fixed::<ClusterFlags>(bytes);
    fixed::<Opcode>(bytes);
    fixed::<ResultCode>(bytes);
}

fn variable_structures(bytes: &[u8]) {
    if let Ok(info) = ClusterInfo::decode(bytes) {
        let again = ClusterInfo::decode(&info.encode_prefix()).expect("what was encoded decodes");
        assert_eq!(again, info);
    }
    if let Ok(log) = EpochLog::decode(bytes) {
        let again = EpochLog::decode(&log.encode()).expect("what was encoded decodes");
        assert_eq!(again, log);
    }
    if let Ok(message) = ClusterMessage::decode(bytes) {
        assert_eq!(message.encode(), bytes, "headers have no padding");
    }
    let node = BtreeNode::decode(bytes);
    assert_eq!(BtreeNode::decode(&node.encode()), node);
    let mut ledger = Ledger::decode(bytes);
    assert_eq!(Ledger::decode(&ledger.encode()), ledger);
    if let Some(four) = bytes.first_chunk::<4>() {
        ledger.drop_reference(u32::from_le_bytes(*four), u32::from_le_bytes(*four));
    }
    let nodes = decode_nodes(bytes);
    assert_eq!(decode_nodes(&encode_nodes(&nodes)).len(), nodes.len());
    assert_eq!(table(bytes).len(), bytes.len() / 4);
    assert_eq!(grefs(bytes).len(), bytes.len() / 8);
    let _ = decode_md_info(bytes);
}

fn small_values(bytes: &[u8]) {
    if let Ok(request) = Request::decode(bytes) {
        let obj = request.obj();
        let _ = (obj.oid.kind(), obj.oid.size(obj.copies), obj.oid.vid(), obj.oid.index());
        let _ = is_table_update(obj.oid.0, request.data_length.into());
        let _ = (request.has_payload(), request.reply_capacity(), request.opcode.to_peer());
        let _ = request.forward().node().to_string();
    }
    if let Ok(inode) = InodeHeader::decode(bytes) {
        let _ = (inode.name(), inode.tag(), inode.block_size(), inode.nr_blocks());
    }
    if let Ok(attr) = AttrHeader::of_record(bytes) {
        assert!(attr.same_key(&attr));
        let _ = attr.id();
    }
    if let Ok(node) = NodeRecord::decode(bytes) {
        let _ = (
            node.nid.socket_addr(),
            node.nid.io_socket_addr(),
            node.nid.host_port(),
            node.nid.default_zone(),
        );
        let text = node.nid.to_string();
        assert!(NodeId::parse(&text).is_some(), "{text} is not read back");
    }
    if let Some(addr) = bytes.first_chunk::<16>() {
        let _ = addr_from_bytes(*addr);
    }
    if let Some(byte) = bytes.first() {
        let _ = (ClusterStatus::from_byte(*byte), CopyPolicy::from_byte(*byte));
        let _ = format_copies(*byte, byte.wrapping_mul(3));
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = (parse_copies(text), NodeId::parse(text));
    }
}

/// Every decoder on `bytes`: each gives a value or an error.
pub fn decode_everything(bytes: &[u8]) {
    every_fixed_structure(bytes);
    variable_structures(bytes);
    small_values(bytes);
}
