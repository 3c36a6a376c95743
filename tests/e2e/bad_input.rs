//! Hostile and broken clients: everything is refused or ignored, memory stays bounded, nobody else notices.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use sheepdog_proto::header::{CoherenceRequest, ObjRequest, RefRequest, VdiRequest};
use sheepdog_proto::{Flags, Oid, Opcode, Request, ResultCode, VdiId};
use sheepdog_testkit::load::{Load, Region, Summary};
use sheepdog_testkit::{Builder, Client, Cluster, in_own_mounts, wait};

/// What a daemon may grow by under abuse. One honest 4 MiB write in flight on each of a few connections is allowed;
/// a payload announced and never sent is not.
const GROWTH: u64 = 256 << 20;

/// A cluster with honest clients at work on it.
struct Abused {
    cluster: Cluster,
    honest: Option<Load>,
    before: Vec<u64>,
}

impl Abused {
    fn start() -> Abused {
        Abused::on(Builder::new(3))
    }

    fn on(builder: Builder) -> Abused {
        let mut cluster = builder.start();
        let mut client = cluster.client();
        let vid = client.create_vdi("honest", 16 << 20).expect("create");
        let mut regions = Region::divide(&mut client, vid, 2).expect("regions");
        for region in &mut regions {
            region.settle(&mut client);
        }
        let ports = cluster.nodes.iter().map(|n| n.port).collect();
        let honest = Load::start(regions, ports, 1);
        wait("honest work", || honest.operations() > 20);
        let before = cluster.nodes.iter().map(|n| n.memory("VmRSS")).collect();
        Abused { cluster, honest: Some(honest), before }
    }

    fn port(&self) -> u16 {
        self.cluster.nodes[0].port
    }

    fn honest_operations(&self) -> u64 {
        self.honest.as_ref().expect("still at work").operations()
    }

    fn check_memory(&self) {
        for (node, before) in self.cluster.nodes.iter().zip(&self.before) {
            let now = node.memory("VmRSS");
            assert!(now < before + GROWTH, "node {} grew from {before} to {now}", node.index);
        }
    }

    /// Honest clients still work, lost nothing, and every daemon still runs and answers newcomers.
    fn finish(mut self) {
        let at = self.honest_operations();
        wait("honest clients to go on", || self.honest_operations() > at + 20);
        self.check_memory();
        let regions = self.honest.take().expect("still at work").stop();
        let summary = Summary::of(&regions);
        assert!(summary.errors.is_empty() && summary.violations.is_empty(), "{summary:?}");
        assert_eq!(summary.unknown, 0, "no honest connection was cut");
        assert_eq!(self.cluster.running(), [0, 1, 2]);
        for i in 0..3 {
            let mut client = self.cluster.nodes[i].client();
            assert!(client.lookup("honest", "", 0).is_ok(), "a newcomer at node {i}");
            for region in &regions {
                assert_eq!(region.verify(&mut client), Vec::<String>::new());
            }
        }
        self.cluster.wait_epoch(1);
    }
}

fn tcp(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).expect("connect");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
    stream.set_write_timeout(Some(Duration::from_secs(20))).expect("timeout");
    stream
}

/// Writes until done or refused; a refusal is fine.
fn push(mut stream: impl Write, bytes: &[u8]) {
    for part in bytes.chunks(64 << 10) {
        if stream.write_all(part).is_err() {
            return;
        }
    }
}

#[test]
fn garbage_on_port_and_socket_disturbs_nobody() {
    let abused = Abused::start();
    let mut random = SmallRng::seed_from_u64(7);
    let mut garbage = vec![0; 1 << 20];
    for round in 0..40 {
        random.fill_bytes(&mut garbage);
        if round % 4 == 1 {
            garbage[..16].fill(0xff);
        }
        let length = if round % 3 == 0 { random.random_range(0..200) } else { garbage.len() };
        if round % 2 == 0 {
            push(tcp(abused.port()), &garbage[..length]);
        } else {
            push(UnixStream::connect(abused.cluster.nodes[0].sock()).expect("socket"), &garbage[..length]);
        }
    }
    // The greetings of other protocols.
    let greetings: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"NBDMAGIC",
        b"SSH-2.0-x\r\n",
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",
    ];
    for text in greetings {
        push(tcp(abused.port()), &text.repeat(10));
    }
    abused.finish();
}

