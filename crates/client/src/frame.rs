//! Frames on a socket: 48-byte headers, each followed by its payload (spec 01, 2.2).
//!
//! [`FrameReader`] receives a payload once, into the page-aligned buffer it stays in. [`FrameWriter`] sends a frame
//! from any thread: at once when the socket has room and nothing else is about to be sent, otherwise through its task,
//! which puts everything queued into vectored writes. Frames are never interleaved.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use nix::sys::socket::{Shutdown, shutdown};
use parking_lot::Mutex;
use sheepdog_buffer::PageBuf;
use sheepdog_proto::HEADER_LEN;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpStream, UnixStream, tcp, unix};
use tokio::sync::Notify;

/// Bytes read ahead for headers and small payloads.
const READ_BUFFER: usize = 64 << 10;
/// A header that has begun must be complete within this time.
const HEADER_STALL: Duration = Duration::from_secs(60);
/// Most frames of one vectored write.
const MAX_BATCH: usize = 64;
/// Payloads below this many bytes need no page-aligned buffer.
const SMALL: usize = 512;

/// A stream socket.
pub enum Stream {
    /// TCP, without delay.
    Tcp(TcpStream),
    /// A sheep's `sock`.
    Unix(UnixStream),
}

enum ReadHalf {
    Tcp(tcp::OwnedReadHalf),
    Unix(unix::OwnedReadHalf),
}

enum WriteHalf {
    Tcp(tcp::OwnedWriteHalf),
    Unix(unix::OwnedWriteHalf),
}

impl ReadHalf {
    async fn readable(&self) -> io::Result<()> {
        match self {
            ReadHalf::Tcp(half) => half.readable().await,
            ReadHalf::Unix(half) => half.readable().await,
        }
    }

    fn try_read(&self, out: &mut [u8]) -> io::Result<usize> {
        match self {
            ReadHalf::Tcp(half) => half.try_read(out),
            ReadHalf::Unix(half) => half.try_read(out),
        }
    }
}

impl WriteHalf {
    fn try_write_vectored(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            WriteHalf::Tcp(half) => half.try_write_vectored(bufs),
            WriteHalf::Unix(half) => half.try_write_vectored(bufs),
        }
    }

    /// Wakes the reading side, too.
    fn shut_down(&self) {
        let result = match self {
            WriteHalf::Tcp(half) => shutdown(half.as_ref().as_raw_fd(), Shutdown::Both),
            WriteHalf::Unix(half) => shutdown(half.as_ref().as_raw_fd(), Shutdown::Both),
        };
        let _ = result; // it fails only if the connection is gone already
    }

    async fn writable(&self) -> io::Result<()> {
        match self {
            WriteHalf::Tcp(half) => half.writable().await,
            WriteHalf::Unix(half) => half.writable().await,
        }
    }
}

/// Splits a socket into its two sides. The writer's task ends when the writer is closed or the socket fails.
pub fn split(stream: Stream) -> (FrameReader, FrameWriter) {
    let (read, write) = match stream {
        Stream::Tcp(s) => {
            let _ = s.set_nodelay(true); // only latency is lost where it cannot be set
            let (r, w) = s.into_split();
            (ReadHalf::Tcp(r), WriteHalf::Tcp(w))
        }
        Stream::Unix(s) => {
            let (r, w) = s.into_split();
            (ReadHalf::Unix(r), WriteHalf::Unix(w))
        }
    };
    let reader = FrameReader { half: read, buffer: None, start: 0, end: 0 };
    let shared = Arc::new(Shared {
        half: write,
        state: Mutex::default(),
        wake: Notify::new(),
        reset: AtomicBool::new(false),
    });
    tokio::spawn(write_queued(shared.clone()));
    (reader, FrameWriter { shared })
}

/// The receiving side.
pub struct FrameReader {
    half: ReadHalf,
    /// Present while bytes are in it: an idle connection holds no memory.
    buffer: Option<PageBuf>,
    start: usize,
    end: usize,
}

