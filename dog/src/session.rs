//! Connections to sheep and the view of the cluster that commands start from (spec 07, 7.1 and 7.2).
//!
//! One pipelined connection per node is kept and reused. Transport failures are reported here, where they happen;
//! callers get [`Transport`] and add their own message. Answers are waited for without limit: operations may take
//! minutes, and a sheep that is gone closes its connections.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use sheepdog_client::{Address, ClientError, Connection, Reply, Service};
use sheepdog_proto::cluster::EpochRecord;
use sheepdog_proto::node::decode_nodes;
use sheepdog_proto::{ClusterFlags, Epoch, MAX_NODES, NodeId, NodeRecord, Opcode, Request, ResultCode, Wire};
use thiserror::Error;

use crate::exit::{Stop, fail};
use crate::out::{self, errno_text};

/// Attempts to connect before giving up; each failure is reported.
const CONNECT_ATTEMPTS: usize = 2;

/// No answer was received; the reason has been printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("no answer")]
pub struct Transport;

/// Why a request brought nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Failed {
    /// No answer; the reason has been printed.
    #[error("{}", ResultCode::EIO)]
    Transport,
    /// The sheep's result.
    #[error("{0}")]
    Refused(ResultCode),
}

impl From<Transport> for Failed {
    fn from(_: Transport) -> Failed {
        Failed::Transport
    }
}

impl Failed {
    /// The result code; a lost request counts as an I/O error.
    pub fn code(self) -> ResultCode {
        match self {
            Failed::Transport => ResultCode::EIO,
            Failed::Refused(code) => code,
        }
    }
}

/// Connections by node.
pub struct Session {
    gateway: NodeId,
    connections: Mutex<HashMap<NodeId, Connection>>,
}

impl Session {
    /// A session whose gateway is the daemon at the given address.
    pub fn new(address: IpAddr, port: u16) -> Session {
        Session { gateway: NodeId::new(address, port), connections: Mutex::default() }
    }

    /// The daemon that `-a` and `-p` name.
    pub fn gateway(&self) -> NodeId {
        self.gateway
    }

    fn cached(&self, node: &NodeId) -> Option<Connection> {
        let connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        connections.get(node).filter(|c| !c.is_dead()).cloned()
    }

    async fn connection(&self, node: &NodeId) -> Result<Connection, Transport> {
        if let Some(connection) = self.cached(node) {
            return Ok(connection);
        }
        let address = Address::from(node.socket_addr());
        for _ in 0..CONNECT_ATTEMPTS {
            match Connection::connect(&address).await {
                Ok(connection) => {
                    let mut all = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
                    return Ok(all.entry(*node).insert_entry(connection).get().clone());
                }
                Err(ClientError::Connect { source, .. }) => {
                    let why = errno_text(&source);
                    out::log(format_args!("failed to connect to {}: {why}", node.host_port()));
                }
                Err(e) => out::log(e),
            }
        }
        Err(Transport)
    }

    /// Whether a connection to the node exists or can be made; failures are not reported.
    pub async fn reach(&self, node: &NodeId) -> bool {
        if self.cached(node).is_some() {
            return true;
        }
        let Ok(connection) = Connection::connect(&Address::from(node.socket_addr())).await else {
            return false;
        };
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).insert(*node, connection);
        true
    }

    /// Sends a request to a node; any result is an answer.
    pub async fn send(&self, node: &NodeId, request: Request, payload: Bytes) -> Result<Reply, Transport> {
        let connection = self.connection(node).await?;
        connection.call(request, payload).await.map_err(|e| {
            out::log(match e {
                ClientError::Protocol(_) => "failed to read the response data",
                _ => "failed to read a response",
            });
            Transport
        })
    }

    /// Sends a request without payload to the gateway.
    pub async fn ask(&self, request: Request) -> Result<Reply, Transport> {
        self.send(&self.gateway, request, Bytes::new()).await
    }

    /// Sends a request with payload to the gateway.
    pub async fn tell(&self, request: Request, payload: impl Into<Bytes>) -> Result<Reply, Transport> {
        self.send(&self.gateway, request, payload.into()).await
    }

    /// A header-only request; a result other than success is reported.
    pub async fn light(&self, node: &NodeId, request: Request) -> Result<Reply, Failed> {
        let reply = self.send(node, request, Bytes::new()).await?;
        match reply.response.result {
            ResultCode::SUCCESS => Ok(reply),
            code => {
                out::log(format_args!("Response's result: {code}"));
                Err(Failed::Refused(code))
            }
        }
    }
}

/// Turns an answer with an error result into [`Failed`].
pub fn success(reply: Result<Reply, Transport>) -> Result<Reply, Failed> {
    let reply = reply?;
    match reply.response.result {
        ResultCode::SUCCESS => Ok(reply),
        code => Err(Failed::Refused(code)),
    }
}

/// Members and epoch of the cluster.
#[derive(Debug, Clone, Default)]
pub struct ClusterView {
    /// Members in node order; the index is the node id that users see.
    pub nodes: Vec<NodeRecord>,
    /// The gateway's epoch.
    pub epoch: Epoch,
}

impl ClusterView {
    /// Asks the gateway. Failures are reported and end the process.
    pub async fn fetch(session: &Session) -> Result<ClusterView, Stop> {
        let stop = Stop::Now(2);
        let failed = || fail(stop, "Failed to get node list");
        let request = Request::new(Opcode::GET_NODE_LIST).length(MAX_NODES * NodeRecord::LEN);
        let reply = session.ask(request).await.map_err(|_| failed())?;
        if !reply.response.result.is_ok() {
            out::log(format_args!("Failed to update node list: {}", reply.response.result));
            return Err(failed());
        }
        let mut nodes = decode_nodes(&reply.data);
        if nodes.is_empty() {
            return Err(fail(Stop::Now(1), "There are no active sheep daemons"));
        }
        nodes.sort_by_key(|n| n.nid);
        let request = Request::new(Opcode::STAT_CLUSTER).length(EpochRecord::LEN);
        let reply = session.ask(request).await.map_err(|_| failed())?;
        if let Ok(record) = EpochRecord::decode(&reply.data)
            && record.flags.contains(ClusterFlags::DISKMODE)
        {
            // The node records of such builds have another size: nothing read so far means anything.
            return Err(fail(stop, "This cluster derives vnodes from disks, which is not supported"));
        }
        Ok(ClusterView { nodes, epoch: reply.response.epoch })
    }
}
