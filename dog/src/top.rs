//! `dog top` (our addition): nodes, request rates, recovery and space, every second.
//!
//! On a terminal a frame replaces the one before until `q` or Ctrl-C; into a file or pipe they follow each other.
//! `--once` prints one. Rates are differences of the nodes' counters over the time between two frames.

use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use serde_json::{Value, json};
use sheepdog_proto::ResultCode;
use sheepdog_proto::admin::SdStat;
use tokio::signal::unix::{SignalKind, signal};

use crate::context::Context;
use crate::exit::{Outcome, SYSTEM, Stop, fail};
use crate::node::recovery;
use crate::numbers::{human_size, percent};
use crate::survey::{NodeState, Survey, Unreachable, survey};
use crate::{json, out};

/// Enters the alternate screen and hides the cursor.
const ENTER: &[u8] = b"\x1b[?1049h\x1b[?25l";
/// Shows the cursor and returns to the normal screen.
const LEAVE: &[u8] = b"\x1b[?25h\x1b[?1049l";

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let mut before = sample(context).await;
    if context.options.once || context.options.json {
        let unreachable = || fail(SYSTEM, format_args!("no sheep answers at {}", gateway(context)));
        let before = before.map_err(|_| unreachable())?;
        tokio::time::sleep(context.options.period).await;
        let now = sample(context).await.map_err(|_| unreachable())?;
        let frame = Frame::new(&before, &now);
        if context.options.json {
            json::print(&frame.document());
        } else {
            out!("{}", frame.paint(&gateway(context)).join("\n") + "\n");
        }
        return Ok(());
    }
    let mut screen = Screen::open()?;
    loop {
        if screen.wait(context.options.period).await {
            return Ok(());
        }
        let now = sample(context).await;
        let lines = match (&before, &now) {
            (Ok(before), Ok(now)) => Frame::new(before, now).paint(&gateway(context)),
            (Err(_), Ok(now)) => Frame::new(now, now).paint(&gateway(context)),
            (_, Err(_)) => vec![format!("no sheep answers at {}, trying again", gateway(context))],
        };
        screen.show(&lines);
        before = now;
    }
}

fn gateway(context: &Context) -> String {
    context.session.gateway().host_port()
}

struct Sample {
    time: Instant,
    survey: Survey,
}

async fn sample(context: &Context) -> Result<Sample, Unreachable> {
    let survey = survey(&context.session).await?;
    Ok(Sample { time: Instant::now(), survey })
}

/// Requests and bytes per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Rates {
    requests: u64,
    read: u64,
    written: u64,
    peer_requests: u64,
}

impl Rates {
    /// Counters that went back belong to a daemon that was restarted: it counts from 0.
    fn between(old: &SdStat, new: &SdStat, seconds: f64) -> Rates {
        let rate = |old: u64, new: u64| {
            let change = new.checked_sub(old).unwrap_or(new);
            if seconds > 0.0 { (change as f64 / seconds).round() as u64 } else { 0 }
        };
        Rates {
            requests: rate(old.gway_total_nr, new.gway_total_nr),
            read: rate(old.gway_total_tx, new.gway_total_tx),
            written: rate(old.gway_total_rx, new.gway_total_rx),
            peer_requests: rate(old.peer_total_nr, new.peer_total_nr),
        }
    }

    fn add(self, other: Rates) -> Rates {
        Rates {
            requests: self.requests + other.requests,
            read: self.read + other.read,
            written: self.written + other.written,
            peer_requests: self.peer_requests + other.peer_requests,
        }
    }
}

/// What is shown at one moment.
struct Frame<'a> {
    survey: &'a Survey,
    /// By node; zero where one of the two samples is missing.
    rates: Vec<Rates>,
}

