//! The grammar of file names (spec 03, section 7).
//!
//! Only names that match exactly are objects. `backup` or a directory `ba` must never become an object id.

use std::fmt;

use sheepdog_proto::{Epoch, MAX_COPIES, Oid};

/// One file of an object on this node: a whole replica, or one strip of an erasure-coded object.
///
/// Displays as the file name: 16 hexadecimal digits, then `_` and the strip index for strips.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Replica {
    /// The object.
    pub oid: Oid,
    /// Index of the strip; `None` for replicated objects.
    pub strip: Option<u8>,
}

impl Replica {
    /// A whole replica.
    pub fn whole(oid: Oid) -> Replica {
        Replica { oid, strip: None }
    }

    /// Strip `index` of a coded object.
    pub fn strip(oid: Oid, index: u8) -> Replica {
        Replica { oid, strip: Some(index) }
    }

    /// Parses a file name of a disk: `[0-9a-f]{16}(_[0-9]+)?` with a strip index of 0..30 without leading zeros.
    pub fn parse(name: &str) -> Option<Replica> {
        let (oid, rest) = name.split_at_checked(16)?;
        if !oid.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return None;
        }
        let oid = Oid(u64::from_str_radix(oid, 16).ok()?);
        let strip = match rest.strip_prefix('_') {
            None if rest.is_empty() => None,
            None => return None,
            Some(digits) => Some(decimal(digits).filter(|n| (*n as usize) < MAX_COPIES)? as u8),
        };
        Some(Replica { oid, strip })
    }
}

impl fmt::Display for Replica {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.strip {
            None => write!(f, "{}", self.oid),
            Some(index) => write!(f, "{}_{index}", self.oid),
        }
    }
}

/// A file in `.stale`: a replica as it was at the end of an epoch. Displays as its file name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StaleName {
    /// Whose old content it is.
    pub replica: Replica,
    /// The last epoch in which it was current.
    pub epoch: Epoch,
}

impl StaleName {
    /// Parses a file name of `.stale`.
    pub fn parse(name: &str) -> Option<StaleName> {
        let (replica, epoch) = name.split_once('.')?;
        Some(StaleName { replica: Replica::parse(replica)?, epoch: Epoch(decimal(epoch)?) })
    }
}

impl fmt::Display for StaleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.replica, self.epoch)
    }
}

/// Whether a name in a disk is a left-over of an unfinished create or move: an object's name, anything, `.tmp`.
pub(crate) fn is_temporary(name: &str) -> bool {
    let Some(stem) = name.strip_suffix(".tmp") else { return false };
    let base = stem.split_once('.').map_or(stem, |(base, _)| base);
    Replica::parse(base).is_some()
}

/// A decimal number without sign or padding.
fn decimal(digits: &str) -> Option<u32> {
    let padded = digits.len() > 1 && digits.starts_with('0');
    if padded || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for name in ["0002060900000000", "ffffffffffffffff", "0002060900000000_0", "0002060900000000_30"] {
            assert_eq!(Replica::parse(name).map(|r| r.to_string()).as_deref(), Some(name));
        }
        let stale = StaleName::parse("0001e5c000000001_0.12").expect("valid");
        assert_eq!((stale.replica.strip, stale.epoch), (Some(0), Epoch(12)));
        assert_eq!(stale.to_string(), "0001e5c000000001_0.12");
    }

    #[test]
    fn anything_else_is_not_an_object() {
        for name in [
            "",
            "backup",
            "ba",
            "000206090000000",
            "00020609000000000",
            "000206090000000G",
            "000206090000000A",
            "0002060900000000_",
            "0002060900000000_31",
            "0002060900000000_01",
            "0002060900000000_+1",
            "0002060900000000.1",
            "0002060900000000.tmp",
            "00020609000000é0",
        ] {
            assert_eq!(Replica::parse(name), None, "{name}");
        }
        for name in ["0002060900000000", "0002060900000000.", "0002060900000000.1.tmp", "0002060900000000.01"]
        {
            assert_eq!(StaleName::parse(name), None, "{name}");
        }
    }

    #[test]
    fn temporaries_are_recognised_only_after_an_object_name() {
        for name in ["0002060900000000.tmp", "0002060900000000_3.tmp", "0002060900000000.17.tmp"] {
            assert!(is_temporary(name), "{name}");
        }
        for name in ["backup.tmp", ".tmp", "0002060900000000", "0002060900000000.tmp.1"] {
            assert!(!is_temporary(name), "{name}");
        }
    }
}
