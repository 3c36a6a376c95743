//! Captured exchanges of the original, sent to our daemons: every byte of every answer that is not declared variable.

use std::time::Duration;

use serde_json::Value;
use sheepdog_proto::cluster::ClusterInfoHeader;
use sheepdog_proto::{ClusterFlags, NodeRecord, Oid, Opcode, Request, Response, ResultCode, VdiId};
use sheepdog_testkit::vectors::{load, payload, unhex};
use sheepdog_testkit::{Builder, Client, Cluster, in_own_network};

/// Entries of `wire.json` for which an error without payload passes, each with its reason.
const BARE_ERRORS: [(&str, &str); 1] = [(
    "erasure_read_missing",
    "the payload beside an error is memory of the original (spec/README, vectors that record a defect)",
)];

/// Entries that must go to a daemon which holds the object they ask about, on an own connection.
const AT_A_HOME: [&str; 6] = [
    "get_hash_ok",
    "read_peer",
    "write_peer",
    "write_peer_old_epoch",
    "get_obj_list",
    "get_obj_list_buffer_small",
];

/// Ranges that may differ, in the header and in the payload.
#[derive(Default)]
struct Mask {
    header: Vec<(usize, usize)>,
    payload: Vec<(usize, usize)>,
}

/// `a..b` of `something[a..b) text`.
fn range(text: &str) -> (usize, usize) {
    let inner = text.split('[').nth(1).and_then(|t| t.split(')').next()).expect("[a..b)");
    let (a, b) = inner.split_once("..").expect("a..b");
    (a.parse().expect("number"), b.parse().expect("number"))
}

fn mask_node(mask: &mut Mask, first: usize, from: usize, to: usize) {
    for i in 0..64 {
        let node = first + i * NodeRecord::LEN;
        mask.payload.push((node + from, node + to));
    }
}

fn mask(entry: &Value, opcode: Opcode) -> Mask {
    let mut mask = Mask::default();
    let first_node = match opcode {
        Opcode::CLUSTER_INFO => ClusterInfoHeader::LEN,
        Opcode::STAT_CLUSTER => 48,
        _ => 0,
    };
    for text in entry["variable"].as_array().map_or(&[][..], Vec::as_slice) {
        let text = text.as_str().expect("variable is text");
        match text {
            "result" => mask.header.push((16, 20)),
            "response.payload" | "response.payload free/used/path" => mask.payload.push((0, usize::MAX)),
            "last 8 bytes: time" => mask.payload.push((240, 248)),
            "response.payload node[i][0..24)" | "nodes[i][0..24)" => mask_node(&mut mask, first_node, 0, 24),
            "node[i].space" | "nodes[i].space" => mask_node(&mut mask, first_node, 72, 80),
            t if t.starts_with("response.header[") => mask.header.push(range(t)),
            t if t.starts_with("response.payload[") => mask.payload.push(range(t)),
            t => panic!("{}: unknown kind of variable: {t}", entry["name"]),
        }
    }
    // The space of a node is that of its file system, wherever node records appear.
    if matches!(opcode, Opcode::STAT_CLUSTER | Opcode::GET_EPOCH) {
        mask_node(&mut mask, first_node, 72, 80);
    }
    // Which objects a node has seen depends on placement, which depends on the space of the nodes.
    if opcode == Opcode::GET_OBJ_LIST && entry["result"] == "0x00" {
        mask.header.push((12, 16));
        mask.payload.push((0, usize::MAX));
    }
    mask
}

fn first_difference(expected: &[u8], got: &[u8], variable: &[(usize, usize)]) -> Option<String> {
    let hidden = |i: usize| variable.iter().any(|(a, b)| (*a..*b).contains(&i));
    let whole_is_variable = variable.contains(&(0, usize::MAX));
    if expected.len() != got.len() && !whole_is_variable {
        return Some(format!("{} bytes expected, {} received", expected.len(), got.len()));
    }
    let at = (0..expected.len().min(got.len())).find(|i| expected[*i] != got[*i] && !hidden(*i))?;
    let end = (at + 16).min(expected.len());
    Some(format!("at {at}: expected {:02x?}, received {:02x?}", &expected[at..end], &got[at..end]))
}

