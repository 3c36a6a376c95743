//! VDIs as NBD exports, used by the stock clients: qemu-img, qemu-io, libnbd's tools, fio.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};
use serde_json::Value;
use sheepdog_proto::header::VdiRequest;
use sheepdog_proto::{ClusterFlags, Opcode, ResultCode, VdiId};
use sheepdog_testkit::binaries::system;
use sheepdog_testkit::{Builder, Cluster, Output, wait};

/// A cluster of three with an NBD socket at every node.
fn cluster(flags: ClusterFlags) -> Cluster {
    Builder::new(3).flags(flags).arg("--nbd").arg("unix:{dir}/nbd{i}.sock").start()
}

fn plain() -> Cluster {
    cluster(ClusterFlags::AUTO_VNODES)
}

fn socket(cluster: &Cluster, node: usize) -> PathBuf {
    cluster.dir().join(format!("nbd{node}.sock"))
}

fn uri(cluster: &Cluster, node: usize, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", socket(cluster, node).display())
}

fn run(program: &str, package: &str, args: &[&str]) -> Output {
    let output = Command::new(system(program, package))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    let output = Output::of(output);
    eprintln!("{program} {}\n{}{}", args.join(" "), output.stdout, output.stderr);
    output
}

fn qemu_img(args: &[&str]) -> Output {
    run("qemu-img", "qemu-utils", args)
}

/// qemu-io on a raw image; each command is one `-c`. Any failed command fails.
fn qemu_io(uri: &str, flags: &[&str], commands: &[&str]) -> Output {
    let mut args = vec!["-f", "raw"];
    args.extend(flags);
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(uri);
    run("qemu-io", "qemu-utils", &args)
}

fn nbdinfo(args: &[&str]) -> Output {
    run("nbdinfo", "libnbd-bin", args)
}

fn create(cluster: &mut Cluster, name: &str, size: u64) -> VdiId {
    cluster.client().create_vdi(name, size).expect("create")
}

/// An image with data, zeros and holes in all the places that matter, of the given size.
fn image(path: &Path, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    let mut random = SmallRng::seed_from_u64(3);
    let ranges = [(0, 4096), (4 << 20, 6 << 20), ((8 << 20) - 512, (8 << 20) + 512), (size - 65_536, size)];
    for (a, b) in ranges {
        random.fill_bytes(&mut bytes[a..b]);
    }
    fs::write(path, &bytes).expect("an image");
    bytes
}

#[test]
fn every_vdi_is_an_export_with_its_size_and_abilities() {
    let mut cluster = plain();
    create(&mut cluster, "alpha", 16 << 20);
    create(&mut cluster, "beta", 3 << 20);
    let list = nbdinfo(&["--list", "--json", &uri(&cluster, 0, "")]).ok();
    let list: Value = serde_json::from_str(&list).expect("json");
    let exports = list["exports"].as_array().expect("exports");
    let size =
        |name: &str| exports.iter().find(|e| e["export-name"] == name).map(|e| e["export-size"].clone());
    assert_eq!(size("alpha"), Some((16 << 20).into()));
    assert_eq!(size("beta"), Some((3 << 20).into()));

    let info = nbdinfo(&["--json", &uri(&cluster, 1, "alpha")]).ok();
    let info: Value = serde_json::from_str(&info).expect("json");
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], 16 << 20);
    assert_eq!(export["is_read_only"], false);
    for ability in ["can_flush", "can_fua", "can_trim", "can_zero"] {
        assert_eq!(export[ability], true, "{ability}");
    }
    assert!(
        export["contexts"].as_array().is_some_and(|c| c.iter().any(|c| c == "base:allocation")),
        "{export}"
    );
    let missing = nbdinfo(&["--size", &uri(&cluster, 0, "nosuch")]);
    assert_ne!(missing.code, 0, "an export that is not there");
}

