//! What `dog` has beyond the original: JSON, health, top, du, import and export (docs/operations.md, scripting and images).

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use sheepdog_proto::header::VdiRequest;
use sheepdog_proto::{ClusterFlags, Opcode};
use sheepdog_testkit::{Builder, Cluster, binaries, wait};

const BLOCK: usize = 4 << 20;

/// Bytes that differ from block to block, with whole blocks, runs and a tail of zeros.
fn image(length: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..length).map(|i| (i / 4096 + i % 251) as u8 | 1).collect();
    bytes[BLOCK..3 * BLOCK].fill(0);
    bytes[3 * BLOCK + 100_000..3 * BLOCK + 2_000_000].fill(0);
    bytes[length - 5000..].fill(0);
    bytes
}

fn json_of(cluster: &mut Cluster, args: &[&str]) -> Value {
    let words = [args, &["--json"]].concat();
    let text = cluster.dog(&words).ok();
    assert_eq!(text.lines().count(), 1, "one document in one line: {text}");
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{args:?}: {e}: {text}"))
}

fn vdi_bytes(cluster: &Cluster, name: &str) -> Vec<u8> {
    let port = cluster.nodes[0].port.to_string();
    let output =
        Command::new(binaries::dog()).args(["vdi", "read", name, "-p", &port]).output().expect("dog");
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

#[test]
fn listings_as_json() {
    let mut cluster = Builder::new(3).copies(2).start();
    cluster.dog(&["vdi", "create", "alpha", "64M"]).ok();
    cluster.dog_in(&["vdi", "write", "alpha", "0", "5M"], &vec![7; 5 << 20]).ok();
    cluster.dog(&["vdi", "snapshot", "alpha", "-s", "first"]).ok();
    cluster.dog(&["vdi", "clone", "alpha", "-s", "first", "beta"]).ok();

    let list = json_of(&mut cluster, &["vdi", "list"]);
    let rows = list["vdis"].as_array().expect("an array");
    assert_eq!(rows.len(), 3);
    let snapshot = rows.iter().find(|row| row["snapshot"] == true).expect("the snapshot");
    assert_eq!(
        (&snapshot["name"], &snapshot["tag"], &snapshot["snapshot_id"]),
        (&json!("alpha"), &json!("first"), &json!(1))
    );
    assert_eq!(
        (&snapshot["size"], &snapshot["used"], &snapshot["copies"]),
        (&json!(64 << 20), &json!(8 << 20), &json!("2"))
    );
    let beta = rows.iter().find(|row| row["name"] == "beta").expect("the clone");
    assert_eq!(
        (&beta["shared"], &beta["clone"], &beta["parent_vdi_id"]),
        (&json!(8 << 20), &json!(true), &snapshot["vdi_id"])
    );
    assert_eq!(json_of(&mut cluster, &["vdi", "list", "beta"])["vdis"], json!([beta]));
    assert_eq!(json_of(&mut cluster, &["vdi", "tree"])["vdis"].as_array().expect("rows").len(), 3);

    let nodes = json_of(&mut cluster, &["node", "list"]);
    let ids: Vec<_> = nodes["nodes"].as_array().expect("rows").iter().map(|row| row["id"].clone()).collect();
    assert_eq!((ids, &nodes["epoch"]), (vec![json!(0), json!(1), json!(2)], &json!(1)));
    assert_eq!(nodes["nodes"][2]["address"], format!("127.0.0.1:{}", cluster.nodes[2].port));
    let info = json_of(&mut cluster, &["node", "info"]);
    assert_eq!(
        (&info["nodes"].as_array().expect("rows").len(), &info["virtual_size"]),
        (&3, &json!(128 << 20))
    );
    assert!(info["total"]["size"].as_u64() > Some(0));
    let recovery = json_of(&mut cluster, &["node", "recovery"]);
    assert_eq!(recovery["nodes"][1]["phase"], "idle");
    let throttle = json_of(&mut cluster, &["node", "recovery", "get-throttle"]);
    assert_eq!(throttle, json!({ "max": 0, "interval_ms": 0 }));
    let disks = json_of(&mut cluster, &["node", "md", "info", "-A"]);
    assert_eq!(disks["nodes"].as_array().expect("rows").len(), 3);
    assert!(
        disks["nodes"][0]["disks"][0]["path"].as_str().is_some_and(|path| path.ends_with("obj")),
        "{disks}"
    );
    let stat = json_of(&mut cluster, &["node", "stat"]);
    assert!(stat["client"]["write"].as_u64() > Some(0), "{stat}");
    assert_eq!(json_of(&mut cluster, &["node", "log", "level", "get"])["name"], "info");

    let info = json_of(&mut cluster, &["cluster", "info"]);
    assert_eq!(
        (&info["running"], &info["status"], &info["copies"]),
        (&json!(true), &json!("running"), &json!("2"))
    );
    assert_eq!(info["epochs"][0]["nodes"].as_array().expect("rows").len(), 3);
    let map = json_of(&mut cluster, &["vdi", "object", "map", "beta"]);
    assert_eq!(
        map["objects"],
        json!([
            { "index": 0, "vdi_id": snapshot["vdi_id"] }, { "index": 1, "vdi_id": snapshot["vdi_id"] },
        ])
    );
    let location = json_of(&mut cluster, &["vdi", "object", "location", "beta", "-i", "0"]);
    for node in location["nodes"].as_array().expect("rows") {
        assert_eq!(node["state"] == "present", node["expected"] == true, "{location}");
    }
    let track = json_of(&mut cluster, &["vdi", "track", "beta", "-i", "0"]);
    assert_eq!(
        (&track["oid"], track["epochs"][0]["nodes"].as_array().map(Vec::len)),
        (&location["oid"], Some(2))
    );
    assert_eq!(json_of(&mut cluster, &["vdi", "lock", "list"]), json!({ "locks": [] }));

    let store = cluster.dir().join("snapshots").display().to_string();
    cluster.dog(&["cluster", "snapshot", "save", "monday", &store]).ok();
    let saved = json_of(&mut cluster, &["cluster", "snapshot", "list", &store]);
    assert_eq!(
        (&saved["snapshots"][0]["index"], &saved["snapshots"][0]["tag"]),
        (&json!(1), &json!("monday"))
    );
    let shown = json_of(&mut cluster, &["cluster", "snapshot", "show", "monday", &store]);
    assert_eq!(shown["vdis"][0]["name"], "alpha");
}

/// What the first guides show; the rest of the group is as unknown as it is to the original.
#[test]
fn vm_list_tells_where_images_are_in_use() {
    let flags = ClusterFlags::AUTO_VNODES.with(ClusterFlags::USE_LOCK);
    let mut cluster = Builder::new(2).copies(2).flags(flags).start();
    for (name, size) in [("Bob", "2G"), ("Alice", "256G")] {
        cluster.dog(&["vdi", "create", name, size]).ok();
    }
    cluster.dog_in(&["vdi", "write", "Bob", "0", "5M"], &vec![7; 5 << 20]).ok();
    cluster.dog(&["vdi", "snapshot", "Bob", "-s", "first"]).ok();
    let locked = cluster.nodes[1].client().vdi_op(Opcode::LOCK_VDI, "Bob", Some(""), VdiRequest::zeroed());
    assert!(locked.result.is_ok(), "{locked:?}");
    let shown = cluster.dog(&["vm", "list"]).ok();
    let heading = "Name            |Vdi size |Allocated| Shared  | Status\n\
                   ----------------+---------+---------+---------+------------\n";
    let rows: Vec<&str> = shown.strip_prefix(heading).expect("the heading").lines().collect();
    let expected = [
        "Bob             |   2.0 GB|   0.0 MB|   8.0 MB| running on 127.0.0.1",
        "Alice           |   256 GB|   0.0 MB|   0.0 MB| not running",
    ];
    assert!(rows.len() == 2 && expected.iter().all(|row| rows.contains(row)), "{shown}");
    let document = json_of(&mut cluster, &["vm", "list"]);
    let bob = document["vms"].as_array().expect("rows").iter().find(|row| row["name"] == "Bob").expect("Bob");
    let owner =
        json!({ "address": format!("IPv4 ip:127.0.0.1 port:{}", cluster.nodes[1].port), "state": "locked" });
    assert_eq!((&bob["shared"], &bob["owners"]), (&json!(8 << 20), &json!([owner])));
}

#[test]
fn what_is_not_there_is_refused_clearly() {
    let mut cluster = Cluster::new(1);
    for (args, first) in [
        (&["vm"][..], "Invalid command 'vm'"),
        (&["vm", "start"], "Invalid command 'vm'"),
        (&["trace", "enable", "io"], "Invalid command 'trace'"),
        (&["trace", "status"], "Invalid command 'trace'"),
        (&["vdi", "cache", "flush", "a"], "Invalid command 'vdi cache'"),
        (&["vdi", "flush", "a"], "Invalid command 'vdi flush'"),
        (&["node", "cache", "5"], "Invalid command 'node cache'"),
    ] {
        let refused = cluster.dog(args);
        assert_eq!((refused.code, refused.stderr.lines().next()), (64, Some(first)), "{args:?}");
    }
    for word in ["create", "delete"] {
        let refused = cluster.dog(&["nfs", word, "share"]);
        let text = "failed to create nfs share, Operation is not supported\n";
        assert_eq!((refused.code, refused.stderr.as_str()), (2, text));
    }
}

#[test]
fn json_may_be_asked_for_before_and_after_the_command() {
    let mut cluster = Cluster::new(1);
    let expected = json_of(&mut cluster, &["node", "list"]);
    for words in [["--json", "node", "list"], ["node", "--json", "list"], ["node", "list", "--json"]] {
        let text = cluster.dog(&words).ok();
        assert_eq!(serde_json::from_str::<Value>(&text).expect("JSON"), expected, "{words:?}");
    }
    let throttle = cluster.dog(&["--json", "node", "recovery", "get-throttle"]).ok();
    assert_eq!(throttle, cluster.dog(&["node", "recovery", "get-throttle", "--json"]).ok());
    let without = cluster.dog(&["--json", "vdi", "read", "alpha"]);
    assert_eq!((without.code, without.stderr.as_str()), (64, "'dog vdi read' has no JSON output\n"));
}

#[test]
fn health_is_told_by_the_exit_status() {
    let mut cluster = Builder::new(3).copies(3).unformatted().start();
    let health = cluster.dog(&["cluster", "health"]);
    let line = "critical: the cluster does not serve: Waiting for cluster to be formatted\n";
    assert_eq!((health.code, health.stdout.as_str()), (2, line));

    cluster.dog(&["cluster", "format", "-c", "3"]).ok();
    cluster.wait_running();
    let health = cluster.dog(&["cluster", "health"]);
    assert_eq!((health.code, health.stdout.as_str()), (0, "healthy: 3 nodes, epoch 1\n"));
    assert_eq!(json_of(&mut cluster, &["cluster", "health"]), json!({ "status": "healthy", "findings": [] }));

    cluster.dog(&["cluster", "recover", "disable"]).ok();
    let health = cluster.dog(&["cluster", "health"]);
    assert_eq!((health.code, health.stdout.as_str()), (1, "degraded: automatic recovery is disabled\n"));
    cluster.dog(&["cluster", "recover", "enable"]).ok();

    cluster.kill9(2);
    cluster.wait_epoch(2);
    cluster.wait_recovered();
    let health = cluster.dog(&["cluster", "health"]);
    let line = "degraded: 2 zones for 3 copies: objects have fewer than they should\n";
    assert_eq!((health.code, health.stdout.as_str()), (1, line));

    cluster.sigstop(0);
    let health = cluster.dog_at(0, &["cluster", "health"], &[]);
    cluster.sigcont(0);
    let line = format!("critical: no sheep answers at 127.0.0.1:{}\n", cluster.nodes[0].port);
    assert_eq!((health.code, health.stdout), (2, line));
}

#[test]
fn health_tells_how_far_recovery_is() {
    let mut cluster = Builder::new(3).copies(2).start();
    cluster.dog(&["vdi", "create", "disk", "160M"]).ok();
    cluster.dog_in(&["vdi", "write", "disk"], &vec![7; 160 << 20]).ok();
    let throttle = |cluster: &Cluster, max: &str, interval: &str| {
        for node in [0, 1] {
            cluster.dog_at(node, &["node", "recovery", "set-throttle", max, interval], &[]).ok();
        }
    };
    throttle(&cluster, "1", "2000");
    cluster.kill9(2);
    wait("a node that says how many objects are left", || {
        let health = cluster.dog(&["cluster", "health"]);
        assert_ne!(health.code, 2, "everything has a copy: {}", health.stdout);
        let told = |line: &str| {
            line.starts_with("degraded: node ") && line.contains(" recovers: ") && line.ends_with(" objects")
        };
        health.code == 1 && health.stdout.lines().any(told)
    });
    throttle(&cluster, "0", "0");
    wait("a healthy cluster", || cluster.dog(&["cluster", "health"]).code == 0);
}

#[test]
fn top_shows_rates_of_the_last_interval() {
    let mut cluster = Builder::new(2).copies(2).start();
    let frame = cluster.dog(&["top", "--once"]).ok();
    let lines: Vec<&str> = frame.lines().collect();
    assert!(lines[0].ends_with("running, epoch 1, 2 nodes"), "{frame}");
    assert!(lines[3] == "Recovery: 0 of 2 nodes" && lines.len() == 8, "{frame}");
    assert!(lines[6].contains(&format!("127.0.0.1:{}", cluster.nodes[0].port)), "{frame}");
    let document = json_of(&mut cluster, &["top"]);
    // At least the questions of `top` itself are not counted as clients' writes.
    assert_eq!(document["nodes"][1]["written_bytes_per_second"], 0);
    assert_eq!(document["nodes"][0]["recovery"]["phase"], "idle");
}

#[test]
fn top_into_a_pipe_goes_on_until_it_is_told_to_end() {
    let cluster = Cluster::new(1);
    let port = cluster.nodes[0].port.to_string();
    let mut child = Command::new(binaries::dog())
        .args(["top", "-p", &port])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("dog");
    let mut seen = String::new();
    let mut output = child.stdout.take().expect("piped");
    let mut buffer = [0; 4096];
    while seen.matches("Sheepdog at").count() < 2 {
        let n = output.read(&mut buffer).expect("frames");
        assert!(n > 0, "ended early: {seen}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
    }
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it runs");
    assert_eq!(child.wait().expect("an end").code(), Some(0));
}

#[test]
fn du_counts_owners_and_copies() {
    let mut cluster = Builder::new(3).copies(2).start();
    cluster.dog(&["vdi", "create", "alpha", "64M"]).ok();
    cluster.dog_in(&["vdi", "write", "alpha", "0", "5M"], &vec![7; 5 << 20]).ok();
    cluster.dog(&["vdi", "snapshot", "alpha", "-s", "first"]).ok();
    cluster.dog_in(&["vdi", "write", "alpha", "0", "1M"], &vec![8; 1 << 20]).ok();
    cluster.dog(&["vdi", "create", "coded", "16M", "-c", "2:1"]).ok();
    cluster.dog_in(&["vdi", "write", "coded", "0", "4M"], &vec![9; 4 << 20]).ok();
    let total = json_of(&mut cluster, &["vdi", "du", "alpha"])["total"].clone();
    assert_eq!(total, json!({ "size": 128 << 20, "used": 12 << 20, "shared": 4 << 20, "on_disk": 24 << 20 }));
    let raw = cluster.dog(&["vdi", "du", "coded", "-r"]).ok();
    assert_eq!(raw, format!("= coded 0 {} {} 0 {} \nTotal {0} {1} 0 {2}\n", 16 << 20, 4 << 20, 6 << 20));
    let table = cluster.dog(&["vdi", "du"]).ok();
    assert!(table.starts_with("  Name        Id      Size      Used    Shared   On disk  Tag\n"), "{table}");
    assert_eq!(table.lines().count(), 5, "{table}");
    let missing = cluster.dog(&["vdi", "du", "nobody"]);
    assert_eq!((missing.code, missing.stderr.as_str()), (1, "There is no VDI nobody\n"));
}

#[test]
fn raw_files_go_in_and_out_sparse() {
    let mut cluster = Builder::new(3).copies(2).start();
    let bytes = image(6 * BLOCK + 12_345);
    let source = cluster.dir().join("source.img").display().to_string();
    let target = cluster.dir().join("target.img").display().to_string();
    fs::write(&source, &bytes).expect("the source");
    cluster.dog(&["vdi", "import", "disk", &source]).ok();
    assert_eq!(vdi_bytes(&cluster, "disk"), bytes);
    let row = json_of(&mut cluster, &["vdi", "list", "disk"])["vdis"][0].clone();
    assert_eq!(
        (&row["size"], &row["used"]),
        (&json!(bytes.len()), &json!(5 * BLOCK)),
        "two blocks are holes"
    );
    assert!(cluster.dog(&["vdi", "check", "disk"]).ok().contains("finish check&repair disk"));

    cluster.dog(&["vdi", "export", "disk", &target]).ok();
    assert!(fs::read(&target).expect("the export") == bytes);
    let blocks = fs::metadata(&target).expect("the export").blocks() * 512;
    assert!(blocks < (bytes.len() - 2 * BLOCK) as u64, "{blocks} bytes on disk");
    let again = cluster.dog(&["vdi", "export", "disk", &target]);
    assert_eq!((again.code, again.stderr), (2, format!("Failed to write {target}: entity already exists\n")));

    cluster.dog(&["vdi", "snapshot", "disk", "-s", "old"]).ok();
    cluster.dog_in(&["vdi", "write", "disk", "0", "4096"], &[0xee; 4096]).ok();
    cluster.dog(&["vdi", "export", "-s", "old", "-f", "disk", &target]).ok();
    assert!(fs::read(&target).expect("the export") == bytes, "the snapshot, over the old file");
    let piped = Command::new(binaries::dog())
        .args(["vdi", "export", "disk", "-s", "old", "-", "-p", &cluster.nodes[0].port.to_string()])
        .output()
        .expect("dog");
    assert!(piped.status.success() && piped.stdout == bytes);
    let left = fs::read_dir(cluster.dir()).expect("the directory").flatten();
    assert!(
        left.map(|entry| entry.file_name()).all(|name| !name.to_string_lossy().starts_with(".dog-export"))
    );
}

#[test]
fn streams_hypervolumes_and_strips() {
    let mut cluster = Builder::new(3).copies(2).start();
    let bytes = image(5 * BLOCK);
    cluster.dog_in(&["vdi", "import", "piped", "-"], &bytes).ok();
    cluster.dog_in(&["vdi", "import", "hyper", "-", "-y"], &bytes).ok();
    cluster.dog_in(&["vdi", "import", "coded", "-", "-c", "2:1", "-z", "20"], &bytes).ok();
    cluster.dog_in(&["vdi", "import", "empty", "-"], &[]).ok();
    for name in ["piped", "hyper", "coded"] {
        assert!(vdi_bytes(&cluster, name) == bytes, "{name}");
    }
    assert!(vdi_bytes(&cluster, "empty").is_empty());
    let row = json_of(&mut cluster, &["vdi", "list", "coded"])["vdis"][0].clone();
    assert_eq!((&row["copies"], &row["block_size"]), (&json!("2:1"), &json!(1 << 20)));
}

#[test]
fn failed_imports_leave_nothing() {
    let mut cluster = Cluster::new(1);
    cluster.dog(&["vdi", "create", "taken", "4M"]).ok();
    let taken = cluster.dog_in(&["vdi", "import", "taken", "-"], b"x");
    assert_eq!((taken.code, taken.stderr.as_str()), (1, "Failed to create VDI taken: VDI exists already\n"));
    assert_eq!(vdi_bytes(&cluster, "taken").len(), 4 << 20, "it is untouched");
    let missing = cluster.dog(&["vdi", "import", "new", "/nowhere/at/all"]);
    assert_eq!(
        (missing.code, missing.stderr.as_str()),
        (2, "Failed to open /nowhere/at/all: No such file or directory\n")
    );
    assert_eq!(cluster.dog(&["vdi", "import", "new"]).code, 64);
    let (url, server) = serve_once(vec![5; 3 * BLOCK], Some(BLOCK));
    let broken = cluster.dog(&["vdi", "import", "new", &url]);
    server.join().expect("the server");
    assert_eq!(broken.code, 2, "{broken:?}");
    assert!(broken.stderr.contains("the download failed"), "{broken:?}");
    let list = json_of(&mut cluster, &["vdi", "list"]);
    assert_eq!(list["vdis"].as_array().expect("rows").len(), 1, "{list}");
}

/// A web server for one request; it breaks off after `cut` bytes of the body.
fn serve_once(body: Vec<u8>, cut: Option<usize>) -> (String, std::thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}/disk.img", listener.local_addr().expect("an address"));
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        let mut request = Vec::new();
        let mut byte = [0];
        while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).expect("a request") == 1 {
            request.push(byte[0]);
        }
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
        stream.write_all(head.as_bytes()).expect("the client reads");
        stream.write_all(&body[..cut.unwrap_or(body.len())]).expect("the client reads");
    });
    (url, server)
}

