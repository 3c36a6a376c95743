//! Every protocol feature, byte by byte, over a socket pair.

mod common;

use common::*;
use sheepdog_client::fake::FakeSheep;
use sheepdog_client::vdi::{self, NewVdi};
use sheepdog_nbd::{Limits, VdiExportsOptions};
use sheepdog_proto::{Opcode, ResultCode};
use tokio::io::AsyncWriteExt;

const ALL_MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];
const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const ENOTSUP: u32 = 95;

#[tokio::test]
async fn export_name_gives_size_and_flags_and_zeroes_only_if_wanted() {
    let world = World::new().await;
    let mut client = world.client().await;
    client.option(OPT_EXPORT_NAME, b"v").await;
    assert_eq!(client.u64().await, 4 * BLOCK);
    assert_eq!(client.u16().await, 0b1101_0110_1101);
    client.write(0, b"abc").await;

    let mut old = world.raw();
    old.bytes(18).await;
    old.socket.write_all(&1u32.to_be_bytes()).await.unwrap();
    old.option(OPT_EXPORT_NAME, b"v").await;
    old.bytes(10).await;
    assert_eq!(old.bytes(124).await, [0; 124]);
    assert_eq!(old.read(0, 3).await, b"abc", "connections share the volume");

    let mut lost = world.client().await;
    lost.option(OPT_EXPORT_NAME, b"nope").await;
    assert!(lost.is_closed().await);
}

#[tokio::test]
async fn unknown_options_and_tls_are_refused_and_the_handshake_goes_on() {
    let world = World::new().await;
    let mut client = world.client().await;
    assert_eq!(client.ask(OPT_STARTTLS, &[]).await, ERR | 1);
    assert_eq!(client.ask(4711, b"whatever").await, ERR | 1);
    assert_eq!(client.ask(4712, &vec![0; 100_000]).await, ERR | 9);
    assert_eq!(client.ask(OPT_STRUCTURED, b"data").await, ERR | 3);
    assert_eq!(client.ask(OPT_GO, b"\0\0\0\xffshort").await, ERR | 3);
    assert_eq!(client.ask(OPT_GO, &go_data("nope", &[])).await, ERR | 6);
    assert_eq!(client.go("v").await.0, 4 * BLOCK);
}

#[tokio::test]
async fn abort_is_acknowledged_and_closes() {
    let world = World::new().await;
    let mut client = world.client().await;
    assert_eq!(client.ask(OPT_ABORT, &[]).await, ACK);
    assert!(client.is_closed().await);
}

#[tokio::test]
async fn bad_magic_or_client_flags_close() {
    let world = World::new().await;
    let mut client = world.client().await;
    client.socket.write_all(b"IHAVEOPX\0\0\0\x03\0\0\0\0").await.unwrap();
    assert!(client.is_closed().await);
    let mut client = world.raw();
    client.bytes(18).await;
    client.socket.write_all(&0x80u32.to_be_bytes()).await.unwrap();
    assert!(client.is_closed().await);
}

#[tokio::test]
async fn list_names_vdis_and_snapshots() {
    let world = World::new().await;
    vdi::snapshot(&*world.sheep, "v", "tag").await.unwrap();
    vdi::snapshot(&*world.sheep, "v", "").await.unwrap();
    let mut client = world.client().await;
    client.option(OPT_LIST, &[]).await;
    let names: Vec<_> = client
        .replies(OPT_LIST)
        .await
        .into_iter()
        .filter(|(kind, _)| *kind == 2)
        .map(|(_, data)| {
            let len = u32::from_be_bytes(data[..4].try_into().unwrap()) as usize;
            assert!(data.len() > 4 + len, "a description follows");
            String::from_utf8(data[4..4 + len].to_vec()).unwrap()
        })
        .collect();
    assert_eq!(names, ["v@tag", "v:2", "v"]);
}

#[tokio::test]
async fn info_answers_what_was_asked_and_go_the_same() {
    let world = World::new().await;
    let mut client = world.client().await;
    client.option(OPT_INFO, &go_data("v", &[3, 1, 2, 99])).await;
    let replies = client.replies(OPT_INFO).await;
    let kinds: Vec<_> = replies.iter().map(|(kind, data)| (*kind, data.get(1).copied())).collect();
    assert_eq!(kinds, [(3, Some(0)), (3, Some(1)), (3, Some(2)), (3, Some(3)), (ACK, None)]);
    assert_eq!(replies[1].1[2..], *b"v");
    assert_eq!(replies[3].1[2..], [0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0]);
    client.go("v").await;
}

