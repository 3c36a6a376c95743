//! Access to `tests/vectors`.

use std::path::{Path, PathBuf};

use serde_json::Value;

/// Path of a vector file.
pub fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/vectors").join(name)
}

/// A vector file.
pub fn load(name: &str) -> Value {
    let path = path(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Bytes from hex digits.
pub fn unhex(digits: &str) -> Vec<u8> {
    assert!(digits.len().is_multiple_of(2), "odd number of hex digits");
    (0..digits.len() / 2)
        .map(|i| {
            u8::from_str_radix(&digits[2 * i..2 * i + 2], 16).unwrap_or_else(|e| panic!("{digits}: {e}"))
        })
        .collect()
}

/// A payload: `{len, hex}` or `{len, sparse: [[offset, hex], ...]}`, zeros elsewhere.
pub fn payload(value: &Value) -> Vec<u8> {
    if let Some(hex) = value["hex"].as_str() {
        return unhex(hex);
    }
    let mut bytes = vec![0; value["len"].as_u64().expect("len") as usize];
    for run in value["sparse"].as_array().expect("hex or sparse") {
        let offset = run[0].as_u64().expect("offset") as usize;
        let run = unhex(run[1].as_str().expect("bytes"));
        bytes[offset..offset + run.len()].copy_from_slice(&run);
    }
    bytes
}
