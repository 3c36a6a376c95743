//! What can be wrong with the arguments of the coder.

/// A request the coder refuses. Nothing has been written to the output buffers when one is returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The numbers of strips are not one of the 60 valid policies (d in 2, 4, 8, 16; p in 1..=15).
    #[error("invalid erasure code {data}:{parity}: data strips must be 2, 4, 8 or 16, parity strips 1 to 15")]
    InvalidCode {
        /// Number of data strips asked for.
        data: u8,
        /// Number of parity strips asked for.
        parity: u8,
    },
    /// The policy byte is none of the 60 valid ones (0, replication, is none of them).
    #[error("invalid erasure code policy {0:#04x}")]
    InvalidPolicy(u8),
    /// A list of strips has another number of entries than the code asks for.
    #[error("{got} strips given where the code has {want}")]
    StripCount {
        /// Number of strips the code asks for.
        want: usize,
        /// Number of strips given.
        got: usize,
    },
    /// The bytes of an object are not a whole number of stripes.
    #[error("{0} bytes are not a whole number of 512-byte stripes")]
    PartialStripe(usize),
    /// A strip has another length than its siblings or than the object asks for.
    #[error("strip {index} has {got} bytes instead of {want}")]
    StripLength {
        /// Position in the list given.
        index: usize,
        /// Bytes it should have.
        want: usize,
        /// Bytes it has.
        got: usize,
    },
    /// A strip index is not below the number of strips it counts.
    #[error("strip index {index} is not below {limit}")]
    StripIndex {
        /// The index given.
        index: usize,
        /// Number of strips it counts.
        limit: usize,
    },
    /// A strip is given twice as input, or is both an input and to be rebuilt.
    #[error("strip {0} is given twice")]
    RepeatedStrip(usize),
}
