//! Replies: their framing, and the queue that leaves in vectored writes.

use std::collections::VecDeque;
use std::io::{self, IoSlice};

use bytes::Bytes;
use sheepdog_client::Segment;

use crate::proto::{Context, EXTENDED_REPLY_MAGIC, Mode, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk};
use crate::socket::WriteHalf;

/// Most slices of one vectored write.
const MAX_SLICES: usize = 128;
/// Largest piece of zeros that needs no memory.
const ZERO_PIECE: usize = 64 << 10;
/// Room for the longest header: an extended chunk's, and a hole's body.
const HEAD: usize = 48;

/// What to answer.
pub(crate) enum Reply {
    /// Success without data, or an error number.
    Status(u32),
    /// What was read, at which offset; `whole` = in one chunk.
    Data { offset: u64, segments: Vec<Segment>, whole: bool },
    /// Per context, lengths and flags.
    Extents(Vec<(Context, Vec<(u64, u32)>)>),
}

enum Part {
    Head([u8; HEAD], u8),
    Body(Bytes),
}

impl Part {
    fn bytes(&self) -> &[u8] {
        match self {
            Part::Head(bytes, len) => &bytes[..usize::from(*len)],
            Part::Body(bytes) => bytes,
        }
    }
}

/// The replies not sent yet.
pub(crate) struct Output {
    mode: Mode,
    parts: VecDeque<Part>,
    /// Bytes of the first part that are sent.
    sent: usize,
    /// Bytes of payload queued.
    bytes: usize,
}

struct Head {
    bytes: [u8; HEAD],
    len: usize,
}

impl Head {
    fn new() -> Head {
        Head { bytes: [0; HEAD], len: 0 }
    }

    fn put(mut self, bytes: &[u8]) -> Head {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
        self
    }
}

impl Output {
    pub(crate) fn new(mode: Mode) -> Output {
        Output { mode, parts: VecDeque::new(), sent: 0, bytes: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Payload bytes held.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    fn head(&mut self, head: Head) {
        self.parts.push_back(Part::Head(head.bytes, head.len as u8));
    }

    fn body(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.bytes += bytes.len();
            self.parts.push_back(Part::Body(bytes));
        }
    }

    fn zeros(&mut self, mut len: usize) {
        while len > 0 {
            let piece = len.min(ZERO_PIECE);
            self.body(sheepdog_buffer::zeros(piece));
            len -= piece;
        }
    }

    fn simple(&self, cookie: u64, error: u32) -> Head {
        Head::new()
            .put(&SIMPLE_REPLY_MAGIC.to_be_bytes())
            .put(&error.to_be_bytes())
            .put(&cookie.to_be_bytes())
    }

    fn chunk(&self, request: Request, done: bool, kind: u16, len: usize) -> Head {
        let flags = if done { chunk::FLAG_DONE } else { 0 };
        let extended = self.mode == Mode::Extended;
        let magic = if extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC };
        let head = Head::new()
            .put(&magic.to_be_bytes())
            .put(&flags.to_be_bytes())
            .put(&kind.to_be_bytes())
            .put(&request.cookie.to_be_bytes());
        if extended {
            head.put(&request.offset.to_be_bytes()).put(&(len as u64).to_be_bytes())
        } else {
            head.put(&(len as u32).to_be_bytes())
        }
    }

    /// Queues the answer to a request.
    pub(crate) fn push(&mut self, request: Request, reply: Reply) {
        match reply {
            Reply::Status(error) => self.push_status(request, error),
            Reply::Data { segments, .. } if self.mode == Mode::Simple => {
                let head = self.simple(request.cookie, 0);
                self.head(head);
                self.push_segments(segments);
            }
            Reply::Data { offset, segments, whole } => self.push_data(request, offset, segments, whole),
            Reply::Extents(contexts) => self.push_extents(request, contexts),
        }
    }

