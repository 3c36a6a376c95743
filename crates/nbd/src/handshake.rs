//! The handshake: fixed newstyle, options until GO or EXPORT_NAME.

use std::io;

use thiserror::Error;

use crate::export::{Export, ExportError, ExportSource};
use crate::proto::{
    Context, FIXED_NEWSTYLE, IHAVEOPT, MAX_REQUEST, MIN_BLOCK, Mode, NBDMAGIC, NO_ZEROES, OPTION_REPLY_MAGIC,
    PREFERRED_BLOCK, export_flag, info, option, rep,
};
use crate::socket::{Input, WriteHalf};

/// Longest option that is understood, bytes.
const MAX_OPTION: usize = 64 << 10;
/// Longest option that is skipped and refused; a longer one ends the connection.
const MAX_SKIPPED: usize = 1 << 20;
/// Longest string, as the protocol says.
const MAX_STRING: usize = 4096;
/// Most options of one handshake.
const MAX_OPTIONS: usize = 1000;

/// Why a handshake ended early.
#[derive(Debug, Error)]
pub(crate) enum HandshakeError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Protocol(&'static str),
    #[error("{0}")]
    Export(#[from] ExportError),
}

/// What was agreed on.
pub(crate) struct Negotiated {
    pub(crate) export: Export,
    pub(crate) mode: Mode,
    pub(crate) contexts: Vec<Context>,
}

struct Handshake<'a> {
    input: &'a mut Input,
    output: &'a mut WriteHalf,
    source: &'a dyn ExportSource,
    no_zeroes: bool,
    mode: Mode,
    /// Contexts chosen, and for which export.
    contexts: (String, Vec<Context>),
    /// The export last asked about, open.
    export: Option<(String, Export)>,
}

/// Cuts options apart without trusting their lengths.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.bytes(2)?.try_into().ok()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.bytes(4)?.try_into().ok()?))
    }

    fn string(&mut self) -> Option<&'a str> {
        let len = self.u32()? as usize;
        if len > MAX_STRING {
            return None;
        }
        std::str::from_utf8(self.bytes(len)?).ok()
    }
}

fn reply_into(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
}

/// The error reply and its text for an export that cannot be had.
fn refusal(error: &ExportError) -> (u32, String) {
    let code = match error {
        ExportError::Unknown(_) => rep::ERR_UNKNOWN,
        ExportError::Locked(_) => rep::ERR_POLICY,
        ExportError::Failed(_) => rep::ERR_PLATFORM,
    };
    (code, error.to_string())
}

fn export_flags(export: &Export, mode: Mode) -> u16 {
    let mut flags = export_flag::HAS_FLAGS
        | export_flag::SEND_FLUSH
        | export_flag::SEND_FUA
        | export_flag::CAN_MULTI_CONN
        | export_flag::SEND_CACHE;
    if mode != Mode::Simple {
        flags |= export_flag::SEND_DF;
    }
    flags
        | if export.volume.is_read_only() {
            export_flag::READ_ONLY
        } else {
            export_flag::SEND_TRIM | export_flag::SEND_WRITE_ZEROES | export_flag::SEND_FAST_ZERO
        }
}

/// Negotiates with a client. `None` = it left politely.
pub(crate) async fn negotiate(
    input: &mut Input,
    output: &mut WriteHalf,
    source: &dyn ExportSource,
) -> Result<Option<Negotiated>, HandshakeError> {
    let mut hello = Vec::with_capacity(18);
    hello.extend_from_slice(&NBDMAGIC.to_be_bytes());
    hello.extend_from_slice(&IHAVEOPT.to_be_bytes());
    hello.extend_from_slice(&((FIXED_NEWSTYLE | NO_ZEROES) as u16).to_be_bytes());
    output.write_all(&hello).await?;
    let mut flags = [0; 4];
    input.read_exact(&mut flags).await?;
    let flags = u32::from_be_bytes(flags);
    if flags & !(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
        return Err(HandshakeError::Protocol("unknown client flags"));
    }
    let handshake = Handshake {
        input,
        output,
        source,
        no_zeroes: flags & NO_ZEROES != 0,
        mode: Mode::Simple,
        contexts: (String::new(), Vec::new()),
        export: None,
    };
    handshake.run().await
}

