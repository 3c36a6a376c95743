use sheepdog_proto::header::ClusterRequest;

use super::*;

fn node(port: u16) -> NodeRecord {
    NodeRecord {
        nid: NodeId::new([127, 0, 0, 1].into(), port),
        nr_vnodes: 128,
        zone: port.into(),
        space: 1 << 30,
    }
}

fn gateway(port: u16) -> NodeRecord {
    NodeRecord { nr_vnodes: 0, space: 0, ..node(port) }
}

const STARTUP: Startup = Startup { gateway: false, auto_vnodes: true, wildcard: false };

fn fresh(me: NodeRecord) -> State {
    State::new(me, STARTUP, StoreConfig::default(), Epoch(0), Vec::new())
}

fn format_request() -> ClusterRequest {
    ClusterRequest { ctime: 77, copies: 2, flags: ClusterFlags::AUTO_VNODES, ..ClusterRequest::zeroed() }
}

/// Runs a join of `ports[last]` through every state in `states`, as a driver would.
fn join(states: &mut [State], joiner: usize) -> Vec<Vec<Action>> {
    let me = states[joiner].me;
    let members: Vec<NodeRecord> = states.iter().filter(|s| s.joined).map(|s| s.me).collect();
    let theirs = states[joiner].cluster_info();
    let mut answer = None;
    for state in states.iter_mut() {
        let mut actions = Vec::new();
        answer = answer.or(state.judge_join(&me, &members, &theirs, &mut actions));
    }
    let answer = answer.expect("somebody answers");
    let mut with = members;
    with.push(me);
    with.sort_by_key(|n| n.nid);
    let taking_part: Vec<bool> = states.iter().map(|s| s.joined || s.me.nid == me.nid).collect();
    states
        .iter_mut()
        .zip(taking_part)
        .filter(|(_, t)| *t)
        .map(|(s, _)| s.accept(&me, with.clone(), answer.clone()))
        .collect()
}

fn formatted(ports: &[u16]) -> Vec<State> {
    let mut states: Vec<State> = ports.iter().map(|p| fresh(node(*p))).collect();
    for i in 0..states.len() {
        join(&mut states, i);
    }
    for state in &mut states {
        state.format(&format_request(), b"plain").expect("valid");
    }
    states
}

fn restart(old: &State) -> State {
    State::new(old.me, STARTUP, old.config, old.epoch(), old.info.nodes.clone())
}

/// The round of recovery, which must begin before the view is published.
fn round_of(actions: &[Action]) -> &Round {
    let publish = actions.iter().position(|a| *a == Action::Publish).expect("published");
    let round = actions[..publish].iter().find_map(|a| match a {
        Action::Recover(round) => Some(round),
        _ => None,
    });
    round.unwrap_or_else(|| panic!("no round before the view: {actions:?}"))
}

fn epochs(states: &[State]) -> Vec<u32> {
    states.iter().map(|s| s.epoch().0).collect()
}

#[test]
fn three_nodes_wait_for_a_format_and_then_serve_at_epoch_1() {
    let mut states: Vec<State> = [1, 2, 3].map(|p| fresh(node(p))).into();
    for i in 0..3 {
        join(&mut states, i);
        assert!(states.iter().all(|s| s.status == ClusterStatus::Wait));
    }
    for s in &mut states {
        let actions = s.format(&format_request(), b"plain").expect("valid");
        assert!(actions.contains(&Action::SaveEpoch) && actions.contains(&Action::WipeStore));
        assert_eq!((s.epoch(), s.status, s.info.nodes.len()), (Epoch(1), ClusterStatus::Ok, 3));
        assert_eq!(s.info.header.block_size_shift, 22);
    }
}

#[test]
fn a_format_with_nonsense_is_refused_and_changes_nothing() {
    let mut states = formatted(&[1]);
    for bad in [
        ClusterRequest { copy_policy: 0x20, ..format_request() },
        ClusterRequest { copies: 32, ..format_request() },
        ClusterRequest { block_size_shift: 9, ..format_request() },
        ClusterRequest { ctime: 0, ..format_request() },
    ] {
        assert_eq!(states[0].format(&bad, b"plain"), Err(ResultCode::INVALID_PARMS));
        assert_eq!(states[0].epoch(), Epoch(1));
    }
}

