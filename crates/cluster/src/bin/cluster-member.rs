//! Joins a cluster through a driver, prints its events, takes requests from standard input: the counterpart of a sheep
//! in this crate's tests, and a probe for what a queue really delivers.
//!
//! Usage: `cluster-member DRIVER IP PORT`, then one of `join`, `leave`, `notify TEXT`, `block`, `unblock TEXT`,
//! `update VNODES`, `lock ID`, `unlock ID`, `hint`, `decline` (stop answering joins), `quit` per line.

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::net::IpAddr;
use std::process::ExitCode;
use std::sync::Arc;

use sheepdog_cluster::{Driver, Event, Request, block_event_signal, open};
use sheepdog_proto::cluster::ClusterInfoHeader;
use sheepdog_proto::{ClusterInfo, INTERNAL_PROTO_VERSION, NodeId, NodeRecord};
use tokio::sync::{Notify, mpsc};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let parsed = match args.as_slice() {
        [_, spec, ip, port] => ip.parse().ok().zip(port.parse().ok()).map(|id| (spec, id)),
        _ => None,
    };
    let Some((spec, (ip, port))) = parsed else {
        eprintln!("usage: cluster-member DRIVER IP PORT");
        return ExitCode::from(2);
    };
    match run(spec, ip, port) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn run(spec: &str, ip: IpAddr, port: u16) -> Result<(), Box<dyn std::error::Error>> {
    block_event_signal()?;
    let (driver, mut events) = open(spec)?;
    let (lines, mut commands) = mpsc::channel(64);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if lines.blocking_send(line).is_err() {
                return;
            }
        }
    });
    let node = NodeRecord { nid: NodeId::new(ip, port), nr_vnodes: 128, ..NodeRecord::zeroed() };
    let info = ClusterInfo { header: ClusterInfoHeader::zeroed(), nodes: Vec::new() };
    let mut member = Member { node, info, wanted: 0, declining: false, locks: HashMap::new() };
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        // Requests wait for their answers in order, and events do not wait for them.
        let (requests, calls) = mpsc::unbounded_channel();
        tokio::spawn(call(driver.clone(), calls));
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => if member.show(event) {
                        member.obey(&driver, "join", &requests);
                    },
                    None => return,
                },
                line = commands.recv() => match line.as_deref() {
                    None | Some("quit") => return,
                    Some(line) => member.obey(&driver, line, &requests),
                },
            }
        }
    });
    Ok(())
}

async fn call(driver: Arc<dyn Driver>, mut calls: mpsc::UnboundedReceiver<(String, Request)>) {
    while let Some((verb, call)) = calls.recv().await {
        let result = match call {
            Request::Join(node, info) => driver.join(node, *info).await,
            Request::Notify(message) => driver.notify(message).await,
            Request::Unblock(message) => driver.unblock(message).await,
            other => driver.request(other).await,
        };
        if let Err(e) = result {
            say(&format!("error {verb}: {e}"));
        }
    }
}

/// Waits for a lock and says so, and releases it when told.
async fn hold(driver: Arc<dyn Driver>, id: u64, release: Arc<Notify>) {
    let lock = match driver.lock(id).await {
        Ok(lock) => lock,
        Err(e) => return say(&format!("error lock: {e}")),
    };
    say(&format!("locked {id}"));
    release.notified().await;
    match lock.release().await {
        Ok(()) => say(&format!("unlocked {id}")),
        Err(e) => say(&format!("error unlock: {e}")),
    }
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // A reader that went away is no concern of the cluster.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn list(members: &[NodeRecord]) -> String {
    members.iter().map(|n| n.nid.host_port()).collect::<Vec<_>>().join(",")
}

struct Member {
    node: NodeRecord,
    info: ClusterInfo,
    /// Blocks asked for and not granted yet.
    wanted: usize,
    declining: bool,
    /// How each lock that was asked for last is released.
    locks: HashMap<u64, Arc<Notify>>,
}

impl Member {
    /// Prints the event and answers it; `true` = the session was lost, join again.
    fn show(&mut self, event: Event) -> bool {
        match event {
            Event::Join { node, members, answer, .. } => {
                say(&format!("join {:?} members={}", node.nid, list(&members)));
                let header = ClusterInfoHeader { proto_ver: INTERNAL_PROTO_VERSION, ..self.info.header };
                answer.give((!self.declining).then_some(ClusterInfo { header, nodes: members }));
            }
            Event::Accept { node, members, info } => {
                say(&format!(
                    "accept {:?} members={} version={}",
                    node.nid,
                    list(&members),
                    info.header.proto_ver
                ));
            }
            Event::Leave { node, members } => {
                say(&format!("leave {:?} members={}", node.nid, list(&members)))
            }
            Event::Block { node, answer } => {
                let granted = node.nid == self.node.nid && self.wanted > 0;
                if granted {
                    self.wanted -= 1;
                    say("granted");
                }
                answer.give(granted);
            }
            Event::Notify { sender, message } => {
                say(&format!("notify {:?} {}", sender.nid, String::from_utf8_lossy(&message)));
            }
            Event::UpdateNode { node, members } => {
                let listed = members.iter().find(|n| n.nid == node.nid).map_or(0, |n| n.nr_vnodes);
                say(&format!("update {:?} vnodes={} listed={listed}", node.nid, node.nr_vnodes));
            }
            Event::Suspended(suspended) => say(&format!("suspended {suspended}")),
            Event::Reconnect => {
                self.wanted = 0;
                say("reconnect");
                return true;
            }
            Event::Failed(text) => say(&format!("failed {text}")),
        }
        false
    }

    fn obey(
        &mut self,
        driver: &Arc<dyn Driver>,
        line: &str,
        calls: &mpsc::UnboundedSender<(String, Request)>,
    ) {
        let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
        let call = match verb {
            "join" => Request::Join(self.node, Box::new(self.info.clone())),
            "leave" => Request::Leave,
            "notify" => Request::Notify(rest.into()),
            "block" => {
                self.wanted += 1;
                Request::Block
            }
            "unblock" => Request::Unblock(rest.into()),
            "update" => match rest.parse() {
                Ok(nr_vnodes) => Request::Update(NodeRecord { nr_vnodes, ..self.node }),
                Err(_) => return say("error update: not a number"),
            },
            "lock" | "unlock" => {
                let Ok(id) = rest.parse() else { return say("error lock: not a number") };
                if verb == "lock" {
                    let release = Arc::new(Notify::new());
                    self.locks.insert(id, release.clone());
                    tokio::spawn(hold(driver.clone(), id, release));
                } else if let Some(release) = self.locks.get(&id) {
                    release.notify_one();
                }
                return;
            }
            "hint" => return say(&format!("hint {}", list(&driver.members_hint()))),
            "decline" => {
                self.declining = true;
                return say("declining");
            }
            _ => return say(&format!("error {verb}: unknown")),
        };
        // The receiver lives as long as this loop.
        let _ = calls.send((verb.to_owned(), call));
    }
}