impl Handshake<'_> {
    async fn run(mut self) -> Result<Option<Negotiated>, HandshakeError> {
        for _ in 0..MAX_OPTIONS {
            let mut head = [0; 16];
            self.input.read_exact(&mut head).await?;
            let mut fields = Fields(&head);
            let magic = fields.bytes(8);
            let (Some(kind), Some(len)) = (fields.u32(), fields.u32()) else { continue };
            if magic != Some(&IHAVEOPT.to_be_bytes()) {
                return Err(HandshakeError::Protocol("bad option magic"));
            }
            let len = len as usize;
            if len > MAX_OPTION {
                self.skip(len).await?;
                self.reply(kind, rep::ERR_TOO_BIG, b"option too long").await?;
                continue;
            }
            let mut data = vec![0; len];
            self.input.read_exact(&mut data).await?;
            match kind {
                option::ABORT => {
                    let _ = self.reply(kind, rep::ACK, &[]).await; // it need not wait for the answer
                    return Ok(None);
                }
                option::EXPORT_NAME => return self.export_name(&data).await.map(Some),
                option::GO => {
                    if self.info(kind, &data).await? {
                        return Ok(self.finish());
                    }
                }
                _ => self.option(kind, &data).await?,
            }
        }
        Err(HandshakeError::Protocol("too many options"))
    }

    fn finish(self) -> Option<Negotiated> {
        let (asked, export) = self.export?;
        let (context_export, contexts) = self.contexts;
        let contexts = if asked == context_export { contexts } else { Vec::new() };
        Some(Negotiated { export, mode: self.mode, contexts })
    }

    async fn skip(&mut self, len: usize) -> Result<(), HandshakeError> {
        if len > MAX_SKIPPED {
            return Err(HandshakeError::Protocol("option far too long"));
        }
        let mut left = len;
        let mut scratch = vec![0; 4096];
        while left > 0 {
            let n = left.min(scratch.len());
            self.input.read_exact(&mut scratch[..n]).await?;
            left -= n;
        }
        Ok(())
    }

    async fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> Result<(), HandshakeError> {
        let mut out = Vec::with_capacity(20 + data.len());
        reply_into(&mut out, option, kind, data);
        Ok(self.output.write_all(&out).await?)
    }

    async fn option(&mut self, kind: u32, data: &[u8]) -> Result<(), HandshakeError> {
        match kind {
            option::LIST => self.list(kind, data).await,
            option::INFO => self.info(kind, data).await.map(drop),
            option::STRUCTURED_REPLY | option::EXTENDED_HEADERS if !data.is_empty() => {
                self.reply(kind, rep::ERR_INVALID, b"the option has no data").await
            }
            option::STRUCTURED_REPLY if self.mode == Mode::Extended => {
                self.reply(kind, rep::ERR_EXT_HEADER_REQD, b"extended headers are in use").await
            }
            option::STRUCTURED_REPLY => {
                self.mode = Mode::Structured;
                self.reply(kind, rep::ACK, &[]).await
            }
            option::EXTENDED_HEADERS => {
                self.mode = Mode::Extended;
                self.reply(kind, rep::ACK, &[]).await
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(kind, data).await,
            _ => self.reply(kind, rep::ERR_UNSUP, b"unsupported option").await,
        }
    }

    async fn list(&mut self, kind: u32, data: &[u8]) -> Result<(), HandshakeError> {
        if !data.is_empty() {
            return self.reply(kind, rep::ERR_INVALID, b"LIST has no data").await;
        }
        let listed = match self.source.list().await {
            Ok(listed) => listed,
            Err(error) => {
                let (code, text) = refusal(&error);
                return self.reply(kind, code, text.as_bytes()).await;
            }
        };
        let mut out = Vec::new();
        for line in listed {
            let name = line.name.as_bytes();
            let mut data = (name.len() as u32).to_be_bytes().to_vec();
            data.extend_from_slice(name);
            data.extend_from_slice(line.description.as_bytes());
            reply_into(&mut out, kind, rep::SERVER, &data);
        }
        reply_into(&mut out, kind, rep::ACK, &[]);
        Ok(self.output.write_all(&out).await?)
    }

    /// Opens an export, unless it is the one that is open.
    async fn open(&mut self, name: &str) -> Result<&Export, ExportError> {
        let same = self.export.as_ref().is_some_and(|(asked, _)| asked == name);
        if !same {
            self.export = None;
            let export = self.source.open(name).await?;
            self.export = Some((name.to_owned(), export));
        }
        self.export.as_ref().map(|(_, export)| export).ok_or_else(|| ExportError::Unknown(name.to_owned()))
    }

    /// INFO and GO. `true` = the export is open and the client was told.
    async fn info(&mut self, kind: u32, data: &[u8]) -> Result<bool, HandshakeError> {
        let mut fields = Fields(data);
        let parsed = fields.string().zip(fields.u16());
        let Some((name, _)) = parsed.filter(|(_, count)| fields.0.len() == 2 * usize::from(*count)) else {
            self.reply(kind, rep::ERR_INVALID, b"malformed request").await?;
            return Ok(false);
        };
        let asked: Vec<u16> = std::iter::from_fn(|| fields.u16()).collect();
        let mode = self.mode;
        let mut out = Vec::new();
        match self.open(name).await {
            Ok(export) => info_replies(&mut out, kind, export, &asked, mode),
            Err(error) => {
                let (code, text) = refusal(&error);
                self.reply(kind, code, text.as_bytes()).await?;
                return Ok(false);
            }
        }
        self.output.write_all(&out).await?;
        Ok(true)
    }

    async fn export_name(mut self, data: &[u8]) -> Result<Negotiated, HandshakeError> {
        // This option knows no error reply: the only way to refuse is to close.
        let name = std::str::from_utf8(data).map_err(|_| HandshakeError::Protocol("name is not UTF-8"))?;
        if self.mode == Mode::Extended {
            return Err(HandshakeError::Protocol("EXPORT_NAME with extended headers"));
        }
        let (mode, no_zeroes) = (self.mode, self.no_zeroes);
        let export = self.open(name).await?;
        let mut out = export.volume.size().to_be_bytes().to_vec();
        out.extend_from_slice(&export_flags(export, mode).to_be_bytes());
        if !no_zeroes {
            out.resize(out.len() + 124, 0);
        }
        self.output.write_all(&out).await?;
        self.finish().ok_or(HandshakeError::Protocol("no export"))
    }

    async fn meta_context(&mut self, kind: u32, data: &[u8]) -> Result<(), HandshakeError> {
        let set = kind == option::SET_META_CONTEXT;
        if set {
            self.contexts.1.clear();
        }
        let Some((name, queries)) = parse_meta_context(data).filter(|_| self.mode != Mode::Simple || !set)
        else {
            return self.reply(kind, rep::ERR_INVALID, b"malformed, or no structured replies").await;
        };
        if let Err(error) = self.open(name).await {
            let (code, text) = refusal(&error);
            return self.reply(kind, code, text.as_bytes()).await;
        }
        let wanted = |context: &Context| {
            let name = context.name();
            if set {
                queries.contains(&name)
            } else {
                // A listing takes a namespace as a wildcard, and no query for everything.
                queries.is_empty()
                    || queries.iter().any(|q| *q == name || (q.ends_with(':') && name.starts_with(q)))
            }
        };
        let chosen: Vec<Context> = Context::ALL.into_iter().filter(wanted).collect();
        let mut out = Vec::new();
        for context in &chosen {
            let mut data = context.id().to_be_bytes().to_vec();
            data.extend_from_slice(context.name().as_bytes());
            reply_into(&mut out, kind, rep::META_CONTEXT, &data);
        }
        reply_into(&mut out, kind, rep::ACK, &[]);
        if set {
            self.contexts = (name.to_owned(), chosen);
        }
        Ok(self.output.write_all(&out).await?)
    }
}

