//! Peer operations: one replica on this node's disks, fenced by the epoch (spec 06, sections 3.4 and 7).
//!
//! The same functions serve requests of other sheep and this node's own replica, which a gateway reaches without a
//! socket. A request of an older epoch is refused, one of a newer epoch waits, one whose object is still to be
//! recovered here waits for that (creates are complete in themselves and do not; writes of part of it are logged until then:
//! [`crate::recovery::early`]).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sheepdog_client::Reply;
use sheepdog_proto::header::ObjRequest;
use sheepdog_proto::{ClusterStatus, Epoch, Flags, Oid, Opcode, Request, Response, ResultCode};
use sheepdog_store::StoreError;

use crate::faults::unnoted;
use crate::gate::{Pass, Refused};
use crate::gateway::object::is_coded;
use crate::intents::{LeftOut, WriteId, before_open_writes, regions_of};
use crate::ops::order::is_settling;
use crate::recovery::early::{self, Taken};
use crate::recovery::lacking;
use crate::sheep::Sheep;
use crate::vdi::reclaim;
use crate::view::View;

/// How long a request may wait for an epoch or for the recovery of its object.
const PARK_LIMIT: Duration = Duration::from_secs(10);
/// How often a question that waits for recovery looks whether recovery found out that there is nothing to recover.
const FRUITLESS_CHECK: Duration = Duration::from_millis(500);
/// How often a write that waits for the lease looks at it.
const LEASE_CHECK: Duration = Duration::from_millis(50);

fn failed(request: &Request, result: ResultCode) -> Reply {
    Reply::empty(Response::to(request, result))
}

/// Waits until a request of `epoch` may run: `Err` = refused because the epoch is over.
async fn admit(sheep: &Arc<Sheep>, request: &Request, oid: Oid) -> Result<Arc<View>, ResultCode> {
    // Whoever waits longer is told to try again: its place and memory are needed by others.
    tokio::time::timeout(PARK_LIMIT, admit_when_ready(sheep, request, oid, false))
        .await
        .unwrap_or(Err(ResultCode::NETWORK_ERROR))
}

/// `early`: it need not wait for the recovery of its object where that can be done without.
async fn admit_when_ready(
    sheep: &Arc<Sheep>,
    request: &Request,
    oid: Oid,
    early: bool,
) -> Result<Arc<View>, ResultCode> {
    loop {
        let view = sheep.views.load();
        if view.status == ClusterStatus::Killed && !is_settling(request) {
            return Err(ResultCode::KILLED);
        }
        if request.epoch.is_before(view.epoch) {
            tracing::debug!("old node version {}, {} ({})", view.epoch, request.epoch, request.opcode);
            return Err(ResultCode::OLD_NODE_VER);
        }
        if view.epoch.is_before(request.epoch) {
            tracing::debug!("new node version {}, {} ({})", view.epoch, request.epoch, request.opcode);
            sheep.views.changed_from(&view).await;
            continue;
        }
        sheep.tables_arrived().await;
        let recovering = request.flags.contains(Flags::RECOVERY);
        if sheep.intents.is_unsettled(oid) {
            // What an interrupted write left is not seen before all homes agree, and strips are not touched.
            let coded = is_coded(oid, &sheep.redundancy(oid.vid(), &view));
            // Reads that belong to a write go on: settling waits for that write.
            let reading = request.opcode == Opcode::READ_PEER && request.obj().write_seq == 0;
            // A removal ends what is in doubt, which may wait for homes that never return.
            let touching = coded && request.opcode != Opcode::REMOVE_PEER;
            if touching || (reading && !recovering) {
                tokio::select! {
                    () = sheep.intents.wait(oid) => {}
                    _ = sheep.views.changed_from(&view) => {}
                }
                continue;
            }
        }
        let creates = request.opcode == Opcode::CREATE_AND_WRITE_PEER;
        let exempt = recovering
            || creates && !sheep.early.has_of(oid, view.epoch)
            || early && sheep.recovery.takes_early(sheep, oid, &view);
        let is_ready = {
            let ready = async { exempt || sheep.recovery.ready(sheep, oid, &view).await };
            match asks_whether_there(request) {
                true if sheep.recovery.is_fruitless(oid) => true,
                true => tokio::time::timeout(FRUITLESS_CHECK, ready).await == Ok(true),
                false => ready.await,
            }
        };
        if is_ready {
            return Ok(view);
        }
    }
}

