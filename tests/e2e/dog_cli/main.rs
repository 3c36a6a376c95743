//! Captured runs of the original's `dog` (`dog-cli*.json`), replayed with our `dog` against our `sheep`.
//!
//! Each scenario runs in network and mount namespaces of its own, because the captured placement depends on address and
//! ports, and some need a disk whose free space only they change.
//! That takes root, or a kernel that lets users make namespaces. The binaries are those next to the test, or `SHEEP`
//! and `DOG` say where they are; build them first (`cargo build -p sheep -p dog`).

#![allow(clippy::unwrap_used)] // the vectors are trusted

#[path = "../../../dog/tests/common/mod.rs"]
mod common;
mod daemons;
mod requests;
mod steps;
mod terminal;

use std::collections::{BTreeSet, HashMap};
use std::process::Command;
use std::time::Duration;

use common::{Scenario, load, output_key, stdin_of};
use daemons::{Daemons, binary};
use serde_json::Value;
use sheepdog_testkit::PrivateDisk;

/// Set inside the namespace.
const INSIDE: &str = "SHEEPDOG_TEST_IN_NAMESPACE";

/// Lists the entries that differ on purpose, each with its reason.
const DEVIATIONS: &str = include_str!("../../../docs/compatibility.md");

/// Runs a scenario in a namespace. `known` are ids of entries that do not pass; each has a row in
/// `docs/compatibility.md`, and one that passes must leave the list.
fn scenario(test: &str, file: &str, name: &str, known: &[u64]) {
    in_namespace(test, || replay(file, name, known));
}

/// Runs the test again in namespaces of its own; there, what is given.
fn in_namespace(test: &str, run: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return run();
    }
    let root = nix::unistd::geteuid().is_root();
    let status = Command::new("unshare")
        .args(if root { &["-n", "-m"][..] } else { &["-r", "-n", "-m"] })
        .args(["sh", "-c", "ip link set lo up && exec \"$@\"", "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .status()
        .unwrap();
    assert!(status.success(), "{test} failed (above)");
}

fn replay(file: &str, name: &str, known: &[u64]) {
    let vectors = load(file);
    let all = vectors["vectors"].as_array().unwrap();
    let entries: Vec<&Value> = all.iter().filter(|e| e["scenario"] == name).collect();
    let stores = tempfile::tempdir().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let replace =
        vec![("<T>", scratch.path().display().to_string()), ("<C>", stores.path().display().to_string())];
    let texts: Vec<&Value> = entries.iter().copied().filter(|e| e["argv"].is_array()).collect();
    let scenario = Scenario::new(&texts, replace);
    let reweights = texts.iter().any(|entry| entry["argv"][1] == "reweight");
    let _disk = reweights.then(|| PrivateDisk::mount(stores.path()));
    let mut daemons = Daemons::start(stores.path(), &vectors["clusters"][name]);
    let mut runner = Replay::new(name);
    for entry in entries {
        runner.entry(&scenario, &mut daemons, entry);
    }
    runner.finish(known);
}

/// How often a listing that is not as recorded is asked for again.
const LISTINGS: u32 = 20;

struct Replay<'a> {
    name: &'a str,
    outputs: HashMap<String, Vec<u8>>,
    /// Entries that pass by what their `corrected` says, not as recorded.
    corrected: BTreeSet<u64>,
    /// Entries that only make sense where the original's defect struck.
    left_out: Vec<u64>,
    passed: usize,
    failed: Vec<(u64, String)>,
}