#[test]
fn images_come_from_web_servers() {
    binaries::system("curl", "curl");
    let mut cluster = Cluster::new(1);
    let bytes = image(4 * BLOCK + 77 * 1024);
    let (url, server) = serve_once(bytes.clone(), None);
    cluster.dog(&["vdi", "import", "web", &url]).ok();
    server.join().expect("the server");
    assert!(vdi_bytes(&cluster, "web") == bytes);
}

fn qemu_img(args: &[&str]) {
    let output =
        Command::new(binaries::system("qemu-img", "qemu-utils")).args(args).output().expect("qemu-img");
    assert!(output.status.success(), "{args:?}: {output:?}");
}

fn path(dir: &Path, name: &str) -> String {
    dir.join(name).display().to_string()
}

#[test]
fn qcow2_goes_in_and_out() {
    let mut cluster = Builder::new(3).copies(2).start();
    let bytes = image(5 * BLOCK);
    let dir = cluster.dir().to_path_buf();
    let (raw, qcow2, back) = (path(&dir, "raw"), path(&dir, "in.qcow2"), path(&dir, "out.qcow2"));
    fs::write(&raw, &bytes).expect("the source");
    qemu_img(&["convert", "-O", "qcow2", &raw, &qcow2]);
    cluster.dog(&["vdi", "import", "disk", &qcow2]).ok();
    assert!(vdi_bytes(&cluster, "disk") == bytes);
    let row = json_of(&mut cluster, &["vdi", "list", "disk"])["vdis"][0].clone();
    assert_eq!(row["used"], json!(3 * BLOCK), "holes stay holes");
    cluster.dog_in(&["vdi", "import", "piped", "-"], &fs::read(&qcow2).expect("the image")).ok();
    assert!(vdi_bytes(&cluster, "piped") == bytes, "through a temporary file");
    cluster.dog(&["vdi", "import", "as-is", &qcow2, "-O", "raw"]).ok();
    assert!(vdi_bytes(&cluster, "as-is").starts_with(b"QFI\xfb"));

    cluster.dog(&["vdi", "snapshot", "disk", "-s", "old"]).ok();
    cluster.dog_in(&["vdi", "write", "disk", "0", "4096"], &[0xee; 4096]).ok();
    cluster.dog(&["vdi", "export", "-O", "qcow2", "-s", "old", "disk", &back]).ok();
    qemu_img(&["check", "-f", "qcow2", &back]);
    qemu_img(&["compare", "-f", "raw", "-F", "qcow2", &raw, &back]);

    let overlay = path(&dir, "overlay.qcow2");
    qemu_img(&["create", "-f", "qcow2", "-b", &qcow2, "-F", "qcow2", &overlay]);
    let refused = cluster.dog(&["vdi", "import", "overlay", &overlay]);
    assert!(refused.code == 1 && refused.stderr.starts_with("the image has a backing file"), "{refused:?}");
    assert_eq!(json_of(&mut cluster, &["vdi", "list", "overlay"])["vdis"], json!([]));
}
