//! Tests of [`super`].

use std::path::Path;

use bytes::Bytes;
use sheepdog_proto::{Epoch, Oid, Opcode, Request, Response, ResultCode};
use sheepdog_store::{Replica, Store};

use super::*;

const ID: WriteId = WriteId { writer: 9, seq: 5 };

fn intents(dir: &Path) -> Intents {
    Intents::open(dir, None)
}

#[test]
fn regions_are_64ths_of_the_object() {
    const SIZE: u64 = 4 << 20;
    assert_eq!(regions_of(SIZE, 0, 4096), 1);
    assert_eq!(regions_of(SIZE, 65535, 2), 3);
    assert_eq!(regions_of(SIZE, SIZE - 1, 1), 1 << 63);
    assert_eq!(regions_of(SIZE, 0, SIZE), u64::MAX);
    assert_eq!(ranges(SIZE, 0b1011), [0..131072, 196608..262144]);
    assert_eq!(ranges(SIZE, u64::MAX).first(), Some(&(0..SIZE)));
    assert_eq!(ranges(8192, u64::MAX).first(), Some(&(0..8192)), "an object of two pages has two regions");
}

#[test]
fn what_is_not_done_when_the_epoch_ends_is_unsettled() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let intents = intents(dir.path());
    assert!(!intents.begin(Oid(1), ID, 1), "not entered");
    for oid in [Oid(1), Oid(2)] {
        intents.enter(oid).expect("entered");
    }
    assert!(intents.begin(Oid(1), ID, 1) && intents.begin(Oid(2), WriteId { seq: 6, ..ID }, 2));
    intents.done(9, 7, &[6]);
    assert!(!intents.is_busy(Oid(1)) && intents.is_busy(Oid(2)));
    intents.epoch_ends();
    assert_eq!(intents.unsettled(), [Oid(2)]);
    assert_eq!(intents.regions(Oid(2)), 2);
    intents.settled(Oid(2));
    assert!(intents.all_settled());
}

#[test]
fn after_a_restart_objects_written_lately_are_unsettled() {
    let dir = tempfile::tempdir().expect("temporary directory");
    intents(dir.path()).enter(Oid(77)).expect("entered");
    let again = intents(dir.path());
    assert_eq!(again.unsettled(), [Oid(77)]);
    assert_eq!(again.regions(Oid(77)), u64::MAX);
    again.clear();
    assert!(intents(dir.path()).all_settled());
}

#[test]
fn a_strips_write_is_undone_newest_first_and_remembered() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let intents = intents(dir.path());
    intents.note(Epoch(2));
    let replica = Replica { oid: Oid(3), strip: Some(1) };
    for old in [b"aa", b"bb"] {
        intents.keep(replica, ID, Epoch(4), 0, Bytes::from_static(old), b"new").expect("logged");
    }
    assert_eq!(intents.fate(Oid(3), ID, Epoch(4)), Fate::Applied);
    let old: Vec<Bytes> = intents.to_undo(Oid(3), ID, Epoch(4)).into_iter().map(|(_, _, old)| old).collect();
    assert_eq!(old, [&b"bb"[..], b"aa"]);
    intents.decided(Oid(3), ID, Epoch(4), Fate::Undone).expect("logged");
    assert_eq!(intents.fate(Oid(3), ID, Epoch(4)), Fate::Undone);
    assert!(intents.open_writes(Oid(3)).is_empty());
    let other = WriteId { seq: 6, ..ID };
    assert_eq!(intents.fate(Oid(3), other, Epoch(4)), Fate::Absent);
    assert_eq!(intents.fate(Oid(3), other, Epoch(1)), Fate::Unknown, "before this process");
    intents.done(9, 6, &[]);
    assert_eq!(intents.fate(Oid(3), other, Epoch(4)), Fate::Done);
}