#[test]
fn an_image_goes_in_and_comes_out_unchanged() {
    let mut cluster = plain();
    let size = 40 << 20;
    create(&mut cluster, "disk", size as u64);
    let (input, output) = (cluster.dir().join("in.raw"), cluster.dir().join("out.raw"));
    let bytes = image(&input, size);
    let (input, output) = (input.display().to_string(), output.display().to_string());
    let here = uri(&cluster, 0, "disk");
    qemu_img(&["convert", "-n", "-f", "raw", "-O", "raw", &input, &here]).ok();
    // Through another node: what was written is in the cluster, not in a daemon.
    let there = uri(&cluster, 2, "disk");
    qemu_img(&["compare", "-f", "raw", "-F", "raw", &input, &there]).ok();
    qemu_img(&["convert", "-f", "raw", "-O", "raw", &there, &output]).ok();
    assert!(fs::read(&output).expect("the image") == bytes, "the image differs after a round trip");
    let map = qemu_img(&["map", "-f", "raw", "--output=json", &here]).ok();
    let map: Value = serde_json::from_str(&map).expect("json");
    let holes: u64 = map
        .as_array()
        .expect("extents")
        .iter()
        .filter(|e| e["zero"] == true)
        .map(|e| e["length"].as_u64().expect("length"))
        .sum();
    assert!(holes >= 20 << 20, "blocks that nobody wrote are holes: {map}");
    let mut client = cluster.client();
    let vid = client.lookup("disk", "", 0).expect("disk");
    let table = sheepdog_testkit::Vdi::open(&mut client, vid).expect("open").table;
    assert!(table[3..8].iter().all(|owner| *owner == 0), "no objects for zeros: {table:?}");
    cluster.assert_replicas_equal(3);
}

#[test]
fn nbdcopy_copies_both_ways() {
    let mut cluster = plain();
    let size = 32 << 20;
    create(&mut cluster, "copied", size as u64);
    let (input, output) = (cluster.dir().join("in.raw"), cluster.dir().join("out.raw"));
    let bytes = image(&input, size);
    fs::File::create(&output).and_then(|f| f.set_len(size as u64)).expect("an empty file");
    let (input, output) = (input.display().to_string(), output.display().to_string());
    let export = uri(&cluster, 1, "copied");
    run("nbdcopy", "libnbd-bin", &["--flush", &input, &export]).ok();
    run("nbdcopy", "libnbd-bin", &[&export, &output]).ok();
    assert!(fs::read(&output).expect("the image") == bytes);
    let map = nbdinfo(&["--map", "--json", &export]).ok();
    let map: Value = serde_json::from_str(&map).expect("json");
    let total: u64 =
        map.as_array().expect("extents").iter().map(|e| e["length"].as_u64().expect("length")).sum();
    assert_eq!(total, size as u64, "the extents cover the disk: {map}");
    nbdinfo(&["--size", &export]).ok();
}

#[test]
fn patterns_zeros_and_discards_read_back_as_written() {
    let mut cluster = plain();
    let vid = create(&mut cluster, "io", 24 << 20);
    let export = uri(&cluster, 0, "io");
    let commands = [
        "write -P 0x11 0 9M",
        "write -P 0x22 1000 3",
        "write -P 0x33 4194000 1000",
        "write -f -P 0x44 20M 64k",
        "write -z 5M 1M",
        "write -z -u 2M 512",
        "discard 8M 1M",
        "flush",
        "read -P 0x11 0 1000",
        "read -P 0x22 1000 3",
        "read -P 0x11 1003 2096149",
        "read -P 0x00 2097152 512",
        "read -P 0x11 2097664 2096336",
        "read -P 0x33 4194000 1000",
        "read -P 0x11 4195000 1047880",
        "read -P 0x00 5M 1M",
        "read -P 0x11 6M 2M",
        "read -P 0x44 20M 64k",
        "read -P 0x00 12M 4M",
    ];
    let output = qemu_io(&export, &[], &commands);
    let said = output.clone().ok();
    assert!(!said.contains("Pattern verification failed"), "{said}");
    // Whole blocks given back free their objects.
    qemu_io(&export, &["-d", "unmap"], &["discard 4M 4M", "read -P 0 4M 4M", "flush"]).ok();
    let mut client = cluster.client();
    wait("the discarded block to leave the table", || {
        sheepdog_testkit::Vdi::open(&mut client, vid).expect("open").table[1] == 0
    });
    let beyond = qemu_io(&export, &[], &["write 24M 512"]);
    assert!(
        beyond.code != 0 || beyond.stdout.contains("failed") || beyond.stderr.contains("failed"),
        "{beyond:?}"
    );
    qemu_io(&export, &[], &["read -P 0x44 20M 64k"]).ok();
    cluster.assert_replicas_equal(3);
}

