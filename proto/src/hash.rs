//! The hashes that place objects and name VDIs (spec 01, section 11; spec 02, 5.1).

use std::hash::Hasher;

use fnv::FnvHasher;

/// Start value of 64-bit FNV-1a.
pub const FNV_INIT: u64 = 0xcbf2_9ce4_8422_2325;

/// 64-bit FNV-1a of `bytes`, continuing from `basis` ([`FNV_INIT`] for a fresh hash).
pub fn fnv1a64(bytes: &[u8], basis: u64) -> u64 {
    let mut hasher = FnvHasher::with_key(basis);
    hasher.write(bytes);
    hasher.finish()
}

/// Hashes the hash with itself as basis: the step from one ring point of a node to the next.
pub fn next_hash(hash: u64) -> u64 {
    fnv1a64(&hash.to_le_bytes(), hash)
}

/// The ring hash: FNV-1a followed by one [`next_hash`] round.
pub fn sd_hash(bytes: &[u8]) -> u64 {
    next_hash(fnv1a64(bytes, FNV_INIT))
}

/// Ring position of an object.
pub fn hash_oid(oid: crate::Oid) -> u64 {
    sd_hash(&oid.0.to_le_bytes())
}

/// First candidate VDI id of a name: single-pass FNV-1a of the bytes up to the first NUL, low 24 bits. May be 0, which
/// the search for an id replaces by 1.
pub fn name_hash(name: &[u8]) -> u32 {
    (fnv1a64(crate::cstr(name), FNV_INIT) & 0xff_ffff) as u32
}
