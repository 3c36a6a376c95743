//! A pipelined connection to a sheep.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use sheepdog_proto::{Flags, Request, Response};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::oneshot;

use crate::frame::{FrameReader, FrameWriter, Stream, split};
use crate::service::{CallFuture, ClientError, Reply, Service};

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a sheep listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// Host (name or literal) and port.
    Tcp(String, u16),
    /// Path of a sheep's `sock`.
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(host, port) => write!(f, "{host}:{port}"),
            Address::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

impl From<std::net::SocketAddr> for Address {
    fn from(addr: std::net::SocketAddr) -> Address {
        Address::Tcp(addr.ip().to_string(), addr.port())
    }
}

struct Pending {
    capacity: usize,
    reply: oneshot::Sender<Result<Reply, ClientError>>,
}

/// `None` = the connection is dead.
type PendingMap = Option<HashMap<u32, Pending>>;

/// A connection; clones share it. Requests are matched to answers by id; any number may be in flight.
#[derive(Clone)]
pub struct Connection {
    shared: Arc<Shared>,
}

struct Shared {
    addr: Address,
    writer: FrameWriter,
    pending: Mutex<PendingMap>,
    next_id: AtomicU32,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.writer.close();
    }
}

async fn open(addr: &Address, limit: Duration) -> Result<Stream, ClientError> {
    let connect = async {
        Ok(match addr {
            Address::Tcp(host, port) => Stream::Tcp(TcpStream::connect((host.as_str(), *port)).await?),
            Address::Unix(path) => Stream::Unix(UnixStream::connect(path).await?),
        })
    };
    tokio::time::timeout(limit, connect)
        .await
        .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
        .map_err(|source| ClientError::Connect { addr: addr.to_string(), source })
}

impl Connection {
    /// Connects, for at most five seconds.
    pub async fn connect(addr: &Address) -> Result<Connection, ClientError> {
        let stream = open(addr, CONNECT_TIMEOUT).await?;
        Ok(Connection::over(stream, addr.clone()))
    }

    /// Connects, for at most `limit`, by a path for which there is another one: the connection fails if the other side
    /// does not take what was sent for `unacknowledged`.
    pub async fn connect_by_one_of_several(
        addr: &Address,
        limit: Duration,
        unacknowledged: Duration,
    ) -> Result<Connection, ClientError> {
        let stream = open(addr, limit).await?;
        if let Stream::Tcp(stream) = &stream {
            let millis = u32::try_from(unacknowledged.as_millis()).unwrap_or(u32::MAX);
            // Where it cannot be set, the deadlines of requests notice, later.
            let _ = nix::sys::socket::setsockopt(stream, nix::sys::socket::sockopt::TcpUserTimeout, &millis);
        }
        Ok(Connection::over(stream, addr.clone()))
    }

    /// Uses a connected socket.
    pub fn over(stream: Stream, addr: Address) -> Connection {
        let (reader, writer) = split(stream);
        let shared = Arc::new(Shared {
            addr,
            writer,
            pending: Mutex::new(Some(HashMap::new())),
            next_id: AtomicU32::new(1),
        });
        tokio::spawn(receive(reader, Arc::downgrade(&shared)));
        Connection { shared }
    }

    /// Where it leads.
    pub fn address(&self) -> &Address {
        &self.shared.addr
    }

    /// Whether it has failed; a dead connection refuses every call.
    pub fn is_dead(&self) -> bool {
        self.shared.pending.lock().is_none() || self.shared.writer.is_closed()
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.shared.pending.lock().as_ref().map_or(0, HashMap::len)
    }

    /// Queues a request at once; the answer comes through the receiver. The request's id is replaced by a unique one
    /// and restored in the answer.
    pub fn start(
        &self,
        mut request: Request,
        payload: Bytes,
    ) -> oneshot::Receiver<Result<Reply, ClientError>> {
        let (reply, receiver) = oneshot::channel();
        if request.flags.contains(Flags::WRITE) {
            request.data_length = payload.len() as u32;
        } else if !payload.is_empty() {
            let _ = reply.send(Err(ClientError::Protocol("payload without the WRITE flag")));
            return receiver;
        }
        let capacity = request.reply_capacity();
        let mut pending = self.shared.pending.lock();
        let Some(map) = pending.as_mut() else {
            let _ = reply.send(Err(ClientError::Lost(format!("{} is gone", self.shared.addr))));
            return receiver;
        };
        let mut id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        while map.contains_key(&id) {
            id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        }
        request.id = id;
        let alone = map.is_empty();
        map.insert(id, Pending { capacity, reply });
        drop(pending);
        self.shared.writer.send(request.to_bytes(), payload, None, alone);
        if self.shared.writer.is_closed() {
            self.shared.fail(ClientError::Lost(format!("{} closed the connection", self.shared.addr)));
        }
        receiver
    }

    /// Resets the connection: requests in flight fail with [`ClientError::Lost`], and the other side drops those that
    /// it has not begun.
    pub fn close(&self) {
        self.shared.fail(ClientError::Lost("closed".into()));
        self.shared.writer.abort();
    }
}

impl Service for Connection {
    fn call(&self, request: Request, payload: Bytes) -> CallFuture<'_> {
        let id = request.id;
        let receiver = self.start(request, payload);
        Box::pin(async move {
            let mut reply =
                receiver.await.unwrap_or_else(|_| Err(ClientError::Lost("connection dropped".into())))?;
            reply.response.id = id;
            Ok(reply)
        })
    }
}

impl Shared {
    fn fail(&self, error: ClientError) {
        let Some(map) = self.pending.lock().take() else { return };
        let text = error.to_string();
        for pending in map.into_values() {
            let _ = pending.reply.send(Err(ClientError::Lost(text.clone())));
        }
    }
}

async fn receive(mut reader: FrameReader, shared: std::sync::Weak<Shared>) {
    let error = loop {
        match receive_one(&mut reader, &shared).await {
            Ok(true) => {}
            Ok(false) => break ClientError::Lost("the sheep closed the connection".into()),
            Err(error) => break error,
        }
    };
    if let Some(shared) = shared.upgrade() {
        shared.fail(error);
        shared.writer.close();
    }
}

/// Receives one answer and hands it over. `Ok(false)` = end of the stream.
async fn receive_one(
    reader: &mut FrameReader,
    shared: &std::sync::Weak<Shared>,
) -> Result<bool, ClientError> {
    let lost = |e: std::io::Error| ClientError::Lost(e.to_string());
    let Some(header) = reader.header().await.map_err(lost)? else { return Ok(false) };
    let response = Response::from_bytes(&header);
    let Some(shared) = shared.upgrade() else { return Ok(false) };
    let Some(pending) = shared.pending.lock().as_mut().and_then(|map| map.remove(&response.id)) else {
        return Err(ClientError::Protocol("answer to a request that was not sent"));
    };
    let len = response.data_length as usize;
    if len > pending.capacity {
        let _ = pending.reply.send(Err(ClientError::Protocol("answer longer than asked for")));
        return Err(ClientError::Protocol("answer longer than asked for"));
    }
    let data = match reader.payload(len).await {
        Ok(data) => data,
        Err(e) => {
            let _ = pending.reply.send(Err(lost(e)));
            return Ok(false);
        }
    };
    let _ = pending.reply.send(Ok(Reply { response, data }));
    Ok(true)
}
