//! The coder of one x:y policy (spec 02, 11.1 to 11.7).
//!
//! Arguments are checked completely before a byte is written; the kernels then run without further checks. Strips are
//! passed as lists of slices in index order: data 0..d, parity d..d+p.

use crate::field::{MULTIPLIERS, Multiplier};
use crate::kernel::kernel;
use crate::{Error, MAX_DATA, MAX_PARITY, STRIPE, matrix};

/// The coder of one policy: `d` data strips and `p` parity strips. A small value, free to copy.
#[derive(Clone, Copy)]
pub struct Code {
    data: u8,
    parity: u8,
    /// The `p` parity rows of `d` multipliers.
    rows: &'static [Multiplier],
}

impl Code {
    /// The coder for `data` data strips (2, 4, 8, 16) and `parity` parity strips (1 to 15).
    pub fn new(data: u8, parity: u8) -> Result<Self, Error> {
        let invalid = Error::InvalidCode { data, parity };
        if parity == 0 || usize::from(parity) > MAX_PARITY {
            return Err(invalid);
        }
        let rows = matrix::rows(data.into()).ok_or(invalid)?;
        Ok(Self { data, parity, rows: &rows[..usize::from(data) * usize::from(parity)] })
    }

    /// The coder for a policy byte: `d / 2` in the high nibble, `p` in the low one (spec 02, 11.1).
    pub fn from_policy(policy: u8) -> Result<Self, Error> {
        Self::new((policy >> 4) << 1, policy & 15).map_err(|_| Error::InvalidPolicy(policy))
    }

    /// The policy byte.
    pub fn policy(&self) -> u8 {
        ((self.data / 2) << 4) | self.parity
    }

    /// Number of data strips.
    pub fn data_strips(&self) -> usize {
        self.data.into()
    }

    /// Number of parity strips.
    pub fn parity_strips(&self) -> usize {
        self.parity.into()
    }

    /// Number of all strips: the copies of a coded volume.
    pub fn strips(&self) -> usize {
        self.data_strips() + self.parity_strips()
    }

    /// Bytes of one stripe in one strip: `512 / d`.
    pub fn strip_size(&self) -> usize {
        STRIPE / self.data_strips()
    }

    /// Bytes of a strip file of an object of `object_size` bytes.
    pub fn strip_file_len(&self, object_size: u64) -> u64 {
        object_size / u64::from(self.data)
    }

    /// Splits whole stripes of an object into the `d` data strips and computes the `p` parity strips, in one pass.
    ///
    /// `object` is a multiple of 512 bytes; each of the `d + p` entries of `strips` gets `object.len() / d` bytes. A shorter
    /// list, of at least `d`, leaves the last parity strips out: a cluster of fewer than `d + p` zones has no node for them.
    pub fn encode_stripes(&self, object: &[u8], strips: &mut [&mut [u8]]) -> Result<(), Error> {
        let len = self.stripes_len(object.len())?;
        if strips.len() < self.data_strips() || strips.len() > self.strips() {
            return Err(Error::StripCount { want: self.strips(), got: strips.len() });
        }
        check_lengths(strips, len)?;
        let (data, parity) = strips.split_at_mut(self.data_strips());
        (kernel().stripes)(self.rows, object, data, parity);
        Ok(())
    }

    /// Puts whole stripes of an object together from its `d` data strips of `object.len() / d` bytes.
    pub fn join(&self, strips: &[&[u8]], object: &mut [u8]) -> Result<(), Error> {
        let len = self.stripes_len(object.len())?;
        check_count(strips.len(), self.data_strips())?;
        check_lengths(strips, len)?;
        match self.data {
            2 => interleave::<256>(strips, object),
            4 => interleave::<128>(strips, object),
            8 => interleave::<64>(strips, object),
            _ => interleave::<32>(strips, object),
        }
        Ok(())
    }

    /// Computes the `p` parity strips from `d` data strips; all of one length, which may be any.
    pub fn encode(&self, data: &[&[u8]], parity: &mut [&mut [u8]]) -> Result<(), Error> {
        check_count(data.len(), self.data_strips())?;
        check_count(parity.len(), self.parity_strips())?;
        let len = data[0].len();
        check_lengths(data, len)?;
        check_lengths(parity, len)?;
        (kernel().dot)(self.rows, data, parity);
        Ok(())
    }

    /// Updates the `p` parity strips in place for a change of data strip `index` from `old` to `new`; all of one length.
    /// The other data strips are not needed.
    pub fn update_parity(
        &self,
        index: usize,
        old: &[u8],
        new: &[u8],
        parity: &mut [&mut [u8]],
    ) -> Result<(), Error> {
        if index >= self.data_strips() {
            return Err(Error::StripIndex { index, limit: self.data_strips() });
        }
        check_count(parity.len(), self.parity_strips())?;
        check_lengths(&[new], old.len())?;
        check_lengths(parity, old.len())?;
        (kernel().update)(&self.rows[index..], self.data_strips(), old, new, parity);
        Ok(())
    }

