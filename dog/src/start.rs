//! From the command line to an exit status (spec 07, section 1).
//!
//! The order of the steps is observable, because it decides which error wins.

use std::os::unix::ffi::OsStringExt;
use std::time::Instant;

use sheepdog_getopt::{Item, Parser};

use crate::args::{Options, apply_common, parse_port, resolve, to_bytes};
use crate::commands::{self, Command, Subcommand};
use crate::context::Context;
use crate::exit::{BAD_ARGUMENT, Outcome, Stop, fail};
use crate::out::{self, text};
use crate::session::{ClusterView, Session};

const TRY_HELP: &str = "Try 'dog --help' for more information.";

/// Runs the command line (with the program's name) and gives the exit status.
pub fn run(words: Vec<String>) -> i32 {
    let begin = Instant::now();
    crate::invocation_log::record(&words);
    crate::crash::tell();
    let mut words = words.into_iter();
    let program = words.next().unwrap_or_else(|| "dog".into());
    let mut words = json_after_command(words.collect()).into_iter();
    let (command, top) = match find_command(&mut words) {
        Ok(found) => found,
        Err(status) => return status,
    };
    let (options, args) = match parse_options(&program, command, top, words.collect()) {
        Ok(parsed) => parsed,
        Err(Stop::Code(status) | Stop::Now(status)) => return status,
        Err(Stop::Usage) => return usage(command, top, &[]),
    };
    let show_time = options.time;
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            out::log(format_args!("failed to start: {e}"));
            return 2;
        }
    };
    let mut path = Vec::new();
    let status = match runtime.block_on(dispatch(command, top, options, args, &mut path)) {
        Err(Stop::Usage) => return usage(command, top, &path),
        Err(Stop::Now(status)) => return status,
        Err(Stop::Code(status)) => status,
        Ok(()) => 0,
    };
    if show_time {
        out!("\nElapsed time: {:.3} seconds\n", begin.elapsed().as_secs_f64());
    }
    status
}

