"""What workers report, put together for each virtual server; and what one of them reports."""

from typing import Any

from vipd.backends.usage import ClientFlow, ClientUsage, EndpointUsage, ServerUsage, SetAside
from vipd.backends.userspace import messages
from vipd.backends.userspace.forwarder import reports
from vipd.backends.userspace.forwarder.health import FIRST_SECONDS
from vipd.backends.userspace.forwarder.served import Served
from vipd.backends.userspace.messages import (
    MOST_OF_CLIENT,
    ClientReport,
    EndpointReport,
    PlaceReport,
    Reported,
)
from vipd.backends.userspace.objects import Forwarding, Place, Surroundings
from vipd.backends.userspace.usage import places, usage
from vipd.proxy.names import Family, NamespacedName, Protocol, ServicePortName, parse_address
from vipd.proxy.virtualserver import Endpoint, Key, Kind, VirtualServer

OWNER = ServicePortName(NamespacedName("shop", "web"), "http", Protocol.TCP)
OTHER = ServicePortName(NamespacedName("shop", "api"), "http", Protocol.TCP)
A, B = (Endpoint(parse_address(f"10.244.0.{number}"), 80) for number in (1, 2))


def server(address: str | None, port: int = 80, owner: ServicePortName = OWNER) -> VirtualServer:
    where = None if address is None else parse_address(address)
    key = Key(Family.IPV4, where, Protocol.TCP, port)
    kind = Kind.NODE_PORT if where is None else Kind.CLUSTER
    return VirtualServer(key=key, owner=owner, kind=kind, cluster=(A, B), local=())


def place(address: str, port: int = 80) -> Place:
    return Place(Family.IPV4, Protocol.TCP, parse_address(address), port)


def forwarding(owner: ServicePortName = OWNER, **how: Any) -> Forwarding:
    return Forwarding(owner=str(owner), inside=(A, B), outside=(A, B), **how)


def endpoint(
    one: Endpoint, *, aside: float | None = None, departed: bool = False
) -> EndpointReport:
    return EndpointReport(str(one.address), one.port, 1, 10, 2, aside, departed)


def reported(number: int, *told: PlaceReport, retired: bool = False) -> Reported:
    return Reported(number, 100 + number, retired, 5.0, len(told), 3, {"tcp_reset": 1}, list(told))


def test_a_node_port_is_served_where_no_other_virtual_server_is() -> None:
    cluster, on_node = server("10.96.0.1", 30080), server(None, 30080)
    served = {
        place("10.96.0.1", 30080): forwarding(),
        place("192.168.0.1", 30080): forwarding(),
        place("192.168.0.2", 30080): forwarding(OTHER),
        place("192.168.0.1", 30081): forwarding(),
    }
    assert places((cluster, on_node), served) == {
        place("10.96.0.1", 30080): cluster.key,
        place("192.168.0.1", 30080): on_node.key,
    }
    assert places((), served) == {}


def test_what_workers_count_is_put_together() -> None:
    one = server("10.96.0.1")
    wire = messages.wire_place(place("10.96.0.1"))
    first = PlaceReport(wire, True, 2, 20, 1, 0, [endpoint(A), endpoint(B, aside=3.0)])
    second = PlaceReport(wire, True, 1, 10, 0, 4, [endpoint(B, aside=0.0, departed=True)])
    ending = PlaceReport(wire, False, 5, 0, 0, 0, [])
    stranger = PlaceReport(messages.wire_place(place("10.96.0.9")), True, 9, 9, 9, 9, [])
    told = usage(
        {place("10.96.0.1"): one.key},
        [reported(1, second), reported(0, first, stranger), reported(2, ending, retired=True)],
        {1: 4},
        {0: 2, 2: 5},
    )
    assert told.by_server == {
        one.key: ServerUsage(
            open=8,
            so_far=30,
            denied=1,
            unserved=4,
            remembered=0,
            forgotten=0,
            workers=(0, 1),
            endpoints=(
                EndpointUsage(endpoint=A, open=1, so_far=10, failures=2),
                EndpointUsage(
                    endpoint=B,
                    open=2,
                    so_far=20,
                    failures=4,
                    set_aside=(SetAside(0, 3.0), SetAside(1, 0.0)),
                    departed=True,
                ),
            ),
        )
    }
    assert [(one.number, one.restarts, one.retired) for one in told.workers] == [
        (0, 0, False),
        (1, 4, False),
        (2, 0, True),
    ]


def test_the_addresses_of_a_node_port_and_the_portions_of_a_report_are_one() -> None:
    one = server(None)
    where = {place("192.168.0.1"): one.key, place("192.168.0.2"): one.key}
    told = usage(
        where,
        [
            reported(
                0, PlaceReport(messages.wire_place(at), True, 1, 1, 0, 0, [endpoint(A, aside=left)])
            )
            for at, left in zip(where, (2.0, 7.0), strict=True)
        ],
        {},
        {},
    )
    (found,) = told.by_server.values()
    assert (found.open, found.workers) == (2, (0,))
    assert found.endpoints[0].set_aside == (SetAside(0, 7.0),)
    assert len(told.workers) == 1


