//! A server over an in-memory sheep, and a client that speaks NBD byte by byte.

#![allow(dead_code, clippy::unwrap_used)] // each test file uses its part; tests may panic

use std::sync::Arc;

use sheepdog_client::fake::FakeSheep;
use sheepdog_client::frame::Stream;
use sheepdog_client::vdi::{self, NewVdi};
use sheepdog_nbd::{Limits, Server, VdiExports, VdiExportsOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

pub const BLOCK: u64 = 1 << 20;

pub const OPT_EXPORT_NAME: u32 = 1;
pub const OPT_ABORT: u32 = 2;
pub const OPT_LIST: u32 = 3;
pub const OPT_STARTTLS: u32 = 5;
pub const OPT_INFO: u32 = 6;
pub const OPT_GO: u32 = 7;
pub const OPT_STRUCTURED: u32 = 8;
pub const OPT_LIST_META: u32 = 9;
pub const OPT_SET_META: u32 = 10;
pub const OPT_EXTENDED: u32 = 11;

pub const ACK: u32 = 1;
pub const ERR: u32 = 1 << 31;

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISC: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const CACHE: u16 = 5;
pub const ZEROES: u16 = 6;
pub const STATUS: u16 = 7;

pub struct World {
    pub sheep: Arc<FakeSheep>,
    pub exports: VdiExports,
    pub server: Server,
}

impl World {
    pub async fn new() -> World {
        Self::with(FakeSheep::new(), VdiExportsOptions::default(), Limits::default()).await
    }

    /// With a VDI `v` of four blocks.
    pub async fn with(sheep: FakeSheep, options: VdiExportsOptions, limits: Limits) -> World {
        let sheep = Arc::new(sheep);
        vdi::create(&*sheep, "v", &NewVdi { size: 4 * BLOCK, ..NewVdi::default() }).await.unwrap();
        let exports = VdiExports::new(sheep.clone(), options);
        let server = Server::with_limits(Arc::new(exports.clone()), limits);
        World { sheep, exports, server }
    }

    /// A client that has received the greeting and sent its flags.
    pub async fn client(&self) -> Client {
        let mut client = self.raw();
        let mut hello = [0; 18];
        client.socket.read_exact(&mut hello).await.unwrap();
        assert_eq!(&hello, b"NBDMAGICIHAVEOPT\x00\x03");
        client.socket.write_all(&3u32.to_be_bytes()).await.unwrap();
        client
    }

    pub fn raw(&self) -> Client {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = self.server.clone();
        let task = tokio::spawn(async move { server.handle(Stream::Unix(theirs), "test").await });
        Client { socket: ours, mode: Mode::Simple, next: 1, task }
    }

    pub async fn connected(&self, mode: Mode, name: &str) -> Client {
        let mut client = self.client().await;
        client.set_mode(mode).await;
        if mode != Mode::Simple {
            let contexts = ["base:allocation", "qemu:allocation-depth"];
            client.option(OPT_SET_META, &meta(name, &contexts)).await;
            assert_eq!(client.replies(OPT_SET_META).await.last().unwrap().0, ACK);
        }
        client.go(name).await;
        client
    }

    pub async fn until_idle(&self) {
        while self.exports.in_use().await > 0 {
            tokio::task::yield_now().await;
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Simple,
    Structured,
    Extended,
}

pub struct Client {
    pub socket: UnixStream,
    pub mode: Mode,
    next: u64,
    /// The server's side.
    pub task: tokio::task::JoinHandle<()>,
}

pub fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut out = string(name);
    out.extend((queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|q| out.extend(string(q)));
    out
}

pub fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

pub fn go_data(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut out = string(name);
    out.extend((infos.len() as u16).to_be_bytes());
    infos.iter().for_each(|i| out.extend(i.to_be_bytes()));
    out
}

/// A piece of an answer.
#[derive(Debug, PartialEq, Eq, Clone)]
pub enum Chunk {
    None,
    Data(u64, Vec<u8>),
    Hole(u64, u64),
    Error(u32),
    Status(u32, Vec<(u64, u64)>),
}

impl Client {
    pub async fn u16(&mut self) -> u16 {
        self.socket.read_u16().await.unwrap()
    }

    pub async fn u32(&mut self) -> u32 {
        self.socket.read_u32().await.unwrap()
    }

    pub async fn u64(&mut self) -> u64 {
        self.socket.read_u64().await.unwrap()
    }

    pub async fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.socket.read_exact(&mut out).await.unwrap();
        out
    }

    pub async fn is_closed(&mut self) -> bool {
        matches!(self.socket.read(&mut [0; 1]).await, Ok(0) | Err(_))
    }

    pub async fn option(&mut self, option: u32, data: &[u8]) {
        let mut out = b"IHAVEOPT".to_vec();
        out.extend(option.to_be_bytes());
        out.extend((data.len() as u32).to_be_bytes());
        out.extend(data);
        self.socket.write_all(&out).await.unwrap();
    }

    pub async fn reply(&mut self, option: u32) -> (u32, Vec<u8>) {
        assert_eq!(self.u64().await, 0x3e889045565a9);
        assert_eq!(self.u32().await, option);
        let kind = self.u32().await;
        let len = self.u32().await as usize;
        (kind, self.bytes(len).await)
    }

    /// All replies up to an acknowledgement or an error.
    pub async fn replies(&mut self, option: u32) -> Vec<(u32, Vec<u8>)> {
        let mut out = Vec::new();
        loop {
            let reply = self.reply(option).await;
            let last = reply.0 == ACK || reply.0 & ERR != 0;
            out.push(reply);
            if last {
                return out;
            }
        }
    }

    /// Sends an option and gives the code of the last reply.
    pub async fn ask(&mut self, option: u32, data: &[u8]) -> u32 {
        self.option(option, data).await;
        self.replies(option).await.last().unwrap().0
    }

    pub async fn set_mode(&mut self, mode: Mode) {
        let option = match mode {
            Mode::Simple => return,
            Mode::Structured => OPT_STRUCTURED,
            Mode::Extended => OPT_EXTENDED,
        };
        assert_eq!(self.ask(option, &[]).await, ACK);
        self.mode = mode;
    }

    /// Size and flags of the export.
    pub async fn go(&mut self, name: &str) -> (u64, u16) {
        self.option(OPT_GO, &go_data(name, &[])).await;
        let replies = self.replies(OPT_GO).await;
        assert_eq!(replies.last().unwrap().0, ACK, "{replies:?}");
        let info = &replies[0].1;
        assert_eq!(info[..2], [0, 0]);
        let size = u64::from_be_bytes(info[2..10].try_into().unwrap());
        (size, u16::from_be_bytes(info[10..12].try_into().unwrap()))
    }

    pub fn header(&mut self, flags: u16, kind: u16, offset: u64, len: u64) -> (u64, Vec<u8>) {
        let cookie = self.next;
        self.next += 1;
        let magic: u32 = if self.mode == Mode::Extended { 0x21e41c71 } else { 0x25609513 };
        let mut out = magic.to_be_bytes().to_vec();
        out.extend(flags.to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend(cookie.to_be_bytes());
        out.extend(offset.to_be_bytes());
        if self.mode == Mode::Extended {
            out.extend(len.to_be_bytes());
        } else {
            out.extend((len as u32).to_be_bytes());
        }
        (cookie, out)
    }

    pub async fn send(&mut self, flags: u16, kind: u16, offset: u64, len: u64, payload: &[u8]) -> u64 {
        let (cookie, mut out) = self.header(flags, kind, offset, len);
        out.extend(payload);
        self.socket.write_all(&out).await.unwrap();
        cookie
    }

    /// One reply that is not read data: cookie and error.
    pub async fn status(&mut self) -> (u64, u32) {
        if self.mode == Mode::Extended {
            let (cookie, chunks) = self.chunks().await;
            return match chunks.as_slice() {
                [Chunk::None] => (cookie, 0),
                [Chunk::Error(error)] => (cookie, *error),
                other => panic!("unexpected chunks {other:?}"),
            };
        }
        assert_eq!(self.u32().await, 0x67446698);
        let error = self.u32().await;
        (self.u64().await, error)
    }

    /// All chunks of one answer.
    pub async fn chunks(&mut self) -> (u64, Vec<Chunk>) {
        let mut out = Vec::new();
        loop {
            let extended = self.mode == Mode::Extended;
            assert_eq!(self.u32().await, if extended { 0x6e8a278c } else { 0x668e33ef });
            let flags = self.u16().await;
            let kind = self.u16().await;
            let cookie = self.u64().await;
            let len = if extended {
                self.u64().await; // offset
                self.u64().await
            } else {
                self.u32().await.into()
            };
            let body = self.bytes(len as usize).await;
            out.push(parse_chunk(kind, &body));
            if flags & 1 != 0 {
                return (cookie, out);
            }
        }
    }

    pub async fn write(&mut self, offset: u64, data: &[u8]) {
        let cookie = self.send(0, WRITE, offset, data.len() as u64, data).await;
        assert_eq!(self.status().await, (cookie, 0));
    }

    pub async fn command(&mut self, flags: u16, kind: u16, offset: u64, len: u64) -> u32 {
        let cookie = self.send(flags, kind, offset, len, &[]).await;
        let (got, error) = self.status().await;
        assert_eq!(got, cookie);
        error
    }

    pub async fn read_chunks(&mut self, flags: u16, offset: u64, len: u64) -> Vec<Chunk> {
        let cookie = self.send(flags, READ, offset, len, &[]).await;
        let (got, chunks) = self.chunks().await;
        assert_eq!(got, cookie);
        chunks
    }

    /// Reads in whatever mode was negotiated.
    pub async fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        if self.mode == Mode::Simple {
            let cookie = self.send(0, READ, offset, len as u64, &[]).await;
            assert_eq!(self.status().await, (cookie, 0));
            return self.bytes(len).await;
        }
        let mut out = vec![0xee; len];
        for chunk in self.read_chunks(0, offset, len as u64).await {
            match chunk {
                Chunk::Data(at, data) => out[(at - offset) as usize..][..data.len()].copy_from_slice(&data),
                Chunk::Hole(at, len) => out[(at - offset) as usize..][..len as usize].fill(0),
                Chunk::None => {}
                other => panic!("unexpected {other:?}"),
            }
        }
        out
    }
}

fn parse_chunk(kind: u16, body: &[u8]) -> Chunk {
    let u32_at = |at: usize| u32::from_be_bytes(body[at..at + 4].try_into().unwrap());
    let u64_at = |at: usize| u64::from_be_bytes(body[at..at + 8].try_into().unwrap());
    match kind {
        0 => Chunk::None,
        1 => Chunk::Data(u64_at(0), body[8..].to_vec()),
        2 => Chunk::Hole(u64_at(0), u32_at(8).into()),
        5 => {
            let pairs = (4..body.len()).step_by(8).map(|at| (u32_at(at).into(), u32_at(at + 4).into()));
            Chunk::Status(u32_at(0), pairs.collect())
        }
        6 => {
            assert_eq!(body.len(), 8 + 16 * u32_at(4) as usize);
            let pairs = (8..body.len()).step_by(16).map(|at| (u64_at(at), u64_at(at + 8)));
            Chunk::Status(u32_at(0), pairs.collect())
        }
        0x8001 => Chunk::Error(u32_at(0)),
        other => panic!("chunk type {other}"),
    }
}
