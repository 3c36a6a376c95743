//! What becomes of locks when their client dies (spec 05, 16; 01, 17.4): released when nobody can be left who writes, and
//! else kept.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;
use sheepdog_proto::header::VdiRequest;
use sheepdog_proto::{ClusterFlags, Oid, Opcode, ResultCode, VdiId};
use sheepdog_testkit::{Builder, Client, Cluster, wait, wait_for};

use crate::locks::lock_state;
use crate::qemu::{Session, img, io, io_output, tcp, unix};
use crate::tgt::{self, Target};

fn builder() -> Builder {
    Builder::new(3).flags(ClusterFlags::AUTO_VNODES.with(ClusterFlags::USE_LOCK))
}

fn kill9(session: &mut Session) {
    session.child.kill().expect("it runs");
    session.child.wait().expect("it ends");
}

fn is_locked(image: &str) -> bool {
    let output = io_output(image, &["read 0 512"]);
    assert!(output.code == 0 || output.stderr.contains("locked"), "{output:?}");
    output.code != 0
}

fn lock(client: &mut Client, name: &str) -> ResultCode {
    client.vdi_op(Opcode::LOCK_VDI, name, Some(""), VdiRequest::zeroed()).result
}

/// As QEMU opens: the lock over a connection of its own.
fn open(mut control: Client, io: &mut Client, name: &str) -> VdiId {
    assert_eq!(lock(&mut control, name), ResultCode::SUCCESS);
    let vid = io.lookup(name, "", 0).expect("there");
    assert_eq!(io.read_obj(Oid::inode(vid), 0, 4664).expect("an answer").0.result, ResultCode::SUCCESS);
    vid
}

fn on_all_nodes(cluster: &mut Cluster, expected: usize) {
    for node in 0..3 {
        wait(&format!("{expected} locks at node {node}"), || {
            cluster.dog_at(node, &["vdi", "lock", "list"], &[]).ok().lines().count() - 1 == expected
        });
    }
}

#[test]
fn an_image_whose_client_was_killed_opens_again() {
    let mut cluster = builder().start();
    let image = unix(&cluster, 0, "vm");
    img(&["create", "-f", "raw", &image, "64M"]);
    for round in 1..4 {
        let mut session = Session::open(&image);
        session.say(&format!("write -P {round} 0 6M"));
        if round == 2 {
            // The lock goes along to the working VDI, and is released there.
            cluster.dog_at(1, &["vdi", "snapshot", "vm", "-s", "s"], &[]).ok();
        }
        assert!(is_locked(&image));
        kill9(&mut session);
        // Through the same sheep at once, through another as soon as it has heard.
        if round % 2 == 1 {
            io(&image, &[&format!("read -P {round} 0 6M")]);
        } else {
            wait("the image to open", || !is_locked(&tcp(&cluster, 1, "vm")));
        }
        on_all_nodes(&mut cluster, 0);
    }
    // In the middle of writes, what it sent is executed or forgotten before anybody else gets in.
    for round in 10..20_u64 {
        let mut session = Session::open(&image);
        session.say("write -P 1 0 64k");
        for block in 0..16 {
            let line = format!("aio_write -P {round} {}k 512k\n", block * 4096);
            session.stdin.write_all(line.as_bytes()).expect("qemu-io listens");
        }
        std::thread::sleep(Duration::from_millis(round - 10));
        kill9(&mut session);
        let write: Vec<String> = (0..16).map(|b| format!("write -P 99 {}k 512k", b * 4096)).collect();
        let read: Vec<String> = (0..16).map(|b| format!("read -P 99 {}k 512k", b * 4096)).collect();
        io(&image, &write.iter().chain(&read).map(String::as_str).collect::<Vec<_>>());
        io(&image, &read.iter().map(String::as_str).collect::<Vec<_>>());
    }
    on_all_nodes(&mut cluster, 0);
    cluster.assert_replicas_equal(3);
}

/// QEMU keeps the lock of a snapshot that it opened and wrote to; it goes with the process.
#[test]
fn what_a_client_forgets_to_release_goes_with_its_process() {
    let mut cluster = builder().start();
    let image = unix(&cluster, 0, "vm");
    img(&["create", "-f", "raw", &image, "16M"]);
    io(&image, &["write -P 1 0 1M"]);
    img(&["snapshot", "-c", "s", &image]);
    let snapshot = unix(&cluster, 0, "vm#s");
    for _ in 0..2 {
        io(&snapshot, &["write -P 2 0 512k"]);
        on_all_nodes(&mut cluster, 0);
    }
    io(&image, &["read -P 2 0 512k", "read -P 1 512k 512k"]);
}

