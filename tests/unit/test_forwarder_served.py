"""A place in a worker: who may connect, which endpoint each connection gets, what is told of it."""

from ipaddress import ip_network
from random import Random

import pytest

from vipd.backends.userspace.forwarder.balance import spot_of
from vipd.backends.userspace.forwarder.served import Served
from vipd.backends.userspace.forwarder.sources import MOST_ANSWERS
from vipd.backends.userspace.objects import Forwarding, Place, Surroundings
from vipd.proxy.model import Algorithm
from vipd.proxy.names import Family, Network, Protocol, parse_address
from vipd.proxy.virtualserver import Endpoint

VIP = parse_address("10.96.0.1")
A, B, C, D = (Endpoint(parse_address(f"10.244.0.{i}"), 8080) for i in range(1, 5))
CLIENT = "192.0.2.7"


def served(
    *endpoints: Endpoint,
    outside: tuple[Endpoint, ...] | None = None,
    surroundings: Surroundings = Surroundings(),  # noqa: B008
    protocol: Protocol = Protocol.TCP,
    algorithm: Algorithm = Algorithm.ROUND_ROBIN,
    affinity_seconds: int | None = None,
    allowed_sources: tuple[Network, ...] | None = None,
    sets_aside: bool = True,
) -> Served:
    forwarding = Forwarding(
        owner="default/web:http",
        inside=endpoints,
        outside=endpoints if outside is None else outside,
        algorithm=algorithm,
        affinity_seconds=affinity_seconds,
        allowed_sources=allowed_sources,
        sets_aside=sets_aside,
    )
    place = Place(Family.IPV4, protocol, VIP, 80)
    return Served(place, forwarding, surroundings, Random(1).random)


def change(it: Served, *endpoints: Endpoint, **more: int | None) -> None:
    now = it.forwarding
    it.update(
        Forwarding(
            owner=now.owner,
            inside=endpoints,
            outside=endpoints,
            algorithm=now.algorithm,
            affinity_seconds=more.get("affinity_seconds", now.affinity_seconds),
        ),
        Surroundings(),
    )


def chosen(it: Served, times: int, now: float = 0.0, client: str = CLIENT) -> list[Endpoint | None]:
    return [it.choose(client, port, now) for port in range(times)]


def connect(it: Served, client: str, now: float) -> Endpoint:
    endpoint = it.choose(client, 1, now)
    assert endpoint is not None
    it.began(client, endpoint, now)
    return endpoint


# Sources


def test_everyone_may_connect_where_there_are_no_ranges() -> None:
    assert served(A).allows("not even an address")


@pytest.mark.parametrize(
    ("client", "allowed"),
    [
        ("192.0.2.7", True),
        ("192.0.3.7", False),
        ("::ffff:192.0.2.7", True),
        ("2001:db8::1", True),
        ("fe80::1%eth0", True),
        ("2001:db9::1", False),
    ],
)
def test_source_ranges(client: str, allowed: bool) -> None:
    ranges = tuple(ip_network(one) for one in ("192.0.2.0/24", "2001:db8::/32", "fe80::/10"))
    it = served(A, allowed_sources=ranges)
    assert it.allows(client) is allowed
    assert it.told().denied == (not allowed)


def test_answers_are_remembered_for_so_many_clients_only() -> None:
    it = served(A, allowed_sources=(ip_network("10.0.0.0/8"),))
    for number in range(MOST_ANSWERS + 100):
        assert it.allows(f"10.0.{number // 256}.{number % 256}")
    assert len(it._sources._allowed) == MOST_ANSWERS


@pytest.mark.parametrize("client", ["10.244.0.9", "198.51.100.1", str(VIP), "127.0.0.1"])
def test_pods_and_the_node_itself_are_inside(client: str) -> None:
    around = Surroundings((ip_network("10.244.0.0/24"),), (parse_address("198.51.100.1"),))
    it = served(A, B, outside=(C,), surroundings=around)
    assert set(chosen(it, 10, client=client)) == {A, B}
    assert set(chosen(it, 10, client="203.0.113.1")) == {C}


def test_who_is_inside_follows_the_node() -> None:
    it = served(A, outside=(B,))
    assert it.choose(CLIENT, 1, 0) == B
    it.update(it.forwarding, Surroundings((ip_network("192.0.2.0/24"),)))
    assert it.choose(CLIENT, 1, 0) == A


# Choice


def test_without_endpoints_there_is_none_and_it_is_counted() -> None:
    it = served()
    assert it.choose(CLIENT, 1, 0) is None
    assert it.told().unserved == 1


