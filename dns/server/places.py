"""Where this process answers: the sockets of each address, as long as they are answered on.

Lives here: their life together. Must not: read them (udp.py, tcp.py).
"""

import asyncio
import socket
from collections.abc import Collection, Sequence

from vipd.dns.server.messages import WireListen
from vipd.dns.server.serving import Serving
from vipd.dns.server.tcp import Connections, TcpServer
from vipd.dns.server.udp import UdpServer


class Place:
    """The two sockets of an address."""

    def __init__(
        self,
        listen: WireListen,
        sockets: tuple[socket.socket, socket.socket],
        serving: Serving,
        connections: Connections,
    ) -> None:
        self.listen = listen
        self.udp = UdpServer(sockets[0], serving)
        self.tcp = TcpServer(sockets[1], serving, connections)

    def start(self) -> None:
        """Answer from now on."""
        self.udp.start()
        self.tcp.start()

    def stop(self) -> None:
        """Take no new questions."""
        self.udp.stop()
        self.tcp.stop()

    async def leave(self) -> None:
        """Answer what has arrived, and close. Connections go on until they are idle."""
        self.stop()
        self.udp.drain()
        self.tcp.drain()
        await self.udp.finish()
        self.close()

    def close(self) -> None:
        """Close the sockets, which others may have as well."""
        self.stop()
        self.udp.listener.close()
        self.tcp.listener.close()


class Places:
    """All of them."""

    def __init__(self, serving: Serving, connections: Connections) -> None:
        self._serving, self._connections = serving, connections
        self._all: list[Place] = []
        self._leaving: dict[asyncio.Task[None], Place] = {}
        self._serves = False
        self._dropped = 0
        """What was dropped at addresses that were left."""

    @property
    def listens(self) -> list[WireListen]:
        """Where it is answered; an address may have several pairs of sockets."""
        return [one.listen for one in self._all]

    @property
    def sockets(self) -> list[socket.socket]:
        """The sockets, in the order of `listens`, UDP before TCP."""
        return [one for place in self._all for one in (place.udp.listener, place.tcp.listener)]

    def add(self, listens: Sequence[WireListen], sockets: Sequence[socket.socket]) -> None:
        """Answer there too, with two sockets each."""
        for at, listen in enumerate(listens):
            pair = sockets[2 * at], sockets[2 * at + 1]
            place = Place(listen, pair, self._serving, self._connections)
            self._all.append(place)
            if self._serves:
                place.start()

    def leave(self, listens: Collection[WireListen]) -> None:
        """Answer there no more, once what has arrived is answered."""
        for place in [one for one in self._all if one.listen in listens]:
            self._all.remove(place)
            self._dropped += place.udp.drops()
            task = asyncio.get_running_loop().create_task(place.leave())
            self._leaving[task] = place
            task.add_done_callback(self._left)

    def _left(self, task: asyncio.Task[None]) -> None:
        del self._leaving[task]

    def start(self) -> None:
        """Answer from now on."""
        self._serves = True
        for place in self._all:
            place.start()

    def stop(self) -> None:
        """Take no new questions."""
        self._serves = False
        for place in self._all:
            place.stop()

    async def finish(self) -> None:
        """Return when nothing waits any more."""
        for place in (*self._all, *self._leaving.values()):
            await place.udp.finish()

    def drops(self) -> int:
        """Return how many questions the kernel had no room for."""
        return self._dropped + sum(one.udp.drops() for one in self._all)

    def close(self) -> None:
        """Close all sockets."""
        for task in list(self._leaving):
            task.cancel()
        for place in (*self._all, *self._leaving.values()):
            place.close()
