//! The tasks of a session besides reader, writer and election: entering, watching members and the session itself (spec
//! 04, 12.5 and 12.7).

use std::time::Duration;

use sheepdog_proto::NodeId;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use zookeeper_client::EventType;

use super::election::{Progress, Standing};
use super::layout::{Entry, member_path, position_path};
use super::link::{Fault, Link};
use super::member::Command;
use super::queue;
use super::session::Input;
use crate::DriverError;

/// After a predecessor's nodes vanished, before joining: its death is then in the queue, unless a survivor is slow.
const SETTLE: Duration = Duration::from_millis(300);

/// The way from a task to the member.
#[derive(Clone)]
pub struct Tell {
    /// The session's generation.
    pub generation: u64,
    /// The member's.
    pub mailbox: mpsc::UnboundedSender<Command>,
}

impl Tell {
    /// Sends; after the member's end nobody needs it.
    pub fn tell(&self, input: Input) {
        let _ = self.mailbox.send(Command::Input(self.generation, input));
    }
}

/// A task without which this node would not know what the others decide. Its end by a lost session is announced by
/// [`watch_session`].
pub async fn needed(tell: Tell, what: &'static str, task: impl Future<Output = Result<(), Fault>>) {
    if let Err(Fault::Refused(e)) = task.await {
        tell.tell(Input::Refused(what, e));
    }
}

/// A task that may fail.
pub async fn log_fault(what: &str, task: impl Future<Output = Result<(), Fault>>) {
    if let Err(Fault::Refused(e)) = task.await {
        tracing::error!("zookeeper, {what}: {e}");
    }
}

/// Reports what the election says and the end of the session.
pub async fn watch_session(link: Link, mut standing: watch::Receiver<Standing>, tell: Tell) {
    let elections = async {
        while standing.changed().await.is_ok() {
            tell.tell(Input::Elected);
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = link.lost() => tell.tell(Input::Lost),
        () = elections => {}
    }
}

/// Waits until nobody is registered under our address, until it is known who answers, and writes JOIN.
pub async fn enter(
    link: Link,
    join: Entry,
    progress: watch::Sender<Progress>,
    mut standing: watch::Receiver<Standing>,
    tell: Tell,
) {
    let me = join.sender.nid;
    let steps = async {
        wait_for_predecessor(&link, &me).await?;
        progress.send_replace(Progress::Competing);
        if standing.wait_for(|s| *s != Standing::Unknown).await.is_err() {
            return Err(Refusal::Fault(Fault::Lost));
        }
        let from = link.next_number().await?;
        let number = queue::push(&link, &join, from).await?;
        progress.send_replace(Progress::Asked(number));
        Ok(number)
    };
    let result = match steps.await {
        Ok(number) => Ok(number),
        // Announced by `watch_session`.
        Err(Refusal::Fault(Fault::Lost)) => return,
        Err(Refusal::Fault(Fault::Refused(e))) => {
            Err(DriverError::Ensemble { hosts: "join".into(), reason: e.to_string() })
        }
        Err(Refusal::Present(seconds)) => Err(DriverError::PreviousSession(seconds)),
    };
    tell.tell(Input::Entered(result));
}

enum Refusal {
    Fault(Fault),
    Present(u64),
}

impl From<Fault> for Refusal {
    fn from(fault: Fault) -> Refusal {
        Refusal::Fault(fault)
    }
}

/// A killed predecessor's nodes live until its session times out, at most 3/2 of the timeout by the servers' ticks.
async fn wait_for_predecessor(link: &Link, me: &NodeId) -> Result<(), Refusal> {
    let deadline = Instant::now() + link.timeout * 3 / 2 + Duration::from_secs(1);
    let mut waited = false;
    for path in [member_path(me), position_path(me)] {
        loop {
            let (stat, changed) = link.stat_and_watch(&path).await?;
            match stat {
                None => break,
                Some(stat) if stat.ephemeral_owner == link.session => link.delete(&path).await?,
                Some(_) => {
                    if !waited {
                        tracing::warn!("{me} is still registered by an earlier session, waiting for its end");
                    }
                    waited = true;
                    let timeout = link.timeout.as_secs_f64().ceil() as u64;
                    let gone = tokio::time::timeout_at(deadline, changed.changed()).await;
                    gone.map_err(|_| Refusal::Present(timeout))?;
                }
            }
        }
    }
    if waited {
        tokio::time::sleep(SETTLE).await;
    }
    Ok(())
}

/// Reports when a member's node is deleted, or does not appear within 3/2 of the session timeout.
pub async fn watch_member(link: Link, node: NodeId, tell: Tell) -> Result<(), Fault> {
    let path = member_path(&node);
    let appears_by = Instant::now() + link.timeout * 3 / 2;
    let mut seen = false;
    loop {
        let (stat, changed) = link.stat_and_watch(&path).await?;
        seen |= stat.is_some();
        let event = if seen {
            if stat.is_none() {
                break;
            }
            changed.changed().await
        } else {
            match tokio::time::timeout_at(appears_by, changed.changed()).await {
                Ok(event) => event,
                Err(_) => break,
            }
        };
        if event.event_type == EventType::NodeDeleted {
            break;
        }
    }
    tell.tell(Input::Death(node, link.next_number().await?));
    Ok(())
}