#[test]
fn after_a_restart_open_writes_of_strips_are_known() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let intents = intents(dir.path());
    intents.note(Epoch(2));
    let replica = Replica { oid: Oid(3), strip: Some(1) };
    let ids: Vec<WriteId> = (1..=4).map(|seq| WriteId { writer: 9, seq }).collect();
    for id in &ids {
        intents.keep(replica, *id, Epoch(4), 512, Bytes::from_static(b"old"), b"new").expect("logged");
    }
    intents.done(9, 1, &[]);
    intents.decided(Oid(3), ids[1], Epoch(4), Fate::Undone).expect("logged");
    intents.decided(Oid(3), ids[2], Epoch(4), Fate::Kept).expect("logged");
    // Once read from what was appended, once from what a file begins with.
    for restarted in [false, true] {
        if restarted {
            intents.restart_log();
        }
        let again = super::tests::intents(dir.path());
        assert_eq!(again.unsettled(), [Oid(3)]);
        assert!(!again.is_remembered(Oid(3)), "all its writes are known");
        let fates: Vec<Fate> = ids.iter().map(|id| again.fate(Oid(3), *id, Epoch(4))).collect();
        assert_eq!(fates, [Fate::Done, Fate::Undone, Fate::Kept, Fate::Applied]);
        assert_eq!(again.to_undo(Oid(3), ids[3], Epoch(4)), [(replica, 512, Bytes::from_static(b"old"))]);
        assert_eq!(again.fate(Oid(3), WriteId { seq: 5, ..ids[0] }, Epoch(2)), Fate::Absent);
        assert_eq!(again.fate(Oid(3), WriteId { seq: 5, ..ids[0] }, Epoch(1)), Fate::Unknown);
    }
    intents.enter(Oid(8)).expect("entered");
    let again = super::tests::intents(dir.path());
    again.leave_to_others();
    assert_eq!(again.unsettled(), [Oid(3)], "others may yet decide about it");
    again.decided(Oid(3), ids[3], Epoch(4), Fate::Undone).expect("logged");
    again.leave_to_others();
    assert!(again.all_settled());
}

/// Else its home would pass as one that does not know, and a write that it lacks would stand.
#[test]
fn what_never_came_to_a_node_is_known_to_be_absent_after_a_restart() {
    for formatted in [false, true] {
        let dir = tempfile::tempdir().expect("temporary directory");
        let first = intents(dir.path());
        let since = if formatted { 1 } else { 3 };
        if formatted {
            first.clear();
        }
        first.note(Epoch(since));
        let again = intents(dir.path());
        again.note(Epoch(7));
        assert_eq!(again.fate(Oid(3), ID, Epoch(since)), Fate::Absent);
        assert_eq!(again.fate(Oid(3), ID, Epoch(since - 1)), Fate::Unknown);
        let replica = Replica { oid: Oid(3), strip: Some(1) };
        again.keep(replica, ID, Epoch(7), 0, Bytes::from_static(b"old"), b"new").expect("logged");
        let third = intents(dir.path());
        assert_eq!(third.fate(Oid(3), ID, Epoch(7)), Fate::Applied);
        assert_eq!(third.fate(Oid(3), WriteId { seq: 8, ..ID }, Epoch(since)), Fate::Absent);
    }
}

