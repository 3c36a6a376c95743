//! Signals and panics that end the process (spec 07, 1, step 3): one line says which.
//!
//! The original adds a stack trace; here that is left to the core dump, because nothing that takes memory is safe in a
//! handler.

use std::os::fd::BorrowedFd;
use std::panic::PanicHookInfo;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction};

use crate::out;

/// Exit status after an abort.
const ABORTED: i32 = 2;

const SIGNALS: [(Signal, &str); 6] = [
    (Signal::SIGSEGV, "dog exits unexpectedly (Segmentation fault).\n"),
    (Signal::SIGABRT, "dog exits unexpectedly (Aborted).\n"),
    (Signal::SIGBUS, "dog exits unexpectedly (Bus error).\n"),
    (Signal::SIGILL, "dog exits unexpectedly (Illegal instruction).\n"),
    (Signal::SIGFPE, "dog exits unexpectedly (Floating point exception).\n"),
    (Signal::SIGQUIT, "dog exits unexpectedly (Quit).\n"),
];

/// From now on, whatever ends the process is told.
pub fn tell() {
    std::panic::set_hook(Box::new(die_of_panic));
    // The handler is for one signal; after that the default action holds, which it asks for by raising it again.
    let flags = SaFlags::SA_RESETHAND | SaFlags::SA_NODEFER | SaFlags::SA_ONSTACK;
    let action = SigAction::new(SigHandler::Handler(die_of_signal), flags, SigSet::empty());
    for (signal, _) in SIGNALS {
        // SAFETY: the handler calls nothing but write, _exit and raise, which are safe in one.
        let _ = unsafe { sigaction(signal, &action) }; // without it the default action holds, which is fine
    }
}

/// An internal failure ends the process as an abort of the original does, whatever thread it happens on.
fn die_of_panic(info: &PanicHookInfo<'_>) {
    out::log(format_args!("PANIC: {info}"));
    out::log("dog exits unexpectedly (Aborted).");
    std::process::exit(ABORTED);
}

extern "C" fn die_of_signal(number: libc::c_int) {
    for (signal, text) in SIGNALS {
        if signal as libc::c_int == number {
            // SAFETY: descriptor 2 stays open for as long as the process lives.
            let stderr = unsafe { BorrowedFd::borrow_raw(libc::STDERR_FILENO) };
            let _ = nix::unistd::write(stderr, text.as_bytes()); // nowhere is left to complain
            if signal == Signal::SIGABRT {
                // SAFETY: ends the process at once.
                unsafe { libc::_exit(ABORTED) };
            }
            let _ = raise(signal);
        }
    }
}
