//! Request flags and cluster flags (spec 01, section 8).

use crate::Wire;

macro_rules! flag_set {
    ($(#[$meta:meta])* $name:ident { $($(#[$fmeta:meta])* $flag:ident = $value:literal),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct $name(pub u16);

        impl $name {
            $($(#[$fmeta])* pub const $flag: $name = $name($value);)*

            /// Whether every bit of `other` is set.
            pub fn contains(self, other: $name) -> bool {
                self.0 & other.0 == other.0
            }

            /// These bits and those of `other`.
            pub const fn with(self, other: $name) -> $name {
                $name(self.0 | other.0)
            }

            /// These bits without those of `other`.
            pub const fn without(self, other: $name) -> $name {
                $name(self.0 & !other.0)
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "{}({:#06x})", stringify!($name), self.0)
            }
        }

        impl Wire for $name {
            const SIZE: usize = 2;
            const NAME: &'static str = stringify!($name);
            fn get(bytes: &[u8]) -> Self {
                $name(u16::get(bytes))
            }
            fn put(&self, out: &mut [u8]) {
                self.0.put(out);
            }
        }
    };
}

flag_set! {
    /// Bits 2..4 of a request header.
    Flags {
        /// No flag.
        NONE = 0x0000,
        /// A payload follows the header.
        WRITE = 0x0001,
        /// CREATE_AND_WRITE_OBJ copies from `cow_oid`.
        COW = 0x0002,
        /// The client may be served from a write-back cache.
        CACHE = 0x0004,
        /// Bypass caches.
        DIRECT = 0x0008,
        /// With WRITE: the answer has a payload too.
        PIGGYBACK = 0x0010,
        /// The client takes part in inode coherence.
        TGT = 0x0020,
        /// A request that a sheep makes on behalf of another request.
        FWD = 0x0040,
        /// A peer request made by recovery.
        RECOVERY = 0x0080,
        /// READ_PEER: look in the stale area whatever the epoch.
        WILDCARD = 0x0100,
        /// GET_VDI_ATTR: create.
        ATTR_CREAT = 0x0100,
        /// GET_VDI_ATTR: fail if it exists.
        ATTR_EXCL = 0x0200,
        /// GET_VDI_ATTR: delete.
        ATTR_DEL = 0x0400,
    }
}

flag_set! {
    /// Flags of a cluster, set when it is formatted (spec 04, 2.5).
    ClusterFlags {
        /// No flag.
        NONE = 0x0000,
        /// Writes need as many zones as copies.
        STRICT = 0x0001,
        /// Virtual nodes follow disks; another, incompatible build of the original.
        DISKMODE = 0x0002,
        /// Weights follow from the space of the nodes.
        AUTO_VNODES = 0x0004,
        /// VDI locking.
        USE_LOCK = 0x0008,
        /// VDI ids are used again.
        RECYCLE_VID = 0x0010,
        /// Recovery stops rather than fill disks.
        AVOID_DISKFULL = 0x0020,
    }
}
