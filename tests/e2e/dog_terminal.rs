//! `dog` and the shells as a person uses them: `dog top` on a terminal, the completion scripts in their shells.

use std::fs;
use std::path::Path;
use std::process::Command;

use nix::sys::termios::{InputFlags, LocalFlags};
use sheepdog_testkit::binaries::{dog, system};
use sheepdog_testkit::{Builder, Cluster};

use crate::pty::Terminal;

/// The lines of the last complete frame.
fn last_frame(shown: &str) -> Option<Vec<String>> {
    let frame = shown.split("\x1b[H").skip(1).filter_map(|frame| frame.split_once("\x1b[K\x1b[J")).last();
    frame.map(|(text, _)| text.replace('\r', "").split("\x1b[K\n").map(String::from).collect())
}

#[test]
fn top_shows_every_node_follows_the_size_and_leaves_the_terminal_as_it_was() {
    let cluster = Builder::new(3).copies(2).start();
    let addresses: Vec<String> = cluster.nodes.iter().map(|n| format!("127.0.0.1:{}", n.port)).collect();
    let port = cluster.nodes[0].port.to_string();
    let dog = dog().display().to_string();
    for key in ["q", "\x03"] {
        let mut terminal = Terminal::open(24, 120);
        let before = terminal.settings();
        terminal.run(&[&dog, "top", "-p", &port], &[]);
        let all_nodes = |shown: &str| {
            last_frame(shown).is_some_and(|lines| {
                lines.len() == 9
                    && lines[0].ends_with("3 nodes")
                    && addresses.iter().zip(&lines[6..]).all(|(address, line)| line.contains(address))
            })
        };
        terminal.wait("all nodes", all_nodes);
        assert!(terminal.shown().starts_with("\x1b[?1049h\x1b[?25l"), "the other screen, without cursor");
        assert!(!terminal.settings().local_flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO));

        terminal.resize(5, 40);
        terminal.wait("a frame of five lines and forty columns", |shown| {
            last_frame(shown).is_some_and(|lines| lines.len() == 5 && lines.iter().all(|l| l.len() <= 40))
        });
        terminal.resize(24, 120);
        terminal.wait("all nodes again", all_nodes);

        terminal.type_in("x");
        terminal.forget();
        terminal.wait("a further frame: other keys do nothing", all_nodes);
        terminal.type_in(key);
        assert_eq!(terminal.wait_exit().code(), Some(0), "{key:?}");
        terminal.wait("the first screen and the cursor", |shown| shown.ends_with("\x1b[?25h\x1b[?1049l"));
        let after = terminal.settings();
        assert_eq!((after.local_flags, after.input_flags), (before.local_flags, before.input_flags));
        assert!(
            after.input_flags.contains(InputFlags::ICRNL) && after.local_flags.contains(LocalFlags::ECHO)
        );
    }
}

/// Spec 07, 13.6: here, unlike without `-w`, writes stand under "Write"; the last columns are those of one second.
#[test]
fn watched_counters_show_what_happened_since_the_last_second() {
    let mut cluster = Cluster::new(1);
    cluster.dog(&["vdi", "create", "disk", "64M"]).ok();
    let port = cluster.nodes[0].port.to_string();
    let mut terminal = Terminal::open(24, 160);
    terminal.run(&[&dog().display().to_string(), "node", "stat", "-w", "-p", &port], &[]);
    let heading = "Request\tActive\tTotal\tWrite\tRead\tRemove\tFlush\tAll WR\tAll RD\tWRBW\tRDBW\tRPS\r\n";
    let rows = |shown: &str| -> Vec<Vec<String>> {
        let rows = shown.split("\r\n").filter_map(|line| line.strip_prefix("Client\t"));
        rows.map(|row| row.split('\t').map(String::from).collect()).collect()
    };
    terminal.wait("the first second", |shown| shown.starts_with(heading) && rows(shown).len() == 1);
    assert_eq!(rows(&terminal.shown())[0][8..], ["0.0 MB", "0.0 MB", "0"], "nothing to compare with");
    cluster.dog_in(&["vdi", "write", "disk", "0", "48M"], &vec![7; 48 << 20]).ok();
    terminal.wait("the second in which 48 MiB came", |shown| {
        let rows = rows(shown).into_iter().filter(|row| row.len() == 11);
        // Perhaps in two seconds.
        let came: f64 = rows.filter_map(|row| row[8].strip_suffix(" MB")?.parse::<f64>().ok()).sum();
        (47.0..50.0).contains(&came)
    });
    let number = |row: &[String], at: usize| row[at].parse::<u64>().expect("a number");
    let all = rows(&terminal.shown());
    let (first, last) = (&all[0], all.iter().rev().find(|row| row.len() == 11).expect("a whole row"));
    let (writes, reads) = (number(last, 2) - number(first, 2), number(last, 3) - number(first, 3));
    assert!(writes >= 12 && reads < writes, "{all:?}");
}

