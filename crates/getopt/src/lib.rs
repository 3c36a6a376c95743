//! Command-line parsing with the semantics and the messages of GNU `getopt_long`.
//!
//! Scripts that call `sheep` and `dog` rely on them: options and words in any order, `--name=value` or `--name value`,
//! unambiguous abbreviations of long names, `-xVALUE`, clustered short options, `--` ends the options (spec 04,
//! section 16; spec 07). Parsing is lazy: options met before an error are already acted upon.

pub mod roff;

use std::fmt;

/// One option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opt {
    /// Short letter; options without one use any unique character outside the printable letters.
    pub short: char,
    /// Long name.
    pub long: &'static str,
    /// Whether an argument follows.
    pub takes_value: bool,
    /// One line of help.
    pub help: &'static str,
}

impl Opt {
    /// Whether the letter can be typed (some options are long only).
    pub fn has_short(&self) -> bool {
        self.short.is_ascii_alphanumeric()
    }
}

/// What the command line holds next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// An option, by its short letter, with its argument if it takes one.
    Option(char, Option<String>),
    /// A word that is no option.
    Word(String),
}

/// What getopt complains about; displays as its line without the `argv0: ` before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// `-Q`, not known.
    UnknownShort(char),
    /// `--nosuch`, not known.
    UnknownLong(String),
    /// `--x` begins several names.
    Ambiguous(String, Vec<&'static str>),
    /// `-p` as the last word; carries the option's letter.
    MissingShort(char),
    /// `--port` as the last word; carries the full name and the option's letter.
    MissingLong(&'static str, char),
    /// `--help=x`.
    UnexpectedValue(&'static str),
}

impl Error {
    /// The option that lacks its argument, if that is the complaint.
    pub fn missing_argument_of(&self) -> Option<char> {
        match self {
            Error::MissingShort(short) | Error::MissingLong(_, short) => Some(*short),
            _ => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::UnknownShort(c) => write!(f, "invalid option -- '{c}'"),
            Error::UnknownLong(name) => write!(f, "unrecognized option '--{name}'"),
            Error::Ambiguous(name, candidates) => {
                write!(f, "option '--{name}' is ambiguous; possibilities:")?;
                candidates.iter().try_for_each(|c| write!(f, " '--{c}'"))
            }
            Error::MissingShort(c) => write!(f, "option requires an argument -- '{c}'"),
            Error::MissingLong(name, _) => write!(f, "option '--{name}' requires an argument"),
            Error::UnexpectedValue(name) => write!(f, "option '--{name}' doesn't allow an argument"),
        }
    }
}

impl std::error::Error for Error {}

/// Iterates over a command line (without the program's name).
pub struct Parser<'a> {
    options: &'a [Opt],
    words: std::vec::IntoIter<String>,
    cluster: Vec<char>,
    only_words: bool,
}

impl<'a> Parser<'a> {
    /// Parses `words` by `options`.
    pub fn new(options: &'a [Opt], words: impl IntoIterator<Item = String>) -> Parser<'a> {
        let words = words.into_iter().collect::<Vec<_>>().into_iter();
        Parser { options, words, cluster: Vec::new(), only_words: false }
    }

    /// The words not looked at yet, options or not.
    pub fn rest(self) -> Vec<String> {
        self.words.collect()
    }

    fn long(&mut self, text: &str) -> Result<Item, Error> {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value.to_string())),
            None => (text, None),
        };
        let opt = self.find_long(name)?;
        if !opt.takes_value {
            return match value {
                Some(_) => Err(Error::UnexpectedValue(opt.long)),
                None => Ok(Item::Option(opt.short, None)),
            };
        }
        match value.or_else(|| self.words.next()) {
            Some(value) => Ok(Item::Option(opt.short, Some(value))),
            None => Err(Error::MissingLong(opt.long, opt.short)),
        }
    }

    fn find_long(&self, name: &str) -> Result<Opt, Error> {
        if let Some(opt) = self.options.iter().find(|o| o.long == name) {
            return Ok(*opt);
        }
        let candidates: Vec<&Opt> = self.options.iter().filter(|o| o.long.starts_with(name)).collect();
        match candidates.as_slice() {
            [] => Err(Error::UnknownLong(name.to_string())),
            [one] => Ok(**one),
            many => Err(Error::Ambiguous(name.to_string(), many.iter().map(|o| o.long).collect())),
        }
    }

    fn short(&mut self) -> Result<Item, Error> {
        let letter = self.cluster.remove(0);
        let Some(opt) = self.options.iter().find(|o| o.short == letter && o.has_short()) else {
            return Err(Error::UnknownShort(letter));
        };
        if !opt.takes_value {
            return Ok(Item::Option(letter, None));
        }
        let attached: String = self.cluster.drain(..).collect();
        let value = if attached.is_empty() { self.words.next() } else { Some(attached) };
        value.map(|v| Item::Option(letter, Some(v))).ok_or(Error::MissingShort(letter))
    }
}

impl Iterator for Parser<'_> {
    type Item = Result<Item, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if !self.cluster.is_empty() {
            return Some(self.short());
        }
        let word = self.words.next()?;
        if self.only_words || word == "-" || !word.starts_with('-') {
            return Some(Ok(Item::Word(word)));
        }
        if word == "--" {
            self.only_words = true;
            return self.next();
        }
        if let Some(long) = word.strip_prefix("--") {
            return Some(self.long(long));
        }
        self.cluster = word.chars().skip(1).collect();
        Some(self.short())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTS: &[Opt] = &[
        Opt { short: 'p', long: "port", takes_value: true, help: "" },
        Opt { short: 'P', long: "pidfile", takes_value: true, help: "" },
        Opt { short: 'f', long: "foreground", takes_value: false, help: "" },
        Opt { short: '\u{1}', long: "nbd", takes_value: true, help: "" },
    ];

    fn parse(words: &[&str]) -> Vec<Result<Item, Error>> {
        Parser::new(OPTS, words.iter().map(|w| w.to_string())).collect()
    }

    fn opt(c: char, v: Option<&str>) -> Result<Item, Error> {
        Ok(Item::Option(c, v.map(str::to_string)))
    }

    fn word(w: &str) -> Result<Item, Error> {
        Ok(Item::Word(w.to_string()))
    }

    #[test]
    fn options_and_words_mix_in_any_order() {
        assert_eq!(
            parse(&["/store", "-fp", "7001", "--port=7002", "--fore", "--nbd", "x", "--", "-f", "-"]),
            vec![
                word("/store"),
                opt('f', None),
                opt('p', Some("7001")),
                opt('p', Some("7002")),
                opt('f', None),
                opt('\u{1}', Some("x")),
                word("-f"),
                word("-"),
            ]
        );
        assert_eq!(parse(&["-p7003"]), vec![opt('p', Some("7003"))]);
    }

    #[test]
    fn complaints_are_worded_as_getopt_words_them() {
        let text = |words: &[&str]| match parse(words).pop() {
            Some(Err(e)) => e.to_string(),
            other => panic!("{other:?}"),
        };
        assert_eq!(text(&["-Q"]), "invalid option -- 'Q'");
        assert_eq!(text(&["--nosuch"]), "unrecognized option '--nosuch'");
        assert_eq!(text(&["-p"]), "option requires an argument -- 'p'");
        assert_eq!(text(&["--po"]), "option '--port' requires an argument");
        assert_eq!(text(&["--foreground=1"]), "option '--foreground' doesn't allow an argument");
        assert_eq!(text(&["--p"]), "option '--p' is ambiguous; possibilities: '--port' '--pidfile'");
    }
}