/// Whether a gateway asks if the object is there at all.
fn asks_whether_there(request: &Request) -> bool {
    request.opcode == Opcode::READ_PEER
        && !request.flags.contains(Flags::RECOVERY)
        && request.obj().alters == 1
}

/// As [`admit`], and additionally holds the epoch until the pass is dropped.
async fn admit_write(
    sheep: &Arc<Sheep>,
    request: &Request,
    oid: Oid,
    wanted: Wanted<'_>,
    early: bool,
) -> Result<(Arc<View>, Pass), ResultCode> {
    tokio::time::timeout(PARK_LIMIT, admit_write_when_ready(sheep, request, oid, wanted, early))
        .await
        .unwrap_or(Err(ResultCode::NETWORK_ERROR))
}

async fn admit_write_when_ready(
    sheep: &Arc<Sheep>,
    request: &Request,
    oid: Oid,
    wanted: Wanted<'_>,
    early: bool,
) -> Result<(Arc<View>, Pass), ResultCode> {
    loop {
        let view = admit_when_ready(sheep, request, oid, early).await?;
        match sheep.gate.enter_to_acknowledge(request.epoch, alters_of(request)) {
            // In this order: whoever holds an object waits for the passes given out before. A gateway that gave up
            // meanwhile has sent the request again, and newer ones after it.
            Ok(pass) if !sheep.holds.is_held(oid) => {
                return if wanted() { Ok((view, pass)) } else { Err(ResultCode::NETWORK_ERROR) };
            }
            Ok(pass) => {
                drop(pass);
                sheep.holds.released(oid).await;
            }
            // The gate closes shortly before the view changes. An ended lease may be renewed without a change.
            Err(Refused::Later) => {
                let _ = tokio::time::timeout(LEASE_CHECK, sheep.views.changed_from(&view)).await;
            }
            Err(Refused::Over) => return Err(ResultCode::OLD_NODE_VER),
        }
    }
}

/// How often its gateway knew copies to have been altered when it sent a write; the original does not tell.
fn alters_of(request: &Request) -> Option<u8> {
    if request.opcode == Opcode::DECREF_PEER {
        return None; // carries no such number
    }
    let body = request.obj();
    (write_id(&body).writer != 0).then_some(body.alters)
}

/// Whether whoever sent a request still waits for its answer.
pub type Wanted<'a> = &'a (dyn Fn() -> bool + Send + Sync);

/// Executes a peer request.
pub async fn execute(sheep: &Arc<Sheep>, request: Request, payload: Bytes, wanted: Wanted<'_>) -> Reply {
    let _active = sheep.stats.peer(&request);
    let outcome = match request.opcode {
        Opcode::READ_PEER => return read(sheep, &request).await,
        Opcode::WRITE_PEER | Opcode::CREATE_AND_WRITE_PEER => {
            match write(sheep, &request, payload, wanted).await {
                Ok(Written::Early) => {
                    let response = Response::to(&request, ResultCode::SUCCESS);
                    return Reply::empty(early::mark(response));
                }
                other => other.map(drop),
            }
        }
        Opcode::REMOVE_PEER => remove(sheep, &request, wanted).await,
        Opcode::DECREF_PEER => decref(sheep, &request, wanted).await,
        _ => Err(ResultCode::INVALID_PARMS),
    };
    failed(&request, outcome.err().unwrap_or(ResultCode::SUCCESS))
}

/// Whether it may be said that a write succeeded: not if meanwhile others may have gone on without this node. It is then
/// repeated, here or where the object has its home by then. Ends the pass, and not before: as long as one is out, a node
/// that lost its session does not join again and gets no other lease.
fn acknowledge(sheep: &Sheep, pass: Pass) -> Result<(), ResultCode> {
    let is_fresh = sheep.gate.is_fresh();
    drop(pass);
    if is_fresh { Ok(()) } else { Err(ResultCode::NETWORK_ERROR) }
}

