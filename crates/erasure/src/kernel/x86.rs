//! The loops of [`super::vector`] for x86-64.
//!
//! SSSE3 and AVX2 look both nibbles of each byte up in 16-entry tables with a byte shuffle; GFNI multiplies by a bit
//! matrix in one instruction. The entry points in the tables are safe to call because [`super::available`] hands a table
//! out only after it has found the instruction set.

use super::Kernel;
use super::vector::{self, Vector};
use crate::field::Multiplier;
use std::arch::x86_64::*;

/// Entry points that enable the instruction set and run the generic loops.
macro_rules! kernel {
    ($table:ident, $name:literal, $module:ident, $vector:ty, $features:literal) => {
        pub(super) static $table: Kernel =
            Kernel { name: $name, dot: $module::dot, stripes: $module::stripes, update: $module::update };

        mod $module {
            use super::*;

            pub(super) fn dot(rows: &[Multiplier], inputs: &[&[u8]], outputs: &mut [&mut [u8]]) {
                #[target_feature(enable = $features)]
                fn run(rows: &[Multiplier], inputs: &[&[u8]], outputs: &mut [&mut [u8]]) {
                    // SAFETY: the instruction set is enabled for this function.
                    unsafe { vector::dot::<$vector>(rows, inputs, outputs) }
                }
                // SAFETY: the table is reachable only where the instruction set was found.
                unsafe { run(rows, inputs, outputs) }
            }

            pub(super) fn stripes(
                rows: &[Multiplier],
                object: &[u8],
                data: &mut [&mut [u8]],
                parity: &mut [&mut [u8]],
            ) {
                #[target_feature(enable = $features)]
                fn run(rows: &[Multiplier], object: &[u8], data: &mut [&mut [u8]], parity: &mut [&mut [u8]]) {
                    // SAFETY: the instruction set is enabled for this function.
                    unsafe { vector::stripes::<$vector>(rows, object, data, parity) }
                }
                // SAFETY: the table is reachable only where the instruction set was found.
                unsafe { run(rows, object, data, parity) }
            }

            pub(super) fn update(
                column: &[Multiplier],
                stride: usize,
                old: &[u8],
                new: &[u8],
                outputs: &mut [&mut [u8]],
            ) {
                #[target_feature(enable = $features)]
                fn run(
                    column: &[Multiplier],
                    stride: usize,
                    old: &[u8],
                    new: &[u8],
                    outputs: &mut [&mut [u8]],
                ) {
                    // SAFETY: the instruction set is enabled for this function.
                    unsafe { vector::update::<$vector>(column, stride, old, new, outputs) }
                }
                // SAFETY: the table is reachable only where the instruction set was found.
                unsafe { run(column, stride, old, new, outputs) }
            }
        }
    };
}

kernel!(GFNI, "gfni", gfni, Affine, "gfni,avx2");
kernel!(AVX2, "avx2", avx2, Wide, "avx2");
kernel!(SSSE3, "ssse3", ssse3, Narrow, "ssse3");

/// 32 bytes, multiplied by bit matrix.
#[derive(Clone, Copy)]
struct Affine(__m256i);

