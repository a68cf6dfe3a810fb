"""Watching our tables: the kernel tells of every change, and by whom.

Lives here: the socket. Must not: know what is done about it (proxy/repair.py).
"""

import asyncio
import contextlib
import ctypes
import errno
import socket
import struct
from collections.abc import AsyncIterator

from vipd.backends.nftables import tool
from vipd.backends.nftables.notified import Notified
from vipd.backends.watching import Drift

_NETFILTER = 12  # NETLINK_NETFILTER
_GROUP = 7  # NFNLGRP_NFTABLES
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_SO_RCVBUFFORCE, _SO_ATTACH_FILTER = 33, 26
_BUFFER = 4 << 20
_LARGEST = 1 << 17


async def drifts() -> AsyncIterator[Drift]:
    """Yield changes of our tables that another process made, as they happen."""
    notified = Notified()
    with _subscribed() as watching:
        loop = asyncio.get_running_loop()
        while True:
            try:
                datagram = await loop.sock_recv(watching, _LARGEST)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                notified.lost()
                yield Drift(("notifications were lost",), "")
                continue
            for one in notified.feed(datagram):
                if one.touched and not await tool.RUNS.include(one.port, one.process):
                    yield Drift(one.touched, one.name, one.process)


def _without_new_elements(watching: socket.socket) -> None:
    """Let the kernel drop datagrams that begin with an element that was added (NFT_MSG_NEWSETELEM).

    Our own cold start makes megabytes of them while this process is busy with more. What others
    add to our sets is found by comparing.
    """
    kind = int.from_bytes(struct.pack("=H", 10 << 8 | 12), "big")
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (0x28, 0, 0, 4),  # load the half word at 4: nlmsg_type
            (0x15, 0, 1, kind),  # equal?
            (0x06, 0, 0, 0),  # drop
            (0x06, 0, 0, 0xFFFFFFFF),  # keep
        )
    )
    kept = ctypes.create_string_buffer(program, len(program))
    watching.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", 4, ctypes.addressof(kept))
    )


def _subscribed() -> socket.socket:
    watching = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETFILTER)
    try:
        watching.setblocking(False)
        with contextlib.suppress(PermissionError):  # without privileges in the first namespace
            watching.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        _without_new_elements(watching)
        watching.bind((0, 0))
        watching.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _GROUP)
    except OSError:
        watching.close()
        raise
    return watching
