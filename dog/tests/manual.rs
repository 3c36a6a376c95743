//! The manual page that is shipped is the one of the command table, and the completion scripts are accepted by their
//! shells. `SHEEPDOG_WRITE_MAN=1` writes the page (scripts/man).

use std::path::Path;
use std::process::{Command, Output};

fn dog(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dog")).args(args).output().expect("dog runs")
}

fn text(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

#[test]
fn the_shipped_page_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/man/dog.8");
    let page = text(&dog(&["man"]));
    if std::env::var_os("SHEEPDOG_WRITE_MAN").is_some() {
        std::fs::write(&path, &page).expect("docs/man/dog.8 is writable");
    }
    let shipped = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(shipped == page, "docs/man/dog.8 is out of date: run scripts/man");
    for word in
        ["dog vdi create", "dog cluster health", "dog node log level set", "\\-\\-json", "EXIT STATUS"]
    {
        assert!(page.contains(word), "{word}");
    }
}

/// Completes the last word of a command line as bash would.
fn complete(script: &Path, words: &[&str]) -> Vec<String> {
    let line: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
    let program = format!(
        "source '{}'; COMP_WORDS=({}); COMP_CWORD={}; _dog; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
        script.display(),
        line.join(" "),
        words.len() - 1
    );
    let output = Command::new("bash").args(["--norc", "-c", &program]).output().expect("bash runs");
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).split_whitespace().map(str::to_owned).collect()
}

#[test]
fn bash_completes_words_and_options() {
    let scratch = tempfile::tempdir().expect("a directory");
    let script = scratch.path().join("dog.bash");
    std::fs::write(&script, text(&dog(&["completions", "bash"]))).expect("the script");
    assert_eq!(complete(&script, &["dog", "clu"]), ["cluster"]);
    assert_eq!(complete(&script, &["dog", "vdi", "cr"]), ["create"]);
    assert_eq!(complete(&script, &["dog", "-p", "7001", "node", "log", "level", ""]), ["set", "get", "list"]);
    assert_eq!(complete(&script, &["dog", "vdi", "list", "--js"]), ["--json"]);
    assert_eq!(complete(&script, &["dog", "vdi", "create", "--js"]), [""; 0]);
    assert_eq!(complete(&script, &["dog", "top", "--on"]), ["--once"]);
}

#[test]
fn the_other_shells_have_scripts_too() {
    for (shell, start) in [("zsh", "#compdef dog\n"), ("fish", "# fish completion")] {
        let script = text(&dog(&["completions", shell]));
        assert!(script.starts_with(start) && script.contains("vdi import"), "{shell}");
        // Their syntax is checked where they are installed.
        let scratch = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(scratch.path(), &script).expect("the script");
        if let Ok(checked) = Command::new(shell).arg("-n").arg(scratch.path()).output() {
            assert!(checked.status.success(), "{shell}: {checked:?}");
        }
    }
    assert_eq!(dog(&["completions", "ksh"]).status.code(), Some(64));
}

#[test]
fn commands_without_a_listing_refuse_json() {
    let refused = dog(&["vdi", "delete", "x", "--json"]);
    let text = "'dog vdi delete' has no JSON output\n";
    assert_eq!((refused.status.code(), String::from_utf8_lossy(&refused.stderr).as_ref()), (Some(64), text));
    let levels = dog(&["node", "log", "level", "list", "--json"]);
    let document: serde_json::Value = serde_json::from_slice(&levels.stdout).expect("JSON");
    assert_eq!(document["levels"][6], serde_json::json!({ "level": 6, "name": "info" }));
}

#[test]
fn a_dead_port_is_critical() {
    // Port 1 belongs to nobody here.
    let health = dog(&["cluster", "health", "-p", "1"]);
    let line = "critical: no sheep answers at 127.0.0.1:1\n";
    assert_eq!((health.status.code(), String::from_utf8_lossy(&health.stdout).as_ref()), (Some(2), line));
    let document = dog(&["cluster", "health", "-p", "1", "--json"]);
    assert_eq!(document.status.code(), Some(2));
    let document: serde_json::Value = serde_json::from_slice(&document.stdout).expect("JSON");
    assert_eq!(document["status"], "critical");
    let top = dog(&["top", "--once", "-p", "1"]);
    assert_eq!((top.status.code(), top.stdout.len()), (Some(2), 0));
    assert_eq!(dog(&["top", "-i", "0"]).status.code(), Some(64));
    let usage = dog(&["top", "-h"]);
    assert!(
        text(&usage).starts_with("Usage: dog top [-o] [-i interval] [-a address] [-p port] [-h]\nOptions:\n")
    );
}
