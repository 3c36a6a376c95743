//! `wire.json`: every captured header through the view its opcode has, every structure inside a payload, decoded and
//! encoded again to the same bytes.

mod common;

use common::{list, load, number, payload, text, unhex};
use serde_json::Value;
use sheepdog_proto::admin::{
    MdInfo, RecoveryState, RecoveryThrottling, SdStat, decode_md_info, encode_md_info,
};
use sheepdog_proto::attr::{ATTR_LEN, AttrHeader};
use sheepdog_proto::cluster::{CLUSTER_INFO_LEN, ClusterInfo, EpochRecord};
use sheepdog_proto::config::EpochLog;
use sheepdog_proto::inode::{GREF_OFFSET, Gref, INODE_HEADER_LEN, InodeHeader, grefs, table};
use sheepdog_proto::node::{decode_nodes, encode_nodes};
use sheepdog_proto::{
    ClusterStatus, NodeRecord, ObjectKind, Oid, Opcode, Request, Response, ResultCode, VdiState, Wire,
};

fn header(side: &Value) -> [u8; 48] {
    unhex(text(side, "header")).try_into().expect("48 bytes")
}

/// Decodes the union through the opcode's view and encodes it again.
fn request_through_view(request: Request) -> Request {
    match request.opcode {
        Opcode::CREATE_AND_WRITE_OBJ
        | Opcode::READ_OBJ
        | Opcode::WRITE_OBJ
        | Opcode::REMOVE_OBJ
        | Opcode::DISCARD_OBJ
        | Opcode::FLUSH_VDI
        | Opcode::READ_PEER
        | Opcode::WRITE_PEER
        | Opcode::GET_EPOCH
        | Opcode::GET_HASH
        | Opcode::EXIST => request.with_obj(request.obj()),
        Opcode::NEW_VDI
        | Opcode::LOCK_VDI
        | Opcode::RELEASE_VDI
        | Opcode::GET_VDI_INFO
        | Opcode::DEL_VDI
        | Opcode::GET_VDI_ATTR => request.with_vdi(request.vdi()),
        Opcode::MAKE_FS | Opcode::STAT_CLUSTER | Opcode::ALTER_CLUSTER_COPY => {
            request.with_cluster(request.cluster())
        }
        Opcode::DECREF_OBJ => request.with_reference(request.reference()),
        Opcode::VDI_STATE_CHECKPOINT_CTL => request.with_checkpoint(request.checkpoint()),
        _ => {
            assert_eq!(request.body, [0; 32], "{}: a union without a view", request.opcode);
            request
        }
    }
}

fn response_through_view(response: Response) -> Response {
    match response.opcode {
        Opcode::NEW_VDI
        | Opcode::LOCK_VDI
        | Opcode::RELEASE_VDI
        | Opcode::GET_VDI_INFO
        | Opcode::DEL_VDI
        | Opcode::GET_VDI_ATTR => response.with_vdi(response.vdi()),
        Opcode::STAT_SHEEP | Opcode::GET_NODE_LIST => response.with_node(response.node()),
        Opcode::GET_HASH => response.with_hash(response.hash()),
        Opcode::GET_CLUSTER_DEFAULT => response.with_cluster_default(response.cluster_default()),
        _ => {
            assert_eq!(response.body, [0; 28], "{}: a union without a view", response.opcode);
            response
        }
    }
}

#[test]
fn every_header_survives_its_view() {
    let vectors = load("wire.json");
    let exchanges = list(&vectors["exchanges"]);
    assert_eq!(exchanges.len(), 108);
    for e in exchanges {
        let name = text(e, "name");
        let raw = header(&e["request"]);
        let request = Request::from_bytes(&raw);
        assert_eq!(request_through_view(request).to_bytes(), raw, "request of {name}");
        assert_eq!(request.has_payload(), !payload(&e["request"]["payload"]).is_empty(), "{name}");
        if let Some(opcode) = text(e, "opcode").strip_prefix("SD_OP_").filter(|o| !o.starts_with("0x")) {
            assert_eq!(request.opcode.name(), Some(opcode), "{name}");
        } else {
            assert_eq!(request.opcode.name(), None, "{name}");
        }

        let raw = header(&e["response"]);
        let response = Response::from_bytes(&raw);
        assert_eq!(response_through_view(response).to_bytes(), raw, "response of {name}");
        assert_eq!(u64::from(response.result.0), number(e, "result"), "{name}");
        assert_eq!(response.data_length as usize, payload(&e["response"]["payload"]).len(), "{name}");
        assert_eq!((response.opcode, response.id), (request.opcode, request.id), "{name}");
        assert!(response.data_length as usize <= request.reply_capacity(), "{name}");
    }
}

