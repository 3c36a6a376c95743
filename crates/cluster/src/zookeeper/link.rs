//! One session with the ensemble: connecting, retries, resuming, and the proof that the session still lives (spec 04,
//! 12.1 and 12.10).
//!
//! The session outlives its connections. The client library gives it up after 7/5 of its timeout without a server; the
//! servers may still know it, because their clocks stood still while they were away, so it is resumed by its id until a
//! server says that it expired. Only that is a lost session.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use zookeeper_client::{
    Acls, Client, CreateMode, CreateOptions, Error as ZkError, OneshotWatcher, SessionState, Stat,
};

use super::option::Options;
use crate::clock::Moment;
use crate::{DriverError, Event, Lease};

/// Between two attempts to connect or to repeat a request.
pub const RETRY: Duration = Duration::from_millis(100);
/// The znodes below the root.
const TREE: [&str; 5] = ["/master", "/queue", "/member", "/queue_pos", "/lock"];

/// Why a request to the ensemble has no result.
#[derive(Debug, Error)]
pub enum Fault {
    /// The session is over.
    #[error("the session was lost")]
    Lost,
    /// A server refused it.
    #[error("{0}")]
    Refused(ZkError),
}

#[derive(Clone)]
enum Phase {
    Up(Client),
    Down,
    Lost,
}

/// A session, for everybody who sends requests in it.
#[derive(Clone)]
pub struct Link {
    phase: watch::Receiver<Phase>,
    /// The negotiated session timeout.
    pub timeout: Duration,
    /// The session's id.
    pub session: i64,
}

/// Ends the session when dropped.
pub struct LinkOwner {
    /// The session.
    pub link: Link,
    _tasks: JoinSet<()>,
}

/// Whether the error is a server's answer; everything else leaves the outcome open.
pub fn is_answer(error: &ZkError) -> bool {
    use ZkError::*;
    matches!(
        error,
        BadArguments(_)
            | NoNode
            | NoAuth
            | BadVersion
            | NoChildrenForEphemerals
            | NodeExists
            | NotEmpty
            | InvalidAcl
            | NotReadOnly
            | QuotaExceeded
            | MarshallingError
            | Unimplemented
            | UnexpectedErrorCode(_)
    )
}

/// Options of a node that everybody may change, as all nodes of the tree are.
pub fn open_to_all(mode: CreateMode) -> CreateOptions<'static> {
    mode.with_acls(Acls::anyone_all())
}

fn connector(options: &Options) -> zookeeper_client::Connector {
    Client::connector().with_session_timeout(options.timeout).with_fail_eagerly()
}

fn in_root(client: Client, options: &Options) -> Result<Client, ZkError> {
    client.chroot(options.root.clone()).map_err(|_| ZkError::BadArguments(&"cluster id"))
}

