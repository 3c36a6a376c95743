//! The loops over vectors, generic over the instruction set.
//!
//! All functions are inlined into an entry point of [`super::x86`] that enables the instruction set. Number of inputs `D`,
//! outputs per pass `G` (at most [`GROUP`]) and vectors per step `U` are constants, so the compiler unrolls the sums and
//! keeps the accumulators in registers.

use crate::STRIPE;
use crate::field::Multiplier;

/// Parity strips computed in one pass over the data; more would not fit the 16 vector registers.
const GROUP: usize = 4;

/// Stripes per pass: the later groups find the 8 KiB of the object in the first-level cache.
const STRIPES_PER_PASS: usize = 16;

/// Most data strips stored while the first parity group is computed. With more, strips in page-aligned buffers compete for
/// the same 8 ways of the first-level cache (measured at 8:4: 13 GB/s against 22), and a pass of its own is faster.
const FUSED_STRIPS: usize = 4;

/// A vector register and how to multiply its bytes in GF(256).
///
/// # Safety
/// All methods need the instruction set of the implementation. `load` and `store` need `LEN` accessible bytes, of any
/// alignment.
pub(super) unsafe trait Vector: Copy {
    /// Bytes in the register; divides 32, the smallest strip.
    const LEN: usize;
    /// A vector prepared for products with several factors.
    type Operand: Copy;
    /// A factor in registers.
    type Factor: Copy;

    unsafe fn zero() -> Self;
    unsafe fn load(from: *const u8) -> Self;
    unsafe fn store(self, to: *mut u8);
    unsafe fn xor(self, other: Self) -> Self;
    unsafe fn operand(self) -> Self::Operand;
    unsafe fn factor(multiplier: &Multiplier) -> Self::Factor;
    unsafe fn product(operand: Self::Operand, factor: Self::Factor) -> Self;
}

/// [`super::Dot`].
///
/// # Safety
/// The instruction set of `V` is available.
#[inline(always)]
pub(super) unsafe fn dot<V: Vector>(rows: &[Multiplier], inputs: &[&[u8]], outputs: &mut [&mut [u8]]) {
    // SAFETY: passed on.
    unsafe {
        match inputs.len() {
            2 => dot_all::<V, 2>(rows, inputs, outputs),
            4 => dot_all::<V, 4>(rows, inputs, outputs),
            8 => dot_all::<V, 8>(rows, inputs, outputs),
            16 => dot_all::<V, 16>(rows, inputs, outputs),
            other => unreachable!("{other} data strips"),
        }
    }
}

#[inline(always)]
unsafe fn dot_all<V: Vector, const D: usize>(
    rows: &[Multiplier],
    inputs: &[&[u8]],
    outputs: &mut [&mut [u8]],
) {
    let len = inputs[0].len();
    assert!(inputs.len() == D && inputs.iter().all(|s| s.len() == len), "inputs of one length");
    assert!(outputs.iter().all(|s| s.len() == len), "outputs as long as the inputs");
    assert!(rows.len() >= D * outputs.len(), "a row of factors for each output");
    let inputs: [*const u8; D] = std::array::from_fn(|j| inputs[j].as_ptr());
    for (rows, group) in rows.chunks(D * GROUP).zip(outputs.chunks_mut(GROUP)) {
        // SAFETY: every pointer has `len` bytes, `rows` at least D factors for each of the G outputs (asserted above).
        unsafe {
            match group.len() {
                1 => dot_group::<V, D, 1>(rows, &inputs, pointers(group), len),
                2 => dot_group::<V, D, 2>(rows, &inputs, pointers(group), len),
                3 => dot_group::<V, D, 3>(rows, &inputs, pointers(group), len),
                _ => dot_group::<V, D, 4>(rows, &inputs, pointers(group), len),
            }
        }
    }
}

#[inline(always)]
fn pointers<const N: usize>(strips: &mut [&mut [u8]]) -> [*mut u8; N] {
    std::array::from_fn(|i| strips[i].as_mut_ptr())
}

#[inline(always)]
unsafe fn dot_group<V: Vector, const D: usize, const G: usize>(
    rows: &[Multiplier],
    inputs: &[*const u8; D],
    outputs: [*mut u8; G],
    len: usize,
) {
    debug_assert!(rows.len() >= D * G);
    let mut at = 0;
    // SAFETY: all accesses are below `at + step <= len`; the caller vouches for `len` bytes at each pointer.
    unsafe {
        while at + 2 * V::LEN <= len {
            let sums = sums::<V, D, G, 2>(rows.as_ptr(), |j| inputs[j].add(at), |_, _, _| ());
            store_all(&sums, |k| outputs[k].add(at));
            at += 2 * V::LEN;
        }
        if at + V::LEN <= len {
            let sums = sums::<V, D, G, 1>(rows.as_ptr(), |j| inputs[j].add(at), |_, _, _| ());
            store_all(&sums, |k| outputs[k].add(at));
            at += V::LEN;
        }
        for at in at..len {
            for (k, output) in outputs.iter().enumerate() {
                let row = rows[k * D..].iter().zip(inputs);
                *output.add(at) = row.fold(0, |sum, (factor, input)| sum ^ factor.mul(*input.add(at)));
            }
        }
    }
}