impl Frame<'_> {
    fn new<'a>(before: &Sample, now: &'a Sample) -> Frame<'a> {
        let seconds = now.time.duration_since(before.time).as_secs_f64();
        let rates = now.survey.nodes.iter().map(|(node, state)| {
            let old = before.survey.nodes.iter().find(|(old, _)| old.nid == node.nid);
            match (old.and_then(|(_, state)| state.as_ref()), state) {
                (Some(old), Some(new)) => Rates::between(&old.stat, &new.stat, seconds),
                _ => Rates::default(),
            }
        });
        Frame { survey: &now.survey, rates: rates.collect() }
    }

    fn states(&self) -> impl Iterator<Item = &NodeState> {
        self.survey.nodes.iter().filter_map(|(_, state)| state.as_ref())
    }

    fn space(&self) -> (u64, u64) {
        self.states()
            .fold((0, 0), |(size, free), s| (size.saturating_add(s.size), free.saturating_add(s.free)))
    }

    fn status(&self) -> String {
        match self.survey.status {
            ResultCode::SUCCESS => "running".into(),
            other => other.to_string(),
        }
    }

    fn paint(&self, gateway: &str) -> Vec<String> {
        let nodes = &self.survey.nodes;
        let epoch = self.survey.record.map_or(0, |record| record.epoch.0);
        let (size, free) = self.space();
        let used = size.saturating_sub(free);
        let sum = self.rates.iter().fold(Rates::default(), |sum, rates| sum.add(*rates));
        let recovering = self.states().filter(|state| state.recovery.in_recovery != 0).count();
        let mut lines = vec![
            format!("Sheepdog at {gateway}: {}, epoch {epoch}, {} nodes", self.status(), nodes.len()),
            format!("Space: {} of {} used ({}%)", human_size(used), human_size(size), percent(used, size)),
            format!(
                "Clients: {} requests/s, {}/s read, {}/s written",
                sum.requests,
                human_size(sum.read),
                human_size(sum.written)
            ),
            format!("Recovery: {recovering} of {} nodes", nodes.len()),
            String::new(),
            format!(
                "{:>4}   {:<22} {:>10} {:>8} {:>5} {:>8} {:>9} {:>9} {:>8}  {}",
                "Id", "Host:Port", "Zone", "Size", "Use%", "Req/s", "Read/s", "Write/s", "Peer/s", "Recovery"
            ),
        ];
        for (id, ((node, state), rates)) in nodes.iter().zip(&self.rates).enumerate() {
            let head = format!("{id:4}   {:<22} {:>10}", node.nid.host_port(), node.zone);
            let Some(state) = state else {
                lines.push(format!("{head} does not answer"));
                continue;
            };
            lines.push(format!(
                "{head} {:>8} {:>4}% {:>8} {:>9} {:>9} {:>8}  {}",
                human_size(state.size),
                percent(state.size.saturating_sub(state.free), state.size),
                rates.requests,
                human_size(rates.read),
                human_size(rates.written),
                rates.peer_requests,
                recovery_column(state)
            ));
        }
        lines
    }

    fn document(&self) -> Value {
        let (size, free) = self.space();
        let rows =
            self.survey.nodes.iter().zip(&self.rates).enumerate().map(|(id, ((node, state), rates))| {
                let Some(state) = state else {
                    return json::with(json::node(id, node), json!({ "zone": node.zone, "answers": false }));
                };
                let more = json!({
                    "zone": node.zone,
                    "answers": true,
                    "space": json::space(state.size, state.free),
                    "requests_per_second": rates.requests,
                    "read_bytes_per_second": rates.read,
                    "written_bytes_per_second": rates.written,
                    "peer_requests_per_second": rates.peer_requests,
                    "recovery": recovery::fields(&state.recovery),
                });
                json::with(json::node(id, node), more)
            });
        json!({
            "status": self.status(),
            "epoch": self.survey.record.map(|record| record.epoch.0),
            "space": json::space(size, free),
            "nodes": rows.collect::<Vec<_>>(),
        })
    }
}

fn recovery_column(state: &NodeState) -> String {
    let recovery = &state.recovery;
    match (recovery.in_recovery, recovery.nr_total) {
        (0, _) => "-".into(),
        (_, 0) => recovery::phase(recovery).into(),
        (_, total) => format!("{}% of {total}", percent(recovery.nr_finished, total)),
    }
}

/// The terminal; dropping it restores what it was.
struct Screen {
    /// `None` if stdout is no terminal.
    keys: Option<Keys>,
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

/// Keys from a terminal that delivers them at once, without echo.
struct Keys {
    saved: Termios,
    pressed: tokio::sync::mpsc::Receiver<u8>,
}

impl Screen {
    fn open() -> Result<Screen, Stop> {
        let handler = |kind| signal(kind).map_err(|e| fail(SYSTEM, e));
        let (interrupt, terminate) = (handler(SignalKind::interrupt())?, handler(SignalKind::terminate())?);
        let keys = if out::is_terminal() { Keys::open() } else { None };
        if out::is_terminal() {
            out::write(ENTER);
        }
        Ok(Screen { keys, interrupt, terminate })
    }

    /// Waits for the next frame; `true` if it is time to end.
    async fn wait(&mut self, period: std::time::Duration) -> bool {
        let timeout = tokio::time::sleep(period);
        let key = async {
            let Some(keys) = &mut self.keys else { return std::future::pending().await };
            loop {
                match keys.pressed.recv().await {
                    Some(b'q' | b'Q') => return,
                    Some(_) => {}
                    None => return std::future::pending().await,
                }
            }
        };
        tokio::select! {
            () = timeout => false,
            () = key => true,
            _ = self.interrupt.recv() => true,
            _ = self.terminate.recv() => true,
        }
    }

