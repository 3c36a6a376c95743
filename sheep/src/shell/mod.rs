//! What surrounds the daemon proper: command line, log, life as a background process (spec 04, 16 to 18 and 20).
//!
//! Order of use in `main`: [`options::parse`], [`daemonize::daemonize`] while there is one thread, then
//! [`log::start`], then everything that has threads.

pub mod daemonize;
mod help;
pub mod localtime;
pub mod log;
mod log_format;
mod log_writer;
pub mod manual;
pub mod options;
mod process;
mod suboptions;

pub use process::{PidFile, raise_open_file_limit};
