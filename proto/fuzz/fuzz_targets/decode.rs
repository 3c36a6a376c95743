//! Feeds the fuzzer's bytes to every decoder: `cargo +nightly fuzz run decode` in `proto/`.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/decoders/mod.rs"]
mod decoders;

fuzz_target!(|bytes: &[u8]| decoders::decode_everything(bytes));
