//! The life of the daemon: from the command line to the exit status (spec 04, section 17).

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use sheepdog_cluster::Driver;
use sheepdog_proto::admin::RecoveryThrottling;
use sheepdog_proto::config::StoreConfig;
use sheepdog_proto::{ClusterInfo, ClusterStatus, NodeId, Opcode, Request};
use sheepdog_store::{DiskFailure, MetaDir, SyncMode};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::cluster::state::State;
use crate::cluster::task::{Task, view_of};
use crate::cluster::worker::{self, Worker};
use crate::cluster::{ClusterHandle, handle::Command};
use crate::disks::{self, Disks};
use crate::gate::Gate;
use crate::gateway::{Gateway, numbers};
use crate::history::History;
use crate::holds::Holds;
use crate::intents::Intents;
use crate::peers::Peers;
use crate::recovery::early::EarlyWrites;
use crate::recovery::tombstones::Tombstones;
use crate::recovery::{self, Recovery};
use crate::server::Server;
use crate::sheep::{Outstanding, Sheep};
use crate::shell::daemonize::Readiness;
use crate::shell::log::Severity;
use crate::shell::log::{self, early_line};
use crate::shell::options::Options;
use crate::shell::{PidFile, raise_open_file_limit};
use crate::stats::Stats;
use crate::vdi::holders::Holders;
use crate::vdi::reclaim::{self, Reclaim};
use crate::vdi::table::VdiTable;
use crate::view::Views;
use crate::{listen, start};

/// How long the end waits for requests in progress.
const DRAIN: Duration = Duration::from_secs(30);
/// Deadline of the question to a member before joining.
const HINT_DEADLINE: Duration = Duration::from_secs(2);

/// Runs the daemon to its end and gives the exit status.
pub fn run(options: &Options, readiness: Readiness) -> i32 {
    let mut readiness = Some(readiness);
    let meta = match MetaDir::open(&options.base) {
        Ok(meta) => meta,
        Err(error) => return refuse_early(options, readiness, &error.to_string()),
    };
    if let Err(error) = log::start(options) {
        return refuse_early(options, readiness, &format!("cannot open the log: {error}"));
    }
    log::log_panics();
    if let Err(error) = raise_open_file_limit() {
        tracing::warn!("cannot raise the limit of open files: {error}");
    }
    let workers = std::thread::available_parallelism().map_or(2, |n| n.get().max(2));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .thread_name("main")
        .enable_all()
        .build();
    let outcome = match runtime {
        Ok(runtime) => {
            let outcome = runtime.block_on(serve(options, Arc::new(meta), &mut readiness));
            runtime.shutdown_timeout(Duration::from_millis(200));
            outcome
        }
        Err(error) => Err(format!("cannot start the runtime: {error}")),
    };
    let code = match outcome {
        Ok(code) => code,
        Err(text) => {
            text.lines().for_each(|line| tracing::error!("{line}"));
            // Whoever is told may look for the reason at once.
            log::flush();
            if let Some(readiness) = readiness {
                let lines = text.lines().map(|line| early_line(options, Severity::Err, line));
                readiness.failed(&lines.collect::<String>());
            }
            1
        }
    };
    log::flush();
    code
}

fn refuse_early(options: &Options, readiness: Option<Readiness>, text: &str) -> i32 {
    let lines: String = text.lines().map(|line| early_line(options, Severity::Err, line)).collect();
    match readiness {
        Some(readiness) if !options.foreground => readiness.failed(&lines),
        _ => eprint!("{lines}"),
    }
    1
}

