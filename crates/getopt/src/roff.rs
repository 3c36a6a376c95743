//! Manual pages from option tables: the few man(7) macros that both programs need.

use crate::Opt;

/// Text as roff prints it unchanged; line breaks and runs of blanks become one blank.
pub fn text(text: &str) -> String {
    protect(&text.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn protect(line: &str) -> String {
    let line = line.replace('\\', "\\e").replace('-', "\\-").replace('~', "\\(ti").replace('^', "\\(ha");
    // A dot or quote at the start of a line is a request.
    if line.starts_with(['.', '\'']) { format!("\\&{line}") } else { line }
}

/// The lines before the first section.
pub fn title(name: &str, section: u8, summary: &str) -> String {
    let version = env!("CARGO_PKG_VERSION");
    format!(
        ".\\\" Generated from the command tables; do not edit.\n.TH {} {section} \"\" \"Sheepdog {version}\" \
         \"Sheepdog\"\n.SH NAME\n{name} \\- {}\n",
        name.to_uppercase(),
        text(summary)
    )
}

/// A section heading.
pub fn section(name: &str) -> String {
    format!(".SH {}\n", text(name))
}

/// A paragraph.
pub fn paragraph(body: &str) -> String {
    format!(".PP\n{}\n", text(body))
}

/// A term in bold with its explanation.
pub fn item(term: &str, body: &str) -> String {
    format!(".TP\n.B {}\n{}\n", text(term), text(body))
}

/// Lines that keep their breaks and blanks.
pub fn verbatim(body: &str) -> String {
    let lines: String =
        body.trim_end().lines().map(|line| format!("{}\n", protect(&line.replace('\t', "    ")))).collect();
    format!(".PP\n.nf\n{lines}.fi\n")
}

/// An option: its letter, name, and value if it takes one.
pub fn option(opt: &Opt) -> String {
    let letter = if opt.has_short() { format!("\\-{}, ", opt.short) } else { String::new() };
    let value = if opt.takes_value { " \\fIVALUE\\fR" } else { "" };
    format!(".TP\n\\fB{letter}\\-\\-{}\\fR{value}\n{}\n", protect(opt.long), text(opt.help))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_taken_for_a_request() {
        assert_eq!(text(".x  a\n  b-c \\n"), "\\&.x a b\\-c \\en");
        assert_eq!(verbatim("a\n.b\n\n"), ".PP\n.nf\na\n\\&.b\n.fi\n");
        let opt = Opt { short: 'P', long: "max-reclaim", takes_value: true, help: "x" };
        assert_eq!(option(&opt), ".TP\n\\fB\\-P, \\-\\-max\\-reclaim\\fR \\fIVALUE\\fR\nx\n");
    }
}
