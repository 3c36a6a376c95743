//! Arithmetic in GF(2^8), polynomial x^8+x^4+x^3+x^2+1 (0x11d), generator 2, addition is XOR (spec 02, 11.4).
//!
//! All tables are computed by the compiler. [`Multiplier`] holds what the kernels need to multiply many bytes by one
//! constant.

const POLYNOMIAL: u16 = 0x11d;

/// Powers of the generator, twice over, so that a sum of two logarithms needs no reduction.
pub(crate) static EXP: [u8; 510] = exp_table();
static LOG: [u8; 256] = LOG_TABLE;

const EXP_TABLE: [u8; 510] = exp_table();
const LOG_TABLE: [u8; 256] = log_table();

const fn exp_table() -> [u8; 510] {
    let mut table = [0u8; 510];
    let mut x = 1u16;
    let mut i = 0;
    while i < 255 {
        table[i] = x as u8;
        table[i + 255] = x as u8;
        x <<= 1;
        if x > 0xff {
            x ^= POLYNOMIAL;
        }
        i += 1;
    }
    table
}

const fn log_table() -> [u8; 256] {
    let mut table = [0u8; 256];
    let mut i = 0;
    while i < 255 {
        table[EXP_TABLE[i] as usize] = i as u8;
        i += 1;
    }
    table
}

/// Product of two field elements, for constant evaluation.
pub(crate) const fn const_mul(a: u8, b: u8) -> u8 {
    if a == 0 || b == 0 {
        return 0;
    }
    EXP_TABLE[LOG_TABLE[a as usize] as usize + LOG_TABLE[b as usize] as usize]
}

/// Quotient of two field elements, for constant evaluation; `b` must not be zero.
pub(crate) const fn const_div(a: u8, b: u8) -> u8 {
    assert!(b != 0);
    if a == 0 {
        return 0;
    }
    EXP_TABLE[LOG_TABLE[a as usize] as usize + 255 - LOG_TABLE[b as usize] as usize]
}

/// Product of two field elements.
pub(crate) fn mul(a: u8, b: u8) -> u8 {
    if a == 0 || b == 0 { 0 } else { EXP[LOG[a as usize] as usize + LOG[b as usize] as usize] }
}

/// Quotient of two field elements; `b` must not be zero.
pub(crate) fn div(a: u8, b: u8) -> u8 {
    debug_assert!(b != 0, "division by zero in GF(256)");
    if a == 0 { 0 } else { EXP[LOG[a as usize] as usize + 255 - LOG[b as usize] as usize] }
}

/// One constant, in the forms the kernels multiply with. One cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Multiplier {
    /// Products with 0x00..=0x0f.
    pub low: [u8; 16],
    /// Products with 0x00, 0x10, ... 0xf0.
    pub high: [u8; 16],
    /// The multiplication as an 8x8 bit matrix in the layout of GF2P8AFFINEQB: byte `7 - i` holds row `i`.
    pub affine: u64,
}

impl Multiplier {
    /// The forms of constant `c`.
    pub(crate) const fn new(c: u8) -> Self {
        let mut it = Self { low: [0; 16], high: [0; 16], affine: 0 };
        let mut x = 0;
        while x < 16 {
            it.low[x] = const_mul(c, x as u8);
            it.high[x] = const_mul(c, (x << 4) as u8);
            x += 1;
        }
        let mut column = 0;
        while column < 8 {
            let product = const_mul(c, 1 << column);
            let mut row = 0;
            while row < 8 {
                if product >> row & 1 == 1 {
                    it.affine |= 1 << ((7 - row) * 8 + column);
                }
                row += 1;
            }
            column += 1;
        }
        it
    }

    /// Product of the constant and `x`.
    #[inline(always)]
    pub(crate) fn mul(&self, x: u8) -> u8 {
        self.low[(x & 15) as usize] ^ self.high[(x >> 4) as usize]
    }
}

/// The multiplier of every constant, for coefficients known only at run time (decoding).
pub(crate) static MULTIPLIERS: [Multiplier; 256] = {
    let mut table = [Multiplier::new(0); 256];
    let mut c = 0;
    while c < 256 {
        table[c] = Multiplier::new(c as u8);
        c += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    /// Multiplication as the textbook does it, bit by bit.
    fn slow_mul(a: u8, b: u8) -> u8 {
        let (mut a, mut product) = (u16::from(a), 0u16);
        for bit in 0..8 {
            if b >> bit & 1 == 1 {
                product ^= a;
            }
            a <<= 1;
            if a > 0xff {
                a ^= POLYNOMIAL;
            }
        }
        product as u8
    }

    #[test]
    fn products_and_quotients_agree_with_long_multiplication() {
        for a in 0..=255u8 {
            for b in 0..=255u8 {
                let product = slow_mul(a, b);
                assert_eq!(mul(a, b), product);
                assert_eq!(const_mul(a, b), product);
                assert_eq!(MULTIPLIERS[a as usize].mul(b), product);
                if b != 0 {
                    assert_eq!(div(product, b), a);
                    assert_eq!(const_div(product, b), a);
                }
            }
        }
    }

    #[test]
    fn affine_matrices_multiply() {
        for c in 0..=255u8 {
            let matrix = MULTIPLIERS[c as usize].affine.to_be_bytes();
            for x in 0..=255u8 {
                let product = (0..8).fold(0u8, |y, i| y | (((matrix[i] & x).count_ones() as u8) & 1) << i);
                assert_eq!(product, slow_mul(c, x));
            }
        }
    }
}
