//! The inner loops: multiply strips by constants and add them up.
//!
//! [`vector`] has the loops once, generic over a vector of an instruction set; [`x86`] instantiates them for SSSE3, AVX2 and
//! GFNI; [`portable`] is the fallback and the reference the others are tested against. [`kernel`] chooses once, at first
//! use. This directory holds all `unsafe` of the crate; each entry point checks the lengths it relies on.

mod portable;
#[cfg(target_arch = "x86_64")]
mod vector;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
mod tests;

use crate::field::Multiplier;
use std::sync::LazyLock;

/// `outputs[k] = sum of rows[k * d + j] * inputs[j]`, with d = `inputs.len()` in 2, 4, 8, 16; equal lengths.
type Dot = fn(rows: &[Multiplier], inputs: &[&[u8]], outputs: &mut [&mut [u8]]);

/// De-interleaves `object` (whole stripes) into `data` and computes `parity` as [`Dot`] does; each strip has
/// `object.len() / d` bytes.
type Stripes = fn(rows: &[Multiplier], object: &[u8], data: &mut [&mut [u8]], parity: &mut [&mut [u8]]);

/// `outputs[k] ^= column[k * stride] * (old ^ new)`; equal lengths.
type Update = fn(column: &[Multiplier], stride: usize, old: &[u8], new: &[u8], outputs: &mut [&mut [u8]]);

/// One implementation of the three loops.
pub(crate) struct Kernel {
    name: &'static str,
    pub dot: Dot,
    pub stripes: Stripes,
    pub update: Update,
}

static KERNEL: LazyLock<&'static Kernel> =
    LazyLock::new(|| available().into_iter().next().unwrap_or(&portable::KERNEL));

/// The kernel in use.
pub(crate) fn kernel() -> &'static Kernel {
    *KERNEL
}

/// Name of the kernel in use: `gfni`, `avx2`, `ssse3` or `portable`.
pub fn kernel_name() -> &'static str {
    kernel().name
}

/// The kernels this processor can run, fastest first.
fn available() -> Vec<&'static Kernel> {
    let mut kernels = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("gfni") && is_x86_feature_detected!("avx2") {
            kernels.push(&x86::GFNI);
        }
        if is_x86_feature_detected!("avx2") {
            kernels.push(&x86::AVX2);
        }
        if is_x86_feature_detected!("ssse3") {
            kernels.push(&x86::SSSE3);
        }
    }
    kernels.push(&portable::KERNEL);
    kernels
}