#[tokio::test]
async fn after_a_restart_what_is_logged_is_told_from_what_was_carried_out() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (meta, disk) = (dir.path().join("meta"), dir.path().join("disk"));
    std::fs::create_dir_all(&meta).expect("directory");
    let (store, _) = Store::open(&[disk], sheepdog_store::StoreOptions::default()).expect("store");
    let replica = Replica { oid: Oid(3), strip: Some(1) };
    store.create(replica, 8192, 0, Bytes::from(vec![b'-'; 8192])).await.expect("created");
    let first = intents(&meta);
    first.note(Epoch(2));
    // Overlapping ones; the last two only in part and not at all.
    let writes = [(0, "aaaa"), (2, "bbbb"), (4, "cccc"), (4000, "dddd")];
    let id = |n: usize| WriteId { writer: 9, seq: n as u32 + 1 };
    for (n, (offset, new)) in writes.iter().enumerate() {
        let old = store.read(replica, *offset, 4).await.expect("read");
        first.keep(replica, id(n), Epoch(4), *offset, old, new.as_bytes()).expect("logged");
        let carried_out = &new[..[4, 4, 2, 0][n]];
        store.write(replica, 8192, *offset, carried_out.into()).await.expect("written");
    }
    let again = intents(&meta);
    again.verify(&store, Epoch(4)).await;
    let fates: Vec<Fate> = (0..4).map(|n| again.fate(replica.oid, id(n), Epoch(4))).collect();
    assert_eq!(fates, [Fate::Applied, Fate::Applied, Fate::Absent, Fate::Absent]);
    assert_eq!(again.to_undo(replica.oid, id(2), Epoch(4)), [(replica, 4, Bytes::from_static(b"bb--"))]);

    again.replaced(replica.oid).expect("logged");
    store.remove(replica).await.expect("removed");
    first.verify(&store, Epoch(4)).await;
    assert_eq!(first.fate(replica.oid, id(0), Epoch(4)), Fate::Unknown, "there is no strip");
    let third = intents(&meta);
    assert_eq!(third.fate(replica.oid, id(3), Epoch(4)), Fate::Kept);
}

#[tokio::test]
async fn what_was_announced_and_not_written_is_made_up_for() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (meta, disk) = (dir.path().join("meta"), dir.path().join("disk"));
    std::fs::create_dir_all(&meta).expect("directory");
    let (store, _) = Store::open(&[disk], sheepdog_store::StoreOptions::default()).expect("store");
    let strip = |oid| Replica { oid: Oid(oid), strip: Some(1) };
    for oid in 1..=5 {
        store.create(strip(oid), 8192, 0, Bytes::from(vec![b'-'; 8192])).await.expect("created");
    }
    let first = intents(&meta);
    first.note(Epoch(2));
    let id = |n: u32| WriteId { writer: 9, seq: n };
    let announce = |oid: u64, n, epoch| {
        first.announce(strip(oid), id(n), Epoch(epoch), 0, Bytes::from_static(b"new"));
    };
    announce(1, 1, 4); // nothing more
    announce(2, 2, 4); // logged, not written
    first.keep(strip(2), id(2), Epoch(4), 0, Bytes::from_static(b"---"), b"new").expect("logged");
    announce(3, 3, 3); // of an epoch that others have settled
    announce(4, 4, 4); // done
    announce(5, 5, 4); // taken back
    first.keep(strip(5), id(5), Epoch(4), 0, Bytes::from_static(b"---"), b"new").expect("logged");
    first.decided(Oid(5), id(5), Epoch(4), Fate::Undone).expect("logged");
    first.done(9, 5, &[1, 2, 3, 5]);
    for restarted in [false, true] {
        if restarted {
            first.restart_log();
        }
        let again = intents(&meta);
        again.verify(&store, Epoch(4)).await;
        let mut found = Vec::new();
        for oid in 1..=5 {
            found.push(store.read(strip(oid), 0, 3).await.expect("read"));
            store.write(strip(oid), 8192, 0, Bytes::from_static(b"---")).await.expect("written");
        }
        assert_eq!(found, [&b"new"[..], b"new", b"---", b"---", b"---"]);
        assert_eq!(again.fate(Oid(1), id(1), Epoch(4)), Fate::Applied);
        assert_eq!(again.fate(Oid(2), id(2), Epoch(4)), Fate::Applied);
        assert_eq!(again.to_undo(Oid(2), id(2), Epoch(4)).len(), 1);
        assert_eq!(again.fate(Oid(3), id(3), Epoch(4)), Fate::Absent);
    }
}