/// The sums over `D` inputs for `G` outputs and `U` adjacent vectors. `visit(j, u, v)` sees every vector loaded.
///
/// # Safety
/// `rows` has `D * G` entries, `input(j)` has `U * V::LEN` readable bytes.
#[inline(always)]
unsafe fn sums<V: Vector, const D: usize, const G: usize, const U: usize>(
    rows: *const Multiplier,
    input: impl Fn(usize) -> *const u8,
    visit: impl Fn(usize, usize, V),
) -> [[V; U]; G] {
    // SAFETY: indexes are below those the caller vouches for.
    unsafe {
        let mut sums = [[V::zero(); U]; G];
        for j in 0..D {
            let from = input(j);
            let operands: [V::Operand; U] = std::array::from_fn(|u| {
                let vector = V::load(from.add(u * V::LEN));
                visit(j, u, vector);
                vector.operand()
            });
            for (k, sum) in sums.iter_mut().enumerate() {
                let factor = V::factor(&*rows.add(k * D + j));
                for (sum, operand) in sum.iter_mut().zip(operands) {
                    *sum = sum.xor(V::product(operand, factor));
                }
            }
        }
        sums
    }
}

/// # Safety
/// `output(k)` has `U * V::LEN` writable bytes.
#[inline(always)]
unsafe fn store_all<V: Vector, const G: usize, const U: usize>(
    sums: &[[V; U]; G],
    output: impl Fn(usize) -> *mut u8,
) {
    for (k, sum) in sums.iter().enumerate() {
        for (u, vector) in sum.iter().enumerate() {
            // SAFETY: the caller vouches for the bytes.
            unsafe { vector.store(output(k).add(u * V::LEN)) };
        }
    }
}

/// [`super::Stripes`].
///
/// # Safety
/// The instruction set of `V` is available.
#[inline(always)]
pub(super) unsafe fn stripes<V: Vector>(
    rows: &[Multiplier],
    object: &[u8],
    data: &mut [&mut [u8]],
    parity: &mut [&mut [u8]],
) {
    // SAFETY: passed on. U * V::LEN is 32 or 64 and divides the strip.
    unsafe {
        match data.len() {
            2 => stripes_all::<V, 2, 2>(rows, object, data, parity),
            4 => stripes_all::<V, 4, 2>(rows, object, data, parity),
            8 => stripes_all::<V, 8, 2>(rows, object, data, parity),
            16 => stripes_all::<V, 16, 1>(rows, object, data, parity),
            other => unreachable!("{other} data strips"),
        }
    }
}

#[inline(always)]
unsafe fn stripes_all<V: Vector, const D: usize, const U: usize>(
    rows: &[Multiplier],
    object: &[u8],
    data: &mut [&mut [u8]],
    parity: &mut [&mut [u8]],
) {
    const { assert!((STRIPE / D).is_multiple_of(U * V::LEN), "a strip is a whole number of steps") };
    let len = object.len() / D;
    assert!(object.len().is_multiple_of(STRIPE), "whole stripes");
    assert!(data.len() == D && data.iter().all(|s| s.len() == len), "data strips of one length");
    assert!(parity.iter().all(|s| s.len() == len), "parity strips as long as the data strips");
    assert!(rows.len() >= D * parity.len(), "a row of factors for each parity strip");
    let all = object.len() / STRIPE;
    let data: [*mut u8; D] = pointers(data);
    let mut first = 0;
    while first < all {
        let end = all.min(first + STRIPES_PER_PASS);
        let span = Span { object: object.as_ptr(), data: &data, first, end };
        // SAFETY: stripes first..end lie within `object` and, times STRIPE / D, within every strip; rows as asserted.
        unsafe {
            let fused = D <= FUSED_STRIPS && !parity.is_empty();
            if !fused {
                copy_strips::<V, D, U>(&span);
            }
            for (i, group) in parity.chunks_mut(GROUP).enumerate() {
                let rows = &rows[i * GROUP * D..];
                match (fused && i == 0, group.len()) {
                    (true, 1) => stripes_group::<V, D, 1, U, true>(&span, rows, pointers(group)),
                    (true, 2) => stripes_group::<V, D, 2, U, true>(&span, rows, pointers(group)),
                    (true, 3) => stripes_group::<V, D, 3, U, true>(&span, rows, pointers(group)),
                    (true, _) => stripes_group::<V, D, 4, U, true>(&span, rows, pointers(group)),
                    (false, 1) => stripes_group::<V, D, 1, U, false>(&span, rows, pointers(group)),
                    (false, 2) => stripes_group::<V, D, 2, U, false>(&span, rows, pointers(group)),
                    (false, 3) => stripes_group::<V, D, 3, U, false>(&span, rows, pointers(group)),
                    (false, _) => stripes_group::<V, D, 4, U, false>(&span, rows, pointers(group)),
                }
            }
        }
        first = end;
    }
}

