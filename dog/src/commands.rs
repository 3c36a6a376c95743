//! The command table: names, operands, options, help texts and handlers, one row per command (spec 07, 1.2).
//!
//! Usage texts are printed from it; the completion script and the manual page are generated from those. The shapes
//! that look odd (no blank between a long option and its help) are load-bearing.

mod table;

use sheepdog_getopt::Opt;

use crate::args::{Apply, JSON};
use crate::context::Handler;
use crate::out;

pub use table::COMMANDS;

/// Column where descriptions begin.
const COLUMN: usize = 24;

/// What every command accepts and no usage text shows, since those are the original's.
pub const JSON_OPTION: Opt = Opt {
    short: JSON,
    long: "json",
    takes_value: false,
    help: "print one JSON document instead of the listing",
};

/// A command group: `dog vdi`, `dog node`, ... One whose only row has no name is a command without second word.
pub struct Command {
    /// First word.
    pub name: &'static str,
    /// Not in the overview: our additions, which the original's overview does not have.
    pub hidden: bool,
    /// Known by its second words alone, so that the rest gets the original's complaint: it was dropped there.
    pub historic: bool,
    /// Options of the group; rows pick from them by letter.
    pub options: &'static [Opt],
    /// Takes the group's own options into account.
    pub apply: Apply,
    /// The second words.
    pub subcommands: &'static [Subcommand],
}

/// A command, or a nested one inside a command.
pub struct Subcommand {
    /// The word.
    pub name: &'static str,
    /// Not in the overview and the list of available commands, as [`Command::hidden`].
    pub hidden: bool,
    /// `--json` is understood.
    pub json: bool,
    /// Description in the overview or in the parent's usage.
    pub help: &'static str,
    /// Operands as the usage shows them.
    pub operands: &'static str,
    /// Letters of the options, in the order of the usage. Nested rows use their top row's.
    pub letters: &'static str,
    /// Letters of further options: our additions, which the original's usage does not have.
    pub unlisted: &'static str,
    /// The node list is fetched first.
    pub needs_nodes: bool,
    /// An operand is required.
    pub needs_operand: bool,
    /// Nested words.
    pub nested: &'static [Subcommand],
    /// What to run; absent where only nested words can run.
    pub run: Option<Handler>,
}

impl Command {
    /// The row of a second word.
    pub fn find(&self, name: &str) -> Option<&'static Subcommand> {
        self.subcommands.iter().find(|s| s.name == name)
    }

    /// The row of a command without second word.
    pub fn alone(&self) -> Option<&'static Subcommand> {
        self.subcommands.first().filter(|row| row.name.is_empty())
    }

    /// The options that a row accepts, in its order.
    pub fn options_of(&self, row: &Subcommand) -> Vec<Opt> {
        row.letters.chars().filter_map(|c| self.options.iter().find(|o| o.short == c)).copied().collect()
    }

    /// The options that a row accepts without showing them in its usage.
    pub fn unlisted_of(&self, row: &Subcommand) -> Vec<Opt> {
        row.unlisted.chars().filter_map(|c| self.options.iter().find(|o| o.short == c)).copied().collect()
    }

    /// Prints the names of the second words on stderr.
    pub fn log_available(&self) {
        out::log(format_args!("Available {} commands:", self.name));
        for row in self.subcommands.iter().filter(|row| !row.hidden) {
            out::log(format_args!("  {} {}", self.name, row.name));
        }
    }

    /// Prints the usage of a row; `path` are the dispatched nested rows.
    pub fn print_usage(&self, top: &Subcommand, path: &[&'static Subcommand]) {
        let mut line = format!("Usage: dog {} {}", self.name, top.name).trim_end().to_owned();
        for row in path {
            line.push_str(&format!(" {}", row.name));
        }
        let nested = path.last().map_or(top.nested, |row| row.nested);
        let names: Vec<&str> = nested.iter().map(|n| n.name).collect();
        match names.as_slice() {
            [] => {}
            [only] => line.push_str(&format!(" {only}")),
            many => line.push_str(&format!(" {{{}}}", many.join("|"))),
        }
        let options = self.options_of(top);
        for opt in &options {
            let value = if opt.takes_value { format!(" {}", opt.long) } else { String::new() };
            line.push_str(&format!(" [-{}{value}]", opt.short));
        }
        if !top.operands.is_empty() {
            line.push_str(&format!(" {}", top.operands));
        }
        line.push('\n');
        if !nested.is_empty() {
            line.push_str("Available subcommands:\n");
            for row in nested {
                line.push_str(&format!("  {:<COLUMN$}{}\n", row.name, row.help));
            }
        }
        line.push_str("Options:\n");
        for opt in &options {
            line.push_str(&format!("  {:<COLUMN$}{}\n", format!("-{}, --{}", opt.short, opt.long), opt.help));
        }
        out::write(line.as_bytes());
    }
}

/// The group of a first word.
pub fn find(name: &str) -> Option<&'static Command> {
    COMMANDS.iter().find(|c| c.name == name)
}

/// Prints the overview.
pub fn print_overview() {
    let mut text = format!(
        "Sheepdog administrator utility (version {})\nUsage: dog <command> <subcommand> [options]\n\nAvailable \
         commands:\n",
        env!("CARGO_PKG_VERSION")
    );
    for command in COMMANDS.iter().filter(|c| !c.hidden) {
        for row in command.subcommands.iter().filter(|row| !row.hidden) {
            text.push_str(&format!("  {:<COLUMN$}{}\n", format!("{} {}", command.name, row.name), row.help));
        }
    }
    text.push_str("\nFor more information, run 'dog <command> <subcommand> --help'.\n");
    out::write(text.as_bytes());
}
