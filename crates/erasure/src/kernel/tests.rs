//! Every kernel of this processor against the portable one, over lengths, offsets and shapes.

use super::*;
use crate::{MAX_PARITY, STRIPE, matrix};
use proptest::prelude::*;

/// `count` strips of `len` bytes that begin at odd addresses, filled with bytes from `seed`.
fn strips(count: usize, len: usize, seed: u64) -> Vec<Vec<u8>> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..count).map(|_| (0..len).map(|_| next()).collect()).collect()
}

fn slices(strips: &[Vec<u8>]) -> Vec<&[u8]> {
    strips.iter().map(Vec::as_slice).collect()
}

fn slices_mut(strips: &mut [Vec<u8>]) -> Vec<&mut [u8]> {
    strips.iter_mut().map(Vec::as_mut_slice).collect()
}

fn data_strips() -> impl Strategy<Value = usize> {
    prop::sample::select(vec![2usize, 4, 8, 16])
}

proptest! {
    #[test]
    fn dot_products_agree(
        d in data_strips(), outputs in 1..=MAX_PARITY, len in 0usize..300, shift in 0usize..33, seed: u64,
    ) {
        let rows = matrix::rows(d).expect("valid number of data strips");
        let inputs = strips(d, len + shift, seed);
        let inputs: Vec<&[u8]> = inputs.iter().map(|s| &s[shift..]).collect();
        let mut expected = strips(outputs, len, seed ^ 1);
        (portable::KERNEL.dot)(rows, &inputs, &mut slices_mut(&mut expected));
        for kernel in available() {
            let mut got = strips(outputs, len, seed ^ 2);
            (kernel.dot)(rows, &inputs, &mut slices_mut(&mut got));
            prop_assert_eq!(&got, &expected, "{}", kernel.name);
        }
    }

    #[test]
    fn fused_stripes_agree(d in data_strips(), parity in 0..=MAX_PARITY, count in 0usize..40, seed: u64) {
        let rows = matrix::rows(d).expect("valid number of data strips");
        let object = strips(1, count * STRIPE + 1, seed).remove(0);
        let object = &object[1..];
        let len = object.len() / d;
        let mut expected = [strips(d, len, seed), strips(parity, len, seed)];
        let [data, sums] = &mut expected;
        (portable::KERNEL.stripes)(rows, object, &mut slices_mut(data), &mut slices_mut(sums));
        let mut separate = strips(parity, len, seed);
        (portable::KERNEL.dot)(rows, &slices(data), &mut slices_mut(&mut separate));
        prop_assert_eq!(&separate, &*sums);
        for kernel in available() {
            let mut got = [strips(d, len, !seed), strips(parity, len, !seed)];
            let [data, sums] = &mut got;
            (kernel.stripes)(rows, object, &mut slices_mut(data), &mut slices_mut(sums));
            prop_assert_eq!(&got, &expected, "{}", kernel.name);
        }
    }

    #[test]
    fn updates_agree(
        d in data_strips(), outputs in 1..=MAX_PARITY, column in 0usize..16, len in 0usize..300, seed: u64,
    ) {
        let rows = &matrix::rows(d).expect("valid number of data strips")[column % d..];
        let change = strips(2, len, seed);
        let mut expected = strips(outputs, len, seed ^ 2);
        (portable::KERNEL.update)(rows, d, &change[0], &change[1], &mut slices_mut(&mut expected));
        for kernel in available() {
            let mut got = strips(outputs, len, seed ^ 2);
            (kernel.update)(rows, d, &change[0], &change[1], &mut slices_mut(&mut got));
            prop_assert_eq!(&got, &expected, "{}", kernel.name);
        }
    }
}

#[test]
fn the_fastest_kernel_is_chosen() {
    assert_eq!(kernel_name(), available()[0].name);
    assert_eq!(available().last().expect("the portable kernel is always there").name, "portable");
}
