//! Reference ledgers: one counter per generation (spec 03, section 19; spec 05, section 10).
//!
//! A ledger object is 4 MiB, but only a handful of low slots are ever used. [`Ledger`] holds the used prefix.

use crate::Wire;

/// Slots of a ledger object.
pub const LEDGER_SLOTS: usize = 1 << 20;
/// Bytes of a ledger object.
pub const LEDGER_LEN: usize = LEDGER_SLOTS * 4;

/// The counters of one data object, trailing zeros left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ledger {
    slots: Vec<i32>,
}

impl Ledger {
    /// What an absent ledger means: one reference of generation 0.
    pub fn absent() -> Ledger {
        Ledger { slots: vec![1] }
    }

    /// Decodes a ledger object or a prefix of it.
    pub fn decode(bytes: &[u8]) -> Ledger {
        let mut slots: Vec<i32> = bytes.chunks_exact(4).take(LEDGER_SLOTS).map(i32::get).collect();
        trim(&mut slots);
        Ledger { slots }
    }

    /// The used prefix of the object.
    pub fn encode(&self) -> Vec<u8> {
        self.slots.iter().flat_map(|s| s.to_le_bytes()).collect()
    }

    /// Whether `generation` and the one behind it have slots.
    pub fn is_valid_generation(generation: u32) -> bool {
        (generation as usize) < LEDGER_SLOTS - 1
    }

    /// Drops a reference of `generation` that was copied `count` times. Counters wrap. `false` if the generation is
    /// out of range and nothing changed.
    pub fn drop_reference(&mut self, generation: u32, count: u32) -> bool {
        if !Self::is_valid_generation(generation) {
            return false;
        }
        let g = generation as usize;
        if self.slots.len() < g + 2 {
            self.slots.resize(g + 2, 0);
        }
        self.slots[g] = self.slots[g].wrapping_sub(1);
        self.slots[g + 1] = self.slots[g + 1].wrapping_add(count as i32);
        trim(&mut self.slots);
        true
    }

    /// Whether no reference is left.
    pub fn is_zero(&self) -> bool {
        self.slots.is_empty()
    }

    /// The counters, from generation 0 to the last one that is not zero.
    pub fn slots(&self) -> &[i32] {
        &self.slots
    }
}

fn trim(slots: &mut Vec<i32>) {
    while slots.last() == Some(&0) {
        slots.pop();
    }
}
