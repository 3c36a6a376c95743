//! Where `dog vdi import` gets its bytes: a file, a pipe, a web server through curl.
//!
//! Blocks of zeros, and holes of files that know theirs, are not delivered. A thread of its own reads, bounded in the
//! blocks that wait, so that reading and requests overlap.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use bytes::Bytes;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use tempfile::NamedTempFile;
use tokio::sync::mpsc;

use crate::exit::{FAILURE, SYSTEM, Stop, fail};
use crate::out::{errno_text, text};

/// What a qcow2 file begins with.
const QCOW2_MAGIC: &[u8] = b"QFI\xfb";

/// Where the bytes are.
pub enum Source {
    /// A file or disk of known size.
    File {
        /// Open for reading.
        file: File,
        /// To hand to other programs.
        path: PathBuf,
        /// Bytes.
        size: u64,
    },
    /// Bytes until the end.
    Stream(Stream),
}

/// A pipe, with its first bytes read already.
pub struct Stream {
    first: Vec<u8>,
    input: Box<dyn Read + Send>,
    /// The program that feeds it.
    feeder: Option<Child>,
}

/// Whether a word names something on a web server.
fn is_url(word: &[u8]) -> bool {
    let scheme = |scheme: &str| {
        word.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme.as_bytes()))
    };
    scheme("http://") || scheme("https://")
}

impl Source {
    /// Opens what a word of the command line means; failures are reported.
    pub fn open(word: &[u8]) -> Result<Source, Stop> {
        let failed =
            |e: io::Error| fail(SYSTEM, format_args!("Failed to open {}: {}", text(word), errno_text(&e)));
        if word == b"-" {
            return Stream::start(Box::new(io::stdin()), None).map(Source::Stream).map_err(failed);
        }
        if is_url(word) {
            let (child, output) = curl(word)?;
            return Stream::start(Box::new(output), Some(child)).map(Source::Stream).map_err(failed);
        }
        let path = Path::new(OsStr::from_bytes(word));
        let mut file = File::open(path).map_err(failed)?;
        let kind = file.metadata().map_err(failed)?;
        if kind.is_dir() {
            return Err(failed(Errno::EISDIR.into()));
        }
        if kind.is_file() || kind.file_type().is_block_device() {
            let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
            return Ok(Source::File { file, path: path.into(), size });
        }
        Stream::start(Box::new(file), None).map(Source::Stream).map_err(failed)
    }

    /// Whether the bytes begin as those of a qcow2 file.
    pub fn is_qcow2(&self) -> bool {
        match self {
            Source::File { file, .. } => {
                let mut first = [0; QCOW2_MAGIC.len()];
                file.read_exact_at(&mut first, 0).is_ok() && first == QCOW2_MAGIC
            }
            Source::Stream(stream) => stream.first == QCOW2_MAGIC,
        }
    }

    /// The size, where it is known before the end.
    pub fn size(&self) -> Option<u64> {
        match self {
            Source::File { size, .. } => Some(*size),
            Source::Stream(_) => None,
        }
    }

    /// A file with the bytes: for a stream a temporary one.
    pub fn into_file(self) -> Result<(PathBuf, Option<NamedTempFile>), Stop> {
        match self {
            Source::File { path, .. } => Ok((path, None)),
            Source::Stream(mut stream) => {
                let mut copy = || -> io::Result<NamedTempFile> {
                    let mut file = NamedTempFile::new()?;
                    file.write_all(&stream.first)?;
                    io::copy(&mut stream.input, file.as_file_mut())?;
                    stream.finish()?;
                    Ok(file)
                };
                let file = copy().map_err(|e| {
                    fail(SYSTEM, format_args!("Failed to store the image temporarily: {}", errno_text(&e)))
                })?;
                Ok((file.path().into(), Some(file)))
            }
        }
    }

    /// Starts the thread; the last item tells the size of the whole.
    pub fn read(self, block_size: usize, queue: usize) -> mpsc::Receiver<io::Result<Item>> {
        let (sender, items) = mpsc::channel(queue);
        std::thread::spawn(move || {
            let mut put = |item| sender.blocking_send(Ok(item)).is_ok();
            let result = match self {
                Source::File { file, size, .. } => read_file(&file, size, block_size, &mut put),
                Source::Stream(stream) => read_stream(stream, block_size, &mut put),
            };
            let _ = sender.blocking_send(result.map(Item::End)); // the command may have failed and gone meanwhile
        });
        items
    }
}

/// What the reading thread delivers.
pub enum Item {
    /// A block that is not all zeros; the last one may be short.
    Block(u32, Bytes),
    /// All was read: so many bytes.
    End(u64),
}

/// Calls `put` with every block; `false` from it ends the reading.
type Put<'a> = &'a mut dyn FnMut(Item) -> bool;

fn read_file(file: &File, size: u64, block_size: usize, put: Put<'_>) -> io::Result<u64> {
    let block = block_size as u64;
    let mut at = 0;
    while at < size {
        match lseek(file, at as i64, Whence::SeekData) {
            Ok(data) => at = data as u64 / block * block,
            Err(Errno::ENXIO) => break,
            Err(_) => {} // the file does not know its holes
        }
        if at >= size {
            break;
        }
        let mut data = vec![0; block.min(size - at) as usize];
        file.read_exact_at(&mut data, at)?;
        if !deliver(at / block, data, put)? {
            break;
        }
        at += block;
    }
    Ok(size)
}

