//! Who orders the writes of a VDI: this node, or the first home of each object (spec 06, 15.1 A4).
//!
//! Requests of one gateway are ordered by its own [`Order`]. So that requests of several gateways are, too, a gateway
//! claims a VDI from its *arbiter*, the first home of the inode, before it touches data objects. As long as no other
//! node uses the VDI (or all only read), it goes on *directly*, to all homes at once. When a second one comes, the
//! first gives its grant back, and both send each operation to the first home of its object, which executes it in its
//! own order. All of it ends with the epoch: homes execute no request of an old epoch after one of a new one.
//!
//! Snapshots do not change and need no grant. Inodes, attributes and other metadata are always written through their
//! first home. Nodes of the original know nothing of this: what they order or write is ordered as it was with them.
//!
//! [`Order`]: crate::order::Order

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use sheepdog_proto::header::{OrderRequest, order};
use sheepdog_proto::{Epoch, Flags, NodeId, Oid, Opcode, Request, ResultCode, VdiId, Wire};
use tokio::sync::{Mutex as AsyncMutex, Notify};
use tokio::time::Instant;

use super::replicas::Failure;
use crate::peers::Lane;
use crate::sheep::Sheep;
use crate::view::View;

/// A VDI that several gateways use is claimed anew after this long: perhaps the others have gone.
const RECLAIM: Duration = Duration::from_secs(3);
/// A gateway that has not touched a VDI for this long gives it back.
const IDLE: Duration = Duration::from_secs(1);
/// Deadline of a claim; above what giving back takes.
const CLAIM_DEADLINE: Duration = Duration::from_secs(5);
/// A read whose claim is not answered in this time goes on without: availability over order.
const READ_PATIENCE: Duration = Duration::from_secs(2);
/// Unused entries are dropped when there are more than this.
const KEPT: usize = 4096;

/// What a gateway may do with a VDI's data objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Mode {
    /// Nothing yet.
    None,
    /// Everything through the first homes.
    Through,
    /// Read directly.
    Read,
    /// Read and write directly.
    Write,
}

struct State {
    epoch: Epoch,
    mode: Mode,
    /// Grants up to this one, of this epoch, were called back.
    yielded: u32,
    direct: usize,
    through: usize,
    /// Claims on their way: the arbiter may have decided one whose answer is not here yet.
    claims: usize,
    used: Instant,
    claimed: Instant,
}

struct Vdi {
    state: Mutex<State>,
    /// Direct operations have ended.
    ended: Notify,
    claiming: AsyncMutex<()>,
}

/// This gateway's grants.
#[derive(Default)]
pub struct Grants {
    vdis: Mutex<HashMap<VdiId, Arc<Vdi>>>,
}

/// An operation in progress under a grant; it is over when this is dropped.
pub struct Using {
    vdi: Arc<Vdi>,
    direct: bool,
}

impl Drop for Using {
    fn drop(&mut self) {
        let mut state = self.vdi.state.lock();
        let count = if self.direct { &mut state.direct } else { &mut state.through };
        *count -= 1;
        if *count == 0 && self.direct {
            self.vdi.ended.notify_waiters();
        }
    }
}

/// A claim on its way; it is over when this is dropped.
struct Claiming(Arc<Vdi>);

impl Claiming {
    fn begin(vdi: &Arc<Vdi>) -> Claiming {
        vdi.state.lock().claims += 1;
        Claiming(vdi.clone())
    }
}

impl Drop for Claiming {
    fn drop(&mut self) {
        self.0.state.lock().claims -= 1;
    }
}

/// How an operation reaches its object.
pub enum Route {
    /// To all homes at once.
    Direct(Option<Using>),
    /// Through this node, the first home.
    Through(NodeId, Option<Using>),
}

/// What an arbiter says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// The claimant is alone, or all only read.
    pub direct: bool,
    /// Number of the grant.
    pub serial: u32,
}

impl Vdi {
    fn new() -> Arc<Vdi> {
        let now = Instant::now();
        let state = State {
            epoch: Epoch(0),
            mode: Mode::None,
            yielded: 0,
            direct: 0,
            through: 0,
            claims: 0,
            used: now,
            claimed: now,
        };
        Arc::new(Vdi { state: Mutex::new(state), ended: Notify::new(), claiming: AsyncMutex::default() })
    }

    /// Begins an operation if what was granted suffices.
    fn begin(self: &Arc<Self>, epoch: Epoch, write: bool) -> Option<Using> {
        let mut state = self.state.lock();
        if state.epoch != epoch {
            return None;
        }
        let now = Instant::now();
        let direct = match state.mode {
            Mode::Write => true,
            Mode::Read if !write => true,
            Mode::Through if now.duration_since(state.claimed) < RECLAIM => false,
            _ => return None,
        };
        state.used = now;
        *(if direct { &mut state.direct } else { &mut state.through }) += 1;
        Some(Using { vdi: self.clone(), direct })
    }

