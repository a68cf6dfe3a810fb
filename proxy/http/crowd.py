"""Connections of whoever comes: how many, how long, how much they may send.

Lives here: what stands between a socket and the HTTP server's own protocol. Must not: know HTTP.

A connection is for one request, and is cut after a time however far it has come: a client that
sends or reads slowly holds a descriptor no longer than that. Where there are too many, the oldest
goes, so that whoever comes is heard.
"""

import asyncio
from collections.abc import Callable
from typing import cast

LONGEST_SECONDS = 30.0
"""How long a connection may last: a scrape of many series takes seconds."""
MOST_BYTES = 64 << 10
"""What a client may send; a request without a body needs a few hundred."""
MOST_CONNECTIONS = 128
"""For each crowd."""

Cut = Callable[[], None]


class Crowd:
    """The connections that are open, oldest first."""

    def __init__(self, most: int = MOST_CONNECTIONS, seconds: float = LONGEST_SECONDS) -> None:
        self._most, self.seconds = most, seconds
        self._open: dict[asyncio.Protocol, Cut] = {}

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, one: asyncio.Protocol, cut: Cut) -> None:
        """Let one in, and the oldest out where there are too many."""
        self._open[one] = cut
        if len(self._open) > self._most:
            oldest = next(iter(self._open))
            self._open.pop(oldest)()

    def leave(self, one: asyncio.Protocol) -> None:
        """Forget one that has ended."""
        self._open.pop(one, None)

    def cut_all(self) -> None:
        """End all at once."""
        for cut in list(self._open.values()):
            cut()
        self._open.clear()


class Bounded(asyncio.Protocol):
    """A connection: hands on what comes to `inner`, within the bounds."""

    def __init__(self, crowd: Crowd, inner: asyncio.Protocol) -> None:
        self._crowd, self._inner = crowd, inner
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._received = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to count."""
        self._transport = cast(asyncio.Transport, transport)
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._crowd.seconds, self._transport.abort)
        self._crowd.enter(self, self._transport.abort)
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Hand on what was sent, unless it is too much."""
        self._received += len(data)
        if self._received <= MOST_BYTES:
            self._inner.data_received(data)
        elif self._transport is not None:
            self._transport.abort()

    def eof_received(self) -> bool | None:
        """Hand on that nothing more is sent."""
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        """Hand on that the client reads slowly."""
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        """Hand on that the client reads again."""
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._crowd.leave(self)
        self._inner.connection_lost(exc)
