//! NBD exports served by the daemon itself: every VDI of the cluster, without a socket between server and gateway.

use std::sync::Arc;

use sheepdog_nbd::{ListenAddr, Listener, Server, VdiExports, VdiExportsOptions};

use crate::service::InProcess;
use crate::sheep::Sheep;
use crate::shell::options::{NbdAddr, Options};

/// The running NBD server; `None` = none was asked for.
pub type Running = Option<Arc<Server>>;

/// Listens on every `--nbd` address; `None` = none was given.
pub async fn bind(options: &Options) -> Result<Option<Vec<(ListenAddr, Listener)>>, String> {
    let mut listeners = Vec::new();
    for addr in &options.nbd {
        let addr = match addr {
            NbdAddr::Unix(path) => ListenAddr::Unix(path.clone()),
            NbdAddr::Tcp(host, port) => ListenAddr::Tcp(host.clone(), *port),
        };
        let listener = Listener::bind(&addr).await.map_err(|e| format!("cannot serve NBD on {addr}: {e}"))?;
        listeners.push((addr, listener));
    }
    Ok(if listeners.is_empty() { None } else { Some(listeners) })
}

/// Serves the VDIs of the cluster on these listeners.
pub fn serve(listeners: Vec<(ListenAddr, Listener)>, sheep: &Arc<Sheep>) -> Arc<Server> {
    let exports = VdiExports::new(Arc::new(InProcess::new(sheep.clone())), VdiExportsOptions::default());
    let server = Arc::new(Server::new(Arc::new(exports)));
    for (addr, listener) in listeners {
        tracing::info!("serving volumes over NBD on {addr}");
        let server = server.clone();
        tokio::spawn(async move {
            if let Err(error) = server.serve(listener).await {
                tracing::error!("the NBD server on {addr} ended: {error}");
            }
        });
    }
    server
}

/// Ends connections after their requests, releasing the locks of their volumes.
pub async fn stop(running: Running) {
    if let Some(server) = running {
        server.shutdown().await;
    }
}