    fn granted(&self, epoch: Epoch, write: bool, verdict: Verdict) {
        let mut state = self.state.lock();
        if epoch.is_before(state.epoch) {
            return;
        }
        if state.epoch != epoch {
            (state.epoch, state.yielded) = (epoch, 0);
        }
        let mode = match (verdict.direct && verdict.serial > state.yielded, write) {
            (false, _) => Mode::Through,
            (true, true) => Mode::Write,
            (true, false) => Mode::Read,
        };
        (state.mode, state.claimed) = (mode, Instant::now());
    }
}

impl Grants {
    fn vdi(&self, vid: VdiId) -> Arc<Vdi> {
        let mut vdis = self.vdis.lock();
        if let Some(vdi) = vdis.get(&vid) {
            return vdi.clone();
        }
        if vdis.len() >= KEPT {
            vdis.retain(|_, vdi| Arc::strong_count(vdi) > 1 || vdi.state.lock().mode != Mode::None);
        }
        vdis.entry(vid).or_insert_with(Vdi::new).clone()
    }

    /// Forgets every grant: epochs begin anew (MAKE_FS).
    pub fn clear(&self) {
        self.vdis.lock().clear();
    }

    /// A direct operation, if it is granted already.
    pub fn begin_directly(&self, vid: VdiId, epoch: Epoch, write: bool) -> Option<Using> {
        let vdi = self.vdis.lock().get(&vid)?.clone();
        vdi.begin(epoch, write).filter(|using| using.direct)
    }

    /// How an operation on `oid` goes in the epoch of `view`; asks the arbiter if that is not settled yet.
    pub async fn route(
        &self,
        sheep: &Arc<Sheep>,
        view: &View,
        oid: Oid,
        write: bool,
    ) -> Result<Route, Failure> {
        let first = first_home(view, oid).ok_or(ResultCode::WAIT_FOR_JOIN)?;
        if !oid.follows_policy() {
            return Ok(if write { Route::Through(first, None) } else { Route::Direct(None) });
        }
        let vid = oid.vid();
        if !write && sheep.redundancy(vid, view).snapshot {
            return Ok(Route::Direct(None));
        }
        let vdi = self.vdi(vid);
        if let Some(using) = vdi.begin(view.epoch, write) {
            return Ok(Vdi::route(using, first));
        }
        let claim = async {
            // One claim at a time; whoever waited finds its outcome.
            let _alone = vdi.claiming.lock().await;
            if let Some(using) = vdi.begin(view.epoch, write) {
                return Ok::<_, Failure>(Some(using));
            }
            let _claiming = Claiming::begin(&vdi);
            let Some(verdict) = claim(sheep, view, vid, write).await? else { return Ok(None) };
            vdi.granted(view.epoch, write, verdict);
            Ok(vdi.begin(view.epoch, write))
        };
        let patience = if write { Duration::MAX } else { READ_PATIENCE };
        match tokio::time::timeout(patience, claim).await {
            Ok(Ok(Some(using))) => Ok(Vdi::route(using, first)),
            Ok(Ok(None)) if sheep.views.epoch() != view.epoch => Err(ResultCode::OLD_NODE_VER.into()),
            Ok(Ok(None)) => Ok(Route::Direct(None)),
            Ok(Err(failure)) if write || failure.code != ResultCode::NETWORK_ERROR => Err(failure),
            Ok(Err(_)) | Err(_) => Ok(Route::Direct(None)),
        }
    }

    /// The arbiter calls grants up to `serial` back. Returns once direct operations have ended; `true` = this gateway
    /// does not use the VDI any more.
    pub async fn give_back(&self, vid: VdiId, epoch: Epoch, serial: u32) -> bool {
        let vdi = self.vdi(vid);
        loop {
            let ended = vdi.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            {
                let mut state = vdi.state.lock();
                if epoch.is_before(state.epoch) {
                    return true; // what it was granted then is over
                }
                if state.epoch != epoch {
                    (state.epoch, state.mode, state.yielded) = (epoch, Mode::None, 0);
                }
                state.yielded = state.yielded.max(serial);
                let busy = state.direct > 0 || state.through > 0 || state.claims > 0;
                if !busy && (state.mode == Mode::None || state.used.elapsed() >= IDLE) {
                    state.mode = Mode::None;
                    return true;
                }
                if state.mode > Mode::Through {
                    (state.mode, state.claimed) = (Mode::Through, Instant::now());
                }
                if state.direct == 0 {
                    return false;
                }
            }
            ended.await;
        }
    }
}

impl Vdi {
    fn route(using: Using, first: NodeId) -> Route {
        if using.direct { Route::Direct(Some(using)) } else { Route::Through(first, Some(using)) }
    }
}