#[test]
fn writes_kept_loosely_are_told_until_everybody_has_everything() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let first = intents(dir.path());
    let replica = Replica { oid: Oid(3), strip: Some(1) };
    first.keep(replica, ID, Epoch(4), 0, Bytes::from_static(b"old"), b"new").expect("logged");
    first.decided(Oid(3), ID, Epoch(4), Fate::Loose).expect("logged");
    let again = intents(dir.path());
    again.done(9, 100, &[]);
    assert_eq!(again.loose(), [(Oid(3), Epoch(4), ID)]);
    assert!(again.open_writes(Oid(3)).is_empty());
    again.gathered(Epoch(4));
    assert_eq!(again.loose().len(), 1);
    again.gathered(Epoch(5));
    assert!(again.loose().is_empty());
}

#[test]
fn what_was_sent_again_is_not_done_without_this_home() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let intents = intents(dir.path());
    intents.enter(Oid(1)).expect("entered");
    assert!(!intents.may_be_done(Oid(1)));
    assert!(intents.begin(Oid(1), ID, 1));
    assert!(intents.may_be_done(Oid(1)) && !intents.may_be_done(Oid(2)));
    intents.asked(Oid(1), ID);
    assert!(!intents.may_be_done(Oid(1)), "its gateway waits for this home");
    assert!(intents.begin(Oid(1), ID, 1));
    assert!(intents.may_be_done(Oid(1)));
    intents.done(ID.writer, ID.seq, &[]);
    assert!(!intents.may_be_done(Oid(1)));
}

#[test]
fn what_is_left_out_of_a_strip_is_told_in_short() {
    let ids = [3, 4, 5].map(|seq| WriteId { seq, ..ID });
    let [a, b, c] = ids;
    assert_eq!(LeftOut::of(&[]), LeftOut::default());
    assert_eq!(LeftOut::of(&[a, b, c]), LeftOut::of(&[c, a, b, a]));
    assert_ne!(LeftOut::of(&[a, b]), LeftOut::of(&[a, c]));
    let answer = Response::to(&Request::new(Opcode::READ_PEER), ResultCode::SUCCESS);
    assert_eq!(LeftOut::marked(&answer), LeftOut::default(), "others leave it zero");
    assert_eq!(LeftOut::marked(&LeftOut::of(&ids).mark(answer)), LeftOut::of(&ids));
}

#[test]
fn what_is_done_stays_done_in_whatever_order_it_is_told() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let intents = intents(dir.path());
    intents.note(Epoch(2));
    let replica = Replica { oid: Oid(3), strip: Some(1) };
    let ids = [4, 5, 6].map(|seq| WriteId { seq, ..ID });
    for id in ids {
        intents.keep(replica, id, Epoch(4), 0, Bytes::from_static(b"old"), b"new").expect("logged");
    }
    // Each was overtaken by the one after it.
    intents.done(ID.writer, 6, &[6]);
    intents.done(ID.writer, 6, &[5, 6]);
    intents.done(ID.writer, 5, &[4]);
    let fates = |of: &Intents| ids.map(|id| of.fate(Oid(3), id, Epoch(4)));
    assert_eq!(fates(&intents), [Fate::Done, Fate::Done, Fate::Applied]);
    assert_eq!(fates(&super::tests::intents(dir.path())), [Fate::Done, Fate::Done, Fate::Applied]);
    intents.done(ID.writer, 7, &[7]);
    assert_eq!(fates(&intents), [Fate::Done; 3]);
}

