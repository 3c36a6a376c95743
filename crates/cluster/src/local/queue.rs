//! The queue file under its lock (spec 04, 11.1 to 11.4).
//!
//! Sheep of the original map the file shared; positioned reads and writes see and change the same pages, so no mapping
//! is needed here. Order and atomicity come from `flock` alone: [`Locked`] is the only way to the contents, and every
//! process holds the lock while it looks or writes. Nothing is synced to disk: the contents die with the machine.

use std::fs::{File, OpenOptions};
use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::layout::{
    BUF_LEN, BUF_OFF, CALLBACKED_OFF, EventHead, EventKind, FILE_LEN, LNODES_OFF, LocalNode, NONBLOCK,
    NR_LNODES_OFF, QueueEvent, REMOVED_OFF, Ring, SLOTS, check_head, check_nr_lnodes, decode_lnodes, next,
};
use crate::DriverError;

type Result<T> = std::result::Result<T, DriverError>;

/// An open queue file.
#[derive(Debug)]
pub struct QueueFile {
    file: File,
    path: PathBuf,
    id: (u64, u64),
}

impl QueueFile {
    /// Opens or creates the file and gives it its length. A file of another length is somebody else's and refused.
    pub fn open(path: &Path) -> Result<QueueFile> {
        let io = |what| move |source| DriverError::Io { what, path: path.to_owned(), source };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o644)
            .custom_flags(libc::O_CLOEXEC)
            .open(path)
            .map_err(io("cannot open"))?;
        let meta = file.metadata().map_err(io("cannot stat"))?;
        let queue = QueueFile { file, path: path.to_owned(), id: (meta.dev(), meta.ino()) };
        if !meta.is_file() {
            return Err(queue.bad("no regular file"));
        }
        let locked = queue.lock()?;
        match queue.file.metadata().map_err(io("cannot stat"))?.len() {
            FILE_LEN => {}
            0 => queue.file.set_len(FILE_LEN).map_err(io("cannot extend"))?,
            len => return Err(queue.bad(format!("length {len} instead of {FILE_LEN}"))),
        }
        drop(locked);
        Ok(queue)
    }

    /// Device and inode number.
    pub fn id(&self) -> (u64, u64) {
        self.id
    }

    /// Takes the lock, waiting for it.
    pub fn lock(&self) -> Result<Locked<'_>> {
        loop {
            match self.file.lock() {
                Ok(()) => return Ok(Locked { queue: self }),
                Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                Err(e) => return Err(self.io("cannot lock")(e)),
            }
        }
    }

    fn bad(&self, reason: impl Into<String>) -> DriverError {
        DriverError::BadQueue { path: self.path.clone(), reason: reason.into() }
    }

    fn io(&self, what: &'static str) -> impl FnOnce(io::Error) -> DriverError {
        let path = self.path.clone();
        move |source| DriverError::Io { what, path, source }
    }
}

/// By what an event is known again: what nobody changes any more once it is consumed. A JOIN that its reader passed over
/// may become an ACCEPT later.
#[derive(Debug, PartialEq, Eq)]
pub struct Mark {
    kind: u32,
    sender: LocalNode,
    nr_lnodes: u64,
    buf: u64,
}

/// The file while its lock is held.
#[derive(Debug)]
pub struct Locked<'a> {
    queue: &'a QueueFile,
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.queue.file.unlock() {
            tracing::error!("cannot unlock {}: {e}", self.queue.path.display());
        }
    }
}

