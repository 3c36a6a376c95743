//! Page-aligned payload buffers, shared by sockets and disks.
//!
//! A payload is received once, into the buffer that `O_DIRECT` writes to disk and that vectored writes send to peers;
//! nothing copies it in between. Buffers come in two pooled classes, 64 KiB and 4 MiB, because fresh megabytes cost
//! more in page faults than in copying. Memory is always initialised; what a pooled buffer holds is arbitrary until
//! overwritten, hence [`PageBuf::dirty`] and [`PageBuf::zeroed`] are different calls.

mod page;

pub use page::{PAGE, PageBuf};

use bytes::Bytes;

/// `len` zeros; up to 64 KiB without allocation.
pub fn zeros(len: usize) -> Bytes {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    if len <= ZEROS.len() { Bytes::from_static(&ZEROS[..len]) } else { PageBuf::zeroed(len).freeze() }
}

/// Whether every byte is zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Chunks of 16 let the compiler use vector compares.
    let chunks = bytes.chunks_exact(16);
    let tail = chunks.remainder();
    let mut acc = 0u128;
    for chunk in chunks {
        let mut raw = [0; 16];
        raw.copy_from_slice(chunk);
        acc |= u128::from_ne_bytes(raw);
        if acc != 0 {
            return false;
        }
    }
    tail.iter().all(|b| *b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_detection_sees_every_byte() {
        let mut data = vec![0u8; 100];
        assert!(is_zero(&data));
        for i in 0..100 {
            data[i] = 1;
            assert!(!is_zero(&data), "byte {i}");
            data[i] = 0;
        }
    }

    #[test]
    fn zeros_are_zero_and_of_the_length_asked_for() {
        for len in [0, 1, 65_536, 65_537, 5 << 20] {
            let z = zeros(len);
            assert!(z.len() == len && is_zero(&z));
        }
    }
}