fn compare(entry: &Value, request: &Request, response: &Response, data: &[u8]) -> Option<String> {
    let name = entry["name"].as_str().expect("name");
    let expected = unhex(entry["response"]["header"].as_str().expect("header"));
    let mask = mask(entry, request.opcode);
    let header = first_difference(&expected, &response.to_bytes(), &mask.header);
    let body = first_difference(&payload(&entry["response"]["payload"]), data, &mask.payload);
    let difference = match (header, body) {
        (None, None) => return None,
        (h, b) => {
            format!("{name}: header {}, payload {}", h.unwrap_or("equal".into()), b.unwrap_or("equal".into()))
        }
    };
    let bare_error = !response.result.is_ok() && data.is_empty();
    let allowed = bare_error && BARE_ERRORS.iter().any(|(n, _)| *n == name);
    (!allowed).then_some(difference)
}

#[test]
fn every_captured_exchange_is_answered_as_the_original_answered_it() {
    if in_own_network("wire::every_captured_exchange_is_answered_as_the_original_answered_it") {
        return;
    }
    let vectors = load("wire.json");
    let mut cluster = Builder::new(3).ports(&[7120, 7121, 7122]).private_disk().unformatted().start();
    let mut gateway = cluster.nodes[0].client();
    let mut home: Option<Client> = None;
    let mut wrong = Vec::new();
    for entry in vectors["exchanges"].as_array().expect("exchanges") {
        let name = entry["name"].as_str().expect("name");
        let raw: [u8; 48] =
            unhex(entry["request"]["header"].as_str().expect("header")).try_into().expect("48 bytes");
        let request = Request::from_bytes(&raw);
        let client = if AT_A_HOME.contains(&name) {
            home.get_or_insert_with(|| {
                let holders = cluster.holders(Oid::data(VdiId::new(0xa03908), 0));
                assert_eq!(holders.len(), 2, "two copies");
                cluster.nodes[holders[0]].client()
            })
        } else {
            &mut gateway
        };
        // As captured, the id included.
        let sent = [raw.as_slice(), &payload(&entry["request"]["payload"])].concat();
        client.send_bytes(&sent).unwrap_or_else(|e| panic!("{name}: {e}"));
        match client.receive() {
            Ok((response, data)) => wrong.extend(compare(entry, &request, &response, &data)),
            Err(e) => panic!("{name}: no answer: {e}\nso far: {wrong:#?}"),
        }
        if name == "make_fs" {
            cluster.wait_running();
        }
    }
    assert!(wrong.is_empty(), "{} of 108 differ:\n{}", wrong.len(), wrong.join("\n"));
    for node in &mut cluster.nodes {
        let status = node.wait_exit(Duration::from_secs(30));
        assert_eq!(status.code(), Some(0), "after shutdown");
    }
}

fn head_of(case: &Value) -> Vec<u8> {
    unhex(case["response_data_head"].as_str().unwrap_or_default())
}

/// Payload that a case of `gateway-exchanges.json` sends; its description says which.
fn sent_payload(case: &Value) -> Vec<u8> {
    let length = case["request_data_len"].as_u64().unwrap_or(0) as usize;
    match case["name"].as_str().expect("name") {
        "set_recovery" => unhex("050000000000000064000000000000000000000000000000"),
        "create" => vec![0x41; length],
        _ => vec![0x42; length],
    }
}

