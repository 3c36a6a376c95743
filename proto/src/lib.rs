//! Wire and disk structures of the Sheepdog protocol.
