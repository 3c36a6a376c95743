//! Many daemons on one machine; `scripts/scale` measures more of them.

use sheepdog_testkit::scale;

#[test]
fn thirty_two_nodes_form_serve_lose_and_regain_eight_at_once() {
    let figures = scale::run(32, 8);
    eprintln!("{figures:#?}");
    assert!(figures.threads < 40, "{figures:?}");
    assert!(figures.rss < 256 << 20, "{figures:?}");
}
