//! `dog man` (our addition): the manual page dog(8), generated from the command table.

use sheepdog_getopt::{Opt, roff};

use crate::commands::{COMMANDS, Command, JSON_OPTION, Subcommand};
use crate::context::Context;
use crate::exit::Outcome;
use crate::out;

/// Runs the command.
pub async fn run(_context: &Context) -> Outcome {
    out::write(page().as_bytes());
    Ok(())
}

fn page() -> String {
    let mut page = roff::title("dog", 8, "administer a Sheepdog cluster");
    page += &roff::section("SYNOPSIS");
    page += ".B dog\n.I command\n.RI [ subcommand ]\n.RI [ options ]\n";
    page += &roff::section("DESCRIPTION");
    page += &roff::paragraph(DESCRIPTION);
    for command in COMMANDS {
        page += &roff::section(&format!("dog {}", command.name));
        for row in command.subcommands {
            page += &row_text(command, row, row, command.name);
        }
        page += &options_text(command);
    }
    page += &roff::section("JSON");
    page += &roff::paragraph(&format!("--{}: {JSON}", JSON_OPTION.long));
    let with_json: Vec<String> = COMMANDS.iter().flat_map(json_rows).collect();
    page += &roff::paragraph(&format!("Commands that have it: {}.", with_json.join(", ")));
    page += &roff::section("EXIT STATUS");
    for (status, meaning) in STATUSES {
        page += &roff::item(status, meaning);
    }
    page += &roff::section("ENVIRONMENT");
    for (name, meaning) in ENVIRONMENT {
        page += &roff::item(name, meaning);
    }
    page += &roff::section("EXAMPLES");
    page += &roff::verbatim(EXAMPLES);
    page + &roff::section("SEE ALSO") + ".BR sheep (8)\n"
}

/// A row and those nested in it.
fn row_text(command: &Command, top: &Subcommand, row: &Subcommand, before: &str) -> String {
    let path = if row.name.is_empty() { before.to_owned() } else { format!("{before} {}", row.name) };
    if !row.nested.is_empty() {
        return row.nested.iter().map(|nested| row_text(command, top, nested, &path)).collect();
    }
    let mut term = format!("dog {path}");
    for opt in command.options_of(top).into_iter().chain(command.unlisted_of(top)) {
        term += &format!(" [-{}]", opt.short);
    }
    if !top.operands.is_empty() {
        term += &format!(" {}", top.operands);
    }
    roff::item(&term, row.help)
}

fn options_text(command: &Command) -> String {
    let used = |opt: &&Opt| command.subcommands.iter().any(|row| row.letters.contains(opt.short));
    let options: String = command.options.iter().filter(used).map(roff::option).collect();
    format!("{}{options}", roff::paragraph("Options:"))
}

fn json_rows(command: &Command) -> Vec<String> {
    fn add(row: &Subcommand, before: &str, all: &mut Vec<String>) {
        let path = format!("{before} {}", row.name).trim().to_owned();
        if row.json {
            all.push(path.clone());
        }
        row.nested.iter().for_each(|nested| add(nested, &path, all));
    }
    let mut all = Vec::new();
    command.subcommands.iter().for_each(|row| add(row, command.name, &mut all));
    all
}

const DESCRIPTION: &str = "\
dog talks to one sheep daemon, by default at localhost:7000, and through it to the cluster. Options may stand anywhere \
behind the command words; long names may be abbreviated. Sizes take the suffixes B, K, M, G, T and P, powers of 1024.";

const JSON: &str = "\
print one JSON document on standard output instead of the listing. Sizes are bytes, times seconds since 1970, VDI and \
object ids hexadecimal text. Field names do not change; new ones may be added. A command that fails prints no document.";

const STATUSES: &[(&str, &str)] = &[
    ("0", "success"),
    ("1", "the command failed; of dog cluster health: degraded, or recovery is at work"),
    (
        "2",
        "the cluster or this machine has a problem; of dog cluster health: the cluster does not serve or is about to stop",
    ),
    ("3", "the attribute exists already"),
    ("5", "the attribute or its VDI was not found"),
    ("64", "the command line is wrong"),
];

const ENVIRONMENT: &[(&str, &str)] = &[
    ("SHEEPDOG_DOG_ADDR", "address of the daemon, unless -a is given"),
    ("SHEEPDOG_DOG_PORT", "port of the daemon, unless -p is given"),
    ("SHEEPDOG_DOG_LOG", "log every invocation, to syslog or to the file that SHEEPDOG_DOG_LOG_PATH names"),
];

const EXAMPLES: &str = "\
dog cluster format --copies=3
dog vdi create disk 20G
dog vdi import debian https://example.org/debian.qcow2
dog vdi export -s before-upgrade disk disk.img
dog vdi list --json | jq -r '.vdis[] | select(.snapshot | not) | .name'
dog cluster health || mail -s 'sheepdog' operators
";
