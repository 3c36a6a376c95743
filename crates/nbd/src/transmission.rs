//! The transmission phase: one task that receives requests, runs them and sends answers.
//!
//! Each turn of the loop starts what has been received, collects what has finished, and puts all answers into as few
//! vectored writes as possible; only then it waits, for bytes, for an operation, or for room in the socket. Operations
//! that were started are always run to their end, also when the client is gone.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use sheepdog_buffer::PageBuf;
use sheepdog_client::Volume;
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::execute::{Command, execute};
use crate::output::{Output, Reply, Request};
use crate::proto::{Context, EXTENDED_REQUEST_MAGIC, MAX_REQUEST, Mode, REQUEST_MAGIC, cmd, cmd_flag};
use crate::server::{Limits, stopped};
use crate::socket::{Input, WriteHalf};

/// What a request costs of the byte budget besides its payload.
const REQUEST_COST: usize = 4 << 10;
/// Most bytes of a payload that is received only to be dropped; more ends the connection.
const MAX_SKIPPED: u64 = 4 * MAX_REQUEST as u64;

/// Why a connection ended.
#[derive(Debug, Error)]
pub(crate) enum SessionError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Protocol(&'static str),
}

/// What is being received.
enum Receiving {
    Header,
    Payload { command: Command, buffer: PageBuf, filled: usize },
    Skipping { command: Command, left: u64, error: u32 },
}

/// What a received request asks for.
enum Event {
    Start(Command, Bytes),
    Refuse(Command, u32),
    Disconnect,
}

struct Receiver {
    input: Input,
    state: Receiving,
    mode: Mode,
    volume: Arc<Volume>,
    contexts: Arc<[Context]>,
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

impl Receiver {
    fn parse_header(&mut self) -> Result<Option<Command>, SessionError> {
        let extended = self.mode == Mode::Extended;
        let (len, magic) = if extended { (32, EXTENDED_REQUEST_MAGIC) } else { (28, REQUEST_MAGIC) };
        let bytes = self.input.buffered();
        if bytes.len() < len {
            return Ok(None);
        }
        if u32::from_be_bytes(field(bytes, 0)) != magic {
            return Err(SessionError::Protocol("bad request magic"));
        }
        let command = Command {
            flags: u16::from_be_bytes(field(bytes, 4)),
            kind: u16::from_be_bytes(field(bytes, 6)),
            cookie: u64::from_be_bytes(field(bytes, 8)),
            offset: u64::from_be_bytes(field(bytes, 16)),
            length: if extended {
                u64::from_be_bytes(field(bytes, 24))
            } else {
                u32::from_be_bytes(field(bytes, 24)).into()
            },
        };
        self.input.consume(len);
        Ok(Some(command))
    }

    /// Payload bytes behind a header. QEMU sends extended writes without the flag that announces their payload.
    fn payload_len(&self, command: &Command) -> u64 {
        let announced = self.mode == Mode::Extended && command.flags & cmd_flag::PAYLOAD_LEN != 0;
        if command.kind == cmd::WRITE || announced { command.length } else { 0 }
    }

    /// The next request, as far as bytes are there.
    fn next(&mut self) -> Result<Option<Event>, SessionError> {
        loop {
            match &mut self.state {
                Receiving::Header => {
                    let Some(command) = self.parse_header()? else { return Ok(None) };
                    if command.kind == cmd::DISC {
                        return Ok(Some(Event::Disconnect));
                    }
                    let refusal = command.refusal(&self.volume, &self.contexts);
                    let payload = self.payload_len(&command);
                    match refusal {
                        Some(_) if payload > MAX_SKIPPED => {
                            return Err(SessionError::Protocol("payload far too long"));
                        }
                        Some(error) if payload > 0 => {
                            self.state = Receiving::Skipping { command, left: payload, error }
                        }
                        Some(error) => return Ok(Some(Event::Refuse(command, error))),
                        // Only writes get here with a payload, at most MAX_REQUEST.
                        None if payload > 0 => {
                            let buffer = PageBuf::dirty(payload as usize);
                            self.state = Receiving::Payload { command, buffer, filled: 0 };
                        }
                        None => return Ok(Some(Event::Start(command, Bytes::new()))),
                    }
                }
                Receiving::Payload { buffer, filled, .. } => {
                    *filled += self.input.take(&mut buffer[*filled..]);
                    if *filled < buffer.len() {
                        return Ok(None);
                    }
                    let done = std::mem::replace(&mut self.state, Receiving::Header);
                    if let Receiving::Payload { command, buffer, .. } = done {
                        return Ok(Some(Event::Start(command, buffer.freeze())));
                    }
                }
                Receiving::Skipping { command, left, error } => {
                    let n = self.input.buffered().len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                    self.input.consume(n);
                    *left -= n as u64;
                    if *left > 0 {
                        return Ok(None);
                    }
                    let event = Event::Refuse(*command, *error);
                    self.state = Receiving::Header;
                    return Ok(Some(event));
                }
            }
        }
    }

    /// Receives something; 0 = end of the stream. Nothing is lost when it is dropped before it returns.
    async fn receive(&mut self) -> io::Result<usize> {
        match &mut self.state {
            Receiving::Payload { buffer, filled, .. } => {
                let n = self.input.read_direct(&mut buffer[*filled..]).await?;
                *filled += n;
                Ok(n)
            }
            Receiving::Header | Receiving::Skipping { .. } => self.input.fill().await,
        }
    }

