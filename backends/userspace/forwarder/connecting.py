"""Connecting to endpoints: attempts, their time-outs, and the wait for a descriptor.

Lives here: from the choice of an endpoint to a connection that is established or given up. Must
not: know events of established connections, or close a socket (a batch of events may be under way).
"""

import asyncio
import errno
import select
import socket
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from msgspec import Struct

from vipd.backends.userspace.forwarder.accepting import SHORTAGE
from vipd.backends.userspace.forwarder.connection import CONNECT
from vipd.backends.userspace.forwarder.keepalive import keep_alive
from vipd.backends.userspace.forwarder.streams import Forwarded, Stream
from vipd.backends.userspace.forwarder.tcp_limits import TcpCounters, TcpLimits
from vipd.backends.userspace.forwarder.transparent import Transparent
from vipd.proxy.names import parse_address
from vipd.proxy.virtualserver import Endpoint

_BROKEN: Final = select.EPOLLERR | select.EPOLLHUP
_MOST_NAMES: Final = 4096
_LOCAL_PORTS: Final = "/proc/sys/net/ipv4/ip_local_port_range"
"""From which the kernel takes source ports, for IPv6 too (Documentation/networking/ip-sysctl)."""
_PORTS_SECONDS: Final = 10.0
"""How long they are remembered: an operator may change them."""
_NO_PORT: Final = frozenset({errno.EADDRNOTAVAIL, errno.EAGAIN})
"""All local ports are in use towards that endpoint (connect(2))."""
_NOT_ITS_FAULT: Final = _NO_PORT | SHORTAGE | {errno.EPERM}
"""Errors that say nothing of the endpoint; EPERM is a rule of this node."""

Name = tuple[socket.AddressFamily, tuple[str, int]]
"""An endpoint as socket() and connect() want it."""


def _is_to_itself(connection: Forwarded) -> bool:
    """Return whether a socket has met itself: RFC 9293 §3.5 calls it a simultaneous open.

    It happens where nobody listens, at an endpoint on this node whose port the kernel just took as
    the source port. The peer is not asked for: a connection that was reset meanwhile has none.
    """
    endpoint = connection.endpoint
    own = connection.reply.source.getsockname()
    if endpoint is None or own[1] != endpoint.port:
        return False
    return parse_address(own[0].partition("%")[0]) == endpoint.address


def _local_ports() -> range:
    """Return the ports that the kernel may take as source ports; all where it does not tell."""
    try:
        with open(_LOCAL_PORTS, "rb") as file:  # a codec could not be imported any more
            first, last = map(int, file.read().split())
    except (OSError, ValueError):
        return range(1 << 16)
    return range(first, last + 1)


class Outcome(Struct, frozen=True):
    """What is called with what became of things."""

    watch: Callable[[Stream], None]
    """A stream whose source has become a new socket that is connecting."""
    unwatch: Callable[[socket.SocketType], None]
    """A socket that is not to be used any more."""
    refuse: Callable[[Forwarded], None]
    """A connection for which no endpoint could be reached."""
    short: Callable[[str], None]
    """Of what there are too few, so that a connection has to wait."""
    done: Callable[[], None]
    """After this, when no batch of events is under way: sockets may be closed."""