#[test]
fn a_process_that_lives_keeps_its_lock_without_a_connection() {
    let mut cluster = builder().arg("--lock-grace").arg("1").start();
    cluster.dog(&["vdi", "create", "vm", "16M"]).ok();
    let mut connection = cluster.nodes[0].unix_client();
    let vid = open(cluster.nodes[0].unix_client(), &mut connection, "vm");
    drop(connection);
    // Long enough for the lock of a process that dies meanwhile to be released.
    img(&["create", "-f", "raw", &unix(&cluster, 0, "other"), "16M"]);
    let mut session = Session::open(&unix(&cluster, 0, "other"));
    session.say("write -P 1 0 1M");
    kill9(&mut session);
    wait("the other one's lock to go", || !is_locked(&tcp(&cluster, 1, "other")));
    std::thread::sleep(Duration::from_secs(2)); // the grace, which does not count for it
    assert!(is_locked(&unix(&cluster, 0, "vm")) && is_locked(&tcp(&cluster, 1, "vm")));
    assert_eq!(lock_state(&cluster, vid), json!({"lock_state": "LOCKED", "owner_node": 0}));
    // It is back, and writes as before.
    let code = cluster.nodes[0].unix_client().create_obj(Oid::data(vid, 0), None, 0, &[7; 512]);
    assert_eq!(code.expect("an answer"), ResultCode::SUCCESS);
}

/// Whoever locked may have done so for somebody else, who is there.
#[test]
fn a_lock_stays_while_others_use_the_vdi() {
    let cluster = builder().start();
    let image = unix(&cluster, 0, "vm");
    img(&["create", "-f", "raw", &image, "16M"]);
    let mut session = Session::open(&image);
    session.say("write -P 1 0 1M");
    let mut other = cluster.nodes[0].client();
    let vid = other.lookup("vm", "", 0).expect("there");
    let code = other.write_obj(Oid::data(vid, 0), 0, &[2; 512]).expect("an answer");
    assert_eq!(code, ResultCode::SUCCESS);
    kill9(&mut session);
    for _ in 0..5 {
        assert!(is_locked(&image), "a connection that wrote is open");
    }
    drop(other);
    wait("the image to open", || !is_locked(&image));
    // The same of a process: without a connection, but alive.
    let mut session = Session::open(&image);
    session.say("write -P 1 0 1M");
    let mut other = cluster.nodes[0].unix_client();
    let code = other.write_obj(Oid::data(vid, 0), 0, &[2; 512]).expect("an answer");
    assert_eq!(code, ResultCode::SUCCESS);
    drop(other);
    kill9(&mut session);
    for _ in 0..5 {
        assert!(is_locked(&image), "this process wrote");
    }
}

#[test]
fn over_tcp_a_lock_outlives_its_client_unless_there_is_a_grace() {
    for grace in [false, true] {
        let builder = if grace { builder().arg("--lock-grace").arg("3") } else { builder() };
        let mut cluster = builder.start();
        let image = tcp(&cluster, 0, "vm");
        img(&["create", "-f", "raw", &image, "16M"]);
        let mut session = Session::open(&image);
        session.say("write -P 1 0 1M");
        kill9(&mut session);
        assert!(is_locked(&image));
        if grace {
            wait("the image to open", || !is_locked(&tcp(&cluster, 1, "vm")));
            assert!(cluster.nodes[0].log().contains("had no connection for 3 s"));
            on_all_nodes(&mut cluster, 0);
        } else {
            std::thread::sleep(Duration::from_secs(4));
            assert!(is_locked(&image));
            cluster.dog(&["vdi", "lock", "unlock", "vm"]).ok();
        }
        io(&image, &["read -P 1 0 1M"]);
    }
}

