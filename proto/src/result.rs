//! Result codes and their exact messages (spec 01, section 9).

use std::fmt;

use crate::Wire;

/// The `result` field of a response. 0 is success. Displays as the original's message.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ResultCode(pub u32);

macro_rules! results {
    ($($(#[$meta:meta])* $name:ident = $value:literal $(, $text:literal)?;)*) => {
        #[allow(missing_docs)] // the message says what each one means
        impl ResultCode {
            $($(#[$meta])* pub const $name: ResultCode = ResultCode($value);)*

            /// The constant's name, if the code has one.
            pub fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($value => Some(stringify!($name)),)*
                    _ => None,
                }
            }

            /// The message, if the code has one.
            pub fn message(self) -> Option<&'static str> {
                match self.0 {
                    $($($value => Some($text),)?)*
                    _ => None,
                }
            }
        }
    };
}

results! {
    SUCCESS = 0x00, "Success";
    UNKNOWN = 0x01, "Unknown error";
    NO_OBJ = 0x02, "No object found";
    EIO = 0x03, "I/O error";
    VDI_EXIST = 0x04, "VDI exists already";
    INVALID_PARMS = 0x05, "Invalid parameters";
    SYSTEM_ERROR = 0x06, "System error";
    VDI_LOCKED = 0x07, "VDI is already locked";
    NO_VDI = 0x08, "No VDI found";
    NO_BASE_VDI = 0x09, "No base VDI found";
    VDI_READ = 0x0A, "Failed to read from requested VDI";
    VDI_WRITE = 0x0B, "Failed to write to requested VDI";
    BASE_VDI_READ = 0x0C, "Failed to read from base VDI";
    BASE_VDI_WRITE = 0x0D, "Failed to write to base VDI";
    NO_TAG = 0x0E, "Failed to find requested tag";
    STARTUP = 0x0F, "System is still booting";
    VDI_NOT_LOCKED = 0x10, "VDI is not locked";
    SHUTDOWN = 0x11, "System is shutting down";
    NO_MEM = 0x12, "Out of memory on server";
    FULL_VDI = 0x13, "Maximum number of VDIs reached";
    VER_MISMATCH = 0x14, "Protocol version mismatch";
    NO_SPACE = 0x15, "Server has no space for new objects";
    WAIT_FOR_FORMAT = 0x16, "Waiting for cluster to be formatted";
    WAIT_FOR_JOIN = 0x17, "Waiting for other nodes to join cluster";
    JOIN_FAILED = 0x18, "Node has failed to join cluster";
    HALT = 0x19, "IO has halted as there are not enough living nodes";
    READONLY = 0x1A, "Object is read-only";
    INODE_INVALIDATED = 0x1D, "Inode object is invalidated";
    OLD_NODE_VER = 0x81, "Request has an old epoch";
    NEW_NODE_VER = 0x82, "Request has a new epoch";
    NOT_FORMATTED = 0x83, "Cluster has not been formatted";
    INVALID_CTIME = 0x84, "Creation times differ";
    INVALID_EPOCH = 0x85, "Invalid epoch";
    NETWORK_ERROR = 0x86, "Network error between sheep";
    NO_CACHE = 0x87, "No cache object found";
    BUFFER_SMALL = 0x88, "The buffer is too small";
    FORCE_RECOVER = 0x89, "Cluster is running/halted and cannot be force recovered";
    NO_STORE = 0x8A, "Targeted backend store is not found";
    NO_SUPPORT = 0x8B, "Operation is not supported";
    NODE_IN_RECOVERY = 0x8C, "Targeted node is in recovery";
    KILLED = 0x8D, "Node is killed";
    OID_EXIST = 0x8E, "Object ID exists already";
    AGAIN = 0x8F, "Ask to try again";
    STALE_OBJ = 0x90, "Object may be stale";
    CLUSTER_ERROR = 0x91, "Cluster driver error";
    VDI_NOT_EMPTY = 0x92;
    NOT_FOUND = 0x93;
    INCOMPLETE = 0x94;
    COLLECTING_CINFO = 0x95;
    GATEWAY_MODE = 0x97, "Targeted node is gateway mode";
    INVALID_VNODES_STRATEGY = 0x98, "Invalid cluster vnodes strategy";
    NO_CHECKPOINT_ENTRY = 0x99;
}

impl ResultCode {
    /// Whether this is [`ResultCode::SUCCESS`].
    pub fn is_ok(self) -> bool {
        self == ResultCode::SUCCESS
    }

    /// `Ok(())` for success, else the code as the error.
    pub fn ok(self) -> Result<(), ResultCode> {
        if self.is_ok() { Ok(()) } else { Err(self) }
    }

    /// Whether a gateway hides this answer of a peer and tries again (spec 01, 6.5).
    pub fn is_retriable(self) -> bool {
        matches!(
            self,
            ResultCode::OLD_NODE_VER
                | ResultCode::NEW_NODE_VER
                | ResultCode::NETWORK_ERROR
                | ResultCode::WAIT_FOR_JOIN
                | ResultCode::WAIT_FOR_FORMAT
                | ResultCode::KILLED
        )
    }
}

impl std::error::Error for ResultCode {}

impl fmt::Display for ResultCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.message() {
            Some(text) => f.write_str(text),
            None => write!(f, "Invalid error code {:x}", self.0),
        }
    }
}

impl fmt::Debug for ResultCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "{:#04x}", self.0),
        }
    }
}

impl Wire for ResultCode {
    const SIZE: usize = 4;
    const NAME: &'static str = "result";
    fn get(bytes: &[u8]) -> Self {
        ResultCode(u32::get(bytes))
    }
    fn put(&self, out: &mut [u8]) {
        self.0.put(out);
    }
}
