"""The choice of endpoints: shares follow weights, and nobody gets who must not be got."""

from collections import Counter, OrderedDict
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from vipd.backends.userspace.forwarder.affinity import Affinity
from vipd.backends.userspace.forwarder.balance import Load, balance, spot_of
from vipd.backends.userspace.forwarder.crowd import Crowd
from vipd.backends.userspace.forwarder.served import Served
from vipd.backends.userspace.objects import Forwarding, Place, Surroundings
from vipd.proxy.model import Algorithm
from vipd.proxy.names import Family, Protocol, parse_address
from vipd.proxy.virtualserver import Endpoint

SPOTS = [(parse_address(f"10.244.{i // 4}.{i % 4}"), 8080 + i % 2) for i in range(12)]
ALGORITHMS = st.sampled_from(Algorithm)
RANDOMS = st.randoms(use_true_random=False)
CLIENTS = st.sampled_from([f"192.0.2.{i}" for i in range(6)])
PLACE = Place(Family.IPV4, Protocol.TCP, parse_address("10.96.0.1"), 80)


def endpoints(least: int = 0, heaviest: int = 9) -> st.SearchStrategy[tuple[Endpoint, ...]]:
    return st.dictionaries(
        st.sampled_from(SPOTS), st.integers(1, heaviest), min_size=least, max_size=8
    ).map(lambda made: tuple(Endpoint(*spot, made[spot]) for spot in sorted(made)))


def loads(listed: tuple[Endpoint, ...]) -> list[Load]:
    return [Load(one) for one in listed]


@given(endpoints(least=1), RANDOMS, st.integers(1, 5))
def test_round_robin_is_exact_in_each_round(
    listed: tuple[Endpoint, ...], random: Random, rounds: int
) -> None:
    turn = balance(Algorithm.ROUND_ROBIN, loads(listed), random.random)
    total = sum(one.weight for one in listed)
    counts = Counter(turn.choose("", 0, frozenset()) for _ in range(rounds * total))
    for one in listed:
        assert abs(counts[one] - rounds * one.weight) <= 1


@given(endpoints(least=2, heaviest=1), RANDOMS)
def test_round_robin_of_equals_never_repeats_one(
    listed: tuple[Endpoint, ...], random: Random
) -> None:
    turn = balance(Algorithm.ROUND_ROBIN, loads(listed), random.random)
    for _ in range(3):
        assert {turn.choose("", 0, frozenset()) for _ in listed} == set(listed)


@given(endpoints(least=1), endpoints(least=1), RANDOMS)
def test_a_change_of_endpoints_gives_nobody_a_burst(
    old: tuple[Endpoint, ...], new: tuple[Endpoint, ...], random: Random
) -> None:
    before = balance(Algorithm.ROUND_ROBIN, loads(old), random.random)
    for _ in range(50):
        before.choose("", 0, frozenset())
    after = balance(Algorithm.ROUND_ROBIN, loads(new), random.random, before)
    counts = Counter(
        after.choose("", 0, frozenset()) for _ in range(sum(one.weight for one in new))
    )
    for one in new:
        assert abs(counts[one] - one.weight) <= 1


@given(endpoints(least=2), st.data(), RANDOMS)
def test_who_was_passed_over_gets_no_burst_later(
    listed: tuple[Endpoint, ...], data: st.DataObject, random: Random
) -> None:
    passed = {spot_of(data.draw(st.sampled_from(listed)))}
    turn = balance(Algorithm.ROUND_ROBIN, loads(listed), random.random)
    for _ in range(100):
        one = turn.choose("", 0, passed)
        assert one is not None
        assert spot_of(one) not in passed
    total = sum(one.weight for one in listed)
    counts = Counter(turn.choose("", 0, frozenset()) for _ in range(total))
    for one in listed:
        assert abs(counts[one] - one.weight) <= 1 + one.weight // 9 + 1


@given(endpoints(least=1))
def test_random_shares_are_the_weights(listed: tuple[Endpoint, ...]) -> None:
    """Every part of the range of chances belongs to one endpoint, as much of it as it weighs."""
    total = sum(one.weight for one in listed)
    counts = Counter(
        balance(Algorithm.RANDOM, loads(listed), lambda at=at: (at + 0.5) / total).choose(  # type: ignore[misc]
            "", 0, frozenset()
        )
        for at in range(total)
    )
    assert counts == {one: one.weight for one in listed}


