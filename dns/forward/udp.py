"""One query over UDP: a socket of its own, connected to the upstream.

Lives here: that socket. Must not: judge what comes (reading.py), or wait (fetch.py).

A socket for each query has a port for each query, chosen at random by the kernel (RFC 6056), and,
being connected, takes datagrams of the upstream alone and hears of refusals at once. asyncio-dgram
would take twice the time for each query, and its recv() does not return when a refusal comes
(measured: it waits for a datagram for ever), so the socket is read directly.
"""

import asyncio
import errno
import socket
from collections.abc import Callable

from vipd.dns.forward.upstream import Upstream

MOST_AT_ONCE = 8
"""Datagrams read in a row before others have their turn."""
NOT_ITS_FAULT = frozenset(
    {
        errno.EAGAIN,  # no local port left
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
    }
)
"""Errors that say nothing of the upstream."""

_buffer = bytearray(65_535)
_view = memoryview(_buffer)


class UdpWay:
    """A query that was sent. Raise OSError where it cannot be.

    `heard` is called with each datagram, `lost` with the error that ends it; neither after `close`.
    """

    def __init__(
        self,
        upstream: Upstream,
        message: bytes,
        heard: Callable[[bytes], None],
        lost: Callable[[OSError], None],
    ) -> None:
        family = socket.AF_INET6 if upstream.is_ipv6 else socket.AF_INET
        self._heard = heard
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.connect((upstream.address, upstream.port))
            self._socket.send(message)
        except OSError:
            self._socket.close()
            raise
        # By number: a selector that does not know a socket yet would spell it out for its error.
        self._loop.add_reader(self._socket.fileno(), self._readable)

    def close(self) -> None:
        """Hear no more."""
        number = self._socket.fileno()
        if number >= 0:
            self._loop.remove_reader(number)
            self._socket.close()

    def _readable(self) -> None:
        for _ in range(MOST_AT_ONCE):
            if self._socket.fileno() < 0:
                return  # closed by what it heard
            try:
                size = self._socket.recv_into(_buffer)
            except BlockingIOError:
                return
            except OSError as error:
                self.close()
                self._lost(error)
                return
            self._heard(bytes(_view[:size]))
