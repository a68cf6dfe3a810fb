"""The clients of streams.py: each sends and receives one stream, in pieces with short pauses.

Lives here: one connection, from the connect to how it ended. Must not: know who may be killed.
"""

import asyncio
import contextlib
import random
import socket
from typing import Final

from tests.netns.streams import GREETING, HEAD, WHOLE, Arrived, WrongByteError, piece

SMALLEST, LARGEST = 3_000, 100_000
"""Bytes of a stream."""
LONGEST_PAUSE_SECONDS = 0.15
_MOST_PIECES = 8
GOOD: Final = "whole"
"""How a stream ended that lost nothing."""


class Talk:
    """One connection; `pod` is known once `greeted` is set.

    It says no more than its first piece until `go` is set, and not its last one until `end` is: on
    no machine it is so quick that it has ended before, nor so slow that it has not begun.
    `ended` is empty while it lasts, and then GOOD or what went wrong.
    """

    def __init__(
        self,
        number: int,
        opened: socket.socket,
        to: tuple[str, int],
        go: asyncio.Event,
        end: asyncio.Event,
    ) -> None:
        self.lots = random.Random(number)
        self.number = number
        self.sends = self._size()
        self.reply = Arrived(number, "reply", self._size())
        self.pod = ""
        self.name: tuple[str, int] = ("", 0)
        """The client's own address and port."""
        self.greeted = asyncio.Event()
        """Also set when it has ended before."""
        self.ended = ""
        self._socket = opened
        self._to = to
        self._go = go
        self._end = end

    def __str__(self) -> str:
        got = f"{self.reply.count} of {self.reply.size}"
        return f"{self.number} from {self.name} served by {self.pod or '?'}: {self.ended}, {got}"

    def _size(self) -> int:
        share: float = (LARGEST / SMALLEST) ** self.lots.random()
        return round(SMALLEST * share)

    @property
    def is_whole(self) -> bool:
        return self.ended == GOOD

    async def run(self) -> None:
        """Talk, and note how it ended."""
        self._socket.setblocking(False)
        with self._socket:
            try:
                await asyncio.get_running_loop().sock_connect(self._socket, self._to)
                host, port = self._socket.getsockname()[:2]
                self.name = (host, port)
                sending = asyncio.create_task(self._send())
                try:
                    self.ended = await self._receive()
                finally:
                    sending.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await sending
            except OSError as error:
                self.ended = error.strerror or str(error)
            except WrongByteError as error:
                self.ended = f"wrong: {error}"
            finally:
                self.greeted.set()

    async def _send(self) -> None:
        loop = asyncio.get_running_loop()
        cuts = [self.lots.randrange(1, self.sends) for _ in range(_MOST_PIECES - 1)]
        first = 0
        data = HEAD.pack(self.number, self.sends, self.reply.size)
        # A connection that breaks is told by its receiving side.
        with contextlib.suppress(OSError):
            for last in sorted({*cuts, self.sends}):
                if last == self.sends:
                    await self._end.wait()
                await loop.sock_sendall(
                    self._socket, data + piece(self.number, "request", first, last - first)
                )
                first, data = last, b""
                await self._go.wait()
                await asyncio.sleep(self.lots.uniform(0, LONGEST_PAUSE_SECONDS))
            self._socket.shutdown(socket.SHUT_WR)

    async def _receive(self) -> str:
        """Return how it ended; raise OSError or WrongByteError."""
        loop = asyncio.get_running_loop()
        received = b""
        while len(received) < GREETING.size:
            if not (data := await loop.sock_recv(self._socket, GREETING.size - len(received))):
                return "ended before the first byte"
            received += data
        pod, number = GREETING.unpack(received)
        if number != self.number:
            raise WrongByteError(f"the greeting of {number} for {self.number}")
        self.pod = pod.rstrip(b"\0").decode()
        self.greeted.set()
        trailer = b""
        while data := await loop.sock_recv(self._socket, 1 << 16):
            left = self.reply.size - self.reply.count
            if data[:left]:
                self.reply.take(data[:left])
            trailer += data[left:]
            if not WHOLE.startswith(trailer):
                raise WrongByteError(f"{trailer!r} after the reply of {self.number}")
        return GOOD if self.reply.is_whole and trailer == WHOLE else "ended too early"
