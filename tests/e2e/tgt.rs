//! tgt's Sheepdog backing store, set up as its users do (spec 01, 17; spec 08, 5.1): one target, several targets that
//! share a VDI through different sheep, failover. Initiators are libiscsi's tools and QEMU 5.2 (`scripts/qemu-sheepdog`).

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use sheepdog_proto::header::{ObjRequest, VdiRequest};
use sheepdog_proto::inode::{self, GREF_OFFSET, table_offset};
use sheepdog_proto::{ClusterFlags, Flags, Oid, Opcode, Request, ResultCode, VdiId};
use sheepdog_testkit::binaries::{qemu_sheepdog, system};
use sheepdog_testkit::{Builder, Cluster, Output, in_own_network, wait, wait_for};

const TARGET: &str = "iqn.2013-10.org.sheepdog-project";

fn cluster() -> Cluster {
    Builder::new(3).flags(ClusterFlags::AUTO_VNODES.with(ClusterFlags::USE_LOCK)).start()
}

/// A tgtd with one target and one unit.
pub(crate) struct Target {
    child: Child,
    socket: PathBuf,
    port: u16,
}

impl Target {
    /// Starts tgtd number `n` and gives it a unit on this backing store.
    pub(crate) fn start(cluster: &Cluster, n: usize, kind: &str, store: &str) -> Target {
        let target = Target::bare(cluster, n);
        target.ok(&["--op", "new", "--mode", "target", "--tid", "1", "-T", TARGET]);
        target.ok(&[
            "--op",
            "new",
            "--mode",
            "logicalunit",
            "--tid",
            "1",
            "--lun",
            "1",
            "--bstype",
            kind,
            "--backing-store",
            store,
        ]);
        target.ok(&["--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL"]);
        target
    }

    fn bare(cluster: &Cluster, n: usize) -> Target {
        let socket = cluster.dir().join(format!("tgt{n}"));
        let port = cluster.spare_port(n);
        let log = std::fs::File::create(cluster.dir().join(format!("tgtd{n}.log"))).expect("a log");
        let child = Command::new(system("tgtd", "tgt"))
            .args(["-f", "-C", "0", "--iscsi", &format!("portal=127.0.0.1:{port}")])
            .env("TGT_IPC_SOCKET", &socket)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second descriptor"))
            .stderr(log)
            .spawn()
            .unwrap_or_else(|e| panic!("tgtd: {e}"));
        let target = Target { child, socket, port };
        wait("tgtd to answer", || target.admin(&["--op", "show", "--mode", "target"]).code == 0);
        target
    }

    fn admin(&self, args: &[&str]) -> Output {
        let output = Command::new(system("tgtadm", "tgt"))
            .args(["-C", "0", "--lld", "iscsi"])
            .args(args)
            .env("TGT_IPC_SOCKET", &self.socket)
            .stdin(Stdio::null())
            .output()
            .unwrap_or_else(|e| panic!("tgtadm: {e}"));
        Output::of(output)
    }

    fn ok(&self, args: &[&str]) {
        let output = self.admin(args);
        assert_eq!(output.code, 0, "tgtadm {args:?}: {output:?}");
    }

    fn url(&self) -> String {
        format!("iscsi://127.0.0.1:{}/{TARGET}/1", self.port)
    }

    /// Takes the unit away: the VDI's lock is given back.
    fn remove_unit(&self) {
        self.ok(&["--op", "delete", "--mode", "logicalunit", "--tid", "1", "--lun", "1"]);
    }

    pub(crate) fn kill9(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.kill9();
    }
}

pub(crate) fn unix(cluster: &Cluster, node: usize, vdi: &str) -> String {
    format!("unix:{}:{vdi}", cluster.nodes[node].sock().display())
}

/// qemu-io over iSCSI.
fn io_output(target: &Target, commands: &[&str]) -> Output {
    let mut command = Command::new(qemu_sheepdog("qemu-io"));
    command.args(["-f", "raw", "-t", "none"]);
    for c in commands {
        command.args(["-c", c]);
    }
    let output = command.arg(target.url()).stdin(Stdio::null()).output().expect("qemu-io");
    let output = Output::of(output);
    eprintln!("{commands:?}\n{}{}", output.stdout, output.stderr);
    output
}

