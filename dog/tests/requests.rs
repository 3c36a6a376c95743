//! The requests of the main commands, against those that the original sent (`dog-requests.json`).
//!
//! Every request that changes something must be sent with the captured bytes; requests that read are free to be fewer
//! or smaller (spec 07, 19.3), but what is sent must be among the captured ones.

#![allow(clippy::unwrap_used)] // the vectors are trusted

mod common;
mod fake_sheep;

use std::collections::HashMap;
use std::path::Path;

use common::{Scenario, load, output_key, run, stdin_of};
use fake_sheep::{FakeCluster, Recorded};
use serde_json::Value;
use sheepdog_proto::{Opcode, Request, ResultCode, Wire};

const HEAD: usize = 64;

/// A request in the form of the vectors.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sent {
    to: u64,
    opcode: Opcode,
    /// Version, flags, epoch, data length.
    header: [u64; 4],
    /// Bytes 16..48 of the header, in hex; `x` varies.
    body: String,
    /// Length of the payload and its beginning in hex.
    payload: Option<(u64, String)>,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn padded(head: &str, length: u64) -> String {
    format!("{head:0<width$}", width = 2 * HEAD.min(length as usize))
}

impl Sent {
    fn recorded(entry: &Recorded) -> Sent {
        let Recorded { port, request, payload, .. } = entry;
        let length = payload.len() as u64;
        let head = hex(&payload[..payload.len().min(HEAD)]);
        Sent {
            to: u64::from(*port),
            opcode: request.opcode,
            header: [
                request.version.into(),
                request.flags.0.into(),
                request.epoch.0.into(),
                request.data_length.into(),
            ],
            body: hex(&request.body),
            payload: (length > 0).then_some((length, head)),
        }
    }

    fn captured(value: &Value, scenario: &Scenario) -> Sent {
        let text = |name: &str| value[name].as_str().unwrap_or("").to_string();
        let number = |name: &str| value[name].as_u64();
        let op = u8::from_str_radix(&text("op")[..2], 16).unwrap();
        let flags = u64::from_str_radix(&text("flags"), 16).unwrap();
        let sent_text = scenario.text("sent_text", &value["sent_text"]).map(|t| t.into_bytes());
        let (length, payload) = match sent_text {
            Some(mut bytes) => {
                bytes.push(0);
                let length = bytes.len() as u64;
                (length, Some((length, hex(&bytes[..bytes.len().min(HEAD)]))))
            }
            None => {
                let sent = number("sent").map(|length| (length, padded(&text("sent_head"), length)));
                (number("data_length").unwrap(), sent)
            }
        };
        Sent {
            to: number("to").unwrap(),
            opcode: Opcode(op),
            header: [number("proto_ver").unwrap(), flags, number("epoch").unwrap(), length],
            body: text("body16_47"),
            payload,
        }
    }

    /// `self` is captured: an `x` stands for any digit.
    fn covers(&self, other: &Sent) -> bool {
        let digits = |a: &str, b: &str| {
            a.len() == b.len() && a.bytes().zip(b.bytes()).all(|(a, b)| a == b'x' || a == b)
        };
        let zeros = |head: &str| head.bytes().all(|b| b == b'0');
        let mut header = self.header;
        let payload = match (&self.payload, &other.payload) {
            (None, None) => true,
            // Clearing a map stops at its last used entry.
            (Some((a, x)), Some((b, y))) if b < a && zeros(x) && zeros(y) => {
                header[3] = *b;
                true
            }
            (Some((a, x)), Some((b, y))) => a == b && digits(x, y),
            _ => false,
        };
        self.opcode == other.opcode
            && self.to == other.to
            && header == other.header
            && digits(&self.body, &other.body)
            && payload
    }

    /// Whether the request only asks for something.
    fn only_reads(&self) -> bool {
        matches!(
            self.opcode,
            Opcode::READ_OBJ
                | Opcode::GET_VDI_INFO
                | Opcode::READ_VDIS
                | Opcode::READ_DEL_VDIS
                | Opcode::GET_NODE_LIST
                | Opcode::STAT_CLUSTER
                | Opcode::STAT_SHEEP
                | Opcode::STAT_RECOVERY
                | Opcode::STAT
                | Opcode::CLUSTER_INFO
                | Opcode::EXIST
                | Opcode::GET_HASH
                | Opcode::OIDS_EXIST
                | Opcode::MD_INFO
                | Opcode::GET_RECOVERY
                | Opcode::GET_LOGLEVEL
                | Opcode::GET_VDI_COPIES
        )
    }

