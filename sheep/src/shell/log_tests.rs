//! The layer with its own writer; the process-wide log is exercised by the daemon's tests.

use super::*;
use tracing::subscriber::with_default;

#[test]
fn events_become_lines_with_level_thread_place_and_fields_and_the_level_can_change() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("sheep.log");
    let writer = Writer::start(Sink::File(LogFile::open(&path, MAX_FILE).expect("open"))).expect("start");
    let layer = LogLayer { writer: writer.clone(), format: Format::Server, port: 7000, with_time: false };
    let thread = std::thread::Builder::new().name("gway".to_owned());
    let logged = thread.spawn(move || {
        with_default(tracing_subscriber::registry().with(layer), || {
            let all = |round| {
                emerg!("emerg {round}");
                alert!("alert {round}");
                crit!("crit {round}");
                tracing::error!("err {round}");
                tracing::warn!("warning {round}");
                notice!("notice {round}");
                tracing::info!(epoch = 3, name = "v1", "info {round}");
                tracing::debug!("debug {round}");
                tracing::trace!("never {round}");
            };
            for (round, level) in
                [Severity::Info, Severity::Debug, Severity::Notice, Severity::Crit, Severity::Emerg]
                    .into_iter()
                    .enumerate()
            {
                set_level(level);
                assert_eq!(super::level(), level);
                all(round);
            }
            set_level(Severity::Info);
        });
    });
    logged.expect("thread").join().expect("no panic");
    writer.flush();
    let text = std::fs::read_to_string(&path).expect("log");
    let rounds: Vec<Vec<&str>> =
        (0..5).map(|n| text.lines().filter(|l| l.contains(&format!(" {n}"))).collect()).collect();
    assert_eq!(rounds.iter().map(Vec::len).collect::<Vec<_>>(), [7, 8, 6, 3, 1]);
    let words: Vec<_> = rounds[1].iter().map(|l| l[..6].trim_start()).collect();
    assert_eq!(words, ["EMERG", "ALERT", "CRIT", "ERROR", "WARN", "NOTICE", "INFO", "DEBUG"]);
    let info = rounds[0][6];
    assert!(info.starts_with("  INFO [gway] sheep::shell::log::tests("), "{info}");
    assert!(info.ends_with(") info 0 epoch=3 name=v1"), "{info}");
}
