//! `sheep`, the daemon.

use std::process::ExitCode;

use sheep::daemon;
use sheep::shell::daemonize::{Readiness, Side, daemonize};
use sheep::shell::options::{Parsed, parse};

fn main() -> ExitCode {
    // Before any thread exists: other sheep signal this process through the local driver.
    if let Err(error) = sheepdog_cluster::block_event_signal() {
        eprintln!("cannot block SIGUSR1: {error}");
        return ExitCode::FAILURE;
    }
    let options = match parse(std::env::args()) {
        Parsed::Run(options) => options,
        Parsed::Exit { code, stdout, stderr } => {
            print!("{stdout}");
            eprint!("{stderr}");
            return exit_code(code);
        }
    };
    let readiness = if options.foreground {
        Readiness::foreground()
    } else {
        match daemonize() {
            Ok(Side::Starter { code, stderr }) => {
                eprint!("{stderr}");
                return exit_code(code);
            }
            Ok(Side::Daemon(readiness)) => readiness,
            Err(error) => {
                eprintln!("cannot run in the background: {error}");
                return ExitCode::FAILURE;
            }
        }
    };
    exit_code(daemon::run(&options, readiness))
}

fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
