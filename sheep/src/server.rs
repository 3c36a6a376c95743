//! Listening sockets and connections: frames in, answers out, bounds on everything (spec 01, section 2).
//!
//! A connection's reader admits requests one by one, each runs in a task of its own, answers go out in the order of
//! completion. Payload bytes are drawn from a budget before they are read, so that memory stays flat however many
//! clients send however fast; requests of other sheep have a budget of their own, because client requests wait for
//! them on other nodes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use nix::sys::socket::{setsockopt, sockopt};
use sheepdog_client::Reply;
use sheepdog_client::frame::{FrameReader, FrameWriter, Stream, split};
use sheepdog_proto::inode::INODE_LEN;
use sheepdog_proto::{
    ClusterStatus, Flags, INTERNAL_PROTO_VERSION, Opcode, PROTO_VERSION, Request, ResultCode,
};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::clients::{Client, Origin};
use crate::dispatch::{self, Class, Row};
use crate::gateway;
use crate::ops::order::is_settling;
use crate::ops::result;
use crate::peer;
use crate::sheep::Sheep;
use crate::vdi::holders;

/// Unit of the budgets, in bytes.
const UNIT: usize = 4096;
/// In-flight bytes of one connection, in units: 64 MiB.
const PER_CONNECTION: usize = 64 << 20 >> 12;
/// In-flight bytes of all client requests, of all peer requests, and of all operations for other gateways, in units:
/// 512 MiB each. The first wait for the last, and those for the second.
const PER_CLASS: usize = 512 << 20 >> 12;
/// What answers other than objects are charged with at most: bitmaps and most lists are no longer.
const LARGE_ANSWER: usize = 2 << 20;
/// Requests in flight on one connection.
const MAX_IN_FLIGHT: usize = 1024;
/// A payload that does not arrive within this time ends the connection.
const PAYLOAD_TIMEOUT: Duration = Duration::from_secs(60);
/// Peer requests that arrive while this node is joining wait this long for the join (spec 04, 5.1).
const JOIN_WAIT: Duration = Duration::from_secs(5);
/// Seconds of silence before a client's machine is asked whether it is there, seconds between questions, and how many.
const KEEP_ALIVE: (u32, u32, u32) = (20, 10, 4);
/// Pause after a failed accept (out of descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What all connections share.
pub struct Server {
    sheep: Arc<Sheep>,
    clients: Arc<Semaphore>,
    peers: Arc<Semaphore>,
    through: Arc<Semaphore>,
}

impl Server {
    /// A server without sockets.
    pub fn new(sheep: Arc<Sheep>) -> Arc<Server> {
        Arc::new(Server {
            sheep,
            clients: Arc::new(Semaphore::new(PER_CLASS)),
            peers: Arc::new(Semaphore::new(PER_CLASS)),
            through: Arc::new(Semaphore::new(PER_CLASS)),
        })
    }

    /// Accepts TCP connections until told to stop.
    pub fn serve_tcp(self: &Arc<Self>, listener: TcpListener, mut stop: watch::Receiver<bool>) {
        let server = self.clone();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    accepted = listener.accept() => match accepted {
                        Ok((stream, from)) => {
                            if server.sheep.lock_grace.is_some() {
                                notice_silence(&stream);
                            }
                            server.connection(Stream::Tcp(stream), from.to_string(), Origin::Address(from.ip()));
                        }
                        Err(error) => pause_after(&error).await,
                    },
                    () = stopped(&mut stop) => return,
                }
            }
        });
    }

    /// Accepts connections on the Unix socket until told to stop.
    pub fn serve_unix(self: &Arc<Self>, listener: UnixListener, mut stop: watch::Receiver<bool>) {
        let server = self.clone();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    accepted = listener.accept() => match accepted {
                        Ok((stream, _)) => {
                            let origin = server.sheep.holders.processes.origin_of(&stream);
                            server.connection(Stream::Unix(stream), "unix".into(), origin);
                        }
                        Err(error) => pause_after(&error).await,
                    },
                    () = stopped(&mut stop) => return,
                }
            }
        });
    }

    fn connection(self: &Arc<Self>, stream: Stream, from: String, origin: Origin) {
        let (reader, writer) = split(stream);
        let connection = Arc::new(Connection {
            server: self.clone(),
            writer,
            bytes: Arc::new(Semaphore::new(PER_CONNECTION)),
            slots: Arc::new(Semaphore::new(MAX_IN_FLIGHT)),
            in_flight: AtomicUsize::new(0),
            from,
            client: Client::new(self.sheep.clone(), origin),
        });
        tokio::spawn(async move {
            if let Err(reason) = connection.read(reader).await {
                tracing::debug!("{}: {reason}", connection.from);
            }
            connection.writer.close();
        });
    }
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // An error means that the daemon is gone.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Has the system notice within a minute that the other machine is gone: its locks wait for that.
fn notice_silence(stream: &TcpStream) {
    let set = setsockopt(stream, sockopt::KeepAlive, &true)
        .and_then(|()| setsockopt(stream, sockopt::TcpKeepIdle, &KEEP_ALIVE.0))
        .and_then(|()| setsockopt(stream, sockopt::TcpKeepInterval, &KEEP_ALIVE.1))
        .and_then(|()| setsockopt(stream, sockopt::TcpKeepCount, &KEEP_ALIVE.2));
    if let Err(error) = set {
        tracing::debug!("keep-alive is not available: {error}");
    }
}