#[tokio::test]
async fn the_empty_name_is_the_only_vdi_or_the_configured_one() {
    let world = World::new().await;
    assert_eq!(world.client().await.go("").await.0, 4 * BLOCK);
    vdi::create(&*world.sheep, "w", &NewVdi { size: BLOCK, ..NewVdi::default() }).await.unwrap();
    assert_eq!(world.client().await.ask(OPT_GO, &go_data("", &[])).await, ERR | 6);
    let options = VdiExportsOptions { default_export: Some("v".into()), ..Default::default() };
    let world = World::with(FakeSheep::new(), options, Limits::default()).await;
    vdi::create(&*world.sheep, "w", &NewVdi { size: BLOCK, ..NewVdi::default() }).await.unwrap();
    assert_eq!(world.client().await.go("").await.0, 4 * BLOCK);
}

#[tokio::test]
async fn snapshots_are_exported_read_only_under_all_their_names() {
    let world = World::new().await;
    world.connected(Mode::Simple, "v").await.write(0, b"old").await;
    vdi::snapshot(&*world.sheep, "v", "tag").await.unwrap();
    let mut now = world.connected(Mode::Simple, "v").await;
    now.write(0, b"new").await;
    for name in ["v@tag", "v:tag", "v:1"] {
        let mut client = world.client().await;
        let (_, flags) = client.go(name).await;
        assert_eq!(flags & 2, 2, "read-only");
        assert_eq!(flags & (32 | 64), 0, "no trim, no zeroes");
        assert_eq!(client.read(0, 3).await, b"old");
        let cookie = client.send(0, WRITE, 0, 3, b"bad").await;
        assert_eq!(client.status().await, (cookie, EPERM));
        assert_eq!(client.command(0, TRIM, 0, BLOCK).await, EPERM);
        assert_eq!(client.read(0, 3).await, b"old", "the refused payload was skipped");
    }
    assert_eq!(world.client().await.ask(OPT_GO, &go_data("v@nope", &[])).await, ERR | 6);
}

#[tokio::test]
async fn only_selected_vdis_are_exported() {
    let options = VdiExportsOptions { only: vec!["w".into()], ..Default::default() };
    let world = World::with(FakeSheep::new(), options, Limits::default()).await;
    vdi::create(&*world.sheep, "w", &NewVdi { size: BLOCK, ..NewVdi::default() }).await.unwrap();
    let mut client = world.client().await;
    assert_eq!(client.ask(OPT_GO, &go_data("v", &[])).await, ERR | 6);
    assert_eq!(client.go("").await.0, BLOCK);
}

#[tokio::test]
async fn data_written_is_read_in_every_mode() {
    for mode in ALL_MODES {
        let world = World::new().await;
        let mut client = world.connected(mode, "v").await;
        let data: Vec<u8> = (0..(BLOCK + 70_000)).map(|i| (i % 251) as u8).collect();
        client.write(BLOCK - 100, &data).await;
        assert_eq!(client.read(BLOCK - 100, data.len()).await, data, "{mode:?}");
        let all = client.read(0, 4 * BLOCK as usize).await;
        assert!(all[..BLOCK as usize - 100].iter().all(|b| *b == 0));
        assert!(client.read(5, 0).await.is_empty());
        client.write(7, b"").await;
        assert_eq!(client.command(0, FLUSH, 0, 0).await, 0);
        assert_eq!(client.command(0, CACHE, 0, BLOCK).await, 0);
    }
}

#[tokio::test]
async fn structured_reads_show_holes_and_df_asks_for_one_chunk() {
    for mode in [Mode::Structured, Mode::Extended] {
        let world = World::new().await;
        let mut client = world.connected(mode, "v").await;
        client.write(BLOCK, &[7; 10]).await;
        let chunks = client.read_chunks(0, BLOCK - 5, BLOCK + 10).await;
        let mut data = vec![7; 10];
        data.resize(BLOCK as usize, 0);
        assert_eq!(
            chunks,
            [Chunk::Hole(BLOCK - 5, 5), Chunk::Data(BLOCK, data.clone()), Chunk::Hole(2 * BLOCK, 5)]
        );
        let whole = [vec![0; 5], data, vec![0; 5]].concat();
        assert_eq!(client.read_chunks(4, BLOCK - 5, BLOCK + 10).await, [Chunk::Data(BLOCK - 5, whole)]);
    }
}

