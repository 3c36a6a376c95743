//! Layout against captured bytes, and the meaning of deliveries by histories of several members.

use sheepdog_proto::cluster::ClusterInfoHeader;
use sheepdog_proto::message::ClusterMessage;
use sheepdog_proto::{ClusterInfo, NodeId, NodeRecord, Wire};

use super::ffi::{Changed, Reason};
use super::layout::*;
use super::queues::{Action, Queues};
use crate::captures::*;

fn zero_scratch(bytes: &mut [u8]) {
    bytes[8..32].fill(0);
    for entry in bytes[96..HEAD_LEN].chunks_exact_mut(TableEntry::LEN) {
        entry[8..32].fill(0);
    }
    if bytes.len() == HEAD_LEN + 131_072 {
        let whole = (131_072 - 48) / 80 * 80;
        for node in bytes[HEAD_LEN + 48..][..whole].chunks_exact_mut(80) {
            node[..24].fill(0);
        }
    }
}

#[test]
fn captured_messages_decode_to_their_fields_and_encode_to_their_bytes() {
    let vectors = vectors();
    let messages = vectors["corosync"]["messages"].as_array().expect("messages");
    assert!(messages.len() >= 9, "{}", messages.len());
    for captured_message in messages {
        let (mut bytes, want) = (
            captured(captured_message, num(&captured_message["total_len"]) as usize),
            &captured_message["decoded"],
        );
        let message = Message::decode(&bytes).unwrap_or_else(|e| panic!("{}: {e}", captured_message["type"]));
        let head = MessageHead::decode(&bytes).expect("a head");
        assert_eq!(u64::from(message.sender.process.nodeid), num(&want["sender"]["nodeid"]));
        assert_eq!(u64::from(message.sender.process.pid), num(&want["sender"]["pid"]));
        check_node(&message.sender.node, &want["sender"]["node"]);
        assert_eq!(u64::from(head.kind), num(&want["type"]));
        assert_eq!(u64::from(head.msg_len), num(&want["msg_len"]));
        assert_eq!(u64::from(head.nr_nodes), num(&want["nr_nodes"]));
        match &message.body {
            Body::Accept(info, members, blocks) => {
                check_info(info, &want["cluster_info"]);
                assert_eq!(members.len() as u64, num(&want["nr_nodes"]));
                assert_eq!(*blocks, None, "the original does not tell");
            }
            Body::Join(info) => check_info(info, &want["cluster_info"]),
            Body::Notify(message) | Body::Unblock(message) => {
                ClusterMessage::decode(message).expect("a message");
            }
            _ => {}
        }
        zero_scratch(&mut bytes);
        let mut encoded = message.encode();
        zero_scratch(&mut encoded);
        assert!(encoded == bytes, "{} encodes differently", captured_message["type"]);
    }
}

#[test]
fn lengths_from_outside_are_checked() {
    let sender = peer(1);
    let valid = |body| Message { sender, body }.encode();
    let notify = valid(Body::Notify(vec![7; 96]));
    assert!(Message::decode(&notify).is_ok());
    let broken = |mut bytes: Vec<u8>, off: usize, value: &[u8]| {
        bytes[off..off + value.len()].copy_from_slice(value);
        Message::decode(&bytes).is_err()
    };
    assert!(broken(notify.clone(), 92, &97u32.to_le_bytes()), "longer than the message");
    assert!(broken(notify.clone(), 88, &7u16.to_le_bytes()), "type 7");
    assert!(broken(notify.clone(), 90, &1025u16.to_le_bytes()), "more members than the table has");
    assert!(Message::decode(&notify[..HEAD_LEN - 1]).is_err());
    assert!(Message::decode(&valid(Body::Notify(vec![0; 131_073]))).is_err(), "message above the limit");
    let blocks = (0..5).map(process).collect::<Vec<_>>();
    let accept = Body::Accept(info(), vec![peer(1), peer(2)], Some(blocks));
    assert_eq!(Message::decode(&valid(accept.clone())).expect("decodes").body, accept);
    let full = Body::Accept(info(), vec![peer(1); MAX_MEMBERS], Some(Vec::new()));
    let Body::Accept(_, members, blocks) = Message::decode(&valid(full)).expect("decodes").body else {
        panic!("an accept")
    };
    assert_eq!((members.len(), blocks), (MAX_MEMBERS, None), "no room");
}

fn process(n: u32) -> ProcessId {
    ProcessId { nodeid: n, pid: 1000 + n }
}

