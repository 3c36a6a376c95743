//! Clients that hold locks taken through this node, and the release of those whose client has failed (spec 05, 16; 01, 17.4).
//!
//! QEMU and tgt lock over a connection that they close at once; reconnecting, they do not lock again. So a closed connection
//! says nothing. What does:
//!
//! - *The process that locked has ended*, known by the Unix socket it came over. It cannot come back. Its lock is released
//!   when everything that it sent has been executed, and no other client that used the VDI since is left: another process
//!   (a wrapper may have locked for it), or an open connection.
//! - With `--lock-grace`, of clients that cannot be watched (TCP, other pid namespaces): *no connection that used the VDI*
//!   was open for so long. Such a client may come back. Then [`Holders::refuses`] keeps it from writing beside the next holder.
//!
//! A holder that was never seen to use the VDI keeps it: it may have locked for somebody who goes another way.
//!
//! The release is RELEASE_VDI of this node, in the order of cluster events. LOCK_VDI through this node and releases exclude each
//! other, so that a release meets the lock that it is meant for.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use sheepdog_client::Reply;
use sheepdog_proto::header::VdiRequest;
use sheepdog_proto::{ClusterFlags, ClusterStatus, Flags, Opcode, Request, ResultCode, VdiId, Wire};
use tokio::sync::{Notify, RwLock};
use tokio::time::Instant;

use super::locks::{Lock, TYPE_NORMAL};
use crate::clients::{Client, Origin, Process, Processes};
use crate::sheep::Sheep;

/// How long LOCK_VDI waits for what a holder that has ended sent to be executed.
const DRAIN: Duration = Duration::from_secs(2);
/// A release that failed is tried again after this.
const AGAIN: Duration = Duration::from_secs(1);
/// How often a write that waits for the lock states of the others looks for them.
const COLLECTING_CHECK: Duration = Duration::from_millis(10);
/// VDIs that a client is noted for; more are looked up with every request.
const NOTED: usize = 64;

/// A lock taken through this node.
struct Held {
    serial: u64,
    /// `type` of LOCK_VDI.
    kind: u32,
    holder: Origin,
    /// The holder has used the VDI, or never learned that it has it.
    used: bool,
    /// Open connections that used the VDI.
    open: HashSet<u64>,
    /// Other processes that did.
    others: Vec<Arc<Process>>,
    /// When there was a connection last.
    left: Instant,
    /// A task waits for the end of the grace.
    timed: bool,
}

/// What is to be done about a lock.
#[derive(Debug, PartialEq, Eq)]
enum Judgement {
    /// Its client may be alive.
    Keep,
    /// It is to be released.
    Release,
    /// It is to be released then, if nobody comes back.
    At(Instant),
}

impl Held {
    fn new(serial: u64, kind: u32, holder: Origin, now: Instant) -> Held {
        let used = matches!(&holder, Origin::Process(process) if process.has_ended());
        Held { serial, kind, holder, used, open: HashSet::new(), others: Vec::new(), left: now, timed: false }
    }

    /// A client uses the VDI. Gives the process whose end matters from now on.
    fn touch(&mut self, client: u64, origin: &Origin) -> Option<Arc<Process>> {
        self.open.insert(client);
        if *origin == self.holder {
            self.used = true;
            return None;
        }
        let Origin::Process(process) = origin else { return None };
        if self.others.iter().any(|other| Arc::ptr_eq(other, process)) {
            return None;
        }
        self.others.retain(|other| !other.is_gone());
        self.others.push(process.clone());
        Some(process.clone())
    }

    fn close(&mut self, client: u64, now: Instant) {
        if self.open.remove(&client) {
            self.left = now;
        }
    }

    /// Whether all that is waited for is what dead processes sent.
    fn is_draining(&self) -> bool {
        let Origin::Process(holder) = &self.holder else { return false };
        holder.has_ended()
            && self.others.iter().all(|other| other.has_ended())
            && !(holder.is_gone() && self.others.iter().all(|other| other.is_gone()))
    }

    fn judge(&self, grace: Option<Duration>, now: Instant) -> Judgement {
        if !self.used || !self.open.is_empty() || self.others.iter().any(|other| !other.is_gone()) {
            return Judgement::Keep;
        }
        match (&self.holder, grace) {
            (Origin::Process(process), _) if process.is_gone() => Judgement::Release,
            (Origin::Address(_) | Origin::Unknown, Some(grace)) if now < self.left + grace => {
                Judgement::At(self.left + grace)
            }
            (Origin::Address(_) | Origin::Unknown, Some(_)) => Judgement::Release,
            _ => Judgement::Keep,
        }
    }
}

