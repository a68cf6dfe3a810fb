"""The TCP forwarder of one worker: connections from listeners to endpoints, on one event loop.

Lives here: what workers ask for, and the beginning and the end of each connection. Must not: decide
what becomes of a connection (connection.py), see to events (events.py), move bytes (pump.py),
accept (accepting.py), connect (connecting.py), or choose an endpoint (served.py).
"""

import asyncio
import socket
import struct
from collections.abc import Callable
from ipaddress import ip_address
from typing import Final

from vipd.backends import log
from vipd.backends.userspace.forwarder import interface
from vipd.backends.userspace.forwarder.accepting import Accepting
from vipd.backends.userspace.forwarder.connecting import Connecting, Outcome
from vipd.backends.userspace.forwarder.connection import CLOSE, RESET
from vipd.backends.userspace.forwarder.events import Events
from vipd.backends.userspace.forwarder.proxy_protocol import header
from vipd.backends.userspace.forwarder.pump import Pump
from vipd.backends.userspace.forwarder.streams import Forwarded, Frontend, Serves, Stream
from vipd.backends.userspace.forwarder.tcp_limits import TcpCounters, TcpLimits
from vipd.backends.userspace.forwarder.transparent import Transparent
from vipd.backends.userspace.objects import Place
from vipd.proxy.virtualserver import Endpoint

_NO_LINGER: Final = struct.pack("ii", 1, 0)
"""For SO_LINGER: close() then resets the connection (socket(7))."""