fn peer(n: u32) -> Peer {
    let nid = NodeId::new([127, 0, 0, 1].into(), n as u16);
    Peer { process: process(n), node: NodeRecord { nid, ..NodeRecord::zeroed() } }
}

fn info() -> ClusterInfo {
    ClusterInfo { header: ClusterInfoHeader::zeroed(), nodes: Vec::new() }
}

/// Processes 1, 2, ... in one group: what one sends is delivered to all present, at once or when the test says.
struct Ring {
    queues: Vec<(u32, Queues)>,
    /// Sent and not delivered.
    wire: Vec<Message>,
    /// What each was told, and the numbers of open questions about the mutex.
    logs: Vec<(u32, Vec<String>)>,
    offers: Vec<(u32, u64)>,
    /// Joins are answered at once.
    answers: bool,
}

fn list(nodes: &[NodeRecord]) -> String {
    nodes.iter().map(|n| n.nid.port.to_string()).collect::<Vec<_>>().join("+")
}

impl Ring {
    fn new() -> Ring {
        Ring { queues: Vec::new(), wire: Vec::new(), logs: Vec::new(), offers: Vec::new(), answers: true }
    }

    fn of(count: u32) -> Ring {
        let mut ring = Ring::new();
        for n in 1..=count {
            ring.enter(n);
            ring.join(n);
        }
        ring
    }

    fn act(&mut self, n: u32, actions: Vec<Action>) {
        for action in actions {
            let line = match action {
                Action::Send(sender, body) => {
                    self.wire.push(Message { sender, body: *body });
                    continue;
                }
                Action::AskJoin { question, info, .. } => {
                    if self.answers {
                        let actions = self.of_mut(n).join_answered(question, Some(*info));
                        self.act(n, actions);
                    }
                    continue;
                }
                Action::AskBlock(question) => {
                    self.offers.push((n, question));
                    continue;
                }
                Action::Accept { node, members, .. } => {
                    format!("accept {} of {}", node.nid.port, list(&members))
                }
                Action::Leave(node, members) => format!("leave {} of {}", node.nid.port, list(&members)),
                Action::Notify(sender, message) => {
                    format!("notify {} {}", sender.nid.port, String::from_utf8_lossy(&message))
                }
                Action::Update(node, members) => format!("update {} of {}", node.nid.port, list(&members)),
                Action::Joined(knows) => format!("joined {knows}"),
                Action::UnknownUnblock => "unknown unblock".to_owned(),
                Action::Unblocked => continue,
                Action::Fail(text) => format!("fail {text}"),
                Action::Warn(text) => format!("warn {text}"),
            };
            match self.logs.iter_mut().find(|(m, _)| *m == n) {
                Some((_, log)) => log.push(line),
                None => self.logs.push((n, vec![line])),
            }
        }
    }

    fn of_mut(&mut self, n: u32) -> &mut Queues {
        &mut self.queues.iter_mut().find(|(m, _)| *m == n).expect("a present process").1
    }

    fn log(&self, n: u32) -> &[String] {
        self.logs.iter().find(|(m, _)| *m == n).map_or(&[], |(_, log)| log)
    }

    fn present(&self) -> Vec<u32> {
        self.queues.iter().map(|(n, _)| *n).collect()
    }

    fn change(&mut self, left: &[(u32, Reason)], joined: &[(u32, Reason)]) {
        let changed = |list: &[(u32, Reason)]| {
            list.iter()
                .map(|(n, reason)| Changed { process: process(*n), reason: *reason })
                .collect::<Vec<_>>()
        };
        let members: Vec<_> = self.present().iter().map(|n| (*n, Reason::Process)).collect();
        let (members, left, joined) = (changed(&members), changed(left), changed(joined));
        for n in self.present() {
            let actions = self.of_mut(n).changed(&members, &left, &joined);
            self.act(n, actions);
        }
    }

    /// A process enters the group without asking to join yet.
    fn enter(&mut self, n: u32) {
        self.queues.push((n, Queues::new(peer(n))));
        self.change(&[], &[(n, Reason::Process)]);
    }

    fn send(&mut self, n: u32, body: Body) {
        self.wire.push(Message { sender: peer(n), body });
        self.deliver();
    }

    fn join(&mut self, n: u32) {
        self.send(n, Body::Join(info()));
    }

    fn deliver(&mut self) {
        while !self.wire.is_empty() {
            let message = self.wire.remove(0);
            for n in self.present() {
                let actions = self.of_mut(n).delivered(message.clone());
                self.act(n, actions);
            }
        }
    }

