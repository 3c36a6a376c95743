//! Copies and erasure policies: the policy byte (spec 01, 12.3; spec 02, 11.1) and its text form (spec 02, section 12).

use crate::{DecodeError, MAX_COPIES};

/// A valid redundancy policy byte: 0 = replication, else `data/2 << 4 | parity`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct CopyPolicy(u8);

impl CopyPolicy {
    /// Plain replication.
    pub const REPLICATED: CopyPolicy = CopyPolicy(0);

    /// `data` strips (2, 4, 8 or 16) and `parity` strips (1..=15).
    pub fn erasure(data: u8, parity: u8) -> Option<CopyPolicy> {
        (matches!(data, 2 | 4 | 8 | 16) && matches!(parity, 1..=15))
            .then_some(CopyPolicy((data / 2) << 4 | parity))
    }

    /// Checks a byte from the wire or the disk.
    pub fn from_byte(byte: u8) -> Result<CopyPolicy, DecodeError> {
        match byte {
            0 => Ok(CopyPolicy::REPLICATED),
            b => CopyPolicy::erasure((b >> 4).saturating_mul(2), b & 0x0f)
                .ok_or(DecodeError::Invalid { what: "copy policy", value: b.into() }),
        }
    }

    /// The byte on the wire.
    pub fn to_byte(self) -> u8 {
        self.0
    }

    /// Whether objects are cut into strips.
    pub fn is_erasure(self) -> bool {
        self.0 != 0
    }

    /// Data strips; 1 for replication.
    pub fn data_strips(self) -> u8 {
        if self.is_erasure() { (self.0 >> 4) * 2 } else { 1 }
    }

    /// Parity strips; 0 for replication.
    pub fn parity_strips(self) -> u8 {
        self.0 & 0x0f
    }

    /// Data plus parity strips; 0 for replication, where the number of copies is stored separately.
    pub fn strips(self) -> u8 {
        if self.is_erasure() { self.data_strips() + self.parity_strips() } else { 0 }
    }
}

/// Parses the argument of `-c`: `N` copies or `DATA:PARITY`. Gives `(copies, policy)` or `None` where the tools print
/// their usage. Numbers above 255 are refused instead of truncated to 8 bits.
pub fn parse_copies(text: &str) -> Option<(u8, CopyPolicy)> {
    let mut fields = text.split(':').filter(|f| !f.is_empty());
    let number = |field: &str| -> Option<u8> {
        field.bytes().all(|b| b.is_ascii_digit()).then(|| field.parse::<u8>().ok()).flatten()
    };
    let first = number(fields.next()?)?;
    if usize::from(first) > MAX_COPIES {
        return None;
    }
    match fields.next() {
        None => (first != 0).then_some((first, CopyPolicy::REPLICATED)),
        Some(second) => {
            let policy = CopyPolicy::erasure(first, number(second)?)?;
            Some((policy.strips(), policy))
        }
    }
}

/// How listings print redundancy: `4:2` or `3`.
pub fn format_copies(copies: u8, policy: u8) -> String {
    match CopyPolicy::from_byte(policy) {
        Ok(p) if p.is_erasure() => format!("{}:{}", p.data_strips(), p.parity_strips()),
        _ => copies.to_string(),
    }
}