impl FrameReader {
    /// Receives what has arrived, waiting for at least one byte; 0 at the end of the stream. Called with less than a
    /// header here, which is kept aside meanwhile: a connection that waits holds no buffer.
    async fn fill(&mut self) -> io::Result<usize> {
        let mut begun = [0; HEADER_LEN];
        let kept = self.buffered().len();
        begun[..kept].copy_from_slice(self.buffered());
        self.buffer = None;
        (self.start, self.end) = (0, 0);
        loop {
            if kept == 0 {
                self.half.readable().await?;
            } else {
                let more = tokio::time::timeout(HEADER_STALL, self.half.readable()).await;
                more.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
            }
            let mut buffer = PageBuf::dirty(READ_BUFFER);
            match self.half.try_read(&mut buffer[kept..]) {
                Ok(n) => {
                    buffer[..kept].copy_from_slice(&begun[..kept]);
                    self.buffer = Some(buffer);
                    self.end = kept + n;
                    return Ok(n);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
    }

    fn buffered(&self) -> &[u8] {
        self.buffer.as_ref().map_or(&[], |buffer| &buffer[self.start..self.end])
    }

    /// The next header; `None` at a clean end of the stream.
    pub async fn header(&mut self) -> io::Result<Option<[u8; HEADER_LEN]>> {
        while self.end - self.start < HEADER_LEN {
            if self.fill().await? == 0 {
                return if self.start == self.end {
                    Ok(None)
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                };
            }
        }
        let mut header = [0; HEADER_LEN];
        header.copy_from_slice(&self.buffered()[..HEADER_LEN]);
        self.start += HEADER_LEN;
        Ok(Some(header))
    }

    /// Whether a whole header has been received already.
    pub fn has_buffered(&self) -> bool {
        self.end - self.start >= HEADER_LEN
    }

    async fn read_into(&mut self, out: &mut [u8]) -> io::Result<()> {
        let buffered = out.len().min(self.end - self.start);
        out[..buffered].copy_from_slice(&self.buffered()[..buffered]);
        self.start += buffered;
        if buffered == out.len() {
            return Ok(());
        }
        match &mut self.half {
            ReadHalf::Tcp(half) => half.read_exact(&mut out[buffered..]).await?,
            ReadHalf::Unix(half) => half.read_exact(&mut out[buffered..]).await?,
        };
        Ok(())
    }

    /// A payload of exactly `len` bytes. The caller has bounded `len`.
    pub async fn payload(&mut self, len: usize) -> io::Result<Bytes> {
        if len == 0 {
            return Ok(Bytes::new());
        }
        if len < SMALL {
            let mut small = vec![0; len];
            self.read_into(&mut small).await?;
            return Ok(small.into());
        }
        let mut buf = PageBuf::dirty(len);
        self.read_into(&mut buf).await?;
        Ok(buf.freeze())
    }
}

/// Something released when a frame has been sent or dropped, for example its share of a byte budget.
pub type Guard = Box<dyn Send + Sync>;

struct Frame {
    header: [u8; HEADER_LEN],
    payload: Bytes,
    _guard: Option<Guard>,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Frame>,
    /// Bytes of the first frame that are sent already.
    sent: usize,
    closed: bool,
    /// The task is responsible for the queue.
    task_owns: bool,
}

struct Shared {
    half: WriteHalf,
    state: Mutex<State>,
    wake: Notify,
    reset: AtomicBool,
}

impl Shared {
    /// Writes until the queue is empty or the socket is full. `Ok(true)` = empty.
    fn flush(&self, state: &mut State) -> io::Result<bool> {
        while !state.queue.is_empty() {
            let mut slices: Vec<IoSlice<'_>> = Vec::with_capacity(2 * state.queue.len().min(MAX_BATCH));
            let mut skip = state.sent;
            for frame in state.queue.iter().take(MAX_BATCH) {
                for part in [&frame.header[..], &frame.payload[..]] {
                    if skip >= part.len() {
                        skip -= part.len();
                    } else {
                        slices.push(IoSlice::new(&part[skip..]));
                        skip = 0;
                    }
                }
            }
            match self.half.try_write_vectored(&slices) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => state.advance(n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }

    fn fail(state: &mut State) {
        state.closed = true;
        state.queue.clear();
        state.sent = 0;
    }
}

impl State {
    fn advance(&mut self, n: usize) {
        self.sent += n;
        while let Some(frame) = self.queue.front() {
            let len = HEADER_LEN + frame.payload.len();
            if self.sent < len {
                break;
            }
            self.sent -= len;
            self.queue.pop_front();
        }
    }
}

async fn write_queued(shared: Arc<Shared>) {
    loop {
        shared.wake.notified().await;
        loop {
            {
                let mut state = shared.state.lock();
                match shared.flush(&mut state) {
                    Ok(true) => {
                        state.task_owns = false;
                        if state.closed {
                            return;
                        }
                        break;
                    }
                    Ok(false) => {}
                    Err(_) => {
                        Shared::fail(&mut state);
                        return;
                    }
                }
            }
            if shared.half.writable().await.is_err() {
                Shared::fail(&mut shared.state.lock());
                return;
            }
        }
    }
}

/// The sending side; clones send into the same socket.
#[derive(Clone)]
pub struct FrameWriter {
    shared: Arc<Shared>,
}

impl FrameWriter {
    /// Sends a frame, never waiting. `alone` says that no other frame is expected soon: it is written at once, which
    /// saves a wake-up; otherwise it is left to the task, which sends it together with what comes meanwhile. `guard`
    /// is dropped when the frame is sent or the connection is gone. Frames for a closed connection are dropped.
    pub fn send(&self, header: [u8; HEADER_LEN], payload: Bytes, guard: Option<Guard>, alone: bool) {
        let mut state = self.shared.state.lock();
        if state.closed {
            return;
        }
        state.queue.push_back(Frame { header, payload, _guard: guard });
        if state.task_owns {
            return;
        }
        if alone {
            match self.shared.flush(&mut state) {
                Ok(true) => return,
                Ok(false) => {}
                Err(_) => Shared::fail(&mut state),
            }
        }
        state.task_owns = true;
        self.shared.wake.notify_one();
    }

    /// Whether the socket failed or was closed here.
    pub fn is_closed(&self) -> bool {
        self.shared.state.lock().closed
    }

    /// Resets the connection: what is queued or on its way is dropped, and the other side can tell ([`is_reset`]).
    ///
    /// [`is_reset`]: FrameWriter::is_reset
    pub fn abort(&self) {
        if let WriteHalf::Tcp(half) = &self.shared.half {
            let _ = half.as_ref().set_zero_linger(); // without it the end is only less abrupt
        }
        let mut state = self.shared.state.lock();
        Shared::fail(&mut state);
        state.task_owns = true;
        self.shared.half.shut_down();
        self.shared.wake.notify_one();
    }

    /// Whether the other side has reset the connection: it no longer wants what it asked for.
    pub fn is_reset(&self) -> bool {
        // The system tells it once.
        let told = || match &self.shared.half {
            WriteHalf::Tcp(half) => !matches!(half.as_ref().take_error(), Ok(None)),
            WriteHalf::Unix(half) => !matches!(half.as_ref().take_error(), Ok(None)),
        };
        if self.shared.reset.load(Ordering::Acquire) {
            return true;
        }
        let reset = told();
        if reset {
            self.shared.reset.store(true, Ordering::Release);
        }
        reset
    }

    /// Ends the connection after what is queued; later frames are dropped.
    pub fn close(&self) {
        let mut state = self.shared.state.lock();
        state.closed = true;
        state.task_owns = true;
        self.shared.wake.notify_one();
    }
}
