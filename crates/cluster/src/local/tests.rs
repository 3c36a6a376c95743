//! Layout against captured bytes, and single-process behaviour against a hand-written file.

use std::os::unix::fs::FileExt;

use serde_json::Value;
use sheepdog_proto::{ClusterInfo, NodeId, NodeRecord, Wire};

use super::layout::*;
use super::member::Member;
use super::queue::QueueFile;
use super::*;
use crate::captures::{self, captured, num, vectors};

fn zero_scratch(event: &mut [u8]) {
    event[8..32].fill(0);
    for node in event[LNODES_OFF..].chunks_exact_mut(LocalNode::LEN) {
        node[..24].fill(0);
    }
}

fn check_node(got: &LocalNode, want: &Value) {
    captures::check_node(&got.node, &want["node"]);
    assert_eq!(got.pid as u64, num(&want["pid"]));
    assert_eq!(u64::from(got.gateway), num(&want["gateway"]));
}

#[test]
fn the_layout_is_that_of_the_vectors() {
    let vectors = vectors();
    let offsets: Vec<Vec<&str>> = vectors["offsets"]
        .as_array()
        .expect("offsets")
        .iter()
        .map(|line| line.as_str().expect("text").split_ascii_whitespace().collect())
        .collect();
    let field = |name: &str, field: &str| {
        let words = offsets.iter().find(|w| w[0] == name && w[1] == field).expect("a listed field");
        words[3].parse::<u64>().expect("offset")
    };
    let size = |name: &str| {
        let words = offsets.iter().find(|w| w[0] == "==" && w[1] == name).expect("a listed structure");
        words[3].parse::<u64>().expect("size")
    };
    assert_eq!(size("local_node"), LocalNode::LEN as u64);
    assert_eq!(size("local_event"), EVENT_LEN as u64);
    assert_eq!(size("shm_queue"), FILE_LEN);
    assert_eq!(field("local_event", "callbacked"), CALLBACKED_OFF as u64);
    assert_eq!(field("local_event", "removed"), REMOVED_OFF as u64);
    assert_eq!(field("local_event", "buf"), BUF_OFF as u64);
    assert_eq!(field("local_event", "nr_lnodes"), NR_LNODES_OFF as u64);
    assert_eq!(field("local_event", "lnodes"), LNODES_OFF as u64);
    assert_eq!(field("shm_queue", "block_event_pos"), BLOCK.pos);
    assert_eq!(field("shm_queue", "block_events"), BLOCK.slot(0));
    assert_eq!(field("shm_queue", "nonblock_event_pos"), NONBLOCK.pos);
    assert_eq!(field("shm_queue", "nonblock_events"), NONBLOCK.slot(0));
}

#[test]
fn captured_events_decode_and_encode() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("queue");
    let queue = QueueFile::open(&path).expect("open");
    let raw = std::fs::OpenOptions::new().read(true).write(true).open(&path).expect("raw");
    let vectors = vectors();
    let events = vectors["local"]["events"].as_array().expect("events");
    assert_eq!(events.len(), 14);
    for captured_event in events {
        let (ring, slot) = match captured_event["queue"].as_str() {
            Some("block") => (BLOCK, num(&captured_event["slot"]) as usize),
            _ => (NONBLOCK, num(&captured_event["slot"]) as usize),
        };
        assert_eq!(ring.slot(slot), num(&captured_event["file_offset"]));
        let mut bytes = captured(captured_event, EVENT_LEN);
        raw.write_all_at(&bytes, ring.slot(slot)).expect("write");
        let file = queue.lock().expect("lock");
        let event = file.event(ring, slot).expect("decodes");

        let want = &captured_event["decoded"];
        assert_eq!(event.kind as u64, num(&want["type"]));
        assert_eq!(u64::from(event.callbacked), num(&want["callbacked"]));
        assert_eq!(u64::from(event.removed), num(&want["removed"]));
        assert_eq!(event.buf.len() as u64, num(&want["buf_len"]));
        assert_eq!(event.lnodes.len() as u64, num(&want["nr_lnodes"]));
        check_node(&event.sender, &want["sender"]);
        for (got, want) in event.lnodes.iter().zip(want["lnodes"].as_array().expect("lnodes")) {
            check_node(got, want);
        }
        if let Some(info) = want.get("cluster_info") {
            let got = ClusterInfo::decode(&event.buf).expect("cluster info");
            assert_eq!(u64::from(got.header.proto_ver), num(&info["proto_ver"]));
            assert_eq!(u64::from(got.header.status), num(&info["status"]));
            assert_eq!(got.nodes.len() as u64, num(&info["nr_nodes"]));
        }

        raw.write_all_at(&0i32.to_le_bytes(), ring.pos).expect("position");
        file.append(ring, &event).expect("append");
        drop(file);
        let mut written = vec![0; EVENT_LEN];
        raw.read_exact_at(&mut written, ring.slot(1)).expect("read");
        zero_scratch(&mut bytes);
        // Slot 1 is reused, so compare what an event means to its readers: front, and list as long as it says.
        let front = BUF_OFF + event.buf.len();
        let back = NR_LNODES_OFF..LNODES_OFF + event.lnodes.len() * LocalNode::LEN;
        assert_eq!(written[..front], bytes[..front]);
        assert_eq!(written[back.clone()], bytes[back]);
    }
}

