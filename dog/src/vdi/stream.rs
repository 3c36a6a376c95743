//! Bulk data of `vdi read` and `vdi write` through stdin and stdout.
//!
//! Pipes are read and written by threads of their own, so that waiting for them never stops requests in flight.
//! Both are bounded in the pieces that wait between a thread and the requests.

use std::io::{self, Read};

use bytes::Bytes;
use sheepdog_buffer::PageBuf;
use tokio::sync::{mpsc, oneshot};

use crate::out;

/// Pieces between the requests and stdout.
const QUEUE: usize = 4;

/// Zeros written at once.
static ZEROS: [u8; 256 << 10] = [0; 256 << 10];

/// What goes to stdout.
pub enum Output {
    /// Data.
    Data(Bytes),
    /// So many zeros.
    Zeros(usize),
}

/// Writes to stdout in the order of its input.
pub struct Writer {
    input: mpsc::Sender<Output>,
    result: oneshot::Receiver<io::Result<()>>,
}

impl Writer {
    /// Starts the thread.
    pub fn start() -> Writer {
        let (input, mut queue) = mpsc::channel(QUEUE);
        let (done, result) = oneshot::channel();
        std::thread::spawn(move || {
            let mut outcome = Ok(());
            while outcome.is_ok() {
                let Some(output) = queue.blocking_recv() else { break };
                outcome = match output {
                    Output::Data(data) => out::direct(&data),
                    Output::Zeros(length) => write_zeros(length),
                };
            }
            drop(queue);
            let _ = done.send(outcome); // the command may have failed and gone meanwhile
        });
        Writer { input, result }
    }

    /// Queues output; `false` if writing has failed, which [`Writer::finish`] explains.
    pub async fn put(&self, output: Output) -> bool {
        self.input.send(output).await.is_ok()
    }

    /// Waits until everything is written.
    pub async fn finish(self) -> io::Result<()> {
        drop(self.input);
        self.result.await.unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))
    }
}

fn write_zeros(mut length: usize) -> io::Result<()> {
    while length > 0 {
        let step = length.min(ZEROS.len());
        out::direct(&ZEROS[..step])?;
        length -= step;
    }
    Ok(())
}

/// A piece of input.
pub struct Input {
    /// As many bytes as were asked for; zeros stand for what the end of the input left open.
    pub data: Bytes,
    /// The input ended within this piece.
    pub last: bool,
}

/// Reads pieces of the given lengths from stdin, at most `queue` in advance; the end of the input ends the last one.
pub fn read_pieces(
    lengths: impl Iterator<Item = usize> + Send + 'static,
    queue: usize,
) -> mpsc::Receiver<io::Result<Input>> {
    let (sender, pieces) = mpsc::channel(queue);
    std::thread::spawn(move || {
        let mut stdin = io::stdin().lock();
        for length in lengths {
            let piece = read_piece(&mut stdin, length);
            let more = matches!(&piece, Ok(Input { last: false, .. }));
            if sender.blocking_send(piece).is_err() || !more {
                return;
            }
        }
    });
    pieces
}

fn read_piece(input: &mut impl Read, length: usize) -> io::Result<Input> {
    // From the pool: fresh memory costs more in page faults than reading into it.
    let mut data = PageBuf::dirty(length);
    let mut filled = 0;
    while filled < length {
        match input.read(&mut data[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    data[filled..].fill(0);
    Ok(Input { data: data.freeze(), last: filled < length })
}