    /// Processes end.
    fn lose(&mut self, gone: &[u32], reason: Reason) {
        self.queues.retain(|(n, _)| !gone.contains(n));
        self.offers.retain(|(n, _)| !gone.contains(n));
        let left: Vec<_> = gone.iter().map(|n| (*n, reason)).collect();
        self.change(&left, &[]);
        self.deliver();
    }

    /// Takes the open offers.
    fn grant(&mut self) -> Vec<u32> {
        let offers = std::mem::take(&mut self.offers);
        for (n, question) in &offers {
            self.of_mut(*n).block_answered(*question, true);
        }
        offers.into_iter().map(|(n, _)| n).collect()
    }

    fn unblock(&mut self, n: u32, word: &str) {
        assert!(self.of_mut(n).take_turn(), "{n} has the mutex");
        self.send(n, Body::Unblock(word.into()));
    }
}

#[test]
fn the_first_answers_itself_and_joins_take_the_place_of_their_configuration_change() {
    let mut ring = Ring::new();
    ring.answers = false;
    ring.enter(1);
    ring.join(1);
    // The first one's own join is answered with nobody else there.
    ring.answers = true;
    let actions = ring.of_mut(1).ask_again();
    assert!(actions.is_empty(), "it was asked, and not declined");
    let actions = ring.of_mut(1).join_answered(1, Some(info()));
    ring.act(1, actions);
    ring.deliver();
    assert_eq!(ring.log(1), ["joined true", "accept 1 of 1"]);
    ring.enter(2);
    // Delivered after the change: everybody handles it behind the accept.
    ring.send(1, Body::Notify("between".into()));
    assert_eq!(ring.log(1).len(), 2, "the joiner holds up what comes after it");
    assert_eq!(ring.of_mut(1).stuck(), Some(process(2)));
    ring.join(2);
    assert_eq!(ring.log(1)[2..], ["accept 2 of 1+2", "notify 1 between"]);
    assert_eq!(ring.log(2), ["joined true", "accept 2 of 1+2", "notify 1 between"]);
    let mut node = peer(2).node;
    node.nr_vnodes = 7;
    ring.wire.push(Message { sender: Peer { node, ..peer(2) }, body: Body::UpdateNode });
    ring.deliver();
    ring.send(3, Body::UpdateNode);
    ring.send(2, Body::Leave);
    ring.lose(&[2], Reason::Process);
    assert_eq!(ring.log(1)[4..], ["update 2 of 1+2", "leave 2 of 1"], "one leave, no record of strangers");
}

#[test]
fn a_joiner_that_ends_before_its_accept_releases_the_queue() {
    let mut ring = Ring::of(2);
    ring.enter(3);
    ring.send(1, Body::Notify("waits".into()));
    assert!(!ring.log(1).iter().any(|l| l.ends_with("waits")));
    ring.lose(&[3], Reason::Process);
    assert_eq!(ring.log(1).last().map(String::as_str), Some("notify 1 waits"));
    assert!(!ring.log(1).iter().any(|l| l.starts_with("leave") || l.starts_with("fail")));
}

#[test]
fn one_mutex_at_a_time_also_for_a_joiner_and_after_deaths() {
    let mut ring = Ring::of(3);
    for n in [2, 1, 3] {
        ring.send(n, Body::Block);
    }
    assert_eq!(ring.grant(), [2]);
    // It enters while 2 has the mutex, and learns so from the accept.
    ring.enter(4);
    ring.send(4, Body::Block);
    ring.unblock(2, "two");
    ring.join(4);
    assert_eq!(ring.log(4)[..2], ["joined true", "accept 4 of 1+2+3+4"]);
    assert_eq!(ring.grant(), [1], "not the joiner, which sees only its own request before");
    ring.lose(&[1, 3], Reason::Process);
    assert_eq!(ring.grant(), [4], "the dead ones' requests went with them");
    ring.unblock(4, "four");
    assert!(ring.grant().is_empty());
    for n in [2, 4] {
        assert_eq!(ring.log(n).last().map(String::as_str), Some("notify 4 four"));
        assert!(!ring.log(n).iter().any(|l| l == "unknown unblock"), "{:?}", ring.log(n));
    }
}

#[test]
fn an_original_that_answers_leaves_the_joiner_without_knowledge_of_the_mutex() {
    let mut ring = Ring::of(1);
    ring.send(1, Body::Block);
    assert_eq!(ring.grant(), [1]);
    ring.answers = false;
    ring.enter(2);
    ring.join(2);
    ring.wire.push(Message { sender: peer(2), body: Body::Accept(info(), vec![peer(1)], None) });
    ring.deliver();
    assert_eq!(ring.log(2), ["joined false", "accept 2 of 1+2"]);
    ring.unblock(1, "one");
    assert_eq!(ring.log(2)[2..], ["unknown unblock", "notify 1 one"]);
}