impl Locked<'_> {
    fn read<const N: usize>(&self, at: u64) -> Result<[u8; N]> {
        let mut out = [0; N];
        self.read_into(&mut out, at)?;
        Ok(out)
    }

    fn read_into(&self, out: &mut [u8], at: u64) -> Result<()> {
        self.queue.file.read_exact_at(out, at).map_err(self.queue.io("cannot read"))
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        self.queue.file.write_all_at(bytes, at).map_err(self.queue.io("cannot write"))
    }

    /// Slot of the newest event of a ring.
    pub fn pos(&self, ring: Ring) -> Result<usize> {
        let pos = i32::from_le_bytes(self.read(ring.pos)?);
        let valid = usize::try_from(pos).ok().filter(|p| *p < SLOTS);
        valid.ok_or_else(|| self.queue.bad(format!("queue position {pos}")))
    }

    /// The head of an event, unchecked: its type may be 0 or nonsense.
    pub fn head(&self, ring: Ring, slot: usize) -> Result<EventHead> {
        Ok(EventHead::from_bytes(&self.read(ring.slot(slot))?))
    }

    /// The mark of an event, or of a slot never written.
    pub fn mark(&self, ring: Ring, slot: usize) -> Result<Mark> {
        let head = self.head(ring, slot)?;
        let nr_lnodes = u64::from_le_bytes(self.read(ring.slot(slot) + NR_LNODES_OFF as u64)?);
        let is_join = head.kind == EventKind::Join as u32;
        let kind = if is_join { EventKind::Accept as u32 } else { head.kind };
        let mut hasher = DefaultHasher::new();
        if kind != EventKind::Accept as u32 {
            let len = usize::try_from(head.buf_len).unwrap_or(BUF_LEN).min(BUF_LEN);
            let mut buf = vec![0; len];
            self.read_into(&mut buf, ring.slot(slot) + BUF_OFF as u64)?;
            hasher.write(&buf);
        }
        Ok(Mark { kind, sender: head.sender, nr_lnodes, buf: hasher.finish() })
    }

    /// A whole event.
    pub fn event(&self, ring: Ring, slot: usize) -> Result<QueueEvent> {
        let head = self.head(ring, slot)?;
        let (kind, len) = check_head(&head).map_err(|e| self.queue.bad(e))?;
        let mut buf = vec![0; len];
        self.read_into(&mut buf, ring.slot(slot) + BUF_OFF as u64)?;
        Ok(QueueEvent {
            kind,
            sender: head.sender,
            callbacked: head.callbacked != 0,
            removed: head.removed != 0,
            buf,
            lnodes: self.lnodes(ring, slot)?,
        })
    }

    fn lnodes(&self, ring: Ring, slot: usize) -> Result<Vec<LocalNode>> {
        let nr = u64::from_le_bytes(self.read(ring.slot(slot) + NR_LNODES_OFF as u64)?);
        let nr = check_nr_lnodes(nr).map_err(|e| self.queue.bad(e))?;
        let mut bytes = vec![0; nr * LocalNode::LEN];
        self.read_into(&mut bytes, ring.slot(slot) + LNODES_OFF as u64)?;
        Ok(decode_lnodes(&bytes))
    }

    /// All processes as of the newest nonblock event.
    pub fn newest(&self) -> Result<Vec<LocalNode>> {
        let slot = self.pos(NONBLOCK)?;
        if self.head(NONBLOCK, slot)?.kind == 0 {
            return Ok(Vec::new());
        }
        self.lnodes(NONBLOCK, slot)
    }

    /// Writes an event behind the newest one of its ring, then makes it the newest.
    pub fn append(&self, ring: Ring, event: &QueueEvent) -> Result<()> {
        debug_assert!(event.buf.len() <= BUF_LEN);
        let slot = next(self.pos(ring)?);
        let at = ring.slot(slot);
        self.write(&event.encode_front(), at)?;
        self.write(&event.encode_back(), at + NR_LNODES_OFF as u64)?;
        self.write(&(slot as i32).to_le_bytes(), ring.pos)
    }

    /// Turns a join into an accept carrying `info`, a whole buffer.
    pub fn accept(&self, slot: usize, info: &[u8]) -> Result<()> {
        let at = NONBLOCK.slot(slot);
        debug_assert_eq!(info.len(), BUF_LEN);
        self.write(info, at + BUF_OFF as u64)?;
        self.write(&(EventKind::Accept as u32).to_le_bytes(), at)
    }

    /// Marks an event void.
    pub fn set_removed(&self, ring: Ring, slot: usize) -> Result<()> {
        self.write(&[1], ring.slot(slot) + REMOVED_OFF as u64)
    }

    /// Marks a block event granted.
    pub fn set_callbacked(&self, ring: Ring, slot: usize) -> Result<()> {
        self.write(&[1], ring.slot(slot) + CALLBACKED_OFF as u64)
    }

    /// Forgets everything: all bytes zero again.
    pub fn reset(&self) -> Result<()> {
        let file = &self.queue.file;
        file.set_len(0).and_then(|()| file.set_len(FILE_LEN)).map_err(self.queue.io("cannot truncate"))
    }

    /// The error for contents that no writer produces.
    pub fn bad(&self, reason: impl Into<String>) -> DriverError {
        self.queue.bad(reason)
    }
}
