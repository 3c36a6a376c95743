//! `dog vdi write` (spec 07, 10.2).
//!
//! Several objects are written at a time. Each is entered in the map only after it exists, so that a crash leaves at
//! worst an object that nobody refers to.

use std::io;

use futures_util::{StreamExt, stream};
use sheepdog_proto::{Flags, Oid};

use crate::context::Context;
use crate::exit::{FAILURE, Outcome, SYSTEM, Stop, fail};
use crate::inode::{BlockMap, Inode, Part, enter_block, enter_flat, open};
use crate::objects::{Write, report_write};
use crate::out::errno_text;
use crate::session::{Failed, Session};
use crate::vdi::stream::{Input, read_pieces};
use crate::vdi::{Piece, ahead, pieces, range_operands};

/// Objects written at the same time.
const WRITE_AHEAD: usize = 8;

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let name = context.name()?;
    let range = range_operands(context)?;
    let session = &context.session;
    let inode = open(session, name, None, Part::Bytes(range.clone())).await?;
    let size = inode.header.vdi_size;
    if range.start > size {
        return Err(fail(FAILURE, "Write offset is beyond the end of the VDI"));
    }
    let range = range.start..range.end.min(size);
    let flags = if context.options.writeback { Flags::CACHE } else { Flags::NONE };
    let block_size = inode.header.block_size();
    let lengths = pieces(range.clone(), block_size).map(|piece| piece.length);
    let input = read_pieces(lengths, ahead(WRITE_AHEAD / 2, block_size));
    let input = stream::unfold(input, |mut input| async { input.recv().await.map(|item| (item, input)) });
    let work = stream::iter(pieces(range, block_size)).zip(input);
    write_all(session, inode, work, flags).await
}

/// Why a piece was not written.
enum Problem {
    Input(io::Error),
    Object(Oid, Failed),
}

impl Problem {
    fn report(self) -> Stop {
        match self {
            Problem::Input(e) => fail(SYSTEM, format_args!("Failed to read from stdin: {}", errno_text(&e))),
            Problem::Object(oid, e) => {
                report_write(oid, e);
                fail(FAILURE, "Failed to write VDI")
            }
        }
    }
}

async fn write_all(
    session: &Session,
    mut inode: Inode,
    work: impl futures_util::Stream<Item = (Piece, io::Result<Input>)>,
    flags: Flags,
) -> Outcome {
    // The blocks' owners are looked up in a snapshot of the map: every block is written at most once.
    let before = &inode.clone();
    let hyper = matches!(inode.map, BlockMap::Tree(_));
    let written = work.map(|(piece, input)| async move {
        let input = input.map_err(Problem::Input)?;
        let created = write_piece(session, before, piece, input, flags, hyper).await?;
        Ok::<_, Problem>(created.then_some(piece.index as u32))
    });
    let mut written = std::pin::pin!(written.buffered(ahead(WRITE_AHEAD, inode.header.block_size())));
    while let Some(result) = written.next().await {
        match result {
            Ok(None) => {}
            Ok(Some(index)) => {
                let entered = enter_block(session, &mut inode, index, Flags::NONE).await;
                entered.map_err(|_| fail(FAILURE, "Failed to write VDI"))?;
            }
            Err(problem) => return Err(problem.report()),
        }
    }
    Ok(())
}

/// Writes a piece of a block; `true` if a hypervolume's block was created and must be entered in its map.
async fn write_piece(
    session: &Session,
    inode: &Inode,
    piece: Piece,
    input: Input,
    flags: Flags,
    hyper: bool,
) -> Result<bool, Problem> {
    let header = &inode.header;
    let index = piece.index as u32;
    let oid = Oid::data(inode.vid(), index);
    let owner = inode.map.get(piece.index);
    let create = owner != inode.vid();
    let write = Write {
        flags,
        create,
        cow: (create && !owner.is_none()).then(|| Oid::data(owner, index)),
        ..Write::new(header, oid, piece.offset, input.data)
    };
    write.send(session).await.map_err(|e| Problem::Object(oid, e))?;
    if create && !hyper {
        let entry = enter_flat(header, index, Flags::NONE);
        entry.send(session).await.map_err(|e| Problem::Object(Oid::inode(inode.vid()), e))?;
    }
    Ok(create && hyper)
}