#[tokio::test]
async fn a_failing_read_is_an_error_chunk() {
    for mode in [Mode::Structured, Mode::Extended] {
        let world = World::new().await;
        let mut client = world.connected(mode, "v").await;
        client.write(0, b"x").await;
        world.sheep.set_fault(|r| (r.opcode == Opcode::READ_OBJ).then_some(ResultCode::HALT));
        assert_eq!(client.read_chunks(0, 0, 512).await, [Chunk::Error(EIO)]);
        world.sheep.clear_fault();
        assert_eq!(client.read_chunks(0, 4 * BLOCK, 1).await, [Chunk::Error(EINVAL)]);
        assert_eq!(client.read(0, 1).await, b"x");
    }
}

#[tokio::test]
async fn errors_have_the_numbers_that_clients_expect() {
    for mode in ALL_MODES {
        let world = World::new().await;
        let mut client = world.connected(mode, "v").await;
        let cookie = client.send(0, WRITE, 4 * BLOCK - 1, 2, b"xx").await;
        assert_eq!(client.status().await, (cookie, ENOSPC));
        assert_eq!(client.command(0, ZEROES, 4 * BLOCK - 1, 2).await, ENOSPC);
        assert_eq!(client.command(0, TRIM, u64::MAX, 2).await, EINVAL);
        assert_eq!(client.command(0, 77, 0, 0).await, EINVAL);
        assert_eq!(client.command(1 << 9, FLUSH, 0, 0).await, EINVAL);
        world.sheep.set_fault(|r| (r.opcode == Opcode::CREATE_AND_WRITE_OBJ).then_some(ResultCode::NO_SPACE));
        let cookie = client.send(0, WRITE, 0, 1, b"x").await;
        assert_eq!(client.status().await, (cookie, ENOSPC));
        world.sheep.set_fault(|r| (r.opcode == Opcode::CREATE_AND_WRITE_OBJ).then_some(ResultCode::SHUTDOWN));
        let cookie = client.send(0, WRITE, 0, 1, b"x").await;
        assert_eq!(client.status().await, (cookie, 108));
        world.sheep.clear_fault();
        client.write(0, b"x").await;
    }
}

#[tokio::test]
async fn requests_above_the_announced_maximum_are_refused_and_their_payload_skipped() {
    let world = World::new().await;
    vdi::create(&*world.sheep, "big", &NewVdi { size: 1 << 30, ..NewVdi::default() }).await.unwrap();
    let mut client = world.connected(Mode::Structured, "big").await;
    assert_eq!(client.read_chunks(0, 0, (32 << 20) + 1).await, [Chunk::Error(EINVAL)]);
    let len = (32 << 20) + 512;
    let cookie = client.send(0, WRITE, 0, len, &vec![1; len as usize]).await;
    assert_eq!(client.status().await, (cookie, EINVAL));
    let cookie = client.send(0, WRITE, 0, 32 << 20, &vec![1; 32 << 20]).await;
    assert_eq!(client.status().await, (cookie, 0));
    assert!(client.read(0, 32 << 20).await.iter().all(|b| *b == 1));
    client.send(0, WRITE, 0, u32::MAX.into(), &[]).await;
    assert!(client.is_closed().await);
}

#[tokio::test]
async fn trim_and_zeroes_make_holes_unless_told_not_to() {
    for mode in [Mode::Structured, Mode::Extended] {
        let world = World::new().await;
        let mut client = world.connected(mode, "v").await;
        client.write(0, &vec![1; 4 * BLOCK as usize]).await;
        assert_eq!(client.command(0, TRIM, 0, BLOCK + 5).await, 0);
        assert_eq!(client.command(1, ZEROES, 2 * BLOCK, BLOCK).await, 0);
        assert_eq!(client.command(2, ZEROES, 3 * BLOCK, BLOCK).await, 0);
        assert_eq!(client.command(16, ZEROES, BLOCK, 512).await, ENOTSUP, "not fast");
        assert_eq!(client.read(BLOCK, 512).await, [1; 512]);
        let cookie = client.send(0, STATUS, 0, 4 * BLOCK, &[]).await;
        let want = [
            Chunk::Status(1, vec![(BLOCK, 3), (BLOCK, 0), (BLOCK, 3), (BLOCK, 0)]),
            Chunk::Status(2, vec![(BLOCK, 0), (BLOCK, 1), (BLOCK, 0), (BLOCK, 1)]),
        ];
        assert_eq!(client.chunks().await, (cookie, want.to_vec()));
        assert_eq!(client.command(16, ZEROES, BLOCK, BLOCK).await, 0, "a whole block is fast");
        let zeros = client.read(BLOCK, 3 * BLOCK as usize).await;
        assert!(zeros.iter().all(|b| *b == 0));
    }
}