    /// Whether a request has arrived in part: then the rest must follow soon.
    fn is_midway(&self) -> bool {
        !matches!(self.state, Receiving::Header) || !self.input.buffered().is_empty()
    }
}

/// What a session needs.
pub(crate) struct Session {
    pub(crate) input: Input,
    pub(crate) output: WriteHalf,
    pub(crate) volume: Arc<Volume>,
    pub(crate) mode: Mode,
    pub(crate) contexts: Vec<Context>,
    pub(crate) limits: Limits,
    pub(crate) stop: watch::Receiver<bool>,
}

fn request_of(command: &Command) -> Request {
    let chunked = matches!(command.kind, cmd::READ | cmd::BLOCK_STATUS);
    Request { cookie: command.cookie, offset: command.offset, chunked }
}

fn cost_of(command: &Command) -> usize {
    REQUEST_COST + command.cost()
}

/// A request being executed.
type Task = Pin<Box<dyn Future<Output = (Command, Reply)> + Send>>;

struct Connection {
    receiver: Receiver,
    socket: WriteHalf,
    replies: Output,
    running: FuturesUnordered<Task>,
    /// Bytes of the requests being executed.
    held: usize,
    limits: Limits,
    /// No more requests are read: the client has left, or the server stops.
    leaving: bool,
    received_at: Instant,
    /// Answers wait for room in the socket since then.
    unsent_since: Option<Instant>,
}

/// Serves a connection until the client leaves, breaks the protocol or stalls, or the server stops.
pub(crate) async fn run(session: Session) -> Result<(), SessionError> {
    let Session { input, output, volume, mode, contexts, limits, mut stop } = session;
    let contexts = contexts.into();
    let receiver = Receiver { input, state: Receiving::Header, mode, volume, contexts };
    let mut connection = Connection {
        receiver,
        socket: output,
        replies: Output::new(mode),
        running: FuturesUnordered::new(),
        held: 0,
        limits,
        leaving: false,
        received_at: Instant::now(),
        unsent_since: None,
    };
    let stopped = async move { stopped(&mut stop).await };
    let outcome = connection.serve(stopped).await;
    while connection.running.next().await.is_some() {}
    outcome
}

impl Connection {
    async fn serve(&mut self, stopped: impl Future<Output = ()>) -> Result<(), SessionError> {
        tokio::pin!(stopped);
        loop {
            let blocked = self.start_received()?;
            self.collect_finished();
            self.send()?;
            if blocked && self.has_room() {
                continue; // what is buffered can be started now
            }
            if self.leaving && self.running.is_empty() && self.replies.is_empty() {
                return Ok(());
            }
            self.wait(stopped.as_mut()).await?;
        }
    }

    fn has_room(&self) -> bool {
        self.running.len() < self.limits.requests && self.held + self.replies.bytes() < self.limits.bytes
    }

    /// Starts every request received whole. `true` = there may be more, but no room.
    fn start_received(&mut self) -> Result<bool, SessionError> {
        while !self.leaving {
            if !self.has_room() {
                return Ok(true);
            }
            match self.receiver.next()? {
                Some(Event::Start(command, payload)) => self.start(command, payload),
                Some(Event::Refuse(command, error)) => {
                    self.replies.push(request_of(&command), Reply::Status(error));
                }
                Some(Event::Disconnect) => self.leaving = true,
                None => break,
            }
        }
        Ok(false)
    }

    fn start(&mut self, command: Command, payload: Bytes) {
        self.held += cost_of(&command);
        let volume = self.receiver.volume.clone();
        let contexts = self.receiver.contexts.clone();
        let mode = self.receiver.mode;
        self.running.push(Box::pin(async move {
            let reply = execute(&volume, &command, payload, &contexts, mode).await;
            (command, reply)
        }));
    }

    fn finished(&mut self, (command, reply): (Command, Reply)) {
        self.held -= cost_of(&command);
        self.replies.push(request_of(&command), reply);
    }

    fn collect_finished(&mut self) {
        while let Some(Some(done)) = self.running.next().now_or_never() {
            self.finished(done);
        }
    }

    fn send(&mut self) -> io::Result<()> {
        let progress = self.replies.flush(&self.socket)?;
        if self.replies.is_empty() {
            self.unsent_since = None;
        } else if progress || self.unsent_since.is_none() {
            self.unsent_since = Some(Instant::now());
        }
        Ok(())
    }

    /// When the connection counts as stalled: a request received in part, or answers that nobody takes.
    fn deadline(&self, reading: bool) -> Option<Instant> {
        let receiving = (reading && self.receiver.is_midway()).then_some(self.received_at);
        let since = receiving.into_iter().chain(self.unsent_since).min()?;
        Some(since + self.limits.stall)
    }

    /// Waits for bytes, an operation, or room in the socket.
    async fn wait(&mut self, stopped: Pin<&mut impl Future<Output = ()>>) -> Result<(), SessionError> {
        let reading = !self.leaving && self.has_room();
        if !reading {
            self.received_at = Instant::now(); // the pause is ours
        }
        let deadline = self.deadline(reading);
        let stalled = async {
            match deadline {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            Some(done) = self.running.next(), if !self.running.is_empty() => self.finished(done),
            received = self.receiver.receive(), if reading => {
                self.received_at = Instant::now();
                // The end of the stream is a way to leave; answers may still be wanted.
                self.leaving = received? == 0;
            }
            room = self.socket.writable(), if !self.replies.is_empty() => room?,
            () = stopped, if !self.leaving => self.leaving = true,
            () = stalled => return Err(SessionError::Protocol("the client stalled")),
        }
        Ok(())
    }
}
