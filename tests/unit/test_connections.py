"""Connections are added up over readings, over new counters, over modes, and never without end."""

from collections.abc import Iterable

import pytest
from immutables import Map

from vipd.backends.counts import Count, Outcome
from vipd.proxy.metrics.connections import OTHERS, Connections
from vipd.proxy.names import Family, NamespacedName, Protocol, ServicePortName, parse_address
from vipd.proxy.virtualserver import Endpoint, Key, Kind, NodeNetwork, Table, VirtualServer

END = "10.244.0.1:80"


def owner(number: int) -> ServicePortName:
    return ServicePortName(NamespacedName("shop", f"web-{number}"), "http", Protocol.TCP)


def given(number: int, *, at: str = "a", of: int = 1, end: str = END) -> Count:
    return Count(at, owner(of), end, Outcome.GIVEN, number)


def read(sums: Connections, *counts: Count, mode: str = "nftables") -> None:
    reading = sums.reading(mode)
    reading.take(counts)
    reading.done()


def total(sums: Connections, of: int = 1) -> int:
    assert (
        sum(n for (one, _), n in sums.endpoints.items() if one == owner(of))
        == (sums.services[owner(of)][Outcome.GIVEN])
    )
    return sums.services[owner(of)][Outcome.GIVEN]


def test_what_comes_is_added() -> None:
    sums = Connections()
    read(sums, given(3), given(2, at="b"))
    assert total(sums) == 5
    read(sums, given(3), given(9, at="b"))
    assert total(sums) == 12


def test_a_counter_that_begins_anew_takes_nothing_away() -> None:
    sums = Connections()
    read(sums, given(7))
    read(sums, given(2))
    assert total(sums) == 9


def test_a_counter_comes_twice_where_its_map_is_changed_meanwhile() -> None:
    sums = Connections()
    read(sums, given(7), given(7))
    read(sums, given(8), given(8))
    assert total(sums) == 8


def test_a_counter_that_one_listing_passed_over_is_known_after_it() -> None:
    sums = Connections()
    read(sums, given(7))
    read(sums)
    read(sums, given(8))
    assert total(sums) == 8
    read(sums)
    read(sums)
    read(sums, given(1))  # another one by now
    assert total(sums) == 9


def test_what_a_reading_does_not_come_to_stays_as_it_was() -> None:
    sums = Connections()
    read(sums, given(7), given(5, at="b"))
    for _ in range(3):
        reading = sums.reading("nftables")
        reading.take([given(8)])
        reading.broken_off()
    read(sums, given(8), given(6, at="b"))
    assert total(sums) == 14


def test_another_mode_goes_on_from_there_and_back_again() -> None:
    sums = Connections()
    read(sums, given(7))
    read(sums, given(2), mode="iptables")
    read(sums, given(8))  # its rules were still there
    assert total(sums) == 10


def test_beyond_the_most_all_are_one() -> None:
    sums = Connections(most_services=2, most_endpoints=2)
    for number in range(1, 6):
        read(sums, *(given(10 * each, at=str(each), of=each) for each in range(1, number + 1)))
    assert set(sums.services) == {owner(1), owner(2), OTHERS}
    assert sums.services[OTHERS][Outcome.GIVEN] == 30 + 40 + 50
    assert sums.endpoints == {(owner(1), END): 10, (owner(2), END): 20, (OTHERS, ""): 120}
    read(sums, given(1, at="x", of=1, end="10.244.0.9:80"))  # of a known service, one too many
    assert sums.services[owner(1)][Outcome.GIVEN] == 11
    assert sums.endpoints[OTHERS, ""] == 121


def table(*servers: VirtualServer) -> Table:
    by_service: dict[NamespacedName, tuple[VirtualServer, ...]] = {}
    for one in servers:
        by_service[one.owner.service] = (*by_service.get(one.owner.service, ()), one)
    return Table(Map(by_service), Map({one.key: (one,) for one in servers}), Map(), NodeNetwork())


def server(of: int, ends: Iterable[str]) -> VirtualServer:
    key = Key(Family.IPV4, parse_address(f"10.96.0.{of}"), Protocol.TCP, 80)
    cluster = tuple(Endpoint(parse_address(one), 80) for one in ends)
    return VirtualServer(key=key, owner=owner(of), kind=Kind.CLUSTER, cluster=cluster, local=())


def test_what_is_gone_is_forgotten_and_makes_room() -> None:
    sums = Connections(most_services=2)
    read(sums, given(1), given(2, at="b", end="10.244.0.2:80"), given(3, at="c", of=2))
    read(sums, given(4, at="d", of=3))
    sums.keep(table(server(1, ["10.244.0.1"]), server(3, ["10.244.0.1"])))
    assert sums.endpoints == {(owner(1), END): 1, (OTHERS, ""): 4}
    assert set(sums.services) == {owner(1), OTHERS}


def listed(asked: int, admitted: int) -> tuple[Count, Count]:
    return (
        Count("a", owner(1), "", Outcome.ASKED, asked),
        Count("b", owner(1), "", Outcome.ADMITTED, admitted),
    )


@pytest.mark.parametrize(("asked", "admitted", "denied"), [(9, 4, 5), (4, 4, 0), (3, 4, 0)])
def test_who_is_not_admitted_is_denied(asked: int, admitted: int, denied: int) -> None:
    sums = Connections()
    read(sums, *listed(asked, admitted))
    assert sums.denied(owner(1)) == denied
    assert sums.endpoints == {}


def test_denied_never_goes_down_though_its_two_lists_are_of_two_moments() -> None:
    sums = Connections()
    found = []
    for asked, admitted in ((10, 4), (20, 17), (30, 17), (30, 25), (40, 26)):
        read(sums, *listed(asked, admitted))
        found.append(sums.denied(owner(1)))
    assert found == [6, 6, 13, 13, 14]


def test_half_a_reading_denies_nobody() -> None:
    sums = Connections()
    read(sums, *listed(10, 4))
    reading = sums.reading("nftables")
    reading.take(listed(50, 44)[:1])
    assert sums.denied(owner(1)) == 6
    reading.broken_off()
    read(sums, *listed(50, 44))
    assert sums.denied(owner(1)) == 6


def test_what_was_denied_is_forgotten_with_its_service() -> None:
    sums = Connections()
    read(sums, *listed(10, 4))
    sums.keep(table(server(2, ["10.244.0.1"])))
    assert sums.denied(owner(1)) == 0
