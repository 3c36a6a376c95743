//! A program on a pseudo terminal that is its controlling one.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};

use nix::pty::{Winsize, openpty};
use nix::sys::termios::{Termios, tcgetattr};
use sheepdog_testkit::binaries::system;
use sheepdog_testkit::wait::DEADLINE;
use sheepdog_testkit::wait_for;

pub struct Terminal {
    keyboard: File,
    /// Kept open, so that its settings can be asked for at any time.
    line: OwnedFd,
    shown: Arc<Mutex<Vec<u8>>>,
    child: Option<Child>,
}

impl Terminal {
    pub fn open(rows: u16, columns: u16) -> Terminal {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(&size, None).expect("a pseudo terminal");
        let keyboard = File::from(pty.master);
        let mut screen = keyboard.try_clone().expect("a descriptor");
        let shown = Arc::new(Mutex::new(Vec::new()));
        let sink = shown.clone();
        // Ends when the last descriptor of the line is closed.
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = screen.read(&mut buffer) {
                sink.lock().expect("no panic holds it").extend_from_slice(&buffer[..n]);
            }
        });
        Terminal { keyboard, line: pty.slave, shown, child: None }
    }

    fn stream(&self) -> Stdio {
        Stdio::from(self.line.try_clone().expect("a descriptor"))
    }

    /// Starts a program on the terminal.
    pub fn run(&mut self, words: &[&str], environment: &[(&str, &str)]) {
        let child = Command::new(system("setsid", "util-linux"))
            .arg("-c")
            .args(words)
            .envs(environment.iter().copied())
            .stdin(self.stream())
            .stdout(self.stream())
            .stderr(self.stream())
            .spawn();
        self.child = Some(child.unwrap_or_else(|e| panic!("{words:?}: {e}")));
    }

    pub fn resize(&self, rows: u16, columns: u16) {
        let size = [rows.to_string(), columns.to_string()];
        let status = Command::new("stty")
            .args(["rows", &size[0], "cols", &size[1]])
            .stdin(self.stream())
            .status()
            .expect("stty");
        assert!(status.success());
    }

    pub fn type_in(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).expect("the terminal takes keys");
    }

    /// All that was shown since the last [`Terminal::forget`].
    pub fn shown(&self) -> String {
        String::from_utf8_lossy(&self.shown.lock().expect("no panic holds it")).into_owned()
    }

    pub fn forget(&self) {
        self.shown.lock().expect("no panic holds it").clear();
    }

    /// Waits until what is shown meets a condition.
    pub fn wait(&self, what: &str, condition: impl Fn(&str) -> bool) {
        let deadline = std::time::Instant::now() + DEADLINE;
        while !condition(&self.shown()) {
            assert!(std::time::Instant::now() < deadline, "waited in vain for {what}: {:?}", self.shown());
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    /// The settings of the line.
    pub fn settings(&self) -> Termios {
        tcgetattr(&self.line).expect("it is a terminal")
    }

    pub fn wait_exit(&mut self) -> ExitStatus {
        let child = self.child.as_mut().expect("a program was started");
        wait_for("the program to end", DEADLINE, || child.try_wait().expect("it is our child"))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill(); // it has ended, as a rule
            let _ = child.wait();
        }
    }
}