@pytest.mark.parametrize("algorithm", Algorithm)
def test_the_tried_are_passed_over_until_none_is_left(algorithm: Algorithm) -> None:
    it = served(A, B, C, algorithm=algorithm)
    tried: list[Endpoint] = []
    for _ in range(3):
        endpoint = it.choose(CLIENT, 1, 0, tried)
        assert endpoint is not None
        tried.append(endpoint)
    assert sorted(tried, key=spot_of) == [A, B, C]
    assert it.choose(CLIENT, 1, 0, tried) is None
    assert it.told().unserved == 0, "it was served, in vain"


def test_round_robin_goes_on_where_it_was_when_endpoints_change() -> None:
    it = served(A, B, C)
    first = chosen(it, 2)
    change(it, A, B, C, D)
    third = next(one for one in (A, B, C) if one not in first)
    assert third in chosen(it, 2)


def test_least_connections_counts_what_is_open() -> None:
    it = served(A, B, algorithm=Algorithm.LEAST_CONNECTIONS)
    first = connect(it, CLIENT, 0)
    second = connect(it, CLIENT, 0)
    assert {first, second} == {A, B}
    it.ended(first)
    assert it.choose(CLIENT, 1, 0) == first


def test_a_burst_does_not_all_go_to_who_had_fewest() -> None:
    it = served(A, B, C, algorithm=Algorithm.LEAST_CONNECTIONS)
    for one in [A, B] * 5:
        it.began(CLIENT, one, 0)
    burst = chosen(it, 20)
    assert set(burst[:5]) == {C}
    assert {one: burst[5:].count(one) for one in (A, B, C)} == {A: 5, B: 5, C: 5}


def test_what_became_of_a_choice_is_known_and_forgotten() -> None:
    it = served(A, B, algorithm=Algorithm.LEAST_CONNECTIONS, sets_aside=False)
    assert set(chosen(it, 2)) == {A, B}
    it.failed(A, 0)
    assert it.choose(CLIENT, 1, 0) == A
    it.withdrawn(B)
    assert it.choose(CLIENT, 1, 0) == B
    change(it, B)
    assert {one.address for one in it.told().endpoints} == {str(A.address), str(B.address)}
    it.withdrawn(A)
    assert [one.address for one in it.told().endpoints] == [str(B.address)], "it is forgotten now"


def test_what_is_taken_over_is_open_and_did_not_begin_here() -> None:
    it = served(A, B, algorithm=Algorithm.LEAST_CONNECTIONS, affinity_seconds=10)
    it.takes_over("192.0.2.8", A, 0)
    assert [(one.connections, one.so_far) for one in it.told().endpoints] == [(1, 0), (0, 0)]
    assert it.choose("192.0.2.8", 1, 1) == A, "the client stays"
    it = served(A, B, algorithm=Algorithm.LEAST_CONNECTIONS)
    it.takes_over("192.0.2.8", A, 0, pending=True)
    assert it.choose(CLIENT, 1, 0) == B


def test_least_connections_remembers_an_endpoint_that_left_and_came_back() -> None:
    it = served(A, B, algorithm=Algorithm.LEAST_CONNECTIONS)
    for _ in range(4):
        connect(it, CLIENT, 0)
    change(it, A)
    assert [one.departed for one in it.told().endpoints] == [False, True]
    change(it, A, B)
    it.ended(A)
    assert it.choose(CLIENT, 1, 0) == A


def test_an_endpoint_that_left_is_forgotten_with_its_last_connection() -> None:
    it = served(A, B)
    held = {connect(it, CLIENT, 0), connect(it, CLIENT, 0)}
    assert held == {A, B}
    change(it, A)
    it.ended(B)
    assert [one.address for one in it.told().endpoints] == [str(A.address)]
    it.failed(B, 0)
    assert [one.address for one in it.told().endpoints] == [str(A.address)]


# Affinity


def test_a_client_stays_until_its_time_is_over() -> None:
    it = served(A, B, C, affinity_seconds=100)
    first = connect(it, CLIENT, 0)
    for now in (50, 149, 248):
        assert connect(it, CLIENT, now) == first
    assert it.choose(CLIENT, 1, 348) != first, "round-robin: the next one"


def test_connections_at_the_same_time_go_to_one_endpoint() -> None:
    it = served(A, B, C, affinity_seconds=100)
    assert len(set(chosen(it, 6))) == 1


def test_a_client_fails_over_for_good() -> None:
    it = served(A, B, C, affinity_seconds=100)
    first = connect(it, CLIENT, 0)
    second = it.choose(CLIENT, 1, 1, [first])
    assert second not in (first, None)
    assert it.choose(CLIENT, 1, 2) == second