@given(endpoints(least=1), endpoints(least=1), CLIENTS, st.integers(1, 65535), RANDOMS)
def test_hashes_depend_on_nothing_but_the_client_and_the_endpoints(
    listed: tuple[Endpoint, ...],
    before: tuple[Endpoint, ...],
    client: str,
    port: int,
    random: Random,
) -> None:
    for algorithm in (Algorithm.SOURCE_HASH, Algorithm.MAGLEV):
        old = balance(algorithm, loads(before), random.random)
        old.choose(client, port, frozenset())
        new = balance(algorithm, loads(listed), random.random, old)
        other = balance(algorithm, loads(listed), random.random)
        assert new.choose(client, port, frozenset()) == other.choose(client, port, frozenset())
    same = balance(Algorithm.SOURCE_HASH, loads(listed), random.random)
    assert len({same.choose(client, one, frozenset()) for one in range(20)}) == 1


@given(endpoints(least=2, heaviest=1))
def test_hash_shares_are_fair(listed: tuple[Endpoint, ...]) -> None:
    table = balance(Algorithm.MAGLEV, loads(listed), lambda: 0.0)
    counts = Counter(table.choose("192.0.2.1", port, frozenset()) for port in range(2000))
    for one in listed:
        assert 0.6 <= counts[one] * len(listed) / 2000 <= 1.4


@given(endpoints(least=1), st.data(), RANDOMS)
def test_least_connections_keeps_the_levels_even(
    listed: tuple[Endpoint, ...], data: st.DataObject, random: Random
) -> None:
    carried = loads(listed)
    by_spot = {spot_of(one.endpoint): one for one in carried}
    turn = balance(Algorithm.LEAST_CONNECTIONS, carried, random.random)
    for _ in range(60):
        endpoint = turn.choose("", 0, frozenset())
        assert endpoint is not None
        load = by_spot[spot_of(endpoint)]
        level = load.connections / endpoint.weight
        assert level == min(one.connections / one.endpoint.weight for one in carried)
        load.connections += 1


@given(ALGORITHMS, endpoints(), st.sets(st.sampled_from(SPOTS)), CLIENTS, RANDOMS)
def test_the_passed_over_are_never_chosen_and_the_others_are(
    algorithm: Algorithm,
    listed: tuple[Endpoint, ...],
    passed: set[tuple[object, int]],
    client: str,
    random: Random,
) -> None:
    turn = balance(algorithm, loads(listed), random.random)
    left = {one for one in listed if spot_of(one) not in passed}
    for port in range(10):
        chosen = turn.choose(client, port, {one for one in SPOTS if one in passed})
        assert chosen in left if left else chosen is None


@st.composite
def stories(draw: st.DrawFn) -> list[tuple[str, int, int, float]]:
    """What happens: clients connect, connections fail or end, endpoints change, time goes by."""
    verbs = st.sampled_from(["connect", "connect", "fail", "retry", "change", "answer"])
    step = st.tuples(verbs, st.integers(0, 11), st.integers(0, 5), st.floats(0, 20))
    return draw(st.lists(step, max_size=60))


