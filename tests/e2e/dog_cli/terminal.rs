//! Runs on a pseudo terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::pty::{Winsize, openpty};
use serde_json::Value;

use crate::common::{Scenario, matches};

/// What a terminal showed, and the status.
pub struct Shown {
    rc: i32,
    output: String,
}

/// Runs `dog` with all three streams on a new terminal; the input is written before it starts.
pub fn run(program: &Path, args: &[String], env: &[(String, String)], stdin: &[u8], tty: &Value) -> Shown {
    let columns = tty["cols"].as_u64().unwrap() as u16;
    let size = Winsize { ws_row: 24, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(&size, None).unwrap();
    let mut master = File::from(pty.master);
    master.write_all(stdin).unwrap();
    let stream = || Stdio::from(pty.slave.try_clone().unwrap());
    let mut child = Command::new(program)
        .arg0("dog")
        .args(args)
        .env_clear()
        .env("TZ", "UTC")
        .env("LC_ALL", "C")
        .envs(env.iter().cloned())
        .stdin(stream())
        .stdout(stream())
        .stderr(stream())
        .spawn()
        .unwrap();
    // The command line's copies are gone when spawn returns; with ours closed, the program's end ends the output.
    drop(pty.slave);
    let reader = std::thread::spawn(move || {
        let mut output = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(n) = master.read(&mut buffer) {
            if n == 0 {
                break;
            }
            output.extend_from_slice(&buffer[..n]);
        }
        output
    });
    let rc = child.wait().unwrap().code().unwrap_or(-1);
    Shown { rc, output: String::from_utf8_lossy(&reader.join().unwrap()).into_owned() }
}

/// Compares with the recorded output; the place of the echoed input varies.
pub fn compare(scenario: &Scenario, entry: &Value, shown: &Shown) -> Result<(), String> {
    if entry["rc"].as_i64() != Some(shown.rc.into()) {
        return Err(format!("{}: status {}; {:?}", entry["argv"], shown.rc, shown.output));
    }
    let echo = entry["echo"].as_str().unwrap_or("");
    let without_echo = |text: &str| text.replacen(echo, "", usize::from(!echo.is_empty()));
    let expected = without_echo(&scenario.text("tty_output", &entry["tty_output"]).unwrap());
    let actual = without_echo(&shown.output);
    if matches(&expected, &actual) {
        return Ok(());
    }
    Err(format!("{}:\n--- expected\n{expected:?}\n--- got\n{actual:?}", entry["argv"]))
}
