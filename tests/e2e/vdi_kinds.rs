//! VDIs of other kinds than the default: copies, policies, block sizes, altered copies; recycled ids; and deletion of a
//! VDI that a block device uses.

use std::process::{Command, Stdio};
use std::time::Duration;

use sheepdog_proto::header::VdiRequest;
use sheepdog_proto::{ClusterFlags, CopyPolicy, Oid, Opcode, Request, ResultCode, VDI_BITMAP_LEN, VdiId};
use sheepdog_testkit::binaries::system;
use sheepdog_testkit::{Builder, Client, Cluster, Output, Vdi, wait, wait_for};

fn bits(client: &mut Client, opcode: Opcode) -> Vec<u32> {
    let (_, bytes) = client.must(Request::new(opcode).length(VDI_BITMAP_LEN), &[]);
    (0..VDI_BITMAP_LEN as u32 * 8).filter(|i| bytes[(*i / 8) as usize] >> (i % 8) & 1 == 1).collect()
}

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3] ^ seed).collect()
}

/// Copies, policy and block size are each VDI's own, and so are its objects on disk.
#[test]
fn every_vdi_has_its_own_redundancy_and_block_size() {
    let mut cluster = Cluster::new(4);
    let kinds: [(&str, &[&str], u8, u64); 4] = [
        ("one", &["-c", "1"], 1, 4 << 20),
        ("two", &["-c", "2", "-z", "20"], 2, 1 << 20),
        ("coded", &["-c", "2:1"], 3, 4 << 20),
        ("coarse", &["-c", "2", "-z", "24"], 2, 16 << 20),
    ];
    for (name, options, copies, block) in kinds {
        cluster.dog(&[&["vdi", "create", name, "32M"], options].concat()).ok();
        let data = pattern(copies, 5 << 20);
        cluster.dog_in(&["vdi", "write", name, "3M", "5M"], &data).ok();
        let back = cluster.dir().join("back");
        for node in 0..4 {
            let port = cluster.nodes[node].port.to_string();
            let file = std::fs::File::create(&back).expect("a file");
            let dog = sheepdog_testkit::binaries::dog();
            let args = ["vdi", "read", name, "3M", "5M", "-a", "127.0.0.1", "-p", &port];
            assert!(Command::new(dog).args(args).stdout(file).status().expect("dog").success());
            assert!(std::fs::read(&back).expect("what was read") == data, "{name} through node {node}");
        }
        let mut client = cluster.client();
        let vid = client.lookup(name, "", 0).expect("it exists");
        let header = client.inode(vid).expect("its inode");
        assert_eq!((header.nr_copies, header.block_size()), (copies, block), "{name}");
        let index = ((3 << 20) / block) as u32;
        assert_eq!(cluster.holders(Oid::inode(vid)).len(), usize::from(copies), "{name}: its inode");
        if header.copy_policy == 0 {
            assert_eq!(cluster.holders(Oid::data(vid, index)).len(), usize::from(copies), "{name}: a block");
        }
        let check = cluster.dog(&["vdi", "check", name]).ok();
        assert!(!check.contains("fixed") && !check.contains("inconsistent"), "{check}");
        // A snapshot and a clone keep them.
        cluster.dog(&["vdi", "snapshot", name, "-s", "s"]).ok();
        cluster.dog(&["vdi", "clone", name, &format!("{name}-clone"), "-s", "s"]).ok();
        for derived in [name.to_owned(), format!("{name}-clone")] {
            let vid = client.lookup(&derived, "", 0).expect("it exists");
            let of = client.inode(vid).expect("its inode");
            assert_eq!(
                (of.nr_copies, of.copy_policy, of.block_size()),
                (copies, header.copy_policy, block),
                "{derived}"
            );
        }
    }
}