#[derive(Default)]
struct State {
    held: HashMap<VdiId, Held>,
    /// VDIs whose holder was given up although it may come back, however late.
    given_up: HashSet<VdiId>,
}

/// See the module's documentation.
#[derive(Default)]
pub struct Holders {
    /// Processes of clients.
    pub processes: Processes,
    state: Mutex<State>,
    /// Locks granted through this node so far.
    grants: AtomicU64,
    /// Shared by those who lock, exclusive for releases.
    order: RwLock<()>,
    /// Something ended.
    changed: Notify,
}

impl Holders {
    /// A client uses a VDI.
    pub fn touch(&self, sheep: &Arc<Sheep>, client: &Client, vid: VdiId) {
        let grants = self.grants.load(Ordering::Acquire);
        if grants == 0 || matches!(client.origin, Origin::Daemon) {
            return;
        }
        {
            let mut noted = client.noted.lock();
            if noted.0 != grants {
                *noted = (grants, Vec::new());
            }
            if noted.1.contains(&vid) {
                return;
            }
            if noted.1.len() < NOTED {
                noted.1.push(vid);
            }
        }
        let mut state = self.state.lock();
        let key = match state.held.contains_key(&vid) {
            true => Some(vid),
            // A snapshot took the lock along.
            false => state.held.keys().copied().find(|key| sheep.vdis.lock_of(*key, sheep.me) == vid),
        };
        let Some(held) = key.and_then(|key| state.held.get_mut(&key)) else { return };
        if let Some(process) = held.touch(client.id, &client.origin) {
            watch(sheep, process);
        }
    }

    /// Whether a client may not write to a VDI because somebody else holds it. Only with `--lock-grace`: who was given up may
    /// come back, here or at another node, and knows nothing of it.
    pub async fn refuses(&self, sheep: &Sheep, client: &Client, vid: VdiId, flags: Flags) -> bool {
        if sheep.lock_grace.is_none() {
            return false;
        }
        // A node that has just joined, perhaps the one that was given up, is still learning who holds what.
        while sheep.vdis.is_collecting() && sheep.views.load().status != ClusterStatus::Killed {
            tokio::time::sleep(COLLECTING_CHECK).await;
        }
        match sheep.vdis.with_lock(vid, |lock| lock.clone()) {
            Some(Lock::Locked(owner)) if owner != sheep.me => true,
            Some(Lock::Locked(_)) => {
                let state = self.state.lock();
                state.given_up.contains(&vid)
                    && state.held.get(&vid).is_some_and(|held| held.holder != client.origin)
            }
            Some(lock @ Lock::Shared(_)) => {
                flags.contains(Flags::TGT) && lock.participation(sheep.me).is_none()
            }
            Some(Lock::Unlocked) | None => false,
        }
    }

    fn judge(&self, sheep: &Sheep, vid: VdiId, serial: u64) -> Judgement {
        let state = self.state.lock();
        match state.held.get(&vid).filter(|held| held.serial == serial) {
            Some(held) => held.judge(sheep.lock_grace, Instant::now()),
            None => Judgement::Keep,
        }
    }

    fn grant(&self, sheep: &Arc<Sheep>, client: &Client, vid: VdiId, kind: u32) {
        let mut state = self.state.lock();
        let serial = self.grants.load(Ordering::Acquire) + 1;
        state.held.insert(vid, Held::new(serial, kind, client.origin.clone(), Instant::now()));
        self.grants.store(serial, Ordering::Release);
        drop(state);
        if let Origin::Process(process) = &client.origin {
            watch(sheep, process.clone());
        }
    }

    /// Releases what ended processes held, as far as that is decided already or about to be.
    async fn settle(&self, sheep: &Arc<Sheep>) {
        let end = Instant::now() + DRAIN;
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let (mut over, mut draining) = (Vec::new(), false);
            for (vid, held) in &self.state.lock().held {
                match (&held.holder, held.judge(None, Instant::now())) {
                    (Origin::Process(_), Judgement::Release) => over.push((*vid, held.serial)),
                    _ => draining |= held.is_draining(),
                }
            }
            for (vid, serial) in &over {
                if !release(sheep, *vid, *serial).await {
                    return; // it is tried again elsewhere
                }
            }
            if over.is_empty() && !draining || Instant::now() >= end {
                return;
            }
            if over.is_empty() {
                let _ = tokio::time::timeout_at(end, changed).await;
            }
        }
    }
}