    /// The factors with which the strips `inputs` (exactly `d` distinct indexes, any order) sum up to strip `lost`. Only
    /// the first `d` entries of the array are used.
    pub fn coefficients(&self, lost: usize, inputs: &[usize]) -> Result<[u8; MAX_DATA], Error> {
        self.check_indexes(&[lost], inputs)?;
        let mut factors = [0; MAX_DATA];
        for (at, factor) in factors.iter_mut().enumerate().take(inputs.len()) {
            *factor = matrix::coefficient(lost, inputs, at);
        }
        Ok(factors)
    }

    /// Rebuilds strip `lost` from exactly `d` others, given with their indexes in any order; all of one length.
    pub fn decode(&self, lost: usize, inputs: &[(usize, &[u8])], out: &mut [u8]) -> Result<(), Error> {
        self.decode_many(&[lost], inputs, &mut [out])
    }

    /// Rebuilds several strips from the same `d` inputs in one pass: `outputs[i]` becomes strip `lost[i]`.
    pub fn decode_many(
        &self,
        lost: &[usize],
        inputs: &[(usize, &[u8])],
        outputs: &mut [&mut [u8]],
    ) -> Result<(), Error> {
        check_count(inputs.len(), self.data_strips())?;
        check_count(outputs.len(), lost.len())?;
        let (mut indexes, mut slices) = ([0; MAX_DATA], [&[][..]; MAX_DATA]);
        for (at, &(index, slice)) in inputs.iter().enumerate() {
            (indexes[at], slices[at]) = (index, slice);
        }
        let (indexes, slices) = (&indexes[..inputs.len()], &slices[..inputs.len()]);
        self.check_indexes(lost, indexes)?;
        check_lengths(slices, slices[0].len())?;
        check_lengths(outputs, slices[0].len())?;
        let rows: Vec<Multiplier> = lost
            .iter()
            .flat_map(|&strip| (0..indexes.len()).map(move |at| matrix::coefficient(strip, indexes, at)))
            .map(|factor| MULTIPLIERS[usize::from(factor)])
            .collect();
        (kernel().dot)(&rows, slices, outputs);
        Ok(())
    }

    /// Exactly `d` distinct inputs, distinct lost strips that are no inputs, all below `d + p`.
    fn check_indexes(&self, lost: &[usize], inputs: &[usize]) -> Result<(), Error> {
        check_count(inputs.len(), self.data_strips())?;
        let mut seen = 0u32;
        for &index in inputs.iter().chain(lost) {
            if index >= self.strips() {
                return Err(Error::StripIndex { index, limit: self.strips() });
            }
            if seen >> index & 1 == 1 {
                return Err(Error::RepeatedStrip(index));
            }
            seen |= 1 << index;
        }
        Ok(())
    }

    /// Bytes per strip of `object_len` bytes of whole stripes.
    fn stripes_len(&self, object_len: usize) -> Result<usize, Error> {
        if !object_len.is_multiple_of(STRIPE) {
            return Err(Error::PartialStripe(object_len));
        }
        Ok(object_len / self.data_strips())
    }
}

impl std::fmt::Debug for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Code({self})")
    }
}

/// As in listings: `4:2`.
impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.data, self.parity)
    }
}

impl PartialEq for Code {
    fn eq(&self, other: &Self) -> bool {
        self.policy() == other.policy()
    }
}

impl Eq for Code {}

fn check_count(got: usize, want: usize) -> Result<(), Error> {
    if got == want { Ok(()) } else { Err(Error::StripCount { want, got }) }
}

fn check_lengths<S: AsRef<[u8]>>(strips: &[S], want: usize) -> Result<(), Error> {
    for (index, strip) in strips.iter().enumerate() {
        let got = strip.as_ref().len();
        if got != want {
            return Err(Error::StripLength { index, want, got });
        }
    }
    Ok(())
}

/// Copies strips of `S` bytes alternately from `strips` into `object`.
fn interleave<const S: usize>(strips: &[&[u8]], object: &mut [u8]) {
    for (stripe, bytes) in object.chunks_exact_mut(STRIPE).enumerate() {
        let from = stripe * S..(stripe + 1) * S;
        for (target, strip) in bytes.chunks_exact_mut(S).zip(strips) {
            target.copy_from_slice(&strip[from.clone()]);
        }
    }
}

#[cfg(test)]
mod tests;