fn read_stream(mut stream: Stream, block_size: usize, put: Put<'_>) -> io::Result<u64> {
    let mut total = 0;
    loop {
        let mut data = std::mem::take(&mut stream.first);
        let more = (block_size - data.len()) as u64;
        (&mut stream.input).take(more).read_to_end(&mut data)?;
        let (index, length) = (total / block_size as u64, data.len());
        total += length as u64;
        if length > 0 && !deliver(index, data, put)? {
            return Ok(total);
        }
        if length < block_size {
            stream.finish()?;
            return Ok(total);
        }
    }
}

fn deliver(index: u64, data: Vec<u8>, put: Put<'_>) -> io::Result<bool> {
    let index = u32::try_from(index).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
    Ok(is_zero(&data) || put(Item::Block(index, data.into())))
}

/// Whether all bytes are 0.
pub fn is_zero(data: &[u8]) -> bool {
    let mut chunks = data.chunks_exact(64);
    chunks.all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
        && data[data.len() / 64 * 64..].iter().all(|byte| *byte == 0)
}

impl Stream {
    fn start(mut input: Box<dyn Read + Send>, feeder: Option<Child>) -> io::Result<Stream> {
        let mut first = Vec::new();
        (&mut input).take(QCOW2_MAGIC.len() as u64).read_to_end(&mut first)?;
        Ok(Stream { first, input, feeder })
    }

    /// Called at the end: a feeder that failed has delivered only a part.
    fn finish(&mut self) -> io::Result<()> {
        let Some(mut feeder) = self.feeder.take() else { return Ok(()) };
        match feeder.wait()? {
            status if status.success() => Ok(()),
            status => Err(io::Error::other(format!("the download failed ({status})"))),
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(mut feeder) = self.feeder.take() {
            let _ = feeder.kill(); // it may have ended
            let _ = feeder.wait();
        }
    }
}

fn curl(url: &[u8]) -> Result<(Child, ChildStdout), Stop> {
    let mut command = Command::new("curl");
    command.args(["--fail", "--silent", "--show-error", "--location", "--proto", "=http,https", "--"]);
    command.arg(OsStr::from_bytes(url)).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => fail(SYSTEM, "curl is not installed: it is needed to download images"),
        _ => fail(SYSTEM, format_args!("Failed to start curl: {}", errno_text(&e))),
    })?;
    match child.stdout.take() {
        Some(output) => Ok((child, output)),
        None => Err(fail(FAILURE, "curl has no output")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collect(read: impl FnOnce(Put<'_>) -> io::Result<u64>) -> (Vec<(u32, Vec<u8>)>, u64) {
        let mut blocks = Vec::new();
        let size = read(&mut |item| {
            if let Item::Block(index, data) = item {
                blocks.push((index, data.to_vec()));
            }
            true
        });
        (blocks, size.unwrap())
    }

    #[test]
    fn holes_and_zeros_are_left_out() {
        let file = tempfile::tempfile().unwrap();
        let block = 64 << 10;
        file.set_len(10 * block as u64 + 5).unwrap();
        file.write_all_at(b"x", 3 * block as u64 + 7).unwrap();
        file.write_all_at(&vec![0; block], 5 * block as u64).unwrap();
        file.write_all_at(b"end", 10 * block as u64 + 2).unwrap();
        let (blocks, size) = collect(|put| read_file(&file, 10 * block as u64 + 5, block, put));
        assert_eq!(size, 10 * block as u64 + 5);
        assert_eq!(
            blocks.iter().map(|(index, data)| (*index, data.len())).collect::<Vec<_>>(),
            [(3, block), (10, 5)]
        );
        assert_eq!(blocks[1].1, b"\0\0end");
    }

    #[test]
    fn streams_of_any_length_are_cut_into_blocks() {
        for length in [0, 1, 3, 4, 5, 15, 16, 17, 40] {
            let bytes: Vec<u8> = (1..=length).collect();
            let stream = Stream::start(Box::new(io::Cursor::new(bytes.clone())), None).unwrap();
            let (blocks, size) = collect(|put| read_stream(stream, 16, put));
            assert_eq!(size, u64::from(length));
            assert_eq!(blocks.into_iter().flat_map(|(_, data)| data).collect::<Vec<_>>(), bytes, "{length}");
        }
    }

    #[test]
    fn zeros_are_found_at_every_place() {
        assert!(is_zero(&[]) && is_zero(&[0; 100]));
        for at in [0, 63, 64, 99] {
            let mut data = [0; 100];
            data[at] = 1;
            assert!(!is_zero(&data), "{at}");
        }
    }

    #[test]
    fn urls_are_recognised() {
        assert!(is_url(b"http://x/y") && is_url(b"HTTPS://x"));
        assert!(!is_url(b"http:/x") && !is_url(b"ftp://x") && !is_url(b"") && !is_url(b"./http://"));
    }
}
