//! The server: accepts, bounds, and ends connections.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use sheepdog_client::frame::Stream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::export::ExportSource;
use crate::handshake::{HandshakeError, negotiate};
use crate::listen::Listener;
use crate::socket::split;
use crate::transmission::{self, Session, SessionError};

/// Pause after a failed accept, which usually means that there are no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What clients may make the server hold.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections at once; further ones wait to be accepted.
    pub connections: usize,
    /// Requests of one connection being executed; further ones stay in the socket.
    pub requests: usize,
    /// Bytes of payload that one connection may hold in requests and unsent answers before it is read no further. One
    /// more request of 32 MiB may come on top.
    pub bytes: usize,
    /// Time for the handshake.
    pub handshake: Duration,
    /// Longest pause within a request, or with answers that the client does not take. An idle client is no stall.
    pub stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections: 256,
            requests: 256,
            bytes: 64 << 20,
            handshake: Duration::from_secs(60),
            stall: Duration::from_secs(60),
        }
    }
}

/// Waits until the server stops; a server that is gone has stopped.
pub(crate) async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await.map(drop);
}

/// An NBD server; clones are the same server.
#[derive(Clone)]
pub struct Server {
    shared: Arc<Shared>,
}

struct Shared {
    source: Arc<dyn ExportSource>,
    limits: Limits,
    slots: Arc<Semaphore>,
    stop: watch::Sender<bool>,
}

impl Server {
    /// A server of these exports, with the default limits.
    pub fn new(source: Arc<dyn ExportSource>) -> Server {
        Server::with_limits(source, Limits::default())
    }

    /// With other limits.
    pub fn with_limits(source: Arc<dyn ExportSource>, limits: Limits) -> Server {
        let slots = Arc::new(Semaphore::new(limits.connections));
        Server { shared: Arc::new(Shared { source, limits, slots, stop: watch::Sender::new(false) }) }
    }

    /// Accepts connections until [`Server::shutdown`]. May be called for several listeners.
    pub async fn serve(&self, listener: Listener) -> io::Result<()> {
        let mut stop = self.shared.stop.subscribe();
        loop {
            let permit = tokio::select! {
                permit = self.shared.slots.clone().acquire_owned() => match permit {
                    Ok(permit) => permit,
                    Err(_) => return Ok(()), // closed: shutting down
                },
                () = stopped(&mut stop) => return Ok(()),
            };
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, peer)) => self.spawn(stream, peer, permit),
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept an NBD connection");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
                () = stopped(&mut stop) => return Ok(()),
            }
        }
    }

    fn spawn(&self, stream: Stream, peer: String, permit: OwnedSemaphorePermit) {
        let shared = self.shared.clone();
        tokio::spawn(async move {
            shared.connection(stream, &peer).await;
            drop(permit);
        });
    }

    /// Serves one connected socket, for callers that accept by themselves. Returns when the client is gone; dropping it
    /// earlier may leave operations unfinished.
    pub async fn handle(&self, stream: Stream, peer: &str) {
        let Ok(_permit) = self.shared.slots.clone().acquire_owned().await else { return };
        self.shared.connection(stream, peer).await;
    }

    /// Stops accepting and reading requests, and waits until every connection has finished what it was doing. Exports
    /// are given back, with their locks, when it returns. Waits for [`Limits::stall`] at most.
    pub async fn shutdown(&self) {
        self.shared.stop.send_replace(true);
        let finished = async {
            let all = u32::try_from(self.shared.limits.connections).unwrap_or(u32::MAX);
            // All slots free: nobody is left. The permits are kept: nobody comes again.
            if let Ok(permits) = self.shared.slots.acquire_many(all).await {
                permits.forget();
            }
            self.shared.source.settled().await;
        };
        // An operation may hang with its cluster; the process must be able to end.
        if tokio::time::timeout(self.shared.limits.stall, finished).await.is_err() {
            tracing::warn!("some NBD connections did not end in time");
        }
    }
}

impl Shared {
    async fn connection(&self, stream: Stream, peer: &str) {
        let (mut input, mut output) = split(stream);
        let mut stop = self.stop.subscribe();
        let handshake = negotiate(&mut input, &mut output, &*self.source);
        let negotiated = tokio::select! {
            outcome = tokio::time::timeout(self.limits.handshake, handshake) => {
                outcome.unwrap_or(Err(HandshakeError::Protocol("the handshake took too long")))
            }
            () = stopped(&mut stop) => return,
        };
        let negotiated = match negotiated {
            Ok(Some(negotiated)) => negotiated,
            Ok(None) => return,
            Err(HandshakeError::Io(error)) => return tracing::debug!(peer, %error, "NBD client left"),
            Err(error) => return tracing::warn!(peer, %error, "NBD handshake failed"),
        };
        let export = negotiated.export;
        tracing::info!(peer, export = export.name, "NBD client connected");
        let session = Session {
            input,
            output,
            volume: export.volume.clone(),
            mode: negotiated.mode,
            contexts: negotiated.contexts,
            limits: self.limits,
            stop,
        };
        match transmission::run(session).await {
            Ok(()) => tracing::info!(peer, export = export.name, "NBD client disconnected"),
            Err(SessionError::Io(error)) => {
                tracing::info!(peer, export = export.name, %error, "NBD connection lost");
            }
            Err(error) => tracing::warn!(peer, export = export.name, %error, "NBD connection closed"),
        }
    }
}