class TcpForwarder:
    """Forwards the connections of places to their endpoints."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        limits: TcpLimits | None = None,
        transparent: Transparent | None = None,
    ) -> None:
        self.counters = TcpCounters()
        self._loop = loop
        self._limits = limits or TcpLimits()
        self._pump = Pump(self._limits)
        self._frontends: dict[Place, Frontend] = {}
        self._established: dict[Frontend, set[Forwarded]] = {}
        """Of those that have any: a few of ten thousand."""
        self._by_listener: dict[int, Frontend] = {}
        self._last_crowd = float("-inf")
        self._events = Events(loop, self._pump, self._connected, self._over, self._fail)
        outcome = Outcome(
            watch=self._events.watch,
            unwatch=self._events.unwatch,
            refuse=self._refuse,
            short=lambda reason: self._accepting.pause(reason),
            done=self._events.close_sockets,
        )
        self._connecting = Connecting(loop, self._limits, self.counters, outcome, transparent)
        self._accepting = Accepting(
            loop,
            self._events.epoll,
            self._limits,
            self.counters,
            self._start,
            self._connect_parked,
        )
        self._events.accept = self._accepting.ready
        self._events.freed = self._accepting.freed

    def listen(self, place: Place, listener: socket.socket, serve: Callable[[], Serves]) -> None:
        """Forward the connections of a bound, listening, non-blocking socket, and own it.

        `serve` is called for each new connection and returns the state of the place. A place that
        was stopped takes up what is left of its connections. Raises ValueError if the place has a
        listener already; after that, and after OSError, it is still the caller's.
        """
        frontend = self._frontends.get(place)
        if frontend is None:
            frontend = Frontend(place, serve)
        elif frontend.listener is not None:
            raise ValueError(f"{place} has a listener already")
        self._accepting.add(listener)
        self._frontends[place] = frontend
        if frontend.taken:
            self._take_over(frontend, serve())
        frontend.serve = serve
        frontend.listener = listener
        self._by_listener[listener.fileno()] = frontend

    def stop(self, place: Place) -> None:
        """Close the listener, once what waits in its queue is accepted; connections go on."""
        frontend = self._frontends.get(place)
        if frontend is None or frontend.listener is None:
            return
        self._accepting.take_all(frontend.listener)
        self._take_listener(frontend).close()
        self._events.close_sockets()

    def hand_over(self, place: Place) -> socket.socket | None:
        """Return the listener, which is open and not used here any more; connections go on."""
        frontend = self._frontends.get(place)
        if frontend is None or frontend.listener is None:
            return None
        return self._take_listener(frontend)

    def cut(self, place: Place, endpoint: Endpoint) -> int:
        """Reset the established connections to an endpoint at both ends. Returns how many."""
        frontend = self._frontends.get(place)
        if frontend is None:
            return 0
        found = [
            one
            for one in self._established.get(frontend, ())
            if one.endpoint is not None
            and one.endpoint.port == endpoint.port
            and one.endpoint.address == endpoint.address
        ]
        for one in found:
            if one.reset() == RESET:
                self.counters.cut += 1
                self._end(one, reset=True)
        self._events.close_sockets()
        return len(found)

    def allow(self, connections: int) -> None:
        """Have no more than so many from now on, nor more than the limits say; those there stay."""
        self._accepting.allow(connections)

    @property
    def is_full(self) -> bool:
        """Whether nothing is accepted now, for lack of room."""
        return self._accepting.is_short

    def descriptors(self) -> int:
        """Return how many are taken by listeners, connections and pipes, or soon will be."""
        return len(self._accepting) + 2 * (self._accepting.taken + self._pump.pipes)

    def connections(self) -> dict[Place, int]:
        """Return how many there are of each place that has any, those being connected included."""
        found = {frontend.place: len(some) for frontend, some in self._established.items()}
        for one in self._connecting.waiting():
            place = one.frontend.place
            found[place] = found.get(place, 0) + 1
        return found

    def of_client(self, place: Place, client: str) -> list[tuple[int, Endpoint]]:
        """Return source port and endpoint of each connection that a client has there."""
        frontend = self._frontends.get(place)
        if frontend is None:
            return []
        return [
            (one.port, one.endpoint)
            for one in self._established.get(frontend, ())
            if one.client == client and one.endpoint is not None
        ]

    def close(self) -> None:
        """Reset all connections and close all listeners, at once. Nothing works after this."""
        if self._events.epoll.closed:
            return
        for one in self._connecting.give_up():
            one.reset()
            self._refuse(one)
        for one in [each for some in self._established.values() for each in some]:
            one.reset()
            self.counters.cut += 1
            self._end(one, reset=True)
        self._events.close()
        self._accepting.close()
        self._pump.close()
        self._frontends.clear()
        self._by_listener.clear()

    def _fail(self, stream: Stream) -> None:
        """Log an error of this program, and end the connection that met it."""
        log.exception("a connection failed inside")
        if not stream.wants:
            return
        self.counters.failed_inside += 1
        connection = stream.connection
        connection.reset()
        if connection in self._established.get(connection.frontend, ()):
            self._end(connection, reset=True)
        else:
            self._events.unwatch(stream.source)
            self._turn_away(connection)

    # The life of connections

    def _start(self, listener: int, descriptor: int, client: tuple[str, int]) -> None:
        """Begin with a connection that was just accepted."""
        frontend = self._by_listener[listener]
        sock = socket.SocketType(frontend.family, socket.SOCK_STREAM, 0, descriptor)
        connection = Forwarded(frontend, sock, client, self._limits.attempts)
        frontend.taken += 1
        within = self._accepting.came(connection.client)
        try:
            served = connection.served
            if not within:
                self.counters.over_share += 1
                self._note_share(connection.client)
            elif served.allows(connection.client):
                if served.asks_interface:
                    served.came_by(connection.client, interface.of_connection(sock))
                self._connecting.connect(connection)
                return
            else:
                self.counters.denied += 1
        except Exception:
            log.exception("a connection failed inside")
            self.counters.failed_inside += 1
        self._turn_away(connection)

    def _note_share(self, client: str) -> None:
        """Say that a client has too many connections, once in a while."""
        now = self._loop.time()
        if now - self._last_crowd > self._limits.quiet_seconds:
            log.warning("a client has too many connections", client=client)
        self._last_crowd = now

    def _connect_parked(self) -> None:
        self._connecting.connect_parked()
        self._events.close_sockets()

    def _connected(self, stream: Stream, mask: int) -> None:
        """Begin to forward, if the endpoint took the connection."""
        connection = stream.connection
        endpoint = connection.endpoint
        if endpoint is None or not self._connecting.is_established(connection, mask):
            return
        served = connection.served
        proxied = served.forwarding.proxy_protocol
        served.began(connection.client, endpoint, self._loop.time())
        connection.established(holds=proxied)
        self._established.setdefault(connection.frontend, set()).add(connection)
        connection.tried = ()
        request = connection.request
        self._events.watch(request)
        if proxied:
            place = connection.frontend.place
            client = ip_address(connection.client)
            self._pump.hold(request, header(client, connection.port, place.address, place.port))
            self._events.do(request, self._pump.write(request))
        if connection.is_over:
            return
        self._events.readable(stream, mask)

    def _over(self, connection: Forwarded, command: int) -> None:
        """Let go of a connection that has ended or was reset."""
        if command == CLOSE:
            self.counters.ended += 1
        else:
            self.counters.reset += 1
        self._end(connection, reset=command == RESET)

    def _refuse(self, connection: Forwarded) -> None:
        """Reset a client whom no endpoint took."""
        self.counters.refused += 1
        self._turn_away(connection)

    def _turn_away(self, connection: Forwarded) -> None:
        """Reset a client whose connection was never established."""
        connection.reset()
        connection.withdraw()
        sock = connection.request.source
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self._events.discard(sock)
        self._leave(connection)

    def _end(self, connection: Forwarded, *, reset: bool) -> None:
        """Let go of an established connection that is over."""
        request, reply = connection.request, connection.reply
        for stream in (request, reply):
            if reset:
                stream.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            if stream.held or stream.pipe is not None:
                self._pump.forget(stream)
            self._events.unwatch(stream.source)
        there = self._established.get(connection.frontend)
        if there is not None:
            there.discard(connection)
            if not there:
                del self._established[connection.frontend]
        if connection.endpoint is not None:
            connection.served.ended(connection.endpoint)
        self._leave(connection)

    def _leave(self, connection: Forwarded) -> None:
        frontend = connection.frontend
        self._accepting.left(connection.client)
        frontend.taken -= 1
        if not frontend.taken and frontend.listener is None:
            self._forget(frontend)
        connection.unlink()

    def _take_over(self, frontend: Frontend, serves: Serves) -> None:
        """Count the connections that are still there with what serves the place now."""
        now = self._loop.time()
        there = self._established.get(frontend, set())
        waiting = len(there) < frontend.taken
        for one in there:
            if one.endpoint is not None and one.served is not serves:
                one.served.ended(one.endpoint)
                serves.takes_over(one.client, one.endpoint, now)
            one.served = serves
        for one in self._connecting.waiting() if waiting else ():
            if one.frontend is frontend and one.served is not serves:
                if one.endpoint is not None:
                    one.served.withdrawn(one.endpoint)
                    serves.takes_over(one.client, one.endpoint, now, pending=True)
                one.served = serves

    def _take_listener(self, frontend: Frontend) -> socket.socket:
        """Return the listener of a place that has one; the place has none after this."""
        listener = frontend.listener
        assert listener is not None
        self._accepting.remove(listener)
        del self._by_listener[listener.fileno()]
        frontend.listener = None
        if not frontend.taken:
            self._forget(frontend)
        return listener

    def _forget(self, frontend: Frontend) -> None:
        if self._frontends.get(frontend.place) is frontend:
            del self._frontends[frontend.place]
