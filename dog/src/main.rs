//! `dog`, the administration client of a Sheepdog cluster (spec 07).
//!
//! A one-shot process: it parses the command line by the table of [`commands`], talks to one or more sheep through
//! [`session`], prints through [`out`] and exits. Everything a script can see, that is arguments, streams and exit
//! statuses, is interface and reproduced exactly; what happens on the wire only has to mean the same.

#[macro_use]
mod out;

mod args;
mod benchmark;
mod btree;
mod cluster;
mod commands;
mod completions;
mod context;
mod crash;
mod exit;
mod inode;
mod invocation_log;
mod json;
mod manual;
mod nbd;
mod nfs;
mod node;
mod numbers;
mod objects;
mod placement;
mod session;
mod start;
mod survey;
mod sys;
mod terminal;
mod top;
mod upgrade;
mod vdi;
mod vm;
mod walk;

fn main() {
    let status = start::run(std::env::args_os().map(args::to_text).collect());
    out::flush();
    std::process::exit(status);
}
