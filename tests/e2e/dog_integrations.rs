//! What libvirt, Proxmox VE, Cinder and Glance run, and what they read from it (spec 08, section 6).

use std::io::Write;
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};

use sheepdog_testkit::{Builder, Cluster, Output, binaries};

/// Runs a program as those do: with a command line of their own, and with nothing in the environment.
fn run(program: &str, args: &[&str], stdin: &[u8]) -> std::process::Output {
    let mut command = Command::new(program);
    command.args(args).env_remove("SHEEPDOG_DOG_PORT");
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.unwrap_or_else(|e| panic!("{program}: {e}"));
    child.stdin.take().expect("piped").write_all(stdin).expect("all is read");
    child.wait_with_output().expect("it ends")
}

/// `words`, with `ADDRESS` for the options of address and port, in their place.
fn dog(cluster: &Cluster, words: &str) -> Output {
    let port = cluster.nodes[0].port.to_string();
    let words = words.replace("ADDRESS", &format!("-a 127.0.0.1 -p {port}"));
    let words: Vec<&str> = words.split(' ').collect();
    Output::of(run(&binaries::dog().display().to_string(), &words, b""))
}

/// Two decimal numbers behind `Total` at the start of a line.
fn total(output: &str) -> (u64, u64) {
    let line = output.lines().find_map(|line| line.strip_prefix("Total ")).expect("a line of the total");
    let mut numbers = line.split(' ').map(|word| word.parse().expect("a number"));
    (numbers.next().expect("capacity"), numbers.next().expect("allocation"))
}

fn plain() -> Cluster {
    Builder::new(2).copies(2).start()
}

#[test]
fn libvirt_lists_creates_resizes_and_deletes_volumes() {
    let cluster = plain();
    let (capacity, allocation) = total(&dog(&cluster, "node info -r ADDRESS").ok());
    assert!(capacity > allocation);
    dog(&cluster, "vdi create one 8388608 ADDRESS").ok();
    dog(&cluster, "vdi create two 4194304 ADDRESS").ok();
    let list = dog(&cluster, "vdi list -r ADDRESS").ok();
    let mut names: Vec<&str> = list.lines().filter_map(|line| line.split(' ').nth(1)).collect();
    names.sort();
    assert_eq!(names, ["one", "two"]);
    dog(&cluster, "vdi resize one 16777216 ADDRESS").ok();
    let shown = dog(&cluster, "vdi list one -r ADDRESS").ok();
    let row = shown.lines().find_map(|line| line.strip_prefix("= one ")).expect("a row");
    assert!(row.starts_with("0 16777216 0 "), "{row}");
    dog(&cluster, "vdi delete one ADDRESS").ok();
    assert_eq!(dog(&cluster, "vdi list one -r ADDRESS").ok(), "");
}

#[test]
fn proxmox_finds_disks_bases_and_snapshots() {
    let cluster = plain();
    dog(&cluster, "vdi create ADDRESS vm-100-disk-1 8192k").ok();
    dog(&cluster, "vdi snapshot ADDRESS -s before vm-100-disk-1").ok();
    dog(&cluster, "vdi clone ADDRESS -s before vm-100-disk-1 base-101-disk-1").ok();
    let list = dog(&cluster, "vdi list ADDRESS -r").ok();
    let rows: Vec<Vec<&str>> = list.lines().map(|line| line.split(' ').collect()).collect();
    let row = |kind: &str, name: &str| {
        let row = rows.iter().find(|row| row[0] == kind && row[1] == name);
        row.unwrap_or_else(|| panic!("no {kind} {name} in {list}"))
    };
    let (disk, clone) = (row("=", "vm-100-disk-1"), row("c", "base-101-disk-1"));
    let snapshot = row("s", "vm-100-disk-1");
    assert_eq!((disk[3], disk[9], snapshot[9]), ("8388608", "", "before"), "an empty tag leaves two blanks");
    // Parents come from the graph, joined by the ids of the list.
    let graph = dog(&cluster, "vdi graph ADDRESS").ok();
    for child in [disk, clone] {
        let edge = format!(
            "  \"{}\" -> \"{}\";\n  \"{1}\" [\n    group = \"{}\",\n",
            snapshot[7], child[7], child[1]
        );
        assert!(graph.contains(&edge), "{edge} in {graph}");
    }
    dog(&cluster, "vdi resize ADDRESS vm-100-disk-1 16777216").ok();
    dog(&cluster, "vdi rollback ADDRESS -f -s before vm-100-disk-1").ok();
    dog(&cluster, "vdi delete ADDRESS base-101-disk-1").ok();
    dog(&cluster, "vdi delete ADDRESS -s before vm-100-disk-1").ok();
    let left = dog(&cluster, "vdi list ADDRESS -r").ok();
    assert_eq!(left.lines().count(), 1, "{left}");
    assert!(left.starts_with("= vm-100-disk-1 0 8388608 "), "the size of the snapshot: {left}");
}