/// 05, 19: more copies, fewer copies; contents stay, replicas are where they must be and nowhere else.
#[test]
fn copies_of_a_vdi_are_altered() {
    let mut cluster = Cluster::new(4);
    cluster.dog(&["vdi", "create", "vm", "16M", "-c", "2"]).ok();
    let data = pattern(9, 9 << 20);
    cluster.dog_in(&["vdi", "write", "vm", "0", "9M"], &data).ok();
    let mut client = cluster.client();
    let vid = client.lookup("vm", "", 0).expect("it exists");
    let mut data = data;
    // Downwards and upwards again: what was put away is not taken for what was written since.
    for copies in [3_u8, 1, 4, 1] {
        cluster.dog(&["vdi", "alter-copy", "vm", "-c", &copies.to_string(), "-f"]).ok();
        cluster.wait_recovered();
        assert_eq!(client.inode(vid).expect("its inode").nr_copies, copies);
        for oid in (0..3).map(|i| Oid::data(vid, i)).chain([Oid::inode(vid)]) {
            let mut homes = cluster.homes(oid, usize::from(copies));
            homes.sort();
            wait(&format!("{oid} to be on {homes:?} alone"), || cluster.holders(oid) == homes);
        }
        let mut vdi = Vdi::open(&mut client, vid).expect("open");
        for node in &cluster.nodes {
            assert!(vdi.read(&mut node.client(), 0, 9 << 20).expect("read") == data, "{copies} copies");
        }
        data[4096..8192].fill(copies);
        vdi.write(&mut client, 4096, &[copies; 4096]).expect("write");
    }
    let same = cluster.dog(&["vdi", "alter-copy", "vm", "-c", "1", "-f"]);
    assert_eq!(same.code, 1, "{same:?}");
    cluster.dog(&["vdi", "snapshot", "vm", "-s", "s"]).ok();
    let refused = cluster.dog(&["vdi", "alter-copy", "vm", "-c", "2", "-f"]);
    assert!(refused.code != 0 && refused.stderr.contains("standalone"), "{refused:?}");
    cluster.assert_replicas_equal(1);
}

/// 05, 19: what asks for other copies dies after the inode was written and before the nodes are told. Nothing is lost; the
/// same command finishes it, and so does a restart of all nodes.
#[test]
fn a_change_of_copies_that_stopped_half_way_can_be_finished() {
    for finish_by_restart in [false, true] {
        let mut cluster = Cluster::new(4);
        cluster.dog(&["vdi", "create", "vm", "16M", "-c", "1"]).ok();
        let data = pattern(5, 9 << 20);
        cluster.dog_in(&["vdi", "write", "vm", "0", "9M"], &data).ok();
        let mut client = cluster.client();
        let vid = client.lookup("vm", "", 0).expect("it exists");
        let nr_copies_at = 554;
        let written = client.write_obj(Oid::inode(vid), nr_copies_at, &[3]).expect("an answer");
        assert_eq!(written, ResultCode::SUCCESS);
        assert_eq!(client.inode(vid).expect("its inode").nr_copies, 3);
        let check = |cluster: &Cluster| {
            let mut client = cluster.nodes[0].client();
            let vdi = Vdi::open(&mut client, vid).expect("open");
            for node in &cluster.nodes {
                assert!(vdi.read(&mut node.client(), 0, 9 << 20).expect("read") == data);
            }
        };
        check(&cluster);
        if finish_by_restart {
            cluster.kill9_all();
            (0..4).for_each(|i| cluster.start(i));
            cluster.wait_recovered();
            let checked = cluster.dog(&["vdi", "check", "vm"]);
            assert_eq!(checked.code, 0, "{checked:?}");
        } else {
            cluster.dog(&["vdi", "alter-copy", "vm", "-c", "3", "-f"]).ok();
            cluster.wait_recovered();
        }
        for oid in (0..3).map(|i| Oid::data(vid, i)).chain([Oid::inode(vid)]) {
            let mut homes = cluster.homes(oid, 3);
            homes.sort();
            wait(&format!("{oid} to be on {homes:?}"), || cluster.holders(oid) == homes);
        }
        check(&cluster);
        let again = cluster.dog(&["vdi", "alter-copy", "vm", "-c", "3", "-f"]);
        assert!(again.code == 1 && again.stderr.contains("nothing changed"), "{again:?}");
    }
}