def test_a_client_is_remembered_by_one_worker_and_known_to_several() -> None:
    one = server("10.96.0.1")
    wire = messages.wire_place(place("10.96.0.1"))
    clients = (
        ClientReport(None, 0.0, [(4000, str(A.address), 80)], 1),
        ClientReport((str(B.address), 80), 60.0, [(3000, str(B.address), 80)], 1),
    )
    told = usage(
        {place("10.96.0.1"): one.key},
        [
            reported(number, PlaceReport(wire, True, 1, 1, 0, 0, [], client))
            for number, client in enumerate(clients)
        ],
        {},
        {},
    )
    assert told.by_server[one.key].of_client == ClientUsage(
        remembered=B, seconds=60.0, open=2, flows=(ClientFlow(3000, B), ClientFlow(4000, A))
    )


def served(**how: Any) -> Served:
    return Served(place("10.96.0.1"), forwarding(**how), Surroundings(), lambda: 0.0)


def test_a_place_tells_of_the_endpoints_that_something_was_counted_of() -> None:
    state = served()
    state.began("10.0.0.9", A, 1.0)
    state.failed(B, 1.0)
    told = reports.place(state.place, state, 7, None, 1.25)
    assert (told.listens, told.connections, told.so_far) == (True, 7, 1)
    assert [(one.address, one.failures, one.set_aside_seconds) for one in told.endpoints] == [
        (str(A.address), 0, None),
        (str(B.address), 1, FIRST_SECONDS - 0.25),
    ]
    late = reports.place(state.place, state, 0, None, 100.0).endpoints[1]
    assert late.set_aside_seconds == 0.0
    assert reports.place(state.place, served(), 0, None, 1.0).endpoints == []
    gone = reports.place(state.place, None, 3, None, 1.0)
    assert (gone.listens, gone.connections) == (False, 3)


def test_an_endpoint_that_left_is_told_of_while_it_has_connections() -> None:
    state = served()
    state.began("10.0.0.9", A, 1.0)
    state.update(Forwarding(owner="x", inside=(B,), outside=(B,)), Surroundings())
    (told,) = reports.place(state.place, state, 1, None, 1.0).endpoints
    assert (told.address, told.departed) == (str(A.address), True)
    state.ended(A)
    assert reports.place(state.place, state, 0, None, 1.0).endpoints == []
    assert reports.place(state.place, state, 0, None, 1.0).so_far == 1


def test_clients_that_affinity_remembers_and_those_it_had_no_room_for() -> None:
    one = server("10.96.0.1")
    state = served(affinity_seconds=60)
    assert state._affinity is not None
    state._affinity._most = 2
    for number in range(5):
        state.choose(f"10.0.0.{number}", 1, 1.0)
    told = reports.place(state.place, state, 0, None, 1.0)
    assert (told.remembered, told.forgotten) == (2, 3)
    assert messages.answer_of(messages.encode(reported(0, told))) == reported(0, told)
    found = usage({state.place: one.key}, [reported(0, told)], {}, {}).by_server[one.key]
    assert (found.remembered, found.forgotten) == (2, 3)


def test_keeping_failing_endpoints_counts_their_failures() -> None:
    state = served(sets_aside=False)
    for _ in range(3):
        state.failed(B, 1.0)
    (told,) = reports.place(state.place, state, 0, None, 1.0).endpoints
    assert (told.failures, told.set_aside_seconds) == (3, None)


def test_a_client_of_a_place() -> None:
    state = served(affinity_seconds=60)
    assert reports.of_client(state, [], "10.0.0.9", 1.0) == ClientReport(None, 0.0, [], 0)
    assert state.choose("10.0.0.9", 1, 1.0) == A
    many = [(port, A) for port in range(2 * MOST_OF_CLIENT, 0, -1)]
    told = reports.of_client(state, many, "10.0.0.9", 11.0)
    assert (told.remembered, told.seconds) == ((str(A.address), A.port), 50.0)
    assert told.open == 2 * MOST_OF_CLIENT
    assert [port for port, _, _ in told.connections] == list(range(1, MOST_OF_CLIENT + 1))
    assert reports.of_client(state, [], "10.0.0.9", 61.0).remembered is None
    assert reports.of_client(None, many[:1], "10.0.0.9", 1.0).remembered is None


def test_reports_survive_the_way() -> None:
    told = reported(0, PlaceReport(messages.wire_place(place("10.96.0.1")), True, 1, 1, 0, 0, []))
    assert messages.answer_of(messages.encode(told)) == told
    asked = messages.Report([messages.wire_place(place("10.96.0.1"))], "10.0.0.9")
    assert messages.request_of(messages.encode(asked)) == asked
