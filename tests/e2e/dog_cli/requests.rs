//! The requests that the original's `dog` sent (`dog-requests.json`), sent again to our daemons: each answer must have
//! the captured result, length and header.
//!
//! Which requests our `dog` sends is judged in `dog/tests/requests.rs`, by a cluster in memory. A capture has the first
//! 64 bytes of what was sent; [`Replay::payload`] says how the rest is found.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;
use sheepdog_proto::header::ObjRequest;
use sheepdog_proto::{Opcode, Request, Response};

use crate::common::{Scenario, load, unhex};
use crate::daemons::Daemons;
use crate::steps;

/// Bytes of a payload that are captured.
const HEAD: usize = 64;
/// What `vdi write` was given repeats after this many bytes.
const UNIT: usize = 16;
/// Offset of the tag in an inode and behind the name in a lookup, and of key and value in an attribute.
const TAG: usize = 256;
const KEY: usize = 528;
const VALUE: usize = 784;

/// Commands with requests that are answered otherwise; `docs/compatibility.md` has a row for each.
const KNOWN: [&str; 2] = ["nfs create n1", "nfs delete n1"];

pub fn replay() {
    let vectors = load("dog-requests.json");
    let stores = tempfile::tempdir().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let replace =
        vec![("<T>", scratch.path().display().to_string()), ("<C>", stores.path().display().to_string())];
    let scenario = Scenario::new(&[], replace);
    let mut daemons = Daemons::start(stores.path(), &vectors["clusters"]["all"]);
    let mut replay =
        Replay { scenario: &scenario, clients: HashMap::new(), last_read: Vec::new(), tags: HashMap::new() };
    let (mut passed, mut failed, mut commands) = (0, Vec::new(), Vec::new());
    for command in vectors["commands"].as_array().unwrap() {
        let argv: Vec<&str> = command["argv"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        let name = argv.join(" ").replace(" -p 7700", "");
        let step = |daemons: &mut Daemons, field: &str, failed: &[String]| {
            for step in command[field].as_array().into_iter().flatten() {
                let done = steps::perform(&scenario, daemons, step);
                done.unwrap_or_else(|e| panic!("{name}: {step}: {e}; before that: {failed:#?}"));
            }
        };
        step(&mut daemons, "before", &failed);
        replay.clients.clear(); // a process of its own
        for (i, request) in command["requests"].as_array().unwrap().iter().enumerate() {
            match replay.exchange(&argv, request) {
                Ok(()) => passed += 1,
                Err(e) => {
                    failed.push(format!("{name}: request {i}, {}: {e}", request["op"]));
                    commands.push(name.clone());
                }
            }
        }
        step(&mut daemons, "after", &failed);
    }
    let total = passed + failed.len();
    println!(
        "requests: {passed} of {total} answers are as captured ({:.1} %)",
        100.0 * passed as f64 / total as f64
    );
    failed.iter().for_each(|line| println!("{line}"));
    commands.dedup();
    assert_eq!(commands, KNOWN, "commands with other answers, and those known to");
    for name in KNOWN {
        let row = format!("| requests | `dog {name}` |");
        assert!(crate::DEVIATIONS.contains(&row), "docs/compatibility.md has no row '{row}'");
    }
}

fn text<'a>(captured: &'a Value, name: &str) -> &'a str {
    captured[name].as_str().unwrap_or_default()
}

fn number(captured: &Value, name: &str) -> u64 {
    captured[name].as_u64().unwrap_or_default()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Bytes of hex digits; a one is sent where any digit may be, because no time of creation is zero.
fn bytes(digits: &str) -> Vec<u8> {
    unhex(&digits.replace('x', "1"))
}

fn fits(expected: &str, actual: &str) -> bool {
    let same = |(e, a): (u8, u8)| e == b'x' || e == a;
    expected.len() == actual.len() && expected.bytes().zip(actual.bytes()).all(same)
}

/// Opcode of a captured request.
fn opcode(captured: &Value) -> Opcode {
    Opcode(u8::from_str_radix(&text(captured, "op")[..2], 16).unwrap())
}

struct Replay<'a> {
    scenario: &'a Scenario<'a>,
    clients: HashMap<u64, TcpStream>,
    /// What the last READ_OBJ gave.
    last_read: Vec<u8>,
    /// Tags that VDIs were given, by the hex digits of their ids.
    tags: HashMap<String, Vec<u8>>,
}

