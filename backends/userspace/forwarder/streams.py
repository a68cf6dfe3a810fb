"""The records of the TCP forwarder: places, connections, and their streams with the sockets.

Lives here: what is kept, and how it hangs together. Must not: do anything with it.
There are tens of thousands of these: they have slots, and no cycle once `unlink` was called, so
that they are gone with their last use and not with the next garbage collection.
"""

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Sequence
from typing import Final
from typing import Protocol as Interface

from vipd.backends.userspace.forwarder.connection import Connection, Flow
from vipd.backends.userspace.objects import Forwarding, Place
from vipd.proxy.names import Family
from vipd.proxy.virtualserver import Endpoint

PIPE: Final = 1 << 20
"""Bytes that a pipe takes, at most, if whole pages are put in."""


class Serves(Interface):
    """What the forwarder asks and tells the state of a place; `Served` is that state."""

    forwarding: Forwarding

    @property
    def asks_interface(self) -> bool:
        """Whether `came_by` has to be called before `choose`."""
        ...

    def came_by(self, client: str, interface: str) -> None:
        """Note the interface that a client came in by."""
        ...

    def allows(self, client: str) -> bool:
        """Return whether the source may connect at all."""
        ...

    def choose(
        self, client: str, client_port: int, now: float, tried: Sequence[Endpoint] = ()
    ) -> Endpoint | None:
        """Return the endpoint for a new connection; None: there is none left."""
        ...

    def shows(self, client: str, endpoint: Endpoint) -> bool:
        """Return whether the endpoint may see the client's address."""
        ...

    def began(self, client: str, endpoint: Endpoint, now: float) -> None:
        """Note an established connection."""
        ...

    def withdrawn(self, endpoint: Endpoint) -> None:
        """Note that a choice came to nothing, which says nothing of the endpoint."""
        ...

    def takes_over(
        self, client: str, endpoint: Endpoint, now: float, *, pending: bool = False
    ) -> None:
        """Note a connection of whatever served the place before."""
        ...

    def ended(self, endpoint: Endpoint) -> None:
        """Note that an established connection is over."""
        ...

    def failed(self, endpoint: Endpoint, now: float) -> None:
        """Note that a connection was refused or timed out."""
        ...


class Pipe:
    """A pipe, and how many bytes are in it."""

    __slots__ = ("count", "reads", "writes")

    def __init__(self) -> None:
        """Make the pipe. Raises OSError for lack of descriptors."""
        self.reads, self.writes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.count = 0
        with contextlib.suppress(OSError):  # beyond what this user may have, it stays smaller
            fcntl.fcntl(self.writes, fcntl.F_SETPIPE_SZ, PIPE)

    def close(self) -> None:
        """Close both ends, and lose what is inside."""
        os.close(self.reads)
        os.close(self.writes)


class Frontend:
    """What is kept of a place: its listener while it has one, and how many connections."""

    __slots__ = ("family", "listener", "place", "serve", "taken")

    def __init__(self, place: Place, serve: Callable[[], Serves]) -> None:
        self.place = place
        self.serve = serve
        """Returns the state of the place, for new connections."""
        self.family = socket.AF_INET6 if place.family is Family.IPV6 else socket.AF_INET
        self.listener: socket.socket | None = None
        self.taken = 0
        """Accepted and not over."""


class Stream(Flow):
    """A flow with its sockets. `back` is the other direction of the same connection."""

    __slots__ = ("back", "connection", "held", "hung", "length", "pipe", "sink", "source")

    def __init__(self) -> None:
        super().__init__()
        self.connection: Forwarded
        self.back: Stream
        self.source: socket.SocketType
        self.sink: socket.SocketType
        self.held: bytes | memoryview = b""
        """What the sink did not take."""
        self.pipe: Pipe | None = None
        """What holds it instead, while the stream is spliced."""
        self.length = 0
        """How long the stream has proved to be, as the pump has it."""
        self.hung = False
        """Whether the end of the data is known to be near: then it is read up to there."""


class Forwarded(Connection):
    """A connection with its streams, and what has to be known to connect it."""

    __slots__ = (
        "client",
        "endpoint",
        "frontend",
        "parked_at",
        "port",
        "reply",
        "request",
        "served",
        "tried",
    )

    def __init__(
        self,
        frontend: Frontend,
        source: socket.SocketType,
        client: tuple[str, int],
        attempts: int,
    ) -> None:
        self.request = request = Stream()
        self.reply = reply = Stream()
        super().__init__(request, reply, attempts)
        request.connection = reply.connection = self
        request.back = reply
        reply.back = request
        request.source = reply.sink = source
        self.frontend = frontend
        self.served = frontend.serve()
        self.client = client[0]
        self.port = client[1]
        self.endpoint: Endpoint | None = None
        """Whom it is, or is being, connected to; counted as such by `served`."""
        self.tried: tuple[Endpoint, ...] = ()
        """Whom it could not be connected to."""
        self.parked_at: float | None = None
        """When it first had to wait for a descriptor."""

    def withdraw(self) -> None:
        """Leave the endpoint that it was to be connected to."""
        endpoint, self.endpoint = self.endpoint, None
        if endpoint is not None:
            self.served.withdrawn(endpoint)

    def unlink(self) -> None:
        """Take apart what is over."""
        for one in (self.request, self.reply):
            del one.back, one.connection
