"""What is measured from an event to its commit."""

from datetime import UTC, datetime
from typing import get_args

import pytest
from immutables import Map
from msgspec.structs import replace

from vipd.proxy.events import Applied, Deleted, Event, Kind, OwnAddresses, Synced
from vipd.proxy.model import EndpointSlice, KubernetesObject
from vipd.proxy.names import Family, NamespacedName, Protocol, ServicePortName, parse_address
from vipd.proxy.programming import KINDS, MOST_WAITING, MOST_WAITING_EACH, Kinds, Programming
from vipd.proxy.snapshot import Snapshot
from vipd.proxy.virtualserver import Changes, Key, NodeNetwork, Table, VirtualServer
from vipd.proxy.virtualserver import Kind as ServerKind

NAME = NamespacedName("shop", "web")
OWNER = ServicePortName(NAME, "http", Protocol.TCP)
KEY = Key(Family.IPV4, parse_address("10.96.0.1"), Protocol.TCP, 80)
SIX = Key(Family.IPV6, parse_address("fd00::1"), Protocol.TCP, 80)
SERVER = VirtualServer(key=KEY, owner=OWNER, kind=ServerKind.CLUSTER, cluster=(), local=())
TABLE = Table(Map({NAME: (SERVER,)}), Map({KEY: (SERVER,)}), Map(), NodeNetwork())
EMPTY = Table(Map(), Map(), Map(), NodeNetwork())
CHANGES = Changes({KEY: SERVER})
NOTHING = Snapshot()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def told(clock: Clock) -> Programming:
    return Programming(1000.0, clock)


def a_slice(at: float | None) -> EndpointSlice:
    triggered = None if at is None else datetime.fromtimestamp(at, UTC)
    name = NamespacedName("shop", "web-1")
    return EndpointSlice(name=name, service=NAME, family=Family.IPV4, triggered=triggered)


def tell(
    told: Programming, *events: Event, before: Snapshot = NOTHING, listed: bool = True
) -> None:
    told.told(events, before, listed=listed)


def latencies(told: Programming) -> tuple[int, float]:
    one = told.latency.get(Family.IPV4)
    return (sum(one.counts), one.total) if one is not None else (0, 0.0)


def test_from_the_trigger_to_the_commit(told: Programming, clock: Clock) -> None:
    tell(told, Applied(a_slice(1001.5)))
    told.updated(TABLE, CHANGES)
    clock.now = 1003.0
    told.committed([SIX], TABLE)
    assert latencies(told) == (0, 0.0)
    told.committed([KEY], TABLE)
    told.committed([KEY], TABLE)
    assert latencies(told) == (1, 1.5)


def test_a_change_that_needs_no_commit_is_no_latency(told: Programming, clock: Clock) -> None:
    tell(told, Applied(a_slice(1001.0)))  # the table stays as it is
    tell(told, Applied(a_slice(1002.0)))
    told.updated(TABLE, CHANGES)
    clock.now = 1005.0
    told.committed([KEY], TABLE)
    assert latencies(told) == (1, 3.0)


@pytest.mark.parametrize(("at", "listed"), [(None, True), (999.0, True), (1001.0, False)], ids=str)
def test_what_is_not_measured(
    told: Programming, clock: Clock, at: float | None, listed: bool
) -> None:
    tell(told, Applied(a_slice(at)), listed=listed)
    told.updated(TABLE, CHANGES)
    told.committed([KEY], TABLE)
    assert latencies(told) == (0, 0.0)


def test_what_is_listed_again_is_not_measured_again(told: Programming) -> None:
    one = a_slice(1001.0)
    known = replace(NOTHING, slices=Map({NAME: (replace(one, headless=True),)}))
    tell(told, Applied(one), before=known)
    told.updated(TABLE, CHANGES)
    told.committed([KEY], TABLE)
    assert latencies(told) == (0, 0.0)