/// Zeroes the sender's memory addresses at the head of each node record, which the original leaks.
fn without_pointers(mut bytes: Vec<u8>, first: usize, count: usize) -> Vec<u8> {
    for node in bytes[first..].chunks_exact_mut(NodeRecord::LEN).take(count) {
        node[..24].fill(0);
    }
    bytes
}

fn round_trip<T: Wire>(bytes: &[u8]) -> T {
    let value = T::decode(bytes).expect("a captured structure decodes");
    assert_eq!(value.encode(), bytes[..T::SIZE], "{}", T::NAME);
    value
}

fn epoch_records(request: &Request, bytes: &[u8]) {
    let slots = request.cluster().nodes_nr as usize;
    let stride = EpochRecord::LEN + slots * NodeRecord::LEN;
    assert!(bytes.len().is_multiple_of(stride), "whole records");
    for record in bytes.chunks_exact(stride) {
        let head: EpochRecord = round_trip(record);
        let nodes = without_pointers(record[EpochRecord::LEN..].to_vec(), 0, slots);
        assert_eq!(encode_nodes(&decode_nodes(&nodes)), nodes);
        if slots > 0 {
            let members = decode_nodes(&nodes);
            assert_eq!(members.iter().filter(|n| n.nid.port != 0).count(), head.nr_nodes as usize);
        }
    }
}

fn inode_bytes(offset: u32, bytes: &[u8]) {
    if offset == 0 && bytes.len() >= INODE_HEADER_LEN {
        let head: InodeHeader = round_trip(bytes);
        assert_eq!(Oid::inode(head.vdi_id).vid(), head.vdi_id);
        assert_eq!(table(&bytes[INODE_HEADER_LEN..]).len(), (bytes.len() - INODE_HEADER_LEN) / 4);
    } else if offset as usize == GREF_OFFSET {
        let refs: &[Gref] = grefs(bytes);
        let again: Vec<u8> = refs
            .iter()
            .flat_map(|g| [g.generation.get().to_le_bytes(), g.count.get().to_le_bytes()].concat())
            .collect();
        assert_eq!(again, bytes);
    }
}

/// Decodes and encodes the structure in an answer. `true` if the opcode's answer is structured.
fn answer(request: &Request, bytes: &[u8]) -> bool {
    match request.opcode {
        Opcode::GET_NODE_LIST => {
            let bytes = without_pointers(bytes.to_vec(), 0, usize::MAX);
            let nodes = decode_nodes(&bytes);
            assert_eq!(encode_nodes(&nodes), bytes);
            let ports: Vec<u16> = nodes.iter().map(|n| n.nid.port).collect();
            assert_eq!(ports, [7120, 7121, 7122]);
            assert_eq!(nodes.iter().map(|n| n.zone).collect::<Vec<_>>(), [0, 1, 2]);
        }
        Opcode::STAT_CLUSTER => epoch_records(request, bytes),
        Opcode::GET_VDI_COPIES => {
            for record in bytes.chunks_exact(VdiState::LEN) {
                round_trip::<VdiState>(record);
            }
            assert!(bytes.len().is_multiple_of(VdiState::LEN));
        }
        Opcode::GET_EPOCH => {
            let count = (bytes.len() - 8) / NodeRecord::LEN;
            let bytes = without_pointers(bytes.to_vec(), 0, count);
            let log = EpochLog::decode(&bytes).expect("epoch log");
            assert_eq!(log.nodes.len(), 3);
            assert_eq!(log.encode(), bytes);
        }
        Opcode::STAT_RECOVERY => drop(round_trip::<RecoveryState>(bytes)),
        Opcode::GET_RECOVERY => drop(round_trip::<RecoveryThrottling>(bytes)),
        Opcode::STAT => assert!(round_trip::<SdStat>(bytes).gway_total_nr > 0),
        Opcode::MD_INFO => {
            let disks: Vec<MdInfo> = decode_md_info(bytes).expect("disks");
            assert_eq!(disks.len(), 1);
            assert_eq!(encode_md_info(&disks), bytes);
        }
        Opcode::CLUSTER_INFO => {
            let bytes = without_pointers(bytes.to_vec(), 48, 3);
            let info = ClusterInfo::decode(&bytes).expect("cluster info");
            assert_eq!(info.nodes.len(), 3);
            assert_eq!(ClusterStatus::from_byte(info.header.status), Ok(ClusterStatus::Ok));
            assert_eq!(info.encode_padded(CLUSTER_INFO_LEN), bytes);
        }
        Opcode::GET_OBJ_LIST | Opcode::OIDS_EXIST => {
            for oid in bytes.chunks_exact(8) {
                round_trip::<Oid>(oid);
            }
        }
        Opcode::READ_OBJ => match request.obj().oid.kind() {
            ObjectKind::Inode => inode_bytes(request.obj().offset, bytes),
            ObjectKind::Attr => {
                assert_eq!(bytes.len(), ATTR_LEN);
                let head: AttrHeader = round_trip(bytes);
                assert_eq!(head.id(), request.obj().oid.index(), "where it is is what it is");
            }
            _ => return false,
        },
        _ => return false,
    }
    true
}