/// LOCK_VDI of a client.
pub async fn lock(sheep: &Arc<Sheep>, client: &Client, request: Request, payload: Bytes) -> Reply {
    let holders = &sheep.holders;
    if !sheep.views.load().flags.contains(ClusterFlags::USE_LOCK) {
        return sheep.cluster.submit(request, payload).await;
    }
    // Whoever follows a client that has just died need not wait for us to notice.
    holders.settle(sheep).await;
    let _order = holders.order.read().await;
    let reply = sheep.cluster.submit(request, payload).await;
    if reply.response.result.is_ok() {
        holders.grant(sheep, client, reply.response.vdi().vdi_id, request.vdi().lock_type);
    }
    reply
}

/// A client has closed its connection, and its requests are executed.
pub fn closed(sheep: &Arc<Sheep>, client: &Client) {
    let holders = &sheep.holders;
    if holders.grants.load(Ordering::Acquire) == 0 {
        return;
    }
    let now = Instant::now();
    holders.state.lock().held.values_mut().for_each(|held| held.close(client.id, now));
    check_all(sheep, now);
}

/// Something ended: whatever is due now, or will be, is seen to.
fn check_all(sheep: &Arc<Sheep>, now: Instant) {
    let holders = &sheep.holders;
    let mut concerned = Vec::new();
    for (vid, held) in &holders.state.lock().held {
        if held.judge(sheep.lock_grace, now) != Judgement::Keep {
            concerned.push((*vid, held.serial));
        }
    }
    holders.changed.notify_waiters();
    for (vid, serial) in concerned {
        spawn(check(sheep.clone(), vid, serial));
    }
}

/// The daemon's end drops clients outside of its runtime.
fn spawn(task: impl Future<Output = ()> + Send + 'static) {
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        runtime.spawn(task);
    }
}

fn watch(sheep: &Arc<Sheep>, process: Arc<Process>) {
    if !process.begin_watch() {
        return;
    }
    let sheep = sheep.clone();
    spawn(async move {
        process.ended().await;
        check_all(&sheep, Instant::now());
    });
}

/// Releases a lock if that is due, now or after the grace.
async fn check(sheep: Arc<Sheep>, vid: VdiId, serial: u64) {
    loop {
        match sheep.holders.judge(&sheep, vid, serial) {
            Judgement::Keep => return,
            Judgement::Release if release(&sheep, vid, serial).await => return,
            Judgement::Release => tokio::time::sleep(AGAIN).await,
            Judgement::At(end) => {
                let timed = |timed: bool| {
                    let mut state = sheep.holders.state.lock();
                    let held = state.held.get_mut(&vid).filter(|held| held.serial == serial);
                    held.is_some_and(|held| std::mem::replace(&mut held.timed, timed) != timed)
                };
                if !timed(true) {
                    return; // another task waits
                }
                tokio::time::sleep_until(end).await;
                timed(false);
            }
        }
    }
}