/// Connections to a sheep that can be cut.
struct Proxy {
    port: u16,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl Proxy {
    fn start(to: u16) -> Proxy {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let open: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
        let streams = open.clone();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (Ok(client), Ok(sheep)) = (client, TcpStream::connect(("127.0.0.1", to))) else { return };
                for (mut from, mut into) in
                    [(&client, &sheep), (&sheep, &client)].map(|(a, b)| (clone(a), clone(b)))
                {
                    std::thread::spawn(move || {
                        let mut buffer = [0; 65536];
                        while let Ok(n @ 1..) = from.read(&mut buffer) {
                            if into.write_all(&buffer[..n]).is_err() {
                                break;
                            }
                        }
                        let _ = into.shutdown(Shutdown::Both);
                    });
                }
                streams.lock().expect("no panic").extend([client, sheep]);
            }
        });
        Proxy { port, open }
    }

    fn cut(&self) {
        for stream in self.open.lock().expect("no panic").drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn clone(stream: &TcpStream) -> TcpStream {
    stream.try_clone().expect("a second descriptor")
}

/// QEMU reconnects without locking again: within the grace it finds its lock.
#[test]
fn a_client_that_comes_back_within_the_grace_keeps_its_lock() {
    let cluster = builder().arg("--lock-grace").arg("6").start();
    img(&["create", "-f", "raw", &tcp(&cluster, 0, "vm"), "64M"]);
    let proxy = Proxy::start(cluster.nodes[0].port);
    let mut session = Session::open(&format!("sheepdog://127.0.0.1:{}/vm", proxy.port));
    session.say("write -P 1 0 1M");
    for round in 2..6 {
        proxy.cut();
        session.say(&format!("write -P {round} 0 1M"));
        std::thread::sleep(Duration::from_secs(2));
    }
    assert!(is_locked(&tcp(&cluster, 0, "vm")) && is_locked(&tcp(&cluster, 1, "vm")));
    assert!(!cluster.nodes[0].log().contains("released the lock"));
    kill9(&mut session);
    wait("the image to open", || !is_locked(&tcp(&cluster, 1, "vm")));
    io(&tcp(&cluster, 0, "vm"), &["read -P 5 0 1M"]);
}

/// One that comes back later writes nothing beside the next holder, wherever that one is.
#[test]
fn a_client_that_was_given_up_writes_no_more() {
    let mut cluster = builder().arg("--lock-grace").arg("2").start();
    cluster.dog(&["vdi", "create", "vm", "16M"]).ok();
    let mut lost = cluster.nodes[0].client();
    let vid = open(cluster.nodes[0].client(), &mut lost, "vm");
    let write = |client: &mut Client| client.write_obj(Oid::data(vid, 0), 0, &[1; 512]).expect("an answer");
    assert_eq!(
        lost.create_obj(Oid::data(vid, 0), None, 0, &[1; 512]).expect("an answer"),
        ResultCode::SUCCESS
    );
    drop(lost);
    wait("the lock to be released", || lock(&mut cluster.nodes[1].client(), "vm") == ResultCode::SUCCESS);
    // Node 0 hears of it a moment after node 1.
    wait("the lost one to be refused", || write(&mut cluster.nodes[0].client()) == ResultCode::VDI_LOCKED);
    assert_eq!(write(&mut cluster.nodes[2].client()), ResultCode::VDI_LOCKED, "through any other node");
    assert_eq!(write(&mut cluster.nodes[1].client()), ResultCode::SUCCESS, "the holder's node");
    let table = cluster.nodes[0].client().write_obj(Oid::inode(vid), 4664, &vid.get().to_le_bytes());
    assert_eq!(table.expect("an answer"), ResultCode::VDI_LOCKED);
    cluster.dog_at(1, &["vdi", "lock", "unlock", "vm"], &[]).ok();
    // The next holder is at the lost one's node, by the Unix socket.
    wait("no lock at node 0", || lock_state(&cluster, vid) == json!({"lock_state": "UNLOCKED"}));
    let mut session = Session::open(&unix(&cluster, 0, "vm"));
    session.say("write -P 2 0 1M");
    assert_eq!(write(&mut cluster.nodes[0].client()), ResultCode::VDI_LOCKED);
    session.say("write -P 3 0 1M");
    kill9(&mut session);
    // Nobody holds it: as without locks.
    wait("the lock to go", || lock_state(&cluster, vid) == json!({"lock_state": "UNLOCKED"}));
    assert_eq!(write(&mut cluster.nodes[0].client()), ResultCode::SUCCESS);
}

/// A sheep that is asked for a lock by its own NBD server, or by a tool that only locks, keeps it.
#[test]
fn a_lock_that_was_only_taken_is_kept() {
    let mut cluster = builder().arg("--lock-grace").arg("1").start();
    cluster.dog(&["vdi", "create", "vm", "16M"]).ok();
    assert_eq!(lock(&mut cluster.nodes[0].client(), "vm"), ResultCode::SUCCESS);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(lock(&mut cluster.nodes[0].client(), "vm"), ResultCode::VDI_LOCKED);
}

/// 01, 17.4: a target that died gets its unit again through the same sheep, and the others need not wait for it.
#[test]
fn a_target_that_was_killed_starts_again() {
    let mut cluster = builder().start();
    cluster.dog(&["vdi", "create", "shared", "64M"]).ok();
    let vid = cluster.client().lookup("shared", "", 0).expect("there");
    let mut a = Target::start(&cluster, 0, "sheepdog", &tgt::unix(&cluster, 0, "shared"));
    let b = Target::start(&cluster, 1, "sheepdog", &tgt::unix(&cluster, 1, "shared"));
    tgt::io(&a, &["write -P 1 0 1M"]);
    tgt::io(&b, &["write -P 2 1M 1M", "read -P 1 0 1M"]);
    a.kill9();
    wait_for("the dead one's part to go", Duration::from_secs(30), || {
        let state = lock_state(&cluster, vid);
        (state["participants"].as_array().map(Vec::len) == Some(1)).then_some(())
    });
    tgt::io(&b, &["write -P 3 8M 1M"]);
    let mut again = Target::start(&cluster, 2, "sheepdog", &tgt::unix(&cluster, 0, "shared"));
    tgt::io(&again, &["read -P 3 8M 1M", "write -P 4 8M 512k"]);
    tgt::io(&b, &["read -P 4 8M 512k"]);
    // At once.
    again.kill9();
    let third = Target::start(&cluster, 0, "sheepdog", &tgt::unix(&cluster, 0, "shared"));
    tgt::io(&third, &["read -P 4 8M 512k"]);
    drop((third, b));
    wait("both parts to go", || lock_state(&cluster, vid) == json!({"lock_state": "UNLOCKED"}));
}