    fn show(&self, lines: &[String]) {
        if !out::is_terminal() {
            out!("{}\n\n", lines.join("\n"));
            out::flush();
            return;
        }
        let (width, height) = crate::sys::terminal_size().unwrap_or((80, 24));
        out::write(frame(lines, width, height).as_bytes());
    }
}

/// What draws the lines that fit. No line ends with a line feed on the last row: it would scroll the first one away.
fn frame(lines: &[String], width: usize, height: usize) -> String {
    let cut = |line: &String| line.chars().take(width).collect::<String>();
    let shown: Vec<String> = lines.iter().take(height).map(cut).collect();
    format!("\x1b[H{}\x1b[K\x1b[J", shown.join("\x1b[K\r\n"))
}

impl Drop for Screen {
    fn drop(&mut self) {
        if out::is_terminal() {
            out::write(LEAVE);
        }
        if let Some(keys) = &self.keys {
            let _ = tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, &keys.saved); // nothing else can be done
        }
    }
}

impl Keys {
    /// `None` if stdin is no terminal.
    fn open() -> Option<Keys> {
        let saved = tcgetattr(io::stdin().as_fd()).ok()?;
        let mut raw = saved.clone();
        raw.local_flags.remove(LocalFlags::ICANON | LocalFlags::ECHO);
        tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, &raw).ok()?;
        let (sender, pressed) = tokio::sync::mpsc::channel(1);
        std::thread::spawn(move || {
            let mut key = [0];
            while matches!(nix::unistd::read(io::stdin().as_fd(), &mut key), Ok(1)) {
                if sender.blocking_send(key[0]).is_err() {
                    return;
                }
            }
        });
        Some(Keys { saved, pressed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sheepdog_proto::admin::RecoveryState;
    use sheepdog_proto::{NodeId, NodeRecord};
    use std::time::Duration;

    fn sampled(time: Instant, stat: SdStat) -> Sample {
        let nid = NodeId::new(std::net::Ipv4Addr::LOCALHOST.into(), 7000);
        let node = NodeRecord { nid, zone: 3, ..NodeRecord::zeroed() };
        let recovery = RecoveryState { in_recovery: 1, state: 1, nr_finished: 1, nr_total: 4, nr_unfound: 0 };
        let state = NodeState { size: 100 << 30, free: 75 << 30, stat, recovery };
        let silent = NodeRecord { nid: NodeId::new(std::net::Ipv4Addr::LOCALHOST.into(), 7001), ..node };
        let nodes = vec![(node, Some(state)), (silent, None)];
        Sample { time, survey: Survey { status: ResultCode::SUCCESS, record: None, nodes } }
    }

    #[test]
    fn rates_are_differences_per_second() {
        let start = Instant::now();
        let old = SdStat { gway_total_nr: 10, gway_total_rx: 1 << 20, ..SdStat::zeroed() };
        let new = SdStat { gway_total_nr: 30, gway_total_rx: 5 << 20, ..SdStat::zeroed() };
        let (before, now) = (sampled(start, old), sampled(start + Duration::from_secs(2), new));
        let frame = Frame::new(&before, &now);
        assert_eq!(frame.rates[0], Rates { requests: 10, written: 2 << 20, ..Rates::default() });
        let lines = frame.paint("127.0.0.1:7000");
        assert_eq!(lines[1], "Space: 25 GB of 100 GB used (25%)");
        assert_eq!(lines[2], "Clients: 10 requests/s, 0.0 MB/s read, 2.0 MB/s written");
        assert!(lines[6].ends_with("25% of 4") && lines[6].contains("127.0.0.1:7000"), "{}", lines[6]);
        assert!(lines[7].ends_with("does not answer"));
        assert_eq!(frame.document()["nodes"][0]["written_bytes_per_second"], 2 << 20);
    }

    #[test]
    fn a_restarted_daemon_counts_from_zero() {
        let old = SdStat { gway_total_nr: 1000, ..SdStat::zeroed() };
        let new = SdStat { gway_total_nr: 7, ..SdStat::zeroed() };
        assert_eq!(Rates::between(&old, &new, 1.0).requests, 7);
        assert_eq!(Rates::between(&new, &old, 0.0), Rates::default());
    }

    #[test]
    fn a_frame_fits_the_screen_and_does_not_scroll_it() {
        let lines = ["first", "second", "third"].map(String::from);
        assert_eq!(frame(&lines, 4, 2), "\x1b[Hfirs\x1b[K\r\nseco\x1b[K\x1b[J");
        assert_eq!(frame(&lines[..1], 80, 24), "\x1b[Hfirst\x1b[K\x1b[J");
    }
}