#[test]
fn captured_members_follow_from_the_event_before() {
    let vectors = vectors();
    let events = vectors["local"]["events"].as_array().expect("events");
    let decoded: Vec<_> = events
        .iter()
        .filter(|e| e["queue"] == "nonblock")
        .map(|e| {
            let bytes = captured(e, EVENT_LEN);
            let head = EventHead::decode(&bytes).expect("head");
            let (kind, _) = check_head(&head).expect("valid");
            let nr = num(&e["decoded"]["nr_lnodes"]) as usize;
            (num(&e["slot"]), kind, head.sender, decode_lnodes(&bytes[LNODES_OFF..][..nr * LocalNode::LEN]))
        })
        .collect();
    let mut checked = 0;
    for pair in decoded.windows(2).filter(|w| w[0].0 + 1 == w[1].0) {
        let (mut lnodes, after) = (pair[0].3.clone(), &pair[1]);
        let kind = if after.1 == EventKind::Accept { EventKind::Join } else { after.1 };
        apply(&mut lnodes, kind, &after.2);
        assert_eq!(lnodes, after.3, "slot {}", after.0);
        checked += 1;
    }
    assert!(checked >= 7, "{checked} pairs");
}

fn lnode(port: u16, pid: i32, gateway: u8) -> LocalNode {
    let nid = NodeId::new(Ipv4Addr::LOCALHOST.into(), port);
    LocalNode { node: NodeRecord { nid, zone: pid as u32, ..NodeRecord::zeroed() }, pid, gateway }
}

#[test]
fn of_two_entries_with_one_address_the_last_counts_and_the_dead_one_is_removed() {
    let mut lnodes = vec![lnode(7002, 1, 0), lnode(7001, 2, 0), lnode(7003, 3, 1), lnode(7001, 4, 0)];
    let zones = |l: &[LocalNode]| members(l, None).iter().map(|n| n.zone).collect::<Vec<_>>();
    assert_eq!(zones(&lnodes), [4, 1]);
    apply(&mut lnodes, EventKind::Leave, &lnode(7001, 2, 0));
    assert_eq!(zones(&lnodes), [4, 1]);
    apply(&mut lnodes, EventKind::Leave, &lnode(7009, 9, 0));
    assert_eq!(lnodes.len(), 3);
}

/// A queue file and a member that attached to it, without a thread.
fn attached(prepare: impl FnOnce(&std::fs::File)) -> (tempfile::TempDir, Result<(), DriverError>) {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("queue");
    drop(QueueFile::open(&path).expect("open"));
    prepare(&std::fs::OpenOptions::new().read(true).write(true).open(&path).expect("raw"));
    let (commands, _inbox) = mpsc::channel();
    let (events, _receiver) = unbounded_channel();
    let mailbox = Mailbox { commands, waker: Arc::new(wake::waker().expect("eventfd")) };
    let result =
        QueueFile::open(&path).and_then(|q| Member::new(q, events, mailbox)).and_then(|mut m| m.attach());
    (dir, result)
}

#[test]
fn garbage_in_the_file_is_an_error() {
    let at = NONBLOCK.slot(7);
    let garbage: [(&str, u64, &[u8]); 4] = [
        ("queue position -1", NONBLOCK.pos, &[0xff; 4]),
        ("queue position 500", NONBLOCK.pos, &[0xf4, 1, 0, 0]),
        ("queue position 500", BLOCK.pos, &[0xf4, 1, 0, 0]),
        ("event with 1025 nodes", at + NR_LNODES_OFF as u64, &[1, 4, 0, 0, 0, 0, 0, 0]),
    ];
    for (text, off, bytes) in garbage {
        let (_dir, result) = attached(|file| {
            file.write_all_at(&[7, 0, 0, 0], NONBLOCK.pos).expect("position");
            file.write_all_at(&[6, 0, 0, 0], at).expect("type");
            file.write_all_at(bytes, off).expect("garbage");
        });
        let error = result.expect_err(text).to_string();
        assert!(error.contains(text), "{error}");
    }
    let mut head = EventHead { kind: 6, buf_len: BUF_LEN as u64 + 1, ..EventHead::zeroed() };
    assert_eq!(check_head(&head), Err("event buffer of 131073 bytes".to_owned()));
    head = EventHead { kind: 8, ..EventHead::zeroed() };
    assert_eq!(check_head(&head), Err("event type 8".to_owned()));
}

#[test]
fn a_file_that_is_no_queue_is_left_alone() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("precious");
    std::fs::write(&path, "data").expect("write");
    let error = QueueFile::open(&path).expect_err("refused").to_string();
    assert!(error.contains("length 4 instead of 221304016"), "{error}");
    assert_eq!(std::fs::read(&path).expect("read"), b"data");
    assert!(QueueFile::open(dir.path()).is_err());
    assert!(QueueFile::open(&dir.path().join("no/such")).is_err());
}

#[test]
fn opening_needs_the_signal_blocked() {
    let dir = tempfile::tempdir().expect("directory");
    let result = LocalDriver::open(&dir.path().join("queue"));
    assert!(matches!(result, Err(DriverError::SignalNotBlocked)));
}