/// A write that needs no waiting goes to the store at once, and `done` gets its answer on the store's thread: no task,
/// no wake-up in between. Anything else is given back.
pub fn try_write<F>(sheep: &Arc<Sheep>, request: &Request, payload: Bytes, done: F) -> Result<(), (Bytes, F)>
where
    F: FnOnce(Reply) + Send + 'static,
{
    let body = request.obj();
    let view = sheep.views.load();
    let plain = request.flags.contains(Flags::WRITE)
        && view.status == ClusterStatus::Ok
        && request.epoch == view.epoch
        && sheep.recovery.is_idle()
        && sheep.intents.all_settled()
        && sheep.tables_are_here();
    let Some(store) = sheep.store.as_ref().filter(|_| plain) else { return Err((payload, done)) };
    let (replica, size) = sheep.named_replica(body.oid, body.ec_index, &view);
    if check_range(body.offset.into(), payload.len() as u64, size).is_err() {
        return Err((payload, done));
    }
    // What a strip's write replaces is read first.
    if replica.strip.is_some() || is_misnamed(sheep, &body, &view) {
        return Err((payload, done));
    }
    let entered = sheep.gate.enter_to_acknowledge(request.epoch, alters_of(request));
    let Some(pass) = entered.ok().filter(|_| sheep.holds.is_free()) else {
        return Err((payload, done));
    };
    let regions = regions_of(size, body.offset.into(), payload.len() as u64);
    if !sheep.intents.begin(body.oid, write_id(&body), regions) {
        return Err((payload, done));
    }
    let (sheep, request) = (sheep.clone(), *request);
    let finish = move |result: Result<(), StoreError>| {
        let _active = sheep.stats.peer(&request);
        if result.is_err() {
            sheep.intents.failed(body.oid, write_id(&body), request.epoch);
        }
        let result = result.map_err(|e| crate::faults::peer_result(&sheep, &e));
        let result = result.and_then(|()| acknowledge(&sheep, pass));
        done(failed(&request, result.err().unwrap_or(ResultCode::SUCCESS)));
    };
    store.write_with(replica, size, body.offset.into(), payload, Box::new(finish));
    Ok(())
}

/// The range of a request inside its object, or why it is refused.
pub fn check_range(offset: u64, len: u64, size: u64) -> Result<(), ResultCode> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(ResultCode::INVALID_PARMS),
    }
}

async fn read(sheep: &Arc<Sheep>, request: &Request) -> Reply {
    match read_data(sheep, request).await {
        Ok((data, left_out)) => {
            let response =
                Response { data_length: data.len() as u32, ..Response::to(request, ResultCode::SUCCESS) };
            Reply { response: left_out.mark(response), data }
        }
        Err(ResultCode::NO_OBJ) if request.flags.contains(Flags::RECOVERY) => {
            let none = Response::to(request, ResultCode::NO_OBJ);
            Reply::empty(sheep.tombstones.mark(request.obj().oid, none))
        }
        Err(result) => failed(request, result),
    }
}

async fn read_data(sheep: &Arc<Sheep>, request: &Request) -> Result<(Bytes, LeftOut), ResultCode> {
    let body = request.obj();
    if request.flags.contains(Flags::WRITE) {
        return Err(ResultCode::INVALID_PARMS);
    }
    if body.write_seq != 0 {
        sheep.intents.read_for(body.oid, body.write_seq);
    }
    let view = admit(sheep, request, body.oid).await?;
    let store = sheep.store.as_ref().ok_or(ResultCode::NO_OBJ)?;
    let (replica, size) = sheep.named_replica(body.oid, body.ec_index, &view);
    let len = request.data_length as usize;
    if len as u64 > size {
        return Err(ResultCode::INVALID_PARMS);
    }
    let recovering = request.flags.contains(Flags::RECOVERY);
    let fault = if recovering { crate::faults::recovery_result } else { crate::faults::peer_result };
    // What recovery made of it lacks the last writes.
    let open = recovering && replica.strip.is_none() && sheep.early.has_of(body.oid, view.epoch);
    if open && (store.exists(replica) || body.tgt_epoch == Epoch(0)) {
        sheep.recovery.hurry(body.oid);
        // Who asks for the present state, as a gateway that takes a write back, asks until it is here.
        let present = body.tgt_epoch == Epoch(0);
        return Err(if present { ResultCode::NETWORK_ERROR } else { ResultCode::AGAIN });
    }
    if recovering && body.oid.is_data() && store.is_cut_off(replica, body.tgt_epoch, size) {
        return Err(ResultCode::AGAIN); // others have what it lacks
    }
    let found = match (recovering, replica.strip.is_some()) {
        (true, true) => {
            match before_open_writes(&sheep.intents, store, replica, body.offset.into(), len).await {
                Ok(None) => return Err(ResultCode::AGAIN),
                Ok(Some(found)) => Ok(found),
                Err(error) => Err(error),
            }
        }
        (true, false) => store.read_once(replica, body.offset.into(), len).await.map(with_everything),
        (false, _) => store.read(replica, body.offset.into(), len).await.map(with_everything),
    };
    match found {
        Err(StoreError::NoObject) => {}
        other => return other.map_err(|e| fault(sheep, &e)),
    }
    let epoch = if recovering { body.tgt_epoch } else { request.epoch };
    let wanted = recovering || request.flags.contains(Flags::WILDCARD) || epoch.is_before(view.epoch);
    // No epoch: the present state. Of before the first epoch only who searches what was put away in it wants something.
    let any_epoch = recovering && request.flags.contains(Flags::WILDCARD);
    if !wanted || (epoch == Epoch(0) && !any_epoch) {
        // Between epochs objects are on their way to the stale area: that is not "none".
        let between = !recovering && sheep.gate.enter(request.epoch).is_none();
        return Err(if between { ResultCode::OLD_NODE_VER } else { ResultCode::NO_OBJ });
    }
    if replica.strip.is_some() {
        lacking::known(sheep, view.epoch).await;
        if sheep.recovery.lacking.has(store, replica, epoch) {
            return Err(ResultCode::AGAIN);
        }
    }
    match store.read_stale(replica, epoch, body.offset.into(), len).await {
        // "I never had it" proves something only if this store was there in that epoch.
        Err(StoreError::NoObject)
            if recovering && (!sheep.history.covers(epoch) || sheep.early.has_of(body.oid, epoch)) =>
        {
            Err(ResultCode::AGAIN)
        }
        stale => stale.map(with_everything).map_err(|e| fault(sheep, &e)),
    }
}

