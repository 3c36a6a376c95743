//! Prompts and progress bars (spec 07, section 6).

use std::io::{self, BufRead};

use crate::exit::{Outcome, Stop};
use crate::numbers::human_size;
use crate::{out, sys};

/// Most characters that a prompt takes from its line.
const MAX_ANSWER: usize = 7;
/// Columns that a progress bar leaves to its numbers.
const BAR_MARGIN: usize = 30;
/// Width assumed where the terminal does not tell.
const DEFAULT_WIDTH: usize = 80;

/// Asks; anything but `yes` (ignoring case, what follows does not matter) ends the process with status 0.
pub fn confirm(question: &str) -> Outcome {
    out::write(question.as_bytes());
    let answer = read_answer();
    if answer.len() >= 3 && answer[..3].eq_ignore_ascii_case(b"yes") { Ok(()) } else { Err(Stop::Now(0)) }
}

/// Reads as `fgets` with a buffer of 8 does: to the end of the line, at most 7 characters.
fn read_answer() -> Vec<u8> {
    let mut stdin = io::stdin().lock();
    let mut answer = Vec::new();
    while answer.len() < MAX_ANSWER {
        let Some(byte) = stdin.fill_buf().ok().and_then(|b| b.first().copied()) else { break };
        stdin.consume(1);
        answer.push(byte);
        if byte == b'\n' {
            break;
        }
    }
    answer
}

/// What a progress bar counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Bytes, printed as sizes.
    Bytes,
    /// Plain numbers.
    Count,
}

/// A progress bar; nothing is drawn unless stdout is a terminal.
pub struct Progress {
    total: u64,
    unit: Unit,
    width: usize,
}

impl Progress {
    /// A bar up to `total`.
    pub fn new(total: u64, unit: Unit) -> Progress {
        let width = if out::is_terminal() { sys::terminal_width().unwrap_or(DEFAULT_WIDTH) } else { 0 };
        Progress { total, unit, width }
    }

    /// Draws the state `done`.
    pub fn show(&self, done: u64) {
        if self.width > 0 {
            out::write(self.line(done).as_bytes());
        }
    }

    fn line(&self, done: u64) -> String {
        let cells = self.width.saturating_sub(BAR_MARGIN) as u64;
        let percent = if self.total == 0 { 100.0 } else { done as f64 / self.total as f64 * 100.0 };
        let mut line = format!("{percent:5.1} % [");
        for cell in 0..cells {
            let reached = |edge: u64| u128::from(self.total) * u128::from(edge) / u128::from(cells);
            line.push(match u128::from(done) {
                d if reached(cell + 1) <= d => '=',
                d if reached(cell) <= d => '>',
                _ => ' ',
            });
        }
        let amount = |n| if self.unit == Unit::Bytes { human_size(n) } else { n.to_string() };
        line.push_str(&format!("] {} / {}", amount(done), amount(self.total)));
        line.truncate(self.width - 1);
        let end = if done == self.total { "\n" } else { "" };
        format!("\r{line:<width$}{end}", width = self.width)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_drawn_as_captured() {
        let bar = |width, total| Progress { total, unit: Unit::Bytes, width };
        let third = "\r 33.3 % [================>                                 ] 4.0 MB / 12 MB     ";
        assert_eq!(bar(80, 12 << 20).line(4 << 20), third);
        assert_eq!(bar(40, 9 << 20).line(12 << 20), "\r133.3 % [==========] 12 MB / 9.0 MB     ");
        assert_eq!(bar(20, 8 << 20).line(8 << 20), "\r100.0 % [] 8.0 MB / \n");
        let count = Progress { total: 1, unit: Unit::Count, width: 80 };
        let full = format!("\r100.0 % [{}] 1 / 1              \n", "=".repeat(50));
        assert_eq!(count.line(1), full);
    }
}