#[test]
fn truncated_frames_are_forgotten_with_their_connection() {
    let abused = Abused::start();
    let files = abused.cluster.nodes[0].open_files();
    let write = Request::new(Opcode::WRITE_OBJ).flag(Flags::WRITE).length(4 << 20).to_bytes();
    for cut in 0..48 {
        push(tcp(abused.port()), &write[..cut]);
    }
    for sent in [0, 1, 100, 65_536, (4 << 20) - 1] {
        for _ in 0..10 {
            push(tcp(abused.port()), &[write.as_slice(), &vec![1; sent]].concat());
        }
    }
    let node = &abused.cluster.nodes[0];
    wait("the connections to be closed", || node.open_files() <= files + 20);
    abused.finish();
}

#[test]
fn lengths_are_bounded_before_memory_is_taken() {
    let abused = Abused::start();
    let body = ObjRequest { oid: Oid::inode(VdiId::new(1)), ..ObjRequest::zeroed() };
    let mut open = Vec::new();
    for length in [u32::MAX, u32::MAX - 47, 1 << 31, (1 << 30) + 1] {
        for opcode in
            [Opcode::WRITE_OBJ, Opcode::NEW_VDI, Opcode::GET_VDI_ATTR, Opcode::WRITE_PEER, Opcode(0x10)]
        {
            for _ in 0..10 {
                let request = Request::new(opcode).flag(Flags::WRITE).with_obj(body);
                let header = Request { data_length: length, ..request }.to_bytes();
                let mut stream = tcp(abused.port());
                push(&mut stream, &header);
                push(&mut stream, &[0; 4096]);
                open.push(stream);
            }
        }
    }
    abused.check_memory();
    // Each of them is told or cut off, in bounded time; none waits for gigabytes.
    for mut stream in open {
        let mut answer = [0; 48];
        match stream.read(&mut answer) {
            Ok(0) => {}
            Ok(_) => assert_ne!(answer[16..20], [0; 4], "a success for a payload that never came"),
            Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::ConnectionReset, "{e}"),
        }
    }
    // Without WRITE the length is the room for an answer: a claim that costs nothing.
    let mut client = abused.cluster.nodes[0].client();
    let ops = [
        Opcode::READ_OBJ,
        Opcode::GET_OBJ_LIST,
        Opcode::GET_VDI_COPIES,
        Opcode::STAT_CLUSTER,
        Opcode::GET_NODE_LIST,
        Opcode::CLUSTER_INFO,
        Opcode::READ_VDIS,
        Opcode::MD_INFO,
        Opcode::GET_EPOCH,
        Opcode::READ_PEER,
    ];
    for opcode in ops {
        let request = Request { data_length: u32::MAX, ..Request::new(opcode).with_obj(body) };
        for _ in 0..5 {
            let (response, data) = client.must(request, &[]);
            assert!(data.len() < 4 << 20, "{opcode}: {} bytes", data.len());
            assert!(opcode != Opcode::READ_OBJ || !response.result.is_ok(), "4 GiB of an object");
        }
    }
    abused.finish();
}

/// Requests that must not be sent by this test, because they do what they say.
const MEANT: [Opcode; 3] = [Opcode::MAKE_FS, Opcode::SHUTDOWN, Opcode::KILL_NODE];

#[test]
fn every_opcode_with_nothing_and_with_nonsense_is_answered() {
    if in_own_mounts("bad_input::every_opcode_with_nothing_and_with_nonsense_is_answered") {
        return;
    }
    // REWEIGHT is among them, and what others write to a shared disk would make it spend an epoch.
    let abused = Abused::on(Builder::new(3).private_disk());
    let mut random = SmallRng::seed_from_u64(11);
    let mut client = abused.cluster.nodes[0].client();
    for code in 0..=255u8 {
        let opcode = Opcode(code);
        if MEANT.contains(&opcode) {
            continue;
        }
        for round in 0..4 {
            let mut request = Request::new(opcode);
            if round >= 2 {
                random.fill_bytes(&mut request.body);
            }
            let payload = if round % 2 == 1 { vec![round; 300] } else { Vec::new() };
            if round % 2 == 1 {
                request = request.flag(Flags::WRITE).length(payload.len());
            }
            let (response, _) = client
                .call(request, &payload)
                .unwrap_or_else(|e| panic!("{opcode} round {round} was not answered: {e}"));
            if opcode.name().is_none() {
                assert_eq!(response.result, ResultCode::INVALID_PARMS, "{opcode}");
            }
        }
    }
    abused.finish();
}