def test_those_of_one_service_that_wait_are_bounded(told: Programming) -> None:
    for _ in range(3):
        tell(told, *(Applied(a_slice(1001.0)) for _ in range(MOST_WAITING_EACH // 2)))
        told.updated(TABLE, CHANGES)
    told.committed([KEY], TABLE)
    assert latencies(told)[0] == MOST_WAITING_EACH


def numbered(number: int) -> tuple[VirtualServer, EndpointSlice]:
    """Return one of many services, with a slice whose trigger is as late as its number."""
    name = NamespacedName("shop", f"web-{number}")
    key = replace(KEY, port=number + 1)
    changed = replace(a_slice(1001.0 + number), name=name, service=name)
    return replace(SERVER, key=key, owner=ServicePortName(name, "http", Protocol.TCP)), changed


def test_services_that_are_never_committed_keep_no_other_from_being_measured(
    told: Programming, clock: Clock
) -> None:
    for number in range(MOST_WAITING + 1):
        server, changed = numbered(number)
        tell(told, Applied(changed))
        told.updated(EMPTY, Changes({server.key: server}))
    clock.now = 1001.0 + number
    told.committed([server.key], replace(TABLE, claims=Map({server.key: (server,)})))
    assert latencies(told) == (1, 0.0)
    first, _ = numbered(0)
    told.committed([first.key], replace(TABLE, claims=Map({first.key: (first,)})))
    assert latencies(told) == (1, 0.0), "it waited longest, and was forgotten"


@pytest.mark.parametrize("now", [None, numbered(7)[0]], ids=["nobody's", "another's"])
def test_what_is_gone_before_its_commit_is_not_measured(
    told: Programming, clock: Clock, now: VirtualServer | None
) -> None:
    tell(told, Applied(a_slice(1001.0)))
    told.updated(EMPTY, CHANGES)
    tell(told, Deleted(Kind.SERVICE, NAME))
    told.updated(TABLE, Changes({KEY: now}))
    clock.now = 2000.0
    told.committed([KEY], EMPTY)
    tell(told, Applied(a_slice(1999.0)))  # it comes again
    told.updated(EMPTY, CHANGES)
    told.committed([KEY], TABLE)
    assert latencies(told) == (1, 1.0)


def test_changes_wait_until_a_sync_begins(told: Programming, clock: Clock) -> None:
    tell(told, Applied(a_slice(None)), Deleted(Kind.ENDPOINT_SLICE, NAME), Synced())
    clock.now = 1002.0
    tell(told, Deleted(Kind.SERVICE, NAME), OwnAddresses(()))
    slices, services = (told.changes[one] for one in (Kind.ENDPOINT_SLICE, Kind.SERVICE))
    assert (slices.total, slices.pending, services.total, services.pending) == (2, 2, 1, 1)
    told.begun()
    tell(told, Applied(a_slice(None)))
    assert (slices.total, slices.pending, services.total, services.pending) == (3, 1, 1, 0)
    assert told.last_event == {"EndpointSlice": 1002.0, "Service": 1002.0, "Address": 1002.0}


def test_a_sync_counts_for_the_families_that_it_is_about(told: Programming, clock: Clock) -> None:
    told.queued([KEY, SIX])
    clock.now = 1001.0
    told.synced([KEY], 0.5, 3, full=False)
    told.synced([], 0.5, 0, full=True)
    told.failed(Kinds("nftables", full=False), [SIX, SIX])
    assert told.queued_at == {Family.IPV4: 1000.0, Family.IPV6: 1000.0}
    assert told.synced_at == {Family.IPV4: 1001.0}
    assert {key: sum(one.counts) for key, one in told.syncs.items()} == {
        (Family.IPV4, False): 1,
        (Family.IPV4, True): 1,
    }
    assert told.failures == {(("nftables", False), Family.IPV6): 1}
    assert told.failed_syncs == {("nftables", False): 1}
    assert (told.counts, told.objects) == ({False: 1, True: 1}, 3)


def test_every_kind_of_object_has_its_name() -> None:
    assert set(KINDS) == set(get_args(KubernetesObject))
    assert set(KINDS.values()) == set(Kind)
