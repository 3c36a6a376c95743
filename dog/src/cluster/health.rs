//! `dog cluster health` (our addition): one line per finding, and an exit status for monitoring.
//!
//! 0 = healthy, 1 = degraded (served, but somebody should look, or recovery is at work), 2 = in danger (not served, or
//! about to be). Every question has a deadline: a cluster that hangs is told as such within seconds.

use std::collections::BTreeSet;

use serde_json::json;
use sheepdog_proto::{NodeRecord, ResultCode};

use crate::context::Context;
use crate::exit::{Outcome, Stop};
use crate::json;
use crate::numbers::percent;
use crate::survey::{NodeState, Survey, survey};

/// Use of a node's space from which on it is told, percent.
const NEARLY_FULL: u64 = 85;
/// Use from which on creates may be refused at any moment.
const FULL: u64 = 97;

/// How bad a finding is; the number is the exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Severity {
    Healthy = 0,
    Degraded = 1,
    Critical = 2,
}

impl Severity {
    fn name(self) -> &'static str {
        match self {
            Severity::Healthy => "healthy",
            Severity::Degraded => "degraded",
            Severity::Critical => "critical",
        }
    }
}

type Finding = (Severity, String);

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let gateway = context.session.gateway().host_port();
    let (findings, summary) = match survey(&context.session).await {
        Ok(survey) => (examine(&survey), summary(&survey)),
        Err(_) => (vec![(Severity::Critical, format!("no sheep answers at {gateway}"))], String::new()),
    };
    let worst = findings.iter().map(|(severity, _)| *severity).max().unwrap_or(Severity::Healthy);
    if context.options.json {
        let finding = |(severity, text): &Finding| json!({ "severity": severity.name(), "text": text });
        json::print(&json!({
            "status": worst.name(),
            "findings": findings.iter().map(finding).collect::<Vec<_>>(),
        }));
    } else {
        for (severity, text) in &findings {
            out!("{}: {text}\n", severity.name());
        }
        if findings.is_empty() {
            out!("{}: {summary}\n", worst.name());
        }
    }
    match worst {
        Severity::Healthy => Ok(()),
        bad => Err(Stop::Code(bad as i32)),
    }
}

fn summary(survey: &Survey) -> String {
    let epoch = survey.record.map_or(0, |record| record.epoch.0);
    format!("{} nodes, epoch {epoch}", survey.nodes.len())
}

/// Everything worth telling, the worst first.
fn examine(survey: &Survey) -> Vec<Finding> {
    let mut findings = Vec::new();
    if survey.status != ResultCode::SUCCESS {
        findings.push((Severity::Critical, format!("the cluster does not serve: {}", survey.status)));
    }
    if let Some(record) = &survey.record {
        if record.disable_recovery != 0 {
            findings.push((Severity::Degraded, "automatic recovery is disabled".into()));
        }
        if survey.status == ResultCode::SUCCESS {
            findings.extend(zones(survey, record.nr_copies.into()));
        }
    }
    for (id, (node, state)) in survey.nodes.iter().enumerate() {
        findings.extend(node_findings(&format!("node {id} ({})", node.nid.host_port()), state.as_ref()));
    }
    findings.sort_by(|(a, _), (b, _)| b.cmp(a));
    findings
}

/// Whether there are, and answer, as many zones as objects have copies by default.
fn zones(survey: &Survey, copies: usize) -> Option<Finding> {
    let stores = |node: &NodeRecord| node.nr_vnodes > 0;
    let members = survey.nodes.iter().filter(|(node, _)| stores(node));
    let all: BTreeSet<u32> = members.clone().map(|(node, _)| node.zone).collect();
    let silent: BTreeSet<u32> =
        members.filter(|(_, state)| state.is_none()).map(|(node, _)| node.zone).collect();
    if all.is_empty() {
        return Some((Severity::Critical, "no node stores objects".into()));
    }
    if silent.len() >= copies.max(1) || silent.len() == all.len() {
        let text =
            format!("nodes of {} zones do not answer: there may be objects without any copy", silent.len());
        return Some((Severity::Critical, text));
    }
    if all.len() < copies {
        let text = format!("{} zones for {copies} copies: objects have fewer than they should", all.len());
        return Some((Severity::Degraded, text));
    }
    None
}