    /// Reads of inodes are made in other pieces.
    fn reads_inode(&self) -> bool {
        self.opcode == Opcode::READ_OBJ && self.body.as_bytes()[14] == b'8'
    }
}

/// What differs between the captured and the sent requests of a command.
fn differences(captured: &[Sent], sent: &[Sent]) -> Vec<String> {
    let mut left: Vec<&Sent> = captured.iter().collect();
    let mut problems = Vec::new();
    for request in sent.iter().filter(|r| !r.reads_inode()) {
        match left.iter().position(|c| c.covers(request)) {
            Some(at) => drop(left.remove(at)),
            None => problems.push(format!("sent     {request:?}")),
        }
    }
    problems.extend(left.iter().filter(|c| !c.only_reads()).map(|c| format!("not sent {c:?}")));
    problems
}

/// Commands whose requests differ on purpose, or that the cluster in memory cannot serve.
fn is_skipped(argv: &[String]) -> bool {
    let words: Vec<&str> = argv.iter().map(String::as_str).collect();
    matches!(
        words.as_slice(),
        // Only the fields that change are written.
        ["vdi", "resize" | "alter-copy", ..]
            // Placement and strips.
            | ["vdi", "check", ..]
            | ["cluster", "check" | "snapshot", ..]
            // Other releases.
            | ["benchmark", ..]
    )
}

#[test]
fn requests_that_change_something_have_the_captured_bytes() {
    let vectors = load("dog-requests.json");
    let cluster = FakeCluster::start(6);
    let address = cluster.address.to_string();
    let replace = vec![("127.0.0.1", address.clone()), ("<C>", "/c".into()), ("<T>", "/t".into())];
    let scenario = Scenario::new(&[], replace);
    let env = [("SHEEPDOG_DOG_ADDR".to_string(), address)];
    let (mut outputs, mut previous) = (HashMap::new(), Vec::new());
    let (mut checked, mut failures, mut left_out) = (0, Vec::new(), Vec::new());
    for entry in vectors["commands"].as_array().unwrap() {
        let argv = scenario.argv(entry);
        if matches!(argv[1].as_str(), "snapshot") && argv[0] == "cluster" || argv[0] == "benchmark" {
            left_out.push(argv.join(" "));
            continue;
        }
        cluster.state.lock().unwrap().log.clear();
        outputs.insert("the previous command".to_string(), previous);
        let result = run(Path::new(env!("CARGO_BIN_EXE_dog")), &argv, &env, &stdin_of(entry, &outputs));
        let log = std::mem::take(&mut cluster.state.lock().unwrap().log);
        outputs.insert(output_key(&argv), result.stdout.clone());
        previous = result.stdout;
        let requests = entry["requests"].as_array().unwrap();
        if is_skipped(&argv) || requests.len() as u64 != entry["n_requests"].as_u64().unwrap() {
            left_out.push(argv.join(" "));
            continue;
        }
        let captured: Vec<Sent> = requests.iter().map(|r| Sent::captured(r, &scenario)).collect();
        let sent: Vec<Sent> = log.iter().map(Sent::recorded).collect();
        let mut problems = differences(&captured, &sent);
        if entry["rc"].as_i64() != Some(i64::from(result.rc)) {
            problems.push(format!("status {}: {}", result.rc, String::from_utf8_lossy(&result.stderr)));
        }
        checked += 1;
        failures.extend((!problems.is_empty()).then(|| format!("{argv:?}\n  {}", problems.join("\n  "))));
    }
    println!(
        "requests: those of {} of {checked} commands pass; left out: {left_out:#?}",
        checked - failures.len()
    );
    assert!(failures.is_empty(), "{} of {checked} differ:\n{}", failures.len(), failures.join("\n"));
    // Those of `is_skipped`; `docs/compatibility.md` says why.
    assert_eq!(left_out.len(), 10, "{left_out:#?}");
}

