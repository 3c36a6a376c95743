//! The loops in plain Rust: two table lookups per byte and factor.

use super::Kernel;
use crate::STRIPE;
use crate::field::Multiplier;

pub(super) static KERNEL: Kernel = Kernel { name: "portable", dot, stripes, update };

/// Bytes worked on at a time, so that all strips of a step stay in the first-level cache.
const BLOCK: usize = 1024;

fn dot(rows: &[Multiplier], inputs: &[&[u8]], outputs: &mut [&mut [u8]]) {
    let len = inputs.first().map_or(0, |strip| strip.len());
    for at in (0..len).step_by(BLOCK) {
        let block = at..len.min(at + BLOCK);
        for (row, output) in rows.chunks_exact(inputs.len()).zip(outputs.iter_mut()) {
            let output = &mut output[block.clone()];
            output.fill(0);
            for (factor, input) in row.iter().zip(inputs) {
                add_product(factor, &input[block.clone()], output);
            }
        }
    }
}

fn stripes(rows: &[Multiplier], object: &[u8], data: &mut [&mut [u8]], parity: &mut [&mut [u8]]) {
    let size = STRIPE / data.len();
    for (stripe, bytes) in object.chunks_exact(STRIPE).enumerate() {
        let to = stripe * size..(stripe + 1) * size;
        for (input, strip) in bytes.chunks_exact(size).zip(data.iter_mut()) {
            strip[to.clone()].copy_from_slice(input);
        }
        for (row, output) in rows.chunks_exact(data.len()).zip(parity.iter_mut()) {
            let output = &mut output[to.clone()];
            output.fill(0);
            for (factor, input) in row.iter().zip(bytes.chunks_exact(size)) {
                add_product(factor, input, output);
            }
        }
    }
}

fn update(column: &[Multiplier], stride: usize, old: &[u8], new: &[u8], outputs: &mut [&mut [u8]]) {
    for (factor, output) in column.iter().step_by(stride).zip(outputs) {
        for ((out, old), new) in output.iter_mut().zip(old).zip(new) {
            *out ^= factor.mul(old ^ new);
        }
    }
}

fn add_product(factor: &Multiplier, input: &[u8], output: &mut [u8]) {
    for (out, byte) in output.iter_mut().zip(input) {
        *out ^= factor.mul(*byte);
    }
}
