//! [`Reconnect`]: a [`Service`] over an address that survives the loss of its connection (spec 01, 16.5).
//!
//! When the socket fails, it is opened again every [`ReconnectOptions::backoff`], and requests that were in flight are
//! sent again if executing them twice is harmless. Requests that were never sent are sent once there is a connection.
//! A sheep that answers that it is shutting down counts as gone: it did not execute the request.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use sheepdog_proto::{Opcode, Request, ResultCode};
use tokio::time::Instant;

use crate::connection::{Address, Connection};
use crate::service::{CallFuture, ClientError, Reply, Service};

/// How persistent a [`Reconnect`] is.
#[derive(Debug, Clone, Copy)]
pub struct ReconnectOptions {
    /// Pause between two attempts.
    pub backoff: Duration,
    /// How long one request may wait for an answer over failing connections before its error is returned;
    /// `None` = for ever, as QEMU does. It bounds retrying only: an answer may take as long as the sheep needs.
    pub give_up_after: Option<Duration>,
}

impl Default for ReconnectOptions {
    fn default() -> Self {
        ReconnectOptions { backoff: Duration::from_secs(1), give_up_after: None }
    }
}

/// A connection to one address that is made when needed and made again when lost; clones share it.
#[derive(Clone)]
pub struct Reconnect {
    shared: Arc<Shared>,
}

struct Shared {
    addr: Address,
    options: ReconnectOptions,
    connection: Mutex<Option<Connection>>,
    /// Held while connecting, so that one attempt serves everybody: when the last one failed, and how.
    connecting: tokio::sync::Mutex<Option<(Instant, io::ErrorKind, String)>>,
}

/// Whether executing the operation twice has the effect of executing it once.
fn is_idempotent(opcode: Opcode) -> bool {
    !matches!(
        opcode,
        Opcode::NEW_VDI
            | Opcode::LOCK_VDI
            | Opcode::DEL_VDI
            | Opcode::GET_VDI_ATTR
            | Opcode::MAKE_FS
            | Opcode::FORCE_RECOVER
            | Opcode::DECREF_OBJ
            | Opcode::DECREF_PEER
            | Opcode::REMOVE_OBJ
            | Opcode::SHUTDOWN
            | Opcode::KILL_NODE
    )
}

impl Reconnect {
    /// Connects on first use.
    pub fn new(addr: Address, options: ReconnectOptions) -> Reconnect {
        let shared =
            Shared { addr, options, connection: Mutex::new(None), connecting: tokio::sync::Mutex::default() };
        Reconnect { shared: Arc::new(shared) }
    }

    /// Where it leads.
    pub fn address(&self) -> &Address {
        &self.shared.addr
    }

    fn live(&self) -> Option<Connection> {
        self.shared.connection.lock().as_ref().filter(|c| !c.is_dead()).cloned()
    }

    async fn connection(&self) -> Result<Connection, ClientError> {
        if let Some(connection) = self.live() {
            return Ok(connection);
        }
        let mut failed = self.shared.connecting.lock().await;
        if let Some(connection) = self.live() {
            return Ok(connection);
        }
        let addr = || self.shared.addr.to_string();
        if let Some((when, kind, text)) = &*failed
            && when.elapsed() < self.shared.options.backoff / 2
        {
            return Err(ClientError::Connect { addr: addr(), source: io::Error::new(*kind, text.clone()) });
        }
        match Connection::connect(&self.shared.addr).await {
            Ok(connection) => {
                *failed = None;
                *self.shared.connection.lock() = Some(connection.clone());
                Ok(connection)
            }
            Err(ClientError::Connect { source, .. }) => {
                *failed = Some((Instant::now(), source.kind(), source.to_string()));
                Err(ClientError::Connect { addr: addr(), source })
            }
            Err(error) => Err(error),
        }
    }

    async fn attempt(&self, request: Request, payload: Bytes) -> Result<Reply, ClientError> {
        self.connection().await?.call(request, payload).await
    }

