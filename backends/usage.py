"""What a dataplane has counted: of virtual servers, and of the workers it may have.

Lives here: the records, for every mode, and what a driver offers that counts. Must not: know any
one dataplane, or how people are told (proxy/views.py).

A number is None where the mode does not count such a thing. Counters begin when a virtual server,
or an endpoint of it, is first served by whoever counts, and again when that begins anew.
"""

import typing
from collections.abc import Collection, Mapping

from msgspec import Struct

from vipd.proxy.virtualserver import Endpoint, Key, VirtualServer


class SetAside(Struct, frozen=True):
    """Who gives an endpoint no new connection, as it failed: the number of a worker."""

    worker: int
    seconds: float
    """For how long yet; 0: it gets the next connection, as a trial."""


class EndpointUsage(Struct, frozen=True, kw_only=True):
    """What was counted of an endpoint of a virtual server."""

    endpoint: Endpoint
    """Its address and port; nothing else of it is filled in."""
    open: int | None = None
    """Connections, and sessions of UDP."""
    so_far: int | None = None
    """Connections that it was given, those included that are open."""
    failures: int | None = None
    """How often it refused or timed out."""
    set_aside: tuple[SetAside, ...] = ()
    departed: bool = False
    """No endpoint of the virtual server any more; its connections go on."""


class ClientFlow(Struct, frozen=True):
    """A connection that is open."""

    source_port: int
    endpoint: Endpoint


class ClientUsage(Struct, frozen=True, kw_only=True):
    """What is known of one client of a virtual server."""

    remembered: Endpoint | None = None
    """Where affinity sends it."""
    seconds: float = 0.0
    """For how long yet, if it does not come back."""
    open: int = 0
    flows: tuple[ClientFlow, ...] = ()
    """The first of those that are open, by source port."""


class ServerUsage(Struct, frozen=True, kw_only=True):
    """What was counted of a virtual server."""

    open: int | None = None
    """Connections, and sessions of UDP, whichever endpoint they have."""
    so_far: int | None = None
    denied: int | None = None
    """Connections of sources that are not allowed."""
    unserved: int | None = None
    """Connections for which there was no endpoint."""
    remembered: int | None = None
    """Clients that are remembered for affinity."""
    forgotten: int | None = None
    """Clients that were forgotten before their time, for lack of room."""
    workers: tuple[int, ...] = ()
    """Numbers of the workers that listen for it; none where the kernel forwards."""
    endpoints: tuple[EndpointUsage, ...] = ()
    """Those of which something was counted, sorted by address and port."""
    of_client: ClientUsage | None = None
    """Of the client that was asked about."""


class WorkerUsage(Struct, frozen=True, kw_only=True):
    """A process that forwards."""

    number: int
    pid: int
    seconds: float
    """Since it began."""
    restarts: int
    """How often a worker of this number ended and was started again, since the daemon began."""
    retired: bool
    """It takes nothing new, and only ends what is open."""
    listeners: int
    open: int
    missing: int = 0
    """Listeners that it should have and has no descriptor for yet."""
    files: int = 0
    """How many it may have open; 0: not known."""
    full: bool = False
    """It accepts nothing now, for lack of descriptors or memory, or at the most connections."""
    counters: Mapping[str, int]
    """What it has counted in all, by names of its own."""


class Silent(Struct, frozen=True):
    """A process that forwards, and did not answer in time."""

    number: int
    pid: int


class Usage(Struct, frozen=True):
    """What was counted of virtual servers, and the workers that there are."""

    by_server: Mapping[Key, ServerUsage] = {}
    workers: tuple[WorkerUsage, ...] = ()
    """Those that answered."""
    silent: tuple[Silent, ...] = ()
    wanted: int = 0
    """Workers that there should be, those not counted that take nothing new."""


@typing.runtime_checkable
class Counting(typing.Protocol):
    """A driver that counts. Not every one does."""

    async def usage(self, servers: Collection[VirtualServer], client: str = "") -> Usage:
        """Return what was counted of these virtual servers, and of one client's address there.

        Of none of them: the workers alone, which is cheap. Raise DataplaneError.
        """