class Connecting:
    """The connections that are not established yet."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        limits: TcpLimits,
        counters: TcpCounters,
        outcome: Outcome,
        transparent: Transparent | None = None,
    ) -> None:
        self._loop = loop
        self._limits = limits
        self._counters = counters
        self._outcome = outcome
        self._transparent = transparent
        # All have the same time-out, so that the first is always the next. Not a deque: what is
        # established is taken out of the middle, and not kept alive until its time is over.
        self._pending: dict[Forwarded, float] = {}
        self._parked: deque[Forwarded] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._names: dict[int, tuple[Endpoint, Name]] = {}
        self._local_ports = range(0)
        """Source ports that the kernel may take: at no other has a socket met itself."""
        self._ports_until = float("-inf")

    def connect(self, connection: Forwarded) -> None:
        """Try endpoints until one may answer."""
        served = connection.served
        while True:
            now = self._loop.time()
            if now > self._ports_until:
                self._local_ports, self._ports_until = _local_ports(), now + _PORTS_SECONDS
            endpoint = served.choose(connection.client, connection.port, now, connection.tried)
            if endpoint is None:
                self._outcome.refuse(connection)
                return
            connection.endpoint = endpoint
            family, name = self._name(endpoint)
            try:
                sock = socket.SocketType(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0)
            except OSError as error:
                if error.errno not in SHORTAGE:
                    raise
                self._park(connection, now, errno.errorcode[error.errno])
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keep_alive(sock)
            shown = self._transparent
            if shown is not None and shown.is_due(served, connection.client, endpoint):
                client = connection.client, connection.port
                sock, problem = shown.connect(sock, client, name)
            else:
                problem = sock.connect_ex(name)
            connection.request.sink = connection.reply.source = sock
            if not problem or problem == errno.EINPROGRESS:
                self._outcome.watch(connection.reply)
                self._pending[connection] = now + self._limits.connect_seconds
                if self._timer is None:
                    self._timer = self._loop.call_later(self._limits.connect_seconds, self._expire)
                return
            self._outcome.unwatch(sock)
            if self._failed(connection, now, problem) != CONNECT:
                self._outcome.refuse(connection)
                return

    def is_established(self, connection: Forwarded, mask: int) -> bool:
        """Note how an attempt ended, by the events of its socket; try on if it failed.

        Returns whether the endpoint took the connection; it is none of those here then.
        """
        if self._pending.pop(connection, None) is None:
            return False
        problem = 0
        if mask & _BROKEN:
            problem = connection.reply.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        elif (
            connection.endpoint is None
            or connection.endpoint.port not in self._local_ports  # nearly always
            or not _is_to_itself(connection)
        ):
            return True
        self._try_on(connection, problem)
        return False

    def connect_parked(self) -> None:
        """Try those once more that wait for a descriptor."""
        for _ in range(len(self._parked)):
            self.connect(self._parked.popleft())

    def waiting(self) -> Iterator[Forwarded]:
        """Yield all that are here."""
        yield from self._pending
        yield from self._parked

    def give_up(self) -> list[Forwarded]:
        """Return all that are here, and forget them. Their sockets are closed by the caller."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        pending = list(self._pending)
        for one in pending:
            self._outcome.unwatch(one.reply.source)
        found = [*pending, *self._parked]
        self._pending.clear()
        self._parked.clear()
        return found

    def _try_on(self, connection: Forwarded, problem: int) -> None:
        self._outcome.unwatch(connection.reply.source)
        if self._failed(connection, self._loop.time(), problem) == CONNECT:
            self.connect(connection)
        else:
            self._outcome.refuse(connection)

    def _failed(self, connection: Forwarded, now: float, problem: int) -> int:
        """Note that it was not connected, with an errno, or 0. Returns the connection's command.

        Another endpoint may do even where this one is not to blame: each has local ports of its
        own.
        """
        endpoint = connection.endpoint
        if problem in _NO_PORT:
            self._counters.no_local_port += 1
        elif problem in _NOT_ITS_FAULT:
            self._counters.not_connected += 1
        else:
            self._counters.connect_failed += 1
            if endpoint is not None:
                connection.endpoint = None
                connection.served.failed(endpoint, now)
        connection.withdraw()
        if endpoint is not None:
            connection.tried = (*connection.tried, endpoint)
        return connection.failed()

    def _park(self, connection: Forwarded, now: float, reason: str) -> None:
        """Let a connection wait until a descriptor is free, or refuse it if it did for too long."""
        connection.withdraw()
        if connection.parked_at is None:
            connection.parked_at = now
        if now - connection.parked_at > self._limits.connect_seconds:
            self._outcome.refuse(connection)
        else:
            self._parked.append(connection)
        self._outcome.short(reason)

    def _expire(self) -> None:
        """Try on where the time is over."""
        self._timer = None
        now = self._loop.time()
        expired = []
        for connection, until in self._pending.items():
            if until > now:
                self._timer = self._loop.call_at(until, self._expire)
                break
            expired.append(connection)
        for connection in expired:
            del self._pending[connection]
            self._try_on(connection, errno.ETIMEDOUT)
        self._outcome.done()

    def _name(self, endpoint: Endpoint) -> Name:
        """Return an endpoint's name, remembered by identity: its hash would take longer."""
        known = self._names.get(id(endpoint))
        if known is not None:
            return known[1]
        if len(self._names) >= _MOST_NAMES:
            self._names.clear()
        family = socket.AF_INET6 if endpoint.address.version == 6 else socket.AF_INET
        name = family, (str(endpoint.address), endpoint.port)
        self._names[id(endpoint)] = endpoint, name
        return name
