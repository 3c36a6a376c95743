//! The generator matrix (spec 02, 11.4): strip `r` is the value at the point `x_r` of the polynomial of degree < d
//! through the data bytes. Hence every coefficient, for parity and for decoding, is a Lagrange product; nothing is
//! inverted. A parity row depends on `d` and its index only, so one table of 15 rows serves all `p` of a `d`.

use crate::field::{Multiplier, const_div, const_mul, div, mul};
use crate::{MAX_PARITY, MAX_STRIPS};

/// Evaluation points of the strips: 0, then the powers of 2.
static POINTS: [u8; MAX_STRIPS] = POINT_TABLE;

const POINT_TABLE: [u8; MAX_STRIPS] = {
    let mut points = [0u8; MAX_STRIPS];
    let mut i = 1;
    let mut x = 1;
    while i < MAX_STRIPS {
        points[i] = x;
        x = const_mul(x, 2);
        i += 1;
    }
    points
};

static ROWS_2: [[Multiplier; 2]; MAX_PARITY] = parity_rows();
static ROWS_4: [[Multiplier; 4]; MAX_PARITY] = parity_rows();
static ROWS_8: [[Multiplier; 8]; MAX_PARITY] = parity_rows();
static ROWS_16: [[Multiplier; 16]; MAX_PARITY] = parity_rows();

/// The 15 parity rows for `data` strips, one after the other, `data` multipliers each; none if `data` is no valid
/// number of data strips.
pub(crate) fn rows(data: usize) -> Option<&'static [Multiplier]> {
    match data {
        2 => Some(ROWS_2.as_flattened()),
        4 => Some(ROWS_4.as_flattened()),
        8 => Some(ROWS_8.as_flattened()),
        16 => Some(ROWS_16.as_flattened()),
        _ => None,
    }
}

const fn parity_rows<const D: usize>() -> [[Multiplier; D]; MAX_PARITY] {
    let mut rows = [[Multiplier::new(0); D]; MAX_PARITY];
    let mut k = 0;
    while k < MAX_PARITY {
        let mut j = 0;
        while j < D {
            rows[k][j] = Multiplier::new(parity_coefficient(D, D + k, j));
            j += 1;
        }
        k += 1;
    }
    rows
}

const fn parity_coefficient(data: usize, r: usize, j: usize) -> u8 {
    let mut product = 1;
    let mut k = 0;
    while k < data {
        if k != j {
            let quotient = const_div(POINT_TABLE[r] ^ POINT_TABLE[k], POINT_TABLE[j] ^ POINT_TABLE[k]);
            product = const_mul(product, quotient);
        }
        k += 1;
    }
    product
}

/// The factor of strip `inputs[at]` in the sum over `inputs` that gives strip `wanted`. The inputs are distinct and
/// below 31; `wanted` may be one of them (the factor is then 0 or 1).
pub(crate) fn coefficient(wanted: usize, inputs: &[usize], at: usize) -> u8 {
    let own = POINTS[inputs[at]];
    inputs.iter().enumerate().filter(|&(i, _)| i != at).fold(1, |product, (_, &strip)| {
        mul(product, div(POINTS[wanted] ^ POINTS[strip], own ^ POINTS[strip]))
    })
}