#[test]
fn a_block_is_entered_in_the_map_only_after_it_exists() {
    let cluster = FakeCluster::start(3);
    let env = [("SHEEPDOG_DOG_ADDR".to_string(), cluster.address.to_string())];
    let dog = |line: &str, stdin: &[u8]| {
        let args: Vec<String> =
            line.split(' ').map(String::from).chain(["-p".into(), "7700".into()]).collect();
        let result = run(Path::new(env!("CARGO_BIN_EXE_dog")), &args, &env, stdin);
        assert_eq!(result.rc, 0, "{line}: {}", String::from_utf8_lossy(&result.stderr));
        result.stdout
    };
    dog("cluster format -V -c 2", b"");
    dog("vdi create v 80M", b"");
    let data: Vec<u8> = (0..80u32 << 18).flat_map(|i| i.to_le_bytes()).collect();
    cluster.state.lock().unwrap().log.clear();
    dog("vdi write v", &data);
    let log = std::mem::take(&mut cluster.state.lock().unwrap().log);
    let at = |wanted: &dyn Fn(&Request) -> bool| log.iter().position(|r| wanted(&r.request)).unwrap();
    for index in 0..20 {
        let created = at(&|r| r.opcode == Opcode::CREATE_AND_WRITE_OBJ && r.obj().oid.index() == index);
        let entered = at(&|r| r.opcode == Opcode::WRITE_OBJ && r.obj().offset == 4664 + 4 * index);
        assert!(created < entered, "block {index}");
        assert_eq!(log[entered].payload, log[entered].request.obj().oid.vid().encode());
    }
    assert!(dog("vdi read v", b"") == data, "what was written is read back");
}

#[test]
fn eight_objects_are_checked_at_the_same_time() {
    let cluster = FakeCluster::start(1);
    let env = [("SHEEPDOG_DOG_ADDR".to_string(), cluster.address.to_string())];
    let dog = |line: &str| {
        let args: Vec<String> =
            line.split(' ').map(String::from).chain(["-p".into(), "7700".into()]).collect();
        let result = run(Path::new(env!("CARGO_BIN_EXE_dog")), &args, &env, b"");
        assert_eq!(result.rc, 0, "{line}: {}", String::from_utf8_lossy(&result.stderr));
        result.stdout
    };
    dog("cluster format -V -c 1");
    dog("vdi create -P v 60M");
    // The inode and 15 blocks, twice eight: fewer at a time would wait for each other for ever.
    cluster.state.lock().unwrap().hashes_together = 8;
    assert!(dog("vdi check v").ends_with(b"finish check&repair v\n"));
    let log = std::mem::take(&mut cluster.state.lock().unwrap().log);
    assert_eq!(log.iter().filter(|r| r.request.opcode == Opcode::GET_HASH).count(), 16);
}

#[test]
fn the_tag_of_a_snapshot_goes_only_if_it_was_refused() {
    let cluster = FakeCluster::start(1);
    let env = [("SHEEPDOG_DOG_ADDR".to_string(), cluster.address.to_string())];
    let dog = |line: &str| {
        let args: Vec<String> =
            line.split(' ').map(String::from).chain(["-p".into(), "7700".into()]).collect();
        run(Path::new(env!("CARGO_BIN_EXE_dog")), &args, &env, b"")
    };
    let tags = || String::from_utf8(dog("vdi list -r").stdout).unwrap();
    assert_eq!(dog("cluster format -V -c 1").rc, 0);
    assert_eq!(dog("vdi create v 8M").rc, 0);
    cluster.state.lock().unwrap().refuse = Some((Opcode::NEW_VDI, ResultCode::FULL_VDI));
    assert_eq!(dog("vdi snapshot v -s refused").rc, 1);
    assert!(!tags().contains("refused"), "{}", tags());
    cluster.state.lock().unwrap().refuse = None;
    cluster.state.lock().unwrap().lose_answer = Some(Opcode::NEW_VDI);
    assert_eq!(dog("vdi snapshot v -s taken").rc, 2);
    assert!(
        tags().lines().any(|line| line.starts_with("s v 1 ") && line.ends_with(" taken 22")),
        "{}",
        tags()
    );
}