/// Everything between the opened log and the end.
async fn serve(
    options: &Options,
    meta: Arc<MetaDir>,
    readiness: &mut Option<Readiness>,
) -> Result<i32, String> {
    let text = |e: start::StartError| e.to_string();
    let starting = tokio::spawn(end_before_join(new_signals()?));
    let (handle, commands) = ClusterHandle::new();
    let mut config = start::configuration(&meta, options).map_err(text)?;
    let history = Arc::new(OnceLock::new());
    let opened = if options.gateway {
        None
    } else {
        let events = start::DiskEvents {
            before_loss: loss_handler(history.clone()),
            failed: disk_failure_handler(handle.clone()),
        };
        Some(
            tokio::task::block_in_place(|| start::open_store(&meta, options, &config, events))
                .map_err(text)?,
        )
    };
    let durable = opened.as_ref().is_some_and(|o| o.store.sync_mode() != SyncMode::NoSync);
    let early = EarlyWrites::open(meta.path(), durable)
        .map_err(|e| format!("cannot read the log of early writes in {}: {e}", meta.path().display()))?;
    if meta.is_formatting() {
        early.clear().map_err(|e| e.to_string())?;
        if let Some(opened) = &opened {
            opened.store.format(opened.store.layout()).await.map_err(|e| e.to_string())?;
        }
        config = StoreConfig { version: config.version, ..StoreConfig::default() };
        meta.write_config(&config).and_then(|()| meta.end_format()).map_err(|e| e.to_string())?;
        tracing::warn!("a format was interrupted; this node is empty now and belongs to no cluster");
    }
    let latest = meta.latest_epoch().map_err(|e| e.to_string())?;
    let incomplete = opened.as_ref().is_some_and(|o| o.incomplete);
    let history = history.get_or_init(|| Arc::new(History::open(meta.path(), latest, incomplete))).clone();
    if let Some(opened) = &opened {
        if incomplete {
            // Also after an orderly shutdown there is something to recover.
            config.shutdown = 0;
        }
        early.complete_files(&opened.store, latest).await.map_err(|e| e.to_string())?;
        let settled = opened.store.settle().await;
        if settled.moved + settled.failed > 0 {
            tracing::info!("{} objects moved to their disks, {} not", settled.moved, settled.failed);
        }
        if config.space == 0 {
            config.space = opened.store.disk_sizes_sum();
        }
    }
    meta.write_config(&config).map_err(|e| e.to_string())?;

    let listeners = listen::all(options.bind, options.port)
        .map_err(|e| format!("failed to create a listening port: port {}: {e}", options.port))?;
    let io_listener = match options.io_addr {
        Some(addr) => Some(listen::tcp(addr).map_err(|e| format!("failed to listen on {addr}: {e}"))?),
        None => None,
    };
    let unix =
        listen::unix(&meta.path().join("sock")).map_err(|e| format!("failed to listen on sock: {e}"))?;

    let failed = |e: sheepdog_cluster::DriverError| format!("{e}\nfailed to create sheepdog cluster");
    let (driver, events) = sheepdog_cluster::open(&options.cluster).map_err(failed)?;
    let me = my_id(options, &*driver).map_err(failed)?;
    let state = start::state(&meta, options, start::record(options, me, config.space), config);
    let state = state.map_err(|e| format!("{e}\nfailed to create sheepdog cluster"))?;

    let (parts, sheep) = assemble(options, &meta, handle, &state, opened, history, early);
    if let Some(lease) = driver.lease() {
        sheep.gate.require(lease);
    }
    let (exit, exited) = watch::channel(None);
    let (stop, stopping) = watch::channel(false);
    let server = Server::new(sheep.clone());
    for listener in listeners.into_iter().chain(io_listener) {
        server.serve_tcp(listener, stopping.clone());
    }
    server.serve_unix(unix, stopping.clone());

    // Whatever may still fail fails before the join: a node that joins and ends costs the cluster two epochs. Who sees it as
    // a member may tell it to end.
    let mut signals = new_signals()?;
    starting.abort();
    let nbd_listeners = crate::nbd::bind(options).await?;
    let pidfile = match &options.pidfile {
        Some(path) => Some(
            PidFile::create(path).map_err(|e| format!("failed to pid file '{}' - {e}", path.display()))?,
        ),
        None => None,
    };
    if let Some(reason) = refusal_by_member(&sheep, &*driver, &state).await {
        return Err(format!("{reason}\nfailed to join Sheepdog"));
    }
    if let Some(store) = &sheep.store {
        let last = sheep.meta.latest_epoch().unwrap_or_default();
        sheep.intents.verify(store, last).await;
    }
    parts.spawn(&sheep);
    tracing::info!("{} going to join the cluster", state.me.nid);
    let (record, info) = (state.me, state.cluster_info());
    Task::spawn(sheep.clone(), state, driver.clone(), parts.worker.clone(), events, commands, exit);
    // Over ZooKeeper it waits for the end of a predecessor's session, and for as long as no server answers.
    tokio::select! {
        joined = driver.join(record, info) => joined.map_err(failed)?,
        () = told_to_end(&sheep, &mut signals) => {
            tracing::info!("told to end before it joined");
            remove_pidfile(pidfile);
            let _ = tokio::time::timeout(HINT_DEADLINE, driver.end()).await;
            return Ok(0);
        }
    }

    if let Err(error) = std::env::set_current_dir(meta.path()) {
        tracing::warn!("cannot change to {}: {error}", meta.path().display());
    }
    let nbd = nbd_listeners.map(|listeners| crate::nbd::serve(listeners, &sheep));
    if let Some(readiness) = readiness.take() {
        readiness.ready();
    }
    tracing::info!("sheepdog daemon (version {}) started", env!("CARGO_PKG_VERSION"));

    let code = wait_for_end(&sheep, signals, exited, &stop, nbd).await;
    tracing::info!("shutdown");
    remove_pidfile(pidfile);
    if let Some(store) = &sheep.store {
        store.drain().await;
        let _ = store.flush().await;
    }
    if code == 0 {
        let _ = tokio::time::timeout(HINT_DEADLINE, driver.end()).await;
    }
    Ok(code)
}