fn node_findings(who: &str, state: Option<&NodeState>) -> Vec<Finding> {
    let Some(state) = state else {
        return vec![(Severity::Degraded, format!("{who} does not answer"))];
    };
    let mut findings = Vec::new();
    let used = percent(state.size.saturating_sub(state.free), state.size);
    if used >= NEARLY_FULL {
        let severity = if used >= FULL { Severity::Critical } else { Severity::Degraded };
        findings.push((severity, format!("{who} is {used}% full")));
    }
    let recovery = &state.recovery;
    if recovery.in_recovery != 0 {
        let (done, total) = (recovery.nr_finished, recovery.nr_total);
        findings.push((Severity::Degraded, format!("{who} recovers: {done} of {total} objects")));
    }
    if recovery.nr_unfound > 0 {
        let text =
            format!("{who} cannot find {} objects: nodes that have them are away", recovery.nr_unfound);
        findings.push((Severity::Critical, text));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use sheepdog_proto::admin::{RecoveryState, SdStat};
    use sheepdog_proto::cluster::EpochRecord;
    use sheepdog_proto::{Epoch, NodeId};

    fn node(port: u16, zone: u32) -> NodeRecord {
        let nid = NodeId::new(std::net::Ipv4Addr::LOCALHOST.into(), port);
        NodeRecord { nid, zone, nr_vnodes: 128, ..NodeRecord::zeroed() }
    }

    fn idle(size: u64, free: u64) -> NodeState {
        NodeState { size, free, stat: SdStat::zeroed(), recovery: RecoveryState::zeroed() }
    }

    fn healthy() -> Survey {
        let record = EpochRecord { epoch: Epoch(4), nr_copies: 2, ..EpochRecord::zeroed() };
        let nodes = (0..3).map(|i| (node(7000 + i, i.into()), Some(idle(100, 50)))).collect();
        Survey { status: ResultCode::SUCCESS, record: Some(record), nodes }
    }

    fn worst(survey: &Survey) -> (Severity, String) {
        examine(survey).into_iter().next().unwrap_or((Severity::Healthy, String::new()))
    }

    #[test]
    fn a_healthy_cluster_has_no_findings() {
        assert_eq!(examine(&healthy()), []);
        assert_eq!(summary(&healthy()), "3 nodes, epoch 4");
    }

    #[test]
    fn silent_zones_are_dangerous_once_they_can_hold_all_copies() {
        let mut survey = healthy();
        survey.nodes[1].1 = None;
        assert_eq!(
            examine(&survey),
            [(Severity::Degraded, "node 1 (127.0.0.1:7001) does not answer".into())]
        );
        survey.nodes[2].1 = None;
        assert_eq!(worst(&survey).0, Severity::Critical);
        survey.nodes[2].0.zone = 1;
        assert_eq!(worst(&survey).0, Severity::Degraded, "two nodes of one zone");
    }

    #[test]
    fn space_recovery_and_missing_zones_are_told() {
        let mut survey = healthy();
        survey.nodes[0].1 = Some(idle(100, 10));
        assert_eq!(examine(&survey), [(Severity::Degraded, "node 0 (127.0.0.1:7000) is 90% full".into())]);
        survey.nodes[0].1 = Some(idle(100, 2));
        assert_eq!(worst(&survey).0, Severity::Critical);
        survey = healthy();
        if let Some(state) = &mut survey.nodes[0].1 {
            state.recovery =
                RecoveryState { in_recovery: 1, nr_finished: 3, nr_total: 9, ..RecoveryState::zeroed() };
        }
        assert_eq!(worst(&survey).1, "node 0 (127.0.0.1:7000) recovers: 3 of 9 objects");
        survey.nodes.truncate(1);
        survey.nodes[0].1 = Some(idle(0, 0));
        assert_eq!(worst(&survey).1, "1 zones for 2 copies: objects have fewer than they should");
    }

    #[test]
    fn a_cluster_that_does_not_serve_is_critical() {
        let mut survey = healthy();
        survey.status = ResultCode::WAIT_FOR_JOIN;
        let text = "the cluster does not serve: Waiting for other nodes to join cluster";
        assert_eq!(worst(&survey), (Severity::Critical, text.into()));
        let unformatted = Survey { status: ResultCode::WAIT_FOR_FORMAT, record: None, nodes: Vec::new() };
        assert_eq!(worst(&unformatted).0, Severity::Critical);
    }
}
