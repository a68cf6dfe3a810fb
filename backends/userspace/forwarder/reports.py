"""What a worker says of its places to whoever asks: from their state to messages.

Lives here: the choice of what is worth saying. Pure: the clock is given. Must not: send
(worker.py).
"""

from collections.abc import Sequence

from vipd.backends.userspace import messages
from vipd.backends.userspace.forwarder.served import Served
from vipd.backends.userspace.messages import (
    MOST_OF_CLIENT,
    ClientReport,
    EndpointReport,
    PlaceReport,
)
from vipd.backends.userspace.objects import Place
from vipd.proxy.virtualserver import Endpoint


def place(
    place: Place, served: Served | None, count: int, of_client: ClientReport | None, now: float
) -> PlaceReport:
    """Return what is said of a place where `count` connections are open.

    `served` is None where the worker does not listen any more. Endpoints of which nothing was
    counted are left out.
    """
    wire = messages.wire_place(place)
    if served is None:
        return PlaceReport(wire, False, count, 0, 0, 0, [], of_client)
    told = served.told()
    endpoints = [
        EndpointReport(
            address=one.address,
            port=one.port,
            connections=one.connections,
            so_far=one.so_far,
            failures=one.failures,
            set_aside_seconds=_left(one.set_aside_until, now),
            departed=one.departed,
        )
        for one in told.endpoints
        if one.connections or one.so_far or one.failures or one.set_aside_until is not None
    ]
    return PlaceReport(
        place=wire,
        listens=True,
        connections=count,
        so_far=told.so_far,
        denied=told.denied,
        unserved=told.unserved,
        endpoints=endpoints,
        of_client=of_client,
        remembered=told.remembered,
        forgotten=told.forgotten,
    )


def of_client(
    served: Served | None,
    connections: Sequence[tuple[int, Endpoint]],
    client: str,
    now: float,
) -> ClientReport:
    """Return what is said of a client; `connections` are its source ports and endpoints."""
    remembered = served.remembered(client, now) if served is not None else None
    shown = sorted(connections, key=lambda one: one[0])[:MOST_OF_CLIENT]
    return ClientReport(
        remembered=(str(remembered[0].address), remembered[0].port) if remembered else None,
        seconds=remembered[1] if remembered else 0.0,
        connections=[(port, str(one.address), one.port) for port, one in shown],
        open=len(connections),
    )


def _left(until: float | None, now: float) -> float | None:
    return None if until is None else max(0.0, until - now)
