//! Hypervolumes (spec 01, 13; spec 05, 22): 16 PB, an index of several nodes, snapshots, clones, locks, deletion.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use sheepdog_proto::btree::{BTREE_NODE_LEN, BtreeNode, InnerEntry, LeafEntry, MAX_LEAF_ENTRIES};
use sheepdog_proto::header::VdiRequest;
use sheepdog_proto::inode::TABLE_OFFSET;
use sheepdog_proto::{ClusterFlags, ObjectKind, Oid, Opcode, ResultCode, VdiId};
use sheepdog_testkit::binaries::system;
use sheepdog_testkit::{Builder, Client, Cluster, Output, wait, wait_for};

const BLOCK: u64 = 4 << 20;
const END: u64 = 1 << 54;

/// Locks on, and an NBD socket at every node.
fn cluster() -> Cluster {
    let flags = ClusterFlags::AUTO_VNODES.with(ClusterFlags::USE_LOCK);
    Builder::new(3).flags(flags).arg("--nbd").arg("unix:{dir}/nbd{i}.sock").start()
}

fn uri(cluster: &Cluster, node: usize, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}/nbd{node}.sock", cluster.dir().display())
}

/// A qemu-io that stays open.
struct Session {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Session {
    fn open(image: &str) -> Session {
        let mut child = Command::new(system("qemu-io", "qemu-utils"))
            .args(["-f", "raw", image])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io");
        let stdin = child.stdin.take().expect("piped");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        Session { child, stdin, stdout }
    }

