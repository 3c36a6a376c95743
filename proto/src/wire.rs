//! The [`Wire`] trait and the [`wire!`] macro: fixed layouts declared by offset, as the specification's tables do.

use thiserror::Error;

/// Why bytes could not be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// Fewer bytes than the structure has.
    #[error("truncated {what}: {got} bytes of {need}")]
    Truncated {
        /// The structure.
        what: &'static str,
        /// Bytes needed.
        need: usize,
        /// Bytes given.
        got: usize,
    },
    /// A field holds a value that no writer produces.
    #[error("invalid {what}: {value}")]
    Invalid {
        /// The field.
        what: &'static str,
        /// The value found.
        value: u64,
    },
}

/// A value with a fixed number of bytes on the wire or on disk.
pub trait Wire: Sized {
    /// Encoded size in bytes.
    const SIZE: usize;
    /// Name used in errors.
    const NAME: &'static str;

    /// Decodes from the first [`Wire::SIZE`] bytes. Callers guarantee the length; [`Wire::decode`] checks it.
    fn get(bytes: &[u8]) -> Self;

    /// Encodes into the first [`Wire::SIZE`] bytes of `out`, which must be zeroed where the layout has padding.
    fn put(&self, out: &mut [u8]);

    /// Decodes from a prefix of `bytes`.
    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        if bytes.len() < Self::SIZE {
            return Err(DecodeError::Truncated { what: Self::NAME, need: Self::SIZE, got: bytes.len() });
        }
        Ok(Self::get(bytes))
    }

    /// Encodes into a new vector of exactly [`Wire::SIZE`] bytes.
    fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; Self::SIZE];
        self.put(&mut out);
        out
    }
}

macro_rules! int_wire {
    ($($t:ty),*) => {$(
        impl Wire for $t {
            const SIZE: usize = size_of::<$t>();
            const NAME: &'static str = stringify!($t);
            fn get(bytes: &[u8]) -> Self {
                let mut raw = [0; size_of::<$t>()];
                raw.copy_from_slice(&bytes[..size_of::<$t>()]);
                <$t>::from_le_bytes(raw)
            }
            fn put(&self, out: &mut [u8]) {
                out[..size_of::<$t>()].copy_from_slice(&self.to_le_bytes());
            }
        }
    )*};
}
int_wire!(u8, u16, u32, u64, i16, i32, i64);

impl<T: Wire, const N: usize> Wire for [T; N] {
    const SIZE: usize = T::SIZE * N;
    const NAME: &'static str = "array";
    fn get(bytes: &[u8]) -> Self {
        std::array::from_fn(|i| T::get(&bytes[i * T::SIZE..]))
    }
    fn put(&self, out: &mut [u8]) {
        for (i, item) in self.iter().enumerate() {
            item.put(&mut out[i * T::SIZE..]);
        }
    }
}

/// Declares a structure by its layout: size in bytes, then `offset => field: type` rows. The macro checks at compile
/// time that fields neither overlap nor pass the end; bytes that no row names are padding: zero when written,
/// ignored when read.
#[macro_export]
macro_rules! wire {
    ($(#[$meta:meta])* $name:ident [$size:literal] {
        $($(#[$fmeta:meta])* $off:literal => $field:ident : $ty:ty),* $(,)?
    }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub struct $name {
            $($(#[$fmeta])* pub $field: $ty),*
        }

        const _: () = {
            let mut end = 0;
            $(
                assert!($off >= end, "fields overlap or are out of order");
                end = $off + <$ty as $crate::Wire>::SIZE;
            )*
            assert!(end <= $size, "fields pass the end");
        };

        impl $crate::Wire for $name {
            const SIZE: usize = $size;
            const NAME: &'static str = stringify!($name);
            fn get(bytes: &[u8]) -> Self {
                Self { $($field: <$ty as $crate::Wire>::get(&bytes[$off..])),* }
            }
            fn put(&self, out: &mut [u8]) {
                $($crate::Wire::put(&self.$field, &mut out[$off..]);)*
            }
        }

        impl $name {
            /// Encoded size in bytes.
            pub const LEN: usize = $size;

            /// Decodes from an array of exactly the structure's size.
            pub fn from_bytes(bytes: &[u8; $size]) -> Self {
                <Self as $crate::Wire>::get(bytes)
            }

            /// Encodes; padding is zero.
            pub fn to_bytes(&self) -> [u8; $size] {
                let mut out = [0; $size];
                $crate::Wire::put(self, &mut out);
                out
            }

            /// The value that all zero bytes decode to.
            pub fn zeroed() -> Self {
                Self::from_bytes(&[0; $size])
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::zeroed()
            }
        }
    };
}

/// Version number of the member list. 0 = never formatted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Epoch(pub u32);

impl Epoch {
    /// Wrap-safe "older than" (spec 04, 10.2).
    pub fn is_before(self, other: Epoch) -> bool {
        (self.0.wrapping_sub(other.0) as i32) < 0
    }

    /// The next epoch.
    pub fn next(self) -> Epoch {
        Epoch(self.0.wrapping_add(1))
    }
}

impl std::fmt::Display for Epoch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl Wire for Epoch {
    const SIZE: usize = 4;
    const NAME: &'static str = "epoch";
    fn get(bytes: &[u8]) -> Self {
        Epoch(u32::get(bytes))
    }
    fn put(&self, out: &mut [u8]) {
        self.0.put(out);
    }
}

/// The bytes of a fixed string field up to its first NUL or its end (spec 01, section 1).
pub fn cstr(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    &field[..end]
}

/// A NUL-padded fixed field holding `text`, cut to leave at least one NUL.
pub fn fixed_str<const N: usize>(text: &[u8]) -> [u8; N] {
    let mut field = [0; N];
    let len = text.len().min(N - 1);
    field[..len].copy_from_slice(&text[..len]);
    field
}