/// The GET_HASH case hashes the object as the capture left it: 4096 x 41h with 512 x 42h at 512 and the peer's write of
/// 512 bytes at 0. Which byte that write carried is not recorded; the recovery read shows it: 42h.
#[test]
fn gateway_and_peer_exchanges_are_answered_as_the_original_answered_them() {
    if in_own_network("wire::gateway_and_peer_exchanges_are_answered_as_the_original_answered_them") {
        return;
    }
    let vectors = load("gateway-exchanges.json");
    let mut cluster = Builder::new(4).ports(&[7660, 7661, 7662, 7663]).start();
    let vid = cluster.client().create_vdi("v", 16 << 20).expect("create v");
    assert_eq!(vid.get(), 0x020609);
    let data = Oid::data(vid, 0);

    let mut gateway = cluster.nodes[0].client();
    let mut wrong = Vec::new();
    let mut peer: Option<(usize, Client)> = None;
    for case in vectors["cases"].as_array().expect("cases") {
        let name = case["name"].as_str().expect("name");
        let Some(header) = case["request_header"].as_str() else {
            // "one member left": the one that holds no copy, so that nothing moves.
            let home = peer.as_ref().expect("peer cases came before").0;
            let idle = (0..4).find(|i| !cluster.holders(data).contains(i)).expect("four nodes, three copies");
            assert_ne!(idle, home);
            cluster.kill9(idle);
            cluster.wait_epoch(2);
            cluster.wait_recovered();
            continue;
        };
        let raw: [u8; 48] = unhex(header).try_into().expect("48 bytes");
        let at_home = peer.is_some() || name == "peer_read";
        if at_home {
            peer.get_or_insert_with(|| {
                let inode = cluster.holders(Oid::inode(vid));
                let both =
                    cluster.holders(data).into_iter().find(|i| inode.contains(i)).expect("a common home");
                (both, cluster.nodes[both].client())
            });
        }
        let sent = [raw.as_slice(), &sent_payload(case)].concat();
        if name == "peer_write" {
            // To all homes, as a gateway does: what is on one only does not outlive the epoch.
            let first = peer.as_ref().expect("a home").0;
            for other in cluster.holders(data).into_iter().filter(|i| *i != first) {
                let mut client = cluster.nodes[other].client();
                client.send_bytes(&sent).expect("sending");
                assert_eq!(client.receive().expect("answer").0.result, ResultCode::SUCCESS);
            }
        }
        let client = match (&mut peer, at_home) {
            (Some((_, client)), true) => client,
            _ => &mut gateway,
        };
        client.send_bytes(&sent).expect("sending");
        let Some(expected) = case["response_header"].as_str() else {
            client.set_timeout(Duration::from_secs(2)).expect("timeout");
            let error = client.receive().expect_err("a request of a later epoch waits");
            assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "{name}");
            continue;
        };
        let (response, body) = client.receive().unwrap_or_else(|e| panic!("{name}: {e}"));
        if response.to_bytes() != unhex(expected)[..] {
            wrong.push(format!("{name}: {:?}, expected {expected}", response));
        }
        let length = case["response_data_len"].as_u64().unwrap_or(0) as usize;
        let head = &body[..body.len().min(64)];
        if body.len() != length || head != head_of(case) {
            wrong.push(format!("{name}: {} bytes of payload ({length} expected): {head:02x?}", body.len()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));

    // The parked request is served once its epoch has come: the idle node returns.
    let idle = (0..4).find(|i| !cluster.running().contains(i)).expect("one is down");
    cluster.start(idle);
    let (_, client) = peer.as_mut().expect("peer");
    client.set_timeout(Duration::from_secs(60)).expect("timeout");
    let (response, body) = client.receive().expect("the parked answer");
    assert_eq!((response.result, response.epoch.0, body.len()), (ResultCode::SUCCESS, 3, 512));
}

fn status_of(client: &mut Client, request: Request) -> ResultCode {
    client.must(request, &[]).0.result
}

/// Spec 01, sections 5.1 and 6.1, beyond what was captured.
#[test]
fn versions_and_opcodes_are_checked_before_anything_else() {
    let mut cluster = Cluster::new(1);
    let mut client = cluster.client();
    for version in 0..=255u8 {
        let public = Request { version, ..Request::new(Opcode::GET_CLUSTER_DEFAULT) };
        let internal = Request { version, ..Request::new(Opcode::TRACE_STATUS) };
        let unknown = Request { version, ..Request::new(Opcode(0xf0)) };
        let ok = |yes: bool, result| if yes { result } else { ResultCode::VER_MISMATCH };
        assert_eq!(status_of(&mut client, public), ok(version <= 2, ResultCode::SUCCESS), "{version}");
        assert_eq!(status_of(&mut client, internal), ok(version == 10, ResultCode::SUCCESS), "{version}");
        assert_eq!(
            status_of(&mut client, unknown),
            ok(version == 10, ResultCode::INVALID_PARMS),
            "{version}"
        );
    }
}

/// Many requests in flight on one connection: all answered, each with its id, whatever the order.
#[test]
fn pipelined_requests_are_all_answered_with_their_ids() {
    let mut cluster = Builder::new(3).flags(ClusterFlags::AUTO_VNODES).start();
    let vid = cluster.client().create_vdi("pipe", 64 << 20).expect("create");
    let mut client = cluster.client();
    let mut sent = std::collections::BTreeMap::new();
    for i in 0..200u32 {
        let opcode = if i % 2 == 0 { Opcode::GET_CLUSTER_DEFAULT } else { Opcode::READ_OBJ };
        let body = sheepdog_proto::header::ObjRequest { oid: Oid::inode(vid), ..Default::default() };
        let request =
            Request::new(opcode).with_obj(body).length(if i % 2 == 0 { 0 } else { 512 + i as usize });
        let id = client.send(request, &[]).expect("send");
        sent.insert(id, request);
    }
    while !sent.is_empty() {
        let (response, data) = client.receive().expect("an answer");
        let request = sent.remove(&response.id).expect("an id that was asked, once");
        assert_eq!((response.opcode, response.result), (request.opcode, ResultCode::SUCCESS));
        assert_eq!(data.len(), request.data_length as usize);
    }
}
