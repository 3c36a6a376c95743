//! Exit statuses and the ways a command can end (spec 07, section 3).

use std::fmt::Display;

use crate::out;

/// Why a command stopped before its regular end. Messages are printed where the failure happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The usage is printed and the status is 64.
    Usage,
    /// The status; the elapsed time is still printed.
    Code(i32),
    /// The process ends at once with this status, without the elapsed time.
    Now(i32),
}

/// What a command gives back.
pub type Outcome = Result<(), Stop>;

/// The command failed.
pub const FAILURE: Stop = Stop::Code(1);
/// A cluster or local host problem.
pub const SYSTEM: Stop = Stop::Code(2);
/// The attribute exists.
pub const EXISTS: Stop = Stop::Code(3);
/// The attribute or its VDI was not found.
pub const MISSING: Stop = Stop::Code(5);
/// A semantic argument error that prints no usage.
pub const BAD_ARGUMENT: Stop = Stop::Code(64);
/// What the original returns as -1.
pub const MINUS_ONE: Stop = Stop::Code(255);

/// Prints `message` on stderr and gives `stop` back.
pub fn fail(stop: Stop, message: impl Display) -> Stop {
    out::log(message);
    stop
}