fn with_everything(data: Bytes) -> (Bytes, LeftOut) {
    (data, LeftOut::default())
}

/// Where a write is.
enum Written {
    /// In the object.
    InPlace,
    /// In the log of early writes: the object is still to be recovered.
    Early,
}

async fn write(
    sheep: &Arc<Sheep>,
    request: &Request,
    payload: Bytes,
    wanted: Wanted<'_>,
) -> Result<Written, ResultCode> {
    let body = request.obj();
    if !request.flags.contains(Flags::WRITE) {
        return Err(ResultCode::INVALID_PARMS);
    }
    let id = write_id(&body);
    sheep.intents.asked(body.oid, id);
    let plain = request.opcode == Opcode::WRITE_PEER;
    let mut may_be_early = plain;
    let (view, pass) = loop {
        let (view, pass) = admit_write(sheep, request, body.oid, wanted, may_be_early).await?;
        if !may_be_early || !sheep.recovery.is_missing(sheep, body.oid, &view) {
            break (view, pass);
        }
        if sheep.recovery.takes_early(sheep, body.oid, &view)
            && write_early(sheep, &view, &body, &payload).await? == Taken::Yes
        {
            return acknowledge(sheep, pass).map(|()| Written::Early);
        }
        may_be_early = false;
    };
    if sheep.early.has_of(body.oid, view.epoch) {
        // Recovery is done with it all the same.
        match sheep.store.as_ref().is_some_and(|s| s.exists(Sheep::replica(body.oid))) {
            true => early::finish(sheep, &view, body.oid, 0).await?,
            false => early::forget(sheep, body.oid).await,
        }
    }
    if is_misnamed(sheep, &body, &view) {
        return Err(ResultCode::OLD_NODE_VER);
    }
    let store = sheep.store.as_ref().ok_or(ResultCode::NO_OBJ)?;
    let (replica, size) = sheep.named_replica(body.oid, body.ec_index, &view);
    check_range(body.offset.into(), payload.len() as u64, size)?;
    let (offset, len) = (u64::from(body.offset), payload.len());
    note_intent(sheep, body.oid, id, if plain { regions_of(size, offset, len as u64) } else { u64::MAX })?;
    if plain && replica.strip.is_some() {
        match store.read(replica, offset, len).await {
            Ok(old) => {
                let keep = || sheep.intents.keep(replica, id, request.epoch, offset, old, &payload);
                tokio::task::block_in_place(keep).map_err(|error| unnoted(sheep, body.oid, &error))?;
            }
            Err(error) => {
                sheep.intents.not_done_yet(id);
                return Err(crate::faults::peer_result(sheep, &error));
            }
        }
    }
    if !plain {
        replaced(sheep, body.oid)?;
    }
    if replica.strip.is_some() {
        tracing::debug!(
            "{replica}: {} {id:?} at {offset}, {len} bytes, epoch {}",
            request.opcode,
            request.epoch
        );
    }
    let done = match plain {
        true => store.write(replica, size, offset, payload).await,
        false => store.create(replica, size, offset, payload).await,
    };
    done.map_err(|e| {
        sheep.intents.failed(body.oid, id, request.epoch);
        crate::faults::peer_result(sheep, &e)
    })?;
    acknowledge(sheep, pass).map(|()| Written::InPlace)
}