async fn pause_after(error: &std::io::Error) {
    tracing::warn!("cannot accept a connection: {error}");
    tokio::time::sleep(ACCEPT_PAUSE).await;
}

struct Connection {
    server: Arc<Server>,
    writer: FrameWriter,
    bytes: Arc<Semaphore>,
    slots: Arc<Semaphore>,
    in_flight: AtomicUsize,
    from: String,
    client: Client,
}

/// Shares of the budgets that a request holds until its answer is sent.
struct Share {
    _permits: [Option<OwnedSemaphorePermit>; 3],
}

impl Connection {
    async fn read(self: &Arc<Self>, mut reader: FrameReader) -> Result<(), String> {
        while let Some(header) = reader.header().await.map_err(|e| e.to_string())? {
            let request = Request::from_bytes(&header);
            let row = dispatch::find(request.opcode);
            let len = if request.has_payload() { request.data_length as usize } else { 0 };
            if len > self.largest_payload() {
                return Err(format!("{}: payload of {len} bytes is too long", request.opcode));
            }
            let share = self.share(row, len.max(self.reply_estimate(&request))).await;
            let payload = tokio::time::timeout(PAYLOAD_TIMEOUT, reader.payload(len)).await;
            let payload = payload.map_err(|_| "payload stalled".to_string())?.map_err(|e| e.to_string())?;
            self.admit(request, payload, row, share, reader.has_buffered());
        }
        Ok(())
    }

    fn largest_block(&self) -> usize {
        let sheep = &self.server.sheep;
        let shift = sheep.vdis.max_block_shift().max(sheep.views.load().block_size_shift);
        1 << shift.min(sheepdog_proto::MAX_BLOCK_SHIFT)
    }

    fn largest_payload(&self) -> usize {
        INODE_LEN.max(self.largest_block())
    }

    /// Bytes that executing a request and its answer will hold; the capacities of lists are not what they use.
    fn reply_estimate(&self, request: &Request) -> usize {
        match request.opcode {
            Opcode::READ_OBJ | Opcode::READ_PEER | Opcode::ORDER_PEER => {
                request.reply_capacity().min(self.largest_payload())
            }
            // The base and the new object.
            Opcode::CREATE_AND_WRITE_OBJ if request.flags.contains(Flags::COW) => 2 * self.largest_block(),
            Opcode::REPAIR_REPLICA => 2 * self.largest_payload(),
            _ => request.reply_capacity().min(LARGE_ANSWER),
        }
    }

    async fn share(&self, row: Option<&Row>, bytes: usize) -> Share {
        let units = bytes.div_ceil(UNIT).max(1);
        let class = match row.map(|r| r.class) {
            Some(Class::Peer) => &self.server.peers,
            _ if row.is_some_and(|r| r.opcode == Opcode::ORDER_PEER) => &self.server.through,
            _ => &self.server.clients,
        };
        // Semaphores are never closed, so acquiring cannot fail.
        let take = |semaphore: &Arc<Semaphore>, n: usize| semaphore.clone().acquire_many_owned(n as u32);
        let slot = take(&self.slots, 1).await.ok();
        let own = take(&self.bytes, units.min(PER_CONNECTION)).await.ok();
        let shared = take(class, units.min(PER_CLASS)).await.ok();
        Share { _permits: [slot, own, shared] }
    }

    fn admit(
        self: &Arc<Self>,
        request: Request,
        payload: Bytes,
        row: Option<&'static Row>,
        share: Share,
        more: bool,
    ) {
        let sheep = &self.server.sheep;
        let progress = sheep.begin();
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        if row.is_some_and(|row| matches!(row.class, Class::Gateway)) {
            sheep.holders.touch(sheep, &self.client, request.obj().oid.vid());
        }
        if let Some(row) = row
            && matches!(row.class, Class::Gateway)
            && request.opcode == Opcode::READ_OBJ
            && request.version <= PROTO_VERSION
            && sheep.views.load().status == ClusterStatus::Ok
            && let Some(reply) = gateway::try_read_inline(sheep, &request)
        {
            return self.answer(&request, reply, (share, progress), more);
        }
        let answering = self.clone();
        let done = move |reply| answering.answer(&request, reply, (share, progress), more);
        let direct = request.opcode == Opcode::WRITE_PEER && request.version == INTERNAL_PROTO_VERSION;
        let (payload, done) = match direct && !self.writer.is_reset() {
            true => match peer::try_write(sheep, &request, payload, done) {
                Ok(()) => return,
                Err(given_back) => given_back,
            },
            false => (payload, done),
        };
        let connection = self.clone();
        tokio::spawn(async move { done(connection.execute(request, payload, row).await) });
    }

