//! `dog vdi restore` (spec 07, 12.3): recreates a snapshot from another one and a backup stream.
//!
//! Nothing is destroyed before the whole stream has been checked: it is spooled into an unlinked temporary file first.
//! If anything fails after the working VDI was deleted, a working VDI is recreated from where the old one came from.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, IsTerminal, Read, Seek, Write as _};

use bytes::Bytes;
use sheepdog_proto::{Flags, Oid, VdiId};

use crate::args::Snapshot;
use crate::context::Context;
use crate::exit::{FAILURE, Outcome, SYSTEM, Stop, fail};
use crate::inode::{Inode, Part, enter_block, open};
use crate::objects::{Write, like, new_vdi};
use crate::out::{self, errno_text, text};
use crate::vdi::backup::{END_INDEX, RecordHeader, STREAM_MAGIC, STREAM_VERSION, StreamHeader};
use crate::vdi::delete::delete;

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let name = context.name()?;
    let Some(snapshot) = &context.options.snapshot else {
        out::log("We can restore a backup file only to snapshots");
        return Err(fail(Stop::Usage, "Please specify the '-s' option"));
    };
    if io::stdin().is_terminal() {
        return Err(fail(Stop::Usage, "stdin must be pipe"));
    }
    let base = open_base(context, name, snapshot).await?;
    let working = open(&context.session, name, None, Part::Header).await?;
    let mut spool = spool(&base)?;
    let parent = parent_of(context, &working).await?;
    if !delete(&context.session, name, None, &context.options).await {
        return Err(fail(FAILURE, "failed to delete the current vdi"));
    }
    let restored = apply(context, name, &base, &mut spool).await;
    let resumed = resume(context, name, &working, &parent, restored.is_ok()).await;
    restored.and(resumed)
}

async fn open_base(context: &Context, name: &[u8], snapshot: &Snapshot) -> Result<Inode, Stop> {
    open(&context.session, name, Some(snapshot), Part::Map).await.map_err(|stop| {
        let (id, tag) = (snapshot.id(), text(snapshot.tag()).into_owned());
        fail(stop, format_args!("Snapshot ID {id} or tag {tag} doesn't exist"))
    })
}

/// What the working VDI was derived from; a VDI without parent has none.
async fn parent_of(context: &Context, working: &Inode) -> Result<Option<Inode>, Stop> {
    let parent = working.header.parent_vdi_id;
    if parent.is_none() {
        return Ok(None);
    }
    let inode = Inode::read(&context.session, parent, &Part::Header).await;
    inode.map(Some).map_err(|e| {
        e.report();
        SYSTEM
    })
}

/// Reads the stream, checks it against the snapshot's geometry and keeps its records.
fn spool(base: &Inode) -> Result<File, Stop> {
    let mut input = BufReader::new(io::stdin().lock());
    let mut head = [0; StreamHeader::LEN];
    input
        .read_exact(&mut head)
        .map_err(|e| fail(SYSTEM, format_args!("failed to read backup header, {}", read_text(&e))))?;
    let header = StreamHeader::from_bytes(&head);
    if header.version != STREAM_VERSION || header.magic != STREAM_MAGIC {
        return Err(fail(FAILURE, "The backup file is corrupted"));
    }
    let problem = |what: &str, e: &io::Error| fail(SYSTEM, format_args!("{what}: {}", errno_text(e)));
    let file = temporary_file().map_err(|e| problem("failed to create a temporary file", &e))?;
    let mut output = BufWriter::new(file);
    loop {
        let mut head = [0; RecordHeader::LEN];
        input.read_exact(&mut head).map_err(|_| fail(SYSTEM, "failed to read backup data"))?;
        let record = RecordHeader::from_bytes(&head);
        output.write_all(&head).map_err(|e| problem("failed to keep the backup data", &e))?;
        if record.index == END_INDEX {
            break;
        }
        check_record(&record, base)?;
        let copied = io::copy(&mut (&mut input).take(record.length.into()), &mut output)
            .map_err(|e| problem("failed to keep the backup data", &e))?;
        if copied != u64::from(record.length) {
            return Err(fail(SYSTEM, "failed to read backup data"));
        }
    }
    let mut file = output.into_inner().map_err(|e| problem("failed to keep the backup data", e.error()))?;
    file.rewind().map_err(|e| problem("failed to keep the backup data", &e))?;
    Ok(file)
}

fn check_record(record: &RecordHeader, base: &Inode) -> Outcome {
    let end = u64::from(record.offset) + u64::from(record.length);
    let blocks = if base.is_hyper() { u64::from(u32::MAX) } else { sheepdog_proto::MAX_DATA_OBJS as u64 };
    if end <= base.header.block_size() && u64::from(record.index) < blocks {
        return Ok(());
    }
    Err(fail(FAILURE, "The backup file is corrupted"))
}

fn read_text(error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::UnexpectedEof { "end of file".into() } else { errno_text(error) }
}

/// A file without a name in the system's temporary directory.
fn temporary_file() -> io::Result<File> {
    let path = std::env::temp_dir().join(format!("dog-restore-{}", std::process::id()));
    let file = File::options().read(true).write(true).create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

/// Creates a working VDI from the snapshot and writes the records into it.
async fn apply(context: &Context, name: &[u8], base: &Inode, spool: &mut File) -> Outcome {
    let session = &context.session;
    let vid = new_vdi(session, name, like(&base.header, base.vid(), 0)).await?;
    let mut header = base.header;
    header.vdi_id = vid;
    let mut inode = Inode { header, map: base.map.clone() };
    let mut input = BufReader::new(spool);
    let written = write_records(context, &mut inode, base, &mut input).await;
    if written.is_err() {
        out::log("failed to restore backup");
        delete(session, name, None, &context.options).await;
    }
    written
}

async fn write_records(context: &Context, inode: &mut Inode, base: &Inode, input: &mut impl Read) -> Outcome {
    let session = &context.session;
    loop {
        let mut head = [0; RecordHeader::LEN];
        input.read_exact(&mut head).map_err(|_| fail(SYSTEM, "failed to read backup data"))?;
        let record = RecordHeader::from_bytes(&head);
        if record.index == END_INDEX {
            return Ok(());
        }
        let mut data = vec![0; record.length as usize];
        input.read_exact(&mut data).map_err(|_| fail(SYSTEM, "failed to read backup data"))?;
        let oid = Oid::data(inode.vid(), record.index);
        let mut write = Write::new(&inode.header, oid, record.offset.into(), Bytes::from(data)).creating();
        write.cow = base.block(record.index.into());
        write.send_or_report(session).await.map_err(|_| FAILURE)?;
        enter_block(session, inode, record.index, Flags::DIRECT).await?;
    }
}

/// Gives the name a working VDI again, derived from what the deleted one was derived from. After a successful restore
/// this turns the restored state into a snapshot.
async fn resume(
    context: &Context,
    name: &[u8],
    working: &Inode,
    parent: &Option<Inode>,
    restored: bool,
) -> Outcome {
    let snapid = u32::from(restored);
    let body = match parent {
        Some(parent) => like(&parent.header, parent.vid(), snapid),
        // Without a parent, the restored state itself is the base of the new working VDI.
        None if restored => {
            let current = open(&context.session, name, None, Part::Header).await?;
            like(&current.header, current.vid(), snapid)
        }
        None => like(&working.header, VdiId::NONE, snapid),
    };
    match new_vdi(&context.session, name, body).await {
        Ok(_) => Ok(()),
        Err(_) => Err(fail(FAILURE, "failed to resume the current vdi")),
    }
}
