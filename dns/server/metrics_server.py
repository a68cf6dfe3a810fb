"""/metrics, /ready and /health of all processes together, told by the first of them.

Lives here: what each path says, and asking the others. Must not: speak HTTP (http.py), or add up
(metrics.py).

A process that answers questions tells, not the daemon: it is there while the daemon is not.
"""

import asyncio
import math
import socket
from collections.abc import Callable, Collection, Sequence

import msgspec

from vipd.backends.userspace.channel import Channel
from vipd.dns.server import messages
from vipd.dns.server.http import HttpServer, Response
from vipd.dns.server.messages import Tell, Told, WireListen
from vipd.dns.server.metrics import CONTENT_TYPE, Sum, Values, exposition, values_of
from vipd.dns.settings import DNS_PORT

KEEP_SECONDS = 0.5
"""For which a text is told again: whoever asks faster learns nothing new."""
PATIENCE_SECONDS = 1.0
"""For a sibling to say how it is; meanwhile only what it has counted is told."""


class _Sibling:
    """Another process, and what it last said."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._asking: asyncio.Task[Told] | None = None
        self.told: Told | None = None
        """None while it does not answer."""

    async def look(self) -> bool:
        """Let it say how it is; one that takes long is heard next time. Return whether it lives."""
        if self._asking is None:
            self._asking = asyncio.get_running_loop().create_task(self._ask())
        await asyncio.wait((self._asking,), timeout=PATIENCE_SECONDS)
        if not self._asking.done():
            self.told = None
            return True
        asking, self._asking = self._asking, None
        try:
            self.told = asking.result()
        except (OSError, EOFError, msgspec.DecodeError):
            return False
        return True

    async def _ask(self) -> Told:
        await self._channel.send(messages.encode(Tell()))
        return messages.told_of((await self._channel.receive())[0])

    def close(self) -> None:
        """Ask no more."""
        if self._asking is not None:
            self._asking.cancel()
        self._channel.close()


class MetricsServer:
    """Tells at some listeners. `own` says how this process is."""

    def __init__(self, own: Callable[[], Told]) -> None:
        self._own = own
        self._servers: list[tuple[WireListen, HttpServer]] = []
        self._serves = False
        self._siblings: dict[int, _Sibling] = {}
        self._sum = Sum()
        self._text = b""
        self._made_at = -math.inf
        self._asking: asyncio.Task[None] | None = None

    @property
    def listens(self) -> list[WireListen]:
        """Where it tells."""
        return [listen for listen, _ in self._servers]

    @property
    def sockets(self) -> list[socket.socket]:
        """The sockets, in that order."""
        return [one.listener for _, one in self._servers]

    def change(
        self,
        listens: Sequence[WireListen],
        sockets: Sequence[socket.socket],
        leave: Collection[WireListen],
    ) -> None:
        """Tell there too, and elsewhere no more."""
        for listen, one in zip(listens, sockets, strict=True):
            server = HttpServer(one, self.respond)
            self._servers.append((listen, server))
            if self._serves:
                server.start()
        for listen, server in [one for one in self._servers if one[0] in leave]:
            self._servers.remove((listen, server))
            server.close()

    def start(self) -> None:
        """Tell from now on."""
        self._serves = True
        for _, server in self._servers:
            server.start()

    def stop(self) -> None:
        """Take no more requests."""
        self._serves = False
        for _, server in self._servers:
            server.stop()

    def close(self) -> None:
        """End everything."""
        for _, server in self._servers:
            server.close()
        for number in list(self._siblings):
            self._lose(number)

    async def meet(self, number: int, connection: socket.socket) -> None:
        """Ask another process too; one of the same number has gone."""
        sibling = _Sibling(Channel(connection))
        lives = await sibling.look()
        self._lose(number)
        if not lives or sibling.told is None:
            sibling.close()
            return
        self._siblings[number] = sibling
        self._sum.meet(number, _values(sibling.told))

    async def respond(self, path: str) -> Response:
        """Return what is told at a path."""
        if path == "/metrics":
            return Response(200, await self._metrics(), CONTENT_TYPE)
        if path == "/health":
            return Response(200, b"OK")
        if path == "/ready":
            await self._metrics()  # looks at the others
            all_told = (self._own(), *(one.told for one in self._siblings.values()))
            if all(one is not None and one.synced for one in all_told):
                return Response(200, b"OK")
            return Response(503, b"kubernetes")  # CoreDNS's plugin of that name
        return Response(404, b"there is /metrics, /ready and /health\n")

    async def _metrics(self) -> bytes:
        now = asyncio.get_running_loop().time()
        if self._asking is None and now - self._made_at >= KEEP_SECONDS:
            self._asking = asyncio.get_running_loop().create_task(self._made())
        if self._asking is not None:
            await asyncio.shield(self._asking)
        return self._text

    async def _made(self) -> None:
        try:
            await asyncio.gather(*(self._look(number) for number in list(self._siblings)))
            own = self._own()
            self._sum.take(own.number, _values(own))
            self._text = exposition(self._sum.values())
            self._made_at = asyncio.get_running_loop().time()
        finally:
            self._asking = None

    async def _look(self, number: int) -> None:
        """Let a sibling say how it is."""
        sibling = self._siblings[number]
        lives = await sibling.look()
        if self._siblings.get(number) is not sibling:
            return  # another came in its place meanwhile
        if not lives:
            self._lose(number)
        elif sibling.told is not None:
            self._sum.take(number, _values(sibling.told))
        else:
            self._sum.silence(number)

    def _lose(self, number: int) -> None:
        sibling = self._siblings.pop(number, None)
        if sibling is not None:
            sibling.close()
            self._sum.lose(number)


def _values(told: Told) -> Values:
    port = told.listens[0][1] if told.listens else DNS_PORT
    return values_of(told, f"dns://:{port}")