#[test]
fn images_go_in_and_out_with_a_bar() {
    let cluster = Cluster::new(1);
    let file = |name: &str| cluster.dir().join(name).display().to_string();
    let (image, copy) = (file("image"), file("copy"));
    fs::write(&image, vec![7; 12 << 20]).expect("an image");
    let port = cluster.nodes[0].port.to_string();
    let dog = dog().display().to_string();
    for words in [["import", "disk", &image], ["export", "disk", &copy]] {
        let mut terminal = Terminal::open(24, 80);
        terminal.run(&[&[&*dog, "vdi"], &words[..], &["-p", &port]].concat(), &[]);
        assert_eq!(terminal.wait_exit().code(), Some(0), "{}", terminal.shown());
        let full = format!("\r100.0 % [{}] 12 MB / 12 MB", "=".repeat(50));
        terminal.wait("a full bar", |shown| shown.contains(&full));
    }
    assert_eq!(fs::read(&copy).expect("a copy"), fs::read(&image).expect("the image"));
}

/// A cluster with the VDIs `alpha` and `beta`, and the completion script for a shell, as a file of that name.
struct Completions {
    cluster: Cluster,
    script: String,
    path: String,
}

impl Completions {
    fn of(shell: &str, file: &str) -> Completions {
        let mut cluster = Cluster::new(1);
        for name in ["alpha", "beta"] {
            cluster.dog(&["vdi", "create", name, "4M"]).ok();
        }
        let script = cluster.dir().join(file).display().to_string();
        fs::write(&script, completions(shell)).expect("the script");
        let dog = dog();
        let programs = dog.parent().and_then(Path::to_str).expect("a directory");
        let path = format!("{programs}:{}", std::env::var("PATH").unwrap_or_default());
        Completions { cluster, script, path }
    }

    fn port(&self) -> String {
        self.cluster.nodes[0].port.to_string()
    }

    /// First words of the lines that a command prints, in order.
    fn offers(&self, command: &mut Command) -> Vec<String> {
        let output = command.env("PATH", &self.path).output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && stderr.is_empty(), "{command:?}: {output:?}");
        let lines = String::from_utf8(output.stdout).expect("text");
        let words = lines.lines().filter_map(|line| line.split_whitespace().next());
        let mut words: Vec<String> = words.map(String::from).collect();
        words.sort();
        words
    }
}

