//! Everything that needs no daemon, against captured runs of the original (`dog-cli-usage.json`): usage texts, option
//! parsing, exit statuses, and every command against a dead port.

mod common;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};

use common::{Run, Scenario, load};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

fn run_dog(args: &[String], env: &[(String, String)], stdin: &[u8]) -> Run {
    common::run(Path::new(env!("CARGO_BIN_EXE_dog")), args, env, stdin)
}

#[test]
fn usage_options_and_statuses_are_those_captured() {
    let vectors = load("dog-cli-usage.json");
    let entries: Vec<&serde_json::Value> = vectors["vectors"].as_array().unwrap().iter().collect();
    let scratch = tempfile::tempdir().unwrap();
    let scenario = Scenario::new(&entries, vec![("<T>", scratch.path().display().to_string())]);
    let mut failures = Vec::new();
    let mut checked = 0;
    for entry in entries.iter() {
        let run = run_dog(&scenario.argv(entry), &scenario.env(entry), b"");
        checked += 1;
        if entry["setup"].as_bool() == Some(true) {
            assert_eq!(Some(i64::from(run.rc)), entry["rc"].as_i64(), "{}", entry["id"]);
            continue;
        }
        failures.extend(scenario.passes(entry, &run).err().map(|e| format!("{}: {e}", entry["id"])));
    }
    println!("usage: {} of {checked} entries pass", checked - failures.len());
    assert!(failures.is_empty(), "{} of {checked} differ:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn invocations_are_logged_where_the_environment_says() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("dog.log");
    let env = [
        ("SHEEPDOG_DOG_LOG".to_string(), "1".to_string()),
        ("SHEEPDOG_DOG_LOG_PATH".to_string(), path.display().to_string()),
    ];
    let run = run_dog(&["vdi".into(), "help".into()], &env, b"");
    assert_eq!(run.rc, 64);
    let log = std::fs::read_to_string(&path).unwrap();
    assert!(log.ends_with(" :  dog vdi help\n"), "{log:?}");
    assert_eq!(log.len(), "2024 Jan 02 10:00:01 :  dog vdi help\n".len());
}

/// The daemon takes the connection and says nothing, so the command waits until the signal comes.
#[test]
fn a_signal_that_ends_dog_is_told() {
    let silent = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = silent.local_addr().unwrap().port().to_string();
    for (signal, text) in
        [(Signal::SIGQUIT, "Quit"), (Signal::SIGABRT, "Aborted"), (Signal::SIGBUS, "Bus error")]
    {
        let dog = Command::new(env!("CARGO_BIN_EXE_dog"))
            .args(["node", "list", "-p", &port])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let connection = silent.accept().unwrap();
        nix::sys::signal::kill(Pid::from_raw(dog.id() as i32), signal).unwrap();
        let output = dog.wait_with_output().unwrap();
        drop(connection);
        let expected = format!("dog exits unexpectedly ({text}).\n");
        assert_eq!(String::from_utf8_lossy(&output.stderr), expected);
        match signal {
            Signal::SIGABRT => assert_eq!(output.status.code(), Some(2)),
            _ => assert_eq!(output.status.signal(), Some(signal as i32)),
        }
    }
}

#[test]
fn node_format_writes_a_padded_name_once() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().display().to_string();
    let args = |store: &str| ["node", "format", &dir, store].map(String::from).to_vec();
    assert_eq!(run_dog(&args("tree"), &[], b"").rc, 0);
    let mut expected = [0; 16];
    expected[..4].copy_from_slice(b"tree");
    assert_eq!(std::fs::read(scratch.path().join("node_config")).unwrap(), expected);
    let again = run_dog(&args("plain"), &[], b"");
    assert_eq!(again.rc, 2);
    let text = format!("config file already exists: {dir}/node_config\n");
    assert_eq!(String::from_utf8_lossy(&again.stderr), text);
}

#[test]
fn nbd_serve_says_what_is_wrong_with_its_addresses() {
    let bad = run_dog(&["nbd", "serve", "10809"].map(String::from), &[], b"");
    let text = "invalid NBD address '10809': expected unix:PATH or tcp:HOST:PORT\n";
    assert_eq!((bad.rc, String::from_utf8_lossy(&bad.stderr).as_ref()), (64, text));
    let usage = run_dog(&["nbd", "serve", "-h"].map(String::from), &[], b"");
    assert!(usage.stdout.starts_with(b"Usage: dog nbd serve ") && usage.rc == 0);
}
