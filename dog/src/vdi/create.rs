//! `dog vdi create` (spec 07, 9.1).

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use sheepdog_proto::cluster::{CLUSTER_INFO_LEN, ClusterInfoHeader};
use sheepdog_proto::inode::{STORE_POLICY_BTREE, STORE_POLICY_FLAT};
use sheepdog_proto::{CopyPolicy, Flags, MAX_DATA_OBJS, Oid, Opcode, Request, ResultCode, VdiId, Wire};

use crate::args::size_operand;
use crate::context::Context;
use crate::exit::{FAILURE, Outcome, SYSTEM, Stop, fail};
use crate::inode::{BlockMap, Inode, Part, enter_block, enter_flat};
use crate::numbers::human_size;
use crate::objects::{Write, new_vdi};
use crate::out::text;
use crate::session::{Session, success};
use crate::terminal::{Progress, Unit};
use crate::vdi::ahead;

/// Largest hypervolume, bytes.
pub const MAX_HYPER_SIZE: u64 = 1 << 54;
/// Block size of hypervolumes.
pub const HYPER_SHIFT: u8 = 22;
/// Objects created at the same time.
const CREATE_AHEAD: usize = 8;

/// Runs the command.
pub async fn run(context: &Context) -> Outcome {
    let name = context.name()?;
    if name.is_empty() {
        return Err(fail(Stop::Usage, "The VDI name must not be empty"));
    }
    let Some(size) = context.arg(1) else {
        return Err(fail(Stop::Usage, "Please specify the VDI size"));
    };
    let size = size_operand(size)?;
    let options = &context.options;
    let shift = if options.hyper { Some(HYPER_SHIFT) } else { options.shift };
    let actual_shift = match shift {
        Some(shift) => shift,
        None => default_shift(&context.session, name).await?,
    };
    check_size(size, actual_shift, options.hyper)?;
    let (copies, policy) = options.copies.unwrap_or((0, CopyPolicy::REPLICATED));
    let body = sheepdog_proto::header::VdiRequest {
        vdi_size: size,
        copies,
        copy_policy: policy.to_byte(),
        store_policy: if options.hyper { STORE_POLICY_BTREE } else { STORE_POLICY_FLAT },
        block_size_shift: shift.unwrap_or(0),
        ..Default::default()
    };
    let vid = new_vdi(&context.session, name, body).await?;
    if options.prealloc {
        preallocate(&context.session, vid).await?;
    }
    if options.verbose && options.raw {
        out!("{vid}\n");
    } else if options.verbose {
        out!("VDI ID of newly created VDI: {vid}\n");
    }
    Ok(())
}

/// The cluster's default block size shift.
pub async fn default_shift(session: &Session, name: &[u8]) -> Result<u8, Stop> {
    let failed = |stop, why: &dyn std::fmt::Display| {
        fail(stop, format_args!("Failed to create VDI {}: {why}", text(name)))
    };
    let request = Request::new(Opcode::CLUSTER_INFO).length(CLUSTER_INFO_LEN);
    let reply = success(session.ask(request).await).map_err(|e| failed(SYSTEM, &e))?;
    let info = ClusterInfoHeader::decode(&reply.data).map_err(|e| failed(SYSTEM, &e))?;
    if info.ctime == 0 {
        return Err(failed(FAILURE, &ResultCode::WAIT_FOR_FORMAT));
    }
    Ok(info.block_size_shift)
}

/// Refuses sizes that no image can have; failures are reported.
pub fn check_size(size: u64, shift: u8, hyper: bool) -> Outcome {
    if hyper {
        return if size > MAX_HYPER_SIZE { Err(fail(Stop::Usage, "VDI size is too large")) } else { Ok(()) };
    }
    let limit = (MAX_DATA_OBJS as u64) << shift.min(sheepdog_proto::MAX_BLOCK_SHIFT);
    if size <= limit {
        return Ok(());
    }
    Err(fail(
        Stop::Usage,
        format_args!(
            "VDI size is larger than {} bytes, please use '-y' to create a hyper volume with size up to {} bytes \
             or use '-z' to create larger object size volume",
            human_size(limit),
            human_size(MAX_HYPER_SIZE)
        ),
    ))
}

/// Allocates every block, several at a time; each is entered in the map after it exists.
async fn preallocate(session: &Session, vid: VdiId) -> Outcome {
    let inode = Inode::read(session, vid, &Part::Map).await.map_err(|e| {
        e.report();
        fail(FAILURE, "Failed to read a newly created VDI object")
    })?;
    let blocks = inode.header.nr_blocks();
    fill(session, inode, (0..blocks).map(|i| (i as u32, FillBlock::Empty))).await
}

/// What a block of a new VDI is made of.
pub enum FillBlock {
    /// Nothing: it reads as zeros.
    Empty,
    /// The content of another VDI's object.
    CopyOf(Oid),
    /// It stays a hole.
    Skip,
}

/// Creates blocks of `inode` in the order given, several at a time.
pub async fn fill(
    session: &Session,
    mut inode: Inode,
    blocks: impl Iterator<Item = (u32, FillBlock)>,
) -> Outcome {
    let header = inode.header;
    let hyper = matches!(inode.map, BlockMap::Tree(_));
    let progress = Progress::new(header.vdi_size, Unit::Bytes);
    let create = |(index, block): (u32, FillBlock)| async move {
        let data = match block {
            FillBlock::Skip => return Ok((index, false)),
            FillBlock::Empty => Bytes::new(),
            FillBlock::CopyOf(source) => {
                let length = header.block_size() as usize;
                crate::objects::read_or_report(session, source, 0, length).await?
            }
        };
        let oid = Oid::data(header.vdi_id, index);
        Write::new(&header, oid, 0, data).creating().send_or_report(session).await?;
        if !hyper {
            enter_flat(&header, index, Flags::DIRECT).send_or_report(session).await?;
        }
        Ok((index, true))
    };
    let mut created = stream::iter(blocks).map(create).buffered(ahead(CREATE_AHEAD, header.block_size()));
    let mut done = 0;
    progress.show(0);
    while let Some(result) = created.next().await {
        let (index, allocated) = result.map_err(|_: crate::session::Failed| FAILURE)?;
        if hyper && allocated {
            enter_block(session, &mut inode, index, Flags::DIRECT).await?;
        }
        done += header.block_size();
        progress.show(done);
    }
    Ok(())
}
