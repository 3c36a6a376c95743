//! A hash ring: points sorted by hash, each with its owner (spec 02, 5.4 and the first step of section 6).
//!
//! Hashes and owners are kept in separate arrays, and an index over the upper hash bits replaces most of the binary search,
//! so that a lookup touches two or three cache lines however large the ring is.

use sheepdog_proto::hash::next_hash;

use crate::Error;

/// Most points of a ring: a node with 4 PiB of disks, or 6144 nodes of 43690 vnodes.
pub(crate) const MAX_POINTS: u64 = 1 << 28;

/// Average number of points per index entry, as a power of two.
const POINTS_PER_BUCKET_SHIFT: u32 = 2;

/// The points of a ring with owners of type `T`.
#[derive(Debug, Clone)]
pub(crate) struct Points<T> {
    hashes: Box<[u64]>,
    owners: Box<[T]>,
    /// `starts[b]` = number of points whose upper bits are below `b`; one more entry than buckets.
    starts: Box<[u32]>,
    /// `hash >> shift` is the bucket.
    shift: u32,
    collisions: usize,
}

impl<T: Copy + Ord> Points<T> {
    /// Chains of points: for each `(owner, seed, count)` the hashes `N(seed)`, `N(N(seed))`, ... Of equal hashes the one of
    /// the lowest owner is kept.
    pub(crate) fn from_chains(chains: impl Iterator<Item = (T, u64, u64)> + Clone) -> Result<Self, Error> {
        let total = chains.clone().fold(0u64, |sum, (.., count)| sum.saturating_add(count));
        if total > MAX_POINTS {
            return Err(Error::TooManyPoints(total));
        }
        let mut points = Vec::with_capacity(total as usize);
        for (owner, seed, count) in chains {
            let mut hash = seed;
            for _ in 0..count {
                hash = next_hash(hash);
                points.push((hash, owner));
            }
        }
        Ok(Self::from_points(points))
    }

    fn from_points(mut points: Vec<(u64, T)>) -> Self {
        points.sort_unstable();
        let all = points.len();
        points.dedup_by_key(|&mut (hash, _)| hash);
        // A shift of 64 is not a shift; with one bit there are two buckets.
        let bits = points.len().max(1).ilog2().saturating_sub(POINTS_PER_BUCKET_SHIFT).max(1);
        let shift = 64 - bits;
        let mut starts = vec![0u32; (1 << bits) + 1];
        for &(hash, _) in &points {
            starts[(hash >> shift) as usize + 1] += 1;
        }
        for bucket in 1..starts.len() {
            starts[bucket] += starts[bucket - 1];
        }
        Self {
            hashes: points.iter().map(|&(hash, _)| hash).collect(),
            owners: points.iter().map(|&(_, owner)| owner).collect(),
            starts: starts.into(),
            shift,
            collisions: all - points.len(),
        }
    }

    /// Number of points.
    pub(crate) fn len(&self) -> usize {
        self.owners.len()
    }

    /// Number of points dropped because another had their hash.
    pub(crate) fn collisions(&self) -> usize {
        self.collisions
    }

    /// The owners from the first point at or after `hash` once around the ring.
    #[inline]
    pub(crate) fn walk(&self, hash: u64) -> impl Iterator<Item = T> + '_ {
        let (before, after) = self.owners.split_at(self.lower_bound(hash));
        after.iter().chain(before).copied()
    }

    /// The owner of the first point at or after `hash`; none on an empty ring.
    #[inline]
    pub(crate) fn first(&self, hash: u64) -> Option<T> {
        self.owners.get(self.lower_bound(hash)).or(self.owners.first()).copied()
    }

    /// Points in ascending order.
    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = (u64, T)> + '_ {
        self.hashes.iter().copied().zip(self.owners.iter().copied())
    }

    /// Number of points below `hash`.
    #[inline]
    fn lower_bound(&self, hash: u64) -> usize {
        let bucket = (hash >> self.shift) as usize;
        let (start, end) = (self.starts[bucket] as usize, self.starts[bucket + 1] as usize);
        start + self.hashes[start..end].partition_point(|&point| point < hash)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn of_equal_hashes_the_first_owner_keeps_the_point() {
        let points = Points::from_points(vec![(7, 2u8), (7, 1), (3, 5), (u64::MAX, 0), (7, 3)]);
        assert_eq!(points.iter().collect::<Vec<_>>(), [(3, 5), (7, 1), (u64::MAX, 0)]);
        assert_eq!(points.collisions(), 2);
    }

    #[test]
    fn an_equal_hash_is_a_hit_and_past_the_last_point_comes_the_first() {
        let points = Points::from_points(vec![(10, 1u8), (20, 2)]);
        let first: Vec<Option<u8>> = [0, 10, 11, 20, 21, u64::MAX].map(|h| points.first(h)).into();
        assert_eq!(first, [1, 1, 2, 2, 1, 1].map(Some));
        assert_eq!(points.walk(11).collect::<Vec<_>>(), [2, 1]);
        assert_eq!(points.walk(21).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(Points::<u8>::from_points(Vec::new()).first(5), None);
    }

    #[test]
    fn too_many_points_are_refused_before_memory_is_taken() {
        let huge = [(0u8, 1, u64::MAX), (1, 2, 5)];
        assert_eq!(
            Points::from_chains(huge.into_iter()).map(|p| p.len()),
            Err(Error::TooManyPoints(u64::MAX))
        );
    }

    proptest! {
        #[test]
        fn the_index_agrees_with_a_plain_search(
            hashes in prop::collection::vec(prop_oneof![any::<u64>(), 0u64..50, Just(u64::MAX)], 0..600),
            asked in prop::collection::vec(prop_oneof![any::<u64>(), 0u64..60, Just(u64::MAX)], 20),
        ) {
            let points = Points::from_points(hashes.iter().map(|&h| (h, 0u8)).collect());
            let mut sorted = hashes.clone();
            sorted.sort_unstable();
            sorted.dedup();
            prop_assert_eq!(points.iter().map(|(h, _)| h).collect::<Vec<_>>(), sorted.clone());
            for hash in asked.into_iter().chain(hashes) {
                prop_assert_eq!(points.lower_bound(hash), sorted.partition_point(|&h| h < hash));
            }
        }
    }
}