pub(crate) fn io(target: &Target, commands: &[&str]) {
    let output = io_output(target, commands);
    let text = output.stdout.clone() + &output.stderr;
    output.ok();
    assert!(!text.contains("failed"), "{text}");
}

fn libiscsi(program: &str, args: &[&str]) -> Output {
    let output = Command::new(system(program, "libiscsi-bin")).args(args).output().expect("a libiscsi tool");
    let output = Output::of(output);
    eprintln!("{program} {args:?}\n{}{}", output.stdout, output.stderr);
    output
}

fn locks(cluster: &mut Cluster) -> usize {
    cluster.dog(&["vdi", "lock", "list"]).ok().lines().count() - 1
}

#[test]
fn a_vdi_is_a_unit_of_its_size_and_keeps_what_is_written() {
    let mut cluster = cluster();
    cluster.dog(&["vdi", "create", "tgt0", "64M"]).ok();
    let target = Target::start(&cluster, 0, "sheepdog", &unix(&cluster, 0, "tgt0"));
    let list = libiscsi("iscsi-ls", &["-s", &format!("iscsi://127.0.0.1:{}", target.port)]).ok();
    // The tool rounds down from the last byte.
    assert!(list.contains(TARGET) && (list.contains("Size:63M") || list.contains("Size:64M")), "{list}");
    libiscsi("iscsi-inq", &[&target.url()]).ok();
    let capacity = libiscsi("iscsi-readcapacity16", &[&target.url()]).ok();
    assert!(capacity.contains("67108864") || capacity.contains("131071"), "{capacity}");
    assert_eq!(locks(&mut cluster), 1);
    io(
        &target,
        &[
            "write -P 1 0 9M",
            "write -P 2 4190208 8192",
            "write -P 3 60M 4M",
            "flush",
            "read -P 1 0 4190208",
            "read -P 2 4190208 8192",
            "read -P 3 60M 4M",
            "aio_write -P 4 16M 4M",
            "aio_write -P 5 20M 2M",
            "aio_flush",
            "read -P 4 16M 4M",
            "read -P 5 20M 2M",
        ],
    );
    // A snapshot by somebody else while the unit is in use.
    cluster.dog_at(1, &["vdi", "snapshot", "tgt0", "-s", "s"], &[]).ok();
    io(
        &target,
        &["write -P 6 0 1M", "read -P 6 0 1M", "read -P 1 1M 2M", "write -P 7 32M 64k", "read -P 7 32M 64k"],
    );
    let old = cluster.dog(&["vdi", "read", "tgt0", "0", "16", "-s", "s"]).ok();
    assert_eq!(old.as_bytes(), [1; 16]);
    let new = cluster.dog(&["vdi", "read", "tgt0", "0", "16"]).ok();
    assert_eq!(new.as_bytes(), [6; 16]);
    target.remove_unit();
    drop(target);
    cluster.assert_replicas_equal(3);
}

/// The TCP form takes ports of at most four digits (01, 17), so the test needs fixed ones.
#[test]
fn a_vdi_is_reached_over_tcp() {
    if in_own_network("tgt::a_vdi_is_reached_over_tcp") {
        return;
    }
    let flags = ClusterFlags::AUTO_VNODES.with(ClusterFlags::USE_LOCK);
    let mut cluster = Builder::new(3).flags(flags).ports(&[7000, 7001, 7002]).start();
    cluster.dog(&["vdi", "create", "tgt0", "16M"]).ok();
    let socket = cluster.dir().join("tgt");
    let child = Command::new(system("tgtd", "tgt"))
        .args(["-f", "-C", "0", "--iscsi", "portal=127.0.0.1:3260"])
        .env("TGT_IPC_SOCKET", &socket)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("tgtd");
    let target = Target { child, socket, port: 3260 };
    wait("tgtd to answer", || target.admin(&["--op", "show", "--mode", "target"]).code == 0);
    target.ok(&["--op", "new", "--mode", "target", "--tid", "1", "-T", TARGET]);
    let unit = |store: &str| {
        target.admin(&[
            "--op",
            "new",
            "--mode",
            "logicalunit",
            "--tid",
            "1",
            "--lun",
            "1",
            "--bstype",
            "sheepdog",
            "--backing-store",
            store,
        ])
    };
    assert_ne!(unit("tcp:127.0.0.1:7001:nosuch").code, 0, "a VDI that is not there");
    assert_eq!(unit("tcp:127.0.0.1:7001:tgt0").code, 0);
    target.ok(&["--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL"]);
    io(&target, &["write -P 1 3M 2M", "read -P 1 3M 2M", "read -P 0 0 3M"]);
    target.remove_unit();
    assert_eq!(locks(&mut cluster), 0, "the unit's lock is given back");
}

