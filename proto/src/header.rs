//! Request and response headers and the views of their unions (spec 01, section 3).

use crate::{ClusterFlags, Epoch, Flags, HEADER_LEN, NodeId, Oid, Opcode, ResultCode, VdiId};

wire! {
    /// A request header: 16 common bytes and a 32-byte union, read through one of the views ([`Request::obj`], ...).
    Request [48] {
        /// `proto_ver`.
        0 => version: u8,
        /// What to do.
        1 => opcode: Opcode,
        /// How.
        2 => flags: Flags,
        /// Meaningful in peer operations only.
        4 => epoch: Epoch,
        /// The client's, echoed.
        8 => id: u32,
        /// Bytes of payload with WRITE, capacity for the answer without.
        12 => data_length: u32,
        /// The union.
        16 => body: [u8; 32],
    }
}

wire! {
    /// Object operations.
    ObjRequest [32] {
        /// The object.
        0 => oid: Oid,
        /// Source of a copy-on-write create.
        8 => cow_oid: Oid,
        /// Copies; 0 = look up.
        16 => copies: u8,
        /// Policy byte; 0 = look up.
        17 => copy_policy: u8,
        /// Strip index of a peer operation.
        18 => ec_index: u8,
        /// Writes between nodes of this project: how often copies of a VDI were altered in the epoch, modulo 256; others send 0.
        /// READ_PEER among them: 1 = whether the object is there; what recovery can make no object of is not.
        19 => alters: u8,
        /// Epoch whose version is wanted (recovery, GET_EPOCH, GET_HASH, COMPLETE_RECOVERY).
        20 => tgt_epoch: Epoch,
        /// Byte offset inside the object.
        24 => offset: u32,
        /// Writes between nodes of this project: number of the write among its gateway's; others send 0.
        28 => write_seq: u32,
    }
}

wire! {
    /// ORDER_PEER: nodes of this project among themselves (an addition; docs/architecture.md). The original answers
    /// `INVALID_PARMS`, which tells the two apart (spec 06, 15.1).
    OrderRequest [32] {
        /// The object, or the inode of the VDI.
        0 => oid: Oid,
        /// What is asked, [`order`].
        8 => what: u8,
        /// CLAIM: 1 to write, 0 to read only. PERFORM: the client's opcode, or [`order::ADD`]. LET_GO: 1 = once the VDI is known as a snapshot.
        9 => kind: u8,
        /// YIELD: every grant up to this one.
        12 => serial: u32,
        /// PERFORM: byte offset inside the object.
        16 => offset: u32,
        /// PERFORM of a read: bytes.
        20 => length: u32,
        /// SETTLE, PULL: regions of the object, a bit for each 64th of it. PERFORM of ADD: which part of the payload is new, first
        /// byte (upper half) and length.
        24 => regions: u64,
    }
}

/// Values of [`OrderRequest::what`].
pub mod order {
    /// May the sender read or write the objects of a VDI without asking? Payload: the sender's node id.
    pub const CLAIM: u8 = 1;
    /// Give such a right back.
    pub const YIELD: u8 = 2;
    /// Execute an operation in this node's order of the object.
    pub const PERFORM: u8 = 3;
    /// Make the replicas of an object equal again.
    pub const SETTLE: u8 = 4;
    /// Take regions of an object over from another node. Payload: its node id.
    pub const PULL: u8 = 5;
    /// Every write of the sender up to a number is done or repaired. Payload: its node id.
    pub const DONE: u8 = 6;
    /// What is known of the last writes of a node to an object. Payload: the node id.
    pub const RECALL: u8 = 7;
    /// Which of these writes stand and which are undone. Payload: the verdicts.
    pub const DECIDE: u8 = 8;
    /// Read a strip as it is, by index (`kind`), offset and length.
    pub const READ_STRIP: u8 = 9;
    /// Overwrite part of a strip that is not being written, by index (`kind`) and offset. Payload: the bytes.
    pub const WRITE_STRIP: u8 = 10;
    /// Keep updates of a VDI's table out until LET_GO. Payload: the sender's node id; `serial` names the hold.
    pub const HOLD: u8 = 16;
    /// End a hold.
    pub const LET_GO: u8 = 17;
    /// SHA-1 of the 4 KiB blocks of a replica that are not zero, each after its number. `serial`: as `tgt_epoch` of GET_HASH.
    pub const DIGEST: u8 = 18;
    /// What became of writes of strips at their gateway; those of epochs up to `serial` that it has not acknowledged, it will
    /// not acknowledge. Payload: the writes. Answer: a byte for each.
    pub const OUTCOME: u8 = 19;
    /// Writes of strips that were kept although not all homes of their epoch were there to tell of them.
    pub const LOOSE: u8 = 20;
    /// Wait until copies of VDIs were altered `serial` times in the epoch, and what was sent to homes of before is over.
    pub const LEVEL: u8 = 21;
    /// Is anything of the object here, of whatever epoch? `kind`: how many strips it has; 0 = it is replicated.
    pub const HAS: u8 = 22;
    /// Rebuild the strips of a coded object that are missing, and strip `kind` if all others fit without it.
    pub const REPAIR: u8 = 23;
    /// The writes of strip `kind` of which it is open here whether they stand: what a recovering node gets is without them.
    pub const LEFT_OUT: u8 = 24;
    /// Process everything that the cluster has said so far; `kind` 1: and end the updates of the VDI's table that are in progress.
    pub const CATCH_UP: u8 = 25;
    /// The writes of part of an object that came before it in epoch `serial`. Answer: offset, length (4 bytes each), bytes.
    pub const EARLY: u8 = 26;