/// Logs a write of part of an object that is still to be recovered.
async fn write_early(
    sheep: &Arc<Sheep>,
    view: &View,
    body: &ObjRequest,
    payload: &[u8],
) -> Result<Taken, ResultCode> {
    let (id, size) = (write_id(body), sheep.size_of(body.oid, view));
    if is_misnamed(sheep, body, view) {
        return Err(ResultCode::OLD_NODE_VER);
    }
    let (offset, len) = (u64::from(body.offset), payload.len() as u64);
    check_range(offset, len, size)?;
    note_intent(sheep, body.oid, id, regions_of(size, offset, len))?;
    early::take(sheep, view, body.oid, id, offset, payload).await
}

/// The number that a write's gateway gave it.
fn write_id(body: &ObjRequest) -> WriteId {
    WriteId { writer: body.tgt_epoch.0, seq: body.write_seq }
}

/// Whether a gateway knows another redundancy of the VDI than this node, which takes the cluster's as it has not heard of the
/// VDI yet: the write would go to a file of another name.
fn is_misnamed(sheep: &Sheep, body: &ObjRequest, view: &View) -> bool {
    let here = sheep.redundancy(body.oid.vid(), view);
    if here.known || write_id(body).writer == 0 {
        return false;
    }
    let policy = if is_coded(body.oid, &here) { here.policy.to_byte() } else { 0 };
    (body.copies, body.copy_policy) != (here.copies, policy)
}

/// Writes of the object before are over.
fn replaced(sheep: &Arc<Sheep>, oid: Oid) -> Result<(), ResultCode> {
    tokio::task::block_in_place(|| sheep.intents.replaced(oid)).map_err(|error| unnoted(sheep, oid, &error))
}

/// Notes a write that is about to begin.
fn note_intent(sheep: &Arc<Sheep>, oid: Oid, id: WriteId, regions: u64) -> Result<(), ResultCode> {
    while !sheep.intents.begin(oid, id, regions) {
        tokio::task::block_in_place(|| sheep.intents.enter(oid))
            .map_err(|error| unnoted(sheep, oid, &error))?;
    }
    Ok(())
}

async fn remove(sheep: &Arc<Sheep>, request: &Request, wanted: Wanted<'_>) -> Result<(), ResultCode> {
    let body = request.obj();
    let (view, pass) = admit_write(sheep, request, body.oid, wanted, false).await?;
    let store = sheep.store.as_ref().ok_or(ResultCode::NO_OBJ)?;
    let (replica, _) = sheep.named_replica(body.oid, body.ec_index, &view);
    sheep.tombstones.add(body.oid, view.epoch);
    replaced(sheep, body.oid)?;
    store.remove(replica).await.map_err(|e| crate::faults::peer_result(sheep, &e))?;
    acknowledge(sheep, pass)
}

async fn decref(sheep: &Arc<Sheep>, request: &Request, wanted: Wanted<'_>) -> Result<(), ResultCode> {
    let body = request.reference();
    let (remove_data, acknowledged) = {
        let (view, pass) = admit_write(sheep, request, body.oid, wanted, false).await?;
        let store = sheep.store.as_ref().ok_or(ResultCode::NO_OBJ)?;
        let last = reclaim::drop_in_ledger(sheep, store, &body).await?;
        let mine = view.my_position(body.oid, sheep.copies_of(body.oid, &view)) == Some(0);
        (last && mine, acknowledge(sheep, pass))
    };
    if remove_data {
        // Outside the pass: this is a request to other nodes, and may wait for the next epoch.
        let data = body.oid.data_of_ledger();
        match sheep.gateway.remove_object(sheep, data).await {
            Ok(()) | Err(ResultCode::NO_OBJ) => {}
            Err(code) => tracing::warn!("{data} has no references left but was not removed: {code}"),
        }
    }
    acknowledged
}
