//! The last QEMU with the Sheepdog driver (5.2) as users run it: qemu-img, qemu-io, qemu-nbd, and savevm of a machine
//! (spec 01, 16). `scripts/qemu-sheepdog` builds it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};
use sheepdog_proto::{ClusterFlags, ResultCode, VdiId};
use sheepdog_testkit::binaries::{qemu_sheepdog, system};
use sheepdog_testkit::{Builder, Cluster, Output, Vdi, wait, wait_for};

const MIB: u64 = 1 << 20;

fn locking() -> ClusterFlags {
    ClusterFlags::AUTO_VNODES.with(ClusterFlags::USE_LOCK)
}

/// A cluster of three with locks on, as QEMU's users run it.
fn cluster() -> Cluster {
    Builder::new(3).flags(locking()).start()
}

pub(crate) fn unix(cluster: &Cluster, node: usize, vdi: &str) -> String {
    let (name, fragment) = vdi.split_once('#').map_or((vdi, String::new()), |(n, f)| (n, format!("#{f}")));
    format!("sheepdog+unix:///{name}?socket={}{fragment}", cluster.nodes[node].sock().display())
}

pub(crate) fn tcp(cluster: &Cluster, node: usize, vdi: &str) -> String {
    format!("sheepdog://127.0.0.1:{}/{vdi}", cluster.nodes[node].port)
}

/// The syntax from before URLs.
fn plain(cluster: &Cluster, node: usize, vdi: &str) -> String {
    format!("sheepdog:127.0.0.1:{}:{vdi}", cluster.nodes[node].port)
}

fn run(program: &str, args: &[&str]) -> Output {
    let output = Command::new(qemu_sheepdog(program))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    let output = Output::of(output);
    eprintln!("{program} {}\n{}{}", args.join(" "), output.stdout, output.stderr);
    output
}

pub(crate) fn img(args: &[&str]) -> String {
    run("qemu-img", args).ok()
}

/// qemu-io, each command one `-c`; every command must succeed.
pub(crate) fn io(image: &str, commands: &[&str]) {
    let output = io_output(image, commands);
    let text = output.stdout.clone() + &output.stderr;
    output.ok();
    assert!(!text.contains("failed") && !text.contains("error"), "{text}");
}

