//! Where the server listens.

use std::fmt;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use sheepdog_client::frame::Stream;
use thiserror::Error;
use tokio::net::{TcpListener, UnixListener};

/// An address to listen on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenAddr {
    /// `unix:PATH`
    Unix(PathBuf),
    /// `tcp:HOST:PORT`; IPv6 literals in brackets.
    Tcp(String, u16),
}

/// Why text is no address.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("invalid NBD address '{0}': expected unix:PATH or tcp:HOST:PORT")]
pub struct ParseAddrError(String);

impl ListenAddr {
    /// Parses `unix:PATH` or `tcp:HOST:PORT`.
    pub fn parse(text: &str) -> Result<ListenAddr, ParseAddrError> {
        let error = || ParseAddrError(text.to_owned());
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(ListenAddr::Unix(path.into())),
            Some(("tcp", rest)) => {
                let (host, port) = rest.rsplit_once(':').ok_or_else(error)?;
                let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
                let host = match bare {
                    Some(literal) => literal,
                    None if host.contains([':', '[', ']']) => return Err(error()),
                    None => host,
                };
                if host.is_empty() {
                    return Err(error());
                }
                Ok(ListenAddr::Tcp(host.to_owned(), port.parse().map_err(|_| error())?))
            }
            _ => Err(error()),
        }
    }
}

impl FromStr for ListenAddr {
    type Err = ParseAddrError;
    fn from_str(text: &str) -> Result<ListenAddr, ParseAddrError> {
        ListenAddr::parse(text)
    }
}

impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ListenAddr::Unix(path) => write!(f, "unix:{}", path.display()),
            ListenAddr::Tcp(host, port) if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            ListenAddr::Tcp(host, port) => write!(f, "tcp:{host}:{port}"),
        }
    }
}

enum Kind {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

/// A listening socket. That of a path removes the path when dropped.
pub struct Listener {
    kind: Kind,
}

/// Whether a path is a socket that nobody listens on.
async fn is_abandoned(path: &Path) -> bool {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    let refused = |e: io::Error| e.kind() == io::ErrorKind::ConnectionRefused;
    is_socket && tokio::net::UnixStream::connect(path).await.is_err_and(refused)
}

impl Listener {
    /// Listens. A path left behind by a server that is gone is replaced; one that somebody listens on, or that is no
    /// socket, is an error.
    pub async fn bind(addr: &ListenAddr) -> io::Result<Listener> {
        let kind = match addr {
            ListenAddr::Tcp(host, port) => Kind::Tcp(TcpListener::bind((host.as_str(), *port)).await?),
            ListenAddr::Unix(path) => {
                let listener = match UnixListener::bind(path) {
                    Err(e) if e.kind() == io::ErrorKind::AddrInUse && is_abandoned(path).await => {
                        std::fs::remove_file(path)?;
                        UnixListener::bind(path)?
                    }
                    other => other?,
                };
                Kind::Unix(listener, path.clone())
            }
        };
        Ok(Listener { kind })
    }

    /// The address, with the port that the system chose for port 0.
    pub fn local_addr(&self) -> io::Result<ListenAddr> {
        Ok(match &self.kind {
            Kind::Tcp(listener) => {
                let addr = listener.local_addr()?;
                ListenAddr::Tcp(addr.ip().to_string(), addr.port())
            }
            Kind::Unix(_, path) => ListenAddr::Unix(path.clone()),
        })
    }

    pub(crate) async fn accept(&self) -> io::Result<(Stream, String)> {
        Ok(match &self.kind {
            Kind::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                (Stream::Tcp(stream), peer.to_string())
            }
            Kind::Unix(listener, path) => {
                (Stream::Unix(listener.accept().await?.0), path.display().to_string())
            }
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Kind::Unix(_, path) = &self.kind {
            let _ = std::fs::remove_file(path); // somebody else may have removed it
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_parse_and_print() {
        for text in ["unix:/run/x.sock", "unix:rel", "tcp:localhost:10809", "tcp:[::1]:0", "tcp:0.0.0.0:1"] {
            assert_eq!(ListenAddr::parse(text).unwrap().to_string(), text);
        }
        for text in
            ["", "unix:", "tcp:", "tcp:host", "tcp::1", "tcp:a:b", "tcp:::1:5", "tcp:h:70000", "x:y", "/p"]
        {
            assert!(ListenAddr::parse(text).is_err(), "{text}");
        }
    }

    #[tokio::test]
    async fn a_stale_path_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let addr = ListenAddr::Unix(path.clone());
        let listener = Listener::bind(&addr).await.unwrap();
        assert!(Listener::bind(&addr).await.is_err());
        drop(listener);
        assert!(!path.exists());
        std::fs::write(&path, "precious").unwrap();
        assert!(Listener::bind(&addr).await.is_err());
        assert!(path.exists());
    }
}
