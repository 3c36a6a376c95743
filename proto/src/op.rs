//! Opcodes (spec 01, section 7). Classes and handlers live in the daemon's dispatch table.

use std::fmt;

/// The second byte of a header. Values without a name are answered `INVALID_PARMS`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Opcode(pub u8);

macro_rules! opcodes {
    ($($name:ident = $value:literal;)*) => {
        #[allow(missing_docs)] // named and explained row by row in spec 01, 7.1
        impl Opcode {
            $(pub const $name: Opcode = Opcode($value);)*

            /// Name as logs print it; `None` for unknown and obsolete opcodes.
            pub fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($value => Some(stringify!($name)),)*
                    _ => None,
                }
            }

            /// Every named opcode, ascending.
            pub const ALL: &'static [Opcode] = &[$(Opcode($value)),*];
        }
    };
}

opcodes! {
    CREATE_AND_WRITE_OBJ = 0x01;
    READ_OBJ = 0x02;
    WRITE_OBJ = 0x03;
    REMOVE_OBJ = 0x04;
    DISCARD_OBJ = 0x05;
    NEW_VDI = 0x11;
    LOCK_VDI = 0x12;
    RELEASE_VDI = 0x13;
    GET_VDI_INFO = 0x14;
    READ_VDIS = 0x15;
    FLUSH_VDI = 0x16;
    DEL_VDI = 0x17;
    GET_CLUSTER_DEFAULT = 0x18;
    GET_NODE_LIST = 0x82;
    MAKE_FS = 0x84;
    SHUTDOWN = 0x85;
    STAT_SHEEP = 0x86;
    STAT_CLUSTER = 0x87;
    GET_VDI_ATTR = 0x89;
    FORCE_RECOVER = 0x8a;
    GET_STORE_LIST = 0x90;
    CLEANUP = 0x94;
    TRACE_STATUS = 0x95;
    TRACE_READ_BUF = 0x96;
    STAT_RECOVERY = 0x97;
    FLUSH_DEL_CACHE = 0x98;
    NOTIFY_VDI_DEL = 0x99;
    KILL_NODE = 0x9a;
    TRACE_ENABLE = 0x9b;
    TRACE_DISABLE = 0x9c;
    GET_OBJ_LIST = 0xa1;
    GET_EPOCH = 0xa2;
    CREATE_AND_WRITE_PEER = 0xa3;
    READ_PEER = 0xa4;
    WRITE_PEER = 0xa5;
    REMOVE_PEER = 0xa6;
    ORDER_PEER = 0xa7;
    ENABLE_RECOVER = 0xa8;
    DISABLE_RECOVER = 0xa9;
    GET_VDI_COPIES = 0xab;
    COMPLETE_RECOVERY = 0xac;
    FLUSH_PEER = 0xae;
    NOTIFY_VDI_ADD = 0xaf;
    DELETE_CACHE = 0xb0;
    MD_INFO = 0xb1;
    MD_PLUG_DISKS = 0xb2;
    MD_UNPLUG_DISKS = 0xb3;
    GET_HASH = 0xb4;
    REWEIGHT = 0xb5;
    STAT = 0xb8;
    GET_LOGLEVEL = 0xb9;
    SET_LOGLEVEL = 0xba;
    NFS_CREATE = 0xbb;
    NFS_DELETE = 0xbc;
    EXIST = 0xbd;
    CLUSTER_INFO = 0xbe;
    ALTER_CLUSTER_COPY = 0xbf;
    ALTER_VDI_COPY = 0xc0;
    DECREF_OBJ = 0xc1;
    DECREF_PEER = 0xc2;
    REPAIR_REPLICA = 0xc5;
    OIDS_EXIST = 0xc6;
    VDI_STATE_CHECKPOINT_CTL = 0xc7;
    INODE_COHERENCE = 0xc8;
    READ_DEL_VDIS = 0xc9;
    GET_RECOVERY = 0xca;
    SET_RECOVERY = 0xcb;
    SET_VNODES = 0xcc;
    GET_VNODES = 0xcd;
}

impl Opcode {
    /// Whether the opcode belongs to the internal protocol (version 0x0a).
    pub fn is_internal(self) -> bool {
        self.0 >= 0x80
    }

    /// The protocol version a client states for this opcode.
    pub fn version(self) -> u8 {
        if self.is_internal() { crate::INTERNAL_PROTO_VERSION } else { crate::PROTO_VERSION }
    }

    /// The peer operation that a gateway sends for a client's (spec 01, 7.1).
    pub fn to_peer(self) -> Option<Opcode> {
        Some(match self {
            Opcode::CREATE_AND_WRITE_OBJ => Opcode::CREATE_AND_WRITE_PEER,
            Opcode::READ_OBJ => Opcode::READ_PEER,
            Opcode::WRITE_OBJ => Opcode::WRITE_PEER,
            Opcode::REMOVE_OBJ => Opcode::REMOVE_PEER,
            Opcode::DECREF_OBJ => Opcode::DECREF_PEER,
            _ => return None,
        })
    }
}

impl fmt::Display for Opcode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "{:#04x}", self.0),
        }
    }
}

impl fmt::Debug for Opcode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl crate::Wire for Opcode {
    const SIZE: usize = 1;
    const NAME: &'static str = "opcode";
    fn get(bytes: &[u8]) -> Self {
        Opcode(bytes[0])
    }
    fn put(&self, out: &mut [u8]) {
        out[0] = self.0;
    }
}
