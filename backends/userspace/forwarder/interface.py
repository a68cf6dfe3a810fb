"""The interface that a connection or a datagram came in by, asked of the kernel.

Lives here: socket options and control messages. Must not: know what an interface means.

Of a TCP connection the kernel remembers the interface of the handshake's last segment, and tells it
as "packet options" (`do_ip_getsockopt` in net/ipv4/ip_sockglue.c, `ipv6_getsockopt` in
net/ipv6/ipv6_sockglue.c, Linux 6.18). Of a datagram it is told beside it (ip(7), ipv6(7)).
"""

import contextlib
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Final

_IP_PKTINFO: Final = 8
_IP_PKTOPTIONS: Final = 9
_IPV6_2292PKTOPTIONS: Final = 6
_HEADER: Final = struct.Struct("@Nii")
"""struct cmsghdr: length with this header, level, type."""
SPACE: Final = socket.CMSG_SPACE(20)
"""Room for the message beside a datagram: struct in6_pktinfo; in_pktinfo is smaller."""

ControlMessage = tuple[int, int, bytes]
"""Level, type and data, as recvmsg() returns it."""


def ask(sock: socket.SocketType) -> None:
    """Let the kernel tell the interface of what this socket receives from now on."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)


def of_connection(sock: socket.SocketType) -> str:
    """Return the interface that a connection was accepted from, or an empty text."""
    ask(sock)
    if sock.family == socket.AF_INET6:
        told = sock.getsockopt(socket.IPPROTO_IPV6, _IPV6_2292PKTOPTIONS, SPACE)
    else:
        told = sock.getsockopt(socket.IPPROTO_IP, _IP_PKTOPTIONS, SPACE)
    return of_datagram(_messages(told))


def of_datagram(beside: Iterable[ControlMessage]) -> str:
    """Return the interface that is told beside a datagram, or an empty text."""
    for level, kind, data in beside:
        index = 0
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
            (index,) = struct.unpack_from("@i", data)
        elif (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            (index,) = struct.unpack_from("@i", data, 16)
        with contextlib.suppress(OSError):  # 0, or it is gone
            return socket.if_indextoname(index)
    return ""


def _messages(told: bytes) -> Iterator[ControlMessage]:
    while len(told) >= _HEADER.size:
        length, level, kind = _HEADER.unpack_from(told)
        yield level, kind, told[_HEADER.size : length]
        told = told[socket.CMSG_SPACE(length - _HEADER.size) :]