#[test]
fn structures_in_answers_are_decoded_and_encoded_to_the_same_bytes() {
    let vectors = load("wire.json");
    let mut structured = Vec::new();
    for e in list(&vectors["exchanges"]) {
        let request = Request::from_bytes(&header(&e["request"]));
        let bytes = payload(&e["response"]["payload"]);
        if !bytes.is_empty() && number(e, "result") == 0 && answer(&request, &bytes) {
            structured.push(request.opcode);
        }
    }
    structured.sort();
    structured.dedup();
    assert!(structured.len() >= 11, "only {structured:?}");
}

#[test]
fn structures_in_requests_are_decoded_and_encoded_to_the_same_bytes() {
    let vectors = load("wire.json");
    let mut attributes = 0;
    for e in list(&vectors["exchanges"]) {
        let request = Request::from_bytes(&header(&e["request"]));
        let bytes = payload(&e["request"]["payload"]);
        match request.opcode {
            Opcode::GET_VDI_ATTR => {
                let head: AttrHeader = round_trip(&bytes);
                // The answer names the id that the record hashes to.
                let response = Response::from_bytes(&header(&e["response"]));
                assert_eq!(head.id(), response.vdi().attr_id, "{}", text(e, "name"));
                attributes += 1;
            }
            Opcode::SET_RECOVERY => drop(round_trip::<RecoveryThrottling>(&bytes)),
            Opcode::SET_LOGLEVEL | Opcode::SET_VNODES => drop(round_trip::<i32>(&bytes)),
            _ => {}
        }
    }
    assert!(attributes >= 5);
}

#[test]
fn results_have_the_texts_and_numbers_of_the_captures() {
    let vectors = load("wire.json");
    for e in list(&vectors["exchanges"]) {
        let result = ResultCode(number(e, "result") as u32);
        assert!(result.message().is_some(), "{} answers {result:?}", text(e, "name"));
    }
    assert_eq!(ResultCode(0x77).to_string(), "Invalid error code 77");
}

#[test]
fn the_worked_lookup_of_the_vdi_chapter_decodes() {
    let misc = load("vdi-misc.json");
    let example = &misc["get_vdi_info_example"];
    let request: [u8; 48] = unhex(text(example, "request_header")).try_into().expect("48 bytes");
    let request = Request::from_bytes(&request);
    assert_eq!((request.opcode, request.data_length), (Opcode::GET_VDI_INFO, 512));
    let response: [u8; 48] = unhex(text(example, "response_header")).try_into().expect("48 bytes");
    let response = Response::from_bytes(&response);
    assert_eq!(response.vdi().vdi_id.get(), 0x7c2b25);
    assert_eq!((response.vdi().copies, response.vdi().block_size_shift), (3, 22));
    assert_eq!(response.with_vdi(response.vdi()), response);
}