    fn say(&mut self, command: &str) {
        writeln!(self.stdin, "{command}").expect("qemu-io listens");
        loop {
            let mut line = String::new();
            assert_ne!(self.stdout.read_line(&mut line).expect("an answer"), 0, "{command}: qemu-io ended");
            eprint!("{command}: {line}");
            assert!(!line.contains("failed") && !line.contains("error"), "{command}: {line}");
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

fn io(image: &str, commands: &[&str]) -> Output {
    let mut command = Command::new(system("qemu-io", "qemu-utils"));
    command.args(["-f", "raw"]);
    for c in commands {
        command.args(["-c", c]);
    }
    let output = Output::of(command.arg(image).stdin(Stdio::null()).output().expect("qemu-io"));
    eprintln!("{commands:?}\n{}{}", output.stdout, output.stderr);
    output
}

fn must_io(image: &str, commands: &[&str]) {
    let output = io(image, commands);
    assert!(output.code == 0 && !output.stdout.contains("failed"), "{output:?}");
}

fn root(client: &mut Client, vid: VdiId) -> BtreeNode {
    let (response, bytes) =
        client.read_obj(Oid::inode(vid), TABLE_OFFSET as u32, BTREE_NODE_LEN).expect("an answer");
    assert_eq!(response.result, ResultCode::SUCCESS);
    BtreeNode::decode(&bytes)
}

fn leaves(client: &mut Client, vid: VdiId) -> Vec<InnerEntry> {
    match root(client, vid) {
        BtreeNode::Inner(leaves) => leaves,
        BtreeNode::Leaf(entries) => panic!("a single node of {} entries", entries.len()),
    }
}

/// Fills the index's root but for a few places by entries of blocks that were given back.
fn fill_index(client: &mut Client, vid: VdiId) {
    let entries = (10..10 + MAX_LEAF_ENTRIES as u32 - 2).map(|idx| LeafEntry { idx, vdi_id: 0 }).collect();
    let header = client.inode(vid).expect("its inode");
    let bytes = [sheepdog_proto::Wire::encode(&header), BtreeNode::Leaf(entries).encode()].concat();
    assert_eq!(client.write_obj(Oid::inode(vid), 0, &bytes).expect("an answer"), ResultCode::SUCCESS);
}

fn wait_only_inodes(cluster: &Cluster) {
    wait_for("all objects but inodes to be gone", Duration::from_secs(90), || {
        (0..3).all(|n| cluster.objects_of(n).keys().all(|oid| oid.is_inode())).then_some(())
    });
}

#[test]
fn sixteen_petabytes_with_snapshots_clones_and_locks() {
    let mut cluster = cluster();
    cluster.dog(&["vdi", "create", "-y", "big", "16P"]).ok();
    let mut client = cluster.client();
    let vid = client.lookup("big", "", 0).expect("it exists");
    fill_index(&mut client, vid);
    let last = format!("{} 64k", END - 65536);
    let mut session = Session::open(&uri(&cluster, 0, "big"));
    session.say("write -P 1 0 64k");
    session.say(&format!("write -P 2 {last}"));
    session.say(&format!("write -P 3 {} 6M", 400_000 * BLOCK));
    session.say(&format!("write -P 4 {} 64k", 600_000 * BLOCK)); // no room in one node any more
    assert!(leaves(&mut client, vid).len() >= 2, "the index has several nodes");
    // Locked: by its name for us, and refused to those that do not know the index.
    let locks = cluster.dog(&["vdi", "lock", "list"]).ok();
    assert!(locks.lines().count() == 2 && locks.contains("big"), "{locks}");
    assert_ne!(io(&uri(&cluster, 1, "big"), &["write 0 512"]).code, 0, "somebody has it");
    let lock = client.vdi_op(Opcode::LOCK_VDI, "big", Some(""), VdiRequest::zeroed());
    assert_eq!(lock.result, ResultCode::INVALID_PARMS, "a client that takes the index for a table");

    // A snapshot under the open client; the original's words unless -y says that nodes can do it.
    let refused = cluster.dog(&["vdi", "snapshot", "big", "-s", "s1"]);
    assert_eq!(
        (refused.code, refused.stderr.as_str()),
        (1, "creating a snapshot of hypervolume is not supported\n")
    );
    cluster.dog_at(1, &["vdi", "snapshot", "-y", "big", "-s", "s1"], &[]).ok();
    session.say("write -P 11 0 4k");
    session.say(&format!("write -P 12 {last}"));
    session.say(&format!("write -P 14 {} 64k", 800_000 * BLOCK));
    session.say(&format!("discard {} 4M", 600_000 * BLOCK));
    session.say("read -P 1 4k 60k");
    session.say(&format!("read -P 3 {} 6M", 400_000 * BLOCK));
    session.close();
    wait("the lock to be released", || cluster.dog(&["vdi", "lock", "list"]).ok().lines().count() == 1);
    let working = client.lookup("big", "", 0).expect("it exists");
    for leaf in leaves(&mut client, working) {
        assert_eq!(leaf.oid.vid(), working, "a snapshot shares no index node");
    }
    let old = [
        "read -P 1 0 64k".to_string(),
        format!("read -P 2 {last}"),
        format!("read -P 3 {} 6M", 400_000 * BLOCK),
        format!("read -P 4 {} 64k", 600_000 * BLOCK),
        format!("read -P 0 {} 64k", 800_000 * BLOCK),
    ];
    let old: Vec<&str> = old.iter().map(String::as_str).collect();
    let new = [
        "read -P 11 0 4k".to_string(),
        "read -P 1 4k 60k".to_string(),
        format!("read -P 12 {last}"),
        format!("read -P 3 {} 6M", 400_000 * BLOCK),
        format!("read -P 0 {} 64k", 600_000 * BLOCK),
        format!("read -P 14 {} 64k", 800_000 * BLOCK),
    ];
    let new: Vec<&str> = new.iter().map(String::as_str).collect();
    let read_only = |node: usize, export: &str| uri(&cluster, node, export);
    let snapshot = read_only(2, "big@s1");
    let (working_uri, copy) = (read_only(1, "big"), read_only(0, "copy"));
    let read = |image: &str, commands: &[&str]| {
        let mut all = vec!["-r"];
        all.extend(["-f", "raw"]);
        commands.iter().for_each(|c| all.extend(["-c", c]));
        all.push(image);
        let output = Command::new(system("qemu-io", "qemu-utils")).args(&all).output().expect("qemu-io");
        let output = Output::of(output);
        eprintln!("{image}\n{}{}", output.stdout, output.stderr);
        assert!(output.code == 0 && !output.stdout.contains("failed"), "{output:?}");
    };
    read(&snapshot, &old);
    must_io(&working_uri, &new);

    // A clone is independent of both.
    cluster.dog_at(2, &["vdi", "clone", "big", "copy", "-s", "s1"], &[]).ok();
    must_io(&copy, &old);
    must_io(
        &copy,
        &[&format!("write -P 21 {} 4M", 400_000 * BLOCK), &format!("read -P 3 {} 2M", 400_001 * BLOCK)],
    );
    read(&snapshot, &old);
    must_io(&working_uri, &new);
    for args in
        [&["vdi", "check", "big"][..], &["vdi", "check", "big", "-s", "s1"], &["vdi", "check", "copy"]]
    {
        let text = cluster.dog(args).ok();
        assert!(
            text.contains("finish check") && !text.contains("fixed") && !text.contains("no node"),
            "{text}"
        );
    }
    cluster.assert_replicas_equal(3);

    // Deleting the snapshot frees nothing that others name.
    cluster.dog(&["vdi", "delete", "big", "-s", "s1"]).ok();
    must_io(&working_uri, &new);
    must_io(&copy, &[old[0], old[1], old[3], &format!("read -P 21 {} 4M", 400_000 * BLOCK)]);
    cluster.dog(&["vdi", "delete", "big"]).ok();
    must_io(&copy, &[old[0], old[1], old[3], &format!("read -P 21 {} 4M", 400_000 * BLOCK)]);
    let data_of = |vid: VdiId, idx: u64| Oid::data(vid, idx as u32);
    wait("a block that only the working VDI had to go", || {
        cluster.holders(data_of(working, 800_000)).is_empty()
    });
    wait("a block that the clone has its own of to go", || cluster.holders(data_of(vid, 400_000)).is_empty());
    assert_eq!(cluster.holders(data_of(vid, 400_001)), [0, 1, 2], "the clone names it");
    cluster.dog(&["vdi", "delete", "copy"]).ok();
    wait_only_inodes(&cluster);
}

/// Whatever the index was like when a write was told to be there, it stays.
#[test]
fn snapshots_while_many_writes_are_in_flight_lose_none() {
    const ROUNDS: u64 = 12;
    const DEPTH: u64 = 32;
    let mut cluster = cluster();
    cluster.dog(&["vdi", "create", "-y", "big", "6T"]).ok();
    let mut client = cluster.client();
    let vid = client.lookup("big", "", 0).expect("it exists");
    fill_index(&mut client, vid);
    let image = uri(&cluster, 0, "big");
    must_io(
        &image,
        &[1u64, 5, 600_000].map(|idx| format!("write {} 4k", idx * BLOCK)).each_ref().map(|c| &c[..]),
    );
    assert!(leaves(&mut client, vid).len() >= 2, "the index has several nodes");

    // Every write makes a block, in one node of the index or the other, or behind all that there are.
    let place =
        |round: u64, nr: u64| ([1_000, 300_000, 610_000][nr as usize % 3] + round * DEPTH + nr) * BLOCK;
    let pattern = |round: u64, nr: u64| 1 + (round * 7 + nr) % 250;
    for round in 0..ROUNDS {
        let write = |nr| format!("aio_write -P {} {} 64k", pattern(round, nr), place(round, nr));
        let commands: Vec<String> = (0..DEPTH).map(write).chain(["aio_flush".to_owned()]).collect();
        let tag = format!("s{round}");
        std::thread::scope(|scope| {
            scope.spawn(|| cluster.dog_at(1, &["vdi", "snapshot", "-y", "big", "-s", &tag], &[]).ok());
            must_io(&image, &commands.iter().map(String::as_str).collect::<Vec<_>>());
        });
    }
    assert_ne!(client.lookup("big", "", 0), Ok(vid));
    for round in 0..ROUNDS {
        let reads: Vec<String> =
            (0..DEPTH).map(|nr| format!("read -P {} {} 64k", pattern(round, nr), place(round, nr))).collect();
        must_io(&uri(&cluster, 2, "big"), &reads.iter().map(String::as_str).collect::<Vec<_>>());
    }
}

/// A hypervolume of so many blocks, not open.
fn filled(cluster: &mut Cluster, blocks: usize) {
    cluster.dog(&["vdi", "create", "-y", "big", "6T"]).ok();
    let image = uri(cluster, 0, "big");
    for first in (0..blocks).step_by(100) {
        let write = |idx| format!("aio_write -P 1 {} 4k", idx as u64 * BLOCK);
        let commands: Vec<String> = (first..first + 100).map(write).chain(["aio_flush".to_owned()]).collect();
        must_io(&image, &commands.iter().map(String::as_str).collect::<Vec<_>>());
    }
    wait("the lock to be released", || cluster.dog(&["vdi", "lock", "list"]).ok().lines().count() == 1);
    assert_eq!(data_objects(cluster), blocks);
}

fn data_objects(cluster: &Cluster) -> usize {
    cluster.objects_of(1).keys().filter(|oid| oid.is_data()).count()
}

/// The whole cluster waits for a deletion: it does not wait for the blocks.
#[test]
fn a_deletion_is_answered_before_the_blocks_are_gone() {
    let mut cluster = cluster();
    filled(&mut cluster, 600);
    let begun = Instant::now();
    cluster.dog(&["vdi", "delete", "big"]).ok();
    let (answered, left) = (begun.elapsed(), data_objects(&cluster));
    eprintln!("answered after {answered:?}, {left} blocks left");
    assert!(left > 0 || answered < Duration::from_secs(1), "{answered:?}");
    assert!(cluster.dog(&["vdi", "list", "-r"]).ok().is_empty());
    wait_only_inodes(&cluster);
    eprintln!("all blocks gone after {:?}", begun.elapsed());
}

#[test]
fn blocks_go_although_the_node_that_deleted_them_died() {
    let mut cluster = cluster();
    filled(&mut cluster, 600);
    cluster.dog(&["vdi", "delete", "big"]).ok();
    cluster.kill9(0);
    eprintln!("{} blocks left", data_objects(&cluster));
    cluster.start(0);
    cluster.wait_recovered();
    wait_only_inodes(&cluster);
}

/// What was rolled back is the snapshot, and a hypervolume's clone may not be made flat.
#[test]
fn a_hypervolume_is_rolled_back() {
    let mut cluster = cluster();
    cluster.dog(&["vdi", "create", "-y", "big", "6T"]).ok();
    let image = uri(&cluster, 0, "big");
    must_io(&image, &["write -P 1 0 64k", "write -P 2 5T 64k"]);
    cluster.dog(&["vdi", "snapshot", "-y", "big", "-s", "s"]).ok();
    must_io(&image, &["write -P 3 0 64k", "write -P 3 1T 64k"]);
    let mut client = cluster.client();
    let base = client.lookup("big", "s", 0).expect("the snapshot");
    cluster.dog(&["vdi", "rollback", "big", "-s", "s", "-f"]).ok();
    must_io(&image, &["read -P 1 0 64k", "read -P 2 5T 64k", "read -P 0 1T 64k", "write -P 4 0 4k"]);
    let working = client.lookup("big", "", 0).expect("it exists");
    let header = client.inode(working).expect("its inode");
    assert_eq!((header.store_policy, header.parent_vdi_id), (1, base));
    for snapid in ["1", "0"] {
        let args = ["vdi", "delete", "big", "-s", snapid];
        cluster.dog(if snapid == "0" { &args[..3] } else { &args }).ok();
    }
    wait_only_inodes(&cluster);
    assert!((0..3).all(|n| cluster.objects_of(n).keys().all(|oid| oid.kind() == ObjectKind::Inode)));
}

/// What the working VDI overwrites after the snapshot that owns it was deleted is named by nobody and told to nobody: the look
/// after the next deletion finds it, while the index is being written to and its nodes are split.
#[test]
fn blocks_overwritten_after_the_deletion_of_their_snapshot_go_while_the_family_lives() {
    let mut cluster = cluster();
    cluster.dog(&["vdi", "create", "-y", "big", "6T"]).ok();
    let mut client = cluster.client();
    let old = client.lookup("big", "", 0).expect("it exists");
    fill_index(&mut client, old);
    let image = uri(&cluster, 0, "big");
    let far = [1, 2, 3, 600_000, 600_001, 1_000_000].map(|idx: u64| (idx, idx * BLOCK));
    let write = far.map(|(idx, at)| format!("write -P {} {at} 64k", idx % 200 + 1));
    must_io(&image, &write.each_ref().map(|c| &c[..]));
    assert!(leaves(&mut client, old).len() >= 2, "the index has several nodes");
    cluster.dog(&["vdi", "snapshot", "-y", "big", "-s", "s"]).ok();
    cluster.dog(&["vdi", "delete", "big", "-s", "s"]).ok();
    must_io(&image, &[&format!("write -P 201 {} 64k", far[1].1), &format!("discard {} 4M", far[4].1)]);
    let block = |at: usize| Oid::data(old, far[at].0 as u32);
    for at in 0..far.len() {
        assert_eq!(cluster.holders(block(at)), [0, 1, 2], "block {at}");
    }
    // A deletion makes the nodes look.
    cluster.dog(&["vdi", "create", "other", "4M"]).ok();
    cluster.dog(&["vdi", "delete", "other"]).ok();
    let end = Instant::now() + Duration::from_secs(120);
    // Blocks with the byte that was written last, and the places of each round.
    let mut written = BTreeMap::new();
    let mut places: VecDeque<Vec<u64>> = VecDeque::new();
    let mut rounds = 0u64;
    while !(cluster.holders(block(1)).is_empty() && cluster.holders(block(4)).is_empty()) {
        assert!(Instant::now() < end, "{:?} {:?}", cluster.holders(block(1)), cluster.holders(block(4)));
        // New entries everywhere, so that full nodes of the index are split; older blocks are given back.
        let at = |nr: u64| (20 + (rounds * 16 + nr) * 61_987 % 1_500_000) * BLOCK;
        let new: Vec<u64> = (0..16).map(at).filter(|at| far.iter().all(|(_, far)| far != at)).collect();
        let byte = rounds % 199 + 1;
        let mut commands: Vec<String> =
            new.iter().map(|at| format!("aio_write -P {byte} {at} 4k")).chain(["aio_flush".into()]).collect();
        written.extend(new.iter().map(|at| (*at, byte)));
        places.push_back(new);
        if places.len() > 15 {
            for at in places.pop_front().into_iter().flatten() {
                commands.push(format!("discard {at} {BLOCK}"));
                written.remove(&at);
            }
        }
        must_io(&image, &commands.iter().map(String::as_str).collect::<Vec<_>>());
        rounds += 1;
    }
    eprintln!("{rounds} rounds of writes meanwhile");
    let working = client.lookup("big", "", 0).expect("it exists");
    assert_ne!(working, old);
    for at in [0, 2, 3, 5] {
        assert_eq!(cluster.holders(block(at)), [0, 1, 2], "block {at} is named");
    }
    let reads = [0, 2, 3, 5].map(|at: usize| format!("read -P {} {} 64k", far[at].0 % 200 + 1, far[at].1));
    must_io(&image, &reads.each_ref().map(|c| &c[..]));
    must_io(&image, &[&format!("read -P 201 {} 64k", far[1].1), &format!("read -P 0 {} 64k", far[4].1)]);
    let reads: Vec<String> = written.iter().map(|(at, byte)| format!("read -P {byte} {at} 4k")).collect();
    for part in reads.chunks(200) {
        must_io(&image, &part.iter().map(String::as_str).collect::<Vec<_>>());
    }
    cluster.dog(&["vdi", "delete", "big"]).ok();
    wait_only_inodes(&cluster);
}

/// The same for what a node that died had still to remove.
#[test]
fn blocks_that_a_dying_node_did_not_remove_go_while_the_family_lives() {
    let mut cluster = cluster();
    filled(&mut cluster, 600);
    let mut client = cluster.client();
    let old = client.lookup("big", "", 0).expect("it exists");
    cluster.dog(&["vdi", "snapshot", "-y", "big", "-s", "s"]).ok();
    must_io(&uri(&cluster, 0, "big"), &[&format!("discard 0 {}", 400 * BLOCK)]);
    cluster.dog(&["vdi", "delete", "big", "-s", "s"]).ok();
    cluster.kill9(0);
    eprintln!("{} blocks left", data_objects(&cluster));
    assert!(data_objects(&cluster) > 200, "the node had something to remove when it died");
    cluster.start(0);
    cluster.wait_recovered();
    wait_for("what nobody names to go", Duration::from_secs(90), || {
        (0..3).all(|n| cluster.objects_of(n).keys().filter(|oid| oid.is_data()).count() <= 200).then_some(())
    });
    for idx in 400..600 {
        assert_eq!(cluster.holders(Oid::data(old, idx)), [0, 1, 2], "block {idx} is named");
    }
    let reads: Vec<String> = (400..600u64).map(|idx| format!("read -P 1 {} 4k", idx * BLOCK)).collect();
    must_io(&uri(&cluster, 1, "big"), &reads.iter().map(String::as_str).collect::<Vec<_>>());
}