/// 05, 12: after a restart and a live rollback the parents of the table and of the inodes differ; every part of the
/// family is still collected, and the ids are used again.
#[test]
fn ids_are_recycled_after_a_restart_and_a_live_rollback() {
    let flags = ClusterFlags::AUTO_VNODES.with(ClusterFlags::RECYCLE_VID);
    let mut cluster = Builder::new(3).flags(flags).start();
    let mut client = cluster.client();
    let base = client.create_vdi("a", 8 << 20).expect("create");
    let write = |client: &mut Client, vid: VdiId, byte: u8| {
        let mut vdi = Vdi::open(client, vid).expect("open");
        vdi.write(client, 0, &[byte; 4096]).expect("write");
    };
    write(&mut client, base, 1);
    let second = client.snapshot("a", "s1").expect("snapshot");
    write(&mut client, second, 2);
    let body = VdiRequest { vdi_size: 8 << 20, base_vdi_id: base, snapid: 1, ..VdiRequest::zeroed() };
    let rolled = client.vdi_op(Opcode::NEW_VDI, "a", None, body);
    assert_eq!(rolled.result, ResultCode::SUCCESS);
    let third = rolled.vdi().vdi_id;
    let read = |client: &mut Client, vid: VdiId| {
        Vdi::open(client, vid).expect("open").read(client, 0, 1).expect("read")[0]
    };
    assert_eq!([base, second, third].map(|vid| read(&mut client, vid)), [1, 2, 1]);
    let (response, _) = cluster.client().must(Request::new(Opcode::SHUTDOWN), &[]);
    assert_eq!(response.result, ResultCode::SUCCESS);
    for node in &mut cluster.nodes {
        assert_eq!(node.wait_exit(Duration::from_secs(30)).code(), Some(0));
    }
    (0..3).for_each(|i| cluster.start(i));
    cluster.wait_running();
    let mut client = cluster.client();
    write(&mut client, third, 3);
    assert_eq!([base, second, third].map(|vid| read(&mut client, vid)), [1, 2, 3]);
    let delete = |client: &mut Client, snapid: u32| {
        let body = VdiRequest { snapid, ..VdiRequest::zeroed() };
        client.vdi_op(Opcode::DEL_VDI, "a", None, body)
    };
    assert_eq!(delete(&mut client, 1).vdi().vdi_id, base);
    assert_eq!([second, third].map(|vid| read(&mut client, vid)), [2, 3]);
    assert_eq!(delete(&mut client, 2).vdi().vdi_id, second);
    assert_eq!(read(&mut client, third), 3);
    assert_eq!(delete(&mut client, 0).vdi().vdi_id, third);
    for node in 0..3 {
        let mut client = cluster.nodes[node].client();
        wait("every id to be free", || bits(&mut client, Opcode::READ_VDIS).is_empty());
    }
    wait("nothing to be left", || (0..3).all(|n| cluster.objects_of(n).is_empty()));
    assert_eq!(client.create_vdi("b", 8 << 20).map(VdiId::get), Ok(1), "the lowest id is used again");
    assert_eq!(read_hole(&mut client), 0);
}

fn read_hole(client: &mut Client) -> u8 {
    let vid = client.lookup("b", "", 0).expect("it exists");
    Vdi::open(client, vid).expect("open").read(client, 0, 1).expect("read")[0]
}

/// 05, 26 "delete against I/O": the device gets errors, nothing is left, and the name is free.
#[test]
fn deleting_a_vdi_under_a_block_device_leaves_nothing() {
    let flags = ClusterFlags::AUTO_VNODES;
    let mut cluster = Builder::new(3).flags(flags).arg("--nbd").arg("unix:{dir}/nbd{i}.sock").start();
    for policy in [CopyPolicy::REPLICATED, CopyPolicy::erasure(2, 1).expect("valid")] {
        let mut client = cluster.client();
        let body = VdiRequest {
            vdi_size: 64 << 20,
            copies: 3,
            copy_policy: policy.to_byte(),
            ..VdiRequest::zeroed()
        };
        assert_eq!(client.vdi_op(Opcode::NEW_VDI, "vm", None, body).result, ResultCode::SUCCESS);
        let vid = client.lookup("vm", "", 0).expect("it exists");
        let uri = format!("nbd+unix:///vm?socket={}/nbd0.sock", cluster.dir().display());
        let io = system("qemu-io", "qemu-utils");
        let mut command = Command::new(&io);
        command.args(["-f", "raw"]);
        for i in 0..400_u32 {
            command.args(["-c", &format!("write -P {} {}k 64k", i % 250 + 1, i * 7919 % 1023 * 64)]);
        }
        let mut writer = command
            .arg(&uri)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("qemu-io");
        wait("some blocks", || {
            Vdi::open(&mut client, vid).expect("open").table.iter().filter(|v| **v != 0).count() > 4
        });
        cluster.dog_at(1, &["vdi", "delete", "vm"], &[]).ok();
        assert_eq!(client.lookup("vm", "", 0), Err(ResultCode::NO_VDI));
        wait("the writer to end", || writer.try_wait().expect("qemu-io").is_some());
        wait_for("all objects but inodes to be gone", Duration::from_secs(120), || {
            (0..3).all(|n| cluster.objects_of(n).keys().all(|oid| oid.is_inode())).then_some(())
        });
        client.create_vdi("vm", 64 << 20).expect("the name is free");
        let output = Command::new(&io)
            .args([
                "-f",
                "raw",
                "-c",
                "read -P 0 0 64M",
                "-c",
                "write -P 5 1M 1M",
                "-c",
                "read -P 5 1M 1M",
                &uri,
            ])
            .output()
            .expect("qemu-io");
        let output = Output::of(output);
        assert!(output.code == 0 && !output.stdout.contains("failed"), "{output:?}");
        cluster.dog(&["vdi", "delete", "vm"]).ok();
    }
    assert_eq!(cluster.running(), [0, 1, 2]);
}