#[tokio::test]
async fn block_status_tells_depth_and_stops_after_one_extent_if_asked() {
    for mode in [Mode::Structured, Mode::Extended] {
        let world = World::new().await;
        let mut client = world.connected(mode, "v").await;
        client.write(0, &vec![1; 2 * BLOCK as usize]).await;
        vdi::snapshot(&*world.sheep, "v", "s").await.unwrap();
        client.write(0, &[2; 512]).await;
        let cookie = client.send(0, STATUS, BLOCK / 2, 3 * BLOCK, &[]).await;
        let want = [
            Chunk::Status(1, vec![(BLOCK + BLOCK / 2, 0), (BLOCK + BLOCK / 2, 3)]),
            Chunk::Status(2, vec![(BLOCK / 2, 1), (BLOCK, 2), (BLOCK + BLOCK / 2, 0)]),
        ];
        assert_eq!(client.chunks().await, (cookie, want.to_vec()));
        let cookie = client.send(8, STATUS, 0, 4 * BLOCK, &[]).await;
        let want = [Chunk::Status(1, vec![(2 * BLOCK, 0)]), Chunk::Status(2, vec![(BLOCK, 1)])];
        assert_eq!(client.chunks().await, (cookie, want.to_vec()));
    }
}

#[tokio::test]
async fn meta_contexts_are_listed_set_and_dropped_for_another_export() {
    let world = World::new().await;
    let mut client = world.client().await;
    assert_eq!(client.ask(OPT_SET_META, &meta("v", &["base:allocation"])).await, ERR | 3);
    client.set_mode(Mode::Structured).await;
    let names = |replies: Vec<(u32, Vec<u8>)>| -> Vec<String> {
        replies
            .iter()
            .filter(|(kind, _)| *kind == 4)
            .map(|(_, data)| String::from_utf8(data[4..].to_vec()).unwrap())
            .collect()
    };
    client.option(OPT_LIST_META, &meta("v", &[])).await;
    assert_eq!(names(client.replies(OPT_LIST_META).await), ["base:allocation", "qemu:allocation-depth"]);
    client.option(OPT_LIST_META, &meta("v", &["qemu:"])).await;
    assert_eq!(names(client.replies(OPT_LIST_META).await), ["qemu:allocation-depth"]);
    client.option(OPT_SET_META, &meta("v", &["base:allocation", "x:y"])).await;
    assert_eq!(names(client.replies(OPT_SET_META).await), ["base:allocation"]);
    assert_eq!(client.ask(OPT_SET_META, &meta("nope", &[])).await, ERR | 6);
    assert_eq!(client.ask(OPT_SET_META, b"\0\0\0\x01v\xff\xff\xff\xff").await, ERR | 3);
    assert_eq!(client.ask(OPT_SET_META, &meta("v:x", &["base:allocation"])).await, ERR | 6);
    client.option(OPT_SET_META, &meta("", &["base:allocation"])).await;
    client.replies(OPT_SET_META).await;
    client.go("v").await; // another name than the contexts were set for
    let cookie = client.send(0, STATUS, 0, BLOCK, &[]).await;
    assert_eq!(client.chunks().await, (cookie, vec![Chunk::Error(EINVAL)]));
}

#[tokio::test]
async fn structured_replies_after_extended_headers_are_refused() {
    let world = World::new().await;
    let mut client = world.client().await;
    client.set_mode(Mode::Extended).await;
    assert_eq!(client.ask(OPT_STRUCTURED, &[]).await, ERR | 10);
    client.go("v").await;
}

#[tokio::test]
async fn extended_writes_carry_payload_with_and_without_the_flag() {
    let world = World::new().await;
    let mut client = world.connected(Mode::Extended, "v").await;
    let plain = client.send(1, WRITE, 0, 4, b"qemu").await;
    assert_eq!(client.status().await, (plain, 0));
    let flagged = client.send(32, WRITE, 4, 4, b"spec").await;
    assert_eq!(client.status().await, (flagged, 0));
    // A payload on a command that takes none is skipped.
    let odd = client.send(32, TRIM, 0, 4, b"oops").await;
    assert_eq!(client.status().await, (odd, EINVAL));
    assert_eq!(client.read(0, 8).await, b"qemuspec");
}

