//! The two sides of a client's socket.

use std::io::{self, IoSlice};

use sheepdog_client::frame::Stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{tcp, unix};

/// Bytes read ahead for headers, options and small payloads.
const READ_BUFFER: usize = 64 << 10;

enum ReadHalf {
    Tcp(tcp::OwnedReadHalf),
    Unix(unix::OwnedReadHalf),
}

/// The sending side.
pub(crate) enum WriteHalf {
    Tcp(tcp::OwnedWriteHalf),
    Unix(unix::OwnedWriteHalf),
}

impl WriteHalf {
    pub(crate) fn try_write_vectored(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            WriteHalf::Tcp(half) => half.try_write_vectored(bufs),
            WriteHalf::Unix(half) => half.try_write_vectored(bufs),
        }
    }

    pub(crate) async fn writable(&self) -> io::Result<()> {
        match self {
            WriteHalf::Tcp(half) => half.writable().await,
            WriteHalf::Unix(half) => half.writable().await,
        }
    }

    pub(crate) async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            WriteHalf::Tcp(half) => half.write_all(bytes).await,
            WriteHalf::Unix(half) => half.write_all(bytes).await,
        }
    }
}

/// The receiving side, with read-ahead.
pub(crate) struct Input {
    half: ReadHalf,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

/// Splits a connected socket.
pub(crate) fn split(stream: Stream) -> (Input, WriteHalf) {
    let (read, write) = match stream {
        Stream::Tcp(stream) => {
            tune(&stream);
            let (r, w) = stream.into_split();
            (ReadHalf::Tcp(r), WriteHalf::Tcp(w))
        }
        Stream::Unix(stream) => {
            let (r, w) = stream.into_split();
            (ReadHalf::Unix(r), WriteHalf::Unix(w))
        }
    };
    (Input { half: read, buffer: vec![0; READ_BUFFER].into(), start: 0, end: 0 }, write)
}

/// No delay; and keepalive, because an idle client is legal but a host that vanished must be noticed some day. Where
/// an option cannot be set only latency, or a connection slot, is lost.
fn tune(stream: &tokio::net::TcpStream) {
    use nix::sys::socket::{setsockopt, sockopt};
    let _ = stream.set_nodelay(true);
    let _ = setsockopt(stream, sockopt::KeepAlive, &true);
    let _ = setsockopt(stream, sockopt::TcpKeepIdle, &60);
    let _ = setsockopt(stream, sockopt::TcpKeepInterval, &10);
    let _ = setsockopt(stream, sockopt::TcpKeepCount, &6);
}

impl Input {
    async fn read(half: &mut ReadHalf, out: &mut [u8]) -> io::Result<usize> {
        match half {
            ReadHalf::Tcp(half) => half.read(out).await,
            ReadHalf::Unix(half) => half.read(out).await,
        }
    }

    /// Bytes received and not consumed.
    pub(crate) fn buffered(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Drops the first `n` buffered bytes.
    pub(crate) fn consume(&mut self, n: usize) {
        self.start = (self.start + n).min(self.end);
    }

    /// Receives more into the buffer; 0 = end of the stream. Callers consume enough to leave room.
    pub(crate) async fn fill(&mut self) -> io::Result<usize> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let n = Self::read(&mut self.half, &mut self.buffer[self.end..]).await?;
        self.end += n;
        Ok(n)
    }

    /// Moves buffered bytes to `out`; returns how many.
    pub(crate) fn take(&mut self, out: &mut [u8]) -> usize {
        let n = out.len().min(self.end - self.start);
        out[..n].copy_from_slice(&self.buffer[self.start..self.start + n]);
        self.start += n;
        n
    }

    /// Receives straight into `out`, past the empty buffer; 0 = end of the stream.
    pub(crate) async fn read_direct(&mut self, out: &mut [u8]) -> io::Result<usize> {
        debug_assert!(self.start == self.end);
        Self::read(&mut self.half, out).await
    }

    /// Exactly `out.len()` bytes.
    pub(crate) async fn read_exact(&mut self, out: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        loop {
            done += self.take(&mut out[done..]);
            if done == out.len() {
                return Ok(());
            }
            if self.fill().await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}
