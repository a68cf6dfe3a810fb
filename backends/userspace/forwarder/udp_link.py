"""A UDP socket that is connected to one endpoint, for one session.

Lives here: the socket, the stream on it, what waits until it is ready, and the errors that the
network sends back. Must not: know clients, places or bounds (udp.py).

Replies come through asyncio-dgram. Datagrams are sent on the socket itself: the stream's own send
would wait where the kernel has no room, and with it every other client of the place; UDP drops.
The stream is made before the socket is connected, for asyncio-dgram cannot take a connected one
under uvloop (it writes to a private attribute of asyncio's transport). Until it is connected,
nothing can arrive.
"""

import asyncio
import errno
import socket
from collections import deque
from collections.abc import Callable

import asyncio_dgram

from vipd.proxy.virtualserver import Endpoint

MOST_WAITING = 32
"""Datagrams that wait while the socket is made ready, which takes two rounds of the loop."""
NOT_ITS_FAULT = frozenset(
    {
        errno.EAGAIN,  # no room in the socket; at connect, no local port left
        errno.EMSGSIZE,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.ENOSPC,
    }
)
"""Errors that say nothing of the endpoint."""

Datagram = bytes | memoryview


class UdpLink:
    """A way to an endpoint; must be made inside a running loop.

    `heard` is called with each reply. `lost` is called once, if the way could not be opened or the
    library gave it up, with the error and the datagrams that were not sent; not after `close`.
    `bind` is called before the socket is connected, to give it an address that is not the node's,
    and returns whether it has. Raise OSError where there is no socket to be had.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        heard: Callable[[bytes], None],
        lost: Callable[[OSError, list[bytes]], None],
        bind: Callable[[socket.socket], bool] | None = None,
    ) -> None:
        family = socket.AF_INET if endpoint.address.version == 4 else socket.AF_INET6
        self._socket = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._to = (str(endpoint.address), endpoint.port)
        self._heard = heard
        self._lost = lost
        self._bind = bind
        self._is_bound = False
        self._waiting: deque[bytes] = deque()
        self._stream: asyncio_dgram.aio.DatagramStream | None = None
        self._closed = False
        self.task = asyncio.get_running_loop().create_task(self._run())
        """Ends soon after `close`."""
        # Here and not in the task: one that is cancelled at once never runs at all.
        self.task.add_done_callback(lambda _: self._socket.close())

    def send(self, datagram: Datagram) -> None:
        """Send a datagram, or keep it until the way is open.

        Raise BlockingIOError where there is no room for it, and OSError for what was sent before:
        the network says that the endpoint is not there. The datagram is not sent then.
        """
        if self._stream is None:
            if len(self._waiting) >= MOST_WAITING:
                raise BlockingIOError(errno.EAGAIN, "too many datagrams wait for a new session")
            self._waiting.append(bytes(datagram))
            return
        self.check()
        self._write(datagram)

    def check(self) -> None:
        """Raise the OSError that the network sent back since the last look, if there is one."""
        if self._stream is None:
            return
        try:
            _ = self._stream.exception
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise

    def close(self) -> None:
        """Give the way up: nothing is heard from now on."""
        if self._closed:
            return
        self._closed = True
        if self._stream is not None:
            self._stream.close()
        else:
            self.task.cancel()

    def _write(self, datagram: Datagram) -> None:
        try:
            self._socket.send(datagram)
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
            # The path's MTU was learned from an earlier one; this time the kernel fragments.
            self._socket.send(datagram)

    async def _run(self) -> None:
        stream = None
        try:
            stream = await asyncio_dgram.from_socket(self._socket)
            if self._bind is not None:
                self._is_bound = self._bind(self._socket)
            self._socket.connect(self._to)
            self._to = self._socket.getpeername()[:2] if self._is_bound else self._to
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
            self._stream = stream
            while True:
                await self._hear(stream)
        except asyncio_dgram.TransportClosed:
            self._give_up(ConnectionAbortedError("the event loop closed the socket"))
        except OSError as error:
            self._give_up(error)
        finally:
            if stream is not None:
                stream.close()

    async def _hear(self, stream: asyncio_dgram.aio.DatagramStream) -> None:
        try:
            reply, source = await stream.recv()
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
        else:
            # What came between bind() and connect() was for the client itself.
            if not self._closed and (not self._is_bound or self._is_endpoint(source)):
                self._heard(reply)

    def _is_endpoint(self, source: object) -> bool:
        return isinstance(source, tuple) and source[:2] == self._to

    def _give_up(self, error: OSError) -> None:
        if not self._closed:
            self._closed = True
            self._lost(error, list(self._waiting))