    fn push_status(&mut self, request: Request, error: u32) {
        // Only reads and block status need chunks; clients accept simple replies to the rest, and they are shorter.
        let head = if self.mode == Mode::Simple || (self.mode == Mode::Structured && !request.chunked) {
            self.simple(request.cookie, error)
        } else if error == 0 {
            self.chunk(request, true, chunk::NONE, 0)
        } else {
            let head = self.chunk(request, true, chunk::ERROR, 6);
            head.put(&error.to_be_bytes()).put(&0u16.to_be_bytes())
        };
        self.head(head);
    }

    fn push_segments(&mut self, segments: Vec<Segment>) {
        for segment in segments {
            match segment {
                Segment::Hole(len) => self.zeros(len),
                Segment::Data(data) => self.body(data),
            }
        }
    }

    fn push_data(&mut self, request: Request, offset: u64, segments: Vec<Segment>, whole: bool) {
        if segments.is_empty() {
            return self.push_status(request, 0);
        }
        if whole && segments.len() > 1 {
            let len: usize = segments.iter().map(Segment::len).sum();
            let head = self.chunk(request, true, chunk::OFFSET_DATA, 8 + len);
            self.head(head.put(&offset.to_be_bytes()));
            return self.push_segments(segments);
        }
        let (mut at, last) = (offset, segments.len() - 1);
        for (i, segment) in segments.into_iter().enumerate() {
            let len = segment.len();
            match segment {
                Segment::Hole(len) => {
                    let head = self.chunk(request, i == last, chunk::OFFSET_HOLE, 12);
                    self.head(head.put(&at.to_be_bytes()).put(&(len as u32).to_be_bytes()));
                }
                Segment::Data(data) => {
                    let head = self.chunk(request, i == last, chunk::OFFSET_DATA, 8 + data.len());
                    self.head(head.put(&at.to_be_bytes()));
                    self.body(data);
                }
            }
            at += len as u64;
        }
    }

    fn push_extents(&mut self, request: Request, contexts: Vec<(Context, Vec<(u64, u32)>)>) {
        let count = contexts.len();
        for (i, (context, extents)) in contexts.into_iter().enumerate() {
            let done = i + 1 == count;
            let mut body = Vec::with_capacity(16 * extents.len());
            if self.mode == Mode::Extended {
                for (len, flags) in &extents {
                    body.extend_from_slice(&len.to_be_bytes());
                    body.extend_from_slice(&u64::from(*flags).to_be_bytes());
                }
                let head = self.chunk(request, done, chunk::BLOCK_STATUS_EXT, 8 + body.len());
                let count = extents.len() as u32;
                self.head(head.put(&context.id().to_be_bytes()).put(&count.to_be_bytes()));
            } else {
                for (len, flags) in &extents {
                    let len = u32::try_from(*len).unwrap_or(u32::MAX);
                    body.extend_from_slice(&len.to_be_bytes());
                    body.extend_from_slice(&flags.to_be_bytes());
                }
                let head = self.chunk(request, done, chunk::BLOCK_STATUS, 4 + body.len());
                self.head(head.put(&context.id().to_be_bytes()));
            }
            self.body(body.into());
        }
    }

    /// Sends until the queue is empty or the socket is full. Whether anything was sent.
    pub(crate) fn flush(&mut self, socket: &WriteHalf) -> io::Result<bool> {
        let mut progress = false;
        while !self.parts.is_empty() {
            let mut slices = [IoSlice::new(&[]); MAX_SLICES];
            let mut skip = self.sent;
            let mut used = 0;
            for (slice, part) in slices.iter_mut().zip(&self.parts) {
                *slice = IoSlice::new(&part.bytes()[skip..]);
                skip = 0;
                used += 1;
            }
            match socket.try_write_vectored(&slices[..used]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    progress = true;
                    self.advance(n);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        Ok(progress)
    }

    fn advance(&mut self, n: usize) {
        self.sent += n;
        while let Some(part) = self.parts.front() {
            let len = part.bytes().len();
            if self.sent < len {
                return;
            }
            self.sent -= len;
            if let Some(Part::Body(bytes)) = self.parts.pop_front() {
                self.bytes -= bytes.len();
            }
        }
    }
}

/// What a reply needs of its request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request {
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    /// Structured replies must be chunks.
    pub(crate) chunked: bool,
}
