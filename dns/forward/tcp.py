"""Queries over TCP: a few connections to an upstream, with many questions under way on each.

Lives here: connections, their frames and their ends (RFC 7766). Must not: judge what comes
(reading.py), or decide when it is late (course.py).

Replies may come in any order; they are told apart by id. A server may close an idle connection just
when it is used: a question on a connection that had served before is asked once more on a new one.
"""

import asyncio
import errno
from collections.abc import Callable

from vipd.dns.forward.counters import Counters
from vipd.dns.forward.settings import ForwardSettings
from vipd.dns.forward.upstream import Upstream

MOST_ON_A_LINK = 64
"""Questions under way on one connection."""
MOST_UNKNOWN = 64
"""Frames that belong to no question, until a connection is closed."""
_LENGTH_BYTES = 2
_ID_BYTES = 2


class TcpWay:
    """A query that was sent, or will be. As UdpWay: `heard`, `lost`, `close`."""

    def __init__(
        self, message: bytes, heard: Callable[[bytes], None], lost: Callable[[OSError], None]
    ) -> None:
        self.message = message
        self.heard = heard
        self.lost = lost
        self.link: TcpLink | None = None
        self.was_moved = False
        """Whether a connection was lost under it before."""

    @property
    def id(self) -> bytes:
        """Of the message."""
        return self.message[:_ID_BYTES]

    def close(self) -> None:
        """Hear no more."""
        if self.link is not None:
            self.link.forget(self)


class TcpLinks:
    """The connections to one upstream."""

    def __init__(self, upstream: Upstream, settings: ForwardSettings, counters: Counters) -> None:
        self.upstream = upstream
        self.settings = settings
        self._counters = counters
        self._links: list[TcpLink] = []
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._links)

    def ask(self, way: TcpWay) -> None:
        """Send it on a connection that has room for it; raise OSError where there can be none."""
        if self._is_closed:
            raise OSError(errno.ECANCELED, "the upstream is asked no more")
        link = next((one for one in self._links if one.has_room_for(way)), None)
        counted = self._counters.tcp_reused
        if link is None:
            if len(self._links) >= self.settings.tcp_connections:
                raise OSError(errno.ENOBUFS, "all connections have as many questions as they take")
            link = TcpLink(self)
            self._links.append(link)
            counted = self._counters.tcp_opened
        counted[str(self.upstream)] = counted.get(str(self.upstream), 0) + 1
        link.ask(way)

    def gone(self, link: "TcpLink", ways: list[TcpWay], error: OSError) -> None:
        """Take back what a connection that ended had not answered."""
        self._links.remove(link)
        for way in ways:
            way.link = None
            if not link.has_served or way.was_moved:
                way.lost(error)
                continue
            way.was_moved = True
            try:
                self.ask(way)
            except OSError as second:
                way.lost(second)

    def close(self) -> "list[asyncio.Task[None]]":
        """End all connections; return their tasks, which end soon."""
        self._is_closed = True
        tasks = [one.task for one in self._links]
        for task in tasks:
            task.cancel()
        return tasks


class TcpLink:
    """One connection, from the attempt to open it."""

    def __init__(self, links: TcpLinks) -> None:
        self.has_served = False
        self._links = links
        self._ways: dict[bytes, TcpWay] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._unknown = 0
        self._is_closing = False
        self._loop = asyncio.get_running_loop()
        self._idle: asyncio.TimerHandle | None = None
        self.task = self._loop.create_task(self._run())

    def has_room_for(self, way: TcpWay) -> bool:
        """Whether it takes one more, and this one's id."""
        return (
            not self._is_closing and len(self._ways) < MOST_ON_A_LINK and way.id not in self._ways
        )

    def ask(self, way: TcpWay) -> None:
        """Send it, as soon as the connection stands."""
        way.link = self
        self._ways[way.id] = way
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if self._writer is not None:
            self._write(way)

    def forget(self, way: TcpWay) -> None:
        """Take it that nobody waits for the reply."""
        if self._ways.get(way.id) is way:
            del self._ways[way.id]
            self._rest()

    def _write(self, way: TcpWay) -> None:
        # What is not taken by the peer stays in the writer: at most MOST_ON_A_LINK short queries.
        if self._writer is not None:
            self._writer.write(len(way.message).to_bytes(_LENGTH_BYTES, "big") + way.message)

    def _rest(self) -> None:
        """Close in a while, unless something is asked until then."""
        if not self._ways and self._idle is None and not self._is_closing:
            seconds = self._links.settings.tcp_idle_seconds
            self._idle = self._loop.call_later(seconds, self._close)

    def _close(self) -> None:
        self._is_closing = True
        self.task.cancel()

    async def _run(self) -> None:
        error = OSError(errno.ECONNRESET, "the upstream closed the connection")
        try:
            await self._serve()
        except TimeoutError:
            error = OSError(errno.ETIMEDOUT, "the connection was not made in time")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except OSError as found:
            error = found
        finally:
            self._is_closing = True
            if self._idle is not None:
                self._idle.cancel()
            if self._writer is not None:
                self._writer.transport.abort()
            ways, self._ways = list(self._ways.values()), {}
            self._links.gone(self, ways, error)

    async def _serve(self) -> None:
        upstream, settings = self._links.upstream, self._links.settings
        async with asyncio.timeout(settings.most_timeout_seconds):
            reader, self._writer = await asyncio.open_connection(upstream.address, upstream.port)
        for way in list(self._ways.values()):
            self._write(way)
        self._rest()
        while self._unknown < MOST_UNKNOWN:
            size = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "big")
            self._frame(await reader.readexactly(size))

    def _frame(self, data: bytes) -> None:
        way = self._ways.get(data[:_ID_BYTES])
        if way is None:
            self._unknown += 1
            return
        self.has_served = True
        way.heard(data)