#[test]
fn many_requests_in_flight_are_served() {
    let mut cluster = plain();
    create(&mut cluster, "bench", 64 << 20);
    let export = uri(&cluster, 0, "bench");
    for args in [
        ["bench", "-w", "-c", "2000", "-d", "32", "-s", "4096", "-f", "raw", "-t", "none"],
        ["bench", "-w", "-c", "40", "-d", "8", "-s", "1048576", "-f", "raw", "-t", "none"],
    ] {
        qemu_img(&[args.as_slice(), &[export.as_str()]].concat()).ok();
    }
    qemu_img(&["bench", "-c", "2000", "-d", "32", "-s", "4096", "-f", "raw", "-t", "none", &export]).ok();
    cluster.assert_replicas_equal(3);
}

fn fio(cluster: &Cluster, export: &str, args: &[&str]) {
    let engine = format!("--uri={export}");
    let dir = format!("--aux-path={}", cluster.dir().display());
    let fixed = ["--name=job", "--ioengine=nbd", &engine, &dir, "--verify=crc32c", "--verify_fatal=1"];
    run("fio", "fio", &[fixed.as_slice(), args].concat()).ok();
}

#[test]
fn fio_verifies_what_it_wrote() {
    let mut cluster = plain();
    create(&mut cluster, "fio", 64 << 20);
    let export = uri(&cluster, 0, "fio");
    fio(&cluster, &export, &["--rw=randwrite", "--bs=4k", "--size=16M", "--iodepth=16", "--randseed=1"]);
    fio(
        &cluster,
        &export,
        &["--rw=randwrite", "--bsrange=512-256k", "--blockalign=512", "--size=64M", "--iodepth=8"],
    );
    fio(&cluster, &export, &["--rw=write", "--bs=1M", "--size=64M", "--iodepth=4"]);
    cluster.assert_replicas_equal(3);
}

/// A node dies and returns while fio writes and verifies through another one.
#[test]
fn fio_does_not_notice_a_killed_node() {
    let mut cluster = Builder::new(4).arg("--nbd").arg("unix:{dir}/nbd{i}.sock").start();
    create(&mut cluster, "fio", 64 << 20);
    let engine = format!("--uri={}", uri(&cluster, 0, "fio"));
    let mut child = Command::new(system("fio", "fio"))
        .args([
            "--name=job",
            "--ioengine=nbd",
            &engine,
            "--rw=randwrite",
            "--bs=16k",
            "--size=64M",
            "--iodepth=8",
        ])
        // Slow enough that all three deaths fall into it.
        .args(["--verify=crc32c", "--verify_fatal=1", "--rate_iops=400"])
        .arg(format!("--aux-path={}", cluster.dir().display()))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("fio");
    wait("fio to have begun", || {
        cluster.objects_of(0).len() > 3 || child.try_wait().expect("a child").is_some()
    });
    for victim in [1, 2, 3] {
        assert!(child.try_wait().expect("a child").is_none(), "fio ended before node {victim} was killed");
        cluster.kill9(victim);
        cluster.wait_running();
        cluster.start(victim);
        cluster.wait_recovered();
    }
    let output = Output::of(child.wait_with_output().expect("fio ends"));
    assert_eq!(output.code, 0, "{}{}", output.stdout, output.stderr);
    cluster.wait_recovered();
    cluster.assert_replicas_equal(3);
}

