//! `dog completions bash|zsh|fish` (our addition), generated from the command table.
//!
//! All three scripts complete command words, long options, and names of VDIs where a command takes one; the names come
//! from the cluster that the command line so far names by `-a` and `-p`.

use std::fmt::Write;

use crate::commands::{COMMANDS, Command, JSON_OPTION, Subcommand};
use crate::context::Context;
use crate::exit::Outcome;
use crate::out;

/// A place on the command line behind the words of `path`.
struct Place {
    /// The words, with a blank between them.
    path: String,
    /// What may follow, with its description.
    words: Vec<(&'static str, &'static str)>,
    /// Long options with their descriptions, without the dashes.
    options: Vec<(&'static str, &'static str)>,
    /// The first operand is the name of a VDI.
    takes_vdi: bool,
}

fn places() -> Vec<Place> {
    let root = COMMANDS.iter().map(|command| (command.name, command_help(command))).collect();
    let mut all = vec![Place { path: String::new(), words: root, options: Vec::new(), takes_vdi: false }];
    for command in COMMANDS {
        if let Some(row) = command.alone() {
            all.push(place(command, command.name.to_owned(), row, row));
            continue;
        }
        let words = command.subcommands.iter().map(|row| (row.name, row.help)).collect();
        all.push(Place { path: command.name.into(), words, options: Vec::new(), takes_vdi: false });
        for row in command.subcommands {
            add_row(&mut all, command, command.name, row, row);
        }
    }
    all
}

/// The row and those nested in it, which have the options and operands of the topmost.
fn add_row(
    all: &mut Vec<Place>,
    command: &Command,
    before: &str,
    top: &'static Subcommand,
    row: &'static Subcommand,
) {
    let path = format!("{before} {}", row.name);
    all.push(place(command, path.clone(), top, row));
    for nested in row.nested {
        add_row(all, command, &path, top, nested);
    }
}

fn place(command: &Command, path: String, top: &Subcommand, row: &'static Subcommand) -> Place {
    let mut options: Vec<_> = command
        .options_of(top)
        .iter()
        .chain(&command.unlisted_of(top))
        .map(|opt| (opt.long, opt.help))
        .collect();
    if row.json {
        options.push((JSON_OPTION.long, JSON_OPTION.help));
    }
    let operand = top.operands.trim_start_matches(['<', '[']);
    let names_new = matches!(row.name, "create" | "import" | "restore");
    let takes_vdi = row.nested.is_empty()
        && (operand.starts_with("vdiname") || operand.starts_with("src vdi"))
        && !names_new;
    Place { path, words: row.nested.iter().map(|n| (n.name, n.help)).collect(), options, takes_vdi }
}

fn command_help(command: &'static Command) -> &'static str {
    match (command.alone(), command.name) {
        (Some(row), _) => row.help,
        (None, "vdi") => "virtual disk images",
        (None, "node") => "single nodes",
        (None, "cluster") => "the cluster as a whole",
        (None, "completions") => "completion scripts for shells",
        (None, "vm") => "images and where they are in use",
        (None, "nbd") => "images as network block devices",
        (None, _) => "other commands",
    }
}

/// A help text on one line; those of usage texts are broken and indented for a terminal.
fn one_line(help: &str) -> String {
    help.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Between single quotes, as POSIX shells and zsh want it.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Between single quotes, as fish wants it.
fn fish_quoted(text: &str) -> String {
    format!("'{}'", text.replace('\\', r"\\").replace('\'', r"\'"))
}

fn print(text: &str) -> Outcome {
    out::write(text.as_bytes());
    Ok(())
}

/// Runs `completions bash`.
pub async fn bash(_context: &Context) -> Outcome {
    print(&bash_script(&places()))
}

/// Runs `completions zsh`.
pub async fn zsh(_context: &Context) -> Outcome {
    print(&zsh_script(&places()))
}

/// Runs `completions fish`.
pub async fn fish(_context: &Context) -> Outcome {
    print(&fish_script(&places()))
}

/// POSIX shell: `_dog_lookup PATH` sets `offers`, `options` and `vdi`; it fails for what is no
/// path. No variable is called `words` or `path`: in zsh these are the command line and the search path.
fn lookup(places: &[Place]) -> String {
    let mut text = String::from("_dog_lookup() {\n    offers='' options='' vdi=''\n    case $1 in\n");
    for place in places {
        let words: Vec<&str> = place.words.iter().map(|(word, _)| *word).collect();
        let options: Vec<String> = place.options.iter().map(|(long, _)| format!("--{long}")).collect();
        let vdi = if place.takes_vdi { " vdi=1" } else { "" };
        let _ = writeln!(
            text,
            "    '{}') offers='{}' options='{}'{vdi} ;;",
            place.path,
            words.join(" "),
            options.join(" ")
        );
    }
    text + "    *) return 1 ;;\n    esac\n}\n"
}

/// Common to bash and zsh: walks the words before the cursor. Sets `place`, and `address`, the options for `dog`.
const WALK: &str = "\
_dog_walk() {
    local word next before='' offers options vdi
    place='' address=() operands=0
    for word in \"$@\"; do
        case $before in
            -a | --address | -p | --port) address+=(\"$before\" \"$word\"); before=''; continue ;;
        esac
        before=$word
        case $word in -*) continue ;; esac
        next=\"${place:+$place }$word\"
        if [ $operands = 0 ] && _dog_lookup \"$next\"; then place=$next; else operands=$((operands + 1)); fi
    done
}
_dog_vdis() {
    command dog vdi list -r \"$@\" 2>/dev/null </dev/null | while read -r _ name _; do printf '%s\\n' \"$name\"; done
}
";

