"""Watching routes: the kernel tells of every route and policy rule that is removed.

Lives here: the socket, and which of them are ours by their protocol number. Must not: know what is
done about it. Source: include/uapi/linux/{rtnetlink,fib_rules}.h, Linux 6.1.

What goes with the interface lo (`ip link set lo down`) is not told for IPv4; comparing finds it.
"""

import asyncio
import errno
import socket
import struct
from collections.abc import AsyncIterator

from vipd.backends import netlink
from vipd.backends.netlink import HEADER, address, attributes
from vipd.backends.runs import RUNS
from vipd.backends.watching import Drift

_ROUTE = 0  # NETLINK_ROUTE
_GROUPS = (7, 8, 11, 19)  # RTNLGRP_IPV4_ROUTE, _IPV4_RULE, _IPV6_ROUTE, _IPV6_RULE
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_DEL_ROUTE, _DEL_RULE = 25, 33
_TABLE_AT, _PROTOCOL_AT = 20, 21
"""Where a message has its routing table (of both kinds) and its protocol number (of routes)."""
_LARGEST = 1 << 16


async def drifts(protocol: int, table: int = -1) -> AsyncIterator[Drift]:
    """Yield removals, by another process, of routes of a protocol number and of rules to a table.

    Raise OSError where it cannot be watched.
    """
    with _subscribed(protocol, table) as watching:
        loop = asyncio.get_running_loop()
        while True:
            try:
                datagram = await loop.sock_recv(watching, _LARGEST)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                yield Drift(("notifications were lost",))
                continue
            for kind, _, _, message in netlink.split(datagram):
                (port,) = struct.unpack_from("=I", message, 12)
                if not RUNS.has_port(port):
                    yield Drift((_told(kind, message),))


def _told(kind: int, message: bytes) -> str:
    if kind == _DEL_RULE:
        return "policy rule deleted"
    found = dict(attributes(message, HEADER.size + 12)).get(1)
    return f"route deleted {address(found) if found else 'default'}"


def _subscribed(protocol: int, table: int) -> socket.socket:
    watching = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _ROUTE)
    try:
        watching.setblocking(False)
        # A node with a routing daemon has many routes of others that come and go.
        netlink.let_through(
            watching,
            (netlink.LOAD_HALF, 0, 0, netlink.TYPE_AT),
            (netlink.IS_EQUAL, 0, 2, netlink.as_loaded(_DEL_ROUTE)),
            (netlink.LOAD_BYTE, 0, 0, _PROTOCOL_AT),
            (netlink.IS_EQUAL, 3, 4, protocol),
            (netlink.IS_EQUAL, 0, 3, netlink.as_loaded(_DEL_RULE)),
            (netlink.LOAD_BYTE, 0, 0, _TABLE_AT),
            (netlink.IS_EQUAL, 0, 1, table & 0xFFFFFFFF),
            netlink.KEEP,
            netlink.DROP,
        )
        watching.bind((0, 0))
        for group in _GROUPS:
            watching.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
    except OSError:
        watching.close()
        raise
    return watching