/// Connects once and makes sure that the tree exists.
async fn connect_once(options: &Options) -> Result<Client, ZkError> {
    let client = connector(options).connect(&options.hosts).await?;
    let persistent = open_to_all(CreateMode::Persistent);
    client.mkdir(&options.root, &persistent).await?;
    let client = in_root(client, options)?;
    for path in TREE {
        match client.create(path, &[], &persistent).await {
            Ok(_) | Err(ZkError::NodeExists) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(client)
}

impl LinkOwner {
    /// A new session. Tries for as long as the session timeout asked for.
    pub async fn connect(options: &Options) -> Result<LinkOwner, DriverError> {
        let retries = options.timeout.as_millis() / RETRY.as_millis();
        let attempts = async {
            loop {
                match connect_once(options).await {
                    Ok(client) => return Ok(client),
                    Err(e) if is_answer(&e) => {
                        let (hosts, reason) = (options.hosts.clone(), e.to_string());
                        return Err(DriverError::Ensemble { hosts, reason });
                    }
                    Err(e) => tracing::debug!("{}: {e}", options.hosts),
                }
                tokio::time::sleep(RETRY).await;
            }
        };
        let unreachable = |_| DriverError::Unreachable { hosts: options.hosts.clone(), retries };
        let client = tokio::time::timeout(options.timeout, attempts).await.map_err(unreachable)??;
        tracing::info!(
            "version zookeeper-client 0.11, address {}, timeout {}",
            options.connect_string(),
            options.timeout.as_millis()
        );
        let timeout = client.session_timeout();
        tracing::info!("the negotiated session timeout is {}", timeout.as_millis());
        let session = client.session_id().0;
        let (phase, watched) = watch::channel(Phase::Up(client.clone()));
        let mut tasks = JoinSet::new();
        tasks.spawn(supervise(options.clone(), client, phase));
        Ok(LinkOwner { link: Link { phase: watched, timeout, session }, _tasks: tasks })
    }
}

/// Follows the session's connections and resumes it when the library has given up.
async fn supervise(options: Options, mut client: Client, phase: watch::Sender<Phase>) {
    loop {
        let mut states = client.state_watcher();
        let mut state = states.state();
        while !state.is_terminated() {
            let up = matches!(state, SessionState::SyncConnected | SessionState::ConnectedReadOnly);
            phase.send_replace(if up { Phase::Up(client.clone()) } else { Phase::Down });
            state = states.changed().await;
        }
        phase.send_replace(Phase::Down);
        let session = client.session().clone();
        client = loop {
            let resumed = connector(&options).with_session(session.clone()).connect(&options.hosts).await;
            match resumed.and_then(|client| in_root(client, &options)) {
                Ok(client) => break client,
                Err(ZkError::SessionExpired) => {
                    phase.send_replace(Phase::Lost);
                    return;
                }
                Err(e) => tracing::debug!("cannot resume session {}: {e}", session.id()),
            }
            tokio::time::sleep(RETRY).await;
        };
    }
}

impl Link {
    /// The connected client, as soon as there is one.
    pub async fn client(&self) -> Result<Client, Fault> {
        let mut phase = self.phase.clone();
        let phase = phase.wait_for(|p| !matches!(p, Phase::Down)).await;
        match phase.as_deref() {
            Ok(Phase::Up(client)) => Ok(client.clone()),
            _ => Err(Fault::Lost),
        }
    }

    /// How long nobody can take this session for over once the ensemble has answered in it.
    pub fn confirmed_for(&self) -> Duration {
        self.timeout * 2 / 3
    }

    /// Waits for the end of the session.
    pub async fn lost(&self) {
        let mut phase = self.phase.clone();
        let _ = phase.wait_for(|p| matches!(p, Phase::Lost)).await;
    }

    /// Repeats a request until a server answers it. Not for requests that must not be repeated.
    async fn call<T, F, Fut>(&self, request: F) -> Result<T, Fault>
    where
        F: Fn(Client) -> Fut,
        Fut: Future<Output = Result<T, ZkError>>,
    {
        loop {
            match request(self.client().await?).await {
                Ok(value) => return Ok(value),
                Err(e) if is_answer(&e) => return Err(Fault::Refused(e)),
                Err(e) => tracing::debug!("to be repeated: {e}"),
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Data of a node, if it exists.
    pub async fn get(&self, path: &str) -> Result<Option<(Vec<u8>, Stat)>, Fault> {
        absent(self.call(|c| async move { c.get_data(path).await }).await)
    }

    /// The same, with a watch for its change or deletion.
    pub async fn get_and_watch(&self, path: &str) -> Result<Option<(Vec<u8>, Stat, OneshotWatcher)>, Fault> {
        absent(self.call(|c| async move { c.get_and_watch_data(path).await }).await)
    }

    /// Whether a node exists.
    pub async fn stat(&self, path: &str) -> Result<Option<Stat>, Fault> {
        self.call(|c| async move { c.check_stat(path).await }).await
    }

    /// The same, with a watch for its creation, change or deletion.
    pub async fn stat_and_watch(&self, path: &str) -> Result<(Option<Stat>, OneshotWatcher), Fault> {
        self.call(|c| async move { c.check_and_watch_stat(path).await }).await
    }

    /// Names of the children.
    pub async fn children(&self, path: &str) -> Result<Vec<String>, Fault> {
        self.call(|c| async move { c.list_children(path).await }).await
    }

    /// The same, with a watch for the next change.
    pub async fn children_and_watch(&self, path: &str) -> Result<(Vec<String>, OneshotWatcher), Fault> {
        self.call(|c| async move { c.list_and_watch_children(path).await }).await
    }

    /// Creates a node; in a sequence it may be created twice, of which the last is returned.
    pub async fn create(&self, path: &str, data: &[u8], mode: CreateMode) -> Result<i64, Fault> {
        let options = &open_to_all(mode);
        let create = |c: Client| async move { c.create(path, data, options).await };
        Ok(self.call(create).await?.1.into_i64())
    }

    /// Replaces a node's data, if it has this version.
    pub async fn set(&self, path: &str, data: &[u8], version: Option<i32>) -> Result<(), Fault> {
        self.call(|c| async move { c.set_data(path, data, version).await }).await.map(drop)
    }

    /// Deletes a node if it exists.
    pub async fn delete(&self, path: &str) -> Result<(), Fault> {
        absent(self.call(|c| async move { c.delete(path, None).await }).await).map(drop)
    }

    /// Brings the server up to the state of the ensemble.
    pub async fn sync(&self) -> Result<(), Fault> {
        self.call(|c| async move { c.sync("/queue").await }).await
    }

    /// The number that the next queue entry gets: entries created so far, as the servers count.
    pub async fn next_number(&self) -> Result<i64, Fault> {
        let stat = self.stat("/queue").await?.ok_or(Fault::Refused(ZkError::NoNode))?;
        // Twice the creations less the children; negative beyond 2^30 creations, and whole again as an unsigned number.
        Ok(i64::from(stat.cversion.wrapping_add(stat.num_children) as u32) / 2)
    }
}

fn absent<T>(result: Result<T, Fault>) -> Result<Option<T>, Fault> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Fault::Refused(ZkError::NoNode)) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Renews the lease as long as this node is a member, and reports when the session has not been confirmed for 2/3 of its
/// timeout, and when it is confirmed again. Confirmed is the moment at which a request was *sent* that the ensemble's
/// leader answered: the session cannot have been older then.
pub async fn fence(
    link: Link,
    lease: Arc<Lease>,
    is_member: impl Fn() -> bool,
    events: mpsc::UnboundedSender<Event>,
) {
    let limit = link.confirmed_for();
    let (confirm, mut confirmed) = watch::channel(Instant::now());
    let probe = async {
        let mut tick = tokio::time::interval(link.timeout / 12);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let Ok(client) = link.client().await else { return };
            let (sent, at) = (Instant::now(), Moment::now());
            if let Ok(Ok(())) = tokio::time::timeout(link.timeout / 3, client.sync("/queue")).await {
                if is_member() {
                    lease.extend(at.after(limit));
                }
                confirm.send_replace(sent);
            }
        }
    };
    let judge = async {
        loop {
            let deadline = *confirmed.borrow_and_update() + limit;
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(deadline) => {}
                _ = confirmed.changed() => continue,
            }
            tracing::warn!("zookeeper has not answered for {} ms", limit.as_millis());
            let _ = events.send(Event::Suspended(true));
            if confirmed.wait_for(|at| at.elapsed() < limit).await.is_err() {
                return;
            }
            tracing::info!("zookeeper answers again, the session goes on");
            let _ = events.send(Event::Suspended(false));
        }
    };
    tokio::select! {
        () = probe => {}
        () = judge => {}
    }
}