fn bash_script(places: &[Place]) -> String {
    let head =
        "# bash completion for dog; source it, or put it into /usr/share/bash-completion/completions/dog\n";
    let tail = "\
_dog() {
    local offers options vdi place operands address candidates cur=${COMP_WORDS[COMP_CWORD]}
    _dog_walk \"${COMP_WORDS[@]:1:COMP_CWORD-1}\"
    _dog_lookup \"$place\"
    candidates=$offers
    case $cur in -*) candidates=$options ;; esac
    if [ -n \"$vdi\" ] && [ $operands = 0 ] && [ \"${cur#-}\" = \"$cur\" ]; then
        candidates=$(_dog_vdis \"${address[@]}\")
    fi
    mapfile -t COMPREPLY < <(compgen -W \"$candidates\" -- \"$cur\")
}
complete -o default -F _dog dog
";
    [head, &lookup(places), WALK, tail].concat()
}

fn zsh_script(places: &[Place]) -> String {
    let mut described = String::from("_dog_describe() {\n    rows=()\n    case $1 in\n");
    for place in places.iter().filter(|place| !place.words.is_empty()) {
        let rows: Vec<String> =
            place.words.iter().map(|(word, help)| quoted(&format!("{word}:{}", one_line(help)))).collect();
        let _ = writeln!(described, "    '{}') rows=({}) ;;", place.path, rows.join(" "));
    }
    described.push_str("    esac\n}\n");
    let head = "#compdef dog\n# zsh completion for dog; put it as _dog into a directory of $fpath\n";
    let tail = "\
_dog_main() {
    local -a line address rows
    local cur=$words[CURRENT] place operands vdi options offers
    line=(\"${(@)words[2,CURRENT-1]}\")
    _dog_walk \"${line[@]}\"
    _dog_lookup \"$place\"
    if [[ $cur == -* ]]; then
        compadd -- ${=options}
    elif [[ -n $vdi && $operands = 0 ]]; then
        compadd -- ${(f)\"$(_dog_vdis \"${address[@]}\")\"}
    elif [[ -n $offers ]]; then
        _dog_describe \"$place\"
        _describe 'command' rows
    else
        _files
    fi
}
compdef _dog_main dog
# Found in $fpath, this file runs as a function when dog is completed for the first time.
if [[ $funcstack[1] == _dog ]]; then _dog_main \"$@\"; fi
";
    [head, &lookup(places), &described, WALK, tail].concat()
}

fn fish_script(places: &[Place]) -> String {
    let mut text = String::from(
        "# fish completion for dog; put it into ~/.config/fish/completions/dog.fish\n\
         function __dog_path\n    \
             set -l path\n    \
             for word in (commandline -opc)[2..-1]\n        \
                 string match -q -- '-*' $word; or set -a path $word\n    \
             end\n    \
             string join ' ' -- $path\n\
         end\n\
         function __dog_at\n    set -l path (__dog_path)\n    test \"$path\" = \"$argv[1]\"\nend\n\
         function __dog_in\n    set -l path (__dog_path)\n    string match -q -- \"$argv[1]*\" \"$path\"\nend\n\
         function __dog_vdis\n    \
             command dog vdi list -r 2>/dev/null </dev/null | string split -f 2 ' '\n\
         end\n",
    );
    for place in places {
        let _ = if place.takes_vdi {
            writeln!(text, "complete -c dog -f -n \"__dog_at '{}'\" -a '(__dog_vdis)'", place.path)
        } else {
            Ok(())
        };
        for (word, help) in &place.words {
            let _ = writeln!(
                text,
                "complete -c dog -f -n \"__dog_at '{}'\" -a {word} -d {}",
                place.path,
                fish_quoted(&one_line(help))
            );
        }
        for (long, help) in &place.options {
            let _ = writeln!(
                text,
                "complete -c dog -n \"__dog_in '{}'\" -l {long} -d {}",
                place.path,
                fish_quoted(&one_line(help))
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_word_is_offered() {
        let places = places();
        let at = |path: &str| places.iter().find(|place| place.path == path).expect("a known path");
        let words = |path: &str| at(path).words.iter().map(|(word, _)| *word).collect::<Vec<_>>();
        assert!(words("").contains(&"vdi") && words("").contains(&"top"));
        assert!(words("vdi").contains(&"import"));
        assert_eq!(words("node log level"), ["set", "get", "list"]);
        assert!(at("vdi list").options.iter().any(|(long, _)| *long == "json"));
        assert!(at("vdi object map").takes_vdi && !at("vdi object").takes_vdi && !at("vdi create").takes_vdi);
        assert!(at("top").options.iter().any(|(long, _)| *long == "once"));
    }

    #[test]
    fn descriptions_are_whole() {
        let raw = "raw output mode: omit headers, separate fields with single spaces and print all sizes in decimal bytes";
        assert!(fish_script(&places()).contains(&format!("-l raw -d '{raw}'")));
        assert!(fish_script(&places()).contains(r"an inode object won\'t be reclaimed)'"));
        assert_eq!(quoted("don't"), r"'don'\''t'");
        assert_eq!(fish_quoted(r"a\b'c"), r"'a\\b\'c'");
    }

    #[test]
    fn scripts_name_every_path() {
        let places = places();
        for script in [bash_script(&places), zsh_script(&places), fish_script(&places)] {
            for place in &places {
                assert!(script.contains(&format!("'{}'", place.path)), "{}", place.path);
            }
        }
    }
}
