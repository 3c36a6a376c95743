//! Captured runs of the original against a cluster (`dog-cli*.json`), replayed against a cluster in memory.
//!
//! What depends on real daemons (placement at the captured address, recovery, disks, locks) is left to the end-to-end
//! tests.

#![allow(clippy::unwrap_used)] // the vectors are trusted

mod common;
mod fake_sheep;

use std::collections::HashMap;
use std::path::Path;

use common::{Scenario, load, output_key, run, stdin_of};
use fake_sheep::FakeCluster;
use serde_json::Value;

/// Replays the entries of a scenario that `wanted` lets through.
fn replay(file: &str, name: &str, wanted: impl Fn(&Value) -> bool) {
    let vectors = load(file);
    let all = vectors["vectors"].as_array().unwrap();
    let entries: Vec<&Value> =
        all.iter().filter(|e| e["scenario"] == name && e["argv"].is_array() && e["tty"].is_null()).collect();
    let nodes = vectors["clusters"][name]["daemons"].as_u64().unwrap() as u16;
    let cluster = FakeCluster::start(nodes);
    let address = cluster.address.to_string();
    let scenario = Scenario::new(&entries, vec![("127.0.0.1", address.clone())]);
    let mut outputs = HashMap::new();
    let (mut checked, mut failures) = (0, Vec::new());
    for entry in entries.iter().filter(|e| wanted(e)) {
        let argv = scenario.argv(entry);
        let mut env = scenario.env(entry);
        env.push(("SHEEPDOG_DOG_ADDR".into(), address.clone()));
        let result = run(Path::new(env!("CARGO_BIN_EXE_dog")), &argv, &env, &stdin_of(entry, &outputs));
        if entry["setup"].as_bool() == Some(true) {
            assert_eq!(Some(i64::from(result.rc)), entry["rc"].as_i64(), "{}: {argv:?}", entry["id"]);
        } else {
            checked += 1;
            failures.extend(scenario.passes(entry, &result).err().map(|e| format!("{}: {e}", entry["id"])));
        }
        outputs.insert(output_key(&argv), result.stdout);
    }
    assert!(checked > 0);
    assert!(failures.is_empty(), "{name}: {} of {checked} differ:\n{}", failures.len(), failures.join("\n"));
}

fn argv_has(entry: &Value, word: &str) -> bool {
    entry["argv"].as_array().unwrap().iter().any(|a| a == word)
}

/// Objects are where the captured addresses put them.
fn needs_placement(entry: &Value) -> bool {
    let stdout = entry["stdout"].as_str().unwrap_or("");
    stdout.contains("has the object") || stdout.contains("locations at epoch")
}

#[test]
fn format_and_sizes() {
    replay("dog-cli.json", "format-and-sizes", |_| true);
}

#[test]
fn vdi_life_cycle_data_and_attributes() {
    let checks_strips = |e: &Value| argv_has(e, "check") && (argv_has(e, "ec") || e["argv"][0] == "cluster");
    let other_files = |e: &Value| argv_has(e, "dump-inode");
    replay("dog-cli.json", "vdi", |e| !needs_placement(e) && !checks_strips(e) && !other_files(e));
}

#[test]
fn node_commands_before_a_node_dies() {
    replay("dog-cli.json", "node", |e| e["id"].as_u64().unwrap() <= 58);
}

#[test]
fn backup_and_restore() {
    // From entry 35 on the recorded state is that of the original, which has destroyed the working VDI by then.
    replay("dog-cli-2.json", "backup", |e| !(35..=44).contains(&e["id"].as_u64().unwrap()));
}

#[test]
fn restore_without_parent() {
    replay("dog-cli-2.json", "restore-no-parent", |e| e["id"].as_u64().unwrap() <= 8);
}

#[test]
fn trees_and_options() {
    replay("dog-cli-2.json", "tree-and-options", |e| !argv_has(e, "localhost"));
}

#[test]
fn two_nodes() {
    replay("dog-cli-2.json", "few-nodes", |e| !needs_placement(e));
}

#[test]
fn format_options() {
    replay("dog-cli-2.json", "format-options", |_| true);
}