/// The node that executes operations on `oid` for all gateways.
pub fn first_home(view: &View, oid: Oid) -> Option<NodeId> {
    view.ring.nodes_of(oid, 1).next().map(|n| n.nid)
}

/// Asks the arbiter. `None` = it is a node of the original, which grants nothing and refuses nothing.
async fn claim(sheep: &Arc<Sheep>, view: &View, vid: VdiId, write: bool) -> Result<Option<Verdict>, Failure> {
    let arbiter = first_home(view, Oid::inode(vid)).ok_or(ResultCode::WAIT_FOR_JOIN)?;
    if arbiter == sheep.me {
        return Ok(Some(sheep.gateway.arbiter.claim(sheep, sheep.me, vid, write, view.epoch).await?));
    }
    let body = OrderRequest {
        oid: Oid::inode(vid),
        what: order::CLAIM,
        kind: write.into(),
        ..OrderRequest::zeroed()
    };
    let request = Request::new(Opcode::ORDER_PEER).flag(Flags::WRITE).epoch(view.epoch).with_order(body);
    let me = Bytes::from(sheep.me.encode());
    match sheep.peers.call_on(Lane::Control, &arbiter, request, me, CLAIM_DEADLINE).await {
        Ok(reply) if reply.response.result.is_ok() => {
            let answer = reply.response.order();
            Ok(Some(Verdict { direct: answer.verdict == 1, serial: answer.serial }))
        }
        Ok(reply) if reply.response.result == ResultCode::INVALID_PARMS => Ok(None),
        Ok(reply) => Err(Failure { code: reply.response.result, peer_epoch: reply.response.epoch }),
        Err(_) => Err(ResultCode::NETWORK_ERROR.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vid() -> VdiId {
        VdiId::new(7)
    }

    const E: Epoch = Epoch(3);

    fn verdict(direct: bool, serial: u32) -> Verdict {
        Verdict { direct, serial }
    }

    #[tokio::test(start_paused = true)]
    async fn a_grant_called_back_waits_for_direct_operations() {
        let grants = Arc::new(Grants::default());
        let vdi = grants.vdi(vid());
        assert!(vdi.begin(E, false).is_none(), "nothing is granted at first");
        vdi.granted(E, true, verdict(true, 1));
        let using = grants.begin_directly(vid(), E, true).expect("granted");
        let giving = tokio::spawn({
            let grants = grants.clone();
            async move { grants.give_back(vid(), E, 1).await }
        });
        tokio::task::yield_now().await;
        assert!(!giving.is_finished(), "an operation is in progress");
        assert!(grants.begin_directly(vid(), E, false).is_none(), "nothing begins directly any more");
        drop(using);
        assert!(!giving.await.expect("ends"), "this gateway is busy: it goes through the first homes");
        assert!(vdi.begin(E, true).is_some_and(|u| !u.direct));
    }

    #[tokio::test(start_paused = true)]
    async fn a_grant_that_comes_after_its_call_back_is_void() {
        let grants = Grants::default();
        let vdi = grants.vdi(vid());
        grants.give_back(vid(), E, 4).await;
        vdi.granted(E, true, verdict(true, 4));
        assert!(grants.begin_directly(vid(), E, false).is_none());
        vdi.granted(E, true, verdict(true, 5));
        assert!(grants.begin_directly(vid(), E, true).is_some());
    }

    /// Two gateways begin at once: the arbiter decides for this one, and calls that back for the other one before its answer
    /// is here. What then arrives lets it go on through the first homes, so the other one must not believe to be alone.
    #[tokio::test(start_paused = true)]
    async fn a_gateway_whose_claim_is_on_its_way_uses_the_vdi() {
        let grants = Grants::default();
        let vdi = grants.vdi(vid());
        let claiming = Claiming::begin(&vdi);
        assert!(!grants.give_back(vid(), E, 1).await, "the answer is still to come");
        vdi.granted(E, true, verdict(true, 1));
        drop(claiming);
        assert!(vdi.begin(E, true).is_some_and(|using| !using.direct));
        tokio::time::advance(IDLE).await;
        assert!(grants.give_back(vid(), E, 2).await, "and did not come");
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_gateway_gives_back_all_and_epochs_end_grants() {
        let grants = Grants::default();
        let vdi = grants.vdi(vid());
        vdi.granted(E, false, verdict(true, 1));
        assert!(grants.begin_directly(vid(), E, true).is_none(), "only reading was granted");
        drop(grants.begin_directly(vid(), E, false).expect("granted"));
        assert!(!grants.give_back(vid(), E, 1).await, "used a moment ago");
        tokio::time::advance(IDLE).await;
        assert!(grants.give_back(vid(), E, 2).await);
        vdi.granted(E, false, verdict(true, 3));
        assert!(grants.begin_directly(vid(), Epoch(4), false).is_none(), "another epoch");
    }
}