/// A disk is about to be lost: before anybody can be told that its objects are not here, this node stops claiming to know
/// what it had. Before the history is open nobody is told anything.
fn loss_handler(history: Arc<OnceLock<Arc<History>>>) -> Arc<dyn Fn() + Send + Sync> {
    Arc::new(move || {
        if let Some(history) = history.get() {
            history.lose();
        }
    })
}

/// A failed disk: the last one takes the node out of the cluster, any other one costs a round of recovery.
fn disk_failure_handler(handle: ClusterHandle) -> Arc<dyn Fn(DiskFailure) + Send + Sync> {
    Arc::new(move |failure| {
        tracing::error!("{} is out of service", failure.path.display());
        if failure.last {
            tracing::error!("no disks available, going down");
            handle.leave();
            handle.kill();
        } else {
            handle.send(Command::Rebuild);
        }
    })
}

fn my_id(options: &Options, driver: &dyn Driver) -> Result<NodeId, sheepdog_cluster::DriverError> {
    let ip = match options.my_addr {
        Some(ip) => ip,
        None => driver.local_addr()?,
    };
    let mut me = NodeId::new(ip, options.port);
    if let Some(io) = options.io_addr {
        me.io_addr = sheepdog_proto::node::addr_bytes(io.ip());
        me.io_port = io.port();
    }
    Ok(me)
}

/// Tasks that start when the daemon joins.
struct Parts {
    worker: Worker,
    queues: parking_lot::Mutex<Option<Queues>>,
}

struct Queues {
    work: worker::Queues,
    references: tokio::sync::mpsc::Receiver<reclaim::Pending>,
    rounds: tokio::sync::mpsc::UnboundedReceiver<crate::cluster::state::Round>,
}

impl Parts {
    fn spawn(&self, sheep: &Arc<Sheep>) {
        let Some(queues) = self.queues.lock().take() else { return };
        tokio::spawn(worker::run(sheep.clone(), self.worker.clone(), queues.work));
        tokio::spawn(reclaim::run(sheep.clone(), queues.references));
        tokio::spawn(disks::watch(sheep.clone()));
        tokio::spawn(numbers::run(sheep.clone()));
        tokio::spawn(recovery::run(sheep.clone(), self.worker.clone(), queues.rounds));
    }
}

fn assemble(
    options: &Options,
    meta: &Arc<MetaDir>,
    cluster: ClusterHandle,
    state: &State,
    opened: Option<start::OpenStore>,
    history: Arc<History>,
    early: EarlyWrites,
) -> (Parts, Arc<Sheep>) {
    let throttle = options.recovery.map(|r| RecoveryThrottling {
        max_exec_count: r.max,
        queue_work_interval: r.interval_ms,
        throttling: 1,
    });
    let (recovery, rounds) = Recovery::new(meta.path(), throttle.unwrap_or_default());
    let (reclaim, references) = Reclaim::new();
    let (worker, work) = Worker::new();
    let vdis = VdiTable::default();
    for (oid, header) in opened.iter().flat_map(|o| &o.report.inodes) {
        vdis.add_inode(header, oid.vid());
    }
    let sheep = Arc::new(Sheep {
        me: state.me.nid,
        views: Views::new(view_of(state)),
        gate: Gate::default(),
        intents: Intents::open(meta.path(), opened.as_ref().map(|o| &o.store)),
        store: opened.map(|o| o.store),
        meta: meta.clone(),
        vdis,
        peers: Peers::default(),
        gateway: Gateway::new(reclaim),
        cluster,
        recovery,
        holds: Holds::default(),
        history,
        early,
        tombstones: Tombstones::open(meta.path()),
        disks: Disks::default(),
        tables: watch::Sender::new(true),
        holders: Holders::default(),
        lock_grace: options.lock_grace,
        stats: Stats::default(),
        outstanding: Outstanding::default(),
    });
    let queues = parking_lot::Mutex::new(Some(Queues { work, references, rounds }));
    (Parts { worker, queues }, sheep)
}