    async fn persist(
        &self,
        request: Request,
        payload: Bytes,
        mut outcome: Result<Reply, ClientError>,
    ) -> Result<Reply, ClientError> {
        // A connection that was lost is tried again at once: a restarted sheep is often back already.
        let mut at_once = matches!(outcome, Err(ClientError::Lost(_)));
        let give_up = self.shared.options.give_up_after.map(|after| Instant::now() + after);
        loop {
            let again = match &outcome {
                Ok(reply) => matches!(reply.response.result, ResultCode::SHUTDOWN | ResultCode::KILLED),
                Err(ClientError::Connect { .. }) => true,
                Err(ClientError::Lost(_)) => is_idempotent(request.opcode),
                Err(ClientError::Protocol(_) | ClientError::Refused(_)) => false,
            };
            let next = Instant::now() + self.shared.options.backoff;
            if !again || give_up.is_some_and(|deadline| next > deadline) {
                return outcome;
            }
            if outcome.is_ok() {
                // It will not come back on this connection.
                *self.shared.connection.lock() = None;
            }
            tracing::debug!(addr = %self.shared.addr, op = %request.opcode, "waiting to send again");
            if !std::mem::take(&mut at_once) {
                tokio::time::sleep_until(next).await;
            }
            outcome = self.attempt(request, payload.clone()).await;
        }
    }
}

impl Service for Reconnect {
    fn call(&self, request: Request, payload: Bytes) -> CallFuture<'_> {
        // Sent before the future is polled, so that requests leave in the order of the calls.
        let first = self.live().map(|connection| connection.start(request, payload.clone()));
        Box::pin(async move {
            let outcome = match first {
                Some(receiver) => {
                    receiver.await.unwrap_or_else(|_| Err(ClientError::Lost("connection dropped".into())))
                }
                None => self.attempt(request, payload.clone()).await,
            };
            let mut reply = match outcome {
                Ok(reply) if !matches!(reply.response.result, ResultCode::SHUTDOWN | ResultCode::KILLED) => {
                    reply
                }
                other => self.persist(request, payload, other).await?,
            };
            reply.response.id = request.id;
            Ok(reply)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sheepdog_proto::Response;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    async fn answer(socket: &mut tokio::net::TcpStream, result: ResultCode) {
        let mut header = [0; 48];
        socket.read_exact(&mut header).await.unwrap();
        let request = Request::from_bytes(&header);
        socket.write_all(&Response::to(&request, result).to_bytes()).await.unwrap();
    }

    fn over(listener: &TcpListener, give_up_after: Option<Duration>) -> Reconnect {
        let options = ReconnectOptions { backoff: Duration::from_millis(5), give_up_after };
        Reconnect::new(listener.local_addr().unwrap().into(), options)
    }

    #[tokio::test]
    async fn a_read_lost_with_its_connection_is_sent_again_and_keeps_its_id() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let service = over(&listener, None);
        let server = tokio::spawn(async move {
            let (mut socket, _) = listener.accept().await.unwrap();
            let mut header = [0; 48];
            socket.read_exact(&mut header).await.unwrap();
            drop(socket); // without an answer
            let (mut socket, _) = listener.accept().await.unwrap();
            answer(&mut socket, ResultCode::SHUTDOWN).await;
            let (mut socket, _) = listener.accept().await.unwrap();
            answer(&mut socket, ResultCode::SUCCESS).await;
        });
        let mut request = Request::new(Opcode::READ_OBJ);
        request.id = 77;
        let reply = service.call(request, Bytes::new()).await.unwrap();
        assert!(reply.response.result.is_ok() && reply.response.id == 77);
        server.await.unwrap();
    }

    #[tokio::test]
    async fn a_lost_vdi_creation_is_reported_not_repeated() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let service = over(&listener, None);
        let server = tokio::spawn(async move {
            let (mut socket, _) = listener.accept().await.unwrap();
            socket.read_exact(&mut [0; 48]).await.unwrap();
        });
        let error = service.call(Request::new(Opcode::NEW_VDI), Bytes::new()).await.unwrap_err();
        assert!(matches!(error, ClientError::Lost(_)), "{error}");
        server.await.unwrap();
    }

    #[tokio::test]
    async fn gives_up_at_the_deadline() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let service = over(&listener, Some(Duration::from_millis(20)));
        drop(listener);
        let error = service.call(Request::new(Opcode::READ_OBJ), Bytes::new()).await.unwrap_err();
        assert!(matches!(error, ClientError::Connect { .. }), "{error}");
    }
}
