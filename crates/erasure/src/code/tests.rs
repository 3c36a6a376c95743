use super::*;
use crate::MAX_STRIPS;
use proptest::prelude::*;

fn code() -> impl Strategy<Value = Code> {
    (prop::sample::select(vec![2u8, 4, 8, 16]), 1u8..=15).prop_map(|(d, p)| Code::new(d, p).expect("valid"))
}

fn slices(strips: &[Vec<u8>]) -> Vec<&[u8]> {
    strips.iter().map(Vec::as_slice).collect()
}

fn encode(code: Code, object: &[u8]) -> Vec<Vec<u8>> {
    let mut strips = vec![vec![0; object.len() / code.data_strips()]; code.strips()];
    let mut list: Vec<&mut [u8]> = strips.iter_mut().map(Vec::as_mut_slice).collect();
    code.encode_stripes(object, &mut list).expect("lengths fit");
    strips
}

#[test]
fn exactly_sixty_policy_bytes_are_valid() {
    let valid: Vec<u8> = (0..=255).filter(|&byte| Code::from_policy(byte).is_ok()).collect();
    assert_eq!(valid.len(), 60);
    for byte in valid {
        let code = Code::from_policy(byte).expect("valid");
        assert_eq!(code.policy(), byte);
        assert!(code.strips() <= MAX_STRIPS);
    }
    assert_eq!(Code::from_policy(0x8f).expect("16:15").to_string(), "16:15");
    assert_eq!(Code::from_policy(0x20), Err(Error::InvalidPolicy(0x20)), "no parity");
    assert_eq!(Code::from_policy(0x31), Err(Error::InvalidPolicy(0x31)), "six data strips");
    assert_eq!(Code::from_policy(0xf1), Err(Error::InvalidPolicy(0xf1)));
    assert_eq!(Code::new(4, 16), Err(Error::InvalidCode { data: 4, parity: 16 }));
    assert_eq!(Code::new(0, 1), Err(Error::InvalidCode { data: 0, parity: 1 }));
}

#[test]
fn wrong_shapes_are_refused_and_nothing_is_written() {
    let code = Code::new(2, 1).expect("valid");
    let object = [1u8; 512];
    let (mut a, mut b, mut c, mut short) = ([7u8; 256], [7u8; 256], [7u8; 256], [7u8; 255]);
    assert_eq!(
        code.encode_stripes(&object[1..], &mut [&mut a, &mut b, &mut c]),
        Err(Error::PartialStripe(511))
    );
    assert_eq!(
        code.encode_stripes(&object, &mut [&mut a, &mut b, &mut short]),
        Err(Error::StripLength { index: 2, want: 256, got: 255 })
    );
    assert_eq!(code.encode_stripes(&object, &mut [&mut a]), Err(Error::StripCount { want: 3, got: 1 }));
    assert_eq!(
        code.join(&[&a, &short], &mut [0; 512]),
        Err(Error::StripLength { index: 1, want: 256, got: 255 })
    );
    assert_eq!(code.encode(&[&a], &mut [&mut b]), Err(Error::StripCount { want: 2, got: 1 }));
    assert_eq!(
        code.update_parity(2, &object, &object, &mut [&mut a]),
        Err(Error::StripIndex { index: 2, limit: 2 })
    );
    assert_eq!(code.decode(0, &[(0, &a), (1, &b)], &mut c), Err(Error::RepeatedStrip(0)));
    assert_eq!(code.decode(0, &[(1, &a), (1, &b)], &mut c), Err(Error::RepeatedStrip(1)));
    assert_eq!(code.decode(3, &[(1, &a), (2, &b)], &mut c), Err(Error::StripIndex { index: 3, limit: 3 }));
    assert_eq!(code.decode(0, &[(1, &a)], &mut c), Err(Error::StripCount { want: 2, got: 1 }));
    let many = [(1, &a[..]); 40];
    assert_eq!(code.decode(0, &many, &mut c), Err(Error::StripCount { want: 2, got: 40 }));
    assert_eq!((a, b, c, short), ([7; 256], [7; 256], [7; 256], [7; 255]));
}

#[test]
fn a_shorter_list_of_strips_leaves_the_last_parity_out() {
    let code = Code::new(4, 2).expect("valid");
    let object: Vec<u8> = (0..1024u32).map(|i| ((i * 7) >> 2) as u8).collect();
    let all = encode(code, &object);
    for count in 4..=6 {
        let mut strips = vec![vec![0; 256]; count];
        let mut list: Vec<&mut [u8]> = strips.iter_mut().map(Vec::as_mut_slice).collect();
        code.encode_stripes(&object, &mut list).expect("lengths fit");
        assert_eq!(strips, all[..count]);
    }
}

proptest! {
    #[test]
    fn any_d_strips_give_all_others_back(
        code in code(), stripes in 1usize..6, seed in prop::collection::vec(any::<u8>(), 512),
        order in Just((0..MAX_STRIPS).collect::<Vec<_>>()).prop_shuffle(),
    ) {
        let object: Vec<u8> = (0..stripes * 512).map(|i| seed[i % 512] ^ (i / 512) as u8).collect();
        let strips = encode(code, &object);
        let order: Vec<usize> = order.into_iter().filter(|&i| i < code.strips()).collect();
        let (kept, lost) = order.split_at(code.data_strips());
        let inputs: Vec<(usize, &[u8])> = kept.iter().map(|&i| (i, &strips[i][..])).collect();
        let mut rebuilt = vec![vec![0; strips[0].len()]; lost.len()];
        let mut list: Vec<&mut [u8]> = rebuilt.iter_mut().map(Vec::as_mut_slice).collect();
        code.decode_many(lost, &inputs, &mut list).expect("valid inputs");
        for (strip, &index) in rebuilt.iter().zip(lost) {
            prop_assert_eq!(strip, &strips[index]);
            let mut single = vec![0; strip.len()];
            code.decode(index, &inputs, &mut single).expect("valid inputs");
            prop_assert_eq!(&single, strip);
        }
        let mut joined = vec![0; object.len()];
        code.join(&slices(&strips)[..code.data_strips()], &mut joined).expect("lengths fit");
        prop_assert_eq!(joined, object);
    }

    #[test]
    fn an_update_of_one_strip_equals_encoding_again(
        code in code(), column in 0usize..16, len in 0usize..200, seed: u8,
    ) {
        let column = column % code.data_strips();
        let byte = |j: usize, i: usize| (i * 31 + j * 97) as u8 ^ seed;
        let mut data: Vec<Vec<u8>> =
            (0..code.data_strips()).map(|j| (0..len).map(|i| byte(j, i)).collect()).collect();
        let encode = |data: &[Vec<u8>]| {
            let mut parity = vec![vec![0; len]; code.parity_strips()];
            let mut list: Vec<&mut [u8]> = parity.iter_mut().map(Vec::as_mut_slice).collect();
            code.encode(&slices(data), &mut list).expect("lengths fit");
            parity
        };
        let mut parity = encode(&data);
        let new: Vec<u8> = (0..len).map(|i| byte(99, i)).collect();
        let mut list: Vec<&mut [u8]> = parity.iter_mut().map(Vec::as_mut_slice).collect();
        code.update_parity(column, &data[column], &new, &mut list).expect("lengths fit");
        data[column] = new;
        prop_assert_eq!(parity, encode(&data));
    }
}
