"""From what workers report to what was counted of each virtual server.

Lives here: which places are whose, and the sums over workers. Pure. Must not: ask workers
(workers.py).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

from vipd.backends.usage import (
    ClientFlow,
    ClientUsage,
    EndpointUsage,
    ServerUsage,
    SetAside,
    Usage,
    WorkerUsage,
)
from vipd.backends.userspace import messages
from vipd.backends.userspace.messages import (
    ClientReport,
    EndpointReport,
    PlaceReport,
    Reported,
)
from vipd.backends.userspace.objects import Forwarding, Place
from vipd.proxy.names import parse_address
from vipd.proxy.virtualserver import Endpoint, Key, VirtualServer


def places(
    servers: Collection[VirtualServer], served: Mapping[Place, Forwarding]
) -> dict[Place, Key]:
    """Return where workers serve these virtual servers, and which of them it is there.

    A node port is served at several places, that of another virtual server excepted.
    """
    found: dict[Place, Key] = {}
    on_node: dict[tuple[int, str, int], VirtualServer] = {}
    for one in servers:
        key = one.key
        if key.address is None:
            on_node[key.family, key.protocol, key.port] = one
        else:
            found[Place(key.family, key.protocol, key.address, key.port)] = key
    if on_node:
        for place, forwarding in served.items():
            server = on_node.get((place.family, place.protocol, place.port))
            if server is not None and forwarding.owner == str(server.owner):
                found.setdefault(place, server.key)
    return found


def usage(
    where: Mapping[Place, Key],
    reported: Sequence[Reported],
    restarts: Mapping[int, int],
    missing: Mapping[int, int],
) -> Usage:
    """Return what workers have counted, each at its places, put together.

    `restarts` and `missing`, listeners that a worker cannot have yet, are by its number.
    """
    told: dict[Key, list[tuple[int, PlaceReport]]] = {}
    for one in reported:
        for report in one.places:
            key = where.get(messages.place_of(report.place))
            if key is not None:
                told.setdefault(key, []).append((one.number, report))
    # Whoever told of many places did so in several reports.
    workers = list({one.pid: one for one in reported}.values())
    workers.sort(key=lambda one: (one.retired, one.number, one.pid))
    return Usage(
        {key: _server(reports) for key, reports in told.items()},
        tuple(
            _worker(
                one,
                restarts.get(one.number, 0),
                0 if one.retired else missing.get(one.number, 0),
            )
            for one in workers
        ),
    )


def _worker(one: Reported, restarts: int, missing: int) -> WorkerUsage:
    return WorkerUsage(
        number=one.number,
        pid=one.pid,
        seconds=one.seconds,
        restarts=restarts,
        retired=one.retired,
        listeners=one.listeners,
        open=one.connections,
        counters=one.counters,
        missing=missing,
        files=one.files,
        full=one.full,
    )


def _server(reports: Sequence[tuple[int, PlaceReport]]) -> ServerUsage:
    clients = [one.of_client for _, one in reports if one.of_client is not None]
    return ServerUsage(
        open=sum(one.connections for _, one in reports),
        so_far=sum(one.so_far for _, one in reports),
        denied=sum(one.denied for _, one in reports),
        unserved=sum(one.unserved for _, one in reports),
        remembered=sum(one.remembered for _, one in reports),
        forgotten=sum(one.forgotten for _, one in reports),
        workers=tuple(sorted({number for number, one in reports if one.listens})),
        endpoints=_endpoints(reports),
        of_client=_client(clients) if clients else None,
    )


class _Sum:
    """What several workers, at several places, have counted of one endpoint."""

    def __init__(self) -> None:
        self.open = self.so_far = self.failures = 0
        self.departed = False
        self.aside: dict[int, float] = {}
        """The longest of each worker: of a node port, it tells for each of the node's addresses."""

    def add(self, number: int, one: EndpointReport) -> None:
        self.open += one.connections
        self.so_far += one.so_far
        self.failures += one.failures
        self.departed |= one.departed
        if one.set_aside_seconds is not None:
            self.aside[number] = max(one.set_aside_seconds, self.aside.get(number, 0.0))

    def told(self, endpoint: Endpoint) -> EndpointUsage:
        return EndpointUsage(
            endpoint=endpoint,
            open=self.open,
            so_far=self.so_far,
            failures=self.failures,
            set_aside=tuple(SetAside(*one) for one in sorted(self.aside.items())),
            departed=self.departed,
        )


def _endpoints(reports: Iterable[tuple[int, PlaceReport]]) -> tuple[EndpointUsage, ...]:
    found: dict[tuple[str, int], _Sum] = {}
    for number, report in reports:
        for one in report.endpoints:
            found.setdefault((one.address, one.port), _Sum()).add(number, one)
    told = (total.told(_endpoint(*where)) for where, total in found.items())
    return tuple(sorted(told, key=lambda one: (int(one.endpoint.address), one.endpoint.port)))


def _client(reports: Sequence[ClientReport]) -> ClientUsage:
    flows = [
        ClientFlow(source_port, _endpoint(address, port))
        for one in reports
        for source_port, address, port in one.connections
    ]
    flows.sort(key=lambda one: one.source_port)
    # Only one worker remembers clients: see Forwarding.is_alone.
    remembered = max(reports, key=lambda one: one.seconds)
    return ClientUsage(
        remembered=_endpoint(*remembered.remembered) if remembered.remembered else None,
        seconds=remembered.seconds,
        open=sum(one.open for one in reports),
        flows=tuple(flows[: messages.MOST_OF_CLIENT]),
    )


def _endpoint(address: str, port: int) -> Endpoint:
    return Endpoint(parse_address(address), port)