#[test]
fn cinder_tells_states_and_failures_apart_by_their_texts() {
    let cluster = Builder::new(2).unformatted().start();
    let states = ["Cluster status: Waiting for cluster to be formatted", "Cluster status: running"];
    assert!(dog(&cluster, "cluster info ADDRESS").ok().starts_with(states[0]));
    dog(&cluster, "cluster format -c 2 ADDRESS").ok();
    sheepdog_testkit::wait("the cluster to run", || {
        dog(&cluster, "cluster info ADDRESS").ok().starts_with(states[1])
    });
    dog(&cluster, "vdi create ADDRESS volume 1G").ok();
    let again = dog(&cluster, "vdi create ADDRESS volume 1G");
    assert!(again.code == 1 && again.stderr.ends_with(": VDI exists already\n"), "{again:?}");
    dog(&cluster, "vdi snapshot volume -s snap ADDRESS").ok();
    dog(&cluster, "vdi delete ADDRESS volume -s snap").ok();
    let missing = dog(&cluster, "vdi delete ADDRESS nosuch");
    assert!(missing.code == 0 && missing.stderr.ends_with(": No VDI found\n"), "{missing:?}");
    let port = cluster.nodes[0].port;
    dog(&cluster, &format!("vdi list --address 127.0.0.1 --port {port} volume")).ok();
    dog(&cluster, "vdi resize volume 2147483648 ADDRESS").ok();
    total(&dog(&cluster, "node info -r ADDRESS").ok());
    let nobody = sheepdog_testkit::Ports::reserve_many(1);
    let refused = dog(&cluster, &format!("cluster info -p {}", nobody.get(0)));
    assert!(refused.code == 2 && refused.stderr.starts_with("failed to connect to "), "{refused:?}");
}

/// Under the program's former name.
#[test]
fn glance_stores_and_reads_an_image_with_collie() {
    let cluster = plain();
    let collie = cluster.dir().join("collie").display().to_string();
    symlink(binaries::dog(), &collie).expect("a link");
    assert_eq!(run(&collie, &[], b"").status.code(), Some(0));
    let port = cluster.nodes[0].port.to_string();
    let call = |sub: &str, name: &str, params: &[&str], stdin: &[u8]| {
        let sub: Vec<&str> = sub.split(' ').collect();
        let args = [&["vdi"], &sub[..], &["-a", "127.0.0.1", "-p", &port, name], params].concat();
        let output = run(&collie, &args, stdin);
        assert!(output.status.success(), "{args:?}: {output:?}");
        output.stdout
    };
    assert!(call("list -r", "image", &[], b"").is_empty());
    call("create", "image", &["8388608"], b"");
    let image: Vec<u8> = (0..6_000_000u32).map(|i| (i / 7) as u8).collect();
    call("write", "image", &["0", "6000000"], &image);
    assert_eq!(call("read", "image", &["1000000", "5000000"], b""), image[1_000_000..]);
    call("resize", "image", &["16777216"], b"");
    let row = String::from_utf8(call("list -r", "image", &[], b"")).expect("text");
    assert_eq!(row.split_whitespace().nth(3), Some("16777216"), "{row}");
    call("delete", "image", &[], b"");
    let output = run(&collie, &["vdi", "list", "-Z"], b"");
    assert_eq!(output.status.code(), Some(64));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("collie: invalid option -- 'Z'\n"), "{stderr}");
}
