"""Connecting from the client's own address, so that the endpoint sees it (IP_TRANSPARENT, ip(7)).

Lives here: sockets with the address of a client, whether answers to one would come by here, and
what is done where there can be none. Must not: know policies (sources.py), or choose endpoints.

Answers are addressed to the client, and reach this process because the daemon has the kernel mark
and deliver them here (return_path.py). That needs them to pass this node as packets that are
routed: where client and endpoint are behind the same interface, on a bridge or because they are the
same pod, they would go straight from one to the other. The client's port is kept where it can be.
"""

import errno
import socket
import struct
from collections.abc import Callable
from typing import Final
from typing import Protocol as Interface

from vipd.backends import log, netlink
from vipd.backends.netlink import ACK, HEADER, REQUEST, attribute, attributes
from vipd.backends.userspace.forwarder.keepalive import keep_alive
from vipd.proxy.errors import DataplaneError
from vipd.proxy.names import parse_address
from vipd.proxy.virtualserver import Endpoint

MOST_WAYS: Final = 4096
"""Addresses whose interface is remembered."""
_IP_TRANSPARENT: Final = 19
_IPV6_TRANSPARENT: Final = 75
_IP_BIND_ADDRESS_NO_PORT: Final = 24
_GET_ROUTE: Final = 26
_DESTINATION, _INTERFACE, _UNICAST = 1, 4, 1
_NOWHERE: Final = 0
_NOT_THIS_PORT: Final = frozenset({errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES})
"""Somebody has the client's port here, or a connection from it to that endpoint, or it is below
1024."""
_NOT_THIS_WAY: Final = _NOT_THIS_PORT | {errno.EPERM, errno.EINVAL, errno.EAGAIN, errno.ENOPROTOOPT}
"""What the kernel says of a source that it does not let us have."""

Address = tuple[str, int]
"""Of a client or an endpoint, as accept() returns it and connect() takes it."""


class Shows(Interface):
    """What is asked of a place; `Served` is it."""

    def shows(self, client: str, endpoint: Endpoint) -> bool:
        """Return whether the endpoint may see the client's address."""
        ...


class Transparent:
    """What a worker that may show clients' addresses does for it, and counts."""

    def __init__(self) -> None:
        self._shown = 0
        self._not_shown = 0
        self._ways: dict[str, int] = {}
        self._netlink: netlink.Netlink | None = None

    def by_name(self) -> dict[str, int]:
        """Return the counters: attempts with the client's address, and those it was denied to."""
        return {"transparent": self._shown, "not_transparent": self._not_shown}

    def forget_ways(self) -> None:
        """Ask the kernel anew where addresses are: something has changed."""
        self._ways.clear()

    def close(self) -> None:
        """Close what is open."""
        if self._netlink is not None:
            self._netlink.__exit__(None, None, None)
            self._netlink = None

    def is_due(self, served: Shows, client: str, endpoint: Endpoint) -> bool:
        """Return whether a connection of the client is to come from the client's address."""
        if not served.shows(client, endpoint):
            return False
        here, there = self._way(client), self._way(str(endpoint.address))
        return _NOWHERE not in (here, there) and here != there

    def connect(
        self, sock: socket.SocketType, client: Address, to: Address
    ) -> tuple[socket.SocketType, int]:
        """Begin a TCP connection to an endpoint; return its socket, and the errno or 0.

        From the client's address and port; else from its address and another port; else, counted,
        as others are. The socket is the given one or a new one in its place, and open.
        """
        problem = 0
        for source in (client, (client[0], 0)):
            problem = _bind(sock, source)
            if not problem:
                problem = sock.connect_ex(to)
                if problem not in _NOT_THIS_WAY:
                    self._shown += 1
                    return sock, problem
                try:
                    sock = _another(sock)
                except OSError as error:
                    return sock, error.errno or problem
            if problem not in _NOT_THIS_PORT:
                break
        self._deny(problem)
        return sock, sock.connect_ex(to)

    def binder(
        self, served: Shows, client: Address, endpoint: Endpoint
    ) -> Callable[[socket.socket], bool] | None:
        """Return what gives a UDP socket the client's address, where the endpoint is to see it."""
        if not self.is_due(served, client[0], endpoint):
            return None
        return lambda sock: self.bind(sock, client)

    def bind(self, sock: socket.socket, client: Address) -> bool:
        """Give a UDP socket the client's address, and its port if it is free; return whether.

        No two sockets share a port: the kernel would give the answers of both to one of them.
        """
        problem = 0
        for port in (client[1], 0):
            problem = _bind(sock, (client[0], port))
            if not problem:
                self._shown += 1
                return True
            if problem not in _NOT_THIS_PORT:
                break
        self._deny(problem)
        return False

    def _deny(self, problem: int) -> None:
        if not self._not_shown:
            log.warning(
                "an endpoint sees the node and not its client; from now on this is only counted",
                why=errno.errorcode.get(problem, str(problem)),
            )
        self._not_shown += 1

    def _way(self, address: str) -> int:
        """Return the index of the interface behind which an address is, remembered."""
        known = self._ways.get(address)
        if known is None:
            known = self._ways[address] = self._asked(address)
            if len(self._ways) > MOST_WAYS:
                del self._ways[next(iter(self._ways))]
        return known

    def _asked(self, address: str) -> int:
        """Ask the kernel; _NOWHERE where the address is the node's own, or there is no way."""
        try:
            packed = parse_address(address).packed
            if self._netlink is None:
                self._netlink = netlink.routes()
            six = len(packed) == 16
            family = socket.AF_INET6 if six else socket.AF_INET
            body = struct.pack("=BBBBBBBBI", family, 8 * len(packed), 0, 0, 0, 0, 0, 0, 0)
            body += attribute(_DESTINATION, packed)
            header = HEADER.pack(HEADER.size + len(body), _GET_ROUTE, REQUEST | ACK, 0, 0)
            for answer in self._netlink.ask(header + body):
                found = dict(attributes(answer, HEADER.size + 12))
                if answer[HEADER.size + 7] == _UNICAST and _INTERFACE in found:
                    return int(struct.unpack("=I", found[_INTERFACE])[0])
        except (DataplaneError, OSError, ValueError):
            pass
        return _NOWHERE


def _bind(sock: socket.SocketType, source: Address) -> int:
    """Let a socket have an address that is not this node's; return the errno, or 0."""
    try:
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
        if sock.type == socket.SOCK_STREAM:
            # Beside others from the same port to other endpoints; for another port, one that is
            # free towards this endpoint is found by connect().
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, int(not source[1]))
        sock.bind(source)
    except OSError as error:
        return error.errno or errno.EINVAL
    return 0


def _another(sock: socket.SocketType) -> socket.SocketType:
    """Return a socket like this one, which is closed: nothing was told of it yet.

    Raise OSError where there is none; this one is open then.
    """
    made = socket.SocketType(sock.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0)
    sock.close()
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    keep_alive(made)
    return made
