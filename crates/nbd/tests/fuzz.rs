//! Whatever bytes a client sends, the server neither panics nor hangs, and still serves others.

mod common;

use std::time::Duration;

use common::*;
use proptest::prelude::*;
use sheepdog_client::fake::FakeSheep;
use sheepdog_nbd::{Limits, VdiExportsOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn option() -> impl Strategy<Value = Vec<u8>> {
    let data = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..40),
        Just(go_data("v", &[3, 1])),
        Just(go_data("", &[])),
        Just(meta("v", &["base:allocation"])),
        Just(meta("v", &["base:", "qemu:allocation-depth"])),
    ];
    (0u32..13, data, proptest::option::of(any::<u32>())).prop_map(|(kind, data, len)| {
        let mut out = b"IHAVEOPT".to_vec();
        out.extend(kind.to_be_bytes());
        out.extend(len.unwrap_or(data.len() as u32).to_be_bytes());
        out.extend(data);
        out
    })
}

fn request(extended: bool) -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![0u64..(5 * BLOCK), any::<u64>(), Just(0), Just(u64::MAX)];
    (any::<u16>(), 0u16..10, number.clone(), number, any::<bool>(), any::<bool>()).prop_map(
        move |(flags, kind, offset, len, sane, payload)| {
            let magic: u32 = if extended { 0x21e41c71 } else { 0x25609513 };
            let mut out = magic.to_be_bytes().to_vec();
            out.extend(if sane { flags & 0x1f } else { flags }.to_be_bytes());
            out.extend(kind.to_be_bytes());
            out.extend(7u64.to_be_bytes());
            out.extend(offset.to_be_bytes());
            let len = if sane { len % 70_000 } else { len };
            if extended {
                out.extend(len.to_be_bytes());
            } else {
                out.extend((len as u32).to_be_bytes());
            }
            if kind == 1 && payload {
                out.extend(vec![5; (len % 70_000) as usize]);
            }
            out
        },
    )
}

fn session() -> impl Strategy<Value = Vec<u8>> {
    let garbage = proptest::collection::vec(any::<u8>(), 0..200);
    let requests = any::<bool>().prop_flat_map(move |extended| {
        (Just(extended), proptest::collection::vec(request(extended), 0..12), garbage.clone())
    });
    (proptest::collection::vec(option(), 0..6), requests, any::<bool>()).prop_map(
        |(options, (extended, requests, garbage), go)| {
            let mut out = 3u32.to_be_bytes().to_vec();
            options.into_iter().for_each(|o| out.extend(o));
            if go {
                let mut put = |kind: u32, data: &[u8]| {
                    out.extend(b"IHAVEOPT");
                    out.extend(kind.to_be_bytes());
                    out.extend((data.len() as u32).to_be_bytes());
                    out.extend(data);
                };
                put(if extended { OPT_EXTENDED } else { OPT_STRUCTURED }, &[]);
                put(OPT_SET_META, &meta("v", &["base:allocation"]));
                put(OPT_GO, &go_data("v", &[]));
            }
            requests.into_iter().for_each(|r| out.extend(r));
            out.extend(garbage);
            out
        },
    )
}

async fn play(bytes: Vec<u8>) {
    let limits = Limits { stall: Duration::from_secs(5), ..Limits::default() };
    let world = World::with(FakeSheep::new(), VdiExportsOptions::default(), limits).await;
    let client = world.raw();
    let (mut read, mut write) = client.socket.into_split();
    let sender = tokio::spawn(async move {
        let _ = write.write_all(&bytes).await; // the server may have closed
    });
    let mut sink = Vec::new();
    let _ = read.read_to_end(&mut sink).await;
    sender.await.expect("the sending task panicked");
    client.task.await.expect("the server panicked");
    world.until_idle().await;
    let mut next = world.connected(Mode::Simple, "v").await;
    next.write(3 * BLOCK + 9, b"alive").await;
    assert_eq!(next.read(3 * BLOCK + 9, 5).await, b"alive");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn no_bytes_make_the_server_panic_or_hang(bytes in session()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            tokio::time::timeout(Duration::from_secs(20), play(bytes)).await.expect("the server hangs");
        });
    }
}