// SAFETY: every method uses AVX2 and GFNI only, and touches LEN bytes.
unsafe impl Vector for Affine {
    const LEN: usize = 32;
    type Operand = __m256i;
    type Factor = __m256i;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: AVX (caller).
        Self(unsafe { _mm256_setzero_si256() })
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: 32 readable bytes (caller).
        Self(unsafe { _mm256_loadu_si256(from.cast()) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        // SAFETY: 32 writable bytes (caller).
        unsafe { _mm256_storeu_si256(to.cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn xor(self, other: Self) -> Self {
        // SAFETY: AVX2 (caller).
        Self(unsafe { _mm256_xor_si256(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn operand(self) -> __m256i {
        self.0
    }

    #[inline(always)]
    unsafe fn factor(multiplier: &Multiplier) -> __m256i {
        // SAFETY: AVX (caller).
        unsafe { _mm256_set1_epi64x(multiplier.affine as i64) }
    }

    #[inline(always)]
    unsafe fn product(operand: __m256i, factor: __m256i) -> Self {
        // SAFETY: GFNI and AVX (caller).
        Self(unsafe { _mm256_gf2p8affine_epi64_epi8::<0>(operand, factor) })
    }
}

/// 32 bytes, multiplied by nibble tables.
#[derive(Clone, Copy)]
struct Wide(__m256i);

// SAFETY: every method uses AVX2 only, and touches LEN bytes.
unsafe impl Vector for Wide {
    const LEN: usize = 32;
    type Operand = [__m256i; 2];
    type Factor = [__m256i; 2];

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: AVX (caller).
        Self(unsafe { _mm256_setzero_si256() })
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: 32 readable bytes (caller).
        Self(unsafe { _mm256_loadu_si256(from.cast()) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        // SAFETY: 32 writable bytes (caller).
        unsafe { _mm256_storeu_si256(to.cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn xor(self, other: Self) -> Self {
        // SAFETY: AVX2 (caller).
        Self(unsafe { _mm256_xor_si256(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn operand(self) -> [__m256i; 2] {
        // SAFETY: AVX2 (caller).
        unsafe {
            let nibble = _mm256_set1_epi8(15);
            let high = _mm256_srli_epi64::<4>(self.0);
            [_mm256_and_si256(self.0, nibble), _mm256_and_si256(high, nibble)]
        }
    }

    #[inline(always)]
    unsafe fn factor(multiplier: &Multiplier) -> [__m256i; 2] {
        // SAFETY: AVX2 (caller); both tables have 16 bytes.
        unsafe {
            let low = _mm_load_si128(multiplier.low.as_ptr().cast());
            let high = _mm_load_si128(multiplier.high.as_ptr().cast());
            [_mm256_broadcastsi128_si256(low), _mm256_broadcastsi128_si256(high)]
        }
    }

    #[inline(always)]
    unsafe fn product(operand: [__m256i; 2], factor: [__m256i; 2]) -> Self {
        // SAFETY: AVX2 (caller).
        unsafe {
            let low = _mm256_shuffle_epi8(factor[0], operand[0]);
            let high = _mm256_shuffle_epi8(factor[1], operand[1]);
            Self(_mm256_xor_si256(low, high))
        }
    }
}

/// 16 bytes, multiplied by nibble tables.
#[derive(Clone, Copy)]
struct Narrow(__m128i);

// SAFETY: every method uses SSSE3 only, and touches LEN bytes.
unsafe impl Vector for Narrow {
    const LEN: usize = 16;
    type Operand = [__m128i; 2];
    type Factor = [__m128i; 2];

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: SSE2 is part of x86-64.
        Self(unsafe { _mm_setzero_si128() })
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: 16 readable bytes (caller).
        Self(unsafe { _mm_loadu_si128(from.cast()) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        // SAFETY: 16 writable bytes (caller).
        unsafe { _mm_storeu_si128(to.cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn xor(self, other: Self) -> Self {
        // SAFETY: SSE2 is part of x86-64.
        Self(unsafe { _mm_xor_si128(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn operand(self) -> [__m128i; 2] {
        // SAFETY: SSE2 is part of x86-64.
        unsafe {
            let nibble = _mm_set1_epi8(15);
            [_mm_and_si128(self.0, nibble), _mm_and_si128(_mm_srli_epi64::<4>(self.0), nibble)]
        }
    }

    #[inline(always)]
    unsafe fn factor(multiplier: &Multiplier) -> [__m128i; 2] {
        // SAFETY: the tables have 16 bytes each and begin a 64-byte aligned structure.
        unsafe {
            [_mm_load_si128(multiplier.low.as_ptr().cast()), _mm_load_si128(multiplier.high.as_ptr().cast())]
        }
    }

    #[inline(always)]
    unsafe fn product(operand: [__m128i; 2], factor: [__m128i; 2]) -> Self {
        // SAFETY: SSSE3 (caller).
        unsafe {
            let low = _mm_shuffle_epi8(factor[0], operand[0]);
            let high = _mm_shuffle_epi8(factor[1], operand[1]);
            Self(_mm_xor_si128(low, high))
        }
    }
}
