//! Connections to other sheep: few, pipelined, re-made with back-off.
//!
//! Each peer has one connection for small requests and one for large ones, so that a 4 MiB transfer does not delay a
//! 4 KiB write. Operations that the peer executes for this node, and questions of order, have their own: they wait for
//! replica writes, and those must not wait behind them. A request that is not answered within its deadline closes the connection: the peer drops what it has
//! not begun, and everything in flight there is tried again by its gateway (spec 06, sections 6.2 and 8).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use sheepdog_client::{Address, ClientError, Connection, Reply};
use sheepdog_proto::{NodeId, Request};
use tokio::sync::Mutex as AsyncMutex;

/// Payloads or replies of at least this many bytes use the second connection.
const LARGE: usize = 128 << 10;
/// After a failed connect nobody tries again for this long.
const RETRY_AFTER: Duration = Duration::from_millis(200);
/// The I/O network is given up for the other one when it does not answer, or does not take what was sent, for this long.
const IO_CONNECT: Duration = Duration::from_secs(1);
/// See [`IO_CONNECT`].
const IO_UNACKNOWLEDGED: Duration = Duration::from_secs(5);
/// Between two looks whether it works again.
const IO_RETRY: Duration = Duration::from_secs(5);
/// Deadline of a replica write or read, above what a busy disk needs.
pub const IO_DEADLINE: Duration = Duration::from_secs(30);

/// Which of a peer's connections.
#[derive(Clone, Copy)]
pub enum Lane {
    /// Small requests.
    Small,
    /// Large ones.
    Large,
    /// Operations that the peer executes on all replicas.
    Through,
    /// Questions of order.
    Control,
}

#[derive(Default)]
struct Slot {
    connection: Option<Connection>,
    failed_at: Option<Instant>,
}

#[derive(Default)]
struct Peer {
    slots: [AsyncMutex<Slot>; 4],
    /// Copies of the connections, to use without waiting and to close from outside.
    live: Mutex<[Option<Connection>; 4]>,
    /// When the peer's I/O address was last found not to work; connections lead to the other one until it does.
    io_failed: Mutex<Option<Instant>>,
}

impl Peer {
    /// Connects to the I/O address, if the node announced one that works, else to the other one.
    async fn connect(&self, node: &NodeId) -> Result<Connection, ClientError> {
        if let Some(io) = node.io_socket_addr().filter(|_| self.io_failed.lock().is_none()) {
            match by_io_network(io).await {
                Ok(connection) => return Ok(connection),
                Err(error) => {
                    tracing::warn!("{node}: no connection by the I/O network, using the other one: {error}");
                    *self.io_failed.lock() = Some(Instant::now());
                }
            }
        }
        Connection::connect(&Address::from(node.socket_addr())).await
    }

    /// Tries now and then whether the I/O address works again; what is asked from then on goes there.
    fn look_for_io_network(self: &Arc<Peer>, node: &NodeId) {
        let Some(io) = node.io_socket_addr() else { return };
        {
            let mut failed = self.io_failed.lock();
            if failed.is_none_or(|at| at.elapsed() < IO_RETRY) {
                return;
            }
            *failed = Some(Instant::now());
        }
        let (peer, node) = (self.clone(), *node);
        tokio::spawn(async move {
            if by_io_network(io).await.is_err() {
                return;
            }
            tracing::info!("{node}: the I/O network works again");
            *peer.io_failed.lock() = None;
            for (slot, live) in peer.slots.iter().zip(0..) {
                let mut slot = slot.lock().await;
                // What is in flight keeps its connection.
                peer.live.lock()[live] = None;
                slot.connection = None;
            }
        });
    }
}

async fn by_io_network(io: std::net::SocketAddr) -> Result<Connection, ClientError> {
    Connection::connect_by_one_of_several(&Address::from(io), IO_CONNECT, IO_UNACKNOWLEDGED).await
}

/// All peers of this node.
#[derive(Default)]
pub struct Peers {
    map: Mutex<HashMap<NodeId, Arc<Peer>>>,
}

impl Peers {
    fn peer(&self, node: &NodeId) -> Arc<Peer> {
        self.map.lock().entry(*node).or_default().clone()
    }

    /// Closes the connections to a node that left; what is in flight there fails at once.
    pub fn forget(&self, node: &NodeId) {
        if let Some(peer) = self.map.lock().remove(node) {
            peer.live.lock().iter().flatten().for_each(Connection::close);
        }
    }

    /// Sends a request to `node` and waits for the answer, at most `deadline`.
    pub async fn call(
        &self,
        node: &NodeId,
        request: Request,
        payload: Bytes,
        deadline: Duration,
    ) -> Result<Reply, ClientError> {
        let large = payload.len().max(request.reply_capacity()) >= LARGE;
        let lane = if large { Lane::Large } else { Lane::Small };
        self.call_on(lane, node, request, payload, deadline).await
    }

    /// As [`Peers::call`], on a connection of the caller's choice.
    pub async fn call_on(
        &self,
        lane: Lane,
        node: &NodeId,
        request: Request,
        payload: Bytes,
        deadline: Duration,
    ) -> Result<Reply, ClientError> {
        let connection = self.connection(node, lane as usize).await?;
        let id = request.id;
        let answer = connection.start(request, payload);
        match tokio::time::timeout(deadline, answer).await {
            Ok(Ok(reply)) => reply.map(|mut r| {
                r.response.id = id;
                r
            }),
            Ok(Err(_)) => Err(ClientError::Lost("connection dropped".into())),
            Err(_) => {
                connection.close();
                Err(ClientError::Lost(format!("no answer from {node} within {} s", deadline.as_secs())))
            }
        }
    }

    async fn connection(&self, node: &NodeId, slot: usize) -> Result<Connection, ClientError> {
        let peer = self.peer(node);
        peer.look_for_io_network(node);
        if let Some(connection) = peer.live.lock()[slot].as_ref().filter(|c| !c.is_dead()) {
            return Ok(connection.clone());
        }
        let mut state = peer.slots[slot].lock().await;
        if let Some(connection) = state.connection.as_ref().filter(|c| !c.is_dead()) {
            return Ok(connection.clone());
        }
        if state.failed_at.is_some_and(|at| at.elapsed() < RETRY_AFTER) {
            return Err(ClientError::Lost(format!("{node} is not reachable")));
        }
        match peer.connect(node).await {
            Ok(connection) => {
                *state = Slot { connection: Some(connection.clone()), failed_at: None };
                peer.live.lock()[slot] = Some(connection.clone());
                Ok(connection)
            }
            Err(error) => {
                *state = Slot { connection: None, failed_at: Some(Instant::now()) };
                Err(error)
            }
        }
    }
}