    /// PERFORM: write the new part of the payload to the object; if it is not there, create it of all of the payload.
    pub const ADD: u8 = 0x80;
}

wire! {
    /// VDI operations.
    VdiRequest [32] {
        /// Size in bytes.
        0 => vdi_size: u64,
        /// NEW_VDI: parent; RELEASE_VDI: the vid to release.
        8 => base_vdi_id: VdiId,
        /// Copies; 0 = cluster default copies and policy.
        12 => copies: u8,
        /// Policy byte.
        13 => copy_policy: u8,
        /// 0 flat table, 1 B-tree.
        14 => store_policy: u8,
        /// log2 of the block size; 0 = cluster default.
        15 => block_size_shift: u8,
        /// Snapshot id.
        16 => snapid: u32,
        /// Lock type: 0 normal, 1 shared.
        20 => lock_type: u32,
    }
}

wire! {
    /// MAKE_FS, STAT_CLUSTER, ALTER_CLUSTER_COPY.
    ClusterRequest [32] {
        /// Creation time: seconds << 32 | nanoseconds.
        8 => ctime: u64,
        /// Default copies.
        16 => copies: u8,
        /// Default policy byte.
        17 => copy_policy: u8,
        /// Cluster flags.
        18 => flags: ClusterFlags,
        /// STAT_CLUSTER: node slots per record.
        24 => nodes_nr: u32,
        /// log2 of the default block size.
        28 => block_size_shift: u8,
    }
}

wire! {
    /// NOTIFY_VDI_ADD, ALTER_VDI_COPY.
    VdiStateRequest [32] {
        /// The VDI that becomes a snapshot; 0 = none.
        0 => old_vid: VdiId,
        /// The VDI announced or altered.
        4 => new_vid: VdiId,
        /// Its copies.
        8 => copies: u8,
        /// Non-zero: set the in-use bit.
        9 => set_bitmap: u8,
        /// Its policy byte.
        10 => copy_policy: u8,
        /// Its block size.
        11 => block_size_shift: u8,
    }
}

wire! {
    /// DECREF_OBJ, DECREF_PEER.
    RefRequest [32] {
        /// The ledger object.
        0 => oid: Oid,
        /// Generation of the dropped reference.
        8 => generation: u32,
        /// Copies made of it.
        12 => count: u32,
    }
}

wire! {
    /// REPAIR_REPLICA.
    ForwardRequest [32] {
        /// The object.
        0 => oid: Oid,
        /// Address of the node to copy from.
        8 => addr: [u8; 16],
        /// Its port.
        24 => port: u16,
    }
}

wire! {
    /// VDI_STATE_CHECKPOINT_CTL.
    CheckpointRequest [32] {
        /// 1 get, 0 free.
        0 => get: u32,
        /// The checkpoint's epoch.
        4 => tgt_epoch: Epoch,
        /// The VDI.
        8 => vid: VdiId,
    }
}

wire! {
    /// INODE_COHERENCE.
    CoherenceRequest [32] {
        /// The VDI.
        0 => vid: VdiId,
        /// 1 validate, 0 invalidate.
        4 => validate: u32,
    }
}

/// Typed views of a header's union, `body`.
macro_rules! views {
    ($($get:ident, $set:ident, $ty:ident, $doc:literal;)*) => {$(
        #[doc = concat!("The union as ", $doc, ".")]
        pub fn $get(&self) -> $ty {
            $ty::from_bytes(&self.body)
        }

        #[doc = concat!("With the union set as ", $doc, ".")]
        pub fn $set(mut self, body: $ty) -> Self {
            self.body = body.to_bytes();
            self
        }
    )*};
}

impl Request {
    /// A request with the opcode's protocol version and everything else zero.
    pub fn new(opcode: Opcode) -> Request {
        Request { version: opcode.version(), opcode, ..Request::zeroed() }
    }

