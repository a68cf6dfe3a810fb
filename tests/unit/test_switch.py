"""The decisions of a switch: what follows from what, and what a restart makes of it."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from vipd.proxy.switch import (
    Action,
    Asked,
    BringUp,
    Broken,
    Committed,
    Counted,
    Drain,
    Event,
    Probe,
    Probed,
    Record,
    Removed,
    Retire,
    Say,
    Shortened,
    State,
    Step,
    Verified,
    Verify,
    decide,
    due,
    found,
    restarted,
)

N, I, V = "nftables", "iptables", "ipvs"  # noqa: E741 - as docs/switching.md calls them
AT_REST = State(serving=N)


def follow(state: State, *events: Event) -> tuple[State, list[Action]]:
    """Return where the events lead, and every action on the way."""
    done: list[Action] = []
    for event in events:
        state, actions = decide(state, event)
        done += actions
    return state, done


ASKED, FITS, PROGRAMMED = Asked(V, 300.0), Probed(), Committed()


def test_a_switch_probes_overlaps_verifies_and_only_then_retires_the_old_one() -> None:
    state, done = follow(AT_REST, ASKED, FITS, PROGRAMMED, Verified("", now=1000.0))
    assert done == [Probe(V), BringUp(V), Verify(V), Retire(N), Say()]
    assert state == State(serving=V, drains=(Drain(N, 1300.0),))


def test_the_old_one_serves_until_the_new_one_is_verified() -> None:
    for events in ([ASKED], [ASKED, FITS], [ASKED, FITS, PROGRAMMED]):
        state, done = follow(AT_REST, *events)
        assert state.serving == N
        assert not any(isinstance(one, Retire) for one in done)


def test_the_mode_that_serves_is_no_switch() -> None:
    assert decide(AT_REST, Asked(N, 1.0)) == (AT_REST, (Say(),))


def test_a_drain_can_be_shortened_but_not_made_longer() -> None:
    state, _ = decide(DRAINING, Shortened(DRAINING.drains[0].deadline + 1))
    assert state == DRAINING
    state, actions = decide(DRAINING, Shortened(7.0))
    assert ([one.deadline for one in state.drains], actions) == ([7.0], ())
    state, _ = decide(state, Counted(state.drains[0].mode, 5, 8.0))
    assert state.drains[0].removing


@pytest.mark.parametrize("events", [[ASKED], [ASKED, FITS], [ASKED, FITS, PROGRAMMED]], ids=len)
def test_there_is_one_switch_at_a_time(events: list[Event]) -> None:
    state, _ = follow(AT_REST, *events)
    after, (said,) = decide(state, Asked(I, 1.0))
    assert after == state
    assert isinstance(said, Say)
    assert "a switch to ipvs is under way" in said.failure


def test_what_the_host_lacks_is_said_and_nothing_done() -> None:
    state, done = follow(AT_REST, ASKED, Probed(missing=("no ip_vs: modprobe ip_vs",)))
    assert state == AT_REST
    assert done == [
        Probe(V), Say("mode ipvs does not work here: no ip_vs: modprobe ip_vs")
    ]  # fmt: skip


def test_what_the_host_lacks_cannot_be_forced() -> None:
    state, _ = follow(AT_REST, Asked(V, 1.0, force=True), Probed(missing=("no ip_vs",)))
    assert state == AT_REST


def test_what_cannot_be_served_is_listed_and_can_be_forced() -> None:
    unserved = Probed(unserved=tuple(f"default/s{n}" for n in range(7)))
    state, done = follow(AT_REST, ASKED, unserved)
    assert state == AT_REST
    assert done[-1] == Say(
        "mode ipvs cannot serve: default/s0; default/s1; default/s2; default/s3; default/s4; "
        "and 2 more (--force to go on)"
    )
    state, done = follow(AT_REST, Asked(V, 1.0, force=True), unserved)
    assert done == [Probe(V), BringUp(V)]
    assert state.step is Step.OVERLAP


@pytest.mark.parametrize(
    "last",
    [
        [Broken("nft died")],
        [Committed(rejected=("10.96.0.1:80/TCP: no",))],
        [PROGRAMMED, Verified("delete element …", 1.0)],
        [PROGRAMMED, Broken("cannot be observed")],
    ],
    ids=str,
)
def test_what_goes_wrong_removes_the_new_one_and_keeps_the_old(last: list[Event]) -> None:
    state, done = follow(AT_REST, ASKED, FITS, *last)
    assert state == State(serving=N, drains=(Drain(V, 0.0, removing=True),))
    assert done[-2] == Retire(V)
    assert isinstance(done[-1], Say)
    assert done[-1].failure
    assert decide(state, Removed(V)) == (AT_REST, ())


def test_what_the_kernel_refuses_can_be_forced() -> None:
    state, done = follow(
        AT_REST, Asked(V, 1.0, force=True), FITS, Committed(rejected=("10.96.0.1:80/TCP: no",))
    )
    assert done[-1] == Verify(V)
    assert state.step is Step.VERIFY


DRAINING = State(serving=N, drains=(Drain(V, 500.0, 3),))


def test_a_drain_ends_with_its_last_flow_or_at_the_deadline() -> None:
    assert counted(2, 499.0) == Drain(V, 500.0, 2)
    assert counted(0, 499.0) == Drain(V, 500.0, 0, removing=True)
    assert counted(2, 500.0) == Drain(V, 500.0, 2, removing=True)


def counted(flows: int | None, now: float) -> Drain:
    state, actions = decide(DRAINING, Counted(V, flows, now))
    assert actions == ()
    (drain,) = state.drains
    return drain


def test_it_stands_there_until_it_is_removed() -> None:
    state, _ = follow(DRAINING, Counted(V, 0, 499.0), Counted(V, 3, 499.0))
    assert state.drains == (Drain(V, 500.0, 0, removing=True),)
    assert decide(state, Removed(V)) == (AT_REST, ())


def test_flows_that_cannot_be_counted_have_until_the_deadline() -> None:
    assert counted(None, 499.0) == Drain(V, 500.0, 3)
    assert counted(None, 500.0) == Drain(V, 500.0, 3, removing=True)


@pytest.mark.parametrize(
    "event", [FITS, PROGRAMMED, Verified("", 1.0), Broken("x")], ids=lambda one: type(one).__name__
)
def test_an_event_of_another_step_means_nothing(event: Event) -> None:
    for events in ([], [ASKED], [ASKED, FITS], [ASKED, FITS, PROGRAMMED]):
        state, _ = follow(AT_REST, *events)
        expected = {
            Step.PROBE: Probed,
            Step.OVERLAP: Committed | Broken,
            Step.VERIFY: Verified | Broken,
        }.get(state.step) if state.step else None  # fmt: skip
        if expected is None or not isinstance(event, expected):
            assert decide(state, event) == (state, ())


def test_what_went_wrong_is_told_in_short() -> None:
    long = "\n".join("x" * 1000 for _ in range(1000))
    _, done = follow(AT_REST, ASKED, FITS, PROGRAMMED, Verified(long, 1.0))
    said = done[-1]
    assert isinstance(said, Say)
    assert len(said.failure) < 10_000
    assert said.failure.endswith("… 1000 lines in all")


def test_a_count_that_comes_late_means_nothing() -> None:
    assert decide(AT_REST, Counted(V, 0, 1.0)) == (AT_REST, ())


def test_a_third_mode_leaves_two_that_drain() -> None:
    state, done = follow(DRAINING, Asked(I, 100.0), FITS, PROGRAMMED, Verified("", 450.0))
    assert state == State(serving=I, drains=(Drain(V, 500.0, 3), Drain(N, 550.0)))
    assert done[-2] == Retire(N)


def test_the_way_back_takes_up_what_drains() -> None:
    state, done = follow(DRAINING, ASKED, FITS)
    assert state.drains == ()
    state, done = follow(state, PROGRAMMED, Verified("", 450.0))
    assert state == State(serving=V, drains=(Drain(N, 750.0),))
    assert Retire(V) not in done


def test_a_failed_way_back_lets_it_drain_on_to_its_old_deadline() -> None:
    state, done = follow(DRAINING, ASKED, FITS, Broken("no"))
    assert state == DRAINING
    assert done[-2:] == [Retire(V), Say("no")]


MODES = st.sampled_from([N, I, V])
EVENTS = st.one_of(
    st.builds(Asked, MODES, st.floats(0, 900), st.booleans()),
    st.builds(Probed, st.sampled_from([(), ("x",)]), st.sampled_from([(), ("x",)])),
    st.builds(Committed, st.sampled_from([(), ("x",)])),
    st.builds(Verified, st.sampled_from(["", "x"]), st.floats(0, 2000)),
    st.builds(Broken, st.just("x")),
    st.builds(Counted, MODES, st.sampled_from([None, 0, 5]), st.floats(0, 2000)),
    st.builds(Removed, MODES),
    st.builds(Shortened, st.floats(0, 2000)),
)


@given(st.lists(EVENTS, max_size=30))
def test_whatever_happens_a_mode_stands_at_one_place_and_serving_is_never_removed(
    events: list[Event],
) -> None:
    state = AT_REST
    for event in events:
        state, actions = decide(state, event)
        places = [state.serving, *(one.mode for one in state.drains)]
        if state.step is not None and state.step is not Step.PROBE:
            assert state.target is not None
            places.append(state.target)
        assert len(set(places)) == len(places)
        assert (state.target is None) == (state.step is None)
        for action in actions:
            if isinstance(action, Retire):
                assert action.mode != state.serving
        after = restarted(Record(N, state), N, N)
        assert after.serving not in {one.mode for one in after.drains}
        assert after.target is None


# Restart


def record(state: State, configured: str = N) -> Record:
    return Record(configured, state)


def test_a_first_start_serves_what_is_configured() -> None:
    assert restarted(None, I, I) == State(serving=I)


def test_a_restart_keeps_the_mode_that_was_switched_to() -> None:
    state = State(serving=V, drains=(Drain(N, 9.0),))
    assert restarted(record(state), N, N) == state


def test_another_configuration_wins_over_what_was_switched_to() -> None:
    state = State(serving=V, drains=(Drain(I, 9.0),))
    assert restarted(record(state), I, I) == State(serving=I)


@pytest.mark.parametrize("events", [[ASKED], [ASKED, FITS], [ASKED, FITS, PROGRAMMED]], ids=len)
def test_a_switch_that_was_not_verified_is_undone_by_a_restart(events: list[Event]) -> None:
    state, _ = follow(AT_REST, *events)
    assert restarted(record(state), N, N) == AT_REST


def test_a_crash_on_the_way_back_lets_it_drain_on() -> None:
    state, _ = follow(DRAINING, ASKED, FITS)
    assert restarted(record(state), N, N) == DRAINING


def test_a_record_survives_its_file() -> None:
    state, _ = follow(DRAINING, ASKED, FITS)
    written = msgspec.json.encode(record(state))
    assert msgspec.json.decode(written, type=Record) == record(state)


def test_what_is_found_at_a_start_drains() -> None:
    state, done = found(DRAINING, [I, V], 60.0, now=100.0)
    assert state.drains == (Drain(V, 500.0, 3), Drain(I, 160.0))
    assert done == (Retire(V), Retire(I))


def test_a_deadline_of_before_a_boot_is_none() -> None:
    late = State(serving=N, drains=(Drain(V, 1e9),))
    state, _ = found(late, [V], 60.0, now=100.0)
    assert state.drains == (Drain(V, 86500.0),)


def test_what_is_not_found_any_more_does_not_drain() -> None:
    assert found(DRAINING, [], 60.0, now=100.0) == (AT_REST, ())


# Modes that answer on the address itself

U = "userspace"


def test_from_ipvs_to_userspace_another_mode_serves_until_ipvs_has_drained() -> None:
    asked = Asked(U, 300.0)
    state, actions = decide(State(serving=V), asked)
    assert (state.target, actions) == (U, (Probe(U),))
    state, actions = decide(state, Probed())
    assert actions == (Probe(N),)
    assert (state.target, state.then) == (N, asked)
    for event in (Probed(), Committed(), Verified("", 1000.0)):
        state, actions = decide(state, event)
    assert actions == (Retire(V), Say())
    assert state == State(serving=N, drains=(Drain(V, 1300.0),), then=asked)
    assert due(state) is None
    state, _ = decide(state, Removed(V))
    assert due(state) == asked
    state, actions = decide(state, asked)
    assert (state.target, state.then, actions) == (U, None, (Probe(U),))


def test_where_nftables_does_not_work_iptables_serves_meanwhile() -> None:
    state, _ = decide(State(serving=U), Asked(V, 300.0))
    state, _ = decide(state, Probed())
    state, actions = decide(state, Probed(missing=("no nft",)))
    assert (state.target, actions) == (I, (Probe(I),))
    state, actions = decide(state, Probed(missing=("no iptables",)))
    assert state == State(serving=U)
    assert isinstance(actions[0], Say)
    assert "no iptables" in actions[0].failure


@pytest.mark.parametrize("found", [Probed(missing=("no ip_vs",)), Probed(unserved=("a: no",))])
def test_nothing_is_left_for_a_mode_that_does_not_work_here(found: Probed) -> None:
    state, _ = decide(State(serving=U), Asked(V, 300.0))
    state, (said,) = decide(state, found)
    assert state == State(serving=U)
    assert isinstance(said, Say)
    assert said.failure


def test_what_drains_makes_it_wait_too_and_another_wish_replaces_it() -> None:
    asked = Asked(U, 300.0)
    draining = State(serving=N, drains=(Drain(V, 500.0, 3),))
    state, actions = decide(draining, asked)
    assert (state, actions) == (structs.replace(draining, then=asked), (Say(),))
    assert decide(state, Asked(N, 300.0))[0].then is None
    back, actions = decide(state, Asked(V, 300.0))
    assert (back.target, back.then, actions) == (V, None, (Probe(V),))


def test_a_configured_mode_that_clashes_with_the_one_before_waits_over_the_restart() -> None:
    state = restarted(Record(V, State(serving=V)), U, U)
    assert (state.serving, state.then) == (N, Asked(U, 0.0, force=True))
    waiting = State(serving=N, drains=(Drain(V, 500.0),), then=Asked(U, 300.0))
    assert restarted(Record(V, waiting), V, V).then == Asked(U, 300.0)