#[test]
fn snapshots_are_read_only_exports() {
    let mut cluster = plain();
    create(&mut cluster, "vm", 16 << 20);
    let export = uri(&cluster, 0, "vm");
    qemu_io(&export, &[], &["write -P 1 0 5M"]).ok();
    cluster.client().snapshot("vm", "before").expect("snapshot");
    qemu_io(&export, &[], &["read -P 1 0 5M", "write -P 2 0 1M"]).ok();
    for name in ["vm:before", "vm:1"] {
        let snapshot = uri(&cluster, 1, name);
        let info = nbdinfo(&["--json", &snapshot]).ok();
        let info: Value = serde_json::from_str(&info).expect("json");
        assert_eq!(info["exports"][0]["is_read_only"], true, "{name}");
        qemu_io(&snapshot, &["-r"], &["read -P 1 0 5M", "read -P 0 8M 4M"]).ok();
        let refused = qemu_io(&snapshot, &[], &["write -P 3 0 512"]);
        let said = refused.stdout + &refused.stderr;
        assert!(refused.code != 0 || said.contains("failed") || said.contains("ead-only"), "{name}: {said}");
    }
    qemu_io(&export, &[], &["read -P 2 0 1M", "read -P 1 1M 4M"]).ok();
}

/// A client that has an export open across a snapshot writes on into the new working VDI, never into the snapshot.
#[test]
fn a_snapshot_under_an_open_export_keeps_its_data() {
    let mut cluster = plain();
    create(&mut cluster, "vm", 16 << 20);
    let export = uri(&cluster, 0, "vm");
    let mut child = Command::new(system("qemu-io", "qemu-utils"))
        .args(["-f", "raw", &export])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("qemu-io");
    use std::io::Write;
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all(b"write -P 5 0 6M\nflush\n").expect("a command");
    let mut client = cluster.client();
    let vid = client.lookup("vm", "", 0).expect("vm");
    // Both blocks have their owner, and the last byte is there: the command is done.
    wait("the first command to be done", || {
        let Ok(vdi) = sheepdog_testkit::Vdi::open(&mut client, vid) else { return false };
        vdi.table[1] != 0 && vdi.read(&mut client, (6 << 20) - 512, 512).is_ok_and(|b| b == [5; 512])
    });
    client.snapshot("vm", "s").expect("snapshot");
    stdin
        .write_all(b"write -P 6 0 1M\nwrite -P 6 12M 64k\nread -P 6 0 1M\nread -P 5 1M 5M\nquit\n")
        .expect("commands");
    drop(stdin);
    let output = Output::of(child.wait_with_output().expect("qemu-io ends"));
    assert!(output.code == 0 && !output.stdout.contains("failed"), "{}{}", output.stdout, output.stderr);
    qemu_io(&uri(&cluster, 1, "vm:s"), &["-r"], &["read -P 5 0 6M", "read -P 0 12M 64k"]).ok();
    qemu_io(&uri(&cluster, 2, "vm"), &[], &["read -P 6 0 1M", "read -P 5 1M 5M", "read -P 6 12M 64k"]).ok();
}

#[test]
fn the_lock_is_held_while_an_export_is_open() {
    let mut cluster = cluster(ClusterFlags::AUTO_VNODES.with(ClusterFlags::USE_LOCK));
    create(&mut cluster, "vm", 16 << 20);
    let lock = |cluster: &mut Cluster| {
        cluster.client().vdi_op(Opcode::LOCK_VDI, "vm", Some(""), VdiRequest::zeroed()).result
    };
    let mut child = Command::new(system("qemu-io", "qemu-utils"))
        .args(["-f", "raw", &uri(&cluster, 0, "vm")])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("qemu-io");
    let vid = cluster.client().lookup("vm", "", 0).expect("vm");
    let release = |cluster: &mut Cluster| {
        let body = VdiRequest { base_vdi_id: vid, ..VdiRequest::zeroed() };
        cluster.client().vdi_op(Opcode::RELEASE_VDI, "vm", None, body)
    };
    wait("the export to hold the lock", || match lock(&mut cluster) {
        ResultCode::VDI_LOCKED => true,
        ResultCode::SUCCESS => {
            release(&mut cluster);
            false
        }
        other => panic!("{other:?}"),
    });
    let second = qemu_io(&uri(&cluster, 1, "vm"), &[], &["read 0 512"]);
    assert_ne!(second.code, 0, "a second writer is refused");
    drop(child.stdin.take());
    child.wait().expect("qemu-io ends");
    wait("the lock to be released", || lock(&mut cluster) == ResultCode::SUCCESS);
}

