"""Where HTTP is answered: sockets that listen, or cannot yet.

Lives here: one place and its socket, its server once there is one, and why there is none. Must not:
know what is answered there, or when it is tried again.

A socket listens from the start; who connects before the server is there waits in the kernel.
"""

import asyncio
import contextlib
import os
import socket
import sys
from importlib import import_module
from ipaddress import ip_address

import structlog
from msgspec import Struct

from vipd.proxy.http.answer import Respond
from vipd.proxy.http.crowd import Crowd
from vipd.proxy.names import Address

BACKLOG = 128
"""Connections that wait to be accepted."""

_SERVER = "vipd.proxy.http.server"

log = structlog.get_logger()


class Place(Struct, frozen=True, order=False):
    """An address, any of a family's where it is unspecified, and a TCP port."""

    address: Address
    port: int

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{host}:{self.port}"


class Listener:
    """One place where `respond` answers; `what` it is for is named where it cannot.

    `both` families come to the unspecified address of either, as in Go, where this host has both;
    else one of IPv4 may have the same port.
    """

    def __init__(
        self, what: str, place: Place, respond: Respond, crowd: Crowd, *, both: bool = False
    ) -> None:
        self.what, self.place = what, place
        self._respond, self._crowd, self._both = respond, crowd, both
        self._socket: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self.failure = ""
        """Why nothing listens there; empty: something does."""

    @property
    def port(self) -> int:
        """The port that is really listened on: 0 asks for any."""
        return self.place.port if self._socket is None else int(self._socket.getsockname()[1])

    def open(self) -> bool:
        """Listen, unless it does already; return whether it does. What is wrong is logged once."""
        if self._socket is not None:
            return True
        try:
            self._socket = self._listening()
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else str(error)
            if why != self.failure:
                log.warning("cannot listen", what=self.what, at=str(self.place), why=why)
            self.failure = why
            return False
        if self.failure:
            log.info("listens after all", what=self.what, at=str(self.place))
        self.failure = ""
        return True

    def _listening(self) -> socket.socket:
        address = self.place.address
        if self._both and address.is_unspecified and address.version == 4:
            with contextlib.suppress(OSError):  # no IPv6 here, or somebody has the port: IPv4 says
                return self._listening_at(ip_address("::"))
        return self._listening_at(address)

    def _listening_at(self, address: Address) -> socket.socket:
        family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
        made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not self._both)
            made.bind((str(address), self.place.port))
            made.listen(BACKLOG)
        except OSError:
            made.close()
            raise
        return made

    async def serve(self) -> None:
        """Let a server take the connections, where something listens.

        Not to be closed meanwhile.
        """
        if self._socket is None or self._server is not None:
            return
        if _SERVER not in sys.modules:  # it takes long; the event loop goes on
            await asyncio.to_thread(import_module, _SERVER)
        from vipd.proxy.http.server import serve

        self._server = await serve(self._socket, self._respond, self._crowd)

    def close(self) -> None:
        """Listen no more. Connections that are open go on to their end."""
        if self._server is not None:
            self._server.close()
        elif self._socket is not None:
            self._socket.close()
        self._socket = self._server = None

    def trouble(self) -> str:
        """Return a sentence on what is wrong, empty where nothing is."""
        if not self.failure:
            return ""
        return f"{self.what} cannot be listened for at {self.place}: {self.failure}"
