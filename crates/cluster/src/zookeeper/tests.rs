//! Layout against captured bytes, and the meaning of the queue by table.

use sheepdog_proto::cluster::CLUSTER_INFO_LEN;
use sheepdog_proto::message::ClusterMessage;
use sheepdog_proto::{ClusterInfo, NodeId, NodeRecord, Wire};

use super::history::{History, advance_blocks, oldest_open_block};
use super::layout::*;
use crate::Event;
use crate::captures::*;

fn zero_scratch(bytes: &mut [u8]) {
    bytes[16..56].fill(0);
    bytes[56..80].fill(0);
    let head = EntryHead::decode(bytes).expect("a head");
    if head.kind == Kind::Leave as u32 {
        // Written by a watcher, padding is as undefined as most fields.
        bytes[122..124].fill(0);
        bytes[136..144].fill(0);
    }
    if head.msg_len > 0 {
        for node in bytes[168 + 48..168 + CLUSTER_INFO_LEN].chunks_exact_mut(80) {
            node[..24].fill(0);
        }
        for node in bytes[168 + CLUSTER_INFO_LEN..].chunks_exact_mut(80) {
            node[..24].fill(0);
        }
    }
}

#[test]
fn captured_entries_decode_to_their_fields_and_encode_to_their_bytes() {
    let vectors = vectors();
    let events = vectors["zookeeper"]["events"].as_array().expect("events");
    assert!(events.len() >= 10, "{}", events.len());
    for event in events {
        let (mut bytes, want) = (captured(event, num(&event["total_len"]) as usize), &event["decoded"]);
        let entry = Entry::decode(&bytes).unwrap_or_else(|e| panic!("{}: {e}", event["name"]));
        let head = EntryHead::decode(&bytes).expect("a head");
        assert_eq!(entry.id, hex(&want["id"]));
        assert_eq!(entry.body.kind() as u64, num(&want["type"]));
        check_node(&entry.sender, &want["sender"]);
        assert_eq!(head.msg_len, num(&want["msg_len"]));
        assert_eq!(head.buf_len, num(&want["buf_len"]));
        assert_eq!(head.nr_nodes, num(&want["nr_nodes"]));
        match &entry.body {
            Body::Accept(info, members) => {
                check_info(info, &want["cluster_info"]);
                check_nodes(members, &want["members"]);
                // Records behind the announced ones are leftovers of the author's memory.
                let end = 168 + 48 + info.nodes.len() * 80;
                bytes[end..168 + CLUSTER_INFO_LEN].fill(0);
            }
            Body::Notify(message) | Body::Unblock(message) => {
                let decoded = ClusterMessage::decode(message).expect("a message");
                assert_eq!(
                    u64::from(decoded.request.opcode.0),
                    hex(&want["vdi_op_message"]["req"]["opcode"])
                );
                assert_eq!(decoded.data.len() as u64, num(&want["vdi_op_message"]["data_len"]));
            }
            _ => {}
        }
        zero_scratch(&mut bytes);
        let mut encoded = entry.encode();
        zero_scratch(&mut encoded);
        assert!(encoded == bytes, "{} encodes differently", event["name"]);
    }
}

#[test]
fn captured_znodes_have_the_layouts_written_here() {
    let znodes = vectors()["zookeeper"]["znodes"].clone();
    let text = znodes.to_string();
    let node = NodeId::new([127, 0, 0, 1].into(), 7410);
    assert!(text.contains(&member_path(&node)[1..]), "{text}");
    assert!(text.contains(&position_path(&node)[1..]), "{text}");
    assert_eq!(encode_node_string(&node).len(), 256);
    let mut garbage = encode_node_string(&node);
    garbage[200..].fill(0xff);
    assert_eq!(decode_node_string(&garbage), Some(node));
    assert_eq!(encode_session(0x0100_0029_0242_0002)[..8], unhex("0200420229000001"));
    assert_eq!(encode_position(-1), unhex("ffffffff"));
    assert_eq!(encode_position(1000), unhex("e8030000"));
    assert_eq!(decode_position(&unhex("e8030000")), 1000);
    assert_eq!(decode_position(b"x"), -1);
}

#[test]
fn lengths_from_outside_are_checked() {
    let valid = |body| Entry { id: 1, sender: NodeRecord::zeroed(), body }.encode();
    let broken = |mut bytes: Vec<u8>, off: usize, value: u64| {
        bytes[off..off + 8].copy_from_slice(&value.to_le_bytes());
        Entry::decode(&bytes).is_err()
    };
    let notify = valid(Body::Notify(vec![7; 96]));
    assert!(Entry::decode(&notify).is_ok());
    assert!(broken(notify.clone(), 160, 97), "longer than the znode");
    assert!(broken(notify.clone(), 160, u64::MAX));
    assert!(broken(notify.clone(), 8, 0), "type 0");
    assert!(broken(notify, 8, 8), "type 8");
    assert!(Entry::decode(&[0; 167]).is_err());
    assert!(Entry::decode(&valid(Body::Notify(vec![0; 131_073]))).is_err(), "message above the limit");
    let info =
        ClusterInfo { header: sheepdog_proto::cluster::ClusterInfoHeader::zeroed(), nodes: Vec::new() };
    let accept = valid(Body::Accept(info, Vec::new()));
    assert_eq!(accept.len(), 983_256);
    assert!(Entry::decode(&accept).is_ok());
    assert!(broken(accept.clone(), 152, 6145), "more members than a cluster has");
    assert!(broken(accept.clone(), 144, 983_089), "cluster info longer than the buffer");
    assert!(broken(accept, 144, 47), "cluster info shorter than its head");
}