/// Bytes that are not NBD, half handshakes, early ends.
#[test]
fn nonsense_on_the_nbd_socket_disturbs_nobody() {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    let mut cluster = plain();
    create(&mut cluster, "ok", 8 << 20);
    let mut random = SmallRng::seed_from_u64(5);
    for round in 0..30 {
        let mut stream = UnixStream::connect(socket(&cluster, 0)).expect("connect");
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).expect("a greeting");
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        let mut bytes = vec![0; 4096];
        random.fill_bytes(&mut bytes);
        if round % 3 == 0 {
            // A well-formed option with a length of almost 4 GiB.
            let option =
                [&3u32.to_be_bytes()[..], b"IHAVEOPT", &7u32.to_be_bytes(), &u32::MAX.to_be_bytes()].concat();
            bytes.splice(..option.len(), option);
        }
        let _refused = stream.write_all(&bytes[..round * 137 % 4096]);
    }
    qemu_io(&uri(&cluster, 0, "ok"), &[], &["write -P 1 0 1M", "read -P 1 0 1M"]).ok();
    assert!(cluster.nodes[0].memory("VmRSS") < 1 << 30);
}

/// `dog nbd serve` beside a sheep that serves no NBD itself: the same exports, over the sheep's own socket.
#[test]
fn dog_serves_the_exports_of_any_sheep() {
    let mut cluster = Cluster::new(3);
    create(&mut cluster, "beside", 16 << 20);
    let socket = cluster.dir().join("dog.sock");
    let port = cluster.nodes[1].port.to_string();
    let mut server = Command::new(sheepdog_testkit::binaries::dog())
        .args(["nbd", "serve", &format!("unix:{}", socket.display()), "-p", &port])
        .stdin(Stdio::null())
        .spawn()
        .expect("dog runs");
    wait("the server to listen", || socket.exists());
    let uri = format!("nbd+unix:///beside?socket={}", socket.display());
    let output = qemu_io(&uri, &[], &["write -P 0x5a 1M 64k", "flush", "read -P 0x5a 1M 64k"]);
    let listed = nbdinfo(&["--list", &format!("nbd+unix:///?socket={}", socket.display())]);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(server.id() as i32), nix::sys::signal::Signal::SIGTERM)
        .expect("signalled");
    let status = server.wait().expect("ended");
    output.ok();
    assert!(listed.ok().contains("export=\"beside\""));
    assert!(status.success(), "{status}");
    assert!(!socket.exists(), "the socket is removed");
    cluster.assert_replicas_equal(3);
}

/// QEMU's own NBD client and server in one: a volume behind `qemu-storage-daemon`, read back directly.
#[test]
fn qemu_storage_daemon_uses_an_export() {
    let mut cluster = plain();
    create(&mut cluster, "qsd", 8 << 20);
    let front = cluster.dir().join("qsd.sock");
    let mut daemon = Command::new(system("qemu-storage-daemon", "qemu-utils"))
        .arg("--blockdev")
        .arg(format!(
            "driver=nbd,node-name=disk,server.type=unix,server.path={},export=qsd",
            socket(&cluster, 0).display()
        ))
        .arg("--nbd-server")
        .arg(format!("addr.type=unix,addr.path={}", front.display()))
        .arg("--export")
        .arg("type=nbd,id=e,node-name=disk,name=qsd,writable=on")
        .stdin(Stdio::null())
        .spawn()
        .expect("qemu-storage-daemon runs");
    wait("qemu-storage-daemon to listen", || front.exists());
    let through = format!("nbd+unix:///qsd?socket={}", front.display());
    let wrote = qemu_io(&through, &[], &["write -P 0x21 3M 2M", "flush", "write -z 4M 512k"]);
    daemon.kill().expect("killed");
    daemon.wait().expect("ended");
    wrote.ok();
    let direct = uri(&cluster, 1, "qsd");
    qemu_io(&direct, &[], &["read -P 0x21 3M 1M", "read -P 0 4M 512k", "read -P 0x21 4608k 512k"]).ok();
}
