"""HTTP for those who watch: one request a connection, answered and closed.

Lives here: one listener and every bound of its clients. Must not: know what is told there
(metrics_server.py).

It shares a thread with questions, so what strangers can make it do is bounded: PER_SECOND requests,
MOST connections of which the oldest goes, LONGEST bytes and SECONDS of each. What is beyond waits
in the kernel.
"""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from vipd.backends import log

MOST = 32
"""Connections at once."""
PER_SECOND, AT_ONCE = 20, 10
"""Connections accepted each second, and without a pause: a request takes about 0.2 ms, so all that
may come take less than 1 % of the time."""
LONGEST = 8192
"""Bytes of a request's head."""
SECONDS = 5.0
"""From the first byte to the end of a connection."""
_PAUSE_SECONDS = 0.1


_PHRASES = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


class Response(NamedTuple):
    """What is told."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


Respond = Callable[[str], Awaitable[Response]]
"""Returns what is told at a path."""


class HttpServer:
    """Answers at one listener."""

    def __init__(self, listener: socket.socket, respond: Respond) -> None:
        listener.setblocking(False)
        self.listener = listener
        self._respond = respond
        self._open: dict[asyncio.Task[None], None] = {}
        self._left = float(AT_ONCE)
        self._then = 0.0
        self._reads = False
        self._resume: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Answer from now on."""
        if not self._reads:
            self._reads = True
            asyncio.get_running_loop().add_reader(self.listener.fileno(), self._accept)

    def stop(self) -> None:
        """Accept no more."""
        if self._resume is not None:
            self._resume.cancel()
            self._resume = None
        if self._reads:
            self._reads = False
            asyncio.get_running_loop().remove_reader(self.listener.fileno())

    def close(self) -> None:
        """End everything."""
        self.stop()
        for task in list(self._open):
            task.cancel()
        self.listener.close()

    def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._left = min(AT_ONCE, self._left + (now - self._then) * PER_SECOND)
        self._then = now
        while self._left >= 1:
            try:
                accepted, _ = self.listener.accept()
            except BlockingIOError:
                return
            except OSError:  # no descriptor, or the client has gone
                break
            self._left -= 1
            accepted.setblocking(False)
            if len(self._open) >= MOST:
                oldest = next(iter(self._open))
                del self._open[oldest]
                oldest.cancel()
            task = loop.create_task(self._serve(accepted))
            self._open[task] = None
            task.add_done_callback(lambda ended: self._open.pop(ended, None))
        self.stop()
        self._resume = loop.call_later(_PAUSE_SECONDS, self.start)

    async def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(SECONDS):
                loop = asyncio.get_running_loop()
                head = bytearray()
                while b"\r\n\r\n" not in head and len(head) <= LONGEST:
                    data = await loop.sock_recv(client, LONGEST)
                    if not data:
                        return
                    head += data
                await loop.sock_sendall(client, await self._reply(bytes(head)))
                client.shutdown(socket.SHUT_WR)

    async def _reply(self, head: bytes) -> bytes:
        """Return the reply to a request."""
        words = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        method = words[0]
        if len(head) > LONGEST:
            told = _only(431)
        elif len(words) != 3 or not words[2].startswith("HTTP/1."):
            told = _only(400)
        elif method not in ("GET", "HEAD"):
            told = _only(405)
        else:
            try:
                told = await self._respond(words[1].partition("?")[0])
            except Exception:  # nobody who asks may end the process
                log.exception("metrics are not told")
                told = _only(500)
        lines = [
            f"HTTP/1.1 {told.status} {_PHRASES[told.status]}",
            f"Content-Type: {told.content_type}",
            f"Content-Length: {len(told.body)}",
            "Connection: close",
        ]
        if told.status == 405:
            lines.append("Allow: GET, HEAD")
        body = b"" if method == "HEAD" else told.body
        return "\r\n".join([*lines, "", ""]).encode() + body


def _only(status: int) -> Response:
    return Response(status, f"{_PHRASES[status]}\n".encode())
