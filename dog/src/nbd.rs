//! `dog nbd serve` (our addition): an NBD server next to any sheep.
//!
//! It serves every VDI of the cluster through the gateway that `-a` and `-p` name, until SIGINT or SIGTERM, and finds
//! the gateway again when it goes away for a while.

use std::sync::Arc;

use sheepdog_client::reconnect::{Reconnect, ReconnectOptions};
use sheepdog_nbd::{ListenAddr, Listener, Server, VdiExports, VdiExportsOptions};
use tokio::signal::unix::{SignalKind, signal};

use crate::context::Context;
use crate::exit::{BAD_ARGUMENT, Outcome, SYSTEM, Stop, fail};
use crate::out::{self, errno_text, text};

/// Runs the server until it is told to stop.
pub async fn serve(context: &Context) -> Outcome {
    let addresses = addresses(context)?;
    let gateway = context.session.gateway();
    if !context.session.reach(&gateway).await {
        return Err(fail(SYSTEM, format_args!("no sheep answers at {}", gateway.host_port())));
    }
    let mut listeners = Vec::new();
    for address in &addresses {
        let listener = Listener::bind(address)
            .await
            .map_err(|e| fail(SYSTEM, format_args!("cannot serve NBD on {address}: {}", errno_text(&e))))?;
        listeners.push(listener);
    }
    let server = server(context, VdiExportsOptions::default());
    for (listener, address) in listeners.into_iter().zip(addresses) {
        let server = server.clone();
        tokio::spawn(async move {
            if let Err(e) = server.serve(listener).await {
                out::log(format_args!("the NBD server on {address} ended: {}", errno_text(&e)));
            }
        });
    }
    stop_signal().await?;
    server.shutdown().await;
    Ok(())
}

/// A server of the gateway's cluster; call it inside the runtime.
pub fn server(context: &Context, options: VdiExportsOptions) -> Server {
    let address = context.session.gateway().socket_addr().into();
    let service = Reconnect::new(address, ReconnectOptions::default());
    Server::new(Arc::new(VdiExports::new(Arc::new(service), options)))
}

fn addresses(context: &Context) -> Result<Vec<ListenAddr>, Stop> {
    let parse = |word: &Vec<u8>| ListenAddr::parse(&text(word)).map_err(|e| fail(BAD_ARGUMENT, e));
    context.args.iter().map(parse).collect()
}

async fn stop_signal() -> Outcome {
    let handler = |kind| signal(kind).map_err(|e| fail(SYSTEM, e));
    let (mut interrupt, mut terminate) =
        (handler(SignalKind::interrupt())?, handler(SignalKind::terminate())?);
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    Ok(())
}