    /// The checks of spec 01, 6.1, in their order, then the operation.
    async fn execute(&self, request: Request, payload: Bytes, row: Option<&'static Row>) -> Reply {
        let sheep = &self.server.sheep;
        let version_fits = if request.opcode.is_internal() {
            request.version == INTERNAL_PROTO_VERSION
        } else {
            request.version <= PROTO_VERSION
        };
        if !version_fits {
            return result(&request, ResultCode::VER_MISMATCH);
        }
        let Some(row) = row else { return result(&request, ResultCode::INVALID_PARMS) };
        if let Err(code) = self.status_allows(&request, row).await {
            return result(&request, code);
        }
        if row.logged {
            self.log_request(&request, &payload);
        }
        let reply = match row.class {
            Class::Gateway => gateway::execute(sheep, &self.client, request, payload).await,
            // A gateway that gave up has sent the request again elsewhere, and newer ones after it.
            Class::Peer if self.writer.is_reset() => result(&request, ResultCode::NETWORK_ERROR),
            Class::Peer => peer::execute(sheep, request, payload, &|| !self.writer.is_reset()).await,
            Class::Local(handler) => handler(sheep, request, payload).await,
            Class::Cluster(..) if request.opcode == Opcode::LOCK_VDI => {
                holders::lock(sheep, &self.client, request, payload).await
            }
            Class::Cluster(..) => sheep.cluster.submit(request, payload).await,
        };
        if row.logged {
            let code = reply.response.result.0;
            tracing::info!(
                "req={:#x}, client={}, op={}, result={code:02x}",
                request.id,
                self.from,
                request.opcode
            );
        }
        reply
    }

    async fn status_allows(&self, request: &Request, row: &Row) -> Result<(), ResultCode> {
        let sheep = &self.server.sheep;
        let mut view = sheep.views.load();
        let from_peer = matches!(row.class, Class::Peer)
            || matches!(request.opcode, Opcode::GET_OBJ_LIST | Opcode::GET_EPOCH);
        if view.status == ClusterStatus::Wait && !view.joined && from_peer {
            let joined = tokio::time::timeout(JOIN_WAIT, sheep.views.changed_from(&view)).await;
            view = joined.unwrap_or(view);
        }
        match view.status {
            ClusterStatus::Ok => Ok(()),
            ClusterStatus::Killed if is_settling(request) => Ok(()),
            ClusterStatus::Killed => Err(ResultCode::KILLED),
            ClusterStatus::Shutdown => Err(ResultCode::SHUTDOWN),
            ClusterStatus::Wait if row.force => Ok(()),
            ClusterStatus::Wait if view.ctime == 0 => Err(ResultCode::WAIT_FOR_FORMAT),
            ClusterStatus::Wait => Err(ResultCode::WAIT_FOR_JOIN),
        }
    }

    fn log_request(&self, request: &Request, payload: &[u8]) {
        let text = match payload.iter().take(256).position(|b| *b == 0) {
            _ if payload.is_empty() => "(null)".into(),
            Some(end) => String::from_utf8_lossy(&payload[..end]),
            None => "(not string)".into(),
        };
        tracing::info!("req={:#x}, client={}, op={}, data={text}", request.id, self.from, request.opcode);
    }

    fn answer(
        self: &Arc<Self>,
        request: &Request,
        reply: Reply,
        held: (Share, crate::sheep::InProgress),
        more: bool,
    ) {
        let Reply { mut response, mut data } = reply;
        if data.len() > request.reply_capacity() {
            tracing::error!("{}: answer of {} bytes does not fit the request", request.opcode, data.len());
            data = Bytes::new();
            response.result = ResultCode::INVALID_PARMS;
        }
        response.version = 0;
        response.opcode = request.opcode;
        response.id = request.id;
        response.epoch = self.server.sheep.views.epoch();
        response.data_length = data.len() as u32;
        let alone = self.in_flight.fetch_sub(1, Ordering::Relaxed) == 1 && !more;
        self.writer.send(response.to_bytes(), data, Some(Box::new(held)), alone);
    }
}