#[test]
fn every_membership_event_raises_the_epoch_by_one_and_recovers_from_the_one_before() {
    let mut states = formatted(&[1, 2, 3]);
    let gone = states.remove(1);
    let rest: Vec<NodeRecord> = states.iter().map(|s| s.me).collect();
    for s in &mut states {
        let actions = s.leave(&gone.me, rest.clone());
        assert_eq!(s.epoch(), Epoch(2));
        let round = round_of(&actions);
        assert_eq!(
            (round.epoch, round.tgt_epoch, round.old.len(), round.announce),
            (Epoch(2), Epoch(1), 3, true)
        );
    }
    states.push(restart(&gone));
    let actions = join(&mut states, 2);
    assert_eq!(epochs(&states), [3, 3, 3]);
    assert!(actions[2].contains(&Action::StashAll), "the returning node's objects may be outdated");
    assert!(!actions[0].contains(&Action::StashAll));
    assert!(actions[0].iter().any(|a| matches!(a, Action::FetchVdis(Tables::OfJoiner(_)))));
    let asked = |epoch| move |action: &Action| matches!(action, Action::FetchVdis(Tables::OfMembers(from, e)) if (from.len(), *e) == (2, epoch));
    assert!(
        actions[2].iter().any(asked(Epoch(3))),
        "what was said before its join is in tables of this epoch"
    );
}

#[test]
fn a_clean_restart_of_all_nodes_in_any_order_keeps_the_epoch_and_recovers_nothing() {
    for order in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
        let mut old = formatted(&[1, 2, 3]);
        old.iter_mut().for_each(|s| {
            s.shutdown(false);
        });
        let mut states: Vec<State> = order.iter().map(|i| restart(&old[*i])).collect();
        for i in 0..2 {
            join(&mut states, i);
            assert!(states.iter().all(|s| s.status == ClusterStatus::Wait));
        }
        let actions = join(&mut states, 2);
        assert!(states.iter().all(|s| s.status == ClusterStatus::Ok && s.epoch() == Epoch(1)));
        assert!(actions.iter().flatten().all(|a| !matches!(a, Action::Recover(_) | Action::StashAll)));
        assert!(states.iter().all(|s| s.config.shutdown == 0));
    }
}

#[test]
fn an_unclean_restart_recovers_the_same_epoch_without_announcing() {
    let old = formatted(&[1, 2]);
    let mut states: Vec<State> = old.iter().map(restart).collect();
    join(&mut states, 0);
    let actions = join(&mut states, 1);
    for list in actions {
        let round = round_of(&list);
        assert_eq!((round.epoch, round.tgt_epoch, round.announce), (Epoch(1), Epoch(1), false));
    }
}

/// The others logged an epoch with a node that was killed before it had put its objects away: it is not in it.
#[test]
fn a_node_that_died_while_it_joined_has_outdated_objects() {
    let mut states = formatted(&[1, 2, 3]);
    let mut late = restart(&states.remove(2));
    late.config.shutdown = 1;
    let (gone, rest) = (late.me, states.iter().map(|s| s.me).collect::<Vec<_>>());
    for s in &mut states {
        s.leave(&gone, rest.clone());
    }
    states.push(late.clone());
    join(&mut states, 2);
    assert_eq!(epochs(&states), [3, 3, 3]);
    // All are killed; of the last one nothing has reached the disk.
    let mut states = vec![restart(&states[0]), restart(&states[1]), late];
    join(&mut states, 2);
    join(&mut states, 0);
    let actions = join(&mut states, 1);
    assert_eq!(epochs(&states), [3, 3, 3]);
    assert!(
        actions[2].contains(&Action::StashAll) && actions[2].iter().any(|a| matches!(a, Action::Recover(_)))
    );
    assert!(!actions[0].contains(&Action::StashAll) && !actions[1].contains(&Action::StashAll));
}

#[test]
fn the_newest_epoch_anybody_brings_wins_while_waiting() {
    let mut old = formatted(&[1, 2]);
    let rest = vec![old[1].me];
    let gone = old[0].me;
    old[1].leave(&gone, rest);
    let mut states = vec![restart(&old[0]), restart(&old[1])];
    join(&mut states, 0);
    assert_eq!(states[0].status, ClusterStatus::Wait, "node 1 knows only epoch 1 = {{1, 2}}");
    let actions = join(&mut states, 1);
    assert_eq!(epochs(&states), [3, 3]);
    assert!(actions[0].contains(&Action::StashAll), "node 1 was not in epoch 2");
    assert!(!actions[1].contains(&Action::StashAll));
}

