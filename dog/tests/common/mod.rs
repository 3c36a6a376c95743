//! Replays entries of the captured `dog` runs (spec 07, section 19) against a `dog` binary.

#![allow(dead_code)] // every test uses a part of it
#![allow(clippy::unwrap_used)] // the vectors are trusted

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use std::os::unix::process::CommandExt;

use serde_json::Value;
use sha1::{Digest, Sha1};

/// What a run gave.
pub struct Run {
    pub rc: i32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

/// Loads a vector file.
pub fn load(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/vectors").join(name);
    let text = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&text).unwrap()
}

/// Runs a `dog` binary as captured: argv[0] is `dog`, the environment is fixed.
pub fn run(program: &Path, args: &[String], env: &[(String, String)], stdin: &[u8]) -> Run {
    let mut child = Command::new(program)
        .arg0("dog")
        .args(args)
        .env_clear()
        .env("TZ", "UTC")
        .env("LC_ALL", "C")
        .envs(env.iter().cloned())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let data = stdin.to_vec();
    // A command that does not read its input closes the pipe.
    let feeder = std::thread::spawn(move || drop(input.write_all(&data)));
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap();
    Run { rc: output.status.code().unwrap_or(-1), stdout: output.stdout, stderr: output.stderr }
}

/// Matches a text against an expectation in which `<name>` stands for what its mask matches.
pub fn matches(expected: &str, actual: &str) -> bool {
    match_at(expected.as_bytes(), actual.as_bytes())
}

/// Lengths of the beginnings of a text that a mask may stand for.
type Mask = fn(&[u8]) -> Vec<usize>;

const MASKS: &[(&str, Mask)] = &[
    ("<date_sec>", |t| shape(t, "dddd-dd-dd dd:dd:dd")),
    ("<date_min>", |t| shape(t, "dddd-dd-dd dd:dd")),
    ("<graph_date>", |t| shape(t, "dddd-dd-dd")),
    ("<time>", |t| shape(t, "dd:dd:dd")),
    ("<ctime>", |t| shape(t, "Aaa Aaa _d dd:dd:dd dddd")),
    ("<epoch_secs>", |t| digits(t).into_iter().filter(|n| (9..=10).contains(n)).collect()),
    ("<version>", |t| (0..=until(t, |b| b == b')')).collect()),
    ("<SIZE>", size),
    ("<USED>", size),
    ("<AVAIL>", size),
    ("<N>", size),
    ("<PCT>", |t| {
        let blanks = until(t, |b| b != b' ');
        number(&t[blanks..]).into_iter().map(|n| blanks + n).collect()
    }),
    ("<DONE>", digits),
    ("<vnodes>", digits),
    ("<SEC>", |t| {
        let whole = until(t, |b| !b.is_ascii_digit());
        shape(&t[whole..], ".ddd").into_iter().map(|n| whole + n).collect()
    }),
    ("<errno>", |t| (1..=until(t, |b| b == b'\n')).collect()),
];

fn until(text: &[u8], stop: impl Fn(u8) -> bool) -> usize {
    text.iter().position(|b| stop(*b)).unwrap_or(text.len())
}

fn digits(text: &[u8]) -> Vec<usize> {
    (1..=until(text, |b| !b.is_ascii_digit())).collect()
}

fn number(text: &[u8]) -> Vec<usize> {
    (1..=until(text, |b| !b.is_ascii_digit() && b != b'.')).collect()
}

fn size(text: &[u8]) -> Vec<usize> {
    let mut ends = number(text);
    let units: Vec<usize> = ends.iter().map(|n| n + 3).filter(|n| *n <= text.len()).collect();
    ends.extend(units.into_iter().filter(|n| text[n - 3] == b' ' && text[n - 1] == b'B'));
    ends
}

fn shape(text: &[u8], shape: &str) -> Vec<usize> {
    let fits = text.len() >= shape.len()
        && shape.bytes().zip(text).all(|(s, b)| match s {
            b'd' => b.is_ascii_digit(),
            b'A' => b.is_ascii_uppercase(),
            b'a' => b.is_ascii_lowercase(),
            b'_' => *b == b' ' || b.is_ascii_digit(),
            other => *b == other,
        });
    if fits { vec![shape.len()] } else { Vec::new() }
}

fn match_at(mut expected: &[u8], mut actual: &[u8]) -> bool {
    loop {
        if expected.first() == Some(&b'<')
            && let Some((name, mask)) = MASKS.iter().find(|(name, _)| expected.starts_with(name.as_bytes()))
        {
            let rest = &expected[name.len()..];
            return mask(actual).into_iter().rev().any(|n| match_at(rest, &actual[n..]));
        }
        match (expected.first(), actual.first()) {
            (None, None) => return true,
            (Some(e), Some(a)) if e == a => {
                expected = &expected[1..];
                actual = &actual[1..];
            }
            _ => return false,
        }
    }
}

