//! The manual page that is shipped is the one of the option table; `SHEEPDOG_WRITE_MAN=1` writes it (scripts/man).

use std::path::Path;

#[test]
fn the_shipped_page_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/man/sheep.8");
    let page = sheep::shell::manual::page();
    if std::env::var_os("SHEEPDOG_WRITE_MAN").is_some() {
        std::fs::write(&path, &page).expect("docs/man/sheep.8 is writable");
    }
    let shipped = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(shipped == page, "docs/man/sheep.8 is out of date: run scripts/man");
}
