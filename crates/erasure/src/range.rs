//! Byte ranges of an object as stripes, and as ranges of its strip files (spec 02, 11.3 and 11.5).

use crate::{Code, STRIPE};

/// The stripes a byte range of an object touches.
///
/// Offsets and lengths are those of the wire (u32), so no sum here can overflow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StripeRange {
    offset: u32,
    len: u32,
    first: u32,
    count: u32,
}

impl StripeRange {
    /// The stripes touched by `len` bytes at byte `offset` of an object.
    pub fn of(offset: u32, len: u32) -> Self {
        let stripe = STRIPE as u64;
        let first = u64::from(offset) / stripe;
        let end = (u64::from(offset) + u64::from(len)).div_ceil(stripe);
        // Both are at most 2^33 / 512; `end` is below `first` never, since ceil(o) >= floor(o).
        Self { offset, len, first: first as u32, count: (end - first) as u32 }
    }

    /// Number of the first stripe.
    pub fn first(&self) -> u32 {
        self.first
    }

    /// Number of stripes.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Offset in the object, in bytes, of the first stripe.
    pub fn object_offset(&self) -> u32 {
        self.first * STRIPE as u32
    }

    /// Bytes of the object in these stripes.
    pub fn object_len(&self) -> u64 {
        u64::from(self.count) * STRIPE as u64
    }

    /// Where the asked bytes begin within the bytes of these stripes (0..=511).
    pub fn skip(&self) -> usize {
        self.offset as usize % STRIPE
    }

    /// Offset, in bytes, in every strip file: the `offset` of the peer requests.
    pub fn strip_offset(&self, code: Code) -> u32 {
        self.first * code.strip_size() as u32
    }

    /// Bytes in every strip file: the `data_length` of the peer requests.
    pub fn strip_len(&self, code: Code) -> u32 {
        self.count * code.strip_size() as u32
    }

    /// Numbers of the stripes of which some bytes lie outside the range: a write must read these from the stored object
    /// first. At most the first and the last.
    pub fn partial(&self) -> impl Iterator<Item = u32> + use<> {
        let end = u64::from(self.offset) + u64::from(self.len);
        let is_partial = |stripe: u32| {
            let start = u64::from(stripe) * STRIPE as u64;
            u64::from(self.offset) > start || end < start + STRIPE as u64
        };
        let last = self.first + self.count.saturating_sub(1);
        let head = (self.count > 0 && is_partial(self.first)).then_some(self.first);
        let tail = (self.count > 1 && is_partial(last)).then_some(last);
        head.into_iter().chain(tail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn partial(offset: u32, len: u32) -> Vec<u32> {
        StripeRange::of(offset, len).partial().collect()
    }

    #[test]
    fn a_stripe_is_partial_when_any_of_its_bytes_is_not_written() {
        assert_eq!(partial(0, 512), []);
        assert_eq!(partial(512, 1024), []);
        assert_eq!(partial(512, 100), [1], "an aligned short write reads the rest of its stripe");
        assert_eq!(partial(700, 100), [1]);
        assert_eq!(partial(700, 324), [1], "ends on a stripe, begins inside it");
        assert_eq!(partial(700, 900), [1, 3]);
        assert_eq!(partial(512, 900), [2]);
        assert_eq!(partial(1, 1023), [0]);
        assert_eq!(partial(0, 0), []);
    }

    #[test]
    fn the_largest_range_of_the_wire_does_not_overflow() {
        let code = Code::new(2, 1).expect("2:1 is valid");
        let range = StripeRange::of(u32::MAX, u32::MAX);
        assert_eq!(range.first(), (1 << 23) - 1);
        assert_eq!(range.count(), (1 << 23) + 1);
        assert_eq!(range.strip_offset(code), ((1 << 23) - 1) * 256);
        assert_eq!(range.strip_len(code), ((1 << 23) + 1) * 256);
    }

    #[test]
    fn every_byte_of_a_small_object_falls_in_exactly_the_stripes_of_its_range() {
        for offset in 0..1600 {
            for len in [1, 2, 511, 512, 513, 1024, 1500] {
                let range = StripeRange::of(offset, len);
                assert_eq!(range.first(), offset / 512);
                assert_eq!(range.first() + range.count() - 1, (offset + len - 1) / 512);
                assert_eq!(range.object_offset() + range.skip() as u32, offset);
                let expected: Vec<u32> = (range.first()..range.first() + range.count())
                    .filter(|s| (s * 512..s * 512 + 512).any(|b| b < offset || b >= offset + len))
                    .collect();
                assert_eq!(partial(offset, len), expected);
            }
        }
    }
}
