"""Slots: every endpoint has its share, and as little as possible moves."""

from collections import Counter
from collections.abc import Sequence
from math import gcd
from random import Random

from hypothesis import assume, given
from hypothesis import strategies as st

from vipd.backends.slots import MAGLEV_SIZES, MOST_SLOTS, assign, maglev
from vipd.proxy.names import Address, parse_address
from vipd.proxy.virtualserver import Endpoint

PLACES = [(parse_address(f"10.244.{i // 4}.{i % 4}"), 8080 + i % 2) for i in range(12)]
Place = tuple[Address, int]


def lists_of_endpoints(
    most: int = 8, heaviest: int = 6, least: int = 0
) -> st.SearchStrategy[list[Endpoint]]:
    return st.dictionaries(
        st.sampled_from(PLACES), st.integers(1, heaviest), min_size=least, max_size=most
    ).map(
        lambda made: [Endpoint(*place, weight) for place, weight in sorted(made.items(), key=str)]
    )


def shares(endpoints: Sequence[Endpoint]) -> dict[Place, int]:
    divisor = gcd(*(one.weight for one in endpoints)) or 1
    return {(one.address, one.port): one.weight // divisor for one in endpoints}


def places(slots: Sequence[Endpoint]) -> list[Place]:
    return [(one.address, one.port) for one in slots]


@given(st.lists(lists_of_endpoints(), min_size=1, max_size=6))
def test_every_endpoint_has_its_share_whatever_was_before(history: list[list[Endpoint]]) -> None:
    slots: tuple[Endpoint, ...] = ()
    for endpoints in history:
        slots = assign(slots, endpoints)
        assert Counter(places(slots)) == shares(endpoints)
        assert set(slots) <= set(endpoints), "what is known of an endpoint now, not what was"


@given(lists_of_endpoints(), lists_of_endpoints())
def test_no_assignment_moves_less(old: list[Endpoint], new: list[Endpoint]) -> None:
    before = places(assign((), old))
    after = places(assign(assign((), old), new))
    stayed = sum(was == now for was, now in zip(before, after, strict=False))
    could_stay = Counter(before[: len(after)]) & Counter(shares(new))
    assert stayed == could_stay.total()


@given(lists_of_endpoints(), st.randoms(use_true_random=False))
def test_the_same_endpoints_stay_where_they_are(endpoints: list[Endpoint], random: Random) -> None:
    slots = list(assign((), endpoints))
    random.shuffle(slots)
    assert assign(slots, endpoints) == tuple(slots)


@given(st.lists(st.sampled_from([Endpoint(*place) for place in PLACES])), lists_of_endpoints())
def test_any_memory_of_the_kernel_is_good_enough(
    before: list[Endpoint], endpoints: list[Endpoint]
) -> None:
    assert Counter(places(assign(before, endpoints))) == shares(endpoints)


@given(lists_of_endpoints(heaviest=1, least=1), st.data())
def test_a_maglev_table_is_complete_and_fair(
    endpoints: list[Endpoint], data: st.DataObject
) -> None:
    counts = Counter(places(maglev(tuple(endpoints))))
    assert counts.total() == MAGLEV_SIZES[0]
    assert counts.keys() == shares(endpoints).keys()
    assert max(counts.values()) - min(counts.values()) <= MAGLEV_SIZES[0] * 0.1
    assert maglev(tuple(endpoints)) == maglev.__wrapped__(tuple(endpoints))


@given(lists_of_endpoints(most=4, heaviest=4, least=1))
def test_a_heavier_endpoint_has_more_of_a_maglev_table(endpoints: list[Endpoint]) -> None:
    counts = Counter(places(maglev(tuple(endpoints))))
    wanted = shares(endpoints)
    for place, share in wanted.items():
        fair = MAGLEV_SIZES[0] * share / sum(wanted.values())
        assert abs(counts[place] - fair) <= max(wanted.values()) + 1


@given(lists_of_endpoints(heaviest=1, least=3), st.data())
def test_little_of_a_maglev_table_moves_when_an_endpoint_goes(
    endpoints: list[Endpoint], data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(endpoints))
    before = maglev(tuple(endpoints))
    after = maglev(tuple(one for one in endpoints if one != gone))
    moved = sum(was != now for was, now in zip(before, after, strict=True) if was != gone)
    assume(gone not in after)
    assert moved <= MAGLEV_SIZES[0] * 0.12


def test_many_heavy_endpoints_all_have_a_place_in_a_maglev_table() -> None:
    heavy = [Endpoint(parse_address(f"10.0.0.{i}"), 80, 100 if i else 99) for i in range(20)]
    assert len(set(maglev(tuple(heavy)))) == 20


def test_there_are_never_more_slots_than_numbers() -> None:
    many = [
        Endpoint(parse_address(f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}"), 80) for i in range(65600)
    ]
    assert len(assign((), many)) <= MOST_SLOTS
