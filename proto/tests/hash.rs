//! `hash.json`: hashes, object ids, attribute ids and ring seeds; the name hashes and ids of `vdi-misc.json`.

mod common;

use common::{list, load, number, text, unhex};
use sheepdog_proto::attr::AttrHeader;
use sheepdog_proto::hash::{FNV_INIT, fnv1a64, hash_oid, name_hash, next_hash, sd_hash};
use sheepdog_proto::{NodeId, Oid, VdiId, Wire, fixed_str};

#[test]
fn byte_hashes_are_those_of_the_original() {
    let vectors = load("hash.json");
    for v in list(&vectors["fnv1a64"]) {
        assert_eq!(fnv1a64(&unhex(text(v, "hex")), FNV_INIT), number(v, "hash"), "{v}");
    }
    for v in list(&vectors["sd_hash"]) {
        assert_eq!(sd_hash(&unhex(text(v, "hex"))), number(v, "hash"), "{v}");
    }
    assert!(list(&vectors["fnv1a64"]).len() >= 8 && list(&vectors["sd_hash"]).len() >= 8);
}

#[test]
fn object_ids_hash_to_their_ring_position() {
    let vectors = load("hash.json");
    let cases = list(&vectors["sd_hash_oid"]);
    assert!(cases.len() >= 12);
    for v in cases {
        let oid = number(v, "oid");
        assert_eq!(fnv1a64(&oid.to_le_bytes(), FNV_INIT), number(v, "fnv1a64_le"), "{v}");
        let hash = hash_oid(Oid(oid));
        assert_eq!(hash, number(v, "hash"), "{v}");
        assert_eq!(next_hash(hash), number(v, "next"), "{v}");
        assert_eq!(next_hash(next_hash(hash)), number(v, "next2"), "{v}");
    }
}

#[test]
fn names_hash_to_the_first_candidate_vid() {
    let vectors = load("hash.json");
    for v in list(&vectors["vdi_hash"]) {
        assert_eq!(u64::from(name_hash(text(v, "name").as_bytes())), number(v, "vid"), "{v}");
    }
    let misc = load("vdi-misc.json");
    let names = misc["name_hash"].as_object().expect("name_hash is an object");
    assert!(names.len() >= 15);
    for (name, vid) in names {
        let expected = vid.as_str().expect("vid");
        assert_eq!(format!("{:06x}", name_hash(name.as_bytes())), expected, "{name:?}");
        // The hash of a field ends at its NUL, so padding never changes it.
        assert_eq!(name_hash(&fixed_str::<256>(name.as_bytes())), name_hash(name.as_bytes()), "{name:?}");
    }
}

fn attribute(v: &serde_json::Value) -> AttrHeader {
    AttrHeader {
        name: fixed_str(text(v, "name").as_bytes()),
        tag: fixed_str(text(v, "tag").as_bytes()),
        snap_id: number(v, "snap_id") as u32,
        key: fixed_str(text(v, "key").as_bytes()),
        ..AttrHeader::zeroed()
    }
}

#[test]
fn attribute_ids_are_those_of_the_original() {
    let (hash, misc) = (load("hash.json"), load("vdi-misc.json"));
    let cases: Vec<_> = list(&hash["vdi_attr_hash"]).iter().chain(list(&misc["attr_id"])).collect();
    assert!(cases.len() >= 11);
    for v in cases {
        let id = attribute(v).id();
        assert_eq!(u64::from(id), number(v, "attr_id"), "{v}");
        let oid = Oid::attr(name_hash(text(v, "name").as_bytes()), id);
        assert_eq!(oid.0, number(v, "oid"), "{v}");
    }
}

#[test]
fn ring_points_of_a_node_follow_from_its_address() {
    let vectors = load("hash.json");
    for v in list(&vectors["node_vnodes"]) {
        let node = NodeId::new(text(v, "addr").parse().expect("address"), number(v, "port") as u16);
        assert_eq!(node.encode()[..18], unhex(text(v, "hashed_bytes")), "{v}");
        let mut hash = node.ring_seed();
        assert_eq!(hash, number(v, "seed"), "{v}");
        for point in list(&v["first_vnodes"]) {
            hash = next_hash(hash);
            let expected = point.as_str().expect("point").trim_start_matches("0x");
            assert_eq!(format!("{hash:016x}"), expected, "{v}");
        }
    }
}

#[test]
fn object_ids_are_built_as_the_original_builds_them() {
    let vectors = load("hash.json");
    let build = &vectors["oid_build"];
    let vid = VdiId::new(0x72d497);
    let cases = [
        ("vdi(0x72d497)", Oid::inode(vid)),
        ("data(0x72d497,5)", Oid::data(vid, 5)),
        ("data(0x72d497,0x100000)", Oid::data(vid, 0x10_0000)),
        ("vmstate(0x72d497,2)", Oid::vmstate(vid, 2)),
        ("attr(0x72d497,0xdeadbeef)", Oid::attr(0x72d497, 0xdead_beef)),
        ("btree(0x72d497,7)", Oid::btree(vid, 7)),
        ("ledger_of_data(0x72d497,5)", Oid::ledger_of(Oid::data(vid, 5))),
    ];
    assert_eq!(build.as_object().map(|o| o.len()), Some(cases.len()), "every entry is covered");
    for (name, oid) in cases {
        assert_eq!(oid.0, number(build, name), "{name}");
        assert_eq!(oid.vid(), vid, "{name}");
    }
    assert_eq!(Oid::ledger_of(Oid::data(vid, 5)).data_of_ledger(), Oid::data(vid, 5));
}