/// Single requests that ended the original (spec 01, section 20, row 4).
#[test]
fn requests_that_ended_the_original_are_refused() {
    let mut cluster = Cluster::new(2);
    let mut client = cluster.client();
    let vid = client.create_vdi("tagged", 4 << 20).expect("create");
    client.snapshot("tagged", "t").expect("snapshot");
    let mut result = |request: Request, payload: &[u8]| client.must(request, payload).0.result;

    let by_id = VdiRequest { snapid: 9, ..VdiRequest::zeroed() };
    let name = sheepdog_testkit::vdi::name_payload("tagged", None);
    let lookup = Request::new(Opcode::GET_VDI_INFO).flag(Flags::WRITE).with_vdi(by_id).length(256);
    assert_eq!(result(lookup, &name), ResultCode::NO_TAG);

    assert!(!result(Request::new(Opcode::MD_INFO).length(100), &[]).is_ok());
    assert_eq!(result(Request::new(Opcode::GET_NODE_LIST), &[]), ResultCode::BUFFER_SMALL);
    let fixed = [
        Opcode::GET_LOGLEVEL,
        Opcode::STAT,
        Opcode::STAT_RECOVERY,
        Opcode::CLUSTER_INFO,
        Opcode::GET_VNODES,
        Opcode::GET_RECOVERY,
    ];
    for opcode in fixed {
        assert_eq!(result(Request::new(opcode), &[]), ResultCode::INVALID_PARMS, "{opcode}");
    }
    for opcode in [Opcode::SET_LOGLEVEL, Opcode::SET_RECOVERY, Opcode::SET_VNODES] {
        let short = Request::new(opcode).flag(Flags::WRITE).length(2);
        assert!(!result(short, &[0; 2]).is_ok(), "{opcode}");
    }
    for validate in [0, 1] {
        let body = CoherenceRequest { vid, validate };
        let request = Request::new(Opcode::INODE_COHERENCE).with_coherence(body);
        assert_eq!(result(request, &[]), ResultCode::NO_VDI, "not a shared VDI");
    }
    for generation in [i32::MAX as u32, u32::MAX, (1 << 20) - 1] {
        let body = RefRequest { oid: Oid::ledger_of(Oid::data(vid, 0)), generation, count: 1 };
        assert_eq!(
            result(Request::new(Opcode::DECREF_OBJ).with_reference(body), &[]),
            ResultCode::INVALID_PARMS
        );
    }
    assert_eq!(result(Request::new(Opcode(0xff)), &[]), ResultCode::INVALID_PARMS);
    assert_eq!(cluster.running(), [0, 1]);
}

fn raise_descriptors(needed: u64) {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    assert!(hard >= needed, "the hard limit of open files is {hard}; this test needs {needed} (ulimit -Hn)");
    setrlimit(Resource::RLIMIT_NOFILE, needed, hard).expect("raising the soft limit");
}

#[test]
fn ten_thousand_idle_connections_leave_the_daemon_serving() {
    const IDLE: usize = 10_000;
    raise_descriptors(IDLE as u64 + 500);
    let abused = Abused::start();
    let half_a_header = [2u8; 20];
    let mut idle = Vec::with_capacity(IDLE);
    for i in 0..IDLE {
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", abused.port())) else {
            // Refusing is an answer too, as long as the others are served.
            break;
        };
        if i % 5 == 0 {
            let _refused = stream.write_all(&half_a_header);
        }
        idle.push(stream);
    }
    assert!(idle.len() >= IDLE / 2, "only {} connections", idle.len());
    abused.check_memory();
    let at = abused.honest_operations();
    wait("honest clients to go on among the idle ones", || abused.honest_operations() > at + 50);
    let mut sock = abused.cluster.nodes[0].unix_client();
    assert!(sock.lookup("honest", "", 0).is_ok(), "over the socket");
    let other = abused.cluster.nodes[1].port;
    assert!(Client::connect(other).expect("connect").lookup("honest", "", 0).is_ok(), "at another node");
    drop(idle);
    let node = &abused.cluster.nodes[0];
    wait("the connections to be closed", || node.open_files() < 500);
    abused.finish();
}