/// The guide's `...:vdi:tag` and `...:vdi:snapid` are refused by tgt 1.0.85 itself ("unexpected token"; 01, 17: only current
/// VDIs). What a tgt that knows them sends is served: the snapshot's contents, read-only.
#[test]
fn snapshots_are_served_as_targets_ask_for_them() {
    let mut cluster = cluster();
    cluster.dog(&["vdi", "create", "tgt0", "16M"]).ok();
    for (byte, tag) in [(b'a', Some("first")), (b'b', Some("second")), (b'c', None)] {
        cluster.dog_at(0, &["vdi", "write", "tgt0", "4M", "2M"], &vec![byte; 2 << 20]).ok();
        if let Some(tag) = tag {
            cluster.dog(&["vdi", "snapshot", "tgt0", "-s", tag]).ok();
        }
    }
    let target = Target::start(&cluster, 0, "sheepdog", &unix(&cluster, 0, "tgt0"));
    let port = cluster.nodes[1].port;
    for store in
        [unix(&cluster, 1, "tgt0:first"), unix(&cluster, 1, "tgt0:1"), format!("tcp:127.0.0.1:{port}:tgt0:1")]
    {
        let unit =
            ["--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "2", "--bstype", "sheepdog"];
        let refused = target.admin(&[&unit[..], &["--backing-store", &store]].concat());
        assert_ne!(refused.code, 0, "{store}: this tgt opens snapshots, let it");
    }
    io(&target, &["read -P 99 4M 2M"]);

    let mut client = cluster.nodes[1].client();
    for (tag, snapid, byte) in [("first", 0, b'a'), ("second", 0, b'b'), ("", 1, b'a'), ("", 2, b'b')] {
        let body = VdiRequest { lock_type: 1, snapid, ..VdiRequest::zeroed() };
        let locked = client.vdi_op(Opcode::LOCK_VDI, "tgt0", Some(tag), body);
        assert_eq!(locked.result, ResultCode::SUCCESS, "{tag} {snapid}");
        let vid = locked.vdi().vdi_id;
        assert_eq!(client.lookup("tgt0", tag, snapid), Ok(vid));
        let mut call = |opcode: Opcode, oid: Oid, offset: usize, length: usize, payload: &[u8]| {
            let body = ObjRequest { oid, offset: offset as u32, ..ObjRequest::zeroed() };
            let request = Request::new(opcode).flag(Flags::TGT).length(length).with_obj(body);
            let request = if payload.is_empty() { request } else { request.flag(Flags::WRITE) };
            client.must(request, payload)
        };
        let (refreshed, inode) = call(Opcode::READ_OBJ, Oid::inode(vid), 0, GREF_OFFSET, &[]);
        assert_eq!(refreshed.result, ResultCode::SUCCESS);
        assert_ne!(inode[520..528], [0; 8], "a snapshot");
        let owner = inode::table(&inode[table_offset(1) as usize..][..4])[0].get();
        let data = Oid::data(VdiId::new(owner), 1);
        let (read, bytes) = call(Opcode::READ_OBJ, data, 0, 2 << 20, &[]);
        assert!(read.result.is_ok() && bytes.iter().all(|b| *b == byte), "{tag} {snapid}");
        assert_eq!(call(Opcode::WRITE_OBJ, data, 0, 512, &[1; 512]).0.result, ResultCode::READONLY);
        let body = VdiRequest { lock_type: 1, base_vdi_id: vid, ..VdiRequest::zeroed() };
        assert!(client.must(Request::new(Opcode::RELEASE_VDI).with_vdi(body), &[]).0.result.is_ok());
    }
    target.remove_unit();
    assert_eq!(locks(&mut cluster), 0);
}

/// Multipath: each target sees what the other wrote, whoever created the blocks (01, 17.2).
#[test]
fn two_targets_share_a_vdi() {
    let mut cluster = cluster();
    cluster.dog(&["vdi", "create", "shared", "176M"]).ok();
    let a = Target::start(&cluster, 0, "sheepdog", &unix(&cluster, 0, "shared"));
    let b = Target::start(&cluster, 1, "sheepdog", &unix(&cluster, 1, "shared"));
    for round in 0..6_u32 {
        let (writer, reader) = if round % 2 == 0 { (&a, &b) } else { (&b, &a) };
        let at = round * 8;
        let write = format!("write -P {} {at}M 8M", round + 1);
        io(writer, &[&write, "write -P 99 1k 512"]);
        let read = format!("read -P {} {at}M 8M", round + 1);
        io(reader, &[if round == 0 { "read -P 1 1M 7M" } else { &read }, "read -P 99 1k 512"]);
    }
    // Both at once, each its own blocks, which nobody wrote before; twice into each.
    let place = |i: u32, side: u32| 48 * 1024 + ((i / 2) * 2 + side) * 4096 + (i % 2) * 512;
    let image = |target: &Target, side: u32| {
        let url = target.url();
        std::thread::spawn(move || {
            let mut command = Command::new(qemu_sheepdog("qemu-io"));
            command.args(["-f", "raw", "-t", "none"]);
            for i in 0..16 {
                command.args(["-c", &format!("write -P {} {}k 256k", 100 + 50 * side + i, place(i, side))]);
            }
            Output::of(command.arg(url).output().expect("qemu-io")).ok()
        })
    };
    let (left, right) = (image(&a, 0), image(&b, 1));
    left.join().expect("no write fails");
    right.join().expect("no write fails");
    for i in 0..16_u32 {
        let read = |side: u32| format!("read -P {} {}k 256k", 100 + 50 * side + i, place(i, side));
        io(if i % 2 == 0 { &a } else { &b }, &[&read(0), &read(1)]);
    }
    // And both in the same new blocks, as an initiator does that alternates between its paths.
    let part = |i: u32, side: u32| 112 * 1024 + i * 4096 + side * 2048;
    let into_both = |target: &Target, side: u32| {
        let url = target.url();
        std::thread::spawn(move || {
            let mut command = Command::new(qemu_sheepdog("qemu-io"));
            command.args(["-f", "raw", "-t", "none"]);
            for i in 0..16 {
                command.args(["-c", &format!("aio_write -P {} {}k 64k", 1 + 16 * side + i, part(i, side))]);
            }
            Output::of(command.args(["-c", "aio_flush"]).arg(url).output().expect("qemu-io")).ok()
        })
    };
    let (left, right) = (into_both(&a, 0), into_both(&b, 1));
    left.join().expect("no write fails");
    right.join().expect("no write fails");
    for i in 0..16_u32 {
        let read = |side: u32| format!("read -P {} {}k 64k", 1 + 16 * side + i, part(i, side));
        io(if i % 2 == 0 { &a } else { &b }, &[&read(0), &read(1)]);
    }
    assert_eq!(locks(&mut cluster), 1);
    a.remove_unit();
    io(&b, &["read -P 1 1M 7M", "write -P 55 0 1M", "read -P 55 0 1M"]);
    b.remove_unit();
    assert_eq!(locks(&mut cluster), 0);
    drop((a, b));
    cluster.assert_replicas_equal(3);
}

/// A target dies in the middle of writes, and then a sheep under the other one's feet: nothing acknowledged is lost.
#[test]
fn writes_go_on_through_the_other_target() {
    let mut cluster = Builder::new(4).flags(ClusterFlags::AUTO_VNODES.with(ClusterFlags::USE_LOCK)).start();
    cluster.dog(&["vdi", "create", "shared", "128M"]).ok();
    let mut a = Target::start(&cluster, 0, "sheepdog", &unix(&cluster, 0, "shared"));
    let b = Target::start(&cluster, 1, "sheepdog", &unix(&cluster, 1, "shared"));
    let write = |i: u32| format!("write -P {} {}k 512k", i % 200 + 1, i * 512);
    let mut command = Command::new(qemu_sheepdog("qemu-io"));
    command.args(["-f", "raw", "-t", "none"]);
    for i in 0..200 {
        command.args(["-c", &write(i)]);
    }
    let log = cluster.dir().join("writer.log");
    let file = std::fs::File::create(&log).expect("a log");
    let mut writer = command.arg(a.url()).stdin(Stdio::null()).stdout(file).spawn().expect("qemu-io");
    let acknowledged = || std::fs::read_to_string(&log).expect("the log").matches("bytes at offset").count();
    wait("some writes", || acknowledged() >= 20);
    a.kill9();
    let _ = writer.kill();
    let _ = writer.wait();
    let done = acknowledged() as u32;
    eprintln!("{done} writes were acknowledged before the target died");
    let rest: Vec<String> = (done..200).map(write).collect();
    io(&b, &rest.iter().take(20).map(String::as_str).collect::<Vec<_>>());
    cluster.kill9(0);
    io(&b, &rest.iter().skip(20).map(String::as_str).collect::<Vec<_>>());
    let reads: Vec<String> = (0..200).map(|i| write(i).replace("write", "read")).collect();
    io(&b, &reads.iter().map(String::as_str).collect::<Vec<_>>());
    // The dead sheep's part in the lock went with it; the VDI can be shared anew.
    cluster.start(0);
    cluster.wait_recovered();
    let again = Target::start(&cluster, 2, "sheepdog", &unix(&cluster, 0, "shared"));
    io(&again, &reads.iter().map(String::as_str).collect::<Vec<_>>());
}

/// The tests of libiscsi's suite that fail on this backing store.
fn failures(target: &Target) -> BTreeSet<String> {
    let mut child = Command::new(system("iscsi-test-cu", "libiscsi-bin"))
        .args(["-d", "-v", &target.url()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("iscsi-test-cu");
    let stdout = child.stdout.take().expect("piped");
    let reader = std::thread::spawn(move || std::io::read_to_string(stdout).expect("text"));
    wait_for("the suite to end", Duration::from_secs(240), || child.try_wait().expect("the suite"));
    let text = reader.join().expect("read");
    let mut failed = BTreeSet::new();
    let mut ran = 0;
    let mut suite = String::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("Suite: ") {
            suite = name.trim().to_owned();
        } else if let Some(rest) = line.trim_start().strip_prefix("Test: ") {
            ran += 1;
            let name = rest.split(" ...").next().unwrap_or(rest).trim();
            if !rest.contains("passed") && text_of(&text, line).contains("FAILED") {
                failed.insert(format!("{suite}.{name}"));
            }
        }
    }
    assert!(ran > 100, "only {ran} tests ran:\n{text}");
    eprintln!("{ran} tests, failed: {failed:?}");
    failed
}

/// What was printed from `line` on until the next test begins.
fn text_of<'a>(text: &'a str, line: &str) -> &'a str {
    let start = text.find(line).unwrap_or(0);
    let rest = &text[start..];
    rest[1..].find("  Test: ").map_or(rest, |end| &rest[..end])
}

/// Nothing fails on a VDI that does not fail on a plain file, too.
#[test]
fn libiscsis_suite_finds_nothing_that_a_file_does_not_have() {
    let mut cluster = cluster();
    cluster.dog(&["vdi", "create", "suite", "128M"]).ok();
    let file = cluster.dir().join("plain.raw");
    std::fs::File::create(&file).and_then(|f| f.set_len(128 << 20)).expect("a file");
    let on_file = failures(&Target::start(&cluster, 0, "rdwr", &file.display().to_string()));
    let on_vdi = failures(&Target::start(&cluster, 1, "sheepdog", &unix(&cluster, 0, "suite")));
    let more: Vec<&String> = on_vdi.difference(&on_file).collect();
    assert!(more.is_empty(), "fail on a VDI only: {more:?}");
}