impl Replay<'_> {
    /// Sends to a daemon; the answer and what came with it.
    fn send(
        &mut self,
        port: u64,
        header: &[u8],
        payload: &[u8],
    ) -> Result<([u8; Response::LEN], Vec<u8>), String> {
        let stream = self.clients.entry(port).or_insert_with(|| {
            let stream = TcpStream::connect(("127.0.0.1", port as u16)).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            stream
        });
        let mut answer = [0; Response::LEN];
        stream.write_all(&[header, payload].concat()).map_err(|e| e.to_string())?;
        stream.read_exact(&mut answer).map_err(|e| format!("no answer: {e}"))?;
        let mut body = vec![0; Response::from_bytes(&answer).data_length as usize];
        stream.read_exact(&mut body).map_err(|e| format!("cut answer: {e}"))?;
        Ok((answer, body))
    }

    /// What was sent. Of a longer payload than the capture has: the object that a clone has just read (answers end
    /// with the last byte that is not zero); text that repeats; an inode as it is, with the captured beginning; the tag or attribute that the command names;
    /// or zeros.
    fn payload(&mut self, argv: &[&str], captured: &Value, header: &[u8]) -> Vec<u8> {
        if let Some(text) = self.scenario.text("sent_text", &captured["sent_text"]) {
            return [text.as_bytes(), &[0]].concat();
        }
        let mut head = bytes(text(captured, "sent_head"));
        let length = number(captured, "sent") as usize;
        head.resize(length.min(HEAD), 0);
        if length <= HEAD {
            return head;
        }
        let body = Request::from_bytes(header.try_into().unwrap()).obj();
        let mut payload = head.clone();
        payload.resize(length, 0);
        match opcode(captured) {
            Opcode::CREATE_AND_WRITE_OBJ | Opcode::WRITE_OBJ if body.oid.is_data() => {
                if argv[1] == "clone" {
                    payload.fill(0);
                    payload[..self.last_read.len()].copy_from_slice(&self.last_read);
                    return payload;
                }
                let (before, unit) = (&head[HEAD - 2 * UNIT..HEAD - UNIT], &head[HEAD - UNIT..]);
                if before == unit {
                    let rest = unit.iter().copied().cycle().take(length - HEAD);
                    return head.iter().copied().chain(rest).collect();
                }
            }
            Opcode::WRITE_OBJ if body.offset == TAG as u32 => {
                self.tags.insert(hex(&body.oid.vid().get().to_le_bytes()), payload.clone());
            }
            Opcode::WRITE_OBJ if body.oid.is_inode() => {
                let whole = ObjRequest { oid: body.oid, ..ObjRequest::zeroed() };
                let read = Request::new(Opcode::READ_OBJ).with_obj(whole).length(length).to_bytes();
                let (_, inode) = self.send(number(captured, "to"), &read, &[]).unwrap();
                payload[..inode.len()].copy_from_slice(&inode);
                payload[..HEAD].copy_from_slice(&head);
            }
            Opcode::GET_VDI_INFO | Opcode::DEL_VDI => {
                let vid = text(captured, "rsp_20_47").get(8..16).unwrap_or_default();
                let after_s = argv.iter().skip_while(|word| **word != "-s").nth(1);
                let tag = match (text(captured, "rsp_result"), self.tags.get(vid)) {
                    ("0e", _) => after_s.unwrap().as_bytes(),
                    (_, Some(tag)) => tag,
                    _ => return payload,
                };
                payload[TAG..TAG + tag.len()].copy_from_slice(tag);
            }
            Opcode::GET_VDI_ATTR => {
                let words: Vec<&&str> = argv[2..].iter().filter(|word| **word != "-d").collect();
                payload[KEY] = words[1].as_bytes()[0];
                if argv[1] == "setattr" && words[2] != &"-p" {
                    payload[VALUE] = words[2].as_bytes()[0];
                    payload[TAG + 256 + 12] = 1;
                }
            }
            _ => {}
        }
        payload
    }

    fn exchange(&mut self, argv: &[&str], captured: &Value) -> Result<(), String> {
        let mut header = [0; Request::LEN];
        header[0] = number(captured, "proto_ver") as u8;
        header[1] = opcode(captured).0;
        header[2..4]
            .copy_from_slice(&u16::from_str_radix(text(captured, "flags"), 16).unwrap().to_le_bytes());
        header[4..8].copy_from_slice(&(number(captured, "epoch") as u32).to_le_bytes());
        header[16..].copy_from_slice(&bytes(text(captured, "body16_47")));
        let payload = self.payload(argv, captured, &header);
        let length = match captured["data_length"].as_u64() {
            Some(length) => length as u32,
            None => payload.len() as u32,
        };
        header[12..16].copy_from_slice(&length.to_le_bytes());
        let (answer, body) = self.send(number(captured, "to"), &header, &payload)?;
        let response = Response::from_bytes(&answer);
        let zeros = "0".repeat(56);
        let rest = captured["rsp_20_47"].as_str().unwrap_or(&zeros);
        let expected =
            format!("{} {} {rest}", text(captured, "rsp_result"), number(captured, "rsp_data_length"));
        let actual = format!("{:02x} {} {}", response.result.0, response.data_length, hex(&answer[20..]));
        if opcode(captured) == Opcode::READ_OBJ {
            self.last_read = body;
        }
        if fits(&expected, &actual) { Ok(()) } else { Err(format!("{actual} instead of {expected}")) }
    }
}
