//! The coder against `tests/vectors/erasure.json`, which the original's own coder produced.

use serde_json::Value;
use sha1::{Digest, Sha1};
use sheepdog_erasure::{Code, StripeRange};

fn vectors() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/vectors/erasure.json");
    serde_json::from_slice(&std::fs::read(path).expect("vectors are in the repository")).expect("valid JSON")
}

fn cases<'a>(vectors: &'a Value, key: &str) -> &'a [Value] {
    let cases = vectors[key].as_array().expect("an array of cases");
    assert!(!cases.is_empty());
    cases
}

fn number(case: &Value, key: &str) -> u64 {
    case[key].as_u64().unwrap_or_else(|| panic!("{key} is a number"))
}

fn strings(case: &Value, key: &str) -> Vec<String> {
    let list = case[key].as_array().unwrap_or_else(|| panic!("{key} is an array"));
    list.iter().map(|s| s.as_str().expect("a string").to_owned()).collect()
}

fn code(case: &Value) -> Code {
    Code::new(number(case, "d") as u8, number(case, "p") as u8).expect("a valid policy")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn sha1(bytes: &[u8]) -> String {
    hex(&Sha1::digest(bytes))
}

/// The byte generator of the vectors (splitmix64).
fn generate(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        bytes.extend_from_slice(&(z ^ z >> 31).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn encode(code: Code, object: &[u8]) -> Vec<Vec<u8>> {
    let mut strips = vec![vec![0xaa; code.strip_file_len(object.len() as u64) as usize]; code.strips()];
    let mut list: Vec<&mut [u8]> = strips.iter_mut().map(Vec::as_mut_slice).collect();
    code.encode_stripes(object, &mut list).expect("lengths fit");
    strips
}

fn slices(strips: &[Vec<u8>]) -> Vec<&[u8]> {
    strips.iter().map(Vec::as_slice).collect()
}

/// The parity strips computed from data strips instead of from the object.
fn parity(code: Code, data: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut parity = vec![vec![0xaa; data[0].len()]; code.parity_strips()];
    let mut list: Vec<&mut [u8]> = parity.iter_mut().map(Vec::as_mut_slice).collect();
    code.encode(&slices(data), &mut list).expect("lengths fit");
    parity
}

#[test]
fn the_field_is_that_of_the_vectors() {
    let vectors = vectors();
    let expected = vectors["gf_exp"].as_str().expect("hex");
    // In 2:1 the parity of (a, 0) is 3a and of (0, a) is 2a, so a walk over multiples of 2 shows all powers.
    let code = Code::new(2, 1).expect("valid");
    let mut x = 1u8;
    let mut powers = Vec::new();
    for _ in 0..255 {
        powers.push(x);
        let mut product = [0];
        code.encode(&[&[0], &[x]], &mut [&mut product]).expect("lengths fit");
        x = product[0];
    }
    assert_eq!(hex(&powers), expected);
    assert_eq!(x, 1);
}

#[test]
fn all_matrices_match() {
    let vectors = vectors();
    assert_eq!(cases(&vectors, "matrices").len(), 60);
    for case in cases(&vectors, "matrices") {
        let code = code(case);
        assert_eq!(u64::from(code.policy()), number(case, "policy"));
        assert_eq!(Code::from_policy(code.policy()), Ok(code));
        // Unit vectors as data: byte j of parity strip k is G[k][j].
        let d = code.data_strips();
        let units: Vec<Vec<u8>> = (0..d).map(|j| (0..d).map(|i| u8::from(i == j)).collect()).collect();
        let rows: Vec<String> = parity(code, &units).iter().map(|row| hex(row)).collect();
        assert_eq!(rows, strings(case, "parity_rows"), "{code}");
        let inputs: Vec<usize> = (0..d).collect();
        for (k, row) in rows.iter().enumerate() {
            let factors = code.coefficients(d + k, &inputs).expect("valid inputs");
            assert_eq!(&hex(&factors[..d]), row, "{code}");
        }
    }
}

#[test]
fn single_stripes_match() {
    let vectors = vectors();
    for case in cases(&vectors, "stripes") {
        let code = code(case);
        let strips = encode(code, &generate(number(case, "seed"), 512));
        let parity: Vec<String> = strips[code.data_strips()..].iter().map(|s| hex(s)).collect();
        assert_eq!(parity, strings(case, "parity"), "{code}");
    }
}

#[test]
fn whole_objects_match() {
    let vectors = vectors();
    for case in cases(&vectors, "objects") {
        let code = code(case);
        let object = generate(number(case, "seed"), number(case, "object_size") as usize);
        assert_eq!(sha1(&object), case["object_sha1"].as_str().expect("a string"));
        assert_eq!(code.strip_file_len(object.len() as u64), number(case, "strip_file_size"));
        let strips = encode(code, &object);
        let digests: Vec<String> = strips.iter().map(|s| sha1(s)).collect();
        assert_eq!(digests, strings(case, "strip_sha1"), "{code}");
        assert_eq!(parity(code, &strips[..code.data_strips()]), strips[code.data_strips()..], "{code}");
        let mut joined = vec![0; object.len()];
        code.join(&slices(&strips)[..code.data_strips()], &mut joined).expect("lengths fit");
        assert!(joined == object, "{code}");
    }
}

#[test]
fn rebuilt_strips_match() {
    let vectors = vectors();
    for case in cases(&vectors, "decode") {
        let code = code(case);
        let strips = encode(code, &generate(number(case, "seed"), number(case, "object_size") as usize));
        let lost = number(case, "lost") as usize;
        let mut inputs: Vec<usize> = case["inputs"]
            .as_array()
            .expect("an array")
            .iter()
            .map(|i| i.as_u64().expect("a number") as usize)
            .collect();
        let factors = code.coefficients(lost, &inputs).expect("valid inputs");
        assert_eq!(hex(&factors[..inputs.len()]), case["coef"].as_str().expect("a string"), "{code}");
        for _ in 0..2 {
            let given: Vec<(usize, &[u8])> = inputs.iter().map(|&i| (i, &strips[i][..])).collect();
            let mut out = vec![0xaa; strips[0].len()];
            code.decode(lost, &given, &mut out).expect("valid inputs");
            assert_eq!(sha1(&out), case["strip_sha1"].as_str().expect("a string"), "{code}");
            inputs.reverse();
        }
    }
}

#[test]
fn partial_writes_match() {
    let vectors = vectors();
    for case in cases(&vectors, "rmw") {
        let code = code(case);
        let mut object = generate(number(case, "seed"), number(case, "object_size") as usize);
        let (offset, len) = (number(case, "offset") as u32, number(case, "length") as u32);
        let before = encode(code, &object);
        let range = StripeRange::of(offset, len);
        assert_eq!(u64::from(range.strip_offset(code)), number(case, "peer_offset"));
        assert_eq!(u64::from(range.strip_len(code)), number(case, "peer_length"));

        // As the gateway does it: read only the partial stripes, merge, encode, send.
        let mut stripes = vec![0; range.object_len() as usize];
        for stripe in range.partial() {
            let stored = stripe as usize * 512..stripe as usize * 512 + 512;
            let at = (stripe - range.first()) as usize * 512;
            stripes[at..at + 512].copy_from_slice(&object[stored]);
        }
        let new = generate(number(case, "write_seed"), len as usize);
        stripes[range.skip()..range.skip() + new.len()].copy_from_slice(&new);
        let payloads = encode(code, &stripes);
        let digests: Vec<String> = payloads.iter().map(|s| sha1(s)).collect();
        assert_eq!(digests, strings(case, "peer_payload_sha1"), "{code}");

        let mut files = before.clone();
        let at = range.strip_offset(code) as usize;
        for (file, payload) in files.iter_mut().zip(&payloads) {
            file[at..at + payload.len()].copy_from_slice(payload);
        }
        let digests: Vec<String> = files.iter().map(|s| sha1(s)).collect();
        assert_eq!(digests, strings(case, "strip_sha1"), "{code}");
        object[offset as usize..(offset + len) as usize].copy_from_slice(&new);
        assert_eq!(files, encode(code, &object), "{code}");

        // The other way: change the data strips one by one and update the parity in place.
        let d = code.data_strips();
        let mut parity = before[d..].to_vec();
        for j in 0..d {
            let mut list: Vec<&mut [u8]> = parity.iter_mut().map(Vec::as_mut_slice).collect();
            code.update_parity(j, &before[j], &files[j], &mut list).expect("lengths fit");
        }
        assert_eq!(parity, files[d..], "{code}");
    }
}
