//! The x:y erasure code of coded volumes: where the bytes of an object go and how its parity is computed.
//!
//! An object is cut into stripes of 512 bytes, a stripe into `d` data strips of `512 / d` bytes; `p` parity strips are
//! added, so that any `d` of the `d + p` strips give the object back (spec 02, section 11). Everything here is a pure
//! function of its arguments and bit-exact with the original: strips written by one can be read by the other.
//!
//! [`Code`] is the coder of one policy, [`StripeRange`] turns byte ranges of an object into ranges of strip files.
//! The arithmetic runs in the fastest of several kernels the processor offers, chosen once ([`kernel_name`]).

mod code;
mod error;
mod field;
mod kernel;
mod matrix;
mod range;

pub use code::Code;
pub use error::Error;
pub use kernel::kernel_name;
pub use range::StripeRange;

/// Bytes of an object in one stripe: a disk sector, so that aligned guest I/O needs no read before the write.
pub const STRIPE: usize = 512;

/// Most data strips of a policy.
pub const MAX_DATA: usize = 16;

/// Most parity strips of a policy.
pub const MAX_PARITY: usize = 15;

/// Most strips of an object.
pub const MAX_STRIPS: usize = MAX_DATA + MAX_PARITY;
