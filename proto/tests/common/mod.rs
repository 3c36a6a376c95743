//! Access to the test vectors in `tests/vectors` at the top of the repository.
#![allow(dead_code)] // each test binary uses its own part

use std::path::Path;

use serde_json::Value;

/// A vector file.
pub fn load(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/vectors").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The items of a list, or nothing if it is absent.
pub fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// A string member.
pub fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_else(|| panic!("no text {key:?} in {value}"))
}

/// A number member, plain or as hex text with or without `0x`.
pub fn number(value: &Value, key: &str) -> u64 {
    match &value[key] {
        Value::Number(n) => n.as_u64().unwrap_or_else(|| panic!("{key}: not a u64: {n}")),
        Value::String(s) => {
            u64::from_str_radix(s.trim_start_matches("0x"), 16).unwrap_or_else(|e| panic!("{key}: {s}: {e}"))
        }
        other => panic!("no number {key:?}: {other}"),
    }
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
    let mut bytes = vec![0; number(value, "len") as usize];
    if let Some(hex) = value["hex"].as_str() {
        let head = unhex(hex);
        assert_eq!(head.len(), bytes.len(), "len and hex disagree");
        return head;
    }
    for run in list(&value["sparse"]) {
        let offset = run[0].as_u64().expect("offset of a run") as usize;
        let run = unhex(run[1].as_str().expect("bytes of a run"));
        bytes[offset..offset + run.len()].copy_from_slice(&run);
    }
    bytes
}