fn node(port: u16) -> NodeRecord {
    NodeRecord { nid: NodeId::new([127, 0, 0, 1].into(), port), ..NodeRecord::zeroed() }
}

fn entry(port: u16, body: Body) -> Entry {
    Entry { id: 0, sender: node(port), body }
}

fn accept(port: u16, before: &[u16]) -> Entry {
    let header = sheepdog_proto::cluster::ClusterInfoHeader::zeroed();
    let before = before.iter().map(|port| node(*port)).collect();
    entry(port, Body::Accept(ClusterInfo { header, nodes: Vec::new() }, before))
}

fn show(events: Vec<Event>) -> String {
    let list = |m: &[NodeRecord]| m.iter().map(|n| n.nid.port.to_string()).collect::<Vec<_>>().join("+");
    let one = |event| match event {
        Event::Accept { node, members, .. } => format!("accept {} of {}", node.nid.port, list(&members)),
        Event::Leave { node, members } => format!("leave {} of {}", node.nid.port, list(&members)),
        Event::Notify { sender, message } => format!("notify {} {message:?}", sender.nid.port),
        Event::UpdateNode { node, members } => format!("update {} of {}", node.nid.port, list(&members)),
        other => format!("{other:?}"),
    };
    events.into_iter().map(one).collect::<Vec<_>>().join(", ")
}

#[test]
fn the_history_is_a_function_of_the_entries() {
    let mut history = History::new(vec![node(2)], vec![node(2).nid, node(9).nid]);
    let steps = [
        (accept(1, &[2]), "accept 1 of 1+2", Some(2)),
        (entry(1, Body::Block), "", Some(2)),
        (entry(1, Body::Unblock(vec![1])), "notify 1 [1]", Some(2)),
        (entry(2, Body::Unblock(vec![2])), "notify 2 [2]", Some(1)),
        (entry(3, Body::Leave), "", Some(1)),
        (entry(3, Body::UpdateNode), "", Some(1)),
        (entry(2, Body::UpdateNode), "update 2 of 1+2", Some(1)),
        (entry(2, Body::Block), "", Some(1)),
        (entry(1, Body::Leave), "leave 1 of 2", Some(2)),
        (entry(1, Body::Leave), "", Some(2)),
        (accept(2, &[]), "leave 2 of , accept 2 of 2", None),
    ];
    for (entry, want, head) in steps {
        let what = format!("{entry:?}");
        assert_eq!(show(history.apply(entry)), want, "{what}");
        assert_eq!(history.head().map(|n| n.port), head, "{what}");
    }
}

#[test]
fn looking_back_from_the_middle_finds_who_waits() {
    let mut blocks = Vec::new();
    let entries = [
        entry(1, Body::Unblock(vec![])),
        entry(2, Body::Block),
        entry(3, Body::Block),
        entry(2, Body::Unblock(vec![])),
        entry(4, Body::Block),
        entry(4, Body::Leave),
    ];
    entries.iter().for_each(|e| advance_blocks(&mut blocks, e));
    assert_eq!(blocks, [node(3).nid]);
}

#[test]
fn looking_back_an_accept_ends_what_an_earlier_life_asked_for() {
    let unblock = || Body::Unblock(vec![]);
    // Entries from number 0 on, members before the joiner, who waits.
    let table = [
        // All died; 1 is the first one back.
        (
            vec![entry(1, Body::Block), entry(2, Body::Block), accept(1, &[]), accept(2, &[1])],
            &[1, 2][..],
            &[][..],
        ),
        // 1 came back before anybody buried it, and has had the mutex since.
        (
            vec![entry(1, Body::Block), accept(1, &[2]), entry(1, Body::Block), entry(1, unblock())],
            &[1, 2],
            &[],
        ),
        // It wants it again.
        (
            vec![
                entry(1, Body::Block),
                entry(2, Body::Block),
                accept(1, &[2]),
                entry(1, Body::Block),
                entry(2, unblock()),
                entry(2, Body::Block),
            ],
            &[1, 2],
            &[1, 2],
        ),
        // An accept of somebody else ends nothing.
        (vec![entry(1, Body::Block), accept(3, &[1, 2]), entry(2, Body::Block)], &[1, 2, 3], &[1, 2]),
    ];
    for (entries, members, want) in table {
        let what = format!("{entries:?}");
        let members: Vec<_> = members.iter().map(|port| node(*port)).collect();
        let numbered: Vec<_> = (0..).zip(entries).collect();
        let (accepts, others): (Vec<_>, Vec<_>) =
            numbered.into_iter().partition(|(_, e)| matches!(e.body, Body::Accept(..)));
        // As a joiner does: accepts before the oldest BLOCK that may be open are not read.
        let oldest = oldest_open_block(&others, &members);
        let mut read: Vec<_> =
            others.into_iter().chain(accepts.into_iter().filter(|(n, _)| Some(*n) > oldest)).collect();
        read.sort_by_key(|(number, _)| *number);
        let mut blocks = Vec::new();
        read.iter().for_each(|(_, e)| advance_blocks(&mut blocks, e));
        assert_eq!(blocks.iter().map(|n| n.port).collect::<Vec<_>>(), want, "{what}");
    }
}
