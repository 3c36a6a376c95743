//! Listening sockets (spec 01, 2.1): every address of `-b` (or all), the I/O address, and `sock`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use nix::sys::socket::{setsockopt, sockopt::Ipv6V6Only};
use tokio::net::{TcpListener, TcpSocket, UnixListener};

/// Connections waiting to be accepted.
const BACKLOG: u32 = 4096;

/// Listens on one address; IPv6 sockets take no IPv4 connections.
pub fn tcp(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    if addr.is_ipv6() {
        setsockopt(&socket, Ipv6V6Only, &true)?;
    }
    socket.bind(addr)?;
    socket.listen(BACKLOG)
}

/// Listens on `bind`, or on all addresses of both families; at least one must work.
pub fn all(bind: Option<IpAddr>, port: u16) -> io::Result<Vec<TcpListener>> {
    let addresses: Vec<IpAddr> = match bind {
        Some(ip) => vec![ip],
        None => vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
    };
    let mut listeners = Vec::new();
    let mut failure = None;
    for ip in addresses {
        match tcp(SocketAddr::new(ip, port)) {
            Ok(listener) => listeners.push(listener),
            Err(error) => failure = Some((ip, error)),
        }
    }
    match failure {
        // Half a port would let two daemons share it, one per family.
        Some((_, error)) if error.kind() == io::ErrorKind::AddrInUse => Err(error),
        Some((_, error)) if listeners.is_empty() => Err(error),
        Some((ip, error)) => {
            tracing::info!("not listening on {ip}: {error}");
            Ok(listeners)
        }
        None => Ok(listeners),
    }
}

/// Listens on a Unix socket, replacing what an earlier run left.
pub fn unix(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    UnixListener::bind(path)
}