fn usage(command: &Command, top: &Subcommand, path: &[&'static Subcommand]) -> i32 {
    command.print_usage(top, path);
    64
}

/// `--json` before a word that names the command moves behind that word. Command lines that end there, or go on with
/// an option, stay as they are and get the original's complaint.
fn json_after_command(mut words: Vec<String>) -> Vec<String> {
    for at in 0..2.min(words.len()) {
        let flags = words[at..].iter().take_while(|word| *word == "--json").count();
        if words.get(at + flags).is_some_and(|word| !word.starts_with('-')) {
            words[at..=at + flags].rotate_right(1);
        }
    }
    words
}

fn is_help(word: &str) -> bool {
    matches!(word, "help" | "--help" | "-h")
}

/// Takes the words that name a command and finds its table row, or the status to exit with.
fn find_command(
    words: &mut std::vec::IntoIter<String>,
) -> Result<(&'static Command, &'static Subcommand), i32> {
    let Some(name) = words.next().filter(|word| !is_help(word)) else {
        commands::print_overview();
        return Err(0);
    };
    let next = words.as_slice().first();
    let known = |command: &&Command| !command.historic || next.is_some_and(|w| command.find(w).is_some());
    let Some(command) = commands::find(&name).filter(known) else {
        out::log(format_args!("Invalid command '{}'", text(&to_bytes(&name))));
        out::log(TRY_HELP);
        return Err(64);
    };
    if let Some(row) = command.alone() {
        return Ok((command, row));
    }
    let second = words.next();
    if let Some(row) = second.as_deref().and_then(|word| command.find(word)) {
        return Ok((command, row));
    }
    if let Some(word) = second.filter(|word| !is_help(word)) {
        out::log(format_args!("Invalid command '{} {}'", command.name, text(&to_bytes(&word))));
    }
    command.log_available();
    Err(64)
}

/// Environment, then options in order; `-h` ends with status 0 at once.
fn parse_options(
    program: &str,
    command: &'static Command,
    top: &'static Subcommand,
    words: Vec<String>,
) -> Result<(Options, Vec<Vec<u8>>), Stop> {
    let mut options = Options::default();
    if let Some(host) = std::env::var_os("SHEEPDOG_DOG_ADDR") {
        options.address = resolve(&host.into_vec())?;
    }
    if let Some(port) = std::env::var_os("SHEEPDOG_DOG_PORT") {
        options.port = parse_port(&port.into_vec())?;
    }
    let mut accepted = command.options_of(top);
    accepted.extend(command.unlisted_of(top));
    accepted.push(commands::JSON_OPTION);
    let stop_at_word = std::env::var_os("POSIXLY_CORRECT").is_some();
    let mut parser = Parser::new(&accepted, words);
    let mut args = Vec::new();
    while let Some(item) = parser.next() {
        match item {
            Ok(Item::Word(word)) => {
                args.push(to_bytes(&word));
                if stop_at_word {
                    args.extend(parser.rest().iter().map(|w| to_bytes(w)));
                    break;
                }
            }
            Ok(Item::Option('h', _)) => {
                command.print_usage(top, &[]);
                return Err(Stop::Now(0));
            }
            Ok(Item::Option(letter, value)) => {
                let value = to_bytes(&value.unwrap_or_default());
                apply_common(&mut options, letter, &value)?;
                (command.apply)(&mut options, letter, &value)?;
            }
            Err(e) => {
                out::log(text(&to_bytes(&format!("{program}: {e}"))));
                return Err(fail(BAD_ARGUMENT, TRY_HELP));
            }
        }
    }
    Ok((options, args))
}

/// Fetches the node list where a row asks for it, follows nested words, runs the handler. `path` receives the nested
/// rows, for the usage.
async fn dispatch(
    command: &'static Command,
    top: &'static Subcommand,
    options: Options,
    args: Vec<Vec<u8>>,
    path: &mut Vec<&'static Subcommand>,
) -> Outcome {
    let session = Session::new(options.address, options.port);
    let mut context = Context { options, args, session, cluster: ClusterView::default() };
    let mut row = top;
    loop {
        if row.needs_nodes && context.cluster.nodes.is_empty() {
            context.cluster = ClusterView::fetch(&context.session).await?;
        }
        let missing = match context.arg(0) {
            None => true,
            Some(word) => word.is_empty() && !path.is_empty(),
        };
        if row.needs_operand && missing {
            return Err(Stop::Usage);
        }
        let Some(default) = row.nested.first() else { break };
        if missing {
            row = default;
            continue;
        }
        let word = context.args.remove(0);
        match row.nested.iter().find(|n| n.name.as_bytes() == word) {
            Some(nested) => row = nested,
            None => {
                command.print_usage(top, path);
                return Err(Stop::Code(1));
            }
        }
        path.push(row);
    }
    if context.options.json && !row.json {
        let words = [command.name, top.name].into_iter().chain(path.iter().map(|row| row.name));
        let words: Vec<&str> = words.collect();
        return Err(fail(
            BAD_ARGUMENT,
            format_args!("'dog {}' has no JSON output", words.join(" ").trim_end()),
        ));
    }
    match row.run {
        Some(run) => run(&context).await,
        None => Err(Stop::Usage),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_may_stand_before_the_words_of_a_command() {
        let moved = |line: &str| json_after_command(line.split(' ').map(String::from).collect()).join(" ");
        assert_eq!(moved("--json node list"), "node list --json");
        assert_eq!(moved("node --json list -r"), "node list --json -r");
        assert_eq!(moved("--json node --json md info"), "node md --json --json info");
        assert_eq!(moved("node list --json"), "node list --json");
        assert_eq!(moved("--json top"), "top --json");
        for as_it_was in
            ["--json", "node --json", "top --json -i 5", "--json -p 7000 node", "--jso node list", ""]
        {
            assert_eq!(moved(as_it_was), as_it_was);
        }
    }
}