pub(crate) fn io_output(image: &str, commands: &[&str]) -> Output {
    let mut args = vec!["-f", "raw"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(image);
    run("qemu-io", &args)
}

fn random_image(path: &Path, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    let mut random = SmallRng::seed_from_u64(5);
    for range in [0..70_000, (4 << 20) - 512..(5 << 20), size - 4096..size] {
        random.fill_bytes(&mut bytes[range]);
    }
    fs::write(path, &bytes).expect("an image");
    bytes
}

#[test]
fn images_go_in_and_out_over_every_kind_of_address() {
    let mut cluster = cluster();
    let size = 24 << 20;
    let (input, output) = (cluster.dir().join("in.raw"), cluster.dir().join("out.raw"));
    let bytes = random_image(&input, size);
    let (input, output) = (input.display().to_string(), output.display().to_string());
    let addresses = [unix(&cluster, 0, "a"), tcp(&cluster, 1, "b"), plain(&cluster, 2, "c")];
    for address in &addresses {
        img(&["convert", "-f", "raw", "-O", "raw", &input, address]);
        img(&["compare", "-f", "raw", "-F", "raw", &input, address]);
    }
    // What one address wrote another one reads, through another node.
    img(&["convert", "-f", "raw", "-O", "raw", &tcp(&cluster, 2, "a"), &output]);
    assert!(fs::read(&output).expect("the image") == bytes);
    img(&["convert", "-f", "raw", "-O", "raw", &addresses[1], &unix(&cluster, 0, "d")]);
    img(&["compare", "-f", "raw", "-F", "raw", &input, &plain(&cluster, 1, "d")]);
    let info = img(&["info", "-f", "raw", &addresses[0]]);
    assert!(info.contains("virtual size: 24 MiB"), "{info}");
    let locks = cluster.dog(&["vdi", "lock", "list"]).ok();
    assert_eq!(locks.lines().count(), 1, "every lock was given back: {locks}");
    cluster.assert_replicas_equal(3);
}

#[test]
fn creation_options_reach_the_vdi() {
    let mut cluster = cluster();
    img(&["create", "-f", "raw", "-o", "redundancy=2", &tcp(&cluster, 0, "two"), "8M"]);
    img(&["create", "-f", "raw", "-o", "redundancy=2:1", &tcp(&cluster, 0, "coded"), "8M"]);
    img(&["create", "-f", "raw", "-o", "object_size=1M", &tcp(&cluster, 0, "small"), "8M"]);
    let mut client = cluster.client();
    let mut redundancy = |name: &str| {
        let vid = client.lookup(name, "", 0).expect("it exists");
        let header = client.inode(vid).expect("an inode");
        (header.nr_copies, header.copy_policy, header.block_size_shift)
    };
    assert_eq!(redundancy("two"), (2, 0, 22));
    assert_eq!(redundancy("coded"), (3, 0x11, 22));
    assert_eq!(redundancy("small"), (3, 0, 20));
    for name in ["two", "coded", "small"] {
        let image = unix(&cluster, 1, name);
        io(&image, &["write -P 7 3M 2M", "read -P 7 3M 2M", "read -P 0 0 3M"]);
    }
    assert_ne!(run("qemu-img", &["create", "-f", "raw", &tcp(&cluster, 0, "two"), "8M"]).code, 0, "taken");
}

#[test]
fn patterns_discards_and_a_larger_size_read_back() {
    let mut cluster = cluster();
    let image = unix(&cluster, 0, "vm");
    img(&["create", "-f", "raw", &image, "16M"]);
    io(
        &image,
        &[
            "write -P 0x11 0 9M",
            "write -P 0x22 1000 3",
            "write -P 0x33 4194000 1000",
            "write -f -P 0x44 12M 64k",
            "write -z 5M 1M",
            "flush",
            "read -P 0x11 0 1000",
            "read -P 0x22 1000 3",
            "read -P 0x33 4194000 1000",
            "read -P 0x44 12M 64k",
            "read -P 0 5M 1M",
            "read -P 0 13M 3M",
            "aio_write -P 0x55 8M 4M",
            "aio_write -P 0x66 0 2M",
            "aio_flush",
            "read -P 0x55 8M 4M",
            "read -P 0x66 0 2M",
        ],
    );
    let mut client = cluster.client();
    let vid = client.lookup("vm", "", 0).expect("it exists");
    io(&image, &["discard 4M 4M", "read -P 0 4M 4M"]);
    assert_eq!(Vdi::open(&mut client, vid).expect("open").table[1], 0, "a whole block is given back");
    wait("its object to go", || {
        (0..3).all(|n| cluster.object_path(n, sheepdog_proto::Oid::data(vid, 1)).is_none())
    });
    img(&["resize", "-f", "raw", &image, "40M"]);
    io(&tcp(&cluster, 1, "vm"), &["write -P 0x77 38M 2M", "read -P 0x55 8M 4M", "read -P 0x77 38M 2M"]);
    assert_ne!(run("qemu-img", &["resize", "-f", "raw", "--shrink", &image, "8M"]).code, 0);
}

#[test]
fn snapshots_are_taken_listed_opened_cloned_and_gone_back_to() {
    let mut cluster = cluster();
    let image = unix(&cluster, 0, "vm");
    img(&["create", "-f", "raw", &image, "16M"]);
    io(&image, &["write -P 1 0 6M"]);
    img(&["snapshot", "-c", "first", &image]);
    io(&image, &["write -P 2 0 1M", "write -P 2 12M 1M"]);
    img(&["snapshot", "-c", "second", &image]);
    io(&image, &["write -P 3 0 1M"]);
    let list = img(&["snapshot", "-l", &tcp(&cluster, 2, "vm")]);
    let tags: Vec<&str> =
        list.lines().filter_map(|l| l.split_whitespace().nth(1)).filter(|w| *w != "list:").collect();
    assert_eq!(tags, ["TAG", "first", "second"], "{list}");
    // By tag and by id, through other nodes, in both syntaxes.
    io(&unix(&cluster, 1, "vm#first"), &["read -P 1 0 6M", "read -P 0 12M 1M"]);
    io(&tcp(&cluster, 2, "vm#2"), &["read -P 2 0 1M", "read -P 1 1M 5M", "read -P 2 12M 1M"]);
    io(&plain(&cluster, 0, "vm:first"), &["read -P 1 0 6M"]);
    // Clones, and a clone's snapshot.
    img(&["create", "-f", "raw", "-b", &tcp(&cluster, 0, "vm#first"), &tcp(&cluster, 1, "clone")]);
    let clone = unix(&cluster, 2, "clone");
    io(&clone, &["read -P 1 0 6M", "write -P 9 1M 64k", "read -P 9 1M 64k"]);
    img(&["snapshot", "-c", "own", &clone]);
    io(&unix(&cluster, 1, "vm#first"), &["read -P 1 0 6M"]);
    // Back to the first one.
    img(&["snapshot", "-a", "first", &image]);
    io(&image, &["read -P 1 0 6M", "read -P 0 12M 1M", "write -P 4 2M 1M"]);
    io(&tcp(&cluster, 1, "vm#second"), &["read -P 2 0 1M", "read -P 1 1M 5M"]);
    assert_ne!(run("qemu-img", &["snapshot", "-a", "nosuch", &image]).code, 0);
    let locks = cluster.dog(&["vdi", "lock", "list"]).ok();
    assert_eq!(locks.lines().count(), 1, "no lock stays behind, on no snapshot: {locks}");
    // Everything goes when all is deleted.
    for (name, tag) in [("vm", "first"), ("vm", "second"), ("clone", "own")] {
        cluster.dog(&["vdi", "delete", name, "-s", tag]).ok();
    }
    io(&clone, &["read -P 9 1M 64k", "read -P 1 2M 4M"]);
    io(&image, &["read -P 4 2M 1M", "read -P 1 3M 3M"]);
    cluster.dog(&["vdi", "delete", "vm"]).ok();
    cluster.dog(&["vdi", "delete", "clone"]).ok();
    wait("all objects to go", || (0..3).all(|n| cluster.objects_of(n).keys().all(|oid| oid.is_inode())));
}

/// QEMU clears the table of the volume that is open, not of the snapshot (05, 11): what it does to the volume it does
/// itself. The snapshot is deleted, and no object stays behind.
#[test]
fn deleting_a_snapshot_by_qemu_leaves_no_limbo() {
    let mut cluster = cluster();
    let image = unix(&cluster, 0, "vm");
    img(&["create", "-f", "raw", &image, "16M"]);
    io(&image, &["write -P 1 0 6M"]);
    img(&["snapshot", "-c", "s", &image]);
    io(&image, &["write -P 2 0 1M"]);
    img(&["snapshot", "-d", "s", &image]);
    let mut client = cluster.client();
    assert_eq!(client.lookup("vm", "s", 0), Err(ResultCode::NO_TAG));
    assert!(!img(&["snapshot", "-l", &image]).contains(" s "));
    io(&image, &["read -P 0 0 16M", "write -P 3 0 1M", "read -P 3 0 1M"]);
    cluster.dog(&["vdi", "delete", "vm"]).ok();
    wait("all objects to go", || (0..3).all(|n| cluster.objects_of(n).keys().all(|oid| oid.is_inode())));
}

/// The first write to an opened snapshot makes it the current state (01, 16.7). Without locks: QEMU never gives that of
/// the snapshot back.
#[test]
fn writing_to_a_snapshot_branches_from_it() {
    let mut cluster = Cluster::new(3);
    let image = unix(&cluster, 0, "vm");
    img(&["create", "-f", "raw", &image, "16M"]);
    io(&image, &["write -P 1 0 6M"]);
    img(&["snapshot", "-c", "base", &image]);
    io(&image, &["write -P 2 0 6M", "write -P 2 8M 1M"]);
    io(&unix(&cluster, 1, "vm#base"), &["write -P 3 1M 1M", "read -P 3 1M 1M", "read -P 1 2M 4M"]);
    io(&image, &["read -P 1 0 1M", "read -P 3 1M 1M", "read -P 1 2M 4M", "read -P 0 8M 1M"]);
    io(&unix(&cluster, 2, "vm#base"), &["read -P 1 0 6M"]);
    let list = cluster.dog(&["vdi", "list", "-r"]).ok();
    assert_eq!(list.lines().count(), 2, "the snapshot and the branch: {list}");
}

/// A qemu-io that stays open.
pub(crate) struct Session {
    pub(crate) child: Child,
    pub(crate) stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Session {
    pub(crate) fn open(image: &str) -> Session {
        let mut child = Command::new(qemu_sheepdog("qemu-io"))
            .args(["-f", "raw", image])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("qemu-io");
        let stdin = child.stdin.take().expect("piped");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        Session { child, stdin, stdout }
    }

    /// Sends a command and waits for its line.
    pub(crate) fn say(&mut self, command: &str) {
        writeln!(self.stdin, "{command}").expect("qemu-io listens");
        loop {
            let mut line = String::new();
            assert_ne!(
                self.stdout.read_line(&mut line).expect("qemu-io answers"),
                0,
                "{command}: qemu-io ended"
            );
            eprint!("{command}: {line}");
            assert!(!line.contains("failed"), "{command}: {line}");
            if line.contains("bytes at offset") {
                return;
            }
        }
    }

    fn close(mut self) {
        drop(self.stdin);
        assert!(self.child.wait().expect("qemu-io ends").success());
    }
}

/// Somebody else takes snapshots, and rolls back nothing: the driver hears READONLY and follows (01, 16.6). Its lock goes
/// along, so that nobody else gets in, and is given back at the end.
#[test]
fn a_running_client_follows_snapshots_of_others() {
    let mut cluster = cluster();
    let image = unix(&cluster, 0, "vm");
    img(&["create", "-f", "raw", &image, "16M"]);
    let mut session = Session::open(&image);
    session.say("write -P 1 0 6M");
    for round in 0..3_u32 {
        cluster.dog_at(1, &["vdi", "snapshot", "vm", "-s", &format!("s{round}")], &[]).ok();
        let refused = run("qemu-io", &["-f", "raw", "-c", "read 0 512", &tcp(&cluster, 2, "vm")]);
        assert_ne!(refused.code, 0, "the working VDI is still locked");
        let (a, b) = (round + 10, round + 20);
        session.say(&format!("write -P {a} {round}M 1M")); // a block of the snapshot's
        session.say(&format!("write -P {b} {}M 64k", 8 + 4 * (round % 2))); // a new one, or one of the last snapshot's
        session.say(&format!("read -P {a} {round}M 1M"));
        session.say(&format!("read -P 1 {}M 1M", round + 1));
    }
    session.close();
    let locks = cluster.dog(&["vdi", "lock", "list"]).ok();
    assert_eq!(locks.lines().count(), 1, "{locks}");
    io(&unix(&cluster, 2, "vm#s0"), &["read -P 1 0 6M", "read -P 0 6M 10M"]);
    io(&unix(&cluster, 2, "vm#s1"), &["read -P 10 0 1M", "read -P 1 1M 5M", "read -P 20 8M 64k"]);
    io(&unix(&cluster, 2, "vm#s2"), &["read -P 11 1M 1M", "read -P 1 2M 4M", "read -P 21 12M 64k"]);
    io(&image, &["read -P 12 2M 1M", "read -P 22 8M 64k", "read -P 21 12M 64k"]);
}

/// The first thing that a machine does after somebody took a snapshot is a discard (`fstrim`): it is of the working VDI.
#[test]
fn a_discard_after_a_snapshot_of_others_leaves_the_snapshot_alone() {
    let cluster = cluster();
    let image = unix(&cluster, 0, "vm");
    img(&["create", "-f", "raw", &image, "16M"]);
    let mut session = Session::open(&image);
    session.say("write -P 1 0 12M");
    cluster.dog_at(1, &["vdi", "snapshot", "vm", "-s", "s"], &[]).ok();
    writeln!(session.stdin, "discard 4M 4M").expect("qemu-io listens");
    session.say("read -P 0 4M 4M");
    session.say("read -P 1 8M 4M");
    session.close();
    io(&unix(&cluster, 2, "vm#s"), &["read -P 1 0 12M"]);
    io(&image, &["read -P 1 0 4M", "read -P 0 4M 4M", "read -P 1 8M 4M"]);
}

/// A second client is kept out by the lock, also after the first one's sheep took a snapshot; `dog` can free it.
#[test]
fn a_locked_image_is_busy() {
    let mut cluster = cluster();
    let image = unix(&cluster, 0, "vm");
    img(&["create", "-f", "raw", &image, "8M"]);
    // Over TCP nobody can know that the client has died.
    let mut session = Session::open(&tcp(&cluster, 0, "vm"));
    session.say("write -P 1 0 1M");
    for address in [image.clone(), tcp(&cluster, 1, "vm")] {
        let refused = io_output(&address, &["read 0 512"]);
        assert!(refused.code != 0 && refused.stderr.contains("locked"), "{refused:?}");
    }
    let _ = session.child.kill(); // as after a crash: no release
    let _ = session.child.wait();
    assert_ne!(io_output(&image, &["read 0 512"]).code, 0, "the lock outlives its client");
    cluster.dog(&["vdi", "lock", "unlock", "vm"]).ok();
    io(&image, &["read -P 1 0 1M"]);
}

/// The monitor of a machine whose disk is the image.
fn monitor(image: &str, commands: &str) -> String {
    let mut child = Command::new(qemu_sheepdog("qemu-system-moxie"))
        .args(["-machine", "none", "-display", "none", "-nodefaults", "-S", "-monitor", "stdio", "-drive"])
        .arg(format!("if=none,id=d,format=raw,file={image}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .expect("qemu-system-moxie");
    child.stdin.take().expect("piped").write_all(commands.as_bytes()).expect("the monitor listens");
    let mut child = Some(child);
    let status = wait_for("the machine to quit", Duration::from_secs(60), || {
        child.as_mut().and_then(|c| c.try_wait().expect("qemu"))
    });
    let output = child.take().expect("started").wait_with_output().expect("its output");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    eprintln!("{text}");
    assert!(status.success());
    assert!(!text.contains("Error"), "{text}");
    text
}

/// A VM's memory goes into objects of the snapshot and comes back (05, 23); deleting the snapshot removes them.
#[test]
fn a_machine_is_saved_and_restored() {
    let mut cluster = cluster();
    let image = unix(&cluster, 0, "vm");
    img(&["create", "-f", "raw", &image, "16M"]);
    io(&image, &["write -P 1 0 6M"]);
    monitor(&image, "savevm live\nquit\n");
    io(&image, &["write -P 2 0 6M"]);
    let mut client = cluster.client();
    let snapshot = client.lookup("vm", "live", 0).expect("the snapshot");
    let size = client.inode(snapshot).expect("its inode").vm_state_size;
    assert!(size > 0, "the machine's state has a size");
    let state = sheepdog_proto::Oid::vmstate(snapshot, 0);
    assert_eq!(cluster.holders(state), [0, 1, 2]);
    let text = monitor(&tcp(&cluster, 1, "vm"), "loadvm live\ninfo snapshots\nquit\n");
    assert!(text.contains("live"), "{text}");
    io(&image, &["read -P 1 0 6M"]);
    monitor(&image, "savevm again\nloadvm live\nloadvm again\nquit\n");
    io(&image, &["read -P 1 0 6M"]);
    cluster.dog(&["vdi", "delete", "vm", "-s", "live"]).ok();
    wait("the saved state to go", || cluster.holders(state).is_empty());
    let locks = cluster.dog(&["vdi", "lock", "list"]).ok();
    assert_eq!(locks.lines().count(), 1, "{locks}");
}

#[test]
fn a_deep_queue_is_served() {
    let cluster = cluster();
    let image = unix(&cluster, 0, "bench");
    img(&["create", "-f", "raw", &image, "32M"]);
    let common = ["-f", "raw", "-c", "1000", "-d", "64", "-s", "4096"];
    let steps = ["-S", "20480"];
    img(&[&["bench", "-w", "--pattern=17"], common.as_slice(), &steps, &[image.as_str()]].concat());
    img(&[&["bench"], common.as_slice(), &steps, &[image.as_str()]].concat());
    img(&[
        &["bench", "-w", "--flush-interval=100"],
        common.as_slice(),
        &[tcp(&cluster, 1, "bench").as_str()],
    ]
    .concat());
    // The first 4 KiB of every fifth sector group were written with the pattern by the first run.
    io(&image, &["read -P 17 12308480 4096"]);
}

/// Writes, discards and reads at random places, up to 64 in flight, through changing nodes, with snapshots in between; what
/// each snapshot and the volume then have is compared byte by byte with what was written.
#[test]
fn a_deep_queue_of_random_requests_keeps_every_byte() {
    const SIZE: usize = 40 << 20;
    const SECTOR: usize = 512;
    const BLOCK: usize = 4 << 20;
    let seed = std::env::var("SHEEPDOG_QEMU_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(20_26);
    eprintln!("seed {seed}");
    let mut random = SmallRng::seed_from_u64(seed);
    let mut below = move |n: usize| (random.next_u64() % n as u64) as usize;
    let mut cluster = Builder::new(4).flags(locking()).start();
    img(&["create", "-f", "raw", &unix(&cluster, 0, "vm"), "40M"]);
    let mut model = vec![0_u8; SIZE / SECTOR];
    let mut snapshots = Vec::new();
    let mut requests = 0;
    for round in 0..16 {
        // What is in flight together does not overlap: its order would be open.
        let mut taken = vec![false; SIZE / SECTOR];
        let mut commands = Vec::new();
        for _ in 0..4 {
            for _ in 0..64 {
                let len = if below(4) == 0 { 1 + below(600) } else { 1 + below(32) };
                let first = below(SIZE / SECTOR - len);
                let (range, at) = (first..first + len, first * SECTOR);
                if taken[range.clone()].contains(&true) {
                    continue;
                }
                let same = model[range.clone()].iter().all(|byte| *byte == model[first]);
                let byte = 1 + below(255) as u8;
                match below(8) {
                    0 | 1 if same => {
                        commands.push(format!("aio_read -P {} {at} {}", model[first], len * SECTOR))
                    }
                    2 => {
                        commands.push(format!("aio_write -z {at} {}", len * SECTOR));
                        model[range.clone()].fill(0);
                    }
                    _ => {
                        commands.push(format!("aio_write -P {byte} {at} {}", len * SECTOR));
                        model[range.clone()].fill(byte);
                    }
                }
                taken[range].fill(true);
                requests += 1;
            }
            commands.push("aio_flush".into());
            taken.fill(false);
            if below(3) == 0 {
                let block = below(SIZE / BLOCK);
                commands.push(format!("discard {} {BLOCK}", block * BLOCK));
                model[block * BLOCK / SECTOR..(block + 1) * BLOCK / SECTOR].fill(0);
            }
        }
        let image =
            if round % 2 == 0 { unix(&cluster, round % 4, "vm") } else { tcp(&cluster, round % 4, "vm") };
        io(&image, &commands.iter().map(String::as_str).collect::<Vec<_>>());
        if round % 5 == 2 {
            let tag = format!("s{round}");
            cluster.dog_at(1, &["vdi", "snapshot", "vm", "-s", &tag], &[]).ok();
            snapshots.push((tag, model.clone()));
        }
    }
    eprintln!("{requests} requests");
    snapshots.push((String::new(), model));
    let output = cluster.dir().join("out.raw").display().to_string();
    for (tag, model) in snapshots {
        let name = if tag.is_empty() { "vm".to_owned() } else { format!("vm#{tag}") };
        img(&["convert", "-f", "raw", "-O", "raw", &tcp(&cluster, 3, &name), &output]);
        let bytes = fs::read(&output).expect("the image");
        assert_eq!(bytes.len(), SIZE);
        for (sector, (found, byte)) in bytes.chunks(SECTOR).zip(model).enumerate() {
            assert!(
                found.iter().all(|b| *b == byte),
                "{name}, sector {sector}: not {byte} but {:?}",
                &found[..8]
            );
        }
    }
    cluster.assert_replicas_equal(3);
}

/// fio over `qemu-nbd`, as users attach volumes to programs that know no Sheepdog, while snapshots are taken and a node
/// dies.
#[test]
fn fio_verifies_through_qemu_nbd() {
    let mut cluster = Builder::new(4).start();
    let image = tcp(&cluster, 0, "vm");
    img(&["create", "-f", "raw", &image, "32M"]);
    let socket = cluster.dir().join("qemu-nbd.sock");
    let mut server = Command::new(qemu_sheepdog("qemu-nbd"))
        .args(["-f", "raw", "-t", "-e", "4", "-k"])
        .arg(&socket)
        .arg(&image)
        .stdin(Stdio::null())
        .spawn()
        .expect("qemu-nbd");
    wait("qemu-nbd to listen", || socket.exists());
    let mut fio = Command::new(system("fio", "fio"))
        .args(["--name=vm", "--ioengine=nbd", "--rw=randwrite", "--bs=4k-64k", "--iodepth=32", "--size=32M"])
        .args(["--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--randseed=1", "--loops=2"])
        .arg(format!("--uri=nbd+unix:///?socket={}", socket.display()))
        .current_dir(cluster.dir())
        .stdin(Stdio::null())
        .spawn()
        .expect("fio");
    let mut disturbed = 0_usize;
    while fio.try_wait().expect("fio").is_none() {
        match disturbed {
            0..4 => drop(
                cluster.nodes[disturbed % 3]
                    .client()
                    .snapshot("vm", &format!("s{disturbed}"))
                    .expect("snapshot"),
            ),
            4 => cluster.kill9(3),
            _ => {}
        }
        disturbed += 1;
        std::thread::sleep(Duration::from_millis(100)); // the pace of what happens, nothing waits for it
    }
    assert!(fio.wait().expect("fio").success(), "fio found something else than it wrote");
    assert!(disturbed > 0);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(server.id() as i32), nix::sys::signal::Signal::SIGTERM)
        .expect("qemu-nbd runs");
    assert!(server.wait().expect("qemu-nbd ends").success());
    let vid: VdiId = cluster.client().lookup("vm", "", 0).expect("it exists");
    assert!(Vdi::open(&mut cluster.client(), vid).is_ok());
    assert_eq!(32 * MIB, cluster.client().inode(vid).expect("inode").vdi_size);
}