#[test]
fn the_smaller_part_of_a_cut_ends_and_the_lower_half_of_an_even_one_stays() {
    let down = Reason::NodeDown;
    for (size, lost, goes_on) in [
        (3, vec![3], true),
        (3, vec![1, 2], false),
        (5, vec![1, 2], true),
        (5, vec![1, 2, 3], false),
        (4, vec![3, 4], true),
        (4, vec![1, 4], false),
        (2, vec![2], true),
        (2, vec![1], false),
    ] {
        let mut ring = Ring::of(size);
        ring.lose(&lost, down);
        for n in ring.present() {
            let failed = ring.log(n).iter().any(|l| l.starts_with("fail a number of leaving node"));
            assert_eq!(failed, !goes_on, "{n} of {size} after losing {lost:?}: {:?}", ring.log(n));
            let leaves = ring.log(n).iter().filter(|l| l.starts_with("leave")).count();
            assert_eq!(leaves, if goes_on { lost.len() } else { 0 });
        }
    }
    // Ends of processes are no cut, however many.
    let mut ring = Ring::of(4);
    ring.lose(&[1, 2, 3], Reason::Process);
    assert_eq!(ring.log(4).last().map(String::as_str), Some("leave 3 of 4"));
}

#[test]
fn members_whose_end_waits_behind_a_join_are_on_neither_side_of_a_cut() {
    // 6 never asks to join, so nothing behind it is handled; 3, 4 and 5 end, and then 1 and 2 are cut from each other.
    let goes_on = |n: u32, here: &[u32], lost: &[u32]| {
        let mut ring = Ring::of(5);
        ring.enter(6);
        ring.lose(&[3, 4, 5], Reason::Process);
        let changed = |list: &[u32], reason| {
            list.iter().map(|n| Changed { process: process(*n), reason }).collect::<Vec<_>>()
        };
        let (here, lost) = (changed(here, Reason::Process), changed(lost, Reason::NodeDown));
        let actions = ring.of_mut(n).changed(&here, &lost, &[]);
        ring.act(n, actions);
        !ring.log(n).iter().any(|l| l.starts_with("fail a number of leaving node"))
    };
    assert!(goes_on(1, &[1, 6], &[2]));
    assert!(!goes_on(2, &[2], &[1, 6]));
}

#[test]
fn of_two_parts_that_meet_the_smaller_ends() {
    let meet = |ours: &[u32], theirs: &[u32]| {
        let mut ring = Ring::new();
        for n in ours {
            ring.enter(*n);
            ring.join(*n);
        }
        let members: Vec<_> = ours.iter().chain(theirs).map(|n| (*n, Reason::Process)).collect();
        let changed = |list: &[(u32, Reason)]| {
            list.iter()
                .map(|(n, reason)| Changed { process: process(*n), reason: *reason })
                .collect::<Vec<_>>()
        };
        let joined: Vec<_> = theirs.iter().map(|n| (*n, Reason::NodeUp)).collect();
        let first = ours[0];
        let actions = ring.of_mut(first).changed(&changed(&members), &[], &changed(&joined));
        ring.act(first, actions);
        ring.log(first).iter().any(|l| l.starts_with("fail two parts"))
    };
    for (one, other, ends) in [
        (vec![1, 2], vec![3], false),
        (vec![3], vec![1, 2], true),
        (vec![1, 4], vec![2, 3], false),
        (vec![2, 3], vec![1, 4], true),
    ] {
        assert_eq!(meet(&one, &other), ends, "{one:?} meets {other:?}");
    }
}

#[test]
fn a_second_process_with_the_address_of_a_member_is_refused_by_itself_and_counted_by_nobody() {
    let mut ring = Ring::of(2);
    let double = Peer { process: process(9), node: peer(2).node };
    ring.queues.push((9, Queues::new(double)));
    ring.change(&[], &[(9, Reason::Process)]);
    ring.wire.push(Message { sender: double, body: Body::Join(info()) });
    ring.deliver();
    let refused = ring.log(9).last().expect("a line");
    assert!(refused.starts_with("fail ") && refused.contains("is already a member"), "{refused}");
    assert!(!ring.log(1).iter().any(|l| l.starts_with("accept 2 of 1+2+")), "{:?}", ring.log(1));
    ring.lose(&[9], Reason::Process);
    assert!(!ring.log(1).iter().any(|l| l.starts_with("leave")), "{:?}", ring.log(1));
}
