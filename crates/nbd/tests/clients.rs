//! Stock clients against the server: qemu-img, qemu-io, nbdinfo, nbdcopy, fio. What is not installed is left out, with
//! a note.

#![allow(clippy::unwrap_used)] // tests may panic

mod common;

use std::path::Path;
use std::process::Command;

use common::{BLOCK, World};
use sheepdog_client::vdi::{self, NewVdi};
use sheepdog_nbd::{ListenAddr, Listener};

struct Bench {
    world: World,
    dir: tempfile::TempDir,
    /// URI of the TCP listener, to be followed by an export's name.
    tcp: String,
}

impl Bench {
    /// A server on a path and on TCP, exporting `v` of 4 MiB and `disk` of 64 MiB and a bit.
    async fn new() -> Bench {
        let world = World::new().await;
        let size = 64 * BLOCK + 512;
        vdi::create(&*world.sheep, "disk", &NewVdi { size, ..NewVdi::default() }).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let listener = Listener::bind(&ListenAddr::Unix(dir.path().join("nbd"))).await.unwrap();
        let server = world.server.clone();
        tokio::spawn(async move { server.serve(listener).await });
        let listener = Listener::bind(&ListenAddr::Tcp("127.0.0.1".into(), 0)).await.unwrap();
        let ListenAddr::Tcp(host, port) = listener.local_addr().unwrap() else { panic!("not TCP") };
        let server = world.server.clone();
        tokio::spawn(async move { server.serve(listener).await });
        Bench { world, dir, tcp: format!("nbd://{host}:{port}/") }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.path("nbd"))
    }

    /// Runs a command to its end and gives what it printed; it must succeed.
    async fn run(&self, program: &str, args: &[&str]) -> String {
        let mut command = Command::new(program);
        command.args(args).current_dir(self.dir.path());
        let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {args:?}: {text}{errors}");
        text
    }

    /// An image with data, holes and an odd end.
    fn image(&self) -> String {
        let mut bytes = vec![0u8; 64 * BLOCK as usize + 512];
        let mut x = 1u32;
        for range in [0..300_000, 5_000_000..9_000_000, 30_000_000..30_000_001, 67_100_000..67_109_376] {
            for byte in &mut bytes[range] {
                x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *byte = (x >> 24) as u8;
            }
        }
        let path = self.path("image");
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

fn installed(program: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&paths).any(|dir| Path::new(&dir).join(program).exists());
    if !found {
        eprintln!("{program} is not installed: left out");
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_img_converts_in_compares_maps_and_converts_out() {
    if !installed("qemu-img") {
        return;
    }
    let bench = Bench::new().await;
    let (image, uri, out) = (bench.image(), bench.uri("disk"), bench.path("out"));
    bench.run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &image, &uri]).await;
    bench.run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &image, &uri]).await;
    bench.run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, &out]).await;
    assert!(std::fs::read(&image).unwrap() == std::fs::read(&out).unwrap());

    let map = bench.run("qemu-img", &["map", "--output=json", "-f", "raw", &uri]).await;
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let extents: Vec<_> = map
        .as_array()
        .unwrap()
        .iter()
        .map(|e| (e["start"].as_u64().unwrap(), e["length"].as_u64().unwrap(), e["data"].as_bool().unwrap()))
        .collect();
    let end = 64 * BLOCK + 512;
    assert_eq!(
        extents,
        [
            (0, BLOCK, true),
            (BLOCK, 3 * BLOCK, false),
            (4 * BLOCK, 5 * BLOCK, true),
            (9 * BLOCK, 19 * BLOCK, false),
            (28 * BLOCK, BLOCK, true),
            (29 * BLOCK, 34 * BLOCK, false),
            (63 * BLOCK, end - 63 * BLOCK, true),
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_io_writes_discards_zeroes_and_flushes() {
    if !installed("qemu-io") {
        return;
    }
    let bench = Bench::new().await;
    let uri = format!("{}v", bench.tcp);
    let script = [
        "write -P 1 0 2M",
        "write -f -P 2 1000 4000",
        "discard 0 1M",
        "write -z 1M 1000",
        "write -z -u 2M 1M",
        "aio_write -P 5 3M 64k",
        "aio_write -P 6 3136k 64k",
        "aio_flush",
        "flush",
        "read -P 0 0 1M",
        "read -P 0 1M 1000",
        "read -P 1 1049576 1047576",
        "read -P 0 2M 1M",
        "read -P 5 3M 64k",
        "read -P 6 3136k 64k",
    ];
    let mut args = vec!["-f", "raw", "-t", "writeback", "-d", "unmap"];
    script.iter().for_each(|command| args.extend(["-c", command]));
    args.push(&uri);
    let text = bench.run("qemu-io", &args).await;
    assert!(!text.contains("failed") && !text.contains("error"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_img_bench_runs_at_depth() {
    if !installed("qemu-img") {
        return;
    }
    let bench = Bench::new().await;
    let uri = bench.uri("disk");
    for extra in [&["-w", "--flush-interval=64"][..], &[]] {
        let mut args = vec!["bench", "-f", "raw", "-t", "none", "-c", "2000", "-d", "32", "-s", "4096"];
        args.extend(extra);
        args.push(&uri);
        bench.run("qemu-img", &args).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdinfo_lists_and_describes() {
    if !installed("nbdinfo") {
        return;
    }
    let bench = Bench::new().await;
    vdi::snapshot(&*bench.world.sheep, "v", "tag").await.unwrap();
    let text = bench.run("nbdinfo", &["--list", "--json", &bench.uri("")]).await;
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let names: Vec<_> =
        json["exports"].as_array().unwrap().iter().map(|e| e["export-name"].as_str().unwrap()).collect();
    assert_eq!(names.len(), 3);
    assert!(["v", "v@tag", "disk"].iter().all(|name| names.contains(name)), "{names:?}");
    let text = bench.run("nbdinfo", &["--json", &bench.uri("v@tag")]).await;
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let export = &json["exports"][0];
    assert_eq!(export["is_read_only"], true);
    assert_eq!(export["can_multi_conn"], true);
    assert_eq!(export["block_size_maximum"], 32 << 20);
    assert_eq!(export["contexts"].as_array().unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdcopy_copies_in_and_out_over_several_connections() {
    if !installed("nbdcopy") {
        return;
    }
    let bench = Bench::new().await;
    let (image, uri, out) = (bench.image(), bench.uri("disk"), bench.path("out"));
    bench.run("nbdcopy", &["--connections=4", &image, &uri]).await;
    bench.run("nbdcopy", &["--connections=4", &uri, &out]).await;
    assert!(std::fs::read(&image).unwrap() == std::fs::read(&out).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn fio_verifies_what_it_wrote() {
    if !installed("fio") {
        return;
    }
    let bench = Bench::new().await;
    let engines = bench.run("fio", &["--enghelp"]).await;
    if !engines.contains("nbd") {
        return eprintln!("fio has no nbd engine: left out");
    }
    let uri = format!("--uri={}", bench.uri("disk"));
    let args = [
        "--name=t",
        "--ioengine=nbd",
        &uri,
        "--rw=randrw",
        "--bs=4k",
        "--iodepth=32",
        "--size=16m",
        "--verify=crc32c",
        "--randseed=1",
    ];
    bench.run("fio", &args).await;
}