    /// With `flags` added.
    pub fn flag(mut self, flags: Flags) -> Request {
        self.flags = self.flags.with(flags);
        self
    }

    /// With the given payload length or reply capacity.
    pub fn length(mut self, data_length: usize) -> Request {
        self.data_length = u32::try_from(data_length).unwrap_or(u32::MAX);
        self
    }

    /// With the given epoch.
    pub fn epoch(mut self, epoch: Epoch) -> Request {
        self.epoch = epoch;
        self
    }

    /// Whether a payload follows the header on the wire.
    pub fn has_payload(&self) -> bool {
        self.flags.contains(Flags::WRITE) && self.data_length > 0
    }

    /// Most bytes that the answer may carry (spec 01, section 4).
    pub fn reply_capacity(&self) -> usize {
        if self.flags.contains(Flags::WRITE) && !self.flags.contains(Flags::PIGGYBACK) {
            0
        } else {
            self.data_length as usize
        }
    }

    views! {
        obj, with_obj, ObjRequest, "an object operation";
        vdi, with_vdi, VdiRequest, "a VDI operation";
        cluster, with_cluster, ClusterRequest, "a cluster operation";
        vdi_state, with_vdi_state, VdiStateRequest, "a VDI state notification";
        reference, with_reference, RefRequest, "a reference drop";
        forward, with_forward, ForwardRequest, "a replica repair";
        order, with_order, OrderRequest, "a question of order";
        checkpoint, with_checkpoint, CheckpointRequest, "a checkpoint request";
        coherence, with_coherence, CoherenceRequest, "an inode coherence change";
    }
}

wire! {
    /// A response header. `body` is the union behind `result`, read through one of the views.
    Response [48] {
        /// Always 0.
        0 => version: u8,
        /// The request's.
        1 => opcode: Opcode,
        /// Always 0.
        2 => flags: Flags,
        /// The responder's current epoch.
        4 => epoch: Epoch,
        /// The request's.
        8 => id: u32,
        /// Bytes of payload that follow.
        12 => data_length: u32,
        /// Outcome.
        16 => result: ResultCode,
        /// The rest of the union.
        20 => body: [u8; 28],
    }
}

wire! {
    /// NEW_VDI, LOCK_VDI, GET_VDI_INFO, DEL_VDI, GET_VDI_ATTR.
    VdiResponse [28] {
        /// The VDI.
        4 => vdi_id: VdiId,
        /// GET_VDI_ATTR: the attribute's id.
        8 => attr_id: u32,
        /// Its copies.
        12 => copies: u8,
        /// Its block size.
        13 => block_size_shift: u8,
    }
}

wire! {
    /// STAT_SHEEP, GET_NODE_LIST.
    NodeResponse [28] {
        /// Nodes in the list.
        0 => nr_nodes: u32,
        /// Bytes of the store.
        12 => store_size: u64,
        /// Bytes free.
        20 => store_free: u64,
    }
}

wire! {
    /// GET_HASH.
    HashResponse [28] {
        /// SHA-1 of the object.
        4 => digest: [u8; 20],
    }
}

wire! {
    /// ORDER_PEER.
    OrderResponse [28] {
        /// CLAIM: 1 = the sender may go on directly, 2 = through the first home of each object.
        0 => verdict: u8,
        /// CLAIM: number of the grant.
        4 => serial: u32,
    }
}

wire! {
    /// GET_CLUSTER_DEFAULT.
    ClusterDefaultResponse [28] {
        /// Default copies.
        0 => nr_copies: u8,
        /// Default policy byte.
        1 => copy_policy: u8,
        /// Default block size.
        2 => block_size_shift: u8,
    }
}

impl Response {
    /// The answer to `request` with `result`; epoch and payload length are filled in when it is sent.
    pub fn to(request: &Request, result: ResultCode) -> Response {
        Response { opcode: request.opcode, id: request.id, result, ..Response::zeroed() }
    }

    views! {
        vdi, with_vdi, VdiResponse, "that of a VDI operation";
        node, with_node, NodeResponse, "that of a node operation";
        hash, with_hash, HashResponse, "that of GET_HASH";
        order, with_order, OrderResponse, "that of a question of order";
        cluster_default, with_cluster_default, ClusterDefaultResponse, "that of GET_CLUSTER_DEFAULT";
    }
}

const _: () = assert!(Request::LEN == HEADER_LEN && Response::LEN == HEADER_LEN);

impl ForwardRequest {
    /// The node to copy from, as far as identity goes.
    pub fn node(&self) -> NodeId {
        NodeId { addr: self.addr, port: self.port, ..NodeId::zeroed() }
    }
}
