//! Decoding is total: any bytes give a value or an error, never a panic, and what is encoded decodes to itself.

mod decoders;

use proptest::prelude::*;
use sheepdog_proto::btree::BtreeHeader;
use sheepdog_proto::cluster::ClusterInfoHeader;
use sheepdog_proto::{NodeRecord, Wire};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_short_bytes(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        decoders::decode_everything(&bytes);
    }

    #[test]
    fn any_text(text in "[ -~:]{0,40}|IPv[46] ip:[0-9a-f.:]{0,20} port:[0-9]{0,7}|[0-9:]{0,8}") {
        decoders::decode_everything(text.as_bytes());
    }

    #[test]
    fn node_lists_with_any_count(count in any::<i16>(), nodes in 0usize..8, tail in 0usize..80) {
        let head = ClusterInfoHeader { nr_nodes: count, ..ClusterInfoHeader::zeroed() };
        let mut bytes = head.encode();
        bytes.extend(vec![0xa5; nodes * NodeRecord::LEN + tail]);
        decoders::decode_everything(&bytes);
    }

    #[test]
    fn index_nodes_with_any_count(depth in 0u16..4, entries in any::<u32>(), body in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = BtreeHeader { magic: sheepdog_proto::btree::BTREE_MAGIC, depth, entries }.encode();
        bytes.extend(body);
        decoders::decode_everything(&bytes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Around the sizes of the big structures, and longer than any of them.
    #[test]
    fn any_long_bytes(
        size in prop::sample::select(vec![784usize, 1428, 4120, 4664, 66_320, 263_688, 491_568]),
        less in 0usize..3,
        seed in any::<u8>(),
    ) {
        let bytes: Vec<u8> = (0..size + 1 - less).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect();
        decoders::decode_everything(&bytes);
    }
}