@given(stories(), ALGORITHMS, st.booleans(), RANDOMS, st.data())
def test_whatever_happens(
    story: list[tuple[str, int, int, float]],
    algorithm: Algorithm,
    sticks: bool,
    random: Random,
    data: st.DataObject,
) -> None:
    listed = data.draw(endpoints(least=1))

    def forwarding() -> Forwarding:
        return Forwarding(
            owner="a/b",
            inside=listed,
            outside=listed,
            algorithm=algorithm,
            affinity_seconds=30 if sticks else None,
        )

    it = Served(PLACE, forwarding(), Surroundings(), random.random)
    now = 0.0
    for verb, which, who, later in story:
        now += later
        client = f"192.0.2.{who}"
        there = {spot_of(one) for one in listed}
        match verb:
            case "connect" | "answer":
                chosen = it.choose(client, which, now)
                assert (chosen is None) == (not listed)
                if chosen is not None:
                    assert chosen in listed
                    it.began(client, chosen, now)
                    if sticks:
                        assert it.choose(client, which + 1, now) == chosen
                    if verb == "answer":
                        it.ended(chosen)
            case "fail":
                it.failed(Endpoint(*SPOTS[which]), now)
            case "retry":
                tried: list[Endpoint] = []
                while (one := it.choose(client, which, now, tried)) is not None:
                    assert spot_of(one) not in {spot_of(gone) for gone in tried}
                    tried.append(one)
                    it.withdrawn(one)
                assert {spot_of(one) for one in tried} == there, "all of them had their turn"
            case "change":
                listed = data.draw(endpoints())
                it.update(forwarding(), Surroundings())
                there = {spot_of(one) for one in listed}
        report = it.told()
        aside = [one for one in report.endpoints if one.set_aside_until is not None]
        assert len(aside) <= len(listed) // 2
        assert not any(one.departed for one in aside)
        assert there <= {(parse_address(one.address), one.port) for one in report.endpoints}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["choose", "choose", "began", "failed", "withdrawn", "ended", "taken", "change"]
            ),
            st.integers(0, 100),
        ),
        max_size=80,
    ),
    ALGORITHMS,
    RANDOMS,
    st.data(),
)
def test_loads_are_what_is_open_and_pending_and_nothing_leaks(
    story: list[tuple[str, int]], algorithm: Algorithm, random: Random, data: st.DataObject
) -> None:
    listed = data.draw(endpoints(least=1))

    def forwarding() -> Forwarding:
        return Forwarding(owner="a/b", inside=listed, outside=listed, algorithm=algorithm)

    it = Served(PLACE, forwarding(), Surroundings(), random.random)
    pending: list[Endpoint] = []
    is_open: list[Endpoint] = []
    for now, (verb, which) in enumerate([*story, *[("failed", 0), ("ended", 0)] * 80]):
        match verb:
            case "choose":
                if (chosen := it.choose("192.0.2.1", which, now)) is not None:
                    pending.append(chosen)
            case "began" if pending:
                is_open.append(pending.pop(which % len(pending)))
                it.began("192.0.2.1", is_open[-1], now)
            case "failed" if pending:
                it.failed(pending.pop(which % len(pending)), now)
            case "withdrawn" if pending:
                it.withdrawn(pending.pop(which % len(pending)))
            case "ended" if is_open:
                it.ended(is_open.pop(which % len(is_open)))
            case "taken":
                there = pending if which % 2 else is_open
                there.append(Endpoint(*SPOTS[which % len(SPOTS)]))
                it.takes_over("192.0.2.1", there[-1], now, pending=there is pending)
            case "change":
                listed = data.draw(endpoints())
                it.update(forwarding(), Surroundings())
        carried = it._loads.items()
        for kind, some in (("pending", pending), ("connections", is_open)):
            counted = {spot: getattr(load, kind) for spot, load in carried if getattr(load, kind)}
            assert counted == Counter(map(spot_of, some))
        spots = {spot_of(one) for one in (*listed, *pending, *is_open)}
        assert {spot for spot, _ in carried} == spots, "who left goes with its last connection"
    assert not pending
    assert not is_open


@given(
    st.lists(st.tuples(st.integers(0, 20), st.floats(0, 8), st.sampled_from(SPOTS)), max_size=80),
    st.integers(1, 10),
)
def test_affinity_remembers_the_last_clients_for_their_time(
    visits: list[tuple[int, float, tuple[object, int]]], most: int
) -> None:
    it = Affinity(10, most)
    model: OrderedDict[str, tuple[object, float]] = OrderedDict()
    now = 0.0
    for who, later, spot in visits:
        now += later
        client = str(who)
        known = model.get(client)
        expected = known[0] if known is not None and now - known[1] < 10 else None
        assert it.of(client, now) == expected
        it.stays(client, next(one for one in SPOTS if one == spot), now)
        model[client] = (spot, now)
        model.move_to_end(client)
        for gone in [one for one, (_, seen) in model.items() if now - seen >= 10]:
            del model[gone]
        if len(model) > most:
            model.popitem(last=False)
        assert len(it) <= most


@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "use", "remove"]), st.integers(0, 3), st.integers(0, 5)),
        max_size=80,
    )
)
def test_first_to_go_is_the_idlest_of_the_client_that_has_most(
    steps: list[tuple[str, int, int]],
) -> None:
    it: Crowd[tuple[str, int]] = Crowd()
    used: dict[tuple[str, int], int] = {}
    touched: dict[str, int] = {}
    for at, (verb, who, which) in enumerate(steps):
        client, session = str(who), (str(who), which)
        if verb == "add" and session not in used:
            it.add(client, session)
        elif verb == "use" and session in used:
            it.used(client, session)
        elif verb == "remove" and session in used:
            it.remove(client, session)
            del used[session]
            touched[client] = at
            continue
        else:
            continue
        used[session] = touched[client] = at
        sizes = Counter(one for one, _ in used)
        assert len(it) == len(used)
        assert all(it.size_of(one) == size for one, size in sizes.items())
        assert it.size_of("nobody") == 0
        biggest = max(sizes.values())
        victim = it.idlest()
        assert sizes[victim[0]] == biggest
        assert used[victim] == min(when for one, when in used.items() if one[0] == victim[0])
        equals = [one for one, size in sizes.items() if size == biggest]
        assert touched[victim[0]] == min(touched[one] for one in equals)