def test_a_client_of_an_endpoint_that_is_set_aside_gets_another_for_good() -> None:
    it = served(A, B, C, affinity_seconds=100)
    first = connect(it, CLIENT, 0)
    it.failed(first, 1)
    second = it.choose(CLIENT, 1, 1.5)
    assert second != first
    assert it.choose(CLIENT, 1, 50) == second


def test_affinity_follows_the_endpoints_and_the_settings() -> None:
    it = served(A, B, affinity_seconds=100)
    first = connect(it, CLIENT, 0)
    other = B if first == A else A
    change(it, other)
    assert it.choose(CLIENT, 1, 1) == other
    change(it, A, B)
    assert it.choose(CLIENT, 1, 2) == other
    change(it, A, B, affinity_seconds=None)
    assert len(set(chosen(it, 2))) == 2
    assert it.told().remembered == 0


# Health


def aside(it: Served) -> list[str]:
    return [one.address for one in it.told().endpoints if one.set_aside_until is not None]


def test_who_fails_is_set_aside_and_told_of() -> None:
    it = served(A, B)
    it.failed(A, 10)
    assert chosen(it, 4, 10.5) == [B] * 4
    report = it.told()
    assert [(one.failures, one.set_aside_until) for one in report.endpoints] == [(1, 11), (0, None)]


def test_one_connection_at_a_time_is_a_trial_and_its_success_is_enough() -> None:
    it = served(A, B)
    it.failed(A, 10)
    assert chosen(it, 4, 11).count(A) == 1
    it.began(CLIENT, A, 11.1)
    assert chosen(it, 4, 11.2).count(A) == 2


def test_each_trial_that_fails_doubles_the_time_up_to_a_minute() -> None:
    it = served(A, B)
    now = 0.0
    times = []
    for _ in range(9):
        it.failed(A, now)
        (until,) = [one.set_aside_until for one in it.told().endpoints if one.set_aside_until]
        times.append(until - now)
        now = until
        assert A in chosen(it, 2, now)
    assert times == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_many_failures_at_once_are_one() -> None:
    it = served(A, B)
    for _ in range(50):
        it.failed(A, 10)
    assert it.told().endpoints[0].set_aside_until == 11
    assert it.told().endpoints[0].failures == 50


def test_a_trial_of_which_nothing_is_heard_is_a_success() -> None:
    it = served(A, B, protocol=Protocol.UDP)
    it.failed(A, 0)
    assert chosen(it, 4, 1).count(A) == 1
    it.began(CLIENT, A, 1)
    assert chosen(it, 4, 10.9).count(A) == 0, "a session of UDP that began proves nothing"
    assert chosen(it, 4, 11).count(A) == 2


def test_an_answer_ends_a_trial_of_udp() -> None:
    it = served(A, B, protocol=Protocol.UDP)
    it.failed(A, 0)
    assert A in chosen(it, 2, 1)
    it.began(CLIENT, A, 1)
    it.answered(A)
    assert chosen(it, 4, 1).count(A) == 2


def test_the_only_endpoint_is_never_set_aside() -> None:
    it = served(A)
    it.failed(A, 0)
    assert it.choose(CLIENT, 1, 0) == A
    assert aside(it) == []


def test_who_is_set_aside_is_better_than_none() -> None:
    it = served(A, B)
    it.failed(A, 0)
    assert it.choose(CLIENT, 1, 0, [B]) == A
    assert it.choose(CLIENT, 1, 0, [A, B]) is None


def test_each_side_keeps_half_of_its_endpoints() -> None:
    it = served(A, B, C, D, outside=(A,))
    it.failed(A, 0)
    assert aside(it) == [], "outside there is no other"
    it.failed(B, 0)
    it.failed(C, 0)
    it.failed(D, 0)
    assert len(aside(it)) == 2


def test_health_can_be_off_and_can_be_turned_off() -> None:
    it = served(A, B, sets_aside=False)
    it.failed(A, 0)
    assert A in chosen(it, 2)
    assert it.told().endpoints[0].failures == 1
    on = served(A, B)
    on.failed(A, 0)
    off = Forwarding(owner="", inside=(A, B), outside=(A, B), sets_aside=False)
    on.update(off, Surroundings())
    assert on.told().endpoints[0].set_aside_until is None


def test_when_endpoints_leave_half_of_those_that_stay_are_in_use() -> None:
    it = served(A, B, C, D)
    it.failed(A, 0)
    it.failed(B, 0.5)
    change(it, A, B, C)
    assert [one.set_aside_until for one in it.told().endpoints] == [None, 1.5, None]