fn parse_meta_context(data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u32()?;
    // Each query takes four bytes at least.
    let mut queries = Vec::with_capacity((count as usize).min(fields.0.len() / 4));
    for _ in 0..count {
        queries.push(fields.string()?);
    }
    fields.0.is_empty().then_some((name, queries))
}

fn info_replies(out: &mut Vec<u8>, kind: u32, export: &Export, asked: &[u16], mode: Mode) {
    let mut item = |id: u16, body: &[u8]| {
        let mut data = id.to_be_bytes().to_vec();
        data.extend_from_slice(body);
        reply_into(out, kind, rep::INFO, &data);
    };
    let mut body = export.volume.size().to_be_bytes().to_vec();
    body.extend_from_slice(&export_flags(export, mode).to_be_bytes());
    item(info::EXPORT, &body);
    if asked.contains(&info::NAME) {
        item(info::NAME, export.name.as_bytes());
    }
    if asked.contains(&info::DESCRIPTION) {
        item(info::DESCRIPTION, export.description.as_bytes());
    }
    if asked.contains(&info::BLOCK_SIZE) {
        let sizes = [MIN_BLOCK, PREFERRED_BLOCK, MAX_REQUEST];
        item(info::BLOCK_SIZE, &sizes.map(u32::to_be_bytes).concat());
    }
    reply_into(out, kind, rep::ACK, &[]);
}