/// Asks one present member whether this node fits its cluster, so that a stranger costs it no epoch (spec 04, 5.4).
async fn refusal_by_member(sheep: &Arc<Sheep>, driver: &dyn Driver, state: &State) -> Option<String> {
    for member in driver.members_hint().iter().filter(|m| m.nid != sheep.me) {
        let request = Request::new(Opcode::CLUSTER_INFO).length(sheepdog_proto::cluster::CLUSTER_INFO_LEN);
        let Ok(reply) = sheep.peers.call(&member.nid, request, bytes::Bytes::new(), HINT_DEADLINE).await
        else {
            continue;
        };
        let Ok(info) = ClusterInfo::decode(&reply.data) else { continue };
        return if info.header.epoch.0 == 0 { None } else { state.refusal(&info) };
    }
    None
}

struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    hang_up: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> std::io::Result<Signals> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }
}

/// Volumes served here are closed while the node can still release their locks.
async fn terminate(sheep: &Arc<Sheep>, nbd: crate::nbd::Running) {
    let _ = tokio::time::timeout(DRAIN, crate::nbd::stop(nbd)).await;
    sheep.cluster.kill();
}

fn new_signals() -> Result<Signals, String> {
    Signals::new().map_err(|e| format!("cannot handle signals: {e}"))
}

/// Told to end while it is starting, the daemon has nothing to hand over.
async fn end_before_join(mut signals: Signals) {
    tokio::select! {
        _ = signals.terminate.recv() => {}
        _ = signals.interrupt.recv() => {}
    }
    tracing::info!("told to end before it joined");
    std::process::exit(0);
}

/// Waits until a signal or an operator ends the daemon.
async fn told_to_end(sheep: &Arc<Sheep>, signals: &mut Signals) {
    loop {
        let view = sheep.views.load();
        if view.status == ClusterStatus::Killed {
            return;
        }
        tokio::select! {
            _ = signals.terminate.recv() => return,
            _ = signals.interrupt.recv() => return,
            _ = signals.hang_up.recv() => log::rotate(),
            _ = sheep.views.changed_from(&view) => {}
        }
    }
}

fn remove_pidfile(pidfile: Option<PidFile>) {
    if let Some(pidfile) = pidfile
        && let Err(error) = pidfile.remove()
    {
        tracing::warn!("cannot remove the pid file: {error}");
    }
}

/// Waits until the cluster, an operator or a signal ends the daemon and its requests are answered.
async fn wait_for_end(
    sheep: &Arc<Sheep>,
    mut signals: Signals,
    mut exited: watch::Receiver<Option<i32>>,
    stop: &watch::Sender<bool>,
    mut nbd: crate::nbd::Running,
) -> i32 {
    loop {
        let view = sheep.views.load();
        if matches!(view.status, ClusterStatus::Killed | ClusterStatus::Shutdown) {
            break;
        }
        tokio::select! {
            Ok(code) = exited.wait_for(Option::is_some) => return code.unwrap_or(1),
            _ = signals.terminate.recv() => terminate(sheep, nbd.take()).await,
            _ = signals.interrupt.recv() => terminate(sheep, nbd.take()).await,
            _ = signals.hang_up.recv() => log::rotate(),
            _ = sheep.views.changed_from(&view) => {}
        }
    }
    stop.send_replace(true);
    let _ = tokio::time::timeout(DRAIN, crate::nbd::stop(nbd)).await;
    if tokio::time::timeout(DRAIN, sheep.outstanding.none()).await.is_err() {
        tracing::warn!("requests are still in progress after {} s", DRAIN.as_secs());
    }
    0
}
