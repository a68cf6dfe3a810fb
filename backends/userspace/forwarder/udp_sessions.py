"""The UDP sessions of a worker as a table: whose they are, how many there may be, who goes first.

Lives here: places that are listened at, sessions, their bounds, the order in which they end, and
what is counted.
Must not: read, send or open anything (udp.py, udp_link.py).
"""

import socket
from collections import OrderedDict
from collections.abc import Callable

from msgspec import Struct, structs

from vipd.backends.userspace.forwarder.balance import spot_of
from vipd.backends.userspace.forwarder.crowd import Crowd
from vipd.backends.userspace.forwarder.served import Served
from vipd.backends.userspace.forwarder.udp_link import UdpLink
from vipd.backends.userspace.objects import Place
from vipd.proxy.virtualserver import Endpoint

ClientAddress = tuple[str, int] | tuple[str, int, int, int]
"""As recvfrom() returns it."""


class UdpLimits(Struct, frozen=True, kw_only=True):
    """The bounds of one worker. A session takes a descriptor, a local port of this node and 15 KB.

    All workers of a node share its local ports, 28,232 by default (net.ipv4.ip_local_port_range).
    """

    idle_seconds: float = 60.0
    """How long a session lives after its last datagram, whichever way that went."""
    most: int = 8_192
    """Sessions in all."""
    most_of_place: int = 6_144
    most_of_client: int = 2_048
    """Of one client address, at all places."""

    def within(self, sessions: int) -> "UdpLimits":
        """Return the limits for no more than so many sessions, with the same shares of them."""
        if sessions >= self.most:
            return self
        return structs.replace(
            self,
            most=sessions,
            most_of_place=max(1, self.most_of_place * sessions // self.most),
            most_of_client=max(1, self.most_of_client * sessions // self.most),
        )


class UdpCounters(Struct):
    """What happened since the start."""

    sessions: int = 0
    """Begun; a session that was moved to another endpoint is still the same."""
    idle: int = 0
    """Ended by time-out."""
    evicted: int = 0
    """Ended to make room."""
    moved: int = 0
    """Moved, as their endpoint left."""
    refused: int = 0
    """Endpoints that could not be reached, as the network said."""
    forwarded: int = 0
    """Datagrams to endpoints."""
    replies: int = 0
    """Datagrams to clients."""
    denied: int = 0
    """Datagrams dropped: the source is not allowed."""
    unserved: int = 0
    """Datagrams dropped: there is no endpoint, or the place takes no new session."""
    no_room: int = 0
    """Datagrams dropped, either way: the kernel, or a session that is being made, had no room."""
    exhausted: int = 0
    """Datagrams dropped: no descriptor, port or memory for a session."""

    def by_name(self) -> dict[str, int]:
        """Return the counters under their names, which begin with ``udp_``."""
        return {f"udp_{name}": getattr(self, name) for name in self.__struct_fields__}


class Listening:
    """A place, and the socket that is its address towards clients."""

    def __init__(self, place: Place, bound: socket.socket, serve: Callable[[], Served]) -> None:
        self.place = place
        self.bound: socket.socket | None = bound
        """None once it was handed over and no session needs it."""
        self.serve = serve
        """Returns the state of the place."""
        self.sessions: dict[ClientAddress, Session] = {}
        self.crowd: Crowd[Session] = Crowd()
        self.is_open = True
        """Whether new sessions begin."""
        self.is_read = False
        """Whether what clients send comes here; not once the socket was handed over."""
        self.tells_interface = False
        """Whether the socket tells where datagrams came in."""

    @property
    def served(self) -> Served:
        """The state of the place."""
        return self.serve()

    def sessions_with(self, endpoint: Endpoint) -> "list[Session]":
        """Return the sessions that an endpoint has."""
        return [
            one
            for one in self.sessions.values()
            if one.endpoint is not None and spot_of(one.endpoint) == spot_of(endpoint)
        ]

    def of_client(self, client: str) -> list[tuple[int, Endpoint]]:
        """Return source port and endpoint of each session of a client."""
        return [
            (one.client[1], one.endpoint)
            for one in self.sessions.values()
            if one.host == client and one.endpoint is not None
        ]


class Session:
    """A client's address and port at a place, and the endpoint it talks to."""

    __slots__ = (
        "answered",
        "came_by",
        "client",
        "endpoint",
        "link",
        "listening",
        "seen",
        "tried",
        "used",
    )

    def __init__(self, listening: Listening, client: ClientAddress, came_by: str) -> None:
        self.listening = listening
        self.client = client
        self.came_by = came_by
        """The interface, where it is asked for and known."""
        self.link: UdpLink | None = None
        """None after it was lost, until the client's next datagram."""
        self.endpoint: Endpoint | None = None
        """Where the link goes, counted as a session of it; None without one."""
        self.tried: tuple[Endpoint, ...] = ()
        """Endpoints that were not there, since one answered."""
        self.answered = False
        """Whether something came back through this link."""
        self.used = 0.0
        """When the last datagram went through, on the loop's clock."""
        self.seen = listening.served.forwarding
        """The forwarding by which the endpoint was right."""

    @property
    def host(self) -> str:
        """The client's address without the port."""
        return self.client[0]


class Sessions:
    """All sessions of a worker, the idlest first."""

    def __init__(self, limits: UdpLimits) -> None:
        self.limits = limits
        """May be changed; sessions that are beyond them go when they are in the way."""
        self.busy: set[Listening] = set()
        """The places that have sessions."""
        self._by_use: OrderedDict[Session, None] = OrderedDict()
        self._crowd: Crowd[Session] = Crowd()

    def __len__(self) -> int:
        return len(self._by_use)

    def __contains__(self, session: Session) -> bool:
        return session in self._by_use

    def add(self, session: Session, now: float) -> None:
        """Add a session that is used now."""
        session.used = now
        session.listening.sessions[session.client] = session
        self.busy.add(session.listening)
        session.listening.crowd.add(session.host, session)
        self._crowd.add(session.host, session)
        self._by_use[session] = None

    def used(self, session: Session, now: float) -> None:
        """Note that a datagram went through, whichever way."""
        session.used = now
        self._by_use.move_to_end(session)
        self._crowd.used(session.host, session)
        session.listening.crowd.used(session.host, session)

    def remove(self, session: Session) -> None:
        """Remove a session that is there."""
        del self._by_use[session]
        del session.listening.sessions[session.client]
        if not session.listening.sessions:
            self.busy.discard(session.listening)
        session.listening.crowd.remove(session.host, session)
        self._crowd.remove(session.host, session)

    def in_the_way(self, listening: Listening, host: str) -> Session | None:
        """Return a session that has to go before the client can have one more there.

        Ask again when it is gone: there are three bounds.
        """
        if self._crowd.size_of(host) >= self.limits.most_of_client:
            return self._crowd.idlest_of(host)
        if len(listening.crowd) >= self.limits.most_of_place:
            return listening.crowd.idlest()
        if len(self._crowd) >= self.limits.most:
            return self._crowd.idlest()
        return None

    def first_due(self) -> tuple[Session, float] | None:
        """Return the session that is idle for longest, and when its time is over."""
        for session in self._by_use:
            return session, session.used + self.limits.idle_seconds
        return None