/// Stripes `first..end` of an object and the beginnings of its data strips.
struct Span<'a, const D: usize> {
    object: *const u8,
    data: &'a [*mut u8; D],
    first: usize,
    end: usize,
}

/// De-interleaves the span into the data strips, one strip after the other.
///
/// # Safety
/// The span lies within the object and the strips.
#[inline(always)]
unsafe fn copy_strips<V: Vector, const D: usize, const U: usize>(span: &Span<'_, D>) {
    let size = STRIPE / D;
    for (j, strip) in span.data.iter().enumerate() {
        for stripe in span.first..span.end {
            for within in (0..size).step_by(U * V::LEN) {
                // SAFETY: `within + U * LEN` is at most `size`; the rest as the caller vouches.
                unsafe {
                    let from = span.object.add(stripe * STRIPE + j * size + within);
                    let vectors: [V; U] = std::array::from_fn(|u| V::load(from.add(u * V::LEN)));
                    let to = strip.add(stripe * size + within);
                    for (u, vector) in vectors.into_iter().enumerate() {
                        vector.store(to.add(u * V::LEN));
                    }
                }
            }
        }
    }
}

/// Computes `G` parity strips over the span and, if `COPY`, stores the data strips on the way.
///
/// # Safety
/// The span lies within the object and the strips; `rows` has `D * G` entries.
#[inline(always)]
unsafe fn stripes_group<V: Vector, const D: usize, const G: usize, const U: usize, const COPY: bool>(
    span: &Span<'_, D>,
    rows: &[Multiplier],
    parity: [*mut u8; G],
) {
    debug_assert!(rows.len() >= D * G);
    let size = STRIPE / D;
    for stripe in span.first..span.end {
        for within in (0..size).step_by(U * V::LEN) {
            let at = stripe * size + within;
            // SAFETY: `at + U * LEN` is within the strip, the input within the stripe (caller).
            unsafe {
                let sums: [[V; U]; G] = sums::<V, D, G, U>(
                    rows.as_ptr(),
                    |j| span.object.add(stripe * STRIPE + j * size + within),
                    |j, u, vector: V| {
                        if COPY {
                            vector.store(span.data[j].add(at + u * V::LEN));
                        }
                    },
                );
                store_all(&sums, |k| parity[k].add(at));
            }
        }
    }
}

/// [`super::Update`].
///
/// # Safety
/// The instruction set of `V` is available.
#[inline(always)]
pub(super) unsafe fn update<V: Vector>(
    column: &[Multiplier],
    stride: usize,
    old: &[u8],
    new: &[u8],
    outputs: &mut [&mut [u8]],
) {
    assert!(new.len() == old.len(), "old and new of one length");
    assert!(outputs.iter().all(|s| s.len() == old.len()), "outputs as long as the change");
    for (i, group) in outputs.chunks_mut(GROUP).enumerate() {
        let factor = |k: usize| &column[(i * GROUP + k) * stride];
        // SAFETY: all strips have the length of `old` (asserted above).
        unsafe {
            match group.len() {
                1 => update_group::<V, 1>(factor, old, new, pointers(group)),
                2 => update_group::<V, 2>(factor, old, new, pointers(group)),
                3 => update_group::<V, 3>(factor, old, new, pointers(group)),
                _ => update_group::<V, 4>(factor, old, new, pointers(group)),
            }
        }
    }
}

#[inline(always)]
unsafe fn update_group<'a, V: Vector, const G: usize>(
    factor: impl Fn(usize) -> &'a Multiplier,
    old: &[u8],
    new: &[u8],
    outputs: [*mut u8; G],
) {
    let multipliers: [&Multiplier; G] = std::array::from_fn(factor);
    let (old, new, len) = (old.as_ptr(), new.as_ptr(), old.len());
    let mut at = 0;
    // SAFETY: all accesses are below `at + step <= len`, the length of every strip (caller).
    unsafe {
        let factors: [V::Factor; G] = std::array::from_fn(|k| V::factor(multipliers[k]));
        while at + V::LEN <= len {
            let change = V::load(old.add(at)).xor(V::load(new.add(at))).operand();
            for (output, factor) in outputs.iter().zip(factors) {
                let to = output.add(at);
                V::load(to).xor(V::product(change, factor)).store(to);
            }
            at += V::LEN;
        }
        for at in at..len {
            for (output, factor) in outputs.iter().zip(multipliers) {
                *output.add(at) ^= factor.mul(*old.add(at) ^ *new.add(at));
            }
        }
    }
}
