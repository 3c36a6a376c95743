//! Prints what clusters of these sizes cost on this machine; `scripts/scale` runs it.
//!
//! `scale [--lose N] [NODES...]`

use sheepdog_testkit::scale;

fn main() {
    let mut args = std::env::args().skip(1).peekable();
    let mut lose = 8;
    if args.peek().is_some_and(|a| a == "--lose") {
        args.next();
        lose = args.next().and_then(|n| n.parse().ok()).expect("a number of nodes");
    }
    let sizes: Vec<usize> = args.map(|a| a.parse().expect("a number of nodes")).collect();
    println!(
        "nodes  lost  form s  format s  lose s  regain s  recover s  RSS MiB mean/max  threads  idle cores (all)"
    );
    for nodes in sizes {
        let lost = lose.min(nodes / 4);
        let f = scale::run(nodes, lost);
        let mib = |bytes: u64| bytes >> 20;
        println!(
            "{nodes:5}  {lost:4}  {:6.2}  {:8.2}  {:6.2}  {:8.2}  {:9.2}  {:12}/{:3}  {:7}  {:16.2}",
            f.form.as_secs_f64(),
            f.format.as_secs_f64(),
            f.lose.as_secs_f64(),
            f.regain.as_secs_f64(),
            f.recover.as_secs_f64(),
            mib(f.mean_rss),
            mib(f.rss),
            f.threads,
            f.idle
        );
    }
}