#[test]
fn foreign_and_mismatched_nodes_refuse_themselves() {
    let mut states = formatted(&[1, 2]);
    let mut stranger = formatted(&[3]).remove(0);
    stranger.info.header.ctime = 78;
    stranger.config.ctime = 78;
    states.push(restart(&stranger));
    let actions = join(&mut states, 2);
    assert_eq!(
        actions[2],
        [Action::Exit(
            1,
            vec!["joining node ctime doesn't match: 77 vs 78".into(), "failed to join Sheepdog".into()]
        )]
    );

    let mut states = formatted(&[1]);
    let fixed = Startup { auto_vnodes: false, ..STARTUP };
    states.push(State::new(node(2), fixed, StoreConfig::default(), Epoch(0), vec![]));
    let actions = join(&mut states, 1);
    let Action::Exit(1, lines) = &actions[1][0] else { panic!("{actions:?}") };
    assert_eq!(lines[0], "failed to join for vnodes strategy unmatch.  cluster:fixed, joined:auto");

    let mut states = formatted(&[1]);
    let fixed_gateway = Startup { gateway: true, auto_vnodes: false, wildcard: false };
    states.push(State::new(gateway(2), fixed_gateway, StoreConfig::default(), Epoch(0), vec![]));
    join(&mut states, 1);
    assert!(states[1].auto_vnodes(), "a gateway that was never formatted adopts the strategy");
    assert_eq!(epochs(&states), [2, 2]);
}

#[test]
fn gateways_end_when_the_last_storage_node_leaves() {
    let mut states = formatted(&[1]);
    states.push(fresh(gateway(2)));
    states[1].startup.gateway = true;
    join(&mut states, 1);
    let storage = states[0].me;
    let actions = states[1].leave(&storage, vec![gateway(2)]);
    assert!(matches!(actions.last(), Some(Action::Exit(0, _))));
}

#[test]
fn completion_is_complete_when_every_member_of_the_epoch_announced_it() {
    let mut states = formatted(&[1, 2]);
    let s = &mut states[0];
    assert!(s.completed(Epoch(1), node(1).nid).is_empty());
    assert!(s.completed(Epoch(1), node(1).nid).is_empty(), "twice by one node");
    assert!(s.completed(Epoch(0), node(2).nid).is_empty(), "an older epoch");
    let actions = s.completed(Epoch(1), node(2).nid);
    assert_eq!(actions.last(), Some(&Action::Gathered(Epoch(1))));
}

#[test]
fn force_recover_goes_on_with_who_is_there() {
    let old = formatted(&[1, 2, 3]);
    let mut states = vec![restart(&old[0]), restart(&old[1])];
    join(&mut states, 0);
    join(&mut states, 1);
    let members = states[0].info.nodes.clone();
    for s in &mut states {
        assert_eq!(s.force_recover(Epoch(9), members.clone()), Err(ResultCode::FORCE_RECOVER));
        s.force_recover(Epoch(1), members.clone()).expect("waiting");
        assert_eq!((s.status, s.epoch(), s.info.nodes.len()), (ClusterStatus::Ok, Epoch(2), 2));
        assert_eq!(s.force_recover(Epoch(2), members.clone()), Err(ResultCode::FORCE_RECOVER));
    }
    states.push(restart(&old[2]));
    join(&mut states, 2);
    assert_eq!(epochs(&states), [3, 3, 3]);
}

#[test]
fn altered_copies_are_counted_in_each_epoch_anew() {
    let mut states = [fresh(node(1)), fresh(node(2)), fresh(node(3))];
    join(&mut states, 0);
    join(&mut states, 1);
    for state in &mut states[..2] {
        state.format(&format_request(), b"plain").expect("formatted");
        assert_eq!(state.alters(), 0);
        let actions = state.copies_altered();
        assert_eq!(actions.first(), Some(&Action::StashMoved(Epoch(0))), "put away before anybody copies");
        state.copies_altered();
        assert_eq!((state.alters(), state.epoch()), (2, Epoch(1)));
    }
    join(&mut states, 2);
    assert_eq!(states.each_ref().map(|s| (s.alters(), s.epoch())), [(0, Epoch(2)); 3]);
}