fn completions(shell: &str) -> Vec<u8> {
    let output = Command::new(dog()).args(["completions", shell]).output().expect("dog");
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

#[test]
fn bash_completes_words_options_and_vdis() {
    let shell = Completions::of("bash", "dog.bash");
    let port = shell.port();
    let complete = |words: &[&str]| {
        let run = "source \"$1\"; shift; complete -p dog >/dev/null || exit 1; COMP_WORDS=(\"$@\"); \
                   COMP_CWORD=$(($# - 1)); _dog; printf '%s\\n' \"${COMPREPLY[@]}\"";
        let mut bash = Command::new(system("bash", "bash"));
        bash.args(["--norc", "--noprofile", "-c", run, "bash", &shell.script, "dog"]).args(words);
        shell.offers(&mut bash)
    };
    let groups = complete(&[""]);
    assert!(
        ["vdi", "node", "cluster", "top"].iter().all(|word| groups.iter().any(|g| g == word)),
        "{groups:?}"
    );
    assert_eq!(complete(&["vdi", "cr"]), ["create"]);
    assert_eq!(complete(&["node", "log", "level", ""]), ["get", "list", "set"]);
    assert_eq!(complete(&["vdi", "list", "--js"]), ["--json"]);
    assert_eq!(complete(&["vdi", "read", "-p", &port, ""]), ["alpha", "beta"]);
    assert_eq!(complete(&["vdi", "read", "-p", &port, "al"]), ["alpha"]);
    assert!(complete(&["vdi", "read", "-p", &port, "alpha", "al"]).is_empty(), "offsets are not VDIs");
}

#[test]
fn fish_completes_words_options_and_vdis() {
    let shell = Completions::of("fish", "dog.fish");
    let complete = |line: &str| {
        let run = format!("source {}; complete -C '{line}'", shell.script);
        let mut fish = Command::new(system("fish", "fish"));
        let home = shell.cluster.dir();
        fish.args(["--no-config", "-c", &run]).env("HOME", home).env("SHEEPDOG_DOG_PORT", shell.port());
        shell.offers(&mut fish)
    };
    let groups = complete("dog ");
    assert!(
        ["vdi", "node", "cluster", "top"].iter().all(|word| groups.iter().any(|g| g == word)),
        "{groups:?}"
    );
    assert_eq!(complete("dog vdi cr"), ["create"]);
    assert_eq!(complete("dog vdi list --js"), ["--json"]);
    assert_eq!(complete("dog vdi read "), ["alpha", "beta"]);
    assert_eq!(complete("dog vdi read al"), ["alpha"]);
}

#[test]
fn zsh_completes_words_options_and_vdis() {
    let shell = Completions::of("zsh", "_dog");
    let (port, home) = (shell.port(), shell.cluster.dir().display().to_string());
    let rc = "PROMPT='ready> '\nLISTMAX=0\nbindkey -e\nunset zle_bracketed_paste\nfpath=($HOME $fpath)\n\
              autoload -Uz compinit\ncompinit -u -D\n";
    fs::write(shell.cluster.dir().join(".zshrc"), rc).expect("the start-up file");
    let zsh = system("zsh", "zsh").display().to_string();
    let start = || {
        let mut terminal = Terminal::open(60, 120);
        let environment = [("ZDOTDIR", &*home), ("HOME", &home), ("TERM", "dumb"), ("PATH", &shell.path)];
        terminal.run(&[&zsh, "-d", "-i"], &environment);
        terminal.wait("the prompt", |shown| shown.ends_with("ready> "));
        terminal
    };
    // Completes, then turns the line into a command that prints it; the blank after the word goes with the quote.
    let complete = |terminal: &mut Terminal, line: &str, expected: &str| {
        terminal.forget();
        terminal.type_in(&format!("{line}\t\x01print -r -- 'line: \x05'\r"));
        terminal.wait(expected, |shown| {
            shown.replace('\r', "").contains(&format!("\nline: {expected}\n")) && shown.ends_with("ready> ")
        });
    };
    let mut terminal = start();
    complete(&mut terminal, "dog vdi cr", "dog vdi create");
    complete(&mut terminal, "dog node log lev", "dog node log level");
    complete(&mut terminal, "dog vdi list --js", "dog vdi list --json");
    complete(&mut terminal, &format!("dog vdi read -p {port} al"), &format!("dog vdi read -p {port} alpha"));
    // In a new shell: the file that was found in $fpath completes already when it is loaded.
    let mut terminal = start();
    terminal.forget();
    terminal.type_in("dog vdi \t");
    terminal.wait("words with descriptions", |shown| {
        ["create", "backup", "create an image"].iter().all(|text| shown.contains(text))
    });
}
