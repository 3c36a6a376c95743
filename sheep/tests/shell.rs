//! Going to the background, the pid file and the process-wide log, each in a process of its own: this program starts
//! itself with the name of a role.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output, Stdio};
use std::time::{Duration, Instant};

use sheep::shell::PidFile;
use sheep::shell::daemonize::{Readiness, Side, daemonize};
use sheep::shell::log;
use sheep::shell::options::{Options, Parsed, parse};

const ROLE: &str = "SHEEP_SHELL_TEST_ROLE";
const DIR: &str = "SHEEP_SHELL_TEST_DIR";

/// Name and body; the body gets an empty directory.
type Test = (&'static str, fn(&Path));

fn main() -> ExitCode {
    if let Ok(role) = std::env::var(ROLE) {
        let dir = PathBuf::from(std::env::var_os(DIR).expect("the directory comes with the role"));
        return play(&role, &dir);
    }
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let tests: [Test; 6] = [
        ("the_starter_returns_success_once_the_daemon_is_ready", success),
        ("a_daemon_that_fails_before_it_is_ready_fails_its_starter", failure),
        ("a_daemon_that_dies_silently_fails_its_starter", death),
        ("a_process_with_threads_does_not_fork", threads),
        ("a_pid_file_excludes_a_second_process", pid_file),
        ("the_log_has_everything_up_to_the_panic_that_ends_the_process", panic_log),
    ];
    for (name, test) in tests {
        if wanted.is_empty() || wanted.iter().any(|w| name.contains(w.as_str())) {
            let dir = tempfile::tempdir().expect("directory");
            test(dir.path());
            println!("test {name} ... ok");
        }
    }
    ExitCode::SUCCESS
}

fn start(role: &str, dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("own path"));
    command.env(ROLE, role).env(DIR, dir).stdin(Stdio::piped());
    command
}

fn output(role: &str, dir: &Path) -> Output {
    start(role, dir).output().expect("start")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

// ---- the roles ----

fn play(role: &str, dir: &Path) -> ExitCode {
    match role {
        "ready" | "failing" | "dying" => background(role, dir),
        "threads" => {
            let (stop, wait) = std::sync::mpsc::channel::<()>();
            let thread = std::thread::spawn(move || wait.recv().is_err());
            let refused = match daemonize() {
                Err(e) => e.to_string() == "cannot go to the background with 2 threads",
                Ok(_) => false,
            };
            drop(stop);
            assert!(thread.join().expect("no panic"));
            if refused { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        "pid" => match PidFile::create(&dir.join("pid")) {
            Ok(_) => ExitCode::SUCCESS,
            Err(e) => {
                eprintln!("{e}");
                ExitCode::FAILURE
            }
        },
        "log" => {
            log::start(&options(dir)).expect("log");
            log::log_panics();
            for i in 0..3000 {
                tracing::info!("line {i}");
            }
            let _ = std::thread::Builder::new()
                .name("gway 1".into())
                .spawn(|| panic!("it broke"))
                .map(|t| t.join());
            std::process::exit(3)
        }
        other => panic!("role {other}"),
    }
}

fn options(dir: &Path) -> Options {
    let argv = ["sheep", "-x", "3", "-p", "7461", dir.to_str().expect("UTF-8")];
    match parse(argv.map(str::to_owned)) {
        Parsed::Run(options) => *options,
        other => panic!("{other:?}"),
    }
}

fn background(role: &str, dir: &Path) -> ExitCode {
    let readiness: Readiness = match daemonize().expect("fork") {
        Side::Starter { code, stderr } => {
            eprint!("{stderr}");
            return ExitCode::from(code as u8);
        }
        Side::Daemon(readiness) => readiness,
    };
    match role {
        "ready" => {
            let streams: Vec<_> =
                (0..3).map(|fd| std::fs::read_link(format!("/proc/self/fd/{fd}"))).collect();
            let null = streams.iter().all(|s| s.as_ref().is_ok_and(|p| p == Path::new("/dev/null")));
            let cwd = std::env::current_dir().expect("directory");
            let pid = nix::unistd::getpid();
            let session = nix::unistd::getsid(None).expect("session");
            let report = format!("{pid} {} {} {null}", session != pid, cwd.display());
            std::fs::write(dir.join("daemon"), report).expect("write");
            readiness.ready();
            // Ends when the test says so, by removing the file.
            while dir.join("daemon").exists() {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        "failing" => readiness.failed("first line\nsecond line\n"),
        _ => drop(readiness),
    }
    ExitCode::SUCCESS
}

// ---- the tests ----

fn success(dir: &Path) {
    let starter = start("ready", dir).stderr(Stdio::piped()).spawn().expect("start");
    let starter_pid = starter.id();
    let output = starter.wait_with_output().expect("wait");
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
    let report = std::fs::read_to_string(dir.join("daemon")).expect("written before the starter returned");
    let words: Vec<_> = report.split(' ').collect();
    assert_eq!(words[1..], ["true", "/", "true"], "no session leader, directory /, streams at /dev/null");
    assert_ne!(words[0], starter_pid.to_string());
    let proc = PathBuf::from(format!("/proc/{}", words[0]));
    assert!(proc.exists(), "the daemon outlives its starter");
    std::fs::remove_file(dir.join("daemon")).expect("remove");
    let deadline = Instant::now() + Duration::from_secs(30);
    while std::fs::read_to_string(proc.join("stat")).is_ok_and(|s| !s.contains(") Z")) {
        assert!(Instant::now() < deadline, "the daemon ends");
        std::thread::yield_now();
    }
}

fn failure(dir: &Path) {
    let output = output("failing", dir);
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(1), "first line\nsecond line\n"));
}

fn death(dir: &Path) {
    let output = output("dying", dir);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(stderr(&output), "sheep: the daemon ended before it was ready, its log may say why\n");
}

fn threads(dir: &Path) {
    assert!(output("threads", dir).status.success());
}

fn pid_file(dir: &Path) {
    let held = PidFile::create(&dir.join("pid")).expect("create");
    let output = output("pid", dir);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    drop(held);
    assert!(self::output("pid", dir).status.success(), "a file left by a crash is no obstacle");
}

fn panic_log(dir: &Path) {
    let output = output("log", dir);
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(3), ""));
    let path = dir.join("sheep.log");
    assert_eq!(std::fs::metadata(&path).expect("log").mode() & 0o133, 0, "0644 under any umask");
    let text = std::fs::read_to_string(&path).expect("log");
    assert!(text.lines().next().is_some_and(|l| l.contains("NOTICE [main] ") && l.contains("-x")), "{text}");
    assert_eq!(text.lines().filter(|l| l.contains(" line ")).count(), 3000);
    let last = text.lines().last().expect("lines");
    assert!(
        last.contains(" EMERG [gway 1] ") && last.contains(" PANIC: it broke at sheep/tests/shell.rs:"),
        "{last}"
    );
}