/// Releases the lock, if it still is what it was. `false` = try again.
async fn release(sheep: &Arc<Sheep>, vid: VdiId, serial: u64) -> bool {
    let holders = &sheep.holders;
    let _order = holders.order.write().await;
    if holders.judge(sheep, vid, serial) != Judgement::Release {
        return true;
    }
    let (kind, holder) = match holders.state.lock().held.get(&vid) {
        Some(held) => (held.kind, held.holder.clone()),
        None => return true,
    };
    let view = sheep.views.load();
    if sheep.vdis.is_collecting() || view.status == ClusterStatus::Wait {
        return false;
    }
    let at = if kind == TYPE_NORMAL { sheep.vdis.lock_of(vid, sheep.me) } else { vid };
    let is_mine = sheep.vdis.with_lock(at, |lock| match kind {
        TYPE_NORMAL => *lock == Lock::Locked(sheep.me),
        _ => lock.participation(sheep.me).is_some(),
    });
    // Released by the client itself, or by an administrator; or this node was away and lost its part.
    if is_mine != Some(true) || view.status != ClusterStatus::Ok {
        holders.state.lock().held.remove(&vid);
        return true;
    }
    let body = VdiRequest { base_vdi_id: at, lock_type: kind, ..VdiRequest::zeroed() };
    // With the owner's id nobody else loses a lock taken meanwhile.
    let owner = if kind == TYPE_NORMAL { Bytes::from(sheep.me.encode()) } else { Bytes::new() };
    let request = Request::new(Opcode::RELEASE_VDI).length(owner.len()).with_vdi(body);
    let request = if owner.is_empty() { request } else { request.flag(Flags::WRITE) };
    let code = sheep.cluster.submit_internal(request, owner).await.response.result;
    if code != ResultCode::SUCCESS {
        tracing::error!("cannot release the lock of {at:?}: {code}");
        return false;
    }
    let mut state = holders.state.lock();
    state.held.remove(&vid);
    match holder {
        Origin::Process(process) => {
            tracing::warn!("released the lock of {at:?}: process {}, which held it, has ended", process.pid);
        }
        _ => {
            state.given_up.insert(at);
            tracing::warn!(
                "released the lock of {at:?}: whoever held it had no connection for {} s",
                sheep.lock_grace.unwrap_or_default().as_secs()
            );
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;
    use crate::clients::tests::Waiting;

    const GRACE: Option<Duration> = Some(Duration::from_secs(30));

    fn address() -> Origin {
        Origin::Address(IpAddr::V4(Ipv4Addr::LOCALHOST))
    }

    fn held_by(holder: Origin) -> Held {
        Held::new(1, TYPE_NORMAL, holder, Instant::now())
    }

    #[tokio::test]
    async fn a_process_keeps_its_lock_while_it_lives_connected_or_not() {
        let mut qemu = Waiting::start();
        let origin = Origin::Process(qemu.process.clone());
        let mut held = held_by(origin.clone());
        held.touch(1, &origin);
        held.close(1, Instant::now());
        let later = Instant::now() + Duration::from_secs(3600);
        assert_eq!(held.judge(GRACE, later), Judgement::Keep, "it may reconnect");
        qemu.connect();
        qemu.end();
        assert_eq!(held.judge(None, later), Judgement::Keep, "what it sent is still being executed");
        assert!(held.is_draining());
        qemu.disconnect();
        assert_eq!(held.judge(None, later), Judgement::Release);
    }

    #[tokio::test]
    async fn whoever_else_uses_the_vdi_keeps_the_lock_of_a_dead_process() {
        let (mut wrapper, mut worker) = (Waiting::start(), Waiting::start());
        let origin = Origin::Process(wrapper.process.clone());
        let mut held = held_by(origin.clone());
        held.touch(1, &origin);
        held.close(1, Instant::now());
        assert!(held.touch(2, &Origin::Process(worker.process.clone())).is_some(), "its end matters");
        held.close(2, Instant::now());
        held.touch(3, &address());
        wrapper.end();
        assert_eq!(held.judge(None, Instant::now()), Judgement::Keep);
        held.close(3, Instant::now());
        assert_eq!(held.judge(None, Instant::now()), Judgement::Keep, "the worker may reconnect");
        assert!(!held.is_draining());
        worker.end();
        assert_eq!(held.judge(None, Instant::now()), Judgement::Release);
    }

    #[tokio::test]
    async fn a_process_that_only_locked_keeps_the_lock_unless_it_never_learned_of_it() {
        let mut tool = Waiting::start();
        let held = held_by(Origin::Process(tool.process.clone()));
        tool.end();
        assert_eq!(held.judge(GRACE, Instant::now()), Judgement::Keep);
        assert_eq!(
            held_by(Origin::Process(tool.process.clone())).judge(None, Instant::now()),
            Judgement::Release
        );
    }

    #[tokio::test]
    async fn who_cannot_be_watched_is_given_up_after_the_grace_and_only_then() {
        for holder in [address(), Origin::Unknown] {
            let mut held = held_by(holder.clone());
            let start = Instant::now();
            assert_eq!(
                held.judge(GRACE, start + Duration::from_secs(99)),
                Judgement::Keep,
                "it used nothing"
            );
            held.touch(1, &holder);
            held.touch(2, &holder);
            held.close(1, start);
            assert_eq!(held.judge(GRACE, start + Duration::from_secs(99)), Judgement::Keep, "connected");
            held.close(2, start + Duration::from_secs(1));
            let end = start + Duration::from_secs(31);
            assert_eq!(held.judge(None, end), Judgement::Keep, "without the option");
            assert_eq!(held.judge(GRACE, start + Duration::from_secs(30)), Judgement::At(end));
            assert_eq!(held.judge(GRACE, end), Judgement::Release);
            held.touch(3, &holder);
            assert_eq!(held.judge(GRACE, end), Judgement::Keep, "it came back");
        }
        let mut own = held_by(Origin::Daemon);
        own.touch(1, &Origin::Daemon);
        own.close(1, Instant::now());
        assert_eq!(own.judge(GRACE, Instant::now() + Duration::from_secs(99)), Judgement::Keep);
    }
}
