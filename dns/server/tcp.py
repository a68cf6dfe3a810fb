"""Questions over TCP: connections of one listener are accepted and bounded here.

Lives here: accepting, who has to go where there are too many, and the end. Must not: read a
connection (connection.py).
"""

import asyncio
import errno
import socket

from vipd.backends.userspace.forwarder.crowd import Crowd
from vipd.dns.server.connection import Connection
from vipd.dns.server.serving import Serving

AT_ONCE = 32
"""Connections that are accepted of one listener before others have their turn."""
MOST_ROUNDS = 1000
"""Of so many, when no more are to come."""
MOST_OF_STRANGERS = 16
"""Connections of all who may not ask, together: they are told so, no more."""
STRANGERS = ""
"""Their place in the crowd."""
PAUSE_SECONDS = 0.1
_SHORTAGE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Connections:
    """All connections of this process, whatever their listener."""

    def __init__(self, most: int, most_of_client: int, serving: Serving) -> None:
        self.most, self.most_of_client = most, most_of_client
        self._serving = serving
        self._crowd: Crowd[Connection] = Crowd()
        self._all: set[Connection] = set()
        self._nobody = asyncio.Event()
        self._nobody.set()

    def __len__(self) -> int:
        return len(self._all)

    def add(self, one: Connection) -> None:
        """Take one in, and end another where there are too many."""
        crowd, counters = self._crowd, self._serving.counters.by_name
        bound = MOST_OF_STRANGERS if one.client == STRANGERS else self.most_of_client
        if crowd.size_of(one.client) >= bound:
            counters["tcp_evicted"] += 1
            crowd.idlest_of(one.client).abort()
        elif len(crowd) >= self.most:
            counters["tcp_evicted"] += 1
            crowd.idlest().abort()
        self._all.add(one)
        crowd.add(one.client, one)
        self._nobody.clear()

    def used(self, one: Connection) -> None:
        """Note that it is used now."""
        if one in self._all:
            self._crowd.used(one.client, one)

    def remove(self, one: Connection) -> None:
        """Forget one that has ended; nothing happens where it is forgotten."""
        if one in self._all:
            self._all.remove(one)
            self._crowd.remove(one.client, one)
            if not self._all:
                self._nobody.set()

    async def finish(self) -> None:
        """End each as soon as its questions are answered; return when none is left."""
        for one in list(self._all):
            one.finish()
        await self._nobody.wait()

    def close(self) -> None:
        """End all of them now."""
        for one in list(self._all):
            one.abort()


class TcpServer:
    """Accepts at one listener, which is the caller's to close."""

    def __init__(self, listener: socket.socket, serving: Serving, connections: Connections) -> None:
        listener.setblocking(False)
        self.listener = listener
        self._serving, self._connections = serving, connections
        six = listener.family == socket.AF_INET6
        self._traffic = serving.counters.traffic("tcp", 2 if six else 1)
        self._accepts = False
        self._resume: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Accept from now on."""
        if not self._accepts:
            self._accepts = True
            asyncio.get_running_loop().add_reader(self.listener.fileno(), self._accept)

    def stop(self) -> None:
        """Accept no more."""
        if self._resume is not None:
            self._resume.cancel()
            self._resume = None
        if self._accepts:
            self._accepts = False
            asyncio.get_running_loop().remove_reader(self.listener.fileno())

    def drain(self) -> None:
        """Accept those who have connected already."""
        for _ in range(MOST_ROUNDS):
            if not self._accept():
                return

    def _accept(self) -> bool:
        """Accept a few; return whether there may be more."""
        serving = self._serving
        for _ in range(AT_ONCE):
            try:
                accepted, peer = self.listener.accept()
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno in _SHORTAGE:
                    serving.counters.by_name["tcp_accept_failed"] += 1
                    self.stop()
                    self._resume = asyncio.get_running_loop().call_later(PAUSE_SECONDS, self.start)
                    return False
                continue  # the client went away while it waited
            accepted.setblocking(False)
            source = str(peer[0])
            serving.counters.by_name["tcp_accepted"] += 1
            admitted = serving.access.admits(source)
            if not admitted:
                serving.counters.by_name["tcp_refused"] += 1
            client = source if admitted else STRANGERS
            one = Connection(accepted, peer[:2], client, serving, self._connections, self._traffic)
            self._connections.add(one)
            one.start()
        return True