impl Replay<'_> {
    fn new(name: &str) -> Replay<'_> {
        Replay {
            name,
            outputs: HashMap::new(),
            corrected: BTreeSet::new(),
            left_out: Vec::new(),
            passed: 0,
            failed: Vec::new(),
        }
    }

    fn entry(&mut self, scenario: &Scenario, daemons: &mut Daemons, entry: &Value) {
        let id = entry["id"].as_u64().unwrap();
        for field in ["before", "do"] {
            self.steps(scenario, daemons, id, &entry[field]);
        }
        if entry["argv"].is_array() {
            self.run(scenario, entry, id);
        }
        self.steps(scenario, daemons, id, &entry["after"]);
    }

    fn steps(&mut self, scenario: &Scenario, daemons: &mut Daemons, id: u64, list: &Value) {
        for step in list.as_array().into_iter().flatten() {
            if let Err(e) = steps::perform(scenario, daemons, step) {
                self.failed.push((id, format!("step {step}: {e}")));
            }
        }
    }

    fn run(&mut self, scenario: &Scenario, entry: &Value, id: u64) {
        let argv = scenario.argv(entry);
        let (env, stdin) = (scenario.env(entry), stdin_of(entry, &self.outputs));
        let defect_absent = entry["after_defect"].as_u64().is_some_and(|id| self.corrected.contains(&id));
        let outcome = if !entry["tty"].is_null() {
            let shown = terminal::run(&binary("dog"), &argv, &env, &stdin, &entry["tty"]);
            terminal::compare(scenario, entry, &shown)
        } else {
            let mut run = common::run(&binary("dog"), &argv, &env, &stdin);
            // What was done through one node is known to another a moment later.
            for _ in 0..LISTINGS {
                if !argv.iter().any(|word| word == "list") || scenario.passes(entry, &run).is_ok() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(100));
                run = common::run(&binary("dog"), &argv, &env, &stdin);
            }
            let outcome = if entry["setup"].as_bool() == Some(true) {
                let expected = entry["rc"].as_i64();
                let stderr = String::from_utf8_lossy(&run.stderr);
                let problem = || format!("set-up {argv:?}: status {}, {stderr}", run.rc);
                if expected == Some(run.rc.into()) { Ok(()) } else { Err(problem()) }
            } else if defect_absent {
                return self.left_out.push(id);
            } else {
                if entry["corrected"].is_object() && scenario.passes_as_recorded(entry, &run).is_err() {
                    self.corrected.insert(id);
                }
                scenario.passes(entry, &run)
            };
            self.outputs.insert(output_key(&argv), run.stdout);
            outcome
        };
        match outcome {
            Ok(()) => self.passed += 1,
            Err(e) => self.failed.push((id, e)),
        }
    }

    fn finish(self, known: &[u64]) {
        let total = self.passed + self.failed.len();
        let share = 100.0 * self.passed as f64 / total as f64;
        println!("{}: {} of {total} entries pass ({share:.1} %)", self.name, self.passed);
        for (ids, what) in [
            (self.corrected.iter().copied().collect(), "as corrected, not as recorded"),
            (self.left_out, "left out, for want of the defect that they record"),
        ] {
            let ids: Vec<u64> = ids;
            if !ids.is_empty() {
                println!("{}: {what}: {ids:?}", self.name);
            }
        }
        for (id, problem) in &self.failed {
            println!("{} {id}: {problem}", self.name);
        }
        let failed: BTreeSet<u64> = self.failed.iter().map(|(id, _)| *id).collect();
        let known: BTreeSet<u64> = known.iter().copied().collect();
        assert_eq!(failed, known, "{}: entries that fail, and those known to", self.name);
        for id in known {
            let row = format!("| {} {id} |", self.name);
            assert!(DEVIATIONS.contains(&row), "docs/compatibility.md has no row '{row}'");
        }
    }
}

macro_rules! scenarios {
    ($($test:ident: $file:literal, $name:literal, $known:expr;)*) => {
        $(
            #[test]
            fn $test() {
                scenario(stringify!($test), $file, $name, $known);
            }
        )*

        /// A new file of captures must not be replayed in part.
        #[test]
        fn every_captured_scenario_has_a_test() {
            let tested = BTreeSet::from([$(($file, $name.to_owned())),*]);
            let files = ["dog-cli.json", "dog-cli-2.json"];
            let captured = files.map(|file| (file, load(file)));
            let captured = captured.iter().flat_map(|(file, vectors)| {
                let entries = vectors["vectors"].as_array().unwrap();
                entries.iter().map(|e| (*file, e["scenario"].as_str().unwrap().to_owned()))
            });
            assert_eq!(tested, captured.collect());
        }
    };
}

#[test]
fn answers_to_captured_requests() {
    in_namespace("answers_to_captured_requests", requests::replay);
}

/// Every entry passes.
const NONE: &[u64] = &[];
/// No NFS server yet.
const NFS: &[u64] = &[20];

scenarios! {
    format_and_sizes: "dog-cli.json", "format-and-sizes", NONE;
    vdi: "dog-cli.json", "vdi", NONE;
    node: "dog-cli.json", "node", NONE;
    lock: "dog-cli.json", "lock", NONE;
    multi_disk: "dog-cli.json", "multi-disk", NONE;
    waiting: "dog-cli-2.json", "waiting", NONE;
    few_nodes: "dog-cli-2.json", "few-nodes", NONE;
    check_repair: "dog-cli-2.json", "check-repair", NONE;
    backup: "dog-cli-2.json", "backup", NONE;
    cluster_snapshots: "dog-cli-2.json", "farm", NONE;
    misc: "dog-cli-2.json", "misc", NFS;
    tty: "dog-cli-2.json", "tty", NONE;
    format_options: "dog-cli-2.json", "format-options", NONE;
    track_few: "dog-cli-2.json", "track-few", NONE;
    restore_no_parent: "dog-cli-2.json", "restore-no-parent", NONE;
    tree_and_options: "dog-cli-2.json", "tree-and-options", NONE;
}
