//! The manual page sheep(8), generated from the option table.

use sheepdog_getopt::roff;

use super::help::{OPTIONS, detail};

/// The page, in roff.
pub fn page() -> String {
    let mut page = roff::title("sheep", 8, "the Sheepdog storage daemon");
    page += &roff::section("SYNOPSIS");
    page += ".B sheep\n.RI [ options ]\n.IR PATH [,DISK...]\n";
    page += &roff::section("DESCRIPTION");
    page += &roff::paragraph(DESCRIPTION);
    page += &roff::section("OPTIONS");
    for opt in OPTIONS.iter().filter(|opt| !opt.help.is_empty()) {
        page += &roff::option(opt);
        if let Some(text) = detail(opt.short) {
            page += &format!(".RS\n{}.RE\n", roff::verbatim(&text));
        }
    }
    page += &roff::section("FILES");
    for (name, meaning) in FILES {
        page += &roff::item(name, meaning);
    }
    page += &roff::section("SIGNALS");
    page += &roff::item("SIGTERM, SIGINT", "end requests in progress, leave the cluster and stop");
    page + &roff::section("SEE ALSO") + ".BR dog (8)\n"
}

const DESCRIPTION: &str = "\
sheep stores objects of virtual disks under PATH, or on each DISK, and serves the cluster's disks to clients on this \
machine. It runs in the background once it serves. All daemons that name the same place by -c are one cluster, which \
dog cluster format makes ready for use.";

const FILES: &[(&str, &str)] = &[
    ("PATH/config", "what the cluster was formatted with"),
    ("PATH/epoch", "the members of every epoch"),
    ("PATH/obj", "objects, unless disks are given"),
    ("PATH/sheep.log", "the log"),
    ("PATH/sock", "the socket for clients on this machine"),
];