#[tokio::test]
async fn many_requests_in_flight_are_all_answered_by_cookie() {
    for mode in ALL_MODES {
        let world = World::new().await;
        world.sheep.delay_up_to(8, 42);
        let mut client = world.connected(mode, "v").await;
        let mut batch = Vec::new();
        let mut cookies = std::collections::BTreeSet::new();
        for i in 0..200u64 {
            let (cookie, header) = client.header(0, WRITE, i * 4096, 4096);
            batch.extend(header);
            batch.extend(vec![i as u8; 4096]);
            cookies.insert(cookie);
        }
        client.socket.write_all(&batch).await.unwrap();
        for _ in 0..200 {
            let (cookie, error) = client.status().await;
            assert!(error == 0 && cookies.remove(&cookie));
        }
        let data = client.read(0, 200 * 4096).await;
        assert!(data.chunks(4096).enumerate().all(|(i, c)| c.iter().all(|b| *b == i as u8)));
    }
}

#[tokio::test]
async fn requests_beyond_the_limits_wait_and_are_served() {
    let limits = Limits { requests: 2, bytes: 8192, ..Limits::default() };
    let world = World::with(FakeSheep::new(), VdiExportsOptions::default(), limits).await;
    let mut client = world.connected(Mode::Simple, "v").await;
    let mut batch = Vec::new();
    for i in 0..50u64 {
        let (_, header) = client.header(0, WRITE, i * 4096, 4096);
        batch.extend(header);
        batch.extend(vec![1; 4096]);
    }
    for _ in 0..50 {
        batch.extend(client.header(0, READ, 0, 65_536).1);
    }
    client.socket.write_all(&batch).await.unwrap();
    for _ in 0..50 {
        assert_eq!(client.status().await.1, 0);
    }
    for _ in 0..50 {
        assert_eq!(client.status().await.1, 0);
        assert!(client.bytes(65_536).await.iter().all(|b| *b == 1));
    }
}

#[tokio::test]
async fn what_was_started_is_finished_when_the_client_leaves() {
    let world = World::new().await;
    world.sheep.delay_up_to(20, 7);
    let mut client = world.connected(Mode::Simple, "v").await;
    client.send(0, WRITE, 0, 5, b"final").await;
    client.send(0, DISC, 0, 0, &[]).await;
    assert_eq!(client.status().await.1, 0, "answers are sent even then");
    assert!(client.is_closed().await);
    let mut client = world.connected(Mode::Simple, "v").await;
    client.send(0, WRITE, 5, 4, b"gone").await;
    drop(client);
    world.until_idle().await;
    assert_eq!(world.connected(Mode::Simple, "v").await.read(0, 9).await, b"finalgone");
}

#[tokio::test]
async fn the_lock_is_held_from_the_first_to_the_last_connection() {
    let sheep = FakeSheep::new().with_locks();
    let world = World::with(sheep, VdiExportsOptions::default(), Limits::default()).await;
    let first = world.connected(Mode::Simple, "v").await;
    let second = world.connected(Mode::Simple, "v").await;
    assert_eq!(world.sheep.locked(), 1);
    drop(first);
    assert_eq!(world.sheep.locked(), 1);
    drop(second);
    world.until_idle().await;
    assert_eq!(world.sheep.locked(), 0);
    vdi::lock(&*world.sheep, "v", 0).await.unwrap();
    assert_eq!(world.client().await.ask(OPT_GO, &go_data("v", &[])).await, ERR | 2);
}

#[tokio::test]
async fn a_client_that_stalls_in_a_request_or_takes_no_answers_is_dropped() {
    let stall = std::time::Duration::from_millis(50);
    let limits = Limits { stall, handshake: stall, ..Limits::default() };
    let world = World::with(FakeSheep::new(), VdiExportsOptions::default(), limits).await;
    let mut half_a_payload = world.connected(Mode::Simple, "v").await;
    half_a_payload.send(0, WRITE, 0, 4096, b"half").await;
    assert!(half_a_payload.is_closed().await);
    let mut half_a_header = world.connected(Mode::Simple, "v").await;
    half_a_header.socket.write_all(&[0x25, 0x60]).await.unwrap();
    assert!(half_a_header.is_closed().await);
    let mut deaf = world.connected(Mode::Simple, "v").await;
    for _ in 0..8 {
        deaf.send(0, READ, 0, BLOCK, &[]).await;
    }
    world.until_idle().await;
    let mut silent = world.client().await;
    assert!(silent.is_closed().await, "in the handshake");
}

#[tokio::test]
async fn shutdown_ends_idle_connections_and_gives_exports_back() {
    let sheep = FakeSheep::new().with_locks();
    let world = World::with(sheep, VdiExportsOptions::default(), Limits::default()).await;
    let mut client = world.connected(Mode::Simple, "v").await;
    let mut silent = world.client().await;
    world.server.shutdown().await;
    assert!(client.is_closed().await && silent.is_closed().await);
    assert_eq!(world.sheep.locked(), 0);
}