/// What stdin of an entry holds; `outputs` are the stdouts of earlier entries by their arguments.
pub fn stdin_of(entry: &Value, outputs: &HashMap<String, Vec<u8>>) -> Vec<u8> {
    let stdin = &entry["stdin"];
    if let Some(text) = stdin.as_str() {
        return text.as_bytes().to_vec();
    }
    if let Some(hex) = stdin["hex"].as_str() {
        return unhex(hex);
    }
    if let Some(unit) = stdin["repeat_ascii"].as_str() {
        let total = stdin["total_bytes"].as_u64().unwrap() as usize;
        return unit.bytes().cycle().take(total).collect();
    }
    match stdin["from"].as_str() {
        Some(from) => outputs[from.trim_start_matches("stdout of ")].clone(),
        None => Vec::new(),
    }
}

/// The key of an entry in the outputs of [`stdin_of`].
pub fn output_key(argv: &[String]) -> String {
    argv.join(" ").replace(" -p 7700", "")
}

/// Bytes of a string of hex digits.
pub fn unhex(hex: &str) -> Vec<u8> {
    (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()).collect()
}

/// Whether bytes have the recorded length, hash and beginning.
fn same_digest(value: &Value, actual: &[u8]) -> bool {
    let head = unhex(value["head_hex"].as_str().unwrap());
    let digest: String = Sha1::digest(actual).iter().map(|b| format!("{b:02x}")).collect();
    value["len"].as_u64() == Some(actual.len() as u64)
        && value["sha1"].as_str() == Some(&digest)
        && actual.starts_with(&head)
}

/// The fields of the entries of one scenario, to resolve `same_as`.
pub struct Scenario<'a> {
    entries: HashMap<u64, &'a Value>,
    replace: Vec<(&'static str, String)>,
}

impl<'a> Scenario<'a> {
    /// Entries by id; `replace` are the placeholders and what they stand for.
    pub fn new(entries: &[&'a Value], replace: Vec<(&'static str, String)>) -> Scenario<'a> {
        let entries = entries.iter().map(|e| (e["id"].as_u64().unwrap(), *e)).collect();
        Scenario { entries, replace }
    }

    /// A text with the placeholders filled in.
    pub fn fill(&self, text: &str) -> String {
        self.replace.iter().fold(text.to_string(), |text, (mark, with)| text.replace(mark, with))
    }

    /// Arguments of an entry.
    pub fn argv(&self, entry: &Value) -> Vec<String> {
        entry["argv"].as_array().unwrap().iter().map(|a| self.fill(a.as_str().unwrap())).collect()
    }

    /// Environment of an entry.
    pub fn env(&self, entry: &Value) -> Vec<(String, String)> {
        let vars = entry["env"].as_object().into_iter().flatten();
        vars.map(|(k, v)| (k.clone(), self.fill(v.as_str().unwrap()))).collect()
    }

    /// The expected text of a field, `same_as` resolved; `None` if the field is not text.
    pub fn text(&self, field: &str, value: &Value) -> Option<String> {
        if let Some(id) = value["same_as"].as_u64() {
            return self.text(field, &self.entries[&id][field]);
        }
        value.as_str().map(|text| self.fill(text))
    }

    /// Whether a run is what the entry recorded.
    pub fn passes_as_recorded(&self, entry: &Value, run: &Run) -> Result<(), String> {
        self.compare(entry, entry, run, true)
    }

    /// Whether a run is what the entry recorded, or what it says that it should have been.
    pub fn passes(&self, entry: &Value, run: &Run) -> Result<(), String> {
        let recorded = self.passes_as_recorded(entry, run);
        match &entry["corrected"] {
            Value::Object(_) if recorded.is_err() => self.compare(entry, &entry["corrected"], run, false),
            _ => recorded,
        }
    }

    /// Lines of checks come in any order.
    fn sorted(&self, entry: &Value, expected: &str, actual: &str) -> bool {
        let sort = |text: &str| {
            let mut lines: Vec<String> = text.lines().map(String::from).collect();
            lines.sort();
            lines
        };
        entry["argv"][1] == "check" && sort(expected) == sort(actual)
    }

    fn compare(&self, entry: &Value, fields: &Value, run: &Run, all: bool) -> Result<(), String> {
        let argv = entry["argv"].to_string();
        if let Some(rc) = fields["rc"].as_i64()
            && rc != i64::from(run.rc)
        {
            let stderr = String::from_utf8_lossy(&run.stderr);
            return Err(format!("{argv}: status {} instead of {rc}; stderr {stderr:?}", run.rc));
        }
        for (field, actual) in [("stdout", &run.stdout), ("stderr", &run.stderr)] {
            let value = &fields[field];
            if value.is_null() && !all {
                continue;
            }
            let value = match value["same_as"].as_u64() {
                Some(id) => &self.entries[&id][field],
                None => value,
            };
            if value["len"].is_u64() {
                if !same_digest(value, actual) {
                    return Err(format!("{argv}: {field} differs: {} bytes for {value}", actual.len()));
                }
                continue;
            }
            let Some(expected) = self.text(field, value) else {
                return Err(format!("{argv}: {field} cannot be compared: {value}"));
            };
            let actual = String::from_utf8_lossy(actual);
            if !self.sorted(entry, &expected, &actual) && !matches(&expected, &actual) {
                return Err(format!("{argv}: {field}\n--- expected\n{expected}\n--- got\n{actual}"));
            }
        }
        Ok(())
    }
}