#[tokio::test(start_paused = true)]
async fn what_was_decided_is_remembered_as_long_as_somebody_may_ask() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let intents = intents(dir.path());
    intents.note(Epoch(2));
    let replica = Replica { oid: Oid(3), strip: Some(1) };
    let ids = [4, 5, 6].map(|seq| WriteId { seq, ..ID });
    let [kept, undone, of_this_epoch] = ids;
    for (id, epoch) in [(kept, 4), (undone, 4)] {
        intents.keep(replica, id, Epoch(epoch), 0, Bytes::from_static(b"old"), b"new").expect("logged");
    }
    intents.epoch_ends();
    intents.decided(Oid(3), kept, Epoch(4), Fate::Kept).expect("logged");
    intents.decided(Oid(3), undone, Epoch(4), Fate::Undone).expect("logged");
    intents.keep(replica, of_this_epoch, Epoch(5), 0, Bytes::new(), b"new").expect("logged");
    intents.decided(Oid(3), of_this_epoch, Epoch(5), Fate::Undone).expect("logged");
    let fates =
        || [(kept, 4), (undone, 4), (of_this_epoch, 5)].map(|(id, e)| intents.fate(Oid(3), id, Epoch(e)));
    let later = || async {
        tokio::time::advance(2 * REMEMBER).await;
        intents.done(77, 1, &[]); // another gateway
    };
    later().await;
    assert_eq!(fates(), [Fate::Kept, Fate::Undone, Fate::Absent]);
    intents.gathered(Epoch(4));
    later().await;
    assert_eq!(
        fates(),
        [Fate::Kept, Fate::Undone, Fate::Absent],
        "of that epoch itself strips are asked for"
    );
    intents.gathered(Epoch(5));
    later().await;
    assert_eq!(fates(), [Fate::Absent; 3]);
}

#[test]
fn overlapping_writes_are_undone_newest_first() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let intents = intents(dir.path());
    let replica = Replica { oid: Oid(3), strip: Some(1) };
    // Two gateways: numbers do not tell which was first.
    let ids = [(8, 9), (9, 1), (8, 10)].map(|(writer, seq)| WriteId { writer, seq });
    let mut strip = *b"------";
    for (nth, (id, new)) in ids.iter().zip([b"aaaa", b"bbbb", b"cccc"]).enumerate() {
        let old = Bytes::copy_from_slice(&strip[nth..nth + 4]);
        intents.keep(replica, *id, Epoch(4), nth as u64, old, new).expect("logged");
        strip[nth..nth + 4].copy_from_slice(new);
    }
    assert_eq!(&strip, b"abcccc");
    for id in intents.newest_first(Oid(3), &ids, Epoch(4)) {
        for (_, offset, old) in intents.to_undo(Oid(3), id, Epoch(4)) {
            strip[offset as usize..offset as usize + old.len()].copy_from_slice(&old);
        }
    }
    assert_eq!(&strip, b"------");
}

#[test]
fn what_could_not_be_logged_is_not_remembered_whatever_came_after_it() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let intents = intents(dir.path());
    let replica = Replica { oid: Oid(3), strip: Some(1) };
    let ids = [4, 5].map(|seq| WriteId { seq, ..ID });
    for id in ids {
        intents.keep(replica, id, Epoch(4), 512, Bytes::from_static(b"old"), b"new").expect("logged");
    }
    intents.not_kept(Oid(3), ids[0], Epoch(4), 512);
    assert_eq!(intents.open_of(replica), [ids[1]]);

    let gone = super::tests::intents(&dir.path().join("gone"));
    gone.keep(replica, ID, Epoch(4), 0, Bytes::from_static(b"old"), b"new").expect_err("no directory");
    assert!(gone.open_of(replica).is_empty());
}

#[test]
fn a_home_that_has_open_writes_is_not_equal_because_others_say_so() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let intents = intents(dir.path());
    let replica = Replica { oid: Oid(3), strip: Some(1) };
    intents.keep(replica, ID, Epoch(4), 0, Bytes::from_static(b"old"), b"new").expect("logged");
    intents.epoch_ends();
    intents.unsettle(Oid(4), 1);
    assert!(!intents.equal_elsewhere(Oid(3)) && intents.is_unsettled(Oid(3)));
    assert!(intents.equal_elsewhere(Oid(4)) && !intents.is_unsettled(Oid(4)));
    intents.decided(Oid(3), ID, Epoch(4), Fate::Undone).expect("logged");
    assert!(intents.equal_elsewhere(Oid(3)) && intents.all_settled());
}
